// Package crashfs is a file system in memory for tests of what lives on disk:
// it can fail, and it can be seen as the host finds it after a power loss.
package crashfs

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"

	"github.com/kvmeter/kvmeter/diskqueue"
)

// FS implements [diskqueue.FS].
type FS struct {
	mu   sync.Mutex
	now  map[string]*content // by path
	disk map[string]*content // as the folders were synced
	fail func(op Op, name string) error
}

// content is what a file holds: it only grows.
type content struct {
	data   []byte
	synced int
}

// Op is what is done to a file or folder.
type Op string

// The operations that change something.
const (
	Create  Op = "create"
	Write   Op = "write"
	Sync    Op = "sync"
	Remove  Op = "remove"
	Rename  Op = "rename"
	SyncDir Op = "sync folder"
	Open    Op = "open" // which changes nothing
)

// New returns an empty file system.
func New() *FS { return &FS{now: map[string]*content{}, disk: map[string]*content{}} }

// Fail has ask called before each operation: an error of it is that of the
// operation, which is then not done; of a write, the first half is. nil: all
// goes well.
func (f *FS) Fail(ask func(op Op, name string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = ask
}

// sector is how much a disk writes at once, in bytes.
const sector = 512

// Crash returns what a power loss now may leave: all that was synced, and of the
// rest what chance keeps, each file of a folder and each sector of a file by
// itself, with the given percentage. A sector that is not kept is cut off, or
// zero where a later one is kept. The death of the process alone leaves the file system as
// it is.
func (f *FS) Crash(keep int, r *rand.Rand) *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	after := New()
	names := map[string]bool{}
	for _, files := range []map[string]*content{f.now, f.disk} {
		for name := range files {
			names[name] = true
		}
	}
	kept := map[*content]*content{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		c := f.disk[name]
		if c != f.now[name] && r.IntN(100) < keep {
			c = f.now[name]
		}
		if c == nil {
			continue
		}
		if kept[c] == nil {
			kept[c] = c.crash(keep, r)
		}
		after.now[name], after.disk[name] = kept[c], kept[c]
	}
	return after
}

func (c *content) crash(keep int, r *rand.Rand) *content {
	data := slices.Clone(c.data[:c.synced])
	for at := c.synced; at < len(c.data); {
		end := min(len(c.data), (at/sector+1)*sector)
		if r.IntN(100) < keep {
			data = append(data, make([]byte, at-len(data))...)
			data = append(data, c.data[at:end]...)
		}
		at = end
	}
	return &content{data, len(data)}
}

func (f *FS) ask(op Op, name string) error {
	f.mu.Lock()
	ask := f.fail
	f.mu.Unlock()
	if ask == nil {
		return nil
	}
	return ask(op, name)
}

func missing(name string) error { return fmt.Errorf("%s: %w", name, fs.ErrNotExist) }

// MkdirAll implements [diskqueue.FS]. All folders are there.
func (f *FS) MkdirAll(string) error { return nil }

// List implements [diskqueue.FS].
func (f *FS) List(dir string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for name := range f.now {
		if filepath.Dir(name) == dir {
			names = append(names, filepath.Base(name))
		}
	}
	slices.Sort(names)
	return names, nil
}

// Create implements [diskqueue.FS].
func (f *FS) Create(name string) (diskqueue.File, error) {
	if err := f.ask(Create, name); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := &content{}
	f.now[name] = c
	return &file{c, f, name}, nil
}

// Open implements [diskqueue.FS].
func (f *FS) Open(name string) (diskqueue.File, error) {
	if err := f.ask(Open, name); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.now[name]
	if c == nil {
		return nil, missing(name)
	}
	return &file{c, f, name}, nil
}

// Remove implements [diskqueue.FS].
func (f *FS) Remove(name string) error {
	if err := f.ask(Remove, name); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now[name] == nil {
		return missing(name)
	}
	delete(f.now, name)
	return nil
}

// Rename implements [diskqueue.FS].
func (f *FS) Rename(from, to string) error {
	if err := f.ask(Rename, to); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now[from] == nil {
		return missing(from)
	}
	f.now[to] = f.now[from]
	delete(f.now, from)
	return nil
}

// SyncDir implements [diskqueue.FS].
func (f *FS) SyncDir(dir string) error {
	if err := f.ask(SyncDir, dir); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.disk = maps.Clone(f.now) // there is one folder
	return nil
}

// Lock implements [diskqueue.FS]. It locks nothing: whoever held a lock is dead.
func (f *FS) Lock(string) (io.Closer, error) { return io.NopCloser(nil), nil }

type file struct {
	c    *content
	fs   *FS
	name string
}

// Write implements [diskqueue.File].
func (f *file) Write(b []byte) (int, error) {
	err := f.fs.ask(Write, f.name)
	if err != nil {
		b = b[:len(b)/2]
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.c.data = append(f.c.data, b...)
	return len(b), err
}

// ReadAt implements [diskqueue.File].
func (f *file) ReadAt(b []byte, offset int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if offset >= int64(len(f.c.data)) {
		return 0, io.EOF
	}
	n := copy(b, f.c.data[offset:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// Sync implements [diskqueue.File].
func (f *file) Sync() error {
	if err := f.fs.ask(Sync, f.name); err != nil {
		return err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.c.synced = len(f.c.data)
	return nil
}

// Size implements [diskqueue.File].
func (f *file) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return int64(len(f.c.data)), nil
}

// Close implements [diskqueue.File].
func (f *file) Close() error { return nil }
