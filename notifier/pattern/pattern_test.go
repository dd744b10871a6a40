package pattern

import (
	"strings"
	"testing"
)

func TestExpressionsArePythons(t *testing.T) {
	for _, tc := range []struct {
		expr, text string
		want       bool
	}{
		{"test.c", "testXcreate.end", true},
		{"test.c", "atest.c", false},
		{"compute.instance.(?!create.start|update).*", "compute.instance.create.end", true},
		{"compute.instance.(?!create.start|update).*", "compute.instance.create.start", false},
		{"compute.instance.(?!create.start|update).*", "compute.instance.update", false},
		{"a|b", "bc", true},
		{"a|b", "cb", false},
		{`(?P<x>a)(?P=x)`, "aab", true},
		{"", "anything", true},
		{"a$", "ab", false},
		{"a$", "a\n", true},
		{`a\Z`, "a\n", false},
		{`é\w\d\s.`, "éü٣\u00a0x", true},
		{"[^]a[-c]", "x", true},
		{"[a-c-[b]]", "b]", true},
		{"a.b", "a\nb", false},
		{"a", strings.Repeat("a", MaxText+1), false},
	} {
		r, err := Compile(tc.expr)
		if err != nil {
			t.Errorf("%s: %v", tc.expr, err)
			continue
		}
		if got := r.Match(tc.text); got != tc.want {
			t.Errorf("%q on %.40q: got %v", tc.expr, tc.text, got)
		}
	}
	if _, err := Compile("a("); err == nil || !strings.Contains(err.Error(), `regular expression "a("`) {
		t.Errorf("got %v", err)
	}
}

func TestReplace(t *testing.T) {
	for _, tc := range [][4]string{
		{"o", "0", "foo", "f00"},
		{`(\w+) (\w+)`, `\2 \g<1>!`, "hello world", "world hello!"},
		{`(?P<n>h)`, `\g<n>\g<n>`, "hat", "hhat"},
		{`(?P<n>x)(y)(?P=n)`, `\2\1\g<n>`, "xyx", "yxx"},
		{"l+", `\n\\`, "hello", "he\n\\o"},
		{"z", "x", "hello", "hello"},
		{"^", "x-", "hello", "x-hello"},
	} {
		r, err := Compile(tc[0])
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Replace(tc[2], tc[1]); err != nil || got != tc[3] {
			t.Errorf("%q: got %q, %v, want %q", tc, got, err, tc[3])
		}
	}
}

func TestPrefix(t *testing.T) {
	for expr, want := range map[string]string{
		"volume.create.*": "volume", `volume\.create\..*`: "volume.create.", "abc": "abc", "abc*": "ab", "abc?": "ab", "abc+": "abc",
		"abc{2}": "ab", "a|b": "", "(a|b)c": "", "x(a|b)": "x", "^a": "", "é*": "", `a\d`: "a", "[a]b": "", "": "", `a\|b`: "a|b", "a[|]b": "a",
	} {
		if got := Prefix(expr); got != want {
			t.Errorf("%q: got %q, want %q", expr, got, want)
		}
	}
}

func FuzzPrefix(f *testing.F) {
	f.Add("volume.create.*", "volume.create.end")
	f.Add(`a\.b|c`, "c")
	f.Add("ab{0}", "a")
	f.Fuzz(func(t *testing.T, expr, text string) {
		if len(expr) > 30 || len(text) > 30 { // backtracking
			return
		}
		r, err := Compile(expr)
		if err != nil || strings.Contains(expr, "(?") { // (?x) may change what a blank means
			return
		}
		if r.Match(text) && !strings.HasPrefix(text, Prefix(expr)) {
			t.Errorf("%q matches %q, which does not begin with %q", expr, text, Prefix(expr))
		}
	})
}
