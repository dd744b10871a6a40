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

	"github.com/kvmeter/kvmeter/sample"
)

// Checked says what [Store.Verify] and [Repair] looked at.
type Checked struct {
	Records  int64
	Samples  int64 // in chunks
	Problems int64
	Dropped  int64 // records that Repair deleted since they cannot be read
}

// Verify reads every record, and compares the rollups and what is known of the
// resources with the samples. It calls report for each problem.
func (s *Store) Verify(ctx context.Context, report func(problem string)) (Checked, error) {
	v, err := s.view(ctx)
	if err != nil {
		return Checked{}, err
	}
	c := &checker{view: v, report: report, seen: map[*resource]*lifetime{}}
	err = c.all()
	return c.Checked, errors.Join(err, v.close())
}

// Repair opens a store, deletes the records that cannot be read, works out
// anew what is known of its resources and rolls up all hours again. It calls
// report for each problem that it finds. Where a file is damaged it ends with an
// error and has changed nothing.
func Repair(ctx context.Context, dir string, o Options, report func(problem string)) (c Checked, err error) {
	o.lenient = true
	s, err := Open(dir, o)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.Flush(ctx); err != nil {
		return c, err
	}
	s.rolling.Lock() // nothing is merged meanwhile
	c, err = s.repair(ctx, report)
	s.rolling.Unlock()
	if err != nil {
		return c, err
	}
	return c, s.Roll(ctx)
}

func (s *Store) repair(ctx context.Context, report func(problem string)) (Checked, error) {
	v, err := s.view(ctx)
	if err != nil {
		return Checked{}, err
	}
	c := &checker{view: v, report: report, seen: map[*resource]*lifetime{}, batch: s.db.NewBatch(), states: map[*resource]*state{}}
	err = errors.Join(c.all(), v.close())
	if err != nil {
		return c.Checked, err
	}
	if c.damaged {
		return c.Checked, errDamaged
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	hours := map[hour][]uint32{}
	for key := range c.hours {
		hours[key.hour] = append(hours[key.hour], key.resource)
	}
	s.generation++
	for h, list := range hours {
		if err := c.batch.Set(pendingKey(h, s.generation), appendNumbers([]byte{recordVersion}, sortedNumbers(list)), nil); err != nil {
			return c.Checked, err
		}
	}
	s.mu.RLock()
	flushed := s.published
	for r, st := range c.states {
		r.last = max(r.last, st.newest.last)
		err = errors.Join(err, c.batch.Set(resourceKey(nil, r.no), st.append(nil, r.last, r.meters, r.bornHolders(), r.foreign), nil))
	}
	s.mu.RUnlock()
	if err := errors.Join(err, c.batch.Set(stateKey(), s.stateValue(flushed), nil), s.commit(c.batch)); err != nil {
		return c.Checked, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for r, st := range c.states {
		r.flushed = st
	}
	for h := range hours {
		s.pend(h, s.generation, s.options.Clock())
	}
	return c.Checked, nil
}

// errDamaged is what [Repair] can't mend.
var errDamaged = errors.New("files of the store are damaged, not only records in them: restore a backup")

type hourResource struct {
	hour     hour
	resource uint32
}

// checker looks at all records of a view.
type checker struct {
	*view
	Checked
	report func(string)
	seen   map[*resource]*lifetime // by the chunks

	batch  *pebble.Batch        // where Repair drops what cannot be read; nil: it is Verify
	states map[*resource]*state // of Repair
	hours  map[hourResource]bool
	rolled rolledCheck

	damaged bool // files are: there are records that cannot be told one from the other
}

// rolledCheck collects the points of a series' hour, whose chunks are
// neighbours.
type rolledCheck struct {
	hour            hour
	meter, resource uint32
	points          []point
}

func (c *checker) problem(key []byte, format string, args ...any) {
	c.Problems++
	if len(key) > 0 {
		format = fmt.Sprintf("record %x: ", key) + format
	}
	c.report(fmt.Sprintf(format, args...))
}

// bad is a problem of a record that cannot be read.
func (c *checker) bad(key []byte, err error) error {
	c.problem(key, "%v", err)
	if c.batch == nil {
		return nil
	}
	c.Dropped++
	return c.batch.Delete(key, nil)
}

func (c *checker) all() error {
	c.hours = map[hourResource]bool{}
	for _, step := range []func() error{c.records, c.chunks, c.rollupRecords, c.resourceStates, c.catalogueFile} {
		if err := errors.Join(step(), c.ctx.Err()); err != nil {
			return err
		}
	}
	return nil
}

// each calls check with the records of a kind. Where a file is damaged it leaves
// out the rest of that.
func (c *checker) each(kind byte, check func(k, v []byte) error) error {
	it, err := c.snap.NewIter(&pebble.IterOptions{LowerBound: []byte{kind}, UpperBound: []byte{kind + 1}})
	if err != nil {
		return err
	}
	next := []byte{kind} // after what was read
	after := func(ok bool) bool {
		for !ok {
			lost := c.skip(next, kind, it.Error())
			if lost == nil {
				break
			}
			next = lost
			ok = it.SeekGE(next)
		}
		return ok
	}
	for ok := after(it.First()); ok; ok = after(it.Next()) {
		c.Records++
		next = append(append(next[:0], it.Key()...), 0)
		v, err := it.ValueAndErr()
		if err == nil && c.Records%1024 == 0 {
			err = c.ctx.Err()
		}
		if err == nil {
			err = check(it.Key(), v)
		}
		if err != nil {
			return errors.Join(err, it.Close())
		}
	}
	return it.Close()
}

// skip takes note of what a damaged file holds of a kind from a key on, and returns
// the key after that; nil where err is no damage.
func (c *checker) skip(from []byte, kind byte, err error) []byte {
	info := pebble.ExtractDataCorruptionInfo(err)
	if info == nil {
		return nil
	}
	end := append(slices.Clone(info.Bounds.End.Key), 0)
	if bytes.Compare(end, from) <= 0 {
		return nil
	}
	if end[0] > kind {
		end = []byte{kind + 1}
	}
	c.problem(nil, "records %x to %x are in a damaged file: %v", from, end, err)
	c.damaged = true
	return end
}

// records decodes what stands for itself.
func (c *checker) records() error {
	read := func(_, _ []byte) error { return nil }
	for kind, decode := range map[byte]func(k, v []byte) error{
		keyForeign: read,
		keyDay:     read, // compared later
		keyRows:    c.rows,
		keyBatch:   func(_, v []byte) error { return (&batchInfo{}).decode(v) },
		keyBatchID: func(_, v []byte) error { return (&place{}).decode(v) },
		keySeqs: func(_, v []byte) error {
			_, err := decodeSeqSet(v)
			return err
		},
		keyEvent: func(_, v []byte) error {
			_, err := decodeEvent(v)
			return err
		},
		keyWAL: func(_, v []byte) error {
			if len(v) < 8 {
				return errCorrupt
			}
			dec, err := sample.NewDecoder()
			if err == nil {
				_, err = dec.Decode(v[8:])
			}
			return err
		},
	} {
		if err := c.each(kind, func(k, v []byte) error {
			if err := decode(k, v); err != nil {
				return c.bad(k, err)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// rows decodes the rows of a part, and its chunks where they are with them.
func (c *checker) rows(k, v []byte) error {
	if len(k) != 1+5+4+6 {
		return errCorrupt
	}
	h, res, p := readHour(k[1:]), binary.BigEndian.Uint32(k[6:]), readPart(k[10:])
	t := &c.part
	t.ok = false
	if err := t.decode(v); err != nil {
		return err
	}
	for i := range t.times {
		if t.holders[i] >= uint64(len(c.holders)) || t.metas[i] >= uint64(len(c.metas)) || t.nodes[i] >= uint64(len(c.nodes)) {
			return fmt.Errorf("%w: it names what the catalogue lacks", errCorrupt)
		}
	}
	if t.count > 0 && int(res) >= len(c.resources) {
		return fmt.Errorf("%w: it names what the catalogue lacks", errCorrupt)
	}
	t.hour, t.resource, t.part, t.ok = h, res, p, true
	kept, bad := t.rows, 0
	kept.chunks, kept.count = nil, 0
	err := t.eachChunk(h, func(m uint32, last int64, value []byte) error {
		c.rolled.hour, c.rolled.meter, c.rolled.resource = h, m, res
		err := error(errCorrupt)
		if int(m) < len(c.meters) {
			err = c.addChunk(k, value, last, p)
		}
		if err != nil {
			bad++
			c.problem(k, "meter %d: %v", m, err)
			return nil
		}
		kept.addChunk(h, m, last, value)
		return c.compare()
	})
	if err != nil || bad == 0 || c.batch == nil {
		return err
	}
	c.Dropped += int64(bad)
	if kept.count == 0 {
		return c.batch.Delete(k, nil)
	}
	return c.batch.Set(k, kept.append(nil), nil)
}

// addChunk adds the points of a chunk to those of its series' hour.
func (c *checker) addChunk(k, v []byte, last int64, p part) error {
	rc := &c.rolled
	before := len(rc.points)
	points, err := c.points(rc.points, v, rc.hour, rc.resource, p, math.MinInt64, math.MaxInt64)
	if err == nil && len(points) == before {
		err = errCorrupt
	}
	if err != nil {
		rc.points = rc.points[:before]
		return err
	}
	rc.points = points
	c.Samples += int64(len(points) - before)
	if n := points[len(points)-1].time; n != last {
		c.problem(k, "the newest sample is of %d, not of %d", n, last)
	}
	return nil
}

// chunks decodes the chunks with their rows, and compares the rollups of each
// series' hour.
func (c *checker) chunks() error {
	err := c.each(keyChunk, func(k, v []byte) error {
		h, m, res, last, p, ok := readChunkKey(k)
		if !ok || int(m) >= len(c.meters) || int(res) >= len(c.resources) {
			return c.bad(k, errCorrupt)
		}
		rc := &c.rolled
		if rc.hour != h || rc.meter != m || rc.resource != res {
			if err := c.compare(); err != nil {
				return err
			}
			rc.hour, rc.meter, rc.resource = h, m, res
		}
		if err := c.addChunk(k, v, last, p); err != nil {
			return c.bad(k, err)
		}
		return nil
	})
	return errors.Join(err, c.compare())
}

// compare checks the rollups of the series' hour that was read, and takes it
// into what is known of the resource.
func (c *checker) compare() error {
	rc := &c.rolled
	points := rc.points
	rc.points = rc.points[:0]
	if len(points) == 0 {
		return nil
	}
	byTime(points)
	m, res := c.meters[rc.meter], c.resources[rc.resource]
	l := c.seen[res]
	if l == nil {
		l = &lifetime{}
		c.seen[res] = l
	}
	l.add(points[0].time)
	l.add(points[len(points)-1].time)
	if c.batch != nil {
		c.hours[hourResource{rc.hour, rc.resource}] = true
		c.note(res, m, points)
	}
	pending, err := c.isPending(rc.hour, rc.resource)
	if err != nil || pending {
		return err
	}
	key := rollupKey(nil, rc.hour, rc.meter, rc.resource)
	value, closer, err := c.snap.Get(key)
	var r roller
	r.roll(points, m.Kind, c.holders)
	if pebble.IsCorruptionError(err) {
		c.problem(key, "the rollups of %s of %q cannot be read: %v", m.Name, res.id, err)
		return nil
	}
	if errors.Is(err, pebble.ErrNotFound) {
		c.problem(key, "there are no rollups of %s of %q", m.Name, res.id)
		return nil
	}
	if err != nil {
		return err
	}
	want := rollupNone
	if len(r.fine) <= maxRuns {
		want = r.append(nil, rc.hour, m.Kind)
	}
	if !bytes.Equal(value, want) {
		c.problem(key, "the rollups of %s of %q are not those of its samples", m.Name, res.id)
	}
	return closer.Close()
}

// rollupRecords decodes the rollups, those without samples as well, and compares
// those of days with those of their hours.
func (c *checker) rollupRecords() error {
	var r rollup
	var dr dayRollup
	var series []byte // that dr is of
	day := func(next []byte) error {
		if len(series) > 0 && !bytes.Equal(series, next) {
			if err := c.compareDay(series, &dr); err != nil {
				return err
			}
			dr.reset()
		}
		series = append(series[:0], next...)
		return nil
	}
	err := c.each(keyRollup, func(k, v []byte) error {
		if len(k) != 1+4+4+4+1 || k[13] > 23 {
			return c.bad(k, errCorrupt)
		}
		m := binary.BigEndian.Uint32(k[5:])
		if int(m) >= len(c.meters) || int(binary.BigEndian.Uint32(k[9:])) >= len(c.resources) {
			return c.bad(k, fmt.Errorf("%w: it names what the catalogue lacks", errCorrupt))
		}
		h := hourOf(readDay(k[1:]).start()) + hour(k[13])
		kind := c.meters[m].Kind
		if err := day(k[:13]); err != nil {
			return err
		}
		if isNone(v) {
			return dr.add(v, h, kind, c.holders)
		}
		if err := errors.Join(r.decodeCoarse(v, h, kind), r.decodeFine(v, h, kind)); err != nil {
			return c.bad(k, err)
		}
		if err := errors.Join(c.checkRuns(r.coarse), c.checkRuns(r.fine)); err != nil {
			return c.bad(k, err)
		}
		return dr.add(v, h, kind, c.holders)
	})
	return errors.Join(err, day(nil))
}

// compareDay checks the rollup of a series' day, if there is one. One that is
// wrong is dropped by Repair: it is not needed.
func (c *checker) compareDay(series []byte, dr *dayRollup) error {
	d, m, res := readDay(series[1:]), binary.BigEndian.Uint32(series[5:]), binary.BigEndian.Uint32(series[9:])
	key := dayKey(nil, d, m, res)
	value, closer, err := c.snap.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil
	}
	if pebble.IsCorruptionError(err) { // which is told of
		return nil
	}
	if err != nil {
		return err
	}
	defer closer.Close()
	if want, ok := dr.append(nil, d, c.meters[m].Kind); ok && bytes.Equal(value, want) {
		return nil
	}
	c.problem(key, "the rollup of the day of %s of %q is not that of its hours", c.meters[m].Name, c.resources[res].id)
	if c.batch == nil {
		return nil
	}
	return c.batch.Delete(key, nil)
}

// resourceStates compares what is known of the resources with their chunks.
func (c *checker) resourceStates() error {
	c.s.mu.RLock()
	defer c.s.mu.RUnlock()
	for r, l := range c.seen {
		st := r.flushed
		if !st.newest.has || st.newest.last != l.last || st.newest.first > l.first {
			c.problem(nil, "resource %q has samples from %d to %d, which is not what is known of it", r.id, l.first, l.last)
		}
	}
	return nil
}

// note works out what is known of a resource, for Repair. It is called by
// hour, series and time.
func (c *checker) note(res *resource, m *meter, points []point) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	st := c.states[res]
	if st == nil {
		st = &state{holders: make([]lifetime, len(res.holders))}
		c.states[res] = st
	}
	i := 0
	for i < len(res.meters) && res.meters[i] != m {
		i++
	}
	if i == len(res.meters) {
		res.meters = append(res.meters, m)
	}
	for len(st.series) < len(res.meters) {
		st.series = append(st.series, newest{})
	}
	for k := range points {
		p := &points[k]
		h := c.holders[p.holder]
		st.series[i].add(p.time, h, p.meta)
		st.newest.add(p.time, h, p.meta)
		st.holders[h.pos].add(p.time)
		h.born = min(h.born, p.time)
		res.foreign = res.foreign || p.id != sample.ID{}
	}
}

// catalogueFile asks SQLite to check its file.
func (c *checker) catalogueFile() error {
	rows, err := c.s.catalogue.db.QueryContext(c.ctx, "PRAGMA integrity_check")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var said string
		if err := rows.Scan(&said); err != nil {
			return err
		}
		if said != "ok" {
			c.problem(nil, "catalogue: %s", said)
		}
	}
	return rows.Err()
}

func sortedNumbers(list []uint32) []uint32 {
	slices.Sort(list)
	return list
}
