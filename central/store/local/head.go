package local

import (
	"bytes"
	"cmp"
	"context"
	"math/bits"
	"slices"

	"github.com/kvmeter/kvmeter/sample"
)

// head holds the batches that are not flushed yet, by rows. The committer
// adds to the active head under the store's lock; a frozen one never changes.
type head struct {
	batches []*headBatch // in the order they were stored
	rows    map[*resource][]rowRef
	byID    map[sample.BatchID]*headBatch // without foreign ids
	foreign map[sample.ID][]valueRef      // those with foreign ids
	gaps    []gap
	metered map[uint32]int64 // oldest samples of nodes that had no older ones
	used    map[uint32]day   // days of metadata that was not used later before
	bytes   int64
}

func newHead() *head {
	return &head{rows: map[*resource][]rowRef{}, byID: map[sample.BatchID]*headBatch{}, foreign: map[sample.ID][]valueRef{}, metered: map[uint32]int64{}, used: map[uint32]day{}}
}

// rowRef is a row of a resource.
type rowRef struct {
	*headBatch
	row int
}

func (r rowRef) info() *headRow { return &r.rows[r.row] }

// valueRef is a value of a row.
type valueRef struct {
	rowRef
	at int // position in the batch's values
}

func (r valueRef) column() *headColumn { return r.headBatch.column(int(r.indexes[r.at])) }

// headBatch is a batch turned into rows: the values of a row lie side by side,
// as queries and flushes want them. It never changes.
type headBatch struct {
	seq      uint64
	id       sample.BatchID
	node     uint32
	recorded int64
	since    int64 // the node is metered since then; 0: not told
	explicit bool
	ids      []string // by index, where explicit
	columns  []headColumn
	rows     []headRow
	values   []uint64
	indexes  []uint16 // of the values, ascending within a row
}

type headColumn struct {
	meter  *meter
	origin uint32
	tag    sample.Tag
	index  int // of its first value
}

type headRow struct {
	time   int64
	holder *holder
	meta   uint32
	start  uint32 // of its values; they end where the next row's begin
}

func (b *headBatch) bytes() int64 {
	n := 200 + 10*len(b.values) + (24+24)*len(b.rows) + 32*len(b.columns)
	for _, id := range b.ids {
		n += 16 + len(id) + 160 // where head.foreign has it
	}
	return int64(n)
}

// span returns where the values of a row are.
func (b *headBatch) span(row int) (from, to int) {
	from, to = int(b.rows[row].start), len(b.values)
	if row+1 < len(b.rows) {
		to = int(b.rows[row+1].start)
	}
	return from, to
}

// sampleID returns the id of a value.
func (b *headBatch) sampleID(index int) sample.ID {
	if b.explicit {
		return sample.ParseID(b.ids[index])
	}
	return b.id.Sample(index)
}

// prepare resolves the batch's names and turns it into rows. It adds what is
// new to the catalogue. Only the committer calls it.
func (s *Store) prepare(ctx context.Context, b *sample.Batch, seq uint64, recorded int64) (*headBatch, error) {
	hb := &headBatch{
		seq: seq, id: b.ID, recorded: recorded, since: b.Since, explicit: b.IDs != nil, ids: slices.Clone(b.IDs),
		columns: make([]headColumn, len(b.Columns)), rows: make([]headRow, len(b.Rows)),
	}
	s.resolve(b, hb)
	dropped, err := s.stored(ctx, b, hb)
	if err != nil {
		return nil, err
	}
	// Count the values of each row, then place them.
	counts, sums := s.counts[:0], s.sums[:0]
	for range b.Rows {
		counts, sums = append(counts, 0), append(sums, 0)
	}
	s.counts, s.sums = counts, sums
	index, kept := 0, 0
	for i := range b.Columns {
		c := &hb.columns[i]
		c.index = index
		for at, w := range b.Columns[i].Bitmap {
			for ; w != 0; w &= w - 1 {
				if dropped == nil || !dropped[index] {
					row := at*8 + bits.TrailingZeros8(w)
					counts[row]++
					sums[row] += c.meter.hash
					kept++
				}
				index++
			}
		}
	}
	start := uint32(0)
	for i := range hb.rows {
		hb.rows[i].start = start
		start += counts[i]
		counts[i] = hb.rows[i].start
	}
	hb.values, hb.indexes = make([]uint64, kept), make([]uint16, kept)
	index = 0
	for i := range b.Columns {
		n := 0
		values := b.Columns[i].Values
		for at, w := range b.Columns[i].Bitmap {
			for ; w != 0; w &= w - 1 {
				if dropped == nil || !dropped[index] {
					row := at*8 + bits.TrailingZeros8(w)
					hb.values[counts[row]], hb.indexes[counts[row]] = values[n], uint16(index)
					counts[row]++
				}
				index++
				n++
			}
		}
	}
	for i := range hb.rows {
		if from, to := hb.span(i); from < to {
			s.layout(hb, i, sums[i])
		}
	}
	return hb, nil
}

// resolve finds or makes the numbers of what the batch names.
func (s *Store) resolve(b *sample.Batch, hb *headBatch) {
	c := s.catalogue
	var ok bool
	if hb.node, ok = c.byNode[b.Host()]; !ok {
		s.mu.Lock()
		hb.node = c.addNode(b.Host())
		s.mu.Unlock()
	}
	for i := range b.Columns {
		col := &b.Columns[i]
		ref := b.Meters[col.Meter]
		hc := headColumn{tag: col.Tag}
		if hc.meter, ok = c.byMeter[ref]; !ok {
			s.mu.Lock()
			hc.meter = c.addMeter(ref)
			s.mu.Unlock()
		}
		if hc.origin, ok = c.byOrigin[col.Origin]; !ok {
			s.mu.Lock()
			hc.origin = c.addOrigin(col.Origin)
			s.mu.Unlock()
		}
		hb.columns[i] = hc
	}
	for i := range b.Rows {
		row := &b.Rows[i]
		r, ok := c.byResource[row.Resource]
		if !ok {
			s.mu.Lock()
			r = c.addResource(row.Resource)
			s.mu.Unlock()
		}
		if r.holder == nil || !r.holder.is(row) {
			r.holder = s.findHolder(r, row)
		}
		if r.meta != 0 && len(c.metas[r.meta]) == 0 || !bytes.Equal(c.metas[r.meta], row.Metadata) {
			r.meta = s.findMeta(row.Metadata)
		}
		hb.rows[i] = headRow{time: b.Base + row.Offset, holder: r.holder, meta: r.meta}
	}
}

func (s *Store) findHolder(r *resource, row *sample.Row) *holder {
	for _, h := range r.holders {
		if h.is(row) {
			return h
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.catalogue.addHolder(r, row)
}

func (s *Store) findMeta(data []byte) uint32 {
	if len(data) == 0 {
		return 0
	}
	if no, ok := s.catalogue.byMeta[metaKey(data)]; ok {
		return no
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.catalogue.addMeta(slices.Clone(data))
}

// layout makes sure that the row's resource is known to have its meters. sum
// identifies the set of them.
func (s *Store) layout(hb *headBatch, row int, sum uint64) {
	r := hb.rows[row].holder.resource
	if slices.Contains(r.layouts, sum) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(r.layouts) >= 64 {
		r.layouts = r.layouts[:0:0] // rows of ever new shapes: start over
	}
	r.layouts = append(r.layouts, sum)
	for at, to := hb.span(row); at < to; at++ {
		if m := hb.column(int(hb.indexes[at])).meter; !slices.Contains(r.meters, m) {
			r.meters = append(r.meters, m)
		}
	}
}

// column returns the column of the sample with the given index.
func (b *headBatch) column(index int) *headColumn {
	i, _ := slices.BinarySearchFunc(b.columns, index, func(c headColumn, index int) int {
		if c.index <= index {
			return -1
		}
		return 1
	})
	return &b.columns[i-1]
}

// stored returns the indexes of the batch's samples that are stored already: a
// sample is one by series, time and id. Only samples with foreign ids can be,
// and those of resources that have some.
func (s *Store) stored(ctx context.Context, b *sample.Batch, hb *headBatch) (map[int]bool, error) {
	suspect := false
	for i := range hb.rows {
		r := hb.rows[i].holder.resource
		suspect = suspect || hb.explicit || r.foreign && hb.rows[i].time <= r.last
	}
	if !suspect {
		return nil, nil
	}
	type key struct {
		meter  *meter
		holder *holder
		time   int64
		id     sample.ID
	}
	own := map[key]bool{}
	dropped := map[int]bool{}
	var v *view
	defer func() {
		if v != nil {
			v.close()
		}
	}()
	index := 0
	for i := range b.Columns {
		m := hb.columns[i].meter
		for at, w := range b.Columns[i].Bitmap {
			for ; w != 0; w &= w - 1 {
				row := &hb.rows[at*8+bits.TrailingZeros8(w)]
				k := key{m, row.holder, row.time, hb.sampleID(index)}
				r := row.holder.resource
				found := hb.explicit && own[k]
				if !found && (hb.explicit || r.foreign) && row.time <= r.last && len(r.meters) > 0 {
					if v == nil {
						var err error
						if v, err = s.view(ctx); err != nil {
							return nil, err
						}
					}
					var err error
					if found, err = v.has(m, row.holder, row.time, k.id); err != nil {
						return nil, err
					}
				}
				if hb.explicit {
					own[k] = true
				}
				if found {
					dropped[index] = true
				}
				index++
			}
		}
	}
	return dropped, nil
}

// publish makes the batch visible. Only the committer calls it.
func (s *Store) publish(hb *headBatch, node string, gaps []sample.Gap) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.active
	if since := hb.since; since != 0 && since < s.catalogue.metered[hb.node] {
		s.catalogue.metered[hb.node], h.metered[hb.node] = since, since
	}
	for i := range hb.rows {
		if from, to := hb.span(i); from == to {
			continue
		}
		row := &hb.rows[i]
		r := row.holder.resource
		h.rows[r] = append(h.rows[r], rowRef{hb, i})
		r.last = max(r.last, row.time)
		row.holder.born = min(row.holder.born, row.time)
		if d := dayOf(row.time); d > s.catalogue.used[row.meta] {
			s.catalogue.used[row.meta] = d
			h.used[row.meta] = d
		}
		if row.time < s.catalogue.metered[hb.node] {
			s.catalogue.metered[hb.node] = row.time
			h.metered[hb.node] = row.time
		}
		r.foreign = r.foreign || hb.explicit
		if !hb.explicit {
			continue
		}
		for at, to := hb.span(i); at < to; at++ {
			id := hb.sampleID(int(hb.indexes[at]))
			h.foreign[id] = append(h.foreign[id], valueRef{rowRef{hb, i}, at})
		}
	}
	h.batches = append(h.batches, hb)
	if !hb.explicit {
		h.byID[hb.id] = hb
	}
	for n, g := range gaps {
		g.Node = cmp.Or(g.Node, node)
		h.gaps = append(h.gaps, gap{hb.seq, n, g})
	}
	h.bytes += hb.bytes() + 100*int64(len(gaps))
	s.published = hb.seq
}

// order puts rows into the order of their times, then that of storing.
func (r rowRef) order(o rowRef) int {
	return cmp.Or(cmp.Compare(r.info().time, o.info().time), cmp.Compare(r.seq, o.seq), cmp.Compare(r.row, o.row))
}
