// Package diskqueue keeps records in files until somebody is done with them,
// whenever the program or the host dies. The spools of the agent and of the
// notifier's publishers are made of it.
//
// Records are appended to segment files and synced. What is done is noted in a
// file beside each segment, and a segment is removed when all of it is done.
// The notes are not synced: after a power loss a record may come out again.
package diskqueue

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Options say how a queue behaves.
type Options struct {
	Dir string // its own folder, which is made
	FS  FS     // nil: the host's
	// SegmentBytes is the size from which on another file is begun; 0: 4 MiB.
	SegmentBytes int64
	// Damaged is told what was damaged on disk and so is lost; nil: nobody. It
	// must not call the queue.
	Damaged func(Damage)
}

// Damage is what could not be read any more.
type Damage struct {
	File    string
	Records int // that are lost; -1: an unknown number
	N       int // samples or events in them; 0: not known
	// From and To are between the times of which records the lost ones were put,
	// in µs since the Unix epoch; 0: not known.
	From, To int64
}

// Ref names a record of a queue that is open.
type Ref struct {
	segment uint64
	index   int
}

// Entry is a record that was taken.
type Entry struct {
	Ref
	Record
}

// Order is which records come first.
type Order bool

// The orders, by when records were put.
const (
	OldestFirst Order = false
	NewestFirst Order = true
)

// Queue is a queue of records in a folder. It is safe for concurrent use; what
// its methods do on disk, they do while the others wait.
type Queue struct {
	o    Options
	lock io.Closer

	mu       sync.Mutex
	segments []*segment // by number
	next     uint64     // number of the next segment
	w        File       // of the last segment; nil: none is being written
	r        File       // that was read last
	rOf      uint64     // its segment
	buf      []byte
	bytes    int64  // of all files
	waiting  int64  // bytes of what is not done
	records  int    // that are not done
	newest   int64  // time of the record that was put last
	newestIn uint64 // its segment, which stays, so that a start after a kill knows the time; 0: that does not matter
}

type state uint8

const (
	waits state = iota
	taken
	done
)

// entry is where a record is in its file.
type entry struct {
	offset, size, n uint32
	state           state
}

type segment struct {
	number      uint64
	salt        salt
	size        int64 // of the file
	entries     []entry
	left        int   // not done
	first, last int64 // times of its oldest and newest record
	lo, hi      int   // nothing waits before lo and from hi on
	notes       File  // nil: not open
}

// add takes in a record that is on disk.
func (q *Queue) add(s *segment, e entry, time int64) {
	if len(s.entries) == 0 {
		s.first = time
	}
	s.last = time
	s.entries = append(s.entries, e)
	s.left++
	s.hi = len(s.entries)
	q.records++
	q.waiting += int64(e.size)
	q.newest, q.newestIn = time, s.number
}

// Open opens the queue in a folder, which one process may use at a time.
func Open(o Options) (*Queue, error) {
	if o.FS == nil {
		o.FS = OS{}
	}
	if o.SegmentBytes == 0 {
		o.SegmentBytes = 4 << 20
	}
	if o.Damaged == nil {
		o.Damaged = func(Damage) {}
	}
	q := &Queue{o: o, next: 1}
	if err := o.FS.MkdirAll(o.Dir); err != nil {
		return nil, err
	}
	lock, err := o.FS.Lock(filepath.Join(o.Dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", o.Dir, err)
	}
	q.lock = lock
	if err := q.load(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return q, nil
}

const (
	segmentExt = ".spool"
	notesExt   = ".done"
)

func (q *Queue) path(number uint64, ext string) string {
	return filepath.Join(q.o.Dir, fmt.Sprintf("%016x%s", number, ext))
}

// load finds the segments of the folder.
func (q *Queue) load() error {
	names, err := q.o.FS.List(q.o.Dir)
	if err != nil {
		return err
	}
	var numbers []uint64
	notes := map[uint64]bool{}
	for _, name := range names {
		ext := filepath.Ext(name)
		number, err := strconv.ParseUint(strings.TrimSuffix(name, ext), 16, 64)
		switch {
		case err != nil || number == 0:
		case ext == segmentExt:
			numbers = append(numbers, number)
		case ext == notesExt:
			notes[number] = true
		}
	}
	slices.Sort(numbers)
	var damaged []Damage
	if len(numbers) > 0 {
		if err := q.o.FS.SyncDir(q.o.Dir); err != nil {
			return err
		}
	}
	for _, number := range numbers {
		delete(notes, number)
		q.next = number + 1
		damage, err := q.loadSegment(number)
		if err != nil {
			return err
		}
		damaged = append(damaged, damage...)
	}
	for number := range notes {
		_ = q.o.FS.Remove(q.path(number, notesExt)) // of no segment: harmless if it stays
	}
	for _, d := range damaged {
		q.o.Damaged(d)
	}
	for _, s := range slices.Clone(q.segments) {
		q.forget(s)
	}
	return nil
}

// loadSegment reads a segment of the folder.
func (q *Queue) loadSegment(number uint64) (damaged []Damage, err error) {
	path := q.path(number, segmentExt)
	data, err := ReadFile(q.o.FS, path, 1<<32)
	if err == nil {
		err = q.sync(path)
	}
	if err != nil {
		return nil, err
	}
	found, ok := readSegment(data)
	s := &segment{number: number, salt: found.salt, size: int64(len(data))}
	before := int64(0)
	if n := len(q.segments); n > 0 {
		before = q.segments[n-1].last
	}
	if !ok {
		// One that is too short was being made; its name may have outlived its content.
		if len(bytes.Trim(data, "\x00")) > 0 && len(data) >= fileHeader {
			damaged = append(damaged, Damage{File: path, Records: -1, From: before})
		}
	}
	for i := range found.entries {
		q.add(s, found.entries[i], found.times[i])
	}
	for i, hole := range found.holes {
		d := Damage{File: path, Records: -1, From: before, To: s.last}
		if hole[0] >= 0 {
			d.From = found.times[hole[0]]
		}
		if hole[1] < len(found.times) {
			d.To = found.times[hole[1]]
		}
		if len(found.holes) == 1 && i == 0 {
			d.Records = found.lost
		}
		damaged = append(damaged, d)
	}
	q.segments = append(q.segments, s)
	q.bytes += s.size
	q.readNotes(s)
	return damaged, nil
}

// sync makes what is read of a file survive the death of the host: its writer may
// have died before it had.
func (q *Queue) sync(path string) error {
	f, err := q.o.FS.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// noteSize is the length of a note that a record is done: its number, and
// CRC-32C of the salt and the number.
const noteSize = 8

// readNotes reads what of a segment is done. A note that is damaged costs its
// own word only: the record comes out again.
func (q *Queue) readNotes(s *segment) {
	data, err := ReadFile(q.o.FS, q.path(s.number, notesExt), 1<<32)
	if err != nil {
		return // there are none
	}
	for ; len(data) >= noteSize; data = data[noteSize:] {
		i := binary.LittleEndian.Uint32(data)
		if checksum(s.salt, data[:4]) == binary.LittleEndian.Uint32(data[4:]) && int64(i) < int64(len(s.entries)) {
			q.finish(s, int(i))
		}
	}
}

// finish marks a record as done, and reports whether it was not.
func (q *Queue) finish(s *segment, i int) bool {
	e := &s.entries[i]
	if e.state == done {
		return false
	}
	e.state = done
	s.left--
	q.records--
	q.waiting -= int64(e.size)
	return true
}

// forget removes the files of a segment of which nothing is left, unless it is
// being written, and reports whether it did.
func (q *Queue) forget(s *segment) bool {
	if s.left > 0 || s.number == q.newestIn || q.w != nil && s == q.segments[len(q.segments)-1] {
		return false
	}
	if q.r != nil && q.rOf == s.number {
		_ = q.r.Close() // it was only read
		q.r = nil
	}
	if s.notes != nil {
		_ = s.notes.Close()
		s.notes = nil
	}
	// Files that stay are read, and removed, at the next start: harmless.
	_ = removeAll(q.o.FS, q.path(s.number, segmentExt), q.path(s.number, notesExt))
	q.bytes -= s.size
	q.segments = slices.DeleteFunc(q.segments, func(other *segment) bool { return other == s })
	return true
}

// Put appends records and syncs them: all of them or none. They are waiting, or,
// where hold is set, taken. After an error they are not in the queue; at the next
// start they may be.
func (q *Queue) Put(hold bool, rs ...Record) ([]Ref, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(rs) == 0 {
		return nil, nil
	}
	if q.w != nil && q.segments[len(q.segments)-1].size >= q.o.SegmentBytes {
		if err := q.seal(); err != nil {
			return nil, err
		}
	}
	if q.w == nil {
		if err := q.begin(); err != nil {
			return nil, err
		}
	}
	s := q.segments[len(q.segments)-1]
	q.buf = q.buf[:0]
	for i := range rs {
		r := rs[i]
		if r.Kind == 0 || r.Kind&more != 0 || len(r.Body) > MaxBody {
			return nil, fmt.Errorf("record of kind %d with %d bytes: kinds are 1 to 127, and at most %d bytes can be kept", r.Kind, len(r.Body), MaxBody)
		}
		if i < len(rs)-1 {
			r.Kind |= more
		}
		q.buf = appendRecord(q.buf, s.salt, &r)
	}
	n, err := q.w.Write(q.buf)
	q.bytes += int64(n)
	at := s.size
	s.size += int64(n)
	if err == nil {
		err = q.w.Sync()
	}
	if err != nil {
		// What is in the file now is not known: it gets no more records.
		err = errors.Join(err, q.w.Close())
		q.w = nil
		q.forget(s)
		return nil, err
	}
	before := q.find(q.newestIn)
	refs := make([]Ref, len(rs))
	for i := range rs {
		e := entry{offset: uint32(at), size: uint32(rs[i].size()), n: uint32(rs[i].N)}
		if hold {
			e.state = taken
		}
		refs[i] = Ref{s.number, len(s.entries)}
		q.add(s, e, rs[i].Time)
		at += int64(e.size)
	}
	if cap(q.buf) > 4<<20 {
		q.buf = nil
	}
	if before != nil && before != s {
		q.forget(before)
	}
	return refs, nil
}

// begin makes a new segment.
func (q *Queue) begin() error {
	s := &segment{number: q.next, size: int64(fileHeader)}
	q.next++ // also after an error: what is left of it is not mistaken for the next one
	_, _ = rand.Read(s.salt[:])
	path := q.path(s.number, segmentExt)
	w, err := q.o.FS.Create(path)
	if err != nil {
		return err
	}
	_, err = w.Write(append([]byte(magic), s.salt[:]...))
	if err == nil {
		err = w.Sync()
	}
	if err == nil {
		err = q.o.FS.SyncDir(q.o.Dir)
	}
	if err != nil {
		return errors.Join(err, w.Close(), removeAll(q.o.FS, path))
	}
	q.w = w
	q.segments = append(q.segments, s)
	q.bytes += s.size
	return nil
}

// seal ends the segment that is being written.
func (q *Queue) seal() error {
	s := q.segments[len(q.segments)-1]
	end := Record{N: len(s.entries)}
	n, err := q.w.Write(appendRecord(nil, s.salt, &end))
	s.size += int64(n)
	q.bytes += int64(n)
	if err == nil {
		err = q.w.Sync()
	}
	err = errors.Join(err, q.w.Close())
	q.w = nil
	q.forget(s)
	return err
}

// Take appends records that wait, at most n, and none beyond the one that
// reaches so many bytes. They are not taken again before they are returned. The
// error is of the disk, beside what could be read; what is damaged is left out and
// told.
func (q *Queue) Take(dst []Entry, order Order, n int, bytes int64) ([]Entry, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for k := range q.segments {
		s := q.segments[k]
		if order == NewestFirst {
			s = q.segments[len(q.segments)-1-k]
		}
		for {
			i := s.pick(order)
			if i < 0 {
				break
			}
			if n == 0 || bytes <= 0 {
				return dst, nil
			}
			r, err := q.read(s, i)
			if errors.Is(err, errDamaged) {
				q.o.Damaged(Damage{File: q.path(s.number, segmentExt), Records: 1, N: int(s.entries[i].n), From: s.first, To: s.last})
				_ = q.note(s, i) // that it is told again after the next start is no loss
				continue
			}
			if err != nil {
				return dst, err
			}
			s.entries[i].state = taken
			n--
			bytes -= int64(s.entries[i].size)
			dst = append(dst, Entry{Ref{s.number, i}, r})
		}
	}
	return dst, nil
}

// pick returns the number of the first record that waits, or -1.
func (s *segment) pick(order Order) int {
	for s.lo < s.hi && s.entries[s.lo].state != waits {
		s.lo++
	}
	for s.lo < s.hi && s.entries[s.hi-1].state != waits {
		s.hi--
	}
	switch {
	case s.lo == s.hi:
		return -1
	case order == NewestFirst:
		return s.hi - 1
	}
	return s.lo
}

var errDamaged = errors.New("the record is damaged")

// read reads a record.
func (q *Queue) read(s *segment, i int) (Record, error) {
	f := q.w
	if f == nil || s != q.segments[len(q.segments)-1] {
		if q.r == nil || q.rOf != s.number {
			if q.r != nil {
				_ = q.r.Close() // it was only read
				q.r = nil
			}
			opened, err := q.o.FS.Open(q.path(s.number, segmentExt))
			if err != nil {
				return Record{}, err
			}
			q.r, q.rOf = opened, s.number
		}
		f = q.r
	}
	e := &s.entries[i]
	b := make([]byte, e.size)
	if err := readAt(f, b, int64(e.offset)); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errDamaged
		}
		return Record{}, err
	}
	r, ok := readRecord(b, s.salt)
	if !ok {
		return Record{}, errDamaged
	}
	r.Kind &^= more
	return r, nil
}

func (q *Queue) find(number uint64) *segment {
	i, ok := slices.BinarySearchFunc(q.segments, number, func(s *segment, n uint64) int { return cmp.Compare(s.number, n) })
	if !ok {
		return nil
	}
	return q.segments[i]
}

// Return gives back records that were taken.
func (q *Queue) Return(refs ...Ref) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, ref := range refs {
		if s := q.find(ref.segment); s != nil && s.entries[ref.index].state == taken {
			s.entries[ref.index].state = waits
			s.lo, s.hi = min(s.lo, ref.index), max(s.hi, ref.index+1)
		}
	}
}

// Done removes records; those that are done already may be among them. The
// error is of the disk: the records may come out again after the next start.
func (q *Queue) Done(refs ...Ref) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	var errs []error
	for begin := 0; begin < len(refs); {
		end := begin + 1
		for end < len(refs) && refs[end].segment == refs[begin].segment {
			end++
		}
		if s := q.find(refs[begin].segment); s != nil {
			indexes := make([]int, 0, end-begin)
			for _, ref := range refs[begin:end] {
				indexes = append(indexes, ref.index)
			}
			errs = append(errs, q.note(s, indexes...))
		}
		begin = end
	}
	return errors.Join(errs...)
}

// note marks records of a segment as done, and notes it on disk.
func (q *Queue) note(s *segment, indexes ...int) error {
	var buf []byte
	for _, i := range indexes {
		if q.finish(s, i) {
			at := len(buf)
			buf = binary.LittleEndian.AppendUint32(buf, uint32(i))
			buf = binary.LittleEndian.AppendUint32(buf, checksum(s.salt, buf[at:]))
		}
	}
	if len(buf) == 0 || q.forget(s) {
		return nil
	}
	var err error
	if s.notes == nil {
		s.notes, err = q.openNotes(s)
	}
	if err == nil {
		_, err = s.notes.Write(buf)
	}
	return err
}

// openNotes makes the file of what is done of a segment, with what is known.
func (q *Queue) openNotes(s *segment) (File, error) {
	f, err := q.o.FS.Create(q.path(s.number, notesExt))
	if err != nil {
		return nil, err
	}
	w := bufio.NewWriter(f)
	var buf [noteSize]byte
	for i := range s.entries {
		if s.entries[i].state == done {
			binary.LittleEndian.PutUint32(buf[:], uint32(i))
			binary.LittleEndian.PutUint32(buf[4:], checksum(s.salt, buf[:4]))
			_, _ = w.Write(buf[:]) // the error stays until Flush
		}
	}
	return f, w.Flush()
}

// DropOldest gives up the oldest record that is not done, whether it is taken
// or not, and returns how many samples or events it had; ok is false where there
// is none.
func (q *Queue) DropOldest() (n int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, s := range q.segments {
		for i := range s.entries {
			if s.entries[i].state != done {
				n = int(s.entries[i].n)
				// That it may come out again after the next start is no loss.
				_ = q.note(s, i)
				return n, true
			}
		}
	}
	return 0, false
}

// TakeOldestSegment takes what is not done of the oldest segment, whether it
// was taken or not, and calls each with its records, as far as they can be read.
// When they are done the whole file is removed. damaged says that some could not be read.
// Where nothing is in the queue it returns no refs.
func (q *Queue) TakeOldestSegment(each func(*Record)) (refs []Ref, damage Damage, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.IndexFunc(q.segments, func(s *segment) bool { return s.left > 0 })
	if i < 0 {
		return nil, damage, nil
	}
	s := q.segments[i]
	if q.w != nil && i == len(q.segments)-1 {
		err = q.seal()
	}
	damage = Damage{File: q.path(s.number, segmentExt), From: s.first, To: s.last}
	for i := range s.entries {
		if s.entries[i].state == done {
			continue
		}
		s.entries[i].state = taken
		refs = append(refs, Ref{s.number, i})
		r, err := q.read(s, i)
		if err != nil {
			damage.Records++
			damage.N += int(s.entries[i].n)
			continue
		}
		each(&r)
	}
	return refs, damage, err
}

// Stats is how much is in a queue.
type Stats struct {
	Files   int64 // bytes of the segment files
	Bytes   int64 // of what is not done
	Records int   // that are not done
	// Oldest is the time of the first record of the oldest segment with something
	// not done, and Newest that of the record that was put last, done or not, as far
	// as it is known: µs since the Unix epoch, 0 where there is none.
	Oldest, Newest int64
}

// Stats returns how much is in the queue.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	st := Stats{Files: q.bytes, Bytes: q.waiting, Records: q.records, Newest: q.newest}
	if i := slices.IndexFunc(q.segments, func(s *segment) bool { return s.left > 0 }); i >= 0 {
		st.Oldest = q.segments[i].first
	}
	return st
}

// Close ends the use of the folder. What is in the queue stays there.
func (q *Queue) Close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	var errs []error
	q.newestIn = 0
	if q.w != nil {
		errs = append(errs, q.seal())
	}
	for _, s := range slices.Clone(q.segments) {
		q.forget(s)
		if s.notes != nil {
			errs = append(errs, s.notes.Close())
		}
	}
	if q.r != nil {
		errs = append(errs, q.r.Close())
	}
	return errors.Join(append(errs, q.lock.Close())...)
}
