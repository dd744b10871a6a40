package pipeline

import (
	"encoding/binary"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// assembler makes batches of the samples that came out of a chain.
type assembler struct {
	from    *sample.Batch
	rows    []sample.Row
	rowOf   []int // by row of from: the new number, -1 while it has none
	others  map[rowKey]int
	columns map[columnKey]int
	lastKey columnKey
	last    int // column of lastKey
	cells   [][]cell
	keys    []columnKey
	n       int
	parts   []*sample.Batch
}

type columnKey struct {
	meter  sample.MeterRef
	origin sample.Origin
	tag    sample.Tag
}

type cell struct {
	row  int
	bits uint64
	id   sample.ID
}

// rowKey is what the samples of one row have in common.
type rowKey struct {
	resource, source, project, user string
	time                            int64
	incarnation                     sample.Incarnation
	metadata                        *byte
	foreign                         *sample.Foreign
}

// begin starts the batches that are made of what b gives.
func (a *assembler) begin(b *sample.Batch) {
	a.from, a.parts = b, nil
	a.rowOf = slices.Grow(a.rowOf[:0], len(b.Rows))[:len(b.Rows)]
	for i := range a.rowOf {
		a.rowOf[i] = -1
	}
	a.reset()
}

// reset empties what is being assembled.
func (a *assembler) reset() {
	a.rows, a.n, a.last, a.keys = nil, 0, -1, a.keys[:0]
	if a.others == nil {
		a.others, a.columns = map[rowKey]int{}, map[columnKey]int{}
	}
	clear(a.others)
	clear(a.columns)
}

// add takes a sample.
func (a *assembler) add(it *Item) {
	if a.n == sample.MaxSamples {
		a.cut()
	}
	c := a.column(columnKey{sample.MeterRef{Name: it.Name, Kind: it.Kind, Unit: it.Unit}, it.Origin, it.Volume.Tag})
	a.cells[c] = append(a.cells[c], cell{a.row(it), it.Volume.Bits, it.ID})
	a.n++
}

func (a *assembler) column(key columnKey) int {
	if a.last >= 0 && key == a.lastKey {
		return a.last
	}
	c, ok := a.columns[key]
	if !ok {
		c = len(a.keys)
		a.columns[key] = c
		a.keys = append(a.keys, key)
		if len(a.cells) <= c {
			a.cells = append(a.cells, nil)
		}
		a.cells[c] = a.cells[c][:0]
	}
	a.last, a.lastKey = c, key
	return c
}

func (a *assembler) row(it *Item) int {
	if it.row >= 0 {
		if a.rowOf[it.row] < 0 {
			a.rowOf[it.row] = a.newRow(it)
		}
		return a.rowOf[it.row]
	}
	key := rowKey{it.Resource, it.Source, it.Project, it.User, it.Time, it.Incarnation, nil, it.Foreign}
	if len(it.Metadata) > 0 {
		key.metadata = &it.Metadata[0]
	}
	row, ok := a.others[key]
	if !ok {
		row = a.newRow(it)
		a.others[key] = row
	}
	return row
}

func (a *assembler) newRow(it *Item) int {
	a.rows = append(a.rows, sample.Row{
		Resource: it.Resource, Offset: it.Time - a.from.Base, Incarnation: it.Incarnation, Source: it.Source,
		Project: it.Project, User: it.User, Metadata: it.Metadata, Foreign: it.Foreign,
	})
	return len(a.rows) - 1
}

// settle sorts a column by row. A row has one value a column, so that a second
// one gets a copy of the row.
func (a *assembler) settle(cells []cell) {
	ascending := true
	for i := 1; i < len(cells) && ascending; i++ {
		ascending = cells[i-1].row < cells[i].row
	}
	if ascending {
		return
	}
	slices.SortStableFunc(cells, byRow)
	again := false
	for i, last := 0, -1; i < len(cells); i++ {
		row := cells[i].row
		if row == last {
			a.rows = append(a.rows, a.rows[row])
			cells[i].row, again = len(a.rows)-1, true
		}
		last = row
	}
	if again {
		slices.SortStableFunc(cells, byRow)
	}
}

// cut makes a batch of what was taken since the last one.
func (a *assembler) cut() {
	for i := range a.keys {
		a.settle(a.cells[i])
	}
	b := &sample.Batch{Base: a.from.Base, Rows: a.rows, IDs: make([]string, 0, a.n)}
	size := (len(a.rows) + 7) / 8
	bitmaps, values := make([]byte, size*len(a.keys)), make([]uint64, 0, a.n)
	meters := map[sample.MeterRef]int{}
	var text strings.Builder
	ends := make([]int, 0, a.n)
	var id [64]byte
	for i, key := range a.keys {
		cells := a.cells[i]
		meter, ok := meters[key.meter]
		if !ok {
			meter = len(b.Meters)
			meters[key.meter] = meter
			b.Meters = append(b.Meters, key.meter)
		}
		bitmap := bitmaps[i*size : (i+1)*size : (i+1)*size]
		begin := len(values)
		for _, c := range cells {
			bitmap[c.row/8] |= 1 << (c.row % 8)
			values = append(values, c.bits)
			text.Write(c.id.Append(id[:0]))
			ends = append(ends, text.Len())
		}
		b.Columns = append(b.Columns, sample.Column{
			Meter: meter, Origin: key.origin, Tag: key.tag, Bitmap: bitmap, Values: values[begin:len(values):len(values)],
		})
	}
	all, begin := text.String(), 0
	for _, end := range ends {
		b.IDs = append(b.IDs, all[begin:end])
		begin = end
	}
	a.parts = append(a.parts, b)
	for i := range a.rowOf {
		a.rowOf[i] = -1
	}
	a.reset()
}

func byRow(a, b cell) int { return a.row - b.row }

// batches returns what was taken as batches whose ids follow from that of the
// batch they were made of, and with its gaps.
func (a *assembler) batches(sink, node string) []*sample.Batch {
	if a.n > 0 || len(a.parts) == 0 && len(a.from.Gaps) > 0 {
		a.cut()
	}
	for i, b := range a.parts {
		b.ID, b.Node = sample.DeriveBatchID(a.from.ID, "sink:"+sink+":"+strconv.Itoa(i)), node
		b.Relay(a.from)
	}
	if len(a.parts) > 0 {
		a.parts[0].Gaps = gapsOf(a.from)
	}
	return a.parts
}

// Batches returns samples that came together as batches of a node. Those
// without an id get one.
func Batches(samples []sample.Sample, node string, now time.Time) []*sample.Batch {
	from := &sample.Batch{ID: sample.NewBatchID(now)}
	if len(samples) > 0 {
		from.Base = samples[0].Time
	}
	var a assembler
	a.begin(from)
	for i := range samples {
		it := Item{Sample: samples[i], row: -1}
		if it.ID == (sample.ID{}) {
			it.ID = sample.DeriveID(from.ID.Sample(0), binary.BigEndian.AppendUint64(nil, uint64(i)))
		}
		a.add(&it)
	}
	return a.batches("", node)
}
