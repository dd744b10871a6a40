package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/sample"
)

// ids finds the fields after which newer releases write a name.
var ids = regexp.MustCompile(`((["'])(user|project)_id["']: (?:"[^"]*"|'[^']*'|null|None))`)

// TestLinesAreCeilometers compares with testdata/ceilometer.jsonl, which
// Ceilometer 19.0.0 wrote, and ceilometer.txt, which Python made of it.
func TestLinesAreCeilometers(t *testing.T) {
	for name, style := range map[string]*Style{"ceilometer.jsonl": JSON, "ceilometer.txt": Python} {
		inputs, wants := lines(t, "ceilometer.jsonl"), lines(t, name)
		for i, in := range inputs {
			// Releases from 2023.1 on write the names, too.
			want := ids.ReplaceAllString(wants[i], "$1, ${2}${3}_name$2: "+style.null)
			s, err := sample.ParseForeign([]byte(in))
			if err != nil {
				t.Fatal(err)
			}
			w := NewWriter(style)
			if got := string(w.Sample(nil, &s)); got != want {
				t.Errorf("%s:%d\ngot  %s\nwant %s", name, i+1, got, want)
			}
		}
	}
}

func lines(t *testing.T, name string) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

// TestMetadataArePythons compares with what Python made of nasty.json.
func TestMetadataArePythons(t *testing.T) {
	in := strings.Join(lines(t, "nasty.json"), "\n")
	for name, style := range map[string]*Style{"nasty.jsonl": JSON, "nasty.txt": Python} {
		w := NewWriter(style)
		if got, want := string(w.Value(nil, []byte(in))), lines(t, name)[0]; got != want {
			t.Errorf("%s\ngot  %s\nwant %s", name, got, want)
		}
	}
}

func TestWhatIsMissingIsNullAndWhatIsNoJSONIsText(t *testing.T) {
	s := sample.Sample{Name: "cpu", Volume: sample.Uint(1<<64 - 1), Time: 1_800_000_000_000_000, Metadata: []byte("{broken\n")}
	for _, tc := range []struct {
		style *Style
		want  string
	}{
		{JSON, `{"name": "cpu", "type": "", "unit": "", "volume": 18446744073709551615, "user_id": null, "user_name": null, "project_id": null, "project_name": null, "resource_id": "", "timestamp": "2027-01-15T08:00:00", "resource_metadata": "{broken\n", "source": "", "id": "00000000-0000-0000-0000-000000000000", "monotonic_time": null}`},
		{Python, `{'name': 'cpu', 'type': '', 'unit': '', 'volume': 18446744073709551615, 'user_id': None, 'user_name': None, 'project_id': None, 'project_name': None, 'resource_id': '', 'timestamp': '2027-01-15T08:00:00', 'resource_metadata': '{broken\n', 'source': '', 'id': '00000000-0000-0000-0000-000000000000', 'monotonic_time': None}`},
	} {
		w := NewWriter(tc.style)
		if got := string(w.Sample(nil, &s)); got != tc.want {
			t.Errorf("got  %s\nwant %s", got, tc.want)
		}
	}
}

func FuzzValue(f *testing.F) {
	f.Add([]byte(`{"a": [1, 1e999, "é\u0000"], "b": null}`))
	f.Add([]byte("[[[]]"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, style := range []*Style{JSON, Python} {
			w := NewWriter(style)
			out := w.Value(nil, raw)
			if bytes.ContainsAny(out, "\n\r") {
				t.Errorf("%q is more than one line", out)
			}
			if style == JSON && !json.Valid(out) {
				t.Errorf("%q is no JSON", out)
			}
		}
	})
}

func BenchmarkWriter(b *testing.B) {
	for name, style := range map[string]*Style{"json": JSON, "python": Python} {
		b.Run(name, func(b *testing.B) {
			builder := sample.NewBuilder()
			for i := range 50 {
				builder.Row(sample.Row{Resource: fmt.Sprintf("5e1f0000-0000-4000-8000-%012d", i), Metadata: []byte(`{"name": "` + strings.Repeat("x", 600) + `"}`)})
				for _, m := range sample.Catalogue[:20] {
					builder.Add(m.MeterRef, m.Origins[0], sample.Uint(uint64(i)<<40))
				}
			}
			batch := builder.Build()
			var dst []byte
			b.ReportAllocs()
			for b.Loop() {
				w := NewWriter(style)
				for s := range batch.Samples() {
					dst = w.Sample(dst[:0], &s)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch.Len()), "ns/sample")
		})
	}
}

func TestATextIsPlainIfNoByteOfItIsSpecial(t *testing.T) {
	for n := range 20 {
		text := []byte(strings.Repeat("~ ", 10)[:n])
		if !plain(string(text)) {
			t.Errorf("%q is not plain", text)
		}
		for at := range text {
			was := text[at]
			for c := range 256 {
				text[at] = byte(c)
				want := c >= ' ' && c <= '~' && c != '"' && c != '\'' && c != '\\'
				if plain(string(text)) != want {
					t.Errorf("plain(%q) is not %v", text, want)
				}
			}
			text[at] = was
		}
	}
}
