// Package state keeps counters in a mapped file, so that they outlive the
// process that counts, however it ends. What was committed is there again after
// a SIGKILL between any two instructions; over a restart of the host nothing is
// kept, since the kernel's counters start at zero then, too.
package state

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/sample"
)

// ErrInUse is returned where another process holds the file.
var ErrInUse = errors.New("another agent keeps its counters there")

// MaxWords is the most that a block may hold.
const MaxWords = 2048

// version of the layout below. Another one's file is not read.
const version = 1

// The file is a header and whole segments of records. All numbers are words of
// 8 bytes in the machine's own order.
//
// A commit writes what is to be to the journal, marks that as valid, writes it
// to the record and takes the mark away. A kill in between leaves either the
// old words, or a valid journal that is written to its record at the next start.
const (
	headerBytes  = 24 << 10
	segmentBytes = 256 << 10
	cacheLine    = 64

	// in the header
	atMagic    = 0
	atVersion  = 1
	atSum      = 2 // of magic, version and boot
	atSegments = 3 // how many there must be
	atBoot     = 4 // bootWords words of text
	bootWords  = 8
	atJournal  = 512

	// in the journal
	atValid        = 0 // 1: it holds what a record is to be
	atOffset       = 1 // of the record, bytes from the file's start
	atJournalSum   = 2 // what the record's sum is to be
	atJournalWords = 3

	// in a record
	atBytes       = 0 // its size, a multiple of cacheLine that never changes; 0: nothing follows in this segment
	atRecordSum   = 1 // CRC-32C of owner, key, count and words
	atOwner       = 2 // 0: the record is free
	atKey         = 3
	atCount       = 4 // of words
	atRecordWords = 5
)

const magic = 'k' | 'v'<<8 | 'm'<<16 | 'e'<<24 | 't'<<32 | 'e'<<40 | 'r'<<48

// lockWait bounds how long a process that is ending may still hold the file.
const lockWait = 2 * time.Second

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Key names a block among those of its owner.
type Key uint64

// KeyOf makes a key of what the block is of, such as "nic", "tap0".
func KeyOf(parts ...string) Key {
	return Key(sample.IncarnationOf(parts...))
}

// File holds blocks. It is for one goroutine at a time.
type File struct {
	log      *zap.Logger
	fd       int      // -1: blocks are in memory only
	header   []uint64 // mapped
	segments [][]uint64
	tail     int // bytes used of the last segment
	free     map[uint64][]record
	blocks   map[name]*Block
	err      error
}

type name struct {
	owner sample.Incarnation
	key   Key
}

// record is a place in the file.
type record struct {
	words  []uint64
	offset uint64
}

// Block is some counters of one owner, zeros at first. Change Words, never their
// number, and Commit.
type Block struct {
	Words []uint64

	name name
	seed uint32
	file *File
	kept record // no words: in memory only
}

// Memory returns a file that keeps nothing.
func Memory() *File {
	return &File{fd: -1, blocks: map[name]*Block{}}
}

// Open opens the file at path, or makes it, for this run of the kernel. A file
// of another run or version, or one that is damaged, starts empty; where there
// can be no file, blocks are in memory only and [File.Err] says why. The log is
// told either. The only error is [ErrInUse].
func Open(log *zap.Logger, path, bootID string) (*File, error) {
	f := Memory()
	f.log = log
	why, err := f.open(path, bootID)
	switch {
	case errors.Is(err, ErrInUse):
		return nil, err
	case err != nil:
		_ = f.Close() // nothing in it is used
		f.blocks = map[name]*Block{}
		f.fail(fmt.Errorf("keep counters in %s: %w", path, err))
	case why != "":
		log.Warn("counters start anew: their file cannot be used", zap.String("file", path), zap.String("reason", why))
	default:
		log.Info("counters go on", zap.String("file", path), zap.Int("blocks", len(f.blocks)))
	}
	return f, nil
}

// open returns why what the file held is lost, if so.
func (f *File) open(path, bootID string) (why string, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	if f.fd, err = lock(path); err != nil {
		return "", err
	}
	var stat unix.Stat_t
	if err := unix.Fstat(f.fd, &stat); err != nil {
		return "", fmt.Errorf("stat: %w", err)
	}
	if stat.Size > 0 {
		if why, err = f.load(stat.Size, bootID); err != nil || why == "" {
			return "", err
		}
	}
	return why, f.create(bootID)
}

// lock opens the file and makes it this process's alone.
func lock(path string) (fd int, err error) {
	for deadline := time.Now().Add(lockWait); ; time.Sleep(10 * time.Millisecond) {
		fd, err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return -1, fmt.Errorf("open: %w", err)
		}
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(path, fd) {
			return fd, nil
		}
		_ = unix.Close(fd)
		switch {
		case err != nil && err != unix.EWOULDBLOCK && err != unix.EINTR:
			return -1, fmt.Errorf("lock: %w", err)
		case time.Now().After(deadline):
			return -1, fmt.Errorf("%w: stop it, or give this one another file with the setting counters (%s)", ErrInUse, path)
		}
	}
}

// isAt reports whether the file is still the one at path.
func isAt(path string, fd int) bool {
	var at, of unix.Stat_t
	return unix.Lstat(path, &at) == nil && unix.Fstat(fd, &of) == nil && at.Ino == of.Ino && at.Dev == of.Dev
}

// create makes the file an empty one.
func (f *File) create(bootID string) error {
	f.unmap()
	f.free, f.blocks = map[uint64][]record{}, map[name]*Block{}
	if err := unix.Ftruncate(f.fd, 0); err != nil {
		return fmt.Errorf("empty it: %w", err)
	}
	header, err := f.extend(0, headerBytes)
	if err != nil {
		return err
	}
	header[atMagic], header[atVersion] = magic, version
	putText(header[atBoot:atBoot+bootWords], bootID)
	atomic.StoreUint64(&header[atSum], headerSum(header))
	f.header = header
	return nil
}

// extend maps a new part of the file. The room is taken at once: a store to a
// page that the file system has no room for would end the process.
func (f *File) extend(offset, size int64) ([]uint64, error) {
	err := unix.EINTR
	for err == unix.EINTR { // the runtime's own signals, too, cut it short
		err, _ = unix.Fallocate(f.fd, 0, offset, size).(unix.Errno)
	}
	if err != 0 {
		return nil, fmt.Errorf("take room: %w", err)
	}
	return f.mapPart(offset, size)
}

func (f *File) mapPart(offset, size int64) ([]uint64, error) {
	mem, err := unix.Mmap(f.fd, offset, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map: %w", err)
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(&mem[0])), len(mem)/8), nil
}

// load takes over what the file holds, or says why it can't be used.
func (f *File) load(size int64, bootID string) (why string, err error) {
	if size < headerBytes {
		return "it is too short", nil
	}
	if f.header, err = f.mapPart(0, headerBytes); err != nil {
		return "", err
	}
	h := f.header
	boot := make([]uint64, bootWords)
	putText(boot, bootID)
	segments := int64(h[atSegments])
	switch {
	case h[atMagic] != magic:
		return "it is not an agent's", nil
	case h[atVersion] != version:
		return "another version of the agent made it", nil
	case h[atSum] != headerSum(h):
		return "its header is damaged", nil
	case !slices.Equal(boot, h[atBoot:atBoot+bootWords]):
		return "it is from before the host was started", nil
	case segments < 0 || segments > (size-headerBytes)/segmentBytes:
		return "it is too short", nil
	}
	// A segment that was added, but not counted yet, is made anew.
	if err := unix.Ftruncate(f.fd, headerBytes+segments*segmentBytes); err != nil {
		return "", fmt.Errorf("shorten it: %w", err)
	}
	for i := range segments {
		s, err := f.mapPart(headerBytes+i*segmentBytes, segmentBytes)
		if err != nil {
			return "", err
		}
		f.segments = append(f.segments, s)
	}
	if !f.replay() {
		return "its journal is damaged", nil
	}
	f.free = map[uint64][]record{}
	for i := range f.segments {
		if !f.scan(i) {
			return "a record is damaged", nil
		}
	}
	return "", nil
}

// replay finishes a commit that a kill cut short.
func (f *File) replay() bool {
	j := f.header[atJournal:]
	if j[atValid] == 0 {
		return true
	}
	offset := j[atOffset] - headerBytes
	i, at := offset/segmentBytes, offset%segmentBytes
	if j[atValid] != 1 || i >= uint64(len(f.segments)) || at%cacheLine != 0 {
		return false
	}
	r, ok := f.record(int(i), int(at))
	if !ok || len(r.words) == 0 || r.words[atOwner] == 0 || r.words[atCount] > MaxWords {
		return false
	}
	n := r.words[atCount]
	words := j[atJournalWords:][:n]
	if sum(r.seed(), words) != j[atJournalSum] {
		return false
	}
	copy(r.words[atRecordWords:], words)
	r.words[atRecordSum] = j[atJournalSum]
	atomic.StoreUint64(&j[atValid], 0)
	return true
}

// record returns the record at a place of a segment. It has no words where
// nothing follows there; ok is false if there can be none.
func (f *File) record(segment, at int) (r record, ok bool) {
	s := f.segments[segment][at/8:]
	size := s[atBytes]
	if size%cacheLine != 0 || size > uint64(len(s))*8 || size > 0 && s[atOwner] != 0 && s[atCount] > size/8-atRecordWords {
		return record{}, false
	}
	return record{s[:size/8], headerBytes + uint64(segment)*segmentBytes + uint64(at)}, true
}

func (r record) seed() uint32 {
	return seedOf(name{sample.Incarnation(r.words[atOwner]), Key(r.words[atKey])}, int(r.words[atCount]))
}

// scan takes over the records of a segment.
func (f *File) scan(segment int) bool {
	for f.tail = 0; f.tail < segmentBytes; {
		r, ok := f.record(segment, f.tail)
		if !ok {
			return false
		}
		if len(r.words) == 0 {
			return true
		}
		f.tail += len(r.words) * 8
		if r.words[atOwner] == 0 {
			f.release(r)
			continue
		}
		n := name{sample.Incarnation(r.words[atOwner]), Key(r.words[atKey])}
		words := r.words[atRecordWords:][:r.words[atCount]]
		if sum(r.seed(), words) != r.words[atRecordSum] {
			return false
		}
		if old := f.blocks[n]; old != nil { // a kill while it was moved; they are equal
			f.release(old.kept)
		}
		f.blocks[n] = &Block{Words: slices.Clone(words), name: n, seed: r.seed(), file: f, kept: r}
	}
	return true
}

// Block returns the owner's block of that key, with n words: those that were
// committed last, as far as they are among the first n, and zeros for the rest.
// So that words keep their meaning over versions of the agent, new ones have to
// go to the end. owner is not 0, n at most [MaxWords].
func (f *File) Block(owner sample.Incarnation, key Key, n int) *Block {
	id := name{owner, key}
	b := f.blocks[id]
	if b != nil && len(b.Words) == n {
		return b
	}
	next := &Block{Words: make([]uint64, n), name: id, seed: seedOf(id, n), file: f}
	var old record
	if b != nil {
		old = b.kept
		copy(next.Words, b.Words)
	}
	if f.fd >= 0 {
		if r, err := f.take(n); err != nil {
			f.fail(fmt.Errorf("keep more counters: %w", err))
		} else {
			next.write(r)
		}
		f.release(old)
	}
	f.blocks[id] = next
	return next
}

// write makes the record the block's. It counts once it has an owner.
func (b *Block) write(r record) {
	r.words[atKey], r.words[atCount] = uint64(b.name.key), uint64(len(b.Words))
	copy(r.words[atRecordWords:], b.Words)
	r.words[atRecordSum] = sum(b.seed, b.Words)
	atomic.StoreUint64(&r.words[atOwner], uint64(b.name.owner))
	b.kept = r
}

// take returns a free record for n words.
func (f *File) take(n int) (record, error) {
	size := (atRecordWords + n + cacheLine/8 - 1) * 8 &^ (cacheLine - 1)
	if free := f.free[uint64(size)]; len(free) > 0 {
		f.free[uint64(size)] = free[:len(free)-1]
		return free[len(free)-1], nil
	}
	if len(f.segments) == 0 || f.tail+size > segmentBytes {
		s, err := f.extend(headerBytes+int64(len(f.segments))*segmentBytes, segmentBytes)
		if err != nil {
			return record{}, err
		}
		f.segments = append(f.segments, s)
		f.tail = 0
		atomic.StoreUint64(&f.header[atSegments], uint64(len(f.segments)))
	}
	last := len(f.segments) - 1
	r := record{f.segments[last][f.tail/8:][:size/8], headerBytes + uint64(last)*segmentBytes + uint64(f.tail)}
	f.tail += size
	atomic.StoreUint64(&r.words[atBytes], uint64(size))
	return r, nil
}

// release makes a record free.
func (f *File) release(r record) {
	if len(r.words) == 0 {
		return
	}
	atomic.StoreUint64(&r.words[atOwner], 0)
	size := r.words[atBytes]
	f.free[size] = append(f.free[size], r)
}

// Words is how many words a T has; see [View].
func Words[T any]() int {
	return int(unsafe.Sizeof(*new(T)) / 8)
}

// View is the block's words as a T, which has to be a struct of as many words:
// uint64, int64, arrays of them, and nothing else.
func View[T any](b *Block) *T {
	if Words[T]() != len(b.Words) {
		panic(fmt.Sprintf("a view of %d words on %d", Words[T](), len(b.Words)))
	}
	return (*T)(unsafe.Pointer(&b.Words[0]))
}

// Commit keeps the words as they are now. It costs little if they have not
// changed, and never allocates.
func (b *Block) Commit() {
	r := b.kept.words
	if len(r) == 0 {
		return
	}
	words := r[atRecordWords:][:len(b.Words)]
	if slices.Equal(words, b.Words) {
		return
	}
	j := b.file.header[atJournal:]
	copy(j[atJournalWords:], b.Words)
	j[atOffset] = b.kept.offset
	j[atJournalSum] = sum(b.seed, b.Words)
	atomic.StoreUint64(&j[atValid], 1)
	copy(words, b.Words)
	r[atRecordSum] = j[atJournalSum]
	atomic.StoreUint64(&j[atValid], 0)
}

// Forget drops all blocks of an owner. Nobody may use them any more.
func (f *File) Forget(owner sample.Incarnation) {
	f.Keep(func(o sample.Incarnation) bool { return o != owner })
}

// Keep drops the blocks of all owners that keep says no to.
func (f *File) Keep(keep func(owner sample.Incarnation) bool) {
	for n, b := range f.blocks {
		if !keep(n.owner) {
			f.release(b.kept)
			b.kept = record{}
			delete(f.blocks, n)
		}
	}
}

// Drop gives one block up. Nobody may use it any more.
func (b *Block) Drop() {
	b.file.release(b.kept)
	b.kept = record{}
	delete(b.file.blocks, b.name)
}

// Err says why some or all blocks are in memory only; nil: none is.
func (f *File) Err() error {
	return f.err
}

func (f *File) fail(err error) {
	if f.err == nil {
		f.log.Warn("counters are not kept over a restart of the agent", zap.Error(err))
	}
	f.err = err
}

// Size returns how many blocks there are, and how many bytes the file has.
func (f *File) Size() (blocks int, bytes int64) {
	if f.header != nil {
		bytes = headerBytes + int64(len(f.segments))*segmentBytes
	}
	return len(f.blocks), bytes
}

// Close gives the file up. Its blocks keep nothing any more.
func (f *File) Close() error {
	for _, b := range f.blocks {
		b.kept = record{}
	}
	f.unmap()
	if f.fd < 0 {
		return nil
	}
	fd := f.fd
	f.fd = -1
	return unix.Close(fd)
}

func (f *File) unmap() {
	parts := f.segments
	if f.header != nil {
		parts = append(parts, f.header)
	}
	for _, p := range parts {
		_ = unix.Munmap(bytesOf(p)) // what was mapped can be unmapped
	}
	f.header, f.segments = nil, nil
}

func headerSum(h []uint64) uint64 {
	s := crc32.Update(0, castagnoli, bytesOf(h[:atSum]))
	return uint64(crc32.Update(s, castagnoli, bytesOf(h[atBoot:atBoot+bootWords])))
}

func seedOf(n name, count int) uint32 {
	id := [...]uint64{uint64(n.owner), uint64(n.key), uint64(count)}
	return crc32.Checksum(bytesOf(id[:]), castagnoli)
}

func sum(seed uint32, words []uint64) uint64 {
	return uint64(crc32.Update(seed, castagnoli, bytesOf(words)))
}

func bytesOf(words []uint64) []byte {
	if len(words) == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
}

// putText writes as much of the text as there is room for.
func putText(words []uint64, text string) {
	copy(bytesOf(words), text)
}
