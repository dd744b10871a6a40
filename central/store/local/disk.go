package local

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
)

// disk is the file system under Pebble. Pebble ends the process when its log
// or manifest cannot be written, so it never sees such an error: a write that
// finds no space waits here until there is some, while Append returns
// [store.ErrDiskFull]; a write that fails otherwise fails the store and never
// returns. Reads go on in both cases.
type disk struct {
	vfs.FS
	dir     string
	minFree uint64
	log     *zap.Logger
	fail    func(error) error

	mu      sync.Mutex
	running bool          // before, errors are returned as they are
	patient bool          // writes wait for space; before, having none is an error as others are
	waiting int           // writes that wait for space
	stall   chan struct{} // closed while there are some
	checked time.Time
	short   error // of the last check
}

// freeCheckEvery is how old the last look at the free space may be.
const freeCheckEvery = time.Second

func newDisk(fs vfs.FS, dir string, minFree uint64, log *zap.Logger, fail func(error) error) *disk {
	return &disk{FS: fs, dir: dir, minFree: minFree, log: log, fail: fail, stall: make(chan struct{})}
}

// run makes errors wait from now on.
func (d *disk) run() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running = true
}

// wait makes writes that find no space wait for some from now on. A store that
// is being opened does not: who was told that it could not be must not find it
// open later.
func (d *disk) wait() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.patient = true
}

// makeFolder makes a folder and its missing parents, and syncs the entries of
// those and of the folder itself: what is stored later is of no use if the
// folder is not found after a power cut.
func (d *disk) makeFolder(path string) error {
	parents := []string{d.PathDir(path)}
	for p := parents[0]; p != d.PathDir(p); p = d.PathDir(p) {
		if _, err := d.Stat(p); err == nil {
			break
		}
		parents = append(parents, d.PathDir(p))
	}
	if err := d.MkdirAll(path, 0o750); err != nil {
		return err
	}
	for _, p := range parents {
		f, err := d.OpenDir(p)
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil {
			return fmt.Errorf("sync folder %s: %w", p, err)
		}
	}
	return nil
}

// check returns an error below the floor of free space.
func (d *disk) check() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiting > 0 {
		return d.full()
	}
	if time.Since(d.checked) < freeCheckEvery {
		return d.short
	}
	d.checked = time.Now()
	was := d.short
	d.short = d.floor()
	switch {
	case was == nil && d.short != nil:
		d.log.Error("store takes no more samples", zap.Error(d.short))
	case was != nil && d.short == nil:
		d.log.Info("store takes samples again")
	}
	return d.short
}

func (d *disk) floor() error {
	usage, err := d.GetDiskUsage(d.dir)
	if err != nil { // a file system that cannot tell
		return nil
	}
	floor := d.minFree
	if floor == 0 {
		floor = min(1<<30, usage.TotalBytes/20)
	}
	if usage.AvailBytes < floor {
		return fmt.Errorf("%w: %d MiB are free at %s, the floor is %d MiB; free some space or shorten the retention",
			store.ErrDiskFull, usage.AvailBytes>>20, d.dir, floor>>20)
	}
	return nil
}

// full is the error while writes wait.
func (d *disk) full() error {
	return fmt.Errorf("%w: %s is full; free some space", store.ErrDiskFull, d.dir)
}

// stalled returns a channel that is closed while a write waits for space.
func (d *disk) stalled() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stall
}

// write does op again and again while it finds no space, and does not return
// from another error.
func (d *disk) write(op func() error) error {
	err := op()
	if err == nil || errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrExist) {
		return err
	}
	d.mu.Lock()
	if !d.running {
		d.mu.Unlock()
		return err
	}
	if noSpace(err) && d.patient {
		if d.waiting++; d.waiting == 1 {
			close(d.stall)
			d.log.Error("disk is full; the store waits for space", zap.String("folder", d.dir))
		}
		d.mu.Unlock()
		for noSpace(err) {
			time.Sleep(100 * time.Millisecond)
			err = op()
		}
		d.mu.Lock()
		if d.waiting--; d.waiting == 0 {
			d.stall = make(chan struct{})
			d.log.Info("disk has space again")
		}
	}
	d.mu.Unlock()
	return d.must(err)
}

// must returns only where there is no error.
func (d *disk) must(err error) error {
	if err == nil {
		return nil
	}
	d.mu.Lock()
	running := d.running
	d.mu.Unlock()
	if !running {
		return err
	}
	_ = d.fail(err)
	select {}
}

func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// Unwrap implements [vfs.FS].
func (d *disk) Unwrap() vfs.FS { return d.FS }

func (d *disk) file(open func() (vfs.File, error)) (vfs.File, error) {
	var f vfs.File
	err := d.write(func() (err error) {
		f, err = open()
		return err
	})
	if err != nil {
		return nil, err
	}
	return &diskFile{f, d}, nil
}

// Create implements [vfs.FS]. The entry of a manifest is synced: Pebble moves the
// marker that names it in the same sync of the folder, of which a power cut may
// leave the marker only where a file's own sync does not keep its entry.
func (d *disk) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := d.file(func() (vfs.File, error) { return d.FS.Create(name, c) })
	if err != nil || !strings.HasPrefix(d.PathBase(name), "MANIFEST-") {
		return f, err
	}
	dir, err := d.OpenDir(d.PathDir(name))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, errors.Join(dir.Sync(), dir.Close())
}

// OpenReadWrite implements [vfs.FS].
func (d *disk) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	return d.file(func() (vfs.File, error) { return d.FS.OpenReadWrite(name, c, opts...) })
}

// ReuseForWrite implements [vfs.FS].
func (d *disk) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return d.file(func() (vfs.File, error) { return d.FS.ReuseForWrite(oldname, newname, c) })
}

// OpenDir implements [vfs.FS].
func (d *disk) OpenDir(name string) (vfs.File, error) {
	return d.file(func() (vfs.File, error) { return d.FS.OpenDir(name) })
}

// Link implements [vfs.FS].
func (d *disk) Link(oldname, newname string) error {
	return d.write(func() error { return d.FS.Link(oldname, newname) })
}

// Rename implements [vfs.FS].
func (d *disk) Rename(oldname, newname string) error {
	return d.write(func() error { return d.FS.Rename(oldname, newname) })
}

// MkdirAll implements [vfs.FS].
func (d *disk) MkdirAll(dir string, perm os.FileMode) error {
	return d.write(func() error { return d.FS.MkdirAll(dir, perm) })
}

// diskFile is a file whose writes wait for space. A sync is not tried again:
// what it could not write may be gone from the page cache.
type diskFile struct {
	vfs.File
	disk *disk
}

// Write implements [vfs.File].
func (f *diskFile) Write(p []byte) (int, error) {
	done := 0
	err := f.disk.write(func() error {
		n, err := f.File.Write(p[done:])
		done += n
		return err
	})
	return done, err
}

// WriteAt implements [vfs.File].
func (f *diskFile) WriteAt(p []byte, at int64) (int, error) {
	done := 0
	err := f.disk.write(func() error {
		n, err := f.File.WriteAt(p[done:], at+int64(done))
		done += n
		return err
	})
	return done, err
}

// Preallocate implements [vfs.File]. It is a hint: the write will see whether
// there is space.
func (f *diskFile) Preallocate(offset, length int64) error {
	if err := f.File.Preallocate(offset, length); !noSpace(err) {
		return err
	}
	return nil
}

// Sync implements [vfs.File].
func (f *diskFile) Sync() error { return f.disk.must(f.File.Sync()) }

// SyncData implements [vfs.File].
func (f *diskFile) SyncData() error { return f.disk.must(f.File.SyncData()) }

// SyncTo implements [vfs.File].
func (f *diskFile) SyncTo(length int64) (fullSync bool, err error) {
	fullSync, err = f.File.SyncTo(length)
	return fullSync, f.disk.must(err)
}

// Close implements [vfs.File].
func (f *diskFile) Close() error { return f.disk.must(f.File.Close()) }
