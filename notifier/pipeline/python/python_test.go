package python

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
)

// testScope gives expressions a volume and metadata.
type testScope struct {
	volume   Number
	metadata []byte
}

func (s *testScope) Name(name string) Value {
	switch name {
	case "volume":
		return Of(s.volume)
	case "resource_metadata":
		return JSON(s.metadata)
	}
	return Empty
}

func (s *testScope) Reference(string) Value { return Empty }

// TestResultsArePythons compares with what Python 3.11 gave for the same
// expressions over Ceilometer's namespaces: testdata/expressions.jsonl holds
// lists of expression, volume, metadata and result, null where there was an error
// or something that is no finite number.
func TestResultsArePythons(t *testing.T) {
	f, err := os.Open("testdata/expressions.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	n := 0
	for lines := bufio.NewScanner(f); lines.Scan(); n++ {
		var c []json.RawMessage
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			t.Fatal(err)
		}
		var text string
		if err := json.Unmarshal(c[0], &text); err != nil {
			t.Fatal(err)
		}
		volume, err := parseNumber(string(c[1]))
		if err != nil {
			t.Fatal(err)
		}
		got := "null"
		if e, err := Parse(text); err == nil {
			if v, err := e.EvalNumber(&testScope{volume, c[2]}); err == nil {
				if v, err := v.Volume(); err == nil {
					got = v.String()
				}
			}
		}
		if got != string(c[3]) {
			t.Errorf("%s with volume %s and metadata %s: got %s, want %s", text, c[1], c[2], got, c[3])
		}
	}
	if n < 900 {
		t.Errorf("%d cases", n)
	}
}

func TestParseRefuses(t *testing.T) {
	for source, want := range map[string]string{
		"":                                "the expression ends too early, at character 1",
		"volume *":                        "the expression ends too early, at character 9",
		"float(volume)":                   "a function call; expressions have operators only, at character 6",
		"volume; 1":                       `";" is not understood, at character 7`,
		"volume 1":                        `"1" does not belong here, at character 8`,
		"lambda":                          `"lambda" does not belong here, at character 1`,
		"'open":                           "text without its closing quote, at character 1",
		`'a\n'`:                           "text with a backslash, at character 1",
		"$cpu":                            "$ without the name of a meter: write $(name), at character 1",
		"1 if 2":                          "the expression ends too early",
		"a not b":                         `"b" does not belong here`,
		"a.1":                             `".1" does not belong here`,
		"a[1":                             "the expression ends too early",
		strings.Repeat("(", 200) + "1":    "the expression nests too deep",
		strings.Repeat("-", 200) + "1":    "the expression nests too deep",
		strings.Repeat("not ", 200) + "1": "the expression nests too deep",
		"0b2":                             `"b2" does not belong here`,
	} {
		if _, err := Parse(source); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("Parse(%.20q) returned %v, want %s", source, err, want)
		}
	}
}

func TestReferences(t *testing.T) {
	e, err := Parse("$(a.b) + $(c).resource_metadata.n / $(a.b)")
	if err != nil || strings.Join(e.References, " ") != "a.b c" {
		t.Errorf("got %v, %v", e, err)
	}
}

func TestFieldReadsTheLastOfSeveralAndNothingOfBrokenJSON(t *testing.T) {
	for in, want := range map[string]string{
		`{"a": 1, "b": {"a": 5}, "a": 2}`:   "2",
		` { "\u0061" : "x}\"," , "b":[1] }`: `"x}\","`,
		`{"b": [1, {"a": 1}], "c": 1}`:      "",
		`{"a"`:                              "",
		`{"a": `:                            "",
		`{"b": [1, "a": 1}`:                 "",
		`[1]`:                               "",
		``:                                  "",
	} {
		if got := string(Field([]byte(in), "a")); got != want {
			t.Errorf("Field(%s) is %q, want %q", in, got, want)
		}
	}
}

func FuzzEval(f *testing.F) {
	for _, s := range []string{"100.0 / (10**9 * (resource_metadata.cpu_number or 1))", "$(a) - $(b).x[1]", "1 << 4000 << 4000", "9**9**9", "-1 ** 1e9", "0x1f if not a in b else 'x'"} {
		f.Add(s, `{"cpu_number": 2, "x": [1, {"y": null}]}`)
	}
	f.Fuzz(func(t *testing.T, source, metadata string) {
		e, err := Parse(source)
		if err != nil {
			return
		}
		v, err := e.EvalNumber(&testScope{Int(1 << 62), []byte(metadata)})
		if err != nil {
			return
		}
		if v, err := v.Volume(); err == nil && v.Check() != nil || err != nil && !errors.Is(err, ErrNotFinite) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("got %v, %v", v, err)
		}
	})
}

func BenchmarkEval(b *testing.B) {
	e, err := Parse("100.0 / (10**9 * (resource_metadata.cpu_number or 1))")
	if err != nil {
		b.Fatal(err)
	}
	s := &testScope{Int(1 << 40), []byte(`{"display_name": "vm", "flavor": {"id": "1", "name": "m1", "vcpus": 2}, "cpu_number": 2}`)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := e.EvalNumber(s); err != nil {
			b.Fatal(err)
		}
	}
}
