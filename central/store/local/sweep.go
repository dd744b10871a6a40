package local

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample"
)

// TTL says how long some series are kept. A duration is whole days of the
// samples' own time; 0: as the others, negative: for ever.
type TTL struct {
	Meters  *sample.Matcher
	Project string // of all of the resource's owners; empty: any
	Samples time.Duration
	Rollups time.Duration
}

// ttl returns how long a series' records of a kind are kept; rollups no shorter
// than samples. The caller holds the store's lock.
func (s *Store) ttl(kind byte, m *meter, r *resource) time.Duration {
	d := s.firstTTL(kind, m, r)
	if kind == keyRollup {
		d = longer(d, s.firstTTL(keyChunk, m, r))
	}
	return d
}

// firstTTL returns what the first rule that fits says of a kind.
func (s *Store) firstTTL(kind byte, m *meter, r *resource) time.Duration {
	for i := range s.options.TimeToLive {
		t := &s.options.TimeToLive[i]
		d := t.of(kind)
		if d == 0 || !t.Meters.Match(m.Name) {
			continue
		}
		if t.Project == "" || !slices.ContainsFunc(r.holders, func(h *holder) bool { return h.project != t.Project }) {
			return d
		}
	}
	return s.retention(kind)
}

func (t *TTL) of(kind byte) time.Duration {
	if kind == keyRollup {
		return t.Rollups
	}
	return t.Samples
}

func (s *Store) retention(kind byte) time.Duration {
	if kind == keyRollup {
		return s.options.RollupRetention
	}
	return s.options.Retention
}

// longer returns the longer of two times to live, of which negative ones are
// for ever.
func longer(a, b time.Duration) time.Duration {
	if a < 0 || b < 0 {
		return -1
	}
	return max(a, b)
}

// ttls returns all times to live of a kind.
func (s *Store) ttls(kind byte) map[time.Duration]bool {
	all := map[time.Duration]bool{}
	for _, k := range []byte{kind, keyChunk} { // rollups may be kept as samples are
		all[s.retention(k)] = true
		for i := range s.options.TimeToLive {
			if d := s.options.TimeToLive[i].of(k); d != 0 {
				all[d] = true
			}
		}
	}
	return all
}

// longest returns how long any series' records of a kind are kept; negative:
// for ever.
func (s *Store) longest(kind byte) time.Duration {
	d := time.Duration(0)
	for of := range s.ttls(kind) {
		d = longer(d, of)
	}
	return d
}

// lastDay returns the last day that is past a time to live.
func (s *Store) lastDay(ttl time.Duration) day {
	return dayOf(s.options.Clock().Add(-ttl).UnixMicro()) - 1
}

// sweep deletes the records of series that are kept for a shorter time than
// others. What is kept longest is dropped by whole days.
func (s *Store) sweep() error {
	s.rolling.Lock() // merging would bring back what is deleted here
	defer s.rolling.Unlock()
	for _, kind := range []byte{keyChunk, keyRollup} {
		longest := s.longest(kind)
		for ttl := range s.ttls(kind) {
			if ttl < 0 || ttl == longest {
				continue
			}
			if err := s.sweepKind(kind, ttl); err != nil {
				return fmt.Errorf("delete what is kept for %s: %w", ttl, err)
			}
		}
	}
	return nil
}

func (s *Store) sweepKind(kind byte, ttl time.Duration) error {
	through := s.lastDay(ttl)
	swept := day(math.MinInt32)
	v, closer, err := s.db.Get(sweptKey(kind, ttl))
	switch {
	case errors.Is(err, pebble.ErrNotFound):
	case err != nil:
		return err
	default:
		r := reader{src: v}
		swept = day(r.varint())
		if err := errors.Join(r.done("day that is swept"), closer.Close()); err != nil {
			return err
		}
	}
	if through <= swept {
		return nil
	}
	s.mu.RLock()
	dims := s.catalogue.dimensions()
	var ranges [][2][]byte
	var late []hour
	if kind == keyChunk {
		for _, h := range s.hours {
			if d := dayOf(h.start()); d > swept && d <= through {
				if _, pending := s.pending[h]; pending {
					late = append(late, h)
				}
				ranges = append(ranges, [2][]byte{appendHour([]byte{kind}, h), appendHour([]byte{kind}, h+1)})
			}
		}
	} else {
		for _, d := range s.rolled {
			if d > swept && d <= through {
				ranges = append(ranges, [2][]byte{appendDay([]byte{kind}, d), appendDay([]byte{kind}, d+1)})
			}
		}
	}
	s.mu.RUnlock()
	for _, h := range late {
		if err := s.rollHour(h); err != nil { // it has records of many meters
			return err
		}
	}
	w := &sweeper{s: s, batch: s.db.NewBatch(), kind: kind, ttl: ttl, dims: dims}
	for _, r := range ranges {
		if err := w.sweep(r[0], r[1]); err != nil {
			return err
		}
	}
	if kind == keyChunk && w.deleted > 0 {
		if err := w.cut(through.end()); err != nil {
			return err
		}
	}
	if err := w.batch.Set(sweptKey(kind, ttl), binary.AppendVarint(nil, int64(through)), nil); err != nil {
		return err
	}
	if err := s.commit(w.batch); err != nil {
		return err
	}
	if w.deleted > 0 {
		s.log.Info("records of series deleted that are past their time to live", zap.Duration("time to live", ttl), zap.Int("records", w.deleted))
	}
	return nil
}

// sweeper deletes the records of series with a time to live.
type sweeper struct {
	s       *Store
	batch   *pebble.Batch
	kind    byte
	ttl     time.Duration
	dims    dimensions
	deleted int
}

// sweep deletes in a range of keys, which begins an hour or a day.
func (w *sweeper) sweep(from, to []byte) error {
	at := len(from) // where the meter's number is
	gone, kept := map[hourPart]bool{}, map[hourPart]bool{}
	err := w.s.scan(from, to, func(k, _ []byte) error {
		if len(k) < at+8 {
			return errCorrupt
		}
		m, r := binary.BigEndian.Uint32(k[at:]), binary.BigEndian.Uint32(k[at+4:])
		if int(m) >= len(w.dims.meters) || int(r) >= len(w.dims.resources) {
			return errCorrupt
		}
		var of hourPart
		if w.kind == keyChunk {
			h, _, _, _, p, ok := readChunkKey(k)
			if !ok {
				return errCorrupt
			}
			of = hourPart{h, r, p}
		}
		if !w.fits(w.dims.meters[m], w.dims.resources[r]) {
			kept[of] = true
			return nil
		}
		gone[of] = true
		w.deleted++
		if w.kind == keyRollup {
			if err := w.batch.Delete(dayKey(nil, readDay(k[1:]), m, r), nil); err != nil {
				return err
			}
		}
		if err := w.batch.Delete(k, nil); err != nil || w.batch.Len() < rollBytes {
			return err
		}
		b := w.batch
		w.batch = w.s.db.NewBatch()
		return w.s.commit(b)
	})
	if err != nil || w.kind != keyChunk {
		return err
	}
	for p := range gone { // rows that nothing needs any more
		if !kept[p] {
			if err := w.batch.Delete(rowsKey(nil, p.hour, p.resource, p.part), nil); err != nil {
				return err
			}
		}
	}
	return nil
}

type hourPart struct {
	hour     hour
	resource uint32
	part     part
}

func (w *sweeper) fits(m *meter, r *resource) bool {
	w.s.mu.RLock()
	defer w.s.mu.RUnlock()
	return w.s.ttl(w.kind, m, r) == w.ttl
}

// cut makes the deleted samples up to end unknown.
func (w *sweeper) cut(end int64) error {
	s := w.s
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range w.dims.resources {
		old := r.flushed
		st := &state{newest: old.newest, series: slices.Clone(old.series), holders: old.holders}
		changed, left := false, false
		for i := range st.series {
			n := &st.series[i]
			if n.has && n.first <= end && s.ttl(keyChunk, r.meters[i], r) == w.ttl {
				n.cut(end)
				changed = true
			}
			left = left || n.has
		}
		if !changed {
			continue
		}
		if !left {
			st.newest, st.holders = newest{}, make([]lifetime, len(old.holders))
		}
		if err := w.batch.Set(resourceKey(nil, r.no), st.append(nil, r.last, r.meters, r.bornHolders(), r.foreign), nil); err != nil {
			return err
		}
		r.flushed = st
	}
	return nil
}

// expireRollups drops the days of rollups that are past the longest time to
// live, and what is known of resources of which nothing is left.
func (s *Store) expireRollups() error {
	ttl := s.longest(keyRollup)
	if ttl < 0 {
		return nil
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	last := s.lastDay(ttl)
	s.mu.RLock()
	some := len(s.rolled) > 0 && s.rolled[0] <= last
	var gone []*resource
	if some {
		for _, r := range s.catalogue.resources {
			if r.last <= last.end() && !r.flushed.newest.has && len(r.flushed.series) > 0 {
				gone = append(gone, r)
			}
		}
	}
	s.mu.RUnlock()
	if !some {
		return nil
	}
	b := s.db.NewBatch()
	var err error
	for kind, end := range map[byte]day{keyRollup: last + 1, keyDayDue: last + 1, keyDayRolled: last + 1, keyDay: (last + 1) &^ (daysOfBlock - 1)} {
		err = errors.Join(err, b.DeleteRange([]byte{kind}, appendDay([]byte{kind}, end), nil))
	}
	for _, r := range gone {
		err = errors.Join(err, b.Delete(resourceKey(nil, r.no), nil))
	}
	if err == nil {
		err = s.commit(b)
	}
	if err != nil {
		return fmt.Errorf("drop rollups: %w", err)
	}
	s.mu.Lock()
	s.rolled = slices.DeleteFunc(slices.Clone(s.rolled), func(d day) bool { return d <= last })
	maps.DeleteFunc(s.daysRolled, func(d day, _ bool) bool { return d <= last })
	s.mu.Unlock()
	s.log.Info("rollups dropped", zap.Int64("through day", int64(last)))
	return nil
}

// collect forgets the metadata that neither samples nor rollups have any more,
// and the gaps from before all of them.
func (s *Store) collect() error {
	samples, rollups := s.longest(keyChunk), s.longest(keyRollup)
	if samples < 0 || rollups < 0 {
		return nil
	}
	s.collecting.Lock()
	defer s.collecting.Unlock()
	last := s.lastDay(max(samples, rollups))
	var gone []uint32
	// The committer gives the numbers out, so it takes them back: no sample that
	// comes now gets one that is being collected.
	err := s.inCommitter(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		c := s.catalogue
		if !c.save.TryLock() { // it is being written: there is another time
			return
		}
		defer c.save.Unlock()
		for no, d := range c.used[:c.saved.metas] {
			if d > math.MinInt32 && d <= last && no > 0 && len(c.metas[no]) > 0 {
				gone = append(gone, uint32(no))
			}
		}
		if len(gone) == 0 {
			return
		}
		c.metas = slices.Clone(c.metas) // readers keep the old list
		for _, no := range gone {
			delete(c.byMeta, metaKey(c.metas[no]))
			c.metas[no] = nil
		}
	})
	if err != nil {
		return nil // the store is being closed, or has failed: there is another time
	}
	b := s.db.NewBatch()
	for _, no := range gone {
		err = errors.Join(err, b.Delete(metaUsedKey(no), nil))
	}
	if err == nil && len(gone) > 0 {
		err = s.commit(b)
	}
	if err == nil {
		err = s.catalogue.collect(gone, last.end())
	}
	if err != nil {
		return fmt.Errorf("collect metadata: %w", err)
	}
	if len(gone) > 0 {
		s.log.Info("versions of metadata forgotten", zap.Int("versions", len(gone)))
	}
	return nil
}
