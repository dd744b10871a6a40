package sample

import (
	"math"
	"testing"
)

func TestTextsAreThoseOfPython(t *testing.T) {
	for in, want := range map[string]string{
		"plain": `'plain'`, "": `''`, "it's": `"it's"`, `"`: `'"'`, `'"`: `'\'"'`, `\`: `'\\'`,
		"\n\r\t": `'\n\r\t'`, "\x00\x7f": `'\x00\x7f'`, "\u00ad é": `'\xad é'`, "\u200b": `'\u200b'`,
		"日本😀": "'日本😀'", "\U000e0001": `'\U000e0001'`,
	} {
		if got := string(AppendRepr(nil, in)); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
	for us, want := range map[int64]string{
		0: "1970-01-01T00:00:00", 1: "1970-01-01T00:00:00.000001", -1: "1969-12-31T23:59:59.999999",
		1_767_261_600_500_000: "2026-01-01T10:00:00.500000",
	} {
		if got := string(AppendTime(nil, us)); got != want {
			t.Errorf("%d µs: got %s, want %s", us, got, want)
		}
	}
	for f, want := range map[float64]string{1e16: "1e+16", 9999999999999998: "9999999999999998.0", 1e-4: "0.0001", 9.9e-5: "9.9e-05", math.Copysign(0, -1): "-0.0"} {
		if got := string(AppendFloat(nil, f)); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
