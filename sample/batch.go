package sample

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"slices"
)

// MaxSamples is how many samples fit in a batch: the index of a sample is the
// low 16 bits of its id. Larger batches are split by who makes them.
const MaxSamples = 1 << 16

// Batch is what one node measured at one time, by columns: one row a resource
// (and time), one column a meter and origin. [Encoder] and [Decoder] turn it
// into batch v1 and back; docs/architecture.md has the layout.
type Batch struct {
	ID      BatchID
	Node    string // host that sent it; also the id of the key that signs it
	Epoch   uint64 // random, made with the state of the node's spool
	Seq     uint64 // counts the node's batches within an epoch, from 1
	Base    int64  // µs since the Unix epoch, UTC
	Meters  []MeterRef
	Rows    []Row
	Columns []Column
	IDs     []string // ids by sample index; nil: derived from ID
	Gaps    []Gap

	Of    string // host that measured it, where another sent it; empty: Node
	Since int64  // that host is metered since then, with or without domains; µs since the Unix epoch, 0: not told
}

// Host returns the host that measured the batch.
func (b *Batch) Host() string { return cmp.Or(b.Of, b.Node) }

// Relay says of b, which its node makes of another batch, who measured that.
func (b *Batch) Relay(from *Batch) {
	if host := from.Host(); host != b.Node {
		b.Of = host
	}
	b.Since = from.Since
}

// MeterRef is a meter as a batch names it.
type MeterRef struct {
	Name string
	Kind Kind
	Unit string
}

// Row is a resource at a time.
type Row struct {
	Resource    string
	Offset      int64 // µs after the batch's base time
	Incarnation Incarnation
	Source      string
	Project     string
	User        string
	Metadata    []byte   // a JSON object, verbatim; empty: none
	Foreign     *Foreign // nil: the samples are kvmeter's own
}

// Column holds the volumes of one meter by one origin.
type Column struct {
	Meter  int // index into Batch.Meters
	Origin Origin
	Tag    Tag
	Bitmap []byte   // one bit a row, least significant first: which rows have a value
	Values []uint64 // [Volume.Bits] of those rows, in order
}

// Len returns the number of samples.
func (b *Batch) Len() int {
	n := 0
	for i := range b.Columns {
		n += len(b.Columns[i].Values)
	}
	return n
}

// SampleID returns the id of the sample with the given index.
func (b *Batch) SampleID(index int) ID {
	if b.IDs != nil {
		return ParseID(b.IDs[index])
	}
	return b.ID.Sample(index)
}

// sample returns the sample with the given index: bits v of column c at row r.
func (b *Batch) sample(c *Column, r, index int, v uint64) Sample {
	m, row := &b.Meters[c.Meter], &b.Rows[r]
	return Sample{
		ID: b.SampleID(index), Name: m.Name, Kind: m.Kind, Unit: m.Unit,
		Volume: Volume{v, c.Tag}, Resource: row.Resource, Source: row.Source,
		Project: row.Project, User: row.User, Time: b.Base + row.Offset,
		Origin: c.Origin, Incarnation: row.Incarnation, Metadata: row.Metadata,
		Foreign: row.Foreign,
	}
}

// Samples yields the samples in the order of their indexes: by column, then
// by row.
func (b *Batch) Samples() iter.Seq[Sample] {
	return func(yield func(Sample) bool) {
		index := 0
		for i := range b.Columns {
			c := &b.Columns[i]
			for n, r := range c.rows() {
				if !yield(b.sample(c, r, index, c.Values[n])) {
					return
				}
				index++
			}
		}
	}
}

// Visit calls each with the samples of the meters that keep says, by their
// number, in the order of their indexes, and with the row that each is of. The
// sample is good until the next call.
func (b *Batch) Visit(keep []bool, each func(row int, s *Sample)) {
	var s Sample
	index := 0
	for i := range b.Columns {
		c := &b.Columns[i]
		if !keep[c.Meter] {
			index += len(c.Values)
			continue
		}
		for n, r := range c.rows() {
			s = b.sample(c, r, index, c.Values[n])
			each(r, &s)
			index++
		}
	}
}

// VisitColumn calls each with the rows and volumes of a column, in the order of
// their indexes.
func (b *Batch) VisitColumn(column int, each func(row int, bits uint64)) {
	c := &b.Columns[column]
	for n, r := range c.rows() {
		each(r, c.Values[n])
	}
}

// rows yields the position and the row of each of the column's values.
func (c *Column) rows() iter.Seq2[int, int] {
	return func(yield func(int, int) bool) {
		n := 0
		for i, w := range c.Bitmap {
			for ; w != 0; w &= w - 1 {
				if !yield(n, i*8+bits.TrailingZeros8(w)) {
					return
				}
				n++
			}
		}
	}
}

// Check returns an error unless the batch is one that [Decoder] would return:
// no list longer than [MaxSamples], every index in range, every bitmap as long as
// the rows and with as many bits as the column has values, no number that is not
// finite.
func (b *Batch) Check() error {
	if n := max(len(b.Meters), len(b.Rows), len(b.Columns), len(b.Gaps)); n > MaxSamples {
		return fmt.Errorf("a list of %d elements, at most %d fit", n, MaxSamples)
	}
	size := (len(b.Rows) + 7) / 8
	for i := range b.Columns {
		c := &b.Columns[i]
		if c.Meter < 0 || c.Meter >= len(b.Meters) {
			return fmt.Errorf("column %d: meter %d of %d", i, c.Meter, len(b.Meters))
		}
		if len(c.Bitmap) != size {
			return fmt.Errorf("column %d: bitmap of %d bytes for %d rows", i, len(c.Bitmap), len(b.Rows))
		}
		if odd := len(b.Rows) % 8; odd != 0 && c.Bitmap[size-1]>>odd != 0 {
			return fmt.Errorf("column %d: bitmap has bits after the last row", i)
		}
		ones := 0
		for _, w := range c.Bitmap {
			ones += bits.OnesCount8(w)
		}
		if ones != len(c.Values) {
			return fmt.Errorf("column %d: %d values for %d bits", i, len(c.Values), ones)
		}
		for _, v := range c.Values {
			if err := (Volume{v, c.Tag}).Check(); err != nil {
				return fmt.Errorf("column %d (%s): %w", i, b.Meters[c.Meter].Name, err)
			}
		}
	}
	n := b.Len()
	if n > MaxSamples {
		return fmt.Errorf("%d samples in a batch, at most %d fit", n, MaxSamples)
	}
	if b.IDs != nil && len(b.IDs) != n {
		return fmt.Errorf("%d ids for %d samples", len(b.IDs), n)
	}
	if slices.Contains(b.IDs, "") {
		return errors.New("a sample's id is empty")
	}
	return nil
}

// Builder fills a batch row by row and reuses its memory from one batch to the
// next. It is not safe for concurrent use.
type Builder struct {
	batch   Batch
	meters  map[MeterRef]int
	columns map[columnKey]int
	cells   [][]cell // by column
	samples int
}

type columnKey struct {
	meter  int
	origin Origin
	tag    Tag
}

type cell struct {
	row  int
	bits uint64
}

// NewBuilder returns an empty builder.
func NewBuilder() *Builder {
	return &Builder{meters: map[MeterRef]int{}, columns: map[columnKey]int{}}
}

// Len returns the number of samples added since the last Build.
func (b *Builder) Len() int { return b.samples }

// Row adds a row and returns its number. All samples of a row must be added
// before the next row.
func (b *Builder) Row(r Row) int {
	b.batch.Rows = append(b.batch.Rows, r)
	return len(b.batch.Rows) - 1
}

// Add adds a volume to the newest row. A second volume of the same meter,
// origin and tag in one row replaces the first.
func (b *Builder) Add(m MeterRef, origin Origin, v Volume) {
	meter, ok := b.meters[m]
	if !ok {
		meter = len(b.batch.Meters)
		b.meters[m] = meter
		b.batch.Meters = append(b.batch.Meters, m)
	}
	key := columnKey{meter, origin, v.Tag}
	i, ok := b.columns[key]
	if !ok {
		i = len(b.batch.Columns)
		b.columns[key] = i
		b.batch.Columns = append(b.batch.Columns, Column{Meter: meter, Origin: origin, Tag: v.Tag})
		if len(b.cells) <= i {
			b.cells = append(b.cells, nil)
		}
		b.cells[i] = b.cells[i][:0]
	}
	row := len(b.batch.Rows) - 1
	if n := len(b.cells[i]); n > 0 && b.cells[i][n-1].row == row {
		b.cells[i][n-1].bits = v.Bits
		return
	}
	b.cells[i] = append(b.cells[i], cell{row, v.Bits})
	b.samples++
}

// Gap adds a gap.
func (b *Builder) Gap(g Gap) { b.batch.Gaps = append(b.batch.Gaps, g) }

// Build returns the batch, which is good until the next Reset. The caller sets
// its id, node, epoch, seq and base time.
func (b *Builder) Build() *Batch {
	size := (len(b.batch.Rows) + 7) / 8
	bitmaps, values := make([]byte, size*len(b.batch.Columns)), make([]uint64, b.samples)
	for i := range b.batch.Columns {
		c, n := &b.batch.Columns[i], len(b.cells[i])
		c.Bitmap, bitmaps = bitmaps[:size:size], bitmaps[size:]
		c.Values, values = values[:n:n], values[n:]
		for n, cell := range b.cells[i] {
			c.Bitmap[cell.row/8] |= 1 << (cell.row % 8)
			c.Values[n] = cell.bits
		}
	}
	return &b.batch
}

// Reset empties the builder.
func (b *Builder) Reset() {
	clear(b.meters)
	clear(b.columns)
	b.batch = Batch{Meters: b.batch.Meters[:0], Rows: b.batch.Rows[:0], Columns: b.batch.Columns[:0], Gaps: b.batch.Gaps[:0]}
	b.samples = 0
}
