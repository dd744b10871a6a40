package file

import (
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

func newFile(t *testing.T, path, options string) *file {
	t.Helper()
	u, err := url.Parse("file://" + path + options)
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
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
		"file://" + dir + "/x?max_bytes=k": `option max_bytes: "k" is not a whole number`,
		"file://" + dir + "/none/x":        "no such file or directory",
		"file://" + dir:                    "is a directory",
	} {
		u, err := url.Parse(url_)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(u, publisher.Deps{Log: zap.NewNop()}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New(%s) returned %v, want %q", url_, err, want)
		}
	}
}
