package diskqueue

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// FS is what a queue needs of a file system. [OS] is the host's; simulations
// have one that crashes.
type FS interface {
	MkdirAll(dir string) error
	// List returns the names of the files in a folder.
	List(dir string) ([]string, error)
	// Create makes an empty file, in place of one of that name.
	Create(name string) (File, error)
	// Open opens a file to be read.
	Open(name string) (File, error)
	Remove(name string) error
	Rename(from, to string) error
	// SyncDir makes what files a folder has survive the death of the host.
	SyncDir(dir string) error
	// Lock keeps other processes from locking a file, which it makes.
	Lock(name string) (io.Closer, error)
}

// File is an open file. Writes append.
type File interface {
	io.Writer
	io.ReaderAt
	Size() (int64, error)
	Sync() error
	Close() error
}

// OS is the file system of the host. What it makes may be read by the group
// and written by the owner.
type OS struct{}

type osFile struct{ *os.File }

// Size returns the length of the file in bytes.
func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// MkdirAll implements [FS].
func (OS) MkdirAll(dir string) error { return os.MkdirAll(dir, 0o750) }

// List implements [FS].
func (OS) List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

// Create implements [FS].
func (OS) Create(name string) (File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o640)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// Open implements [FS].
func (OS) Open(name string) (File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// Remove implements [FS].
func (OS) Remove(name string) error { return os.Remove(name) }

// Rename implements [FS].
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// SyncDir implements [FS].
func (OS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ErrLocked is the error of a folder that another process uses.
var ErrLocked = errors.New("another process uses this folder")

// Lock implements [FS].
func (OS) Lock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o640)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// ReadFile returns the content of a file of at most limit bytes.
func ReadFile(fsys FS, name string, limit int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err == nil && size > limit {
		err = errors.New("the file is too long")
	}
	var data []byte
	if err == nil {
		data = make([]byte, size)
		err = readAt(f, data, 0)
	}
	return data, errors.Join(err, f.Close())
}

// WriteFile puts a synced file with some content in place of one of that name;
// whenever the host dies, either is there.
func WriteFile(fsys FS, name string, data []byte) error {
	next := name + ".new"
	f, err := fsys.Create(next)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = fsys.Rename(next, name)
	}
	if err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(name))
}

// readAt fills b.
func readAt(f File, b []byte, offset int64) error {
	n, err := f.ReadAt(b, offset)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// removeAll removes files that may not be there.
func removeAll(fsys FS, names ...string) error {
	var errs []error
	for _, name := range names {
		if err := fsys.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
