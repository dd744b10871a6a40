package local

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// view is the store as one query sees it: a snapshot of what is flushed, and
// the heads' batches that were not flushed then. It is for one goroutine.
type view struct {
	dimensions
	ctx  context.Context
	s    *Store
	snap *pebble.Snapshot

	heads    []*head // oldest first
	after    uint64  // batches of the heads up to this one are in the snapshot
	upTo     uint64  // later ones are not seen
	hours    []hour  // that may have chunks, ascending
	rolled   []day   // that may have rollups, ascending
	chunks   *pebble.Iterator
	parts    *pebble.Iterator
	batches  *pebble.Iterator
	rollups  *pebble.Iterator
	foreign  *pebble.Iterator // opened when it is needed
	key, end []byte

	dayRollups *pebble.Iterator

	part      chunkPart // decoded last
	chunk     chunk
	infos     map[uint64]batchHead
	documents map[uint32]*store.Document
	pending   map[hour][]uint32 // resources that were flushed to since the hour was rolled up, where read; nil: none read
}

// chunkPart is the rows of a part.
type chunkPart struct {
	rows
	hour     hour
	resource uint32
	part     part
	ok       bool
}

// point is a sample before its names are looked up.
type point struct {
	time   int64
	seq    uint64
	bits   uint64
	index  uint32
	node   uint32
	holder uint32
	meta   uint32
	origin uint32
	tag    sample.Tag
	id     sample.ID  // foreign, or zero
	batch  *headBatch // nil where flushed
}

// before orders points as Samples yields them.
func (p *point) before(o *point) int {
	switch {
	case p.time != o.time:
		if p.time > o.time {
			return -1
		}
		return 1
	case p.seq != o.seq:
		if p.seq < o.seq {
			return -1
		}
		return 1
	}
	return int(p.index) - int(o.index)
}

// view begins a query. The heads are taken before the snapshot, which says
// which of their batches it has, and what is known of the chunks after it: a
// flush that ends meanwhile hides nothing and shows nothing twice.
func (s *Store) view(ctx context.Context) (*view, error) {
	v := &view{ctx: ctx, s: s, infos: map[uint64]batchHead{}, documents: map[uint32]*store.Document{}}
	if err := s.enter(); err != nil {
		return nil, err
	}
	s.mu.RLock()
	if s.frozen != nil {
		v.heads = append(v.heads, s.frozen)
	}
	v.heads = append(v.heads, s.active)
	v.upTo = s.published
	s.mu.RUnlock()
	v.snap = s.db.NewSnapshot()
	s.mu.RLock()
	v.hours, v.rolled, v.dimensions = s.hours, s.rolled, s.catalogue.dimensions()
	s.mu.RUnlock()
	value, closer, err := v.snap.Get(stateKey())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read state: %w", err), v.close())
	}
	r := reader{src: value}
	r.byte()
	v.after = r.uvarint()
	err = errors.Join(r.err, closer.Close())
	for kind, it := range map[byte]**pebble.Iterator{keyChunk: &v.chunks, keyRows: &v.parts, keyBatch: &v.batches, keyRollup: &v.rollups, keyDay: &v.dayRollups} {
		if err == nil {
			*it, err = v.snap.NewIter(&pebble.IterOptions{LowerBound: []byte{kind}, UpperBound: []byte{kind + 1}})
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read store: %w", err), v.close())
	}
	return v, nil
}

// enter begins a query, which ends with s.readers.Done.
func (s *Store) enter() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.shut {
		return errClosed
	}
	s.readers.Add(1)
	return nil
}

func (v *view) close() error {
	var errs []error
	for _, it := range []*pebble.Iterator{v.chunks, v.parts, v.batches, v.rollups, v.dayRollups, v.foreign} {
		if it != nil {
			errs = append(errs, it.Close())
		}
	}
	return errors.Join(append(errs, v.s.leave(v.snap))...)
}

// leave ends a query that s.enter began. When its snapshot is closed Pebble may
// compact what only that needed, and waits for its manifest to be written before:
// for ever in a store that has failed, for space on a full disk. The query does
// not.
func (s *Store) leave(snap *pebble.Snapshot) error {
	closed := make(chan error, 1)
	go func() {
		defer s.readers.Done()
		closed <- snap.Close()
	}()
	select {
	case err := <-closed:
		return err
	case <-s.failing:
	case <-s.disk.stalled():
	}
	return nil
}

// headRows yields the rows of a resource that are in the heads.
func (v *view) headRows(r *resource, yield func(rowRef) bool) {
	for _, h := range v.heads {
		v.s.mu.RLock()
		refs := h.rows[r]
		v.s.mu.RUnlock()
		for _, ref := range refs {
			if ref.seq > v.after && ref.seq <= v.upTo && !yield(ref) {
				return
			}
		}
	}
}

// headPoints appends the points of a series from one time to another.
func (v *view) headPoints(out []point, r *resource, m *meter, from, to int64) []point {
	v.headRows(r, func(ref rowRef) bool {
		row := ref.info()
		if row.time < from || row.time > to {
			return true
		}
		at, end := ref.span(ref.row)
		for c := 0; at < end; at++ {
			index := int(ref.indexes[at])
			for c+1 < len(ref.columns) && ref.columns[c+1].index <= index {
				c++
			}
			if ref.columns[c].meter == m {
				out = append(out, ref.point(at, &ref.columns[c]))
			}
		}
		return true
	})
	return out
}

// point returns the value at a position of the batch's values.
func (r rowRef) point(at int, col *headColumn) point {
	row := r.info()
	return point{
		time: row.time, seq: r.seq, bits: r.values[at], index: uint32(r.indexes[at]), node: r.node, holder: row.holder.no,
		meta: row.meta, origin: col.origin, tag: col.tag, batch: r.headBatch,
	}
}

// load decodes the rows of a part, unless they were decoded last.
func (v *view) load(h hour, resource uint32, p part) error {
	c := &v.part
	if c.ok && c.hour == h && c.resource == resource && c.part == p {
		return nil
	}
	c.ok = false
	v.key = rowsKey(v.key[:0], h, resource, p)
	if !v.parts.SeekGE(v.key) || !bytes.Equal(v.parts.Key(), v.key) {
		return errors.Join(fmt.Errorf("read rows of resource %d, hour %d: %w: they are missing", resource, h, errCorrupt), v.parts.Error())
	}
	value, err := v.parts.ValueAndErr()
	if err != nil {
		return fmt.Errorf("read rows: %w", err)
	}
	if err := c.decode(value); err != nil {
		return err
	}
	c.hour, c.resource, c.part, c.ok = h, resource, p, true
	return nil
}

// points decodes the chunk at the iterator and appends its points from one
// time to another.
func (v *view) points(out []point, value []byte, h hour, resource uint32, p part, from, to int64) ([]point, error) {
	if err := v.load(h, resource, p); err != nil {
		return out, err
	}
	rows, c := &v.part.rows, &v.chunk
	if err := c.decode(value, len(rows.times)); err != nil {
		return out, err
	}
	for i, row := range c.rows {
		t := int64(rows.times[row])
		if t < from || t > to {
			continue
		}
		pt := point{
			time: t, seq: rows.seqs[row], bits: c.bits[i], index: uint32(c.indexes[i]), node: uint32(rows.nodes[row]),
			holder: uint32(rows.holders[row]), meta: uint32(rows.metas[row]), origin: uint32(c.origins[i]), tag: sample.Tag(c.tags[i]),
		}
		if c.ids != nil {
			pt.id = c.ids[i]
		}
		if int(pt.holder) >= len(v.holders) || int(pt.meta) >= len(v.metas) || int(pt.origin) >= len(v.origins) || int(pt.node) >= len(v.nodes) {
			return out, fmt.Errorf("read chunk: %w: it names what the catalogue lacks", errCorrupt)
		}
		out = append(out, pt)
	}
	return out, nil
}

// eachChunk calls each with the chunks of a series' hour that have samples from
// one time to another, oldest first.
func (v *view) eachChunk(h hour, m, resource uint32, from, to int64, each func(value []byte, first, last int64, p part) error) error {
	v.end = seriesKey(v.end[:0], h, m, resource)
	at := appendLast(append(v.key[:0], v.end...), h, max(from, h.start()))
	v.key = at
	for ok := v.chunks.SeekGE(at); ok && bytes.HasPrefix(v.chunks.Key(), v.end); ok = v.chunks.Next() {
		_, _, _, last, p, ok := readChunkKey(v.chunks.Key())
		if !ok {
			return fmt.Errorf("read chunk: %w", errCorrupt)
		}
		value, err := v.chunks.ValueAndErr()
		if err != nil {
			return fmt.Errorf("read chunk: %w", err)
		}
		length, err := chunkLength(value)
		if err != nil {
			return err
		}
		if last-length > to {
			continue
		}
		if err := each(value, last-length, last, p); err != nil {
			return err
		}
	}
	if unmerged, err := v.unmerged(h); err != nil || !unmerged {
		return errors.Join(err, v.chunks.Error())
	}
	return errors.Join(v.chunks.Error(), v.eachUnmerged(h, m, resource, from, to, each))
}

// eachUnmerged is eachChunk for parts that are not merged yet.
func (v *view) eachUnmerged(h hour, m, resource uint32, from, to int64, each func(value []byte, first, last int64, p part) error) error {
	c := &v.part
	v.end = rowsPrefix(v.end[:0], h, resource)
	for ok := v.parts.SeekGE(v.end); ok && bytes.HasPrefix(v.parts.Key(), v.end); ok = v.parts.Next() {
		value, err := v.parts.ValueAndErr()
		if err != nil {
			return fmt.Errorf("read rows: %w", err)
		}
		if len(v.parts.Key()) != len(v.end)+6 {
			return fmt.Errorf("read rows: %w", errCorrupt)
		}
		c.ok = false
		if err := c.decode(value); err != nil {
			return err
		}
		c.hour, c.resource, c.part, c.ok = h, resource, readPart(v.parts.Key()[len(v.end):]), true
		err = c.eachChunk(h, func(meter uint32, last int64, value []byte) error {
			if meter != m || last < from {
				return nil
			}
			length, err := chunkLength(value)
			if err != nil || last-length > to {
				return err
			}
			return each(value, last-length, last, c.part)
		})
		if err != nil {
			return err
		}
	}
	return v.parts.Error()
}

// unmerged reports whether an hour was flushed to since it was rolled up.
func (v *view) unmerged(h hour) (bool, error) {
	if v.pending == nil {
		v.pending = map[hour][]uint32{}
		it, err := v.snap.NewIter(&pebble.IterOptions{LowerBound: []byte{keyPending}, UpperBound: []byte{keyPending + 1}})
		if err != nil {
			return false, err
		}
		for ok := it.First(); ok; ok = it.SeekGE(appendHour([]byte{keyPending}, readHour(it.Key()[1:])+1)) {
			if len(it.Key()) != 1+5+4 {
				break
			}
			v.pending[readHour(it.Key()[1:])] = nil
		}
		if err := it.Close(); err != nil {
			return false, err
		}
	}
	_, some := v.pending[h]
	return some, nil
}

// isPending reports whether an hour of a resource was flushed to since it was
// rolled up.
func (v *view) isPending(h hour, resource uint32) (bool, error) {
	if some, err := v.unmerged(h); err != nil || !some {
		return false, err
	}
	list := v.pending[h]
	if list == nil {
		lower, upper := appendHour([]byte{keyPending}, h), appendHour([]byte{keyPending}, h+1)
		it, err := v.snap.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
		if err != nil {
			return false, err
		}
		for ok := it.First(); ok && err == nil; ok = it.Next() {
			var value []byte
			if value, err = it.ValueAndErr(); err == nil {
				in := reader{src: value}
				in.version()
				list = in.numbers(list)
				err = in.done("resources of an hour")
			}
		}
		if err := errors.Join(err, it.Close()); err != nil {
			return false, err
		}
		slices.Sort(list)
		v.pending[h] = list
	}
	_, found := slices.BinarySearch(list, resource)
	return found, nil
}

// batchHead is what samples show of their batch.
type batchHead struct {
	id       sample.BatchID
	recorded int64
}

// batch returns what a flushed point shows of its batch.
func (v *view) batch(p *point) (batchHead, error) {
	if head, ok := v.infos[p.seq]; ok {
		return head, nil
	}
	value, err := v.batchValue(dayOf(p.time), p.node, p.seq)
	if err != nil {
		return batchHead{}, err
	}
	var info batchInfo
	r := reader{src: value}
	info.decodeHead(&r)
	if r.err != nil {
		return batchHead{}, r.done("batch")
	}
	if len(v.infos) > 1<<14 {
		clear(v.infos)
	}
	head := batchHead{info.id, info.recorded}
	v.infos[p.seq] = head
	return head, nil
}

// batchValue reads the record of a batch. Often it is the neighbour of the one
// that was read last.
func (v *view) batchValue(d day, node uint32, seq uint64) ([]byte, error) {
	it := v.batches
	v.key = batchKey(v.key[:0], d, node, seq)
	found := it.Valid() && it.Prev() && bytes.Equal(it.Key(), v.key)
	if !found && (!it.SeekGE(v.key) || !bytes.Equal(it.Key(), v.key)) {
		return nil, errors.Join(fmt.Errorf("read batch %d: %w: it is missing", seq, errCorrupt), it.Error())
	}
	value, err := it.ValueAndErr()
	if err != nil {
		return nil, fmt.Errorf("read batch: %w", err)
	}
	return value, nil
}

func (v *view) batchInfo(d day, node uint32, seq uint64) (*batchInfo, error) {
	value, err := v.batchValue(d, node, seq)
	if err != nil {
		return nil, err
	}
	info := &batchInfo{}
	return info, info.decode(value)
}

// sample looks up a point's names.
func (v *view) sample(m *meter, p *point) (store.Sample, error) {
	h := v.holders[p.holder]
	out := store.Sample{Sample: sample.Sample{
		Name: m.Name, Kind: m.Kind, Unit: m.Unit, Volume: sample.Volume{Bits: p.bits, Tag: p.tag}, Resource: h.resource.id,
		Source: h.source, Project: h.project, User: h.user, Time: p.time, Origin: v.origins[p.origin], Incarnation: h.incarnation,
		Metadata: v.metas[p.meta],
	}}
	if p.batch != nil {
		out.ID, out.Recorded = p.batch.sampleID(int(p.index)), p.batch.recorded
		return out, nil
	}
	info, err := v.batch(p)
	if err != nil {
		return out, err
	}
	out.Recorded = info.recorded
	switch {
	case p.id.Text != "":
		out.ID = sample.ParseID(p.id.Text)
	case p.id != sample.ID{}:
		out.ID = p.id
	default:
		out.ID = info.id.Sample(int(p.index))
	}
	return out, nil
}

// document returns the parsed metadata with a number.
func (v *view) document(meta uint32) *store.Document {
	d := v.documents[meta]
	if d == nil {
		if len(v.documents) > 1<<14 {
			clear(v.documents)
		}
		d = store.NewDocument(v.metas[meta])
		v.documents[meta] = d
	}
	return d
}

// has reports whether there is a sample of a series with this time and id. It
// reads samples only where one of the resource's has the id.
func (v *view) has(m *meter, h *holder, t int64, id sample.ID) (found bool, err error) {
	is := func(of *meter, p *point) error {
		found = found || of == m && p.holder == h.no && p.time == t
		return nil
	}
	if err := v.findInHeads(id, is); err != nil || found {
		return found, err
	}
	hr := hourOf(t)
	if _, ok := slices.BinarySearch(v.hours, hr); !ok {
		return false, nil
	}
	at := &batchInfo{from: t, to: t}
	if batch, index, ok := id.Batch(); ok {
		where, err := v.place(batch)
		if err != nil {
			return false, err
		}
		if where != nil && slices.Contains(where.days, dayOf(t)) {
			if _, err := v.findIndex(dayOf(t), m, h.resource.no, at, where.seq, uint32(index), is); err != nil || found {
				return found, err
			}
		}
	}
	err = v.eachForeign(dayOf(t), id, func(of *meter, resource uint32, seq uint64, index uint32) error {
		if found || of != m || resource != h.resource.no {
			return nil
		}
		_, err := v.findIndex(dayOf(t), m, resource, at, seq, index, func(of *meter, p *point) error {
			s, err := v.sample(of, p) // ids of the same hash may differ
			if err != nil || s.ID != id {
				return err
			}
			return is(of, p)
		})
		return err
	})
	return found, err
}

// find returns the samples with an id.
func (v *view) find(id sample.ID) ([]store.Sample, error) {
	var out []store.Sample
	add := func(m *meter, p *point) error {
		s, err := v.sample(m, p)
		if err == nil && s.ID == id {
			out = append(out, s)
		}
		return err
	}
	if err := v.findInHeads(id, add); err != nil {
		return nil, err
	}
	if batch, index, ok := id.Batch(); ok {
		if err := v.findDerived(batch, uint32(index), add); err != nil {
			return nil, err
		}
	}
	return out, v.findForeign(id, add)
}

// findInHeads calls add with the samples of the heads that have an id.
func (v *view) findInHeads(id sample.ID, add func(*meter, *point) error) error {
	batch, index, derived := id.Batch()
	for _, h := range v.heads {
		v.s.mu.RLock()
		refs := h.foreign[id]
		var hb *headBatch
		if derived {
			hb = h.byID[batch]
		}
		v.s.mu.RUnlock()
		if hb != nil {
			if ref, ok := hb.find(index); ok {
				refs = append(slices.Clip(refs), ref)
			}
		}
		for _, ref := range refs {
			if ref.seq <= v.after || ref.seq > v.upTo {
				continue
			}
			col := ref.column()
			p := ref.point(ref.at, col)
			if err := add(col.meter, &p); err != nil {
				return err
			}
		}
	}
	return nil
}

// find returns the value with an index.
func (b *headBatch) find(index int) (valueRef, bool) {
	for row := range b.rows {
		from, to := b.span(row)
		if i, ok := slices.BinarySearch(b.indexes[from:to], uint16(index)); ok {
			return valueRef{rowRef{b, row}, from + i}, true
		}
	}
	return valueRef{}, false
}

// place returns where a batch without foreign ids is; nil: there is none.
func (v *view) place(id sample.BatchID) (*place, error) {
	value, closer, err := v.snap.Get(batchIDKey(id))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up batch: %w", err)
	}
	where := &place{}
	return where, errors.Join(where.decode(value), closer.Close())
}

// findDerived looks through what the batch's resources have at its time.
func (v *view) findDerived(id sample.BatchID, index uint32, add func(*meter, *point) error) error {
	where, err := v.place(id)
	if err != nil || where == nil {
		return err
	}
	for _, d := range where.days {
		if len(v.hoursOf(d.start(), d.end())) == 0 {
			continue
		}
		info, err := v.batchInfo(d, where.node, where.seq)
		if err != nil {
			return err
		}
		for _, no := range info.resources {
			if int(no) >= len(v.resources) {
				return fmt.Errorf("look up batch: %w", errCorrupt)
			}
			for _, m := range v.metersOf(v.resources[no]) {
				done, err := v.findIndex(d, m, no, info, where.seq, index, add)
				if done || err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// hoursOf returns the hours from one time to another that may have chunks.
func (v *view) hoursOf(from, to int64) []hour {
	i, _ := slices.BinarySearch(v.hours, hourOf(from))
	n, found := slices.BinarySearch(v.hours, hourOf(to))
	if found {
		n++
	}
	return v.hours[i:max(i, n)]
}

func (v *view) metersOf(r *resource) []*meter {
	v.s.mu.RLock()
	defer v.s.mu.RUnlock()
	return r.meters
}

// findIndex looks for a batch's sample in the chunks of a series.
func (v *view) findIndex(d day, m *meter, resource uint32, info *batchInfo, seq uint64, index uint32, add func(*meter, *point) error) (bool, error) {
	var points []point
	for _, h := range v.hoursOf(max(d.start(), info.from), min(d.end(), info.to)) {
		if err := v.eachChunk(h, m.no, resource, info.from, info.to, func(value []byte, _, _ int64, p part) (err error) {
			points, err = v.points(points, value, h, resource, p, info.from, info.to)
			return err
		}); err != nil {
			return false, err
		}
	}
	for i := range points {
		if points[i].seq == seq && points[i].index == index {
			return true, add(m, &points[i])
		}
	}
	return false, nil
}

// findForeign looks up the index of foreign ids, day by day.
func (v *view) findForeign(id sample.ID, add func(*meter, *point) error) error {
	last := day(math.MinInt32)
	whole := &batchInfo{from: math.MinInt64, to: math.MaxInt64}
	for _, h := range v.hours {
		d := dayOf(h.start())
		if d == last {
			continue
		}
		last = d
		if err := v.eachForeign(d, id, func(m *meter, resource uint32, seq uint64, index uint32) error {
			_, err := v.findIndex(d, m, resource, whole, seq, index, add)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// eachForeign calls each with the places of a day's samples that have the hash of
// a foreign id.
func (v *view) eachForeign(d day, id sample.ID, each func(m *meter, resource uint32, seq uint64, index uint32) error) error {
	if v.foreign == nil {
		it, err := v.snap.NewIter(&pebble.IterOptions{LowerBound: []byte{keyForeign}, UpperBound: []byte{keyForeign + 1}})
		if err != nil {
			return fmt.Errorf("look up id: %w", err)
		}
		v.foreign = it
	}
	it := v.foreign
	v.key = foreignKey(v.key[:0], d, hashID(id), 0, 0)
	prefix := slices.Clone(v.key[:1+4+8])
	for ok := it.SeekGE(v.key); ok && bytes.HasPrefix(it.Key(), prefix); ok = it.Next() {
		rest := it.Key()[len(prefix):]
		r := reader{src: it.Value()}
		m, resource := r.number(), r.number()
		if err := r.done("place of an id"); err != nil || len(rest) != 12 || int(m) >= len(v.meters) {
			return errors.Join(fmt.Errorf("look up id: %w", errCorrupt), err)
		}
		if err := each(v.meters[m], resource, binary.BigEndian.Uint64(rest), binary.BigEndian.Uint32(rest[8:])); err != nil {
			return err
		}
	}
	return it.Error()
}

func appendSeriesRef(dst []byte, meter, resource uint32) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(dst, uint64(meter)), uint64(resource))
}
