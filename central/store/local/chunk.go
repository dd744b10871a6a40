package local

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/kvmeter/kvmeter/sample"
)

// Records of the store begin with the version of their format.
const recordVersion = 1

// What one part holds at most. It bounds what a reader decodes at once, and
// what a corrupt length can make it allocate.
const (
	maxRows   = 4096
	maxPoints = 1 << 20
)

// version takes the version byte of a record.
func (r *reader) version() {
	if v := r.byte(); r.err == nil && v != recordVersion {
		r.fail()
		r.err = fmt.Errorf("%w: format %d is unknown", errCorrupt, v)
	}
}

// length takes a count.
func (r *reader) length(most uint64) int {
	n := r.uvarint()
	if n > most {
		r.fail()
		return 0
	}
	return int(n)
}

// rows are what the chunks of a resource share: its rows of one part, by time
// and then in the order they were stored.
type rows struct {
	times, seqs, nodes, holders, metas []uint64

	// Of a part that is not merged yet: its chunks, which have no records of
	// their own. Decoded, they are good as long as the record.
	chunks []byte
	count  uint64
}

func (t *rows) reset() {
	t.times, t.seqs, t.nodes, t.holders, t.metas = t.times[:0], t.seqs[:0], t.nodes[:0], t.holders[:0], t.metas[:0]
	t.chunks, t.count = nil, 0
}

// partVersion begins the record of rows that their chunks follow.
const partVersion = recordVersion + 1

func (t *rows) append(dst []byte) []byte {
	version := byte(recordVersion)
	if t.count > 0 {
		version = partVersion
	}
	dst = binary.AppendUvarint(append(dst, version), uint64(len(t.times)))
	for _, v := range [...][]uint64{t.times, t.seqs, t.nodes, t.holders, t.metas} {
		dst = appendVector(dst, v)
	}
	if t.count > 0 {
		dst = append(binary.AppendUvarint(dst, t.count), t.chunks...)
	}
	return dst
}

// addChunk adds a chunk of the part. Its newest sample is from last.
func (t *rows) addChunk(h hour, meter uint32, last int64, value []byte) {
	t.chunks = binary.AppendUvarint(t.chunks, uint64(meter))
	t.chunks = binary.AppendUvarint(t.chunks, uint64(last)-uint64(int64(h)*hourLength))
	t.chunks = append(binary.AppendUvarint(t.chunks, uint64(len(value))), value...)
	t.count++
}

// eachChunk calls each with the chunks that follow the rows.
func (t *rows) eachChunk(h hour, each func(meter uint32, last int64, value []byte) error) error {
	r := reader{src: t.chunks}
	for range t.count {
		meter := r.number()
		last := int64(uint64(int64(h)*hourLength) + uint64(r.number()))
		value := r.bytes(r.uvarint())
		if r.err != nil {
			break
		}
		if err := each(meter, last, value); err != nil {
			return err
		}
	}
	return r.done("chunks of a part")
}

func (t *rows) decode(src []byte) error {
	t.reset()
	r := reader{src: src}
	part := len(src) > 0 && src[0] == partVersion
	if part {
		r.byte()
	} else {
		r.version()
	}
	n := r.length(maxRows)
	t.times = r.vector(t.times, n)
	t.seqs = r.vector(t.seqs, n)
	t.nodes = r.vector(t.nodes, n)
	t.holders = r.vector(t.holders, n)
	t.metas = r.vector(t.metas, n)
	if part {
		t.count = r.uvarint()
		t.chunks, r.src = r.src, nil
		if t.count == 0 {
			r.fail()
		}
	}
	return r.done("rows")
}

// done returns the reader's error, or one for bytes that are left.
func (r *reader) done(what string) error {
	if r.err == nil && len(r.src) > 0 {
		r.fail()
	}
	if r.err != nil {
		return fmt.Errorf("decode %s: %w", what, r.err)
	}
	return nil
}

// chunk holds the volumes of one meter of a resource in one part.
type chunk struct {
	length  int64    // µs from the oldest to the newest
	rows    []uint64 // positions in the part's rows
	indexes []uint64 // in their batches
	origins []uint64 // numbers of the catalogue
	tags    []byte
	bits    []uint64
	ids     []sample.ID // foreign ids, zero for derived ones; nil: all derived
}

func (c *chunk) reset() {
	c.rows, c.indexes, c.origins, c.tags, c.bits, c.ids = c.rows[:0], c.indexes[:0], c.origins[:0], c.tags[:0], c.bits[:0], nil
}

// Flags of a chunk.
const (
	chunkAllRows = 1 << iota // every row has one value
	chunkIDs                 // has foreign ids
	chunkMixed               // volumes of several tags; else the tag follows
	chunkTag                 // two bits
)

// How float64 volumes are stored: as their bits, or as integers that are to be
// divided by a power of ten.
const floatBits = 255

// append appends the chunk, which belongs to n rows.
func (c *chunk) append(dst []byte, n int) []byte {
	flags := byte(chunkAllRows)
	if len(c.rows) != n {
		flags = 0
	}
	for i, row := range c.rows {
		if row != uint64(i) {
			flags = 0
			break
		}
	}
	if c.ids != nil {
		flags |= chunkIDs
	}
	for _, tag := range c.tags {
		if tag != c.tags[0] {
			flags |= chunkMixed
			break
		}
	}
	if flags&chunkMixed == 0 {
		flags |= c.tags[0] * chunkTag
	}
	dst = append(dst, recordVersion, flags)
	dst = binary.AppendUvarint(dst, uint64(c.length))
	dst = binary.AppendUvarint(dst, uint64(len(c.rows)))
	if flags&chunkAllRows == 0 {
		dst = appendVector(dst, c.rows)
	}
	dst = appendVector(dst, c.indexes)
	dst = appendVector(dst, c.origins)
	switch {
	case flags&chunkMixed != 0:
		dst = appendVector(append(dst, c.tags...), c.bits)
	case sample.Tag(c.tags[0]) == sample.F64:
		dst = appendFloats(dst, c.bits)
	default:
		dst = appendVector(dst, c.bits)
	}
	for _, id := range c.ids {
		dst = appendID(dst, id)
	}
	return dst
}

// header returns the length of the chunk without decoding the rest.
func chunkLength(src []byte) (int64, error) {
	r := reader{src: src}
	r.version()
	r.byte()
	length := r.uvarint()
	if r.err != nil {
		return 0, fmt.Errorf("decode chunk: %w", r.err)
	}
	return int64(length), nil
}

// decode reads a chunk that belongs to n rows.
func (c *chunk) decode(src []byte, n int) error {
	c.reset()
	r := reader{src: src}
	r.version()
	flags := r.byte()
	c.length = int64(r.uvarint())
	points := r.length(maxPoints)
	if flags&chunkAllRows != 0 {
		if points != n {
			r.fail()
		}
		for i := range points {
			c.rows = append(c.rows, uint64(i))
		}
	} else {
		c.rows = r.vector(c.rows, points)
	}
	c.indexes = r.vector(c.indexes, points)
	c.origins = r.vector(c.origins, points)
	tag := flags / chunkTag & 3
	switch {
	case flags&chunkMixed != 0:
		c.tags = append(c.tags, r.bytes(uint64(points))...)
		c.bits = r.vector(c.bits, points)
	default:
		for range points {
			c.tags = append(c.tags, tag)
		}
		if sample.Tag(tag) == sample.F64 {
			c.bits = r.floats(c.bits, points)
		} else {
			c.bits = r.vector(c.bits, points)
		}
	}
	if flags&chunkIDs != 0 {
		for i := 0; i < points && r.err == nil; i++ {
			c.ids = append(c.ids, r.id())
		}
	}
	for i := range c.rows {
		if c.rows[i] >= uint64(n) || i < len(c.tags) && c.tags[i] > byte(sample.F64) {
			r.fail()
			break
		}
	}
	return r.done("chunk")
}

// appendFloats appends float64 bits, as scaled integers where that gives back
// every bit.
func appendFloats(dst []byte, v []uint64) []byte {
	var buf [512]uint64
	ints := buf[:0]
	scale := 0
	for i := 0; i < len(v); i++ {
		n, ok := scaled(v[i], scale)
		if ok {
			ints = append(ints, n)
			continue
		}
		if scale++; scale == len(powers) {
			return appendVector(append(dst, floatBits), v)
		}
		i, ints = -1, ints[:0]
	}
	return appendVector(append(dst, byte(scale)), ints)
}

var powers = [...]float64{1, 10, 100, 1000, 10000}

// scaled returns the integer that gives the float when divided by the power of
// ten, if there is one. Negative zero has none.
func scaled(v uint64, scale int) (uint64, bool) {
	n := math.Round(math.Float64frombits(v) * powers[scale])
	if math.Abs(n) >= 1<<53 || math.Float64bits(unscaled(int64(n), scale)) != v {
		return 0, false
	}
	return uint64(int64(n)), true
}

func unscaled(n int64, scale int) float64 { return float64(n) / powers[scale] }

func (r *reader) floats(out []uint64, n int) []uint64 {
	scale := r.byte()
	start := len(out)
	out = r.vector(out, n)
	if scale == floatBits {
		return out
	}
	if int(scale) >= len(powers) {
		r.fail()
		return out
	}
	for i := start; i < len(out); i++ {
		out[i] = math.Float64bits(unscaled(int64(out[i]), int(scale)))
	}
	return out
}

// Kinds of ids in a chunk.
const (
	idDerived = iota
	idUUID
	idText
)

func appendID(dst []byte, id sample.ID) []byte {
	switch {
	case id.Text != "":
		dst = binary.AppendUvarint(append(dst, idText), uint64(len(id.Text)))
		return append(dst, id.Text...)
	case id.UUID != [16]byte{}:
		return append(append(dst, idUUID), id.UUID[:]...)
	}
	return append(dst, idDerived)
}

func (r *reader) id() (id sample.ID) {
	switch r.byte() {
	case idDerived:
	case idUUID:
		copy(id.UUID[:], r.bytes(16))
	case idText:
		id.Text = string(r.bytes(r.uvarint()))
	default:
		r.fail()
	}
	return id
}

// batchInfo is what is kept of a batch beside its samples.
type batchInfo struct {
	id        sample.BatchID
	recorded  int64
	from, to  int64    // times of its oldest and newest sample of the day
	resources []uint32 // ascending
}

func (b *batchInfo) append(dst []byte) []byte {
	dst = append(append(dst, recordVersion), b.id[:]...)
	dst = binary.AppendVarint(dst, b.recorded)
	dst = binary.AppendVarint(dst, b.from)
	dst = binary.AppendUvarint(dst, uint64(b.to-b.from))
	return appendNumbers(dst, b.resources)
}

// appendNumbers appends ascending numbers.
func appendNumbers(dst []byte, list []uint32) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(list)))
	last := uint32(0)
	for _, no := range list {
		dst = binary.AppendUvarint(dst, uint64(no-last))
		last = no
	}
	return dst
}

func (r *reader) numbers(out []uint32) []uint32 {
	last := uint32(0)
	for n := r.length(uint64(len(r.src))); n > 0 && r.err == nil; n-- {
		last += r.number()
		out = append(out, last)
	}
	return out
}

// decodeHead reads the first fields.
func (b *batchInfo) decodeHead(r *reader) {
	r.version()
	copy(b.id[:], r.bytes(16))
	b.recorded = r.varint()
}

func (b *batchInfo) decode(src []byte) error {
	r := reader{src: src}
	b.decodeHead(&r)
	b.from = r.varint()
	b.to = b.from + int64(r.uvarint())
	b.resources = r.numbers(b.resources[:0])
	return r.done("batch")
}

// place says where a batch is found: the key of its [batchInfo] for each day.
// A batch with foreign ids has an empty place, which says that it is stored.
type place struct {
	seq  uint64
	node uint32
	days []day
}

func (p *place) append(dst []byte) []byte {
	dst = binary.AppendUvarint(append(dst, recordVersion), p.seq)
	dst = binary.AppendUvarint(dst, uint64(p.node))
	dst = binary.AppendUvarint(dst, uint64(len(p.days)))
	for _, d := range p.days {
		dst = binary.AppendVarint(dst, int64(d))
	}
	return dst
}

func (p *place) decode(src []byte) error {
	r := reader{src: src}
	r.version()
	p.seq = r.uvarint()
	p.node = r.number()
	p.days = p.days[:0]
	for n := r.length(uint64(len(r.src))); n > 0 && r.err == nil; n-- {
		d := r.varint()
		if d != int64(day(d)) {
			r.fail()
		}
		p.days = append(p.days, day(d))
	}
	return r.done("place of a batch")
}
