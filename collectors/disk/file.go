package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
)

// btrfsMagic is the type of a file system of which stat(2) tells the device of
// the subvolume, and the kernel knows files by another.
const btrfsMagic = unix.BTRFS_SUPER_MAGIC

// search looks for the files of a domain's disks, in a goroutine of its own: a
// path may be on a server that does not answer.
type search struct {
	stranger *bpf.File
	slow     bool // nobody waits for it
	done     chan struct{}

	// What was found, to be read once done is closed.
	places  []place          // images first
	opened  string           // the path by which the process has opened the stranger; empty: unknown
	folders map[uint32]int64 // type of the file systems of the disks' folders, by device
}

// place is where a path leads.
type place struct {
	disk  *disk
	image bool // of the disk; else it is in its chain
	path  string
	file  bpf.File
	magic int64 // type of its file system
	err   error
}

func beginSearch(pid int, disks []*disk, stranger *bpf.File) *search {
	s := &search{stranger: stranger, done: make(chan struct{}), folders: map[uint32]int64{}}
	for _, k := range disks {
		s.places = append(s.places, place{disk: k, image: true, path: k.Sources[0]})
	}
	for _, k := range disks {
		for _, path := range k.Sources[1:] {
			s.places = append(s.places, place{disk: k, path: path})
		}
	}
	go func() {
		defer close(s.done)
		ns := openNamespace(pid)
		defer ns.close()
		for i := range s.places {
			p := &s.places[i]
			p.file, p.magic, p.err = ns.locate(p.path)
		}
		if stranger == nil {
			return
		}
		s.opened = openPath(pid, *stranger)
		for _, p := range s.places {
			if at, magic, err := ns.locate(filepath.Dir(p.path)); err == nil {
				s.folders[at.Device] = magic
			}
		}
	}()
	return s
}

// namespace is where paths of a process lead.
type namespace struct {
	root int // an open folder, or -1: our own
}

// openNamespace returns the process's own view of files where that may be had,
// else ours.
func openNamespace(pid int) namespace {
	root, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		root = -1
	}
	return namespace{root}
}

func (ns namespace) close() {
	if ns.root >= 0 {
		unix.Close(ns.root)
	}
}

// locate returns the file at path, and the type of its file system.
func (ns namespace) locate(path string) (f bpf.File, magic int64, err error) {
	fd := -1
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	if ns.root >= 0 {
		fd, err = unix.Openat2(ns.root, path, &how)
	}
	if ns.root < 0 || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		fd, err = unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return f, 0, fmt.Errorf("look up %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := unix.Fstat(fd, &st); err != nil {
		return f, 0, fmt.Errorf("look up %s: %w", path, err)
	}
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return f, 0, fmt.Errorf("look up the file system of %s: %w", path, err)
	}
	return bpf.FileOf(&st), int64(fs.Type), nil
}

// openPath returns the path by which the process has opened a file; empty: it
// has not, or its table of files may not be read.
func openPath(pid int, f bpf.File) string {
	table := "/proc/" + strconv.Itoa(pid) + "/fd"
	fds, err := os.ReadDir(table)
	if err != nil {
		return ""
	}
	for _, fd := range fds {
		name := filepath.Join(table, fd.Name())
		var st unix.Stat_t
		if unix.Stat(name, &st) != nil || bpf.FileOf(&st) != f {
			continue
		}
		if path, err := os.Readlink(name); err == nil {
			return strings.TrimSuffix(path, " (deleted)")
		}
	}
	return ""
}
