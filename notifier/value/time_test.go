package value

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// TestTimesAreThoseOfPython compares with testdata/times.jsonl, in which
// Python's iso8601 1.0.2 has answered: what it does not read is null.
func TestTimesAreThoseOfPython(t *testing.T) {
	data, err := os.ReadFile("testdata/times.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var pair [2]*string
		if err := json.Unmarshal([]byte(line), &pair); err != nil {
			t.Fatal(err)
		}
		want := "null"
		if pair[1] != nil {
			want = *pair[1]
		}
		got := "null"
		if at, err := ParseTime(*pair[0]); err == nil {
			got = string(AppendISO(nil, at))
		}
		if got != want {
			t.Errorf("%q: got %s, want %s", *pair[0], got, want)
		}
	}
}
