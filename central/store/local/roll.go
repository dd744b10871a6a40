package local

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvmeter/kvmeter/sample"
)

// rollGrace is how long after its end an hour is rolled up: samples of the next
// one have come by then from nodes that are not late.
const rollGrace = 2 * time.Minute

// rollFlushes is how many flushes into an hour that is over it is rolled up
// after, however steadily late samples come.
const rollFlushes = 64

// rollBytes bounds the Pebble batches that rolling up commits.
const rollBytes = 2 << 20

// rolledSegment is the first segment of the parts that rolling up writes.
const rolledSegment = 1 << 15

// pendingHour is an hour of which flushes have written that is not rolled up
// since.
type pendingHour struct {
	generations []uint32
	since       time.Time // of the last flush; zero: before the store was opened
}

// loadPending reads which hours are to be rolled up.
func (s *Store) loadPending() error {
	err := s.scan([]byte{keyPending}, []byte{keyPending + 1}, func(k, _ []byte) error {
		r := reader{src: k[1:]}
		at := r.bytes(5)
		generation := r.bytes(4)
		if err := r.done("key of an hour to roll up"); err != nil {
			return err
		}
		s.pend(readHour(at), uint32(generation[0])<<24|uint32(generation[1])<<16|uint32(generation[2])<<8|uint32(generation[3]), time.Time{})
		return nil
	})
	if err != nil {
		return fmt.Errorf("read hours to roll up: %w", err)
	}
	if err := s.jump(keyDayRolled, 4, func(k []byte) { s.daysRolled[readDay(k)] = true }); err != nil {
		return fmt.Errorf("read days that are rolled up: %w", err)
	}
	return s.jump(keyRollup, 4, func(k []byte) { s.rolled = append(s.rolled, readDay(k)) })
}

// pend notes that a flush wrote of an hour. The caller holds the store's lock.
func (s *Store) pend(h hour, generation uint32, at time.Time) {
	p := s.pending[h]
	p.generations, p.since = append(slices.Clip(p.generations), generation), at
	s.pending[h] = p
}

// rollLoop rolls up the hours that are over.
func (s *Store) rollLoop() {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		case <-s.flushedUp:
		}
		s.try("rolling up", func() error { return s.roll(false) })
	}
}

// Roll flushes and rolls up all hours, whether they are over or not.
func (s *Store) Roll(ctx context.Context) error {
	if err := s.Flush(ctx); err != nil {
		return err
	}
	return s.roll(true)
}

// roll rolls up the hours that are over and were not flushed to by the last
// flush, or not for a while; or all.
func (s *Store) roll(all bool) error {
	s.rolling.Lock()
	defer s.rolling.Unlock()
	now := s.options.Clock()
	s.mu.RLock()
	var due []hour
	for h, p := range s.pending {
		over := h.end() < now.Add(-rollGrace).UnixMicro()
		quiet := p.generations[len(p.generations)-1] != s.flushedGeneration || now.Sub(p.since) >= s.options.FlushEvery ||
			len(p.generations) >= rollFlushes
		if all || over && quiet {
			due = append(due, h)
		}
	}
	s.mu.RUnlock()
	slices.Sort(due)
	for _, h := range due {
		select {
		case <-s.stop:
			return nil
		default:
		}
		began := time.Now()
		err := s.rollHour(h)
		s.metrics.rolled(time.Since(began), err)
		if err != nil {
			return fmt.Errorf("hour %s: %w", time.UnixMicro(h.start()).UTC().Format(time.RFC3339), err)
		}
	}
	return s.rollDays()
}

// hourRoller rolls up one hour.
type hourRoller struct {
	*view
	hour        hour
	generations []uint32
	batch       *pebble.Batch
	dayRolled   bool // there may be rollups of the day
	rows        *pebble.Iterator
	series      map[uint32]*pebble.Iterator // of the chunks, by meter

	parts    []rolledPart  // of a resource
	unmerged [][]partChunk // by number of the meter: chunks of parts that are not merged yet
	left     int           // how many there are
	merged   bool          // there are parts whose chunks have records of their own
	bytes    []byte        // that hold the chunks
	all      rows
	order    []int // of all rows by time
	position []int // of the rows in order
	columns  []rolledSeries
	points   []point
	chunk    chunk
	roller   roller
	key, buf []byte
}

// rolledPart is a part of the resource with its place in all rows.
type rolledPart struct {
	part   part
	from   int
	length int
}

// partChunk is a chunk that follows the rows of a part.
type partChunk struct {
	at    int // position of the part
	value []byte
}

// rolledSeries is a series of the resource with all its points of the hour.
type rolledSeries struct {
	meter  *meter
	points []rolledPoint
	keys   [][]byte
}

// rolledPoint is a point with its row.
type rolledPoint struct {
	row    int
	index  uint64
	origin uint64
	bits   uint64
	tag    byte
	id     sample.ID
}

// rollHour merges the parts of an hour of each resource that was flushed since
// it was rolled up last, and writes its rollups. Each resource is done in one
// commit; one that is not done is pending still.
func (s *Store) rollHour(h hour) (err error) {
	s.mu.RLock()
	generations, dayRolled := s.pending[h].generations, s.daysRolled[dayOf(h.start())]
	s.mu.RUnlock()
	v, err := s.view(context.Background())
	if err != nil {
		return err
	}
	r := &hourRoller{
		view: v, hour: h, generations: generations, batch: s.db.NewBatch(), series: map[uint32]*pebble.Iterator{}, unmerged: make([][]partChunk, len(v.meters)),
		dayRolled: dayRolled,
	}
	defer func() { err = errors.Join(err, r.close()) }()
	resources, err := r.list()
	if err != nil {
		return err
	}
	bounds := &pebble.IterOptions{LowerBound: appendHour([]byte{keyRows}, h), UpperBound: appendHour([]byte{keyRows}, h+1)}
	if r.rows, err = v.snap.NewIter(bounds); err != nil {
		return err
	}
	for _, no := range resources {
		if int(no) >= len(v.resources) {
			return errCorrupt
		}
		if err := r.resource(v.resources[no]); err != nil {
			return fmt.Errorf("resource %q: %w", v.resources[no].id, err)
		}
		if r.batch.Len() < rollBytes {
			continue
		}
		select {
		case <-s.stop:
			return nil
		default:
		}
		if err := r.commit(pebble.NoSync); err != nil {
			return err
		}
	}
	for _, g := range generations {
		if err := r.batch.Delete(pendingKey(h, g), nil); err != nil {
			return err
		}
	}
	if err := r.due(resources); err != nil {
		return err
	}
	return r.commit(pebble.Sync)
}

// due notes of which resources the day is to be rolled up.
func (r *hourRoller) due(resources []uint32) error {
	value, closer, err := r.snap.Get(dayDueKey(r.hour))
	if err == nil {
		in := reader{src: value}
		in.version()
		resources = slices.Compact(sortedNumbers(in.numbers(slices.Clone(resources))))
		err = errors.Join(in.done("resources of a day"), closer.Close())
	}
	if err != nil && !errors.Is(err, pebble.ErrNotFound) {
		return err
	}
	return r.batch.Set(dayDueKey(r.hour), appendNumbers([]byte{recordVersion}, resources), nil)
}

// commit applies what is done so far, unless the hour has been dropped.
func (r *hourRoller) commit(how *pebble.WriteOptions) error {
	s := r.s
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.RLock()
	_, there := slices.BinarySearch(s.hours, r.hour)
	s.mu.RUnlock()
	b := r.batch
	r.batch = s.db.NewBatch()
	if there {
		s.mu.Lock() // before the rollups: a query that finds them knows of the day
		s.rolled = with(s.rolled, dayOf(r.hour.start()))
		s.mu.Unlock()
		if err := s.guard(func() error { return s.db.Apply(b, how) }); err != nil {
			return err
		}
	}
	if how == pebble.Sync {
		s.mu.Lock()
		p := s.pending[r.hour]
		p.generations = slices.DeleteFunc(slices.Clone(p.generations), func(g uint32) bool { return slices.Contains(r.generations, g) })
		s.pending[r.hour] = p
		if len(p.generations) == 0 {
			delete(s.pending, r.hour)
		}
		s.mu.Unlock()
	}
	return b.Close()
}

func (r *hourRoller) close() error {
	var errs []error
	if r.rows != nil {
		errs = append(errs, r.rows.Close())
	}
	for _, it := range r.series {
		errs = append(errs, it.Close())
	}
	return errors.Join(append(errs, r.batch.Close(), r.view.close())...)
}

// list returns the resources that the flushes wrote of.
func (r *hourRoller) list() ([]uint32, error) {
	var out []uint32
	for _, g := range r.generations {
		value, closer, err := r.snap.Get(pendingKey(r.hour, g))
		if errors.Is(err, pebble.ErrNotFound) { // dropped meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		in := reader{src: value}
		in.version()
		out = in.numbers(out)
		if err := errors.Join(in.done("resources of an hour"), closer.Close()); err != nil {
			return nil, err
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// resource merges the parts of a resource and rolls up its series.
func (r *hourRoller) resource(res *resource) error {
	if err := r.readRows(res); err != nil || len(r.parts) == 0 {
		return err
	}
	r.sortRows()
	merge := len(r.parts) > 1 || r.left > 0
	n := 0
	for _, m := range r.metersOf(res) {
		if int(m.no) >= len(r.meters) { // it is newer than the view
			continue
		}
		if n == len(r.columns) {
			r.columns = append(r.columns, rolledSeries{})
		}
		c := &r.columns[n]
		c.meter, c.points, c.keys = m, c.points[:0], c.keys[:0]
		if err := r.readSeries(res, c); err != nil {
			return err
		}
		if len(c.points) == 0 {
			continue
		}
		n++
		if err := r.rollSeries(res, c); err != nil {
			return err
		}
	}
	if r.left > 0 {
		return fmt.Errorf("%w: it has chunks of meters that it is not known to have", errCorrupt)
	}
	if merge {
		return r.merge(res, r.columns[:n])
	}
	return nil
}

// readRows reads all rows of the resource.
func (r *hourRoller) readRows(res *resource) error {
	r.parts, r.bytes, r.merged = r.parts[:0], r.bytes[:0], false
	r.all.reset()
	r.key = rowsPrefix(r.key[:0], r.hour, res.no)
	var t rows
	for ok := r.rows.SeekGE(r.key); ok && bytes.HasPrefix(r.rows.Key(), r.key); ok = r.rows.Next() {
		value, err := r.rows.ValueAndErr()
		if err != nil {
			return err
		}
		if err := t.decode(value); err != nil {
			return err
		}
		if len(r.rows.Key()) != len(r.key)+6 {
			return errCorrupt
		}
		r.merged = r.merged || t.count == 0
		if err := t.eachChunk(r.hour, func(meter uint32, _ int64, value []byte) error {
			if int(meter) >= len(r.unmerged) {
				return errCorrupt
			}
			start := len(r.bytes)
			r.bytes = append(r.bytes, value...)
			r.unmerged[meter] = append(r.unmerged[meter], partChunk{len(r.parts), r.bytes[start:]})
			r.left++
			return nil
		}); err != nil {
			return err
		}
		r.parts = append(r.parts, rolledPart{readPart(r.rows.Key()[len(r.key):]), len(r.all.times), len(t.times)})
		r.all.times = append(r.all.times, t.times...)
		r.all.seqs = append(r.all.seqs, t.seqs...)
		r.all.nodes = append(r.all.nodes, t.nodes...)
		r.all.holders = append(r.all.holders, t.holders...)
		r.all.metas = append(r.all.metas, t.metas...)
	}
	return r.rows.Error()
}

// sortRows finds the order of the rows: by time, then that of storing.
func (r *hourRoller) sortRows() {
	r.order, r.position = r.order[:0], r.position[:0]
	for i := range r.all.times {
		r.order, r.position = append(r.order, i), append(r.position, i)
	}
	order := func(a, b int) int {
		return cmp.Or(cmp.Compare(int64(r.all.times[a]), int64(r.all.times[b])), cmp.Compare(r.all.seqs[a], r.all.seqs[b]), a-b)
	}
	if slices.IsSortedFunc(r.order, order) {
		return
	}
	slices.SortFunc(r.order, order)
	for at, i := range r.order {
		r.position[i] = at
	}
}

// readSeries reads all points of a series, by rows in their order.
func (r *hourRoller) readSeries(res *resource, c *rolledSeries) error {
	for _, ch := range r.unmerged[c.meter.no] {
		if err := r.addChunk(c, &r.parts[ch.at], ch.value); err != nil {
			return err
		}
		r.left--
	}
	r.unmerged[c.meter.no] = r.unmerged[c.meter.no][:0]
	if r.merged {
		if err := r.readMerged(res, c); err != nil {
			return err
		}
	}
	order := func(a, b rolledPoint) int { return cmp.Or(a.row-b.row, cmp.Compare(a.index, b.index)) }
	if !slices.IsSortedFunc(c.points, order) {
		slices.SortFunc(c.points, order)
	}
	return nil
}

// readMerged reads the chunks of a series that have records of their own.
func (r *hourRoller) readMerged(res *resource, c *rolledSeries) error {
	it := r.series[c.meter.no]
	if it == nil {
		prefix := seriesKey(nil, r.hour, c.meter.no, 0)
		var err error
		it, err = r.snap.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: append(prefix[:len(prefix)-4:len(prefix)-4], 0xff, 0xff, 0xff, 0xff, 0xff)})
		if err != nil {
			return err
		}
		r.series[c.meter.no] = it
	}
	r.key = seriesKey(r.key[:0], r.hour, c.meter.no, res.no)
	for ok := it.SeekGE(r.key); ok && bytes.HasPrefix(it.Key(), r.key); ok = it.Next() {
		_, _, _, _, p, valid := readChunkKey(it.Key())
		i := slices.IndexFunc(r.parts, func(rp rolledPart) bool { return rp.part == p })
		if !valid || i < 0 {
			return errCorrupt
		}
		value, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		if err := r.addChunk(c, &r.parts[i], value); err != nil {
			return err
		}
		c.keys = append(c.keys, bytes.Clone(it.Key()))
	}
	return it.Error()
}

// addChunk adds the points of a chunk to a series.
func (r *hourRoller) addChunk(c *rolledSeries, p *rolledPart, value []byte) error {
	ch := &r.chunk
	if err := ch.decode(value, p.length); err != nil {
		return err
	}
	for k, row := range ch.rows {
		pt := rolledPoint{r.position[p.from+int(row)], ch.indexes[k], ch.origins[k], ch.bits[k], ch.tags[k], sample.ID{}}
		if ch.ids != nil {
			pt.id = ch.ids[k]
		}
		c.points = append(c.points, pt)
	}
	return nil
}

// rollSeries writes the rollups of a series.
func (r *hourRoller) rollSeries(res *resource, c *rolledSeries) error {
	r.points = r.points[:0]
	for i := range c.points {
		p := &c.points[i]
		row := r.order[p.row]
		if r.all.holders[row] >= uint64(len(r.holders)) {
			return errCorrupt
		}
		r.points = append(r.points, point{
			time: int64(r.all.times[row]), seq: r.all.seqs[row], index: uint32(p.index), node: uint32(r.all.nodes[row]),
			holder: uint32(r.all.holders[row]), meta: uint32(r.all.metas[row]), origin: uint32(p.origin), bits: p.bits, tag: sample.Tag(p.tag),
		})
	}
	byTime(r.points)
	r.roller.roll(r.points, c.meter.Kind, r.holders)
	if r.dayRolled {
		r.key = dayKey(r.key[:0], dayOf(r.hour.start()), c.meter.no, res.no)
		if err := r.batch.Delete(r.key, nil); err != nil {
			return err
		}
	}
	r.key = rollupKey(r.key[:0], r.hour, c.meter.no, res.no)
	if len(r.roller.fine) > maxRuns { // it would be no shorter than the samples
		return r.batch.Set(r.key, rollupNone, nil)
	}
	r.buf = r.roller.append(r.buf[:0], r.hour, c.meter.Kind)
	return r.batch.Set(r.key, r.buf, nil)
}

// merge writes the resource's parts as one, or several where it has many rows.
func (r *hourRoller) merge(res *resource, columns []rolledSeries) error {
	for i := range columns {
		for _, key := range columns[i].keys {
			if err := r.batch.Delete(key, nil); err != nil {
				return err
			}
		}
	}
	for _, p := range r.parts {
		r.key = rowsKey(r.key[:0], r.hour, res.no, p.part)
		if err := r.batch.Delete(r.key, nil); err != nil {
			return err
		}
	}
	newest := part(r.generations[len(r.generations)-1])<<16 | rolledSegment
	at := make([]int, len(columns)) // first point that is not written
	for from, segment := 0, part(0); from < len(r.order); segment++ {
		to := min(from+maxRows, len(r.order))
		for i := range columns { // a part has no more points of a series than can be read
			if c := columns[i].points; len(c)-at[i] > maxPoints && c[at[i]+maxPoints].row < to {
				to = max(from+1, c[at[i]+maxPoints].row)
			}
		}
		if segment >= math.MaxUint16-rolledSegment {
			return errors.New("too many rows in an hour")
		}
		if err := r.segment(res, columns, at, from, to, newest+segment); err != nil {
			return err
		}
		from = to
	}
	return nil
}

func (r *hourRoller) segment(res *resource, columns []rolledSeries, at []int, from, to int, p part) error {
	var t rows
	for _, row := range r.order[from:to] {
		t.times = append(t.times, r.all.times[row])
		t.seqs = append(t.seqs, r.all.seqs[row])
		t.nodes = append(t.nodes, r.all.nodes[row])
		t.holders = append(t.holders, r.all.holders[row])
		t.metas = append(t.metas, r.all.metas[row])
	}
	r.key, r.buf = rowsKey(r.key[:0], r.hour, res.no, p), t.append(r.buf[:0])
	if err := r.batch.Set(r.key, r.buf, nil); err != nil {
		return err
	}
	ch := &r.chunk
	for i := range columns {
		points := columns[i].points
		ch.reset()
		for ; at[i] < len(points) && points[at[i]].row < to; at[i]++ {
			pt := &points[at[i]]
			ch.rows = append(ch.rows, uint64(pt.row-from))
			ch.indexes = append(ch.indexes, pt.index)
			ch.origins = append(ch.origins, pt.origin)
			ch.tags = append(ch.tags, pt.tag)
			ch.bits = append(ch.bits, pt.bits)
			if pt.id != (sample.ID{}) || ch.ids != nil {
				for len(ch.ids) < len(ch.rows) {
					ch.ids = append(ch.ids, sample.ID{})
				}
				ch.ids[len(ch.ids)-1] = pt.id
			}
		}
		if len(ch.rows) == 0 {
			continue
		}
		first, last := int64(t.times[ch.rows[0]]), int64(t.times[ch.rows[len(ch.rows)-1]])
		ch.length = last - first
		r.key = chunkKey(r.key[:0], r.hour, columns[i].meter.no, res.no, last, p)
		r.buf = ch.append(r.buf[:0], to-from)
		if err := r.batch.Set(r.key, r.buf, nil); err != nil {
			return err
		}
	}
	return nil
}
