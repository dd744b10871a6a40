package diskqueue

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"slices"
)

// Record is what is put at once and comes out whole or not at all.
type Record struct {
	// Kind is the owner's word for what it is: 1 to 127.
	Kind byte
	// Time is when it was put, in µs since the Unix epoch.
	Time int64
	// N is how many samples or events it has.
	N int
	// Body is the content, at most [MaxBody] long.
	Body []byte
}

// MaxBody is how long a record may be, in bytes.
const MaxBody = 256 << 20

// A segment file is its magic, a random salt, and records: a mark, CRC-32C of
// the salt and of what follows it, length of the body, kind, time, number, body.
// The salt tells the records of this file from those of one whose place on the
// disk, or whose name, it got. A file that was written to its end has a last record of
// kind 0 with the number of records before it. Of records that were put together
// all but the last have a bit in their kind: they are there all or not at all.
const (
	magic      = "KVQUEUE1"
	saltSize   = 8
	fileHeader = len(magic) + saltSize
	mark       = "\xb5kvq"
	headerSize = len(mark) + 4 + 4 + 1 + 8 + 4
	more       = 0x80 // bit in the kind: another record was put with it
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type salt [saltSize]byte

// size is how many bytes the record has in the file.
func (r *Record) size() int { return headerSize + len(r.Body) }

func appendRecord(dst []byte, s salt, r *Record) []byte {
	dst = append(dst, mark...)
	sum := len(dst)
	dst = append(dst, 0, 0, 0, 0)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(r.Body)))
	dst = append(dst, r.Kind)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(r.Time))
	dst = binary.LittleEndian.AppendUint32(dst, uint32(r.N))
	dst = append(dst, r.Body...)
	binary.LittleEndian.PutUint32(dst[sum:], checksum(s, dst[sum+4:]))
	return dst
}

func checksum(s salt, b []byte) uint32 {
	return crc32.Update(crc32.Checksum(s[:], castagnoli), castagnoli, b)
}

// readRecord reads the record at the begin of b; ok is false where there is
// none that is whole. The body is a part of b.
func readRecord(b []byte, s salt) (r Record, ok bool) {
	if len(b) < headerSize || string(b[:len(mark)]) != mark {
		return r, false
	}
	sum, b := binary.LittleEndian.Uint32(b[len(mark):]), b[len(mark)+4:]
	n := int(binary.LittleEndian.Uint32(b))
	if rest := len(b) - (headerSize - len(mark) - 4); n > MaxBody || n > rest {
		return r, false
	}
	const head = headerSize - len(mark) - 4
	if checksum(s, b[:head+n]) != sum {
		return r, false
	}
	return Record{
		Kind: b[4], Time: int64(binary.LittleEndian.Uint64(b[5:])), N: int(binary.LittleEndian.Uint32(b[13:])), Body: b[head : head+n : head+n],
	}, true
}

// scan is what the bytes of a segment file hold.
type scan struct {
	salt    salt
	entries []entry
	times   []int64 // of the entries
	sealed  bool
	lost    int      // records that were written and are damaged; -1: some
	holes   [][2]int // of those: the numbers of the entries before and after, -1 and len(entries) where there is none
}

// readSegment finds the records of a segment file. What is damaged costs the
// records that it is in; a file that ends within a record was being written when
// its writer died. ok is false where the file's header is damaged.
func readSegment(b []byte) (s scan, ok bool) {
	if len(b) < fileHeader || string(b[:len(magic)]) != magic {
		return s, false
	}
	copy(s.salt[:], b[len(magic):])
	hole := false // bytes since the last record are no record
	whole := 0    // records before those of which more were put together
	for at := fileHeader; at < len(b); {
		r, ok := readRecord(b[at:], s.salt)
		if !ok {
			hole = true
			next := bytes.Index(b[at+1:], []byte(mark))
			if next < 0 {
				break
			}
			at += 1 + next
			continue
		}
		if hole {
			s.holes = append(s.holes, [2]int{len(s.entries) - 1, len(s.entries)})
			hole = false
		}
		if r.Kind == 0 {
			s.sealed = true
			s.lost = r.N - len(s.entries)
			return s, true
		}
		s.entries = append(s.entries, entry{offset: uint32(at), size: uint32(r.size()), n: uint32(r.N)})
		s.times = append(s.times, r.Time)
		if r.Kind&more == 0 {
			whole = len(s.entries)
		}
		at += r.size()
	}
	// The writer of the others died, and what is before them was being written.
	s.entries, s.times = s.entries[:whole], s.times[:whole]
	s.holes = slices.DeleteFunc(s.holes, func(h [2]int) bool { return h[1] >= whole })
	if len(s.holes) > 0 {
		s.lost = -1
	}
	return s, true
}
