package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// TestLinesAreCeilometers compares with testdata/ceilometer.jsonl, which
// Ceilometer 19.0.0 wrote, and ceilometer.txt, which Python made of it.
func TestLinesAreCeilometers(t *testing.T) {
	for name, style := range map[string]*style{"ceilometer.jsonl": asJSON, "ceilometer.txt": asPython} {
		inputs, wants := lines(t, "ceilometer.jsonl"), lines(t, name)
		for i, in := range inputs {
			// Notifications' times have a zone there; stored times have none.
			want := strings.Replace(wants[i], "+00:00", "", 1)
			s := parse(t, in)
			w := writer{style, map[*byte][]byte{}}
			if got := string(w.sample(nil, &s)); got != want {
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

func parse(t *testing.T, text string) sample.Sample {
	t.Helper()
	var in struct {
		Name, Type, Unit, User_ID, Project_ID, Resource_ID, Timestamp, Source, ID string //nolint:revive // Ceilometer's names
		Volume                                                                    json.Number
		Resource_Metadata                                                         json.RawMessage //nolint:revive // Ceilometer's names
	}
	if err := json.Unmarshal([]byte(text), &in); err != nil {
		t.Fatal(err)
	}
	at, err := time.Parse("2006-01-02T15:04:05.999999", strings.TrimSuffix(in.Timestamp, "+00:00"))
	if err != nil {
		t.Fatal(err)
	}
	var volume sample.Volume
	if i, err := in.Volume.Int64(); err == nil {
		volume = sample.Uint(uint64(i))
	} else if f, err := in.Volume.Float64(); err == nil {
		volume = sample.Float(f)
	}
	return sample.Sample{
		ID: sample.ParseID(in.ID), Name: in.Name, Kind: sample.Kind(in.Type), Unit: in.Unit, Volume: volume,
		Resource: in.Resource_ID, Source: in.Source, Project: in.Project_ID, User: in.User_ID,
		Time: at.UnixMicro(), Metadata: in.Resource_Metadata,
	}
}

// TestMetadataArePythons compares with what Python made of nasty.json.
func TestMetadataArePythons(t *testing.T) {
	in := strings.Join(lines(t, "nasty.json"), "\n")
	for name, style := range map[string]*style{"nasty.jsonl": asJSON, "nasty.txt": asPython} {
		w := writer{style, nil}
		if got, want := string(w.value(nil, []byte(in))), lines(t, name)[0]; got != want {
			t.Errorf("%s\ngot  %s\nwant %s", name, got, want)
		}
	}
}

func TestWhatIsMissingIsNullAndWhatIsNoJSONIsText(t *testing.T) {
	s := sample.Sample{Name: "cpu", Volume: sample.Uint(1<<64 - 1), Time: 1_800_000_000_000_000, Metadata: []byte("{broken\n")}
	for _, tc := range []struct {
		style *style
		want  string
	}{
		{asJSON, `{"name": "cpu", "type": "", "unit": "", "volume": 18446744073709551615, "user_id": null, "project_id": null, "resource_id": "", "timestamp": "2027-01-15T08:00:00", "resource_metadata": "{broken\n", "source": "", "id": "00000000-0000-0000-0000-000000000000", "monotonic_time": null}`},
		{asPython, `{'name': 'cpu', 'type': '', 'unit': '', 'volume': 18446744073709551615, 'user_id': None, 'project_id': None, 'resource_id': '', 'timestamp': '2027-01-15T08:00:00', 'resource_metadata': '{broken\n', 'source': '', 'id': '00000000-0000-0000-0000-000000000000', 'monotonic_time': None}`},
	} {
		w := writer{tc.style, map[*byte][]byte{}}
		if got := string(w.sample(nil, &s)); got != tc.want {
			t.Errorf("got  %s\nwant %s", got, tc.want)
		}
	}
}

func FuzzValue(f *testing.F) {
	f.Add([]byte(`{"a": [1, 1e999, "é\u0000"], "b": null}`))
	f.Add([]byte("[[[]]"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, style := range []*style{asJSON, asPython} {
			w := writer{style, nil}
			out := w.value(nil, raw)
			if bytes.ContainsAny(out, "\n\r") {
				t.Errorf("%q is more than one line", out)
			}
			if style == asJSON && !json.Valid(out) {
				t.Errorf("%q is no JSON", out)
			}
		}
	})
}

func newFile(t *testing.T, path, options string) *file {
	t.Helper()
	u, err := url.Parse("file://" + path + options)
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p.(*file)
}

// part has one sample of the given volume.
func part(volume uint64) publisher.Part {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r", Metadata: []byte(`{"a": 1}`)})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(volume))
	out := b.Build()
	return publisher.Part{From: out, Batch: out}
}

// volumes returns the volumes in a file, in order; it fails on broken lines.
func volumes(t *testing.T, path string) (vs []uint64) {
	t.Helper()
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var s struct{ Volume uint64 }
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatalf("%s: %q: %v", path, line, err)
		}
		vs = append(vs, s.Volume)
	}
	return vs
}

func TestPublishAppends(t *testing.T) {
	path := filepath.Join(t.TempDir(), "samples")
	for i := range uint64(2) { // closed and opened again
		p := newFile(t, path, "?json")
		if err := p.Publish(t.Context(), []publisher.Part{part(2 * i), part(2*i + 1)}); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]uint64{0, 1, 2, 3}, volumes(t, path)); diff != "" {
		t.Errorf("volumes (-want +got):\n%s", diff)
	}
}

func TestRotationKeepsEachLineWhole(t *testing.T) {
	for name, tc := range map[string]struct {
		options string
		want    [][]uint64 // by file: path, path.1, path.2, path.3
	}{
		"with room for two lines and two backups": {"?json&max_bytes=650&backup_count=2", [][]uint64{{8, 9}, {6, 7}, {4, 5}, nil}},
		"with less room than a line":              {"?json&max_bytes=10&backup_count=2", [][]uint64{{9}, {8}, {7}, nil}},
		"without a number of backups":             {"?json&max_bytes=10", [][]uint64{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, nil, nil, nil}},
		"without a size":                          {"?json&backup_count=2", [][]uint64{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, nil, nil, nil}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "samples")
			p := newFile(t, path, tc.options)
			for i := range uint64(5) {
				if err := p.Publish(t.Context(), []publisher.Part{part(2 * i), part(2*i + 1)}); err != nil {
					t.Fatal(err)
				}
			}
			var got [][]uint64
			for _, suffix := range []string{"", ".1", ".2", ".3"} {
				got = append(got, volumes(t, path+suffix))
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAFullDiskIsAnErrorAndLeavesNoHalfLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "samples")
	p := newFile(t, path, "?json")
	if err := p.Publish(t.Context(), []publisher.Part{part(1)}); err != nil {
		t.Fatal(err)
	}
	good := p.f
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p.f = full
	if err := p.Publish(t.Context(), []publisher.Part{part(2)}); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("error %v, want no space left", err)
	}
	_ = full.Close()
	p.f = good
	if err := p.Publish(t.Context(), []publisher.Part{part(2), part(3)}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint64{1, 2, 3}, volumes(t, path)); diff != "" {
		t.Errorf("volumes (-want +got):\n%s", diff)
	}
}

func TestALineThatWasCutShortIsNotContinued(t *testing.T) {
	path := filepath.Join(t.TempDir(), "samples")
	if err := os.WriteFile(path, []byte("{\"volume\": 1}\n{\"volu"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := newFile(t, path, "?json")
	if err := p.Publish(t.Context(), []publisher.Part{part(2)}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSpace(string(data)), "\n")
	if len(got) != 3 || got[0] != `{"volume": 1}` || got[1] != `{"volu` || !json.Valid([]byte(got[2])) {
		t.Errorf("lines %q, want the whole one, the half one and a new one", got)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != p.size {
		t.Errorf("size %d, want %v, %v", p.size, info, err)
	}
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	for url_, want := range map[string]string{
		"file://":                          "needs a path",
		"file://tmp/x":                     "three slashes",
		"file:///":                         "needs a path",
		"file://" + dir + "/x?max_byte=1":  `unknown option "max_byte"`,
		"file://" + dir + "/x?max_bytes=k": `option max_bytes: "k" is not a whole number`,
		"file://" + dir + "/none/x":        "no such file or directory",
		"file://" + dir:                    "is a directory",
	} {
		u, err := url.Parse(url_)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(u, publisher.Deps{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New(%s) returned %v, want %q", url_, err, want)
		}
	}
}

func BenchmarkPublish(b *testing.B) {
	for name, style := range map[string]*style{"json": asJSON, "python": asPython} {
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
				w := writer{style, map[*byte][]byte{}}
				for s := range batch.Samples() {
					dst = w.sample(dst[:0], &s)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch.Len()), "ns/sample")
		})
	}
}
