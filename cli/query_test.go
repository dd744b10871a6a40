package cli

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/central/client"
)

// terms makes terms of their fields, operators, values and types.
func terms(parts ...string) (all []client.Term) {
	for p := range slices.Chunk(parts, 4) {
		all = append(all, client.Term{Field: p[0], Op: p[1], Value: p[2], Type: p[3]})
	}
	return all
}

func TestParseQuery(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		want []client.Term
		err  string
	}{
		"nothing asks for nothing":          {in: ""},
		"semicolons separate terms":         {in: "resource=vm-1;metadata.x=integer::2", want: terms("resource", "eq", "vm-1", "", "metadata.x", "eq", "2", "integer")},
		"a last semicolon is harmless":      {in: "resource=vm-1;", want: terms("resource", "eq", "vm-1", "")},
		"blanks around are not part of it":  {in: "  user = u 1 ", want: terms("user", "eq", "u 1", "")},
		"the first operator splits":         {in: "metadata.x=a>=b", want: terms("metadata.x", "eq", "a>=b", "")},
		"the longest operator is taken":     {in: "timestamp>=2026-01-01", want: terms("timestamp", "ge", "2026-01-01", "")},
		"every operator has its name":       {in: "a!=1;a<=2;a>3;a<4", want: terms("a", "ne", "1", "", "a", "le", "2", "", "a", "gt", "3", "", "a", "lt", "4", "")},
		"an unknown type is a value":        {in: "a=uuid::b", want: terms("a", "eq", "uuid::b", "")},
		"a type without a value is a value": {in: "a=string::", want: terms("a", "eq", "string::", "")},
		"a value may hold colons":           {in: "a=string::b::c", want: terms("a", "eq", "b::c", "string")},
		"no operator":                       {in: "resource", err: "missing operator"},
		"no field":                          {in: "=x", err: "missing field"},
		"no value":                          {in: "a=1;b>= ", err: "missing value"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseQuery(tc.in)
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("got error %v, want %q", err, tc.err)
			}
			if err == nil && !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

func FuzzParseQuery(f *testing.F) {
	for _, s := range []string{"resource=vm-1;metadata.x=integer::2", "a!=b", ";;", "=", "a>=<b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		terms, err := parseQuery(s)
		if err != nil {
			return
		}
		for _, term := range terms {
			if term.Field == "" || term.Value == "" || term.Op == "" || strings.ContainsAny(term.Field, "=<>;") {
				t.Errorf("%q gave %+v", s, term)
			}
		}
	})
}
