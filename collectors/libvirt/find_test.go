package libvirt

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFind(t *testing.T) {
	dir := t.TempDir()
	make := func(path string) string {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	host, hostToo := make("run/a-ro"), make("run/b-ro")
	pod2, pod10 := make("pods/2/run/a-ro"), make("pods/10/run/a-ro")
	make("pods/3/run/other")
	if err := os.Symlink(filepath.Join(dir, "run"), filepath.Join(dir, "pods/1")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "pods/9"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "pods/2/run"), filepath.Join(dir, "pods/9/run")); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		patterns []string
		want     [][]string
	}{
		"sockets of one folder are one libvirt's":            {[]string{"run/a-ro", "run/b-ro"}, [][]string{{host, hostToo}}},
		"those of several folders are several":               {[]string{"run/b-ro", "pods/2/run/a-ro"}, [][]string{{hostToo}, {pod2}}},
		"a wildcard finds all, the lowest number first":      {[]string{"pods/[0-9]*/run/a-ro"}, [][]string{{pod2}, {pod10}}},
		"a folder is one libvirt, whatever path leads to it": {[]string{"run/a-ro", "pods/*/a-ro", "pods/9/run/a-ro", "pods/*/run/a-ro"}, [][]string{{host}, {filepath.Join(dir, "pods/9/run/a-ro")}, {pod10}}},
		"the last element may be a pattern":                  {[]string{"run/*-ro"}, [][]string{{host, hostToo}}},
		"what is not there is none":                          {[]string{"run/c", "nowhere/*/x", "pods/*/x/y"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var patterns []string
			for _, p := range tc.patterns {
				patterns = append(patterns, filepath.Join(dir, p))
			}
			var got [][]string
			for _, p := range find(patterns) {
				got = append(got, p.sockets)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCheckSockets(t *testing.T) {
	for socket, ok := range map[string]bool{Auto: true, "/run/x": true, "/proc/[0-9]*/root/x": true, "run/x": false, "/run/[": false} {
		if err := CheckSockets([]string{socket}); (err == nil) != ok {
			t.Errorf("%q: %v", socket, err)
		}
	}
}

// A pod's socket has a longer path than the address of a socket can hold.
func TestDialOfALongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	l, err := net.Listen("unix", "sock")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := dialUnix(t.Context(), filepath.Join(dir, "sock"), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
