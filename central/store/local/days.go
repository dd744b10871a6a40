package local

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// fewHours is how many hours of a day a series must have rollups of for there
// to be one of the day: a long period of fewer is as quickly read by the hour.
const fewHours = 4

// merge adds the next run of the same chain, if together they are one run.
func (r *run) merge(n *run, kind sample.Kind, known bool) bool {
	if r.holder != n.holder || r.meta != n.meta || r.origin != n.origin || r.node != n.node {
		return false
	}
	switch kind {
	case sample.Cumulative:
		r.steps.Add(n.rise(r.lastVolume, r.maxVolume, known))
	case sample.Gauge:
		gap := n.first - r.last
		if gap > store.Hold.Microseconds() {
			return false
		}
		r.area.AddProduct(r.lastVolume, gap)
		r.area.Add(n.area)
	}
	r.last, r.lastVolume = n.last, n.lastVolume
	r.count += n.count
	if store.Compare(n.minVolume, r.minVolume) < 0 {
		r.minVolume = n.minVolume
	}
	if store.Compare(n.maxVolume, r.maxVolume) > 0 {
		r.maxVolume = n.maxVolume
	}
	r.sum.Add(n.sum)
	return true
}

// dayRollup makes the rollup of a series' day of those of its hours.
type dayRollup struct {
	hours int
	none  bool // an hour has no rollup
	runs  []run
	open  []openRun
	hour  rollup
}

func (dr *dayRollup) reset() {
	dr.hours, dr.none, dr.runs, dr.open = 0, false, dr.runs[:0], dr.open[:0]
}

// add takes the record of the next hour.
func (dr *dayRollup) add(value []byte, h hour, kind sample.Kind, holders []*holder) error {
	dr.hours++
	if isNone(value) {
		dr.none = true
		return nil
	}
	if err := dr.hour.decodeCoarse(value, h, kind); err != nil {
		return err
	}
	runs := dr.hour.coarse
	if len(runs) == 0 {
		if err := dr.hour.decodeFine(value, h, kind); err != nil {
			return err
		}
		runs = dr.hour.fine
	}
	for i := range runs {
		n := &runs[i]
		if int(n.holder) >= len(holders) {
			return errCorrupt
		}
		hd := holders[n.holder]
		at := slices.IndexFunc(dr.open, func(o openRun) bool {
			return o.chain == hd || o.chain.source == hd.source && o.chain.incarnation == hd.incarnation
		})
		switch {
		case at < 0:
			dr.open = append(dr.open, openRun{hd, len(dr.runs)})
		case dr.runs[dr.open[at].at].merge(n, kind, hd.incarnation != 0):
			continue
		default:
			dr.open[at].at = len(dr.runs)
		}
		dr.runs = append(dr.runs, *n)
	}
	return nil
}

// append appends the record of the day, if there is to be one.
func (dr *dayRollup) append(dst []byte, d day, kind sample.Kind) (_ []byte, ok bool) {
	if dr.none || dr.hours < fewHours || len(dr.runs) > maxRuns {
		return dst, false
	}
	dst = append(dst, rollupVersion, 0)
	return appendRuns(dst, dr.runs, hourOf(d.start()), kind, false), true
}

// rollDays rolls up the days that are over and of which all hours are.
func (s *Store) rollDays() error {
	now := s.options.Clock()
	var due []day
	if err := s.jump(keyDayDue, 4, func(k []byte) {
		if d := readDay(k); d.end() < now.Add(-rollGrace).UnixMicro() {
			due = append(due, d)
		}
	}); err != nil {
		return fmt.Errorf("find days to roll up: %w", err)
	}
	s.mu.RLock()
	due = slices.DeleteFunc(due, func(d day) bool {
		for h := range s.pending {
			if dayOf(h.start()) == d {
				return true
			}
		}
		return false
	})
	s.mu.RUnlock()
	for _, d := range due {
		select {
		case <-s.stop:
			return nil
		default:
		}
		if err := s.rollDay(d); err != nil {
			return fmt.Errorf("day %d: %w", d, err)
		}
	}
	return nil
}

// rollDay rolls up a day of the resources of which an hour was rolled up since.
func (s *Store) rollDay(d day) (err error) {
	lower, upper := appendDay([]byte{keyDayDue}, d), appendDay([]byte{keyDayDue}, d+1)
	var resources []uint32
	if err := s.scan(lower, upper, func(_, v []byte) error {
		in := reader{src: v}
		in.version()
		resources = in.numbers(resources)
		return in.done("resources of a day")
	}); err != nil {
		return err
	}
	slices.Sort(resources)
	s.mu.RLock()
	dims := s.catalogue.dimensions()
	s.mu.RUnlock()
	series := map[uint32]*pebble.Iterator{}
	defer func() {
		for _, it := range series {
			err = errors.Join(err, it.Close())
		}
	}()
	// From here on, whoever changes a rollup of an hour deletes that of the day.
	s.mu.Lock()
	s.daysRolled[d] = true
	s.mu.Unlock()
	b := s.db.NewBatch()
	if err := b.Set(dayRolledKey(d), nil, nil); err != nil {
		return err
	}
	var dr dayRollup
	var key, buf []byte
	for _, no := range slices.Compact(resources) {
		if int(no) >= len(dims.resources) {
			return errCorrupt
		}
		r := dims.resources[no]
		s.mu.RLock()
		meters := r.meters
		s.mu.RUnlock()
		for _, m := range meters {
			it := series[m.no]
			if it == nil {
				key = rollupKey(key[:0], hourOf(d.start()), m.no, 0)
				from := slices.Clone(key[:len(key)-5])
				if it, err = s.db.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: append(slices.Clip(from), 0xff, 0xff, 0xff, 0xff, 0xff)}); err != nil {
					return err
				}
				series[m.no] = it
			}
			key = rollupKey(key[:0], hourOf(d.start()), m.no, no)
			dr.reset()
			for ok := it.SeekGE(key); ok && bytes.HasPrefix(it.Key(), key[:len(key)-1]); ok = it.Next() {
				value, err := it.ValueAndErr()
				if err == nil {
					err = dr.add(value, hourOf(d.start())+hour(it.Key()[len(key)-1]), m.Kind, dims.holders)
				}
				if err != nil {
					return fmt.Errorf("%s of resource %q: %w", m.Name, r.id, err)
				}
			}
			if err := it.Error(); err != nil {
				return err
			}
			var ok bool
			if buf, ok = dr.append(buf[:0], d, m.Kind); !ok {
				continue
			}
			key = dayKey(key[:0], d, m.no, no)
			if err := b.Set(key, buf, nil); err != nil {
				return err
			}
		}
		if b.Len() < rollBytes {
			continue
		}
		if err := s.commitDay(d, b, pebble.NoSync); err != nil {
			return err
		}
		b = s.db.NewBatch()
	}
	if err := b.DeleteRange(lower, upper, nil); err != nil {
		return err
	}
	return s.commitDay(d, b, pebble.Sync)
}

// commitDay applies rollups of a day, unless the day has been dropped.
func (s *Store) commitDay(d day, b *pebble.Batch, how *pebble.WriteOptions) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.RLock()
	_, there := slices.BinarySearch(s.rolled, d)
	s.mu.RUnlock()
	if there {
		if err := s.guard(func() error { return s.db.Apply(b, how) }); err != nil {
			return err
		}
	}
	return b.Close()
}

// wholeDay takes a day's rollup of a series, if there is one that does; more are
// the hours of which there are points in the heads.
func (pc *pieces) wholeDay(t *target, d day, more []hour) (bool, error) {
	if _, there := slices.BinarySearch(pc.rolled, d); !there {
		return false, nil
	}
	if i, _ := slices.BinarySearch(more, hourOf(d.start())); i < len(more) && more[i] <= hourOf(d.end()) {
		return false, nil
	}
	pc.key = dayKey(pc.key[:0], d, t.meter.no, t.resource.no)
	it := pc.dayRollups
	// Often it is the neighbour of the one that was read last.
	found := it.Valid() && it.Next() && bytes.Equal(it.Key(), pc.key)
	if !found && (!it.SeekGE(pc.key) || !bytes.Equal(it.Key(), pc.key)) {
		return false, it.Error()
	}
	if _, err := pc.unmerged(hourOf(d.start())); err != nil {
		return false, err
	}
	for h := range pc.pending {
		if dayOf(h.start()) != d {
			continue
		}
		if pending, err := pc.isPending(h, t.resource.no); err != nil || pending {
			return false, err
		}
	}
	value, err := it.ValueAndErr()
	if err != nil {
		return false, fmt.Errorf("read rollup: %w", err)
	}
	if err := pc.rollup.decodeFine(value, hourOf(d.start()), t.meter.Kind); err != nil {
		return false, err
	}
	if !pc.fit(pc.rollup.fine) {
		return false, nil
	}
	return true, pc.take(t, pc.rollup.fine)
}
