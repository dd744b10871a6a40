package api

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestPythonLiteral(t *testing.T) {
	n := func(s string) any { return json.Number(s) }
	for in, want := range map[string]any{
		"2": n("2"), "-2": n("-2"), "+2": n("2"), "00": n("0"), "-0": n("0"), "12345678901234567890": n("12345678901234567890"),
		"1.5": n("1.5"), "1.": n("1.0"), ".5": n("0.5"), "1e5": n("100000.0"), "-1E-7": n("-1e-07"), "007.5": n("7.5"), " \t2": n("2"), "2 ": n("2"),
		"True": true, "False": false, "None": nil,
		"'a'": "a", `"a"`: "a", `'it\'s'`: "it's", `"it\'s"`: "it's", `'\x41\u00fc\n\\'`: "Aü\n\\", "''": "",
		"[]": []any{}, "['a', 1,]": []any{"a", n("1")}, "(1, 2)": []any{n("1"), n("2")}, "(1)": n("1"), "(1,)": []any{n("1")}, "()": []any{},
		"{}": map[string]any{}, "{'a': {'b': [None]}, 'c': 1,}": map[string]any{"a": map[string]any{"b": []any{nil}}, "c": n("1")},
		// What is no literal stays text, and so does a number that is too large.
		strings.Repeat("9", 400): strings.Repeat("9", 400), "[-" + strings.Repeat("9", 400) + "]": "[-" + strings.Repeat("9", 400) + "]",
		"": "", "true": "true", "null": "null", "web1": "web1", "2026-01-01": "2026-01-01", "007": "007", "1.2.3": "1.2.3", "1e999": "1e999", "1_000x": "1_000x",
		"5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10": "5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10", "'a": "'a", "'a\n'": "'a\n'", `'\q'`: `'\q'`, "[1 2]": "[1 2]", "[,]": "[,]", "[1": "[1",
		"{'a'}": "{'a'}", "{'a': }": "{'a': }", "{1: 2}": "{1: 2}", "{'a': 1 'b': 2}": "{'a': 1 'b': 2}", "nan": "nan", "inf": "inf", "-": "-", ".": ".", "Truer": "Truer", "1e": "1e",
		strings.Repeat("[", 40) + strings.Repeat("]", 40): strings.Repeat("[", 40) + strings.Repeat("]", 40),
	} {
		if got := pythonLiteral(in); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %#v, want %#v", in, got, want)
		}
	}
}

func TestPythonText(t *testing.T) {
	for in, want := range map[string]string{
		`true`: "True", `false`: "False", `null`: "None", `"a'b"`: "a'b", `2`: "2", `-0`: "0", `2.0`: "2.0", `1e3`: "1000.0", `1e400`: "inf", `-1e400`: "-inf",
		`["a'b","a\"b","a'\"b","\n\r\t\\","\u0000\u0085\u200b\ud83d\ude00","\udb40\udc01"]`: `["a'b", 'a"b', 'a\'"b', '\n\r\t\\', '\x00\x85\u200b😀', '\U000e0001']`,
		`[]`: "[]", `{"b":[1,{}],"a":null}`: "{'a': None, 'b': [1, {}]}",
	} {
		var v any
		if err := decodeJSON([]byte(in), &v); err != nil {
			t.Fatal(err)
		}
		if got := pythonText(v); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

func TestParseTime(t *testing.T) {
	const at = 1767261600_000000 // 2026-01-01T10:00:00Z
	for in, want := range map[string]int64{
		"2026-01-01T10:00:00": at, "2026-01-01 10:00:00": at, "2026-01-01T10:00:00Z": at, "2026-01-01T12:00:00+02:00": at, "2026-01-01T12:00:00+0200": at,
		"2026-01-01T12:00:00+02": at, "2026-01-01T10:00": at, "2026-01-01T10:00Z": at, "2026-01-01T10": at, "20260101T100000Z": at, "20260101T100000": at,
		"2026-01-01T10:00:00.5": at + 500000, "2026-01-01T10:00:00.000001+00:00": at + 1, "2026-01-01T10:00:00.0000019": at + 1,
		"2026-01-01": at - 36000_000000, "20260101": at - 36000_000000, " 2026-01-01T10:00:00 ": at, "0001-01-01": minTime,
	} {
		if got, err := parseTime(in); err != nil || got != want {
			t.Errorf("%q: got %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "bad", "2026-13-01", "2026-01-01T25:00:00", "2026-01-01T10:00:00 02:00", "1767261600", "2026-01-01T", "10:00:00"} {
		if got, err := parseTime(in); err == nil {
			t.Errorf("%q: got %d, want an error", in, got)
		}
	}
}

func FuzzPythonLiteral(f *testing.F) {
	for _, s := range []string{"2", "'a'", "[1, {'a': None}]", `"\u00fc"`, "(1,)", "1e5", "{'a':", "True"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v := pythonLiteral(s)
		if _, err := json.Marshal(v); err != nil {
			t.Errorf("%q: %#v is no JSON: %v", s, v, err)
		}
		if text, ok := pythonLiteral(pythonRepr(s)).(string); utf8.ValidString(s) && (!ok || text != s) {
			t.Errorf("%q came back as %q", s, text)
		}
	})
}

func FuzzFlatMetadata(f *testing.F) {
	for _, s := range []string{`{"a":{"b":{"c":1}},"l":[true,null,"x"]}`, `{}`, `[]`, `{"a":1}{`, `{"":{"":""}}`, `{"a":"\ud800"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		var flat map[string]string
		if err := json.Unmarshal(appendFlat(nil, doc), &flat); err != nil {
			t.Errorf("%q: %s: %v", doc, appendFlat(nil, doc), err)
		}
	})
}
