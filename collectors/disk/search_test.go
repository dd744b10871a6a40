package disk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
)

func TestASearchFindsWherePathsLead(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "disk")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("disk", link); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	file := bpf.FileOf(&st)
	a := &disk{TargetDisk: collectors.TargetDisk{Sources: []string{link, name}}}
	b := &disk{TargetDisk: collectors.TargetDisk{Sources: []string{filepath.Join(dir, "none")}}}
	s := beginSearch(os.Getpid(), []*disk{a, b}, &file)
	<-s.done
	want := []struct {
		disk  *disk
		image bool
		file  bpf.File
		err   error
	}{{a, true, file, nil}, {b, true, bpf.File{}, unix.ENOENT}, {a, false, file, nil}}
	if len(s.places) != len(want) {
		t.Fatalf("got %+v", s.places)
	}
	for i, w := range want {
		if p := s.places[i]; p.disk != w.disk || p.image != w.image || p.file != w.file || !errors.Is(p.err, w.err) {
			t.Errorf("place %d: got %+v, want %+v", i, p, w)
		}
	}
	if s.opened != name {
		t.Errorf("got %q for the path that it was opened by, want %q", s.opened, name)
	}
	if _, ok := s.folders[file.Device]; !ok {
		t.Errorf("got %v for the file systems of the folders", s.folders)
	}
}
