package value

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func parse(t testing.TB, text string) Value {
	t.Helper()
	var p Parser
	v, err := p.Parse(text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return v
}

func TestJSONIsReadAsPythonReadsIt(t *testing.T) {
	for in, want := range map[string]string{
		`{"a":1,"b":2,"a":3}`:                               `{"a":3,"b":2}`,
		`{"":1,"":2}`:                                       `{"":2}`,
		" [ 1 , -0 , 1.50 , 1e5 , 1E-400 ] ":                `[1,0,1.50,1e5,1E-400]`,
		`[NaN, Infinity, -Infinity, 1e999]`:                 `[null,null,null,null]`,
		`123456789012345678901234567890`:                    `123456789012345678901234567890`,
		`"\u00e9\ud83d\ude00\/\b\f\n\r\t\""`:                `"\u00e9\ud83d\ude00/\b\f\n\r\t\""`,
		`"\ud800 \ud800\u0041"`:                             `"\ufffd \ufffdA"`,
		`{"k":{"l":[{}, [], true, false]}}`:                 `{"k":{"l":[{},[],true,false]}}`,
		`null`:                                              `null`,
		strings.Repeat("[", 300) + strings.Repeat("]", 300): strings.Repeat("[", 300) + strings.Repeat("]", 300),
	} {
		v := parse(t, in)
		if got := string(v.AppendJSON(nil)); got != want {
			t.Errorf("%s\ngot  %s\nwant %s", in, got, want)
		}
	}
}

func TestWhatIsNoJSONIsRefusedWithTheReason(t *testing.T) {
	for in, want := range map[string]string{
		"":                           "it ends within a value",
		"{":                          "a key of an object must be a text",
		`{"a"`:                       "no colon after a key",
		`{"a":1`:                     "it ends within an object",
		`{"a":1,}`:                   "a key of an object must be a text",
		`[1 2]`:                      "byte 3: neither a comma nor the end of a list",
		`[01]`:                       "no JSON value",
		`-`:                          "no JSON value",
		`1.`:                         "no digit after the point",
		`1e`:                         "no digit in the exponent",
		`tru`:                        "no JSON value",
		`"a`:                         "it ends within a text",
		`"\`:                         "it ends within a text",
		`"\x"`:                       "unknown escape",
		`"\u12g4"`:                   `no four hexadecimal digits after \u`,
		"\"a\nb\"":                   "a control character within a text",
		"\"\\n\nb\"":                 "a control character within a text",
		"\"\xe9\"":                   "it is not UTF-8; send UTF-8",
		`1 1`:                        "text after the end",
		strings.Repeat("[", 100_000): "more than 990 levels deep",
		strings.Repeat("9", 5000):    "an integer of 5000 digits",
	} {
		var p Parser
		if _, err := p.Parse(in); !errors.Is(err, ErrSyntax) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s\ngot  %v\nwant %s", in, err, want)
		}
	}
}

func TestALargeObjectOfEqualKeysTakesNoLongerThanOthers(t *testing.T) {
	var b strings.Builder
	b.WriteByte('{')
	for i := range 200_000 {
		if i > 0 {
			b.WriteByte(',')
		}
		v := OfInt(int64(i % 100_000))
		b.WriteString(`"k` + v.Text + `":` + v.Text)
	}
	b.WriteByte('}')
	v := parse(t, b.String())
	if len(v.Items) != 100_000 || v.Items[99_999].Key != "k99999" {
		t.Errorf("%d members, want 100000", len(v.Items))
	}
}

func TestTextsOutliveTheParsersMemory(t *testing.T) {
	var p Parser
	first, err := p.Parse(`["a\tb", "c"]`)
	if err != nil {
		t.Fatal(err)
	}
	a, c := first.Items[0].Text, first.Items[1].Text
	p.Reset()
	if _, err := p.Parse(`["x\tyyyy", "z"]`); err != nil {
		t.Fatal(err)
	}
	if a != "a\tb" || c != "c" {
		t.Errorf("texts changed to %q, %q", a, c)
	}
}

func TestPythonsConversions(t *testing.T) {
	for in, want := range map[string][4]string{ // str, int, float, number
		`null`:                            {"None", "type", "type", "none"},
		`true`:                            {"True", "1", "1.0", "1"},
		`5`:                               {"5", "5", "5.0", "5"},
		`-5`:                              {"-5", "-5", "-5.0", "-5"},
		`1.9`:                             {"1.9", "1", "1.9", "1.9"},
		`-1.9`:                            {"-1.9", "-1", "-1.9", "-1.9"},
		`1e20`:                            {"1e+20", "100000000000000000000", "1e+20", "1e+20"},
		`NaN`:                             {"nan", "number", "nan", "none"},
		`"5"`:                             {"5", "5", "5.0", "5"},
		`" 1_000 "`:                       {" 1_000 ", "1000", "1000.0", "1000"},
		`"1__0"`:                          {"1__0", "number", "number", "none"},
		`"1.5"`:                           {"1.5", "number", "1.5", "1.5"},
		`"0x10"`:                          {"0x10", "number", "number", "none"},
		`"1p4"`:                           {"1p4", "number", "number", "none"},
		`" inf "`:                         {" inf ", "number", "inf", "none"},
		`"-nan"`:                          {"-nan", "number", "nan", "none"},
		`"x"`:                             {"x", "number", "number", "none"},
		`""`:                              {"", "number", "number", "none"},
		`[1, "it's", {"k": [null, 1.0]}]`: {`[1, "it's", {'k': [None, 1.0]}]`, "type", "type", "none"},
		`18446744073709551615`:            {"18446744073709551615", "18446744073709551615", "1.8446744073709552e+19", "18446744073709551615"},
		`18446744073709551616`:            {"18446744073709551616", "18446744073709551616", "1.8446744073709552e+19", "1.8446744073709552e+19"},
	} {
		v := parse(t, in)
		word := func(v Value, err error) string {
			switch {
			case errors.Is(err, ErrType):
				return "type"
			case errors.Is(err, ErrNumber):
				return "number"
			}
			return v.Str()
		}
		i, err := v.Integer()
		f, ferr := v.Float64()
		n, ok := v.Number()
		number := n.String()
		if !ok {
			number = "none"
		}
		got := [4]string{v.Str(), word(i, err), word(OfFloat(f), ferr), number}
		if got != want {
			t.Errorf("%s: got %q, want %q", in, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`{"a": [1, -2.5e3, "\u00e9\n", null, true], "a": {"b": {}}}`)
	f.Add(`"\ud83d\ude00"`)
	f.Add("[[[[NaN,-Infinity]]]]")
	f.Fuzz(func(t *testing.T, text string) {
		var p Parser
		v, err := p.Parse(text)
		var std any
		stdErr := json.Unmarshal([]byte(text), &std)
		if err != nil {
			if stdErr == nil && !strings.Contains(err.Error(), "UTF-8") && !strings.Contains(err.Error(), "digits") {
				t.Fatalf("%q: %v, but encoding/json reads it", text, err)
			}
			return
		}
		out := v.AppendJSON(nil)
		if stdErr == nil {
			var again any
			if err := json.Unmarshal(out, &again); err != nil || !reflect.DeepEqual(std, again) {
				t.Errorf("%q became %q: %v", text, out, err)
			}
		} else if !json.Valid(out) {
			t.Errorf("%q became %q, which is no JSON", text, out)
		}
		_ = v.Str()
		_, _ = v.Integer()
		_, _ = v.Number()
	})
}

// readTwice reads a text, and then what is in the texts that [Parser.Inner] means.
func readTwice(text string) (Value, error) {
	var p, inner Parser
	v, err := p.Parse(text)
	if err != nil || v.Kind != Object {
		return v, err
	}
	for i := range v.Items {
		m := &v.Items[i]
		if m.Key != "m" || m.Kind != Text {
			continue
		}
		if in, err := inner.ParseValid(m.Text); err == nil && in.Kind == Object {
			in.Key = m.Key
			*m = in
		}
	}
	return v, nil
}

func TestAnObjectInATextIsReadInPlace(t *testing.T) {
	for in, want := range map[string]bool{
		`{"v": "2.0", "m": "{\"a\": \"b\", \"c\": [1, null, {\"m\": \"{}\"}]}"}`:           true,
		`{"m": " {} ", "m": "{\"a\": \"\"}"}`:                                              true,
		`{"m": "{\"a\": \"\\u00e9 \\\"quoted\\\" \\\\\\\" \\ud83d\\ude00\", \"\\n\": 1}"}`: true,
		`{"m": "{\"a\": \"\u0062\"}"}`:                                                     false, // an outer escape that nothing makes necessary
		`{"m": "{\n}"}`:                                                                    false,
		`{"m": "{\"a\": \"\\x\"}"}`:                                                        false, // no escape
		`{"m": "{\"a\": \"b\"} {}"}`:                                                       false,
		`{"m": "[]"}`:                                                                      false,
		`{"m": "{\"a\": \"b\"}`:                                                            false,
		"{\"m\": \"{\n}\"}":                                                                false,
		`{"m": "{\"a\": \"b\\"}`:                                                           false,
		`{"m": "{"}`:                                                                       false,
		`{"n": {"m": "{}"}, "o": "{\"}"}`:                                                  false,
		`{"m": {"a": 1}}`:                                                                  true,
		`{"m": "{\"a\": \"\\\\\"}", "b": 1}`:                                               true,
	} {
		p := Parser{Inner: "m"}
		got, err := p.Parse(in)
		whole := err == nil && got.Field("m") != nil && got.Field("m").Kind == Object
		if whole != want {
			t.Errorf("%s: read in place: %v (%v), want %v", in, whole, err, want)
		}
	}
}

func FuzzInner(f *testing.F) {
	f.Add(`{"v": "2.0", "m": "{\"a\": \"b\", \"c\": [1, null, {\"m\": \"{}\"}]}"}`)
	f.Add(`{"m": "{\"a\": \"\\u00e9 \\\"quoted\\\" \\\\\\\" \\ud83d\\ude00\", \"\\n\": 1}", "m": "{ }"}`)
	f.Add("{\"m\": \"{\n\\t}\"}")
	f.Fuzz(func(t *testing.T, text string) {
		p := Parser{Inner: "m"}
		got, err := p.Parse(text)
		want, wantErr := readTwice(text)
		if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
			t.Fatalf("%q: %v, want %v", text, err, wantErr)
		}
		if err != nil {
			return
		}
		for i := range got.Items { // what is not read in place is read afterwards
			if m := &got.Items[i]; got.Kind == Object && m.Key == "m" && m.Kind == Text {
				var inner Parser
				if in, err := inner.ParseValid(m.Text); err == nil && in.Kind == Object {
					in.Key = m.Key
					*m = in
				}
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q\ngot  %s\nwant %s", text, got.AppendJSON(nil), want.AppendJSON(nil))
		}
	})
}

func FuzzParseTime(f *testing.F) {
	f.Add("2026-11-21 10:00:00.123456+01:00")
	f.Add("20261121T1000Z")
	f.Fuzz(func(t *testing.T, s string) {
		at, err := ParseTime(s)
		if err != nil {
			return
		}
		iso := string(AppendISO(nil, at))
		if again, err := ParseTime(iso); err != nil || !again.Equal(at) {
			t.Errorf("%q is %s, which is %v, %v", s, iso, again, err)
		}
	})
}

func TestPieceIsThatOfSplitN(t *testing.T) {
	for _, text := range []string{"", "a", "a.b.c", ".", "..", "a..b", "a.b."} {
		for most := -1; most < 4; most++ {
			limit := -1
			if most >= 0 {
				limit = most + 1
			}
			all := strings.SplitN(text, ".", limit)
			for nth := range 6 {
				got, ok := Piece(text, ".", nth, most)
				if ok != (nth < len(all)) || ok && got != all[nth] {
					t.Errorf("piece %d of %q, split at most %d times: %q, %v, want that of %q", nth, text, most, got, ok, all)
				}
			}
		}
	}
}
