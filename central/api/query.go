package api

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// fields are the names that a simple query may use at an endpoint, short
// forms, sorted as the error text lists them.
type fields struct {
	names []string
	times bool // timestamp and search_offset
}

var (
	sampleFields   = fields{[]string{"message_id", "meter", "project", "resource", "search_offset", "source", "timestamp", "user"}, true}
	resourceFields = fields{[]string{"project", "resource", "search_offset", "source", "timestamp", "user"}, true}
	meterFields    = fields{[]string{"project", "resource", "source", "unique", "user"}, false}
)

// stored says which field of the store a query's field is.
var stored = map[string]store.Field{
	"message_id": store.FieldID, "meter": store.FieldMeter, "project": store.FieldProject,
	"resource": store.FieldResource, "source": store.FieldSource, "user": store.FieldUser,
}

// query is a simple query: all of its terms must hold.
type query struct {
	equal    map[store.Field]any
	metadata map[string]store.Filter
	projects []string // the projects that were asked for
	// The bounds as they were asked for, and how far search_offset widens them
	// on both sides, in µs.
	lower, upper *bound
	offset       int64
}

type bound struct {
	at int64 // µs since the Unix epoch
	op store.Op
}

// set makes a field equal to a value, whatever the query says of it.
func (q *query) set(f store.Field, value any) { q.equal[f] = value }

// parseQuery reads the terms of a simple query. Of two terms on the same field
// the last one holds.
func parseQuery(terms []object, known fields) (*query, error) {
	q := &query{equal: map[store.Field]any{}, metadata: map[string]store.Filter{}}
	if err := complete(terms); err != nil {
		return nil, err
	}
	hasOffset := false
	for _, t := range terms {
		var err error
		switch field := t["field"]; {
		case field == "timestamp" && known.times:
			err = q.addTime(t)
		case field == "search_offset" && known.times:
			hasOffset = true
			err = q.addOffset(t)
		case field == "timestamp" || field == "search_offset":
			err = unknownArgument(field, "not valid for this resource")
		case strings.HasPrefix(field, "metadata."):
			err = q.addMetadata(field, field[len("metadata."):], t)
		case strings.HasPrefix(field, "resource_metadata."):
			err = q.addMetadata(field, field[len("resource_metadata."):], t)
		default:
			err = q.addEqual(field, t, terms, known)
		}
		if err != nil {
			return nil, err
		}
	}
	if hasOffset && q.lower == nil && q.upper == nil {
		return nil, invalidInput("field", "search_offset", "search_offset cannot be used without timestamp")
	}
	return q, nil
}

// complete refuses terms that lack a field or a value, and more than a query may
// have.
func complete(terms []object) error {
	if len(terms) > maxTerms {
		return badRequest("%d terms in a query, at most %d are taken.", len(terms), maxTerms)
	}
	for _, t := range terms {
		for _, attr := range []string{"field", "value"} {
			if _, ok := t[attr]; !ok {
				return invalidInput("q."+attr, "None", "Mandatory field missing.")
			}
		}
	}
	return nil
}

func op(t object) string {
	if t["op"] == "" {
		return "eq"
	}
	return t["op"]
}

func onlyEq(t object) error {
	if op(t) != "eq" {
		return invalidInput("op", op(t), "unimplemented operator for "+clip(t["field"]))
	}
	return nil
}

func (q *query) addEqual(field string, t object, terms []object, known fields) error {
	name := field
	if short, ok := strings.CutSuffix(field, "_id"); ok && (short == "user" || short == "project" || short == "resource") {
		name = short
	}
	if !slices.Contains(known.names, name) {
		return unknownArgument(name, fmt.Sprintf("unrecognized field in query: %s, valid keys: %s", clip(describe(terms)), describeNames(known.names)))
	}
	if err := onlyEq(t); err != nil {
		return err
	}
	value := t["value"]
	if name == "project" && value != "" {
		q.projects = append(q.projects, value)
	}
	f, ok := stored[name]
	switch {
	case !ok: // "unique" selects nothing
	case value == "": // asks for nothing
		delete(q.equal, f)
	case value == "None" && (name == "user" || name == "project"):
		q.equal[f] = nil
	default:
		q.equal[f] = value
	}
	return nil
}

// describe prints the terms of a query as the original does in its errors.
func describe(terms []object) string {
	all := make([]string, len(terms))
	for i, t := range terms {
		kind, ok := t["type"]
		if !ok {
			kind = "Unset"
		}
		all[i] = fmt.Sprintf("<Query %s %s %s %s>", pythonRepr(t["field"]), op(t), pythonRepr(t["value"]), kind)
	}
	return "[" + strings.Join(all, ", ") + "]"
}

func describeNames(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = pythonRepr(n)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

func (q *query) addTime(t object) error {
	o := store.Op(op(t))
	if o != store.Lt && o != store.Le && o != store.Gt && o != store.Ge {
		return invalidInput("op", op(t), "unimplemented operator for timestamp")
	}
	at, err := parseTime(t["value"])
	if err != nil {
		return invalidInput("timestamp", t["value"], "invalid timestamp format")
	}
	if o == store.Lt || o == store.Le {
		q.upper = &bound{at, o}
	} else {
		q.lower = &bound{at, o}
	}
	return nil
}

// maxOffset bounds search_offset, in minutes.
const maxOffset = 1e9

func (q *query) addOffset(t object) error {
	if err := onlyEq(t); err != nil {
		return err
	}
	minutes, err := parseInt("search_offset", t["value"])
	if err != nil {
		return err
	}
	if minutes > maxOffset || minutes < -maxOffset {
		return invalidInput("search_offset", t["value"], "It must be between -1000000000 and 1000000000 minutes.")
	}
	q.offset = minutes * time.Minute.Microseconds()
	return nil
}

func (q *query) addMetadata(field, path string, t object) error {
	if err := onlyEq(t); err != nil {
		return err
	}
	values, err := metadataValues(t["value"], t["type"])
	if err != nil {
		return err
	}
	either := make([]store.Filter, len(values))
	for i, v := range values {
		either[i] = store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: path, Op: store.Eq, Value: v}}
	}
	if path == "" || len(path) > maxKey {
		return unknownArgument(field, fmt.Sprintf("a key of at most %d bytes must follow the dot", maxKey))
	}
	q.metadata[path] = either[0]
	if len(either) > 1 {
		q.metadata[path] = store.Filter{Or: either}
	}
	return nil
}

// metadataValues returns the values any of which a metadata term asks for: one,
// or for a time all its usual spellings.
func metadataValues(text, kind string) ([]any, error) {
	unable := badRequest("Unable to convert the value %s to the expected data type %s.", clip(text), kind)
	word := strings.TrimSpace(text)
	switch kind {
	case "":
		return []any{pythonLiteral(text)}, nil
	case "string":
		return []any{text}, nil
	case "integer":
		n, err := strconv.ParseInt(word, 10, 64)
		if err != nil {
			return nil, unable
		}
		return []any{json.Number(strconv.FormatInt(n, 10))}, nil
	case "float":
		f, err := strconv.ParseFloat(word, 64)
		if err != nil || sample.Float(f).Check() != nil {
			return nil, unable
		}
		return []any{json.Number(sample.AppendFloat(nil, f))}, nil
	case "boolean":
		switch word = strings.ToLower(word); {
		case slices.Contains([]string{"t", "true", "on", "y", "yes", "1"}, word):
			return []any{true}, nil
		case slices.Contains([]string{"f", "false", "off", "n", "no", "0"}, word):
			return []any{false}, nil
		}
		return nil, unable
	case "datetime":
		at, err := parseTime(text)
		if err != nil {
			return nil, unable
		}
		iso := string(sample.AppendTime(nil, at))
		spaced := strings.Replace(iso, "T", " ", 1)
		return []any{iso, iso + "Z", iso + "+00:00", spaced, spaced + "Z", spaced + "+00:00"}, nil
	}
	return nil, badRequest("The data type %s is not supported. The supported data type list is: ['integer', 'float', 'string', 'boolean', 'datetime']", clip(kind))
}

// filter returns what the store is to look for.
func (q *query) filter() store.Filter {
	var all []store.Filter
	for f, v := range q.equal {
		all = append(all, store.Where(f, store.Eq, v))
	}
	for _, f := range q.metadata {
		all = append(all, f)
	}
	if b := q.lower; b != nil {
		all = append(all, store.Where(store.FieldTime, b.op, b.at-q.offset))
	}
	if b := q.upper; b != nil {
		all = append(all, store.Where(store.FieldTime, b.op, b.at+q.offset))
	}
	switch len(all) {
	case 0:
		return store.Filter{}
	case 1:
		return all[0]
	}
	return store.And(all...)
}

// timeLayouts are the forms of ISO 8601 that are read; all but the first two
// may have fractions of a second and a zone.
var timeLayouts = []string{
	"2006-01-02", "20060102",
	"2006-01-02T15:04:05Z07:00", "2006-01-02T15:04:05-0700", "2006-01-02T15:04:05-07", "2006-01-02T15:04:05",
	"2006-01-02T15:04Z07:00", "2006-01-02T15:04-0700", "2006-01-02T15:04",
	"2006-01-02T15", "20060102T150405Z07:00", "20060102T150405",
}

// parseTime reads a time as ISO 8601 has it, UTC unless it names a zone, and
// returns it in µs since the Unix epoch.
func parseTime(s string) (int64, error) {
	t, _, err := readTime(s)
	return t.UnixMicro(), err
}

// readTime is parseTime that keeps the zone and says whether there was one.
func readTime(s string) (t time.Time, zoned bool, err error) {
	s = strings.TrimSpace(s)
	if len(s) > 10 && s[10] == ' ' {
		s = s[:10] + "T" + s[11:]
	}
	for _, layout := range timeLayouts {
		t, e := time.Parse(layout, s)
		if e == nil {
			return t, strings.Contains(layout, "07"), nil
		}
		err = cmp.Or(err, e)
	}
	return time.Time{}, false, err
}
