package sample

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"
)

// BatchID is a UUID of version 8: 48 bits of Unix milliseconds, then random
// bits, the low 16 bits zero. Ids of one process sort by time.
type BatchID [16]byte

// NewBatchID makes the id of a batch that is being made at now.
func NewBatchID(now time.Time) BatchID {
	var id BatchID
	_, _ = rand.Read(id[6:14]) // never fails: crypto/rand ends the program instead
	binary.BigEndian.PutUint64(id[:8], uint64(now.UnixMilli())<<16|uint64(binary.BigEndian.Uint16(id[6:8])))
	return id.stamped()
}

// DeriveBatchID makes the id of a batch that is derived from another one, so
// that a redelivered input gives the same output id: the time of the input,
// then SHA-256 of the input's id and what names the derivation.
func DeriveBatchID(from BatchID, what string) BatchID {
	sum := sha256.Sum256(append(from[:], what...))
	id := from
	copy(id[6:14], sum[:8])
	return id.stamped()
}

// NamedBatchID makes the id of a batch that is made of what a digest names, so
// that the same gives the same id: the time of what it was made of, then the
// digest's first 8 bytes.
func NamedBatchID(at time.Time, digest []byte) BatchID {
	var id BatchID
	binary.BigEndian.PutUint64(id[:8], uint64(at.UnixMilli())<<16)
	copy(id[6:14], digest[:8])
	return id.stamped()
}

func (id BatchID) stamped() BatchID {
	id[6] = id[6]&0x0f | 0x80 // version 8, RFC 9562 §5.8
	id[8] = id[8]&0x3f | 0x80 // variant, RFC 9562 §4.1
	id[14], id[15] = 0, 0
	return id
}

// Time returns when the batch was made, to the millisecond.
func (id BatchID) Time() time.Time {
	return time.UnixMilli(int64(binary.BigEndian.Uint64(id[:8]) >> 16))
}

// Sample returns the id of the batch's sample with the given index.
func (id BatchID) Sample(index int) ID {
	binary.BigEndian.PutUint16(id[14:], uint16(index))
	return ID{UUID: id}
}

// String returns the id as a UUID.
func (id BatchID) String() string { return formatUUID(id) }

// DeriveID makes the id of a sample that is computed when another one comes in,
// so that the same input gives the same id: SHA-256 of the other's id and of what
// names the derivation, as a UUID of version 8.
func DeriveID(from ID, what []byte) ID {
	var buf [128]byte
	in := buf[:0]
	if from.Text != "" {
		in = append(in, from.Text...)
	} else {
		in = append(in, from.UUID[:]...)
	}
	sum := sha256.Sum256(append(in, what...))
	id := ID{UUID: [16]byte(sum[:16])}
	id.UUID[6] = id.UUID[6]&0x0f | 0x80 // version 8, RFC 9562 §5.8
	id.UUID[8] = id.UUID[8]&0x3f | 0x80 // variant, RFC 9562 §4.1
	return id
}

// ID names one sample for ever: a UUID, or for foreign samples whatever text
// they came with.
type ID struct {
	UUID [16]byte // used where Text is empty
	Text string
}

// ParseID reads an id. A lower-case UUID becomes its 16 bytes; any other text
// is kept as it is, so that an id prints as it was read.
func ParseID(s string) ID {
	if u, ok := parseUUID(s); ok {
		return ID{UUID: u}
	}
	return ID{Text: s}
}

// Batch splits an id into its batch and index; ok is false for foreign texts.
func (id ID) Batch() (batch BatchID, index int, ok bool) {
	if id.Text != "" {
		return BatchID{}, 0, false
	}
	batch = id.UUID
	index = int(binary.BigEndian.Uint16(batch[14:]))
	batch[14], batch[15] = 0, 0
	return batch, index, true
}

// Append appends the id's text.
func (id ID) Append(dst []byte) []byte {
	if id.Text != "" {
		return append(dst, id.Text...)
	}
	return appendUUID(dst, id.UUID)
}

// String returns the id's text.
func (id ID) String() string {
	if id.Text != "" {
		return id.Text
	}
	return formatUUID(id.UUID)
}

func formatUUID(u [16]byte) string {
	var b [36]byte
	return string(appendUUID(b[:0], u))
}

func appendUUID(dst []byte, u [16]byte) []byte {
	var b [36]byte
	hex.Encode(b[:8], u[:4])
	hex.Encode(b[9:13], u[4:6])
	hex.Encode(b[14:18], u[6:8])
	hex.Encode(b[19:23], u[8:10])
	hex.Encode(b[24:], u[10:])
	b[8], b[13], b[18], b[23] = '-', '-', '-', '-'
	return append(dst, b[:]...)
}

// parseUUID reads a UUID as [appendUUID] writes it.
func parseUUID(s string) (u [16]byte, ok bool) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, false
	}
	at := 0
	for i := range u {
		if at == 8 || at == 13 || at == 18 || at == 23 {
			at++
		}
		high, low := nibbles[s[at]], nibbles[s[at+1]]
		if high|low > 15 {
			return u, false
		}
		u[i] = high<<4 | low
		at += 2
	}
	return u, true
}

// nibbles has the values of the lower-case hexadecimal digits, and 255 for all
// other bytes.
var nibbles = func() (t [256]byte) {
	for i := range t {
		t[i] = 255
	}
	for i := range byte(16) {
		t[hexDigits[i]] = i
	}
	return t
}()

// Incarnation tells one life of what holds a counter from the next. A
// cumulative meter starts at zero with each incarnation and only then.
type Incarnation uint64

// IncarnationOf hashes what identifies the holder: a process is (boot id,
// start time), a NIC (interface index, its creation), a disk (process, device
// attached). It is the first 8 bytes of the SHA-256 of the parts, each
// preceded by its length.
func IncarnationOf(parts ...string) Incarnation {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return Incarnation(binary.BigEndian.Uint64(h.Sum(nil)))
}

// String returns the incarnation as 16 hexadecimal digits.
func (i Incarnation) String() string { return fmt.Sprintf("%016x", uint64(i)) }
