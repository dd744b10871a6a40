package jsonpath

import (
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/notifier/value"
)

func parseJSON(t testing.TB, text string) *value.Value {
	t.Helper()
	var p value.Parser
	v, err := p.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return &v
}

// TestPathsAreThoseOfCeilometer compares with testdata/paths.jsonl: a message,
// then what jsonpath-rw 1.4.0 with jsonpath-rw-ext 1.2.2, which Ceilometer
// 19.0.0 used, found in it.
func TestPathsAreThoseOfCeilometer(t *testing.T) {
	data, err := os.ReadFile("testdata/paths.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	message := parseJSON(t, lines[0])
	for _, line := range lines[1:] {
		var c struct {
			Path       string
			ParseError bool `json:"parse_error"`
			Error      bool
			Values     *[]any
			N          int
			Paths      []string
		}
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatal(err)
		}
		p, err := Compile(c.Path)
		if (err != nil) != c.ParseError {
			t.Errorf("%s: got %v, want an error: %v", c.Path, err, c.ParseError)
			continue
		}
		if err != nil {
			var syntax *SyntaxError
			if !errors.As(err, &syntax) {
				t.Errorf("%s: %T", c.Path, err)
			}
			continue
		}
		ms, err := p.All(message, true)
		if (err != nil) != c.Error {
			t.Errorf("%s: got error %v, want one: %v", c.Path, err, c.Error)
			continue
		}
		if err != nil {
			continue
		}
		if len(ms) != c.N {
			t.Errorf("%s: %d matches, want %d", c.Path, len(ms), c.N)
			continue
		}
		got, where := []any{}, []string{}
		for i := range ms {
			var v any
			if err := json.Unmarshal(ms[i].AppendJSON(nil), &v); err != nil {
				t.Fatal(err)
			}
			got, where = append(got, v), append(where, ms[i].Where())
		}
		if c.Values != nil && !reflect.DeepEqual(got, *c.Values) {
			t.Errorf("%s\ngot  %v\nwant %v", c.Path, got, *c.Values)
		}
		for i, want := range c.Paths {
			// What was computed is nowhere.
			if want = strings.ReplaceAll(want, "`this`", "$"); want == "`len`" {
				want = "$"
			}
			if where[i] != want {
				t.Errorf("%s: match %d is at %s, want %s", c.Path, i, where[i], want)
			}
		}
		if without, err := p.All(message, false); err != nil || len(without) != len(ms) {
			t.Errorf("%s: %d matches without places, want %d", c.Path, len(without), len(ms))
		}
		first, err := p.First(message)
		if err != nil {
			t.Errorf("%s: %v", c.Path, err)
		}
		var want *value.Value
		for i := range ms {
			if ms[i].Kind != value.Null && want == nil {
				want = ms[i].Value
			}
		}
		if (first == nil) != (want == nil) || first != nil && !value.Equal(first, want) {
			t.Errorf("%s: first is %v, want %v", c.Path, first, want)
		}
	}
}

func TestSyntaxErrorsSayWhereAndWhatInstead(t *testing.T) {
	for path, want := range map[string]string{
		"$.payload.volume / 2":         `path "$.payload.volume / 2", column 18: "/" does not belong here (there is no division: `,
		"B/s":                          `column 2: "/" does not belong here (there is no division`,
		"%":                            `column 1: unexpected character '%' (quote`,
		"$.a -1":                       `column 5: "-1" does not belong here (put blanks around a minus`,
		"$.l.0":                        `column 5: a number alone is no path`,
		"$.truex":                      `column 3: "true" does not belong here (quote the name of a field that begins with true or false`,
		"$.where":                      `(quote the name of a field: 'where')`,
		"$.a[?(@.x=1 or @.y=2)]":       `conditions are joined by & only`,
		"$.a.[?(@.x=1)]":               `a filter follows its list without a dot`,
		"$.a == 1":                     `comparisons belong into a filter`,
		"'a":                           `a quote is not closed (end the text with "'")`,
		"$.a.`split(a,0)`":             "write `split(c, i, n)`",
		"$.a.`sub(/(/, x)`":            "regular expression",
		"$.a.`max`":                    "there is no function `max`",
		"1.5 + 1":                      "write both with a decimal point",
		"$.":                           "column 3: the path ends too early",
		strings.Repeat("(", 100) + "a": "more than 50 parts within each other",
		strings.Repeat("a", 5000):      "longer than 4096 bytes",
	} {
		if _, err := Compile(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s\ngot  %v\nwant %s", path, err, want)
		}
	}
}

func TestAPathThatMultipliesIsGivenUp(t *testing.T) {
	m := parseJSON(t, `{"a": [`+strings.Repeat("1, ", 999)+`1]}`)
	p, err := Compile("a.[*]" + strings.Repeat(".(`this`|`this`)", 40))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.First(m); !errors.Is(err, errSteps) {
		t.Errorf("got %v, want %v", err, errSteps)
	}
}

func FuzzCompile(f *testing.F) {
	data, err := os.ReadFile("testdata/paths.jsonl")
	if err != nil {
		f.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	for _, line := range lines[1:] {
		var c struct{ Path string }
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			f.Fatal(err)
		}
		f.Add(c.Path)
	}
	message := parseJSON(f, lines[0])
	f.Fuzz(func(t *testing.T, path string) {
		if len(path) > 100 { // backtracking of expressions
			return
		}
		p, err := Compile(path)
		if err != nil {
			return
		}
		ms, err := p.All(message, true)
		for i := range ms {
			_ = ms[i].Where()
			_ = ms[i].AppendJSON(nil)
		}
		first, ferr := p.First(message)
		if (err == nil) != (ferr == nil) && p.chain == nil {
			t.Errorf("%q: all gives %v, first gives %v", path, err, ferr)
		}
		for i := range ms {
			if ms[i].Kind != value.Null {
				if err == nil && (first == nil || !value.Equal(first, ms[i].Value) && first.Text != "NaN") {
					t.Errorf("%q: first is %v, want %v", path, first, ms[i].Value)
				}
				return
			}
		}
	})
}

func BenchmarkFirst(b *testing.B) {
	m := parseJSON(b, `{"ctxt": {}, "payload": {"host": "h", "nodename": "n", "metrics": [{"name": "cpu.frequency", "value": 1600}, {"name": "cpu.percent", "value": 0.15}]}}`)
	for name, path := range map[string]string{
		"field":      "$.payload.nodename",
		"filter":     "$.payload.metrics[?(@.name='cpu.percent')].value",
		"arithmetic": "$.payload.metrics[?(@.name='cpu.percent')].value * 100",
		"text":       "$.payload.host + '_' + $.payload.nodename",
	} {
		p, err := Compile(path)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if v, err := p.First(m); v == nil || err != nil {
					b.Fatal(v, err)
				}
			}
		})
	}
}
