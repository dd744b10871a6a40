package local

import (
	"encoding/binary"
	"math"

	"github.com/kvmeter/kvmeter/sample"
)

// The keys. Numbers are big endian with the sign bit flipped where there is
// one, so that they sort; days are counted from the Unix epoch.
//
//	m                                     state of the store
//	w seq                                 batch as received, until it is flushed
//	s epoch node-name                     sequence numbers stored of a node's epoch
//	b batch-id                            where the batch is, or only that it is stored
//	c day meter resource last-time part   chunk: the volumes of a series
//	t day resource part                   times, batches, holders, metadata of the chunks' rows
//	n day node seq                        batch: id, time recorded, resources
//	x day id-hash seq index               sample with a foreign id
//	r resource                            newest and oldest samples
//
// seq numbers the batches in the order they were stored. A part is made by one
// flush; last-time is within the day.
const (
	keyState     = 'm'
	keyWAL       = 'w'
	keySeqs      = 's'
	keyBatchID   = 'b'
	keyChunk     = 'c'
	keyRows      = 't'
	keyBatch     = 'n'
	keyForeign   = 'x'
	keyResource  = 'r'
	chunkKeyLen  = 1 + 4 + 4 + 4 + 5 + 6
	dayLength    = int64(24 * 60 * 60 * 1e6)
	seriesPrefix = 1 + 4 + 4 + 4
)

// day is a number of days since the Unix epoch.
type day int32

func dayOf(t int64) day {
	d := t / dayLength
	if t%dayLength < 0 {
		d--
	}
	return day(d)
}

// start returns the first µs of the day; days before the first whole one that
// an int64 can name begin with the smallest.
func (d day) start() int64 {
	if int64(d) < math.MinInt64/dayLength {
		return math.MinInt64
	}
	return int64(d) * dayLength
}

func (d day) end() int64 {
	if int64(d) >= math.MaxInt64/dayLength {
		return math.MaxInt64
	}
	return (int64(d)+1)*dayLength - 1
}

func appendDay(dst []byte, d day) []byte {
	return binary.BigEndian.AppendUint32(dst, uint32(d)^1<<31)
}

func readDay(b []byte) day { return day(binary.BigEndian.Uint32(b) ^ 1<<31) }

// part numbers what one flush writes of a resource and day: the flush's
// generation, then 16 bits for flushes that write more than fits one part.
type part uint64

func appendPart(dst []byte, p part) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(p>>32))
	return binary.BigEndian.AppendUint32(dst, uint32(p))
}

func readPart(b []byte) part {
	return part(binary.BigEndian.Uint16(b))<<32 | part(binary.BigEndian.Uint32(b[2:]))
}

func stateKey() []byte { return []byte{keyState} }

func walKey(seq uint64) []byte { return binary.BigEndian.AppendUint64([]byte{keyWAL}, seq) }

func seqsKey(node string, epoch uint64) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{keySeqs}, epoch), node...)
}

func batchIDKey(id sample.BatchID) []byte { return append([]byte{keyBatchID}, id[:]...) }

// seriesKey is the prefix of a series' chunks of a day.
func seriesKey(dst []byte, d day, meter, resource uint32) []byte {
	dst = appendDay(append(dst, keyChunk), d)
	dst = binary.BigEndian.AppendUint32(dst, meter)
	return binary.BigEndian.AppendUint32(dst, resource)
}

// chunkKey appends the key of a chunk whose newest sample is from last.
func chunkKey(dst []byte, d day, meter, resource uint32, last int64, p part) []byte {
	dst = appendLast(seriesKey(dst, d, meter, resource), d, last)
	return appendPart(dst, p)
}

// appendLast appends a time within the day in 5 bytes.
func appendLast(dst []byte, d day, last int64) []byte {
	v := uint64(last) - uint64(int64(d)*dayLength)
	dst = append(dst, byte(v>>32))
	return binary.BigEndian.AppendUint32(dst, uint32(v))
}

// readChunkKey takes a chunk's key apart; ok is false for what is none.
func readChunkKey(k []byte) (d day, meter, resource uint32, last int64, p part, ok bool) {
	if len(k) != chunkKeyLen || k[0] != keyChunk {
		return 0, 0, 0, 0, 0, false
	}
	d = readDay(k[1:])
	v := uint64(k[13])<<32 | uint64(binary.BigEndian.Uint32(k[14:]))
	last = int64(uint64(int64(d)*dayLength) + v)
	return d, binary.BigEndian.Uint32(k[5:]), binary.BigEndian.Uint32(k[9:]), last, readPart(k[18:]), true
}

func rowsKey(dst []byte, d day, resource uint32, p part) []byte {
	dst = binary.BigEndian.AppendUint32(appendDay(append(dst, keyRows), d), resource)
	return appendPart(dst, p)
}

func batchKey(dst []byte, d day, node uint32, seq uint64) []byte {
	dst = binary.BigEndian.AppendUint32(appendDay(append(dst, keyBatch), d), node)
	return binary.BigEndian.AppendUint64(dst, seq)
}

// foreignKey is the key of a sample with a foreign id, or with seq 0 and index
// 0 the first of those with that hash.
func foreignKey(dst []byte, d day, hash, seq uint64, index uint32) []byte {
	dst = binary.BigEndian.AppendUint64(appendDay(append(dst, keyForeign), d), hash)
	dst = binary.BigEndian.AppendUint64(dst, seq)
	return binary.BigEndian.AppendUint32(dst, index)
}

func resourceKey(dst []byte, resource uint32) []byte {
	return binary.BigEndian.AppendUint32(append(dst, keyResource), resource)
}
