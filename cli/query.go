package cli

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/kvmeter/kvmeter/central/client"
)

// queryHelp is the part of a command's help that teaches the query language.
const queryHelp = `
A query (-q) is a list of terms, separated by ";", that must all hold. A term
is FIELD OP VALUE, with OP one of = != < <= > >=. Fields are resource, project,
user, source, timestamp and metadata.KEY. A VALUE for metadata may name its
type: string::, integer::, float::, boolean:: or datetime::.`

var (
	queryOp   = regexp.MustCompile(`!=|>=|<=|>|<|=`)
	queryType = regexp.MustCompile(`(?s)^(string|integer|float|datetime|boolean)::(.+)$`)
)

var opNames = map[string]string{"!=": "ne", ">=": "ge", "<=": "le", ">": "gt", "<": "lt", "=": "eq"}

// parseQuery reads terms such as "resource=vm-1;metadata.x=integer::2". The
// first operator of a term splits it.
func parseQuery(text string) ([]client.Term, error) {
	var terms []client.Term
	for part := range strings.SplitSeq(text, ";") {
		if strings.TrimSpace(part) == "" {
			continue
		}
		at := queryOp.FindStringIndex(part)
		if at == nil {
			return nil, fmt.Errorf("invalid query %q: missing operator, one of = != < <= > >=", part)
		}
		t := client.Term{
			Field: strings.TrimSpace(part[:at[0]]),
			Op:    opNames[part[at[0]:at[1]]],
			Value: strings.TrimSpace(part[at[1]:]),
		}
		if t.Field == "" {
			return nil, fmt.Errorf("invalid query %q: missing field before the operator", part)
		}
		if t.Value == "" {
			return nil, fmt.Errorf("invalid query %q: missing value after the operator", part)
		}
		if m := queryType.FindStringSubmatch(t.Value); m != nil {
			t.Type, t.Value = m[1], m[2]
		}
		terms = append(terms, t)
	}
	return terms, nil
}

// parseAggregate reads FUNC or FUNC<-PARAM.
func parseAggregate(text string) (client.Aggregate, error) {
	function, param, _ := strings.Cut(text, "<-")
	a := client.Aggregate{Func: strings.TrimSpace(function), Param: strings.TrimSpace(param)}
	if a.Func == "" {
		return a, fmt.Errorf("invalid aggregate %q: it is FUNC or FUNC<-PARAM, such as avg or cardinality<-resource_id", text)
	}
	return a, nil
}
