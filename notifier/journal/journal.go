// Package journal keeps the records of what a notifier's transformers remember
// on its own disk: each is synced before it counts, and a snapshot takes the
// place of all before it.
package journal

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// The files of a journal's folder: each record is its length and its CRC-32C, 4
// bytes each, little-endian, and its bytes. What follows the last whole record
// was being written when the notifier died, and never counted.
const (
	name      = "journal"
	nextName  = "journal.new" // becomes the journal once it is whole
	lockName  = "lock"
	frame     = 8
	maxRecord = 1 << 30
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrInUse is returned by [Open] while another process has the journal.
var ErrInUse = errors.New("another notifier uses it; give each a folder of its own")

// Journal is an open journal. It is not safe for concurrent use.
type Journal struct {
	dir  string
	lock *os.File
	file *os.File
	size int64 // of what counts
}

// Open opens the journal in a folder, which it makes, and returns its records.
// torn is how many bytes at its end were no whole record.
func Open(dir string) (j *Journal, records [][]byte, torn int64, err error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, nil, 0, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o640)
	if err != nil {
		return nil, nil, 0, err
	}
	j = &Journal{dir: dir, lock: lock}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open the journal in %s: %w", dir, err), j.Close())
			j = nil
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrInUse
		}
		return j, nil, 0, err
	}
	if err := os.Remove(filepath.Join(dir, nextName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return j, nil, 0, err
	}
	if j.file, err = os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_RDWR, 0o640); err != nil {
		return j, nil, 0, err
	}
	if err := syncDir(dir); err != nil {
		return j, nil, 0, err
	}
	if records, j.size, err = read(j.file); err != nil {
		return j, nil, 0, err
	}
	info, err := j.file.Stat()
	if err == nil && info.Size() > j.size {
		torn, err = info.Size()-j.size, j.file.Truncate(j.size)
	}
	return j, records, torn, err
}

// read returns the records of a file and how long they are, up to the first that
// is not whole.
func read(f io.Reader) (records [][]byte, size int64, err error) {
	in := bufio.NewReaderSize(f, 1<<20)
	var head [frame]byte
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return records, size, end(err)
		}
		n := binary.LittleEndian.Uint32(head[:])
		if n == 0 || n > maxRecord { // a power failure may leave zeros
			return records, size, nil
		}
		record, err := io.ReadAll(io.LimitReader(in, int64(n))) // grows with what is there
		if err != nil {
			return records, size, err
		}
		if len(record) < int(n) || crc32.Checksum(record, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
			return records, size, nil
		}
		records = append(records, record)
		size += frame + int64(n)
	}
}

func end(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

func framed(record []byte) []byte {
	out := make([]byte, frame, frame+len(record))
	binary.LittleEndian.PutUint32(out, uint32(len(record)))
	binary.LittleEndian.PutUint32(out[4:], crc32.Checksum(record, castagnoli))
	return append(out, record...)
}

// Append adds a record, which must not be empty, and returns when it is synced. After an error it does not
// count.
func (j *Journal) Append(_ context.Context, record []byte) error {
	out := framed(record)
	_, err := j.file.WriteAt(out, j.size)
	if err == nil {
		err = unix.Fdatasync(int(j.file.Fd()))
	}
	if err != nil {
		return fmt.Errorf("write the journal in %s: %w", j.dir, errors.Join(err, j.file.Truncate(j.size)))
	}
	j.size += int64(len(out))
	return nil
}

// Replace puts records, none of which is empty, in the place of all there are, and returns when they are
// synced. After an error either counts.
func (j *Journal) Replace(_ context.Context, records [][]byte) error {
	f, size, err := j.write(records)
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(j.dir, name))
	}
	old := f
	if err == nil {
		old, j.file, j.size = j.file, f, size
		err = syncDir(j.dir)
	}
	if old != nil {
		err = errors.Join(err, old.Close())
	}
	if err != nil {
		return fmt.Errorf("write the journal in %s anew: %w", j.dir, err)
	}
	return nil
}

// write makes the file that becomes the journal.
func (j *Journal) write(records [][]byte) (f *os.File, size int64, err error) {
	if f, err = os.OpenFile(filepath.Join(j.dir, nextName), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o640); err != nil {
		return nil, 0, err
	}
	for _, record := range records {
		n, err := f.Write(framed(record))
		if size += int64(n); err != nil {
			return f, 0, err
		}
	}
	return f, size, f.Sync()
}

// Close closes the journal; what was written stays.
func (j *Journal) Close() error {
	var err error
	if j.file != nil {
		err = j.file.Close()
	}
	return errors.Join(err, j.lock.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
