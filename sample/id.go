package sample

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
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

// ID names one sample for ever: a UUID, or for foreign samples whatever text
// they came with.
type ID struct {
	UUID [16]byte // used where Text is empty
	Text string
}

// ParseID reads an id. A lower-case UUID becomes its 16 bytes; any other text
// is kept as it is, so that an id prints as it was read.
func ParseID(s string) ID {
	if u, err := parseUUID(s); err == nil && formatUUID(u) == s {
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

// String returns the id's text.
func (id ID) String() string {
	if id.Text != "" {
		return id.Text
	}
	return formatUUID(id.UUID)
}

func formatUUID(u [16]byte) string {
	var b [36]byte
	hex.Encode(b[:8], u[:4])
	hex.Encode(b[9:13], u[4:6])
	hex.Encode(b[14:18], u[6:8])
	hex.Encode(b[19:23], u[8:10])
	hex.Encode(b[24:], u[10:])
	b[8], b[13], b[18], b[23] = '-', '-', '-', '-'
	return string(b[:])
}

var errNotUUID = errors.New("not a UUID")

func parseUUID(s string) (u [16]byte, err error) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, errNotUUID
	}
	_, err = hex.Decode(u[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:]))
	return u, err
}

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
