package local

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample"
)

// expire drops the days that ended before the retention.
func (s *Store) expire() error {
	retention := s.longest(keyChunk)
	if retention < 0 {
		return nil
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	cutoff := s.options.Clock().Add(-retention)
	s.mu.RLock()
	hours := s.hours
	s.mu.RUnlock()
	last := dayOf(cutoff.UnixMicro()) - 1
	keep := 0
	for keep < len(hours) && hours[keep].end() <= last.end() {
		keep++
	}
	if keep == 0 {
		return nil
	}
	b := s.db.NewBatch()
	idsSince := cutoff.Add(-idsKept).UnixMilli()
	if err := s.dropDays(b, last, idsSince); err != nil {
		return fmt.Errorf("drop days: %w", err)
	}
	states, err := s.forget(b, hours[keep:], last.end())
	if err != nil {
		return fmt.Errorf("drop days: %w", err)
	}
	if err := s.commit(b); err != nil {
		return fmt.Errorf("drop days: %w", err)
	}
	s.idsSince.Store(idsSince)
	s.mu.Lock()
	s.hours = slices.DeleteFunc(slices.Clone(s.hours), func(h hour) bool { return h.end() <= last.end() })
	for r, st := range states {
		r.flushed = st
	}
	s.mu.Unlock()
	s.log.Info("samples dropped", zap.Int("hours", keep), zap.Time("before", cutoff.UTC()))
	return nil
}

// idsKept is how much longer than samples the ids of batches are known.
const idsKept = 48 * time.Hour

// idsMark is the id that is kept where those of before a time were dropped: no batch
// has it, since it is of no version.
func idsMark(ms int64) (id sample.BatchID) {
	binary.BigEndian.PutUint64(id[:], uint64(ms)<<16)
	return id
}

// loadIDs finds out up to when ids of batches were dropped.
func (s *Store) loadIDs() error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{keyBatchID}, UpperBound: []byte{keyBatchID + 1}})
	if err != nil {
		return err
	}
	var id sample.BatchID
	if it.First() && len(it.Key()) == 1+len(id) {
		copy(id[:], it.Key()[1:])
		if ms := id.Time().UnixMilli(); id == idsMark(ms) {
			s.idsSince.Store(ms)
		}
	}
	return it.Close()
}

// forgotten reports whether a batch is of before the ids that are known, so that it
// can't be told whether it was stored before. One with a number is always known.
func (s *Store) forgotten(b *sample.Batch) bool {
	return b.IDs != nil && b.ID.Time().UnixMilli() < s.idsSince.Load()
}

// dropDays deletes the records of the days up to last, and the ids of batches that
// were made before idsSince (ms).
func (s *Store) dropDays(b *pebble.Batch, last day, idsSince int64) error {
	var errs []error
	for _, kind := range []byte{keyChunk, keyRows, keyPending} {
		errs = append(errs, b.DeleteRange([]byte{kind}, appendHour([]byte{kind}, hourOf(last.end())+1), nil))
	}
	for _, kind := range []byte{keyBatch, keyForeign} {
		end := []byte{kind + 1}
		if last < 1<<31-1 {
			end = appendDay([]byte{kind}, last+1)
		}
		errs = append(errs, b.DeleteRange([]byte{kind}, end, nil))
	}
	if idsSince > 0 {
		mark := batchIDKey(idsMark(idsSince))
		errs = append(errs, b.DeleteRange([]byte{keyBatchID}, mark, nil), b.Set(mark, (&place{}).append(nil), nil))
	}
	return errors.Join(errs...)
}

// forget returns what is known of the resources without the samples up to end,
// and writes it. Where an oldest sample is gone the hours that stay are read for
// the next one.
func (s *Store) forget(b *pebble.Batch, hours []hour, end int64) (map[*resource]*state, error) {
	states := map[*resource]*state{}
	open := map[*holder]bool{} // their oldest sample is to be found
	s.mu.RLock()
	dims := s.catalogue.dimensions()
	for _, r := range dims.resources {
		st := r.flushed
		if !st.newest.has || st.newest.first > end {
			continue
		}
		n := &state{newest: st.newest, series: slices.Clone(st.series), holders: slices.Clone(st.holders)}
		n.newest.cut(end)
		for i := range n.series {
			n.series[i].cut(end)
		}
		for i := range n.holders {
			switch h := &n.holders[i]; {
			case h.has && h.last <= end:
				*h = lifetime{}
			case h.has && h.first <= end:
				h.first = h.last
				open[r.holders[i]] = true
			}
		}
		states[r] = n
	}
	s.mu.RUnlock()
	for _, d := range hours {
		if len(open) == 0 {
			break
		}
		if err := s.oldest(d, dims.holders, states, open); err != nil {
			return nil, err
		}
	}
	for r, n := range states {
		s.mu.RLock()
		meters, born, foreign, last := r.meters, r.bornHolders(), r.foreign, r.last
		s.mu.RUnlock()
		if err := b.Set(resourceKey(nil, r.no), n.append(nil, last, meters, born, foreign), nil); err != nil {
			return nil, err
		}
	}
	return states, nil
}

// cut removes the samples up to end. The oldest one that stays is not known;
// it is later than that.
func (n *newest) cut(end int64) {
	if !n.has {
		return
	}
	if n.last <= end {
		*n = newest{}
		return
	}
	n.first = max(n.first, end+1)
}

// oldest finds the oldest samples of the open holders in an hour's rows.
func (s *Store) oldest(h hour, holders []*holder, states map[*resource]*state, open map[*holder]bool) error {
	var t rows
	found := map[*holder]bool{}
	err := s.scan(appendHour([]byte{keyRows}, h), appendHour([]byte{keyRows}, h+1), func(_, v []byte) error {
		if err := t.decode(v); err != nil {
			return err
		}
		for i, no := range t.holders {
			if no >= uint64(len(holders)) {
				return errCorrupt
			}
			h := holders[no]
			if st := states[h.resource]; st != nil && open[h] {
				l := &st.holders[h.pos]
				l.first = min(l.first, int64(t.times[i]))
				found[h] = true
			}
		}
		return nil
	})
	for h := range found {
		delete(open, h)
	}
	return err
}
