package local

import (
	"encoding/binary"
	"math"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// The keys. Numbers are big endian with the sign bit flipped where there is
// one, so that they sort; days are counted from the Unix epoch.
//
//	m                                     state of the store
//	w seq                                 batch as received, until it is flushed
//	s epoch node-name                     sequence numbers stored of a node's epoch
//	b batch-id                            where the batch is, or only that it is stored
//	c hour meter resource last-time part  chunk: the volumes of a series, merged
//	t hour resource part                  times, batches, holders, metadata of the chunks' rows; until it is merged the chunks too
//	g hour generation                     resources of which that flush wrote, until the hour is rolled up
//	R day meter resource hour             rollups of a series' hour
//	D days meter resource day             rollup of a series' day; days is the first of 32
//	G day hour                            resources of which that hour was rolled up, until the day is
//	H day                                 the day was rolled up
//	n day node seq                        batch: id, time recorded, resources
//	x day id-hash seq index               sample with a foreign id
//	r resource                            newest and oldest samples
//	f node                                time of its first sample ever
//	u metadata                            day of the newest sample that had it
//	v kind duration                       day up to which series with that time to live are swept
//	E                                     number of the next event
//	e time number                         event
//	i hash-of-id                          time and number of an event
//	y day hash time number                event with a type, or with a trait of a value
//	d event-type trait-type trait-name    day of the newest event with that trait; without a trait: of the type
//
// seq numbers the batches in the order they were stored. A part is made by one
// flush or by rolling up an hour; last-time is within the hour, which is counted
// from the Unix epoch as days are.
const (
	keyState     = 'm'
	keyWAL       = 'w'
	keySeqs      = 's'
	keyBatchID   = 'b'
	keyChunk     = 'c'
	keyRows      = 't'
	keyPending   = 'g'
	keyRollup    = 'R'
	keyDay       = 'D'
	keyDayDue    = 'G'
	keyDayRolled = 'H'
	keyBatch     = 'n'
	keyForeign   = 'x'
	keyResource  = 'r'
	keyMetered   = 'f'
	keyMetaUsed  = 'u'
	keySwept     = 'v'
	keyEventNo   = 'E'
	keyEvent     = 'e'
	keyEventID   = 'i'
	keyEventTerm = 'y'
	keyEventType = 'd'
	chunkKeyLen  = 1 + 5 + 4 + 4 + 4 + 6
	hourLength   = int64(60 * 60 * 1e6)
	dayLength    = 24 * hourLength
)

// hour is a number of hours since the Unix epoch: what chunks are kept by.
type hour int64

func hourOf(t int64) hour {
	h := t / hourLength
	if t%hourLength < 0 {
		h--
	}
	return hour(h)
}

// start returns the first µs of the hour, as [day.start] does of a day.
func (h hour) start() int64 {
	if int64(h) < math.MinInt64/hourLength {
		return math.MinInt64
	}
	return int64(h) * hourLength
}

func (h hour) end() int64 {
	if int64(h) >= math.MaxInt64/hourLength {
		return math.MaxInt64
	}
	return (int64(h)+1)*hourLength - 1
}

// hourBias makes hours sort in 40 bits.
const hourBias = 1 << 39

func appendHour(dst []byte, h hour) []byte {
	v := uint64(h + hourBias)
	return binary.BigEndian.AppendUint32(append(dst, byte(v>>32)), uint32(v))
}

func readHour(b []byte) hour {
	return hour(uint64(b[0])<<32|uint64(binary.BigEndian.Uint32(b[1:]))) - hourBias
}

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

// seriesKey is the prefix of a series' chunks of an hour.
func seriesKey(dst []byte, h hour, meter, resource uint32) []byte {
	dst = appendHour(append(dst, keyChunk), h)
	dst = binary.BigEndian.AppendUint32(dst, meter)
	return binary.BigEndian.AppendUint32(dst, resource)
}

// chunkKey appends the key of a chunk whose newest sample is from last.
func chunkKey(dst []byte, h hour, meter, resource uint32, last int64, p part) []byte {
	dst = appendLast(seriesKey(dst, h, meter, resource), h, last)
	return appendPart(dst, p)
}

// appendLast appends a time within the hour in 4 bytes.
func appendLast(dst []byte, h hour, last int64) []byte {
	return binary.BigEndian.AppendUint32(dst, uint32(uint64(last)-uint64(int64(h)*hourLength)))
}

// readChunkKey takes a chunk's key apart; ok is false for what is none.
func readChunkKey(k []byte) (h hour, meter, resource uint32, last int64, p part, ok bool) {
	if len(k) != chunkKeyLen || k[0] != keyChunk {
		return 0, 0, 0, 0, 0, false
	}
	h = readHour(k[1:])
	last = int64(uint64(int64(h)*hourLength) + uint64(binary.BigEndian.Uint32(k[14:])))
	return h, binary.BigEndian.Uint32(k[6:]), binary.BigEndian.Uint32(k[10:]), last, readPart(k[18:]), true
}

// rowsPrefix is the prefix of a resource's rows of an hour.
func rowsPrefix(dst []byte, h hour, resource uint32) []byte {
	return binary.BigEndian.AppendUint32(appendHour(append(dst, keyRows), h), resource)
}

func rowsKey(dst []byte, h hour, resource uint32, p part) []byte {
	return appendPart(rowsPrefix(dst, h, resource), p)
}

func pendingKey(h hour, generation uint32) []byte {
	return binary.BigEndian.AppendUint32(appendHour([]byte{keyPending}, h), generation)
}

// rollupKey is the key of a series' rollups of an hour; without the last byte
// it is the prefix of those of its day.
func rollupKey(dst []byte, h hour, meter, resource uint32) []byte {
	d := dayOf(h.start())
	dst = appendDay(append(dst, keyRollup), d)
	dst = binary.BigEndian.AppendUint32(dst, meter)
	dst = binary.BigEndian.AppendUint32(dst, resource)
	return append(dst, byte(h-hourOf(d.start())))
}

// daysOfBlock is how many days have their rollups side by side.
const daysOfBlock = 32

func dayKey(dst []byte, d day, meter, resource uint32) []byte {
	dst = appendDay(append(dst, keyDay), d&^(daysOfBlock-1))
	dst = binary.BigEndian.AppendUint32(dst, meter)
	dst = binary.BigEndian.AppendUint32(dst, resource)
	return append(dst, byte(d&(daysOfBlock-1)))
}

func dayDueKey(h hour) []byte {
	d := dayOf(h.start())
	return append(appendDay([]byte{keyDayDue}, d), byte(h-hourOf(d.start())))
}

func dayRolledKey(d day) []byte { return appendDay([]byte{keyDayRolled}, d) }

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

func metaUsedKey(meta uint32) []byte { return binary.BigEndian.AppendUint32([]byte{keyMetaUsed}, meta) }

func sweptKey(kind byte, ttl time.Duration) []byte {
	return binary.BigEndian.AppendUint64([]byte{keySwept, kind}, uint64(ttl))
}

func meteredKey(node uint32) []byte { return binary.BigEndian.AppendUint32([]byte{keyMetered}, node) }

func resourceKey(dst []byte, resource uint32) []byte {
	return binary.BigEndian.AppendUint32(append(dst, keyResource), resource)
}
