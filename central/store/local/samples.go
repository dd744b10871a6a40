package local

import (
	"bytes"
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// Samples implements [store.Store]. It merges the series from their newest
// samples on, and opens a series only when its newest sample may be next.
func (s *Store) Samples(ctx context.Context, f store.Filter, yield func(store.Sample) bool) (err error) {
	p, err := store.Compile(f)
	if err != nil {
		return err
	}
	v, err := s.view(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	pl := v.plan(p)
	if pl.id != nil {
		return pl.byID(yield)
	}
	targets := pl.targets(false)
	streams := make([]stream, len(targets))
	q := make(queue, len(targets))
	for i := range targets {
		streams[i].start(pl, &targets[i])
		q[i] = &streams[i]
	}
	heap.Init(&q)
	for n := 0; len(q) > 0; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		st := q[0]
		if st.ready() {
			point := &st.buf[st.pos]
			ok, err := pl.matches(st.meter, point)
			if err != nil {
				return err
			}
			if ok {
				sm, err := pl.sample(st.meter, point)
				if err != nil {
					return err
				}
				if !yield(sm) {
					return nil
				}
			}
			st.pos++
		} else if err := st.more(); err != nil {
			return err
		}
		if st.finished() {
			heap.Pop(&q)
		} else {
			heap.Fix(&q, 0)
		}
	}
	return nil
}

// byID yields the samples with the plan's id.
func (pl *plan) byID(yield func(store.Sample) bool) error {
	found, err := pl.find(sample.ParseID(pl.id.Value.(string)))
	if err != nil {
		return err
	}
	slices.SortStableFunc(found, func(a, b store.Sample) int { return cmp.Compare(b.Time, a.Time) })
	for i := range found {
		s := &found[i]
		if s.Time < pl.from || s.Time > pl.to || !pl.predicate.Match(s, store.NewDocument(s.Metadata)) {
			continue
		}
		if !yield(*s) {
			break
		}
	}
	return nil
}

// Sample implements [store.Store].
func (s *Store) Sample(ctx context.Context, id sample.ID) (_ store.Sample, err error) {
	v, err := s.view(ctx)
	if err != nil {
		return store.Sample{}, err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	found, err := v.find(id)
	if err != nil {
		return store.Sample{}, err
	}
	if len(found) == 0 {
		return store.Sample{}, store.ErrNotFound
	}
	return found[0], nil
}

// stream reads the points of one series, newest first.
type stream struct {
	*target
	pl  *plan
	buf []point // sorted from pos on
	pos int

	head   bool   // the heads are still to be read
	chunks bool   // there may be more chunks
	bound  int64  // no point of those chunks is newer
	hour   hour   // being read
	older  int    // position in the plan's hours of the next one to read, or -1
	key    []byte // of the chunk read last; empty: the hour's newest is next
}

func (s *stream) start(pl *plan, t *target) {
	s.target, s.pl, s.head, s.older = t, pl, true, len(pl.hours)-1
	s.nextHour()
	if s.chunks {
		s.bound = min(s.bound, t.state.last)
	}
}

// nextHour goes to the next older hour that may have chunks with matches.
func (s *stream) nextHour() {
	s.chunks = false
	from, to := max(s.pl.from, s.state.first), min(s.pl.to, s.state.last)
	for ; s.state.has && s.older >= 0; s.older-- {
		if h := s.pl.hours[s.older]; h.end() >= from && h.start() <= to {
			s.chunks, s.hour, s.bound, s.key = true, h, h.end(), s.key[:0]
			s.older--
			return
		}
	}
}

// unread returns a time that no point is newer than of those not in buf.
func (s *stream) unread() (t int64, ok bool) {
	switch {
	case s.head && s.chunks:
		return max(s.last, s.bound), true
	case s.head:
		return s.last, true
	}
	return s.bound, s.chunks
}

// ready reports whether the next point is known: all that may be as new is in
// buf.
func (s *stream) ready() bool {
	if s.pos == len(s.buf) {
		return false
	}
	t, ok := s.unread()
	return !ok || s.buf[s.pos].time > t
}

func (s *stream) finished() bool {
	_, ok := s.unread()
	return !ok && s.pos == len(s.buf)
}

// next returns the time of the next point, or a later one where that is not
// known yet.
func (s *stream) next() int64 {
	t, ok := s.unread()
	if s.pos < len(s.buf) && (!ok || s.buf[s.pos].time > t) {
		return s.buf[s.pos].time
	}
	return t
}

// more reads the heads or a chunk, whichever may be newer.
func (s *stream) more() error {
	s.buf = slices.Delete(s.buf, 0, s.pos)
	s.pos = 0
	if s.head && (!s.chunks || s.last >= s.bound) {
		s.buf = s.pl.headPoints(s.buf, s.resource, s.meter, s.pl.from, s.pl.to)
		s.head = false
	} else if err := s.chunk(); err != nil {
		return err
	}
	slices.SortFunc(s.buf, func(a, b point) int { return a.before(&b) })
	return nil
}

// chunk reads the next chunk and learns how new the one after it may be; of an
// hour that is not merged it reads all.
func (s *stream) chunk() error {
	if unmerged, err := s.pl.unmerged(s.hour); err != nil {
		return err
	} else if unmerged {
		h := s.hour
		s.nextHour()
		return s.pl.eachChunk(h, s.meter.no, s.resource.no, s.pl.from, s.pl.to, func(value []byte, _, _ int64, p part) (err error) {
			s.buf, err = s.pl.points(s.buf, value, h, s.resource.no, p, s.pl.from, s.pl.to)
			return err
		})
	}
	it := s.pl.chunks
	prefix := seriesKey(s.pl.end[:0], s.hour, s.meter.no, s.resource.no)
	s.pl.end = prefix
	// Keys say when a chunk ends. One that ends after the query's time may
	// begin in it, so an hour is read from its end.
	at := s.key
	if len(at) == 0 {
		at = append(append(s.pl.key[:0], prefix...), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
		s.pl.key = at
	}
	for ok := it.SeekLT(at); ok && bytes.HasPrefix(it.Key(), prefix); ok = it.Prev() {
		_, _, _, last, p, valid := readChunkKey(it.Key())
		if !valid {
			return fmt.Errorf("read chunk: %w", errCorrupt)
		}
		if last < s.pl.from {
			break
		}
		s.key = append(s.key[:0], it.Key()...)
		value, err := it.ValueAndErr()
		if err != nil {
			return fmt.Errorf("read chunk: %w", err)
		}
		length, err := chunkLength(value)
		if err != nil {
			return err
		}
		if last-length > s.pl.to {
			continue
		}
		if s.buf, err = s.pl.points(s.buf, value, s.hour, s.resource.no, p, s.pl.from, s.pl.to); err != nil {
			return err
		}
		if it.Prev() && bytes.HasPrefix(it.Key(), prefix) {
			if _, _, _, last, _, valid = readChunkKey(it.Key()); valid && last >= s.pl.from {
				s.bound = last
				return nil
			}
		}
		break
	}
	s.nextHour()
	return it.Error()
}

// queue is a heap of streams, that with the newest point first.
type queue []*stream

func (q queue) Len() int      { return len(q) }
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }

// Less puts a stream that has to read first before one that is ready at the
// same time.
func (q queue) Less(i, j int) bool {
	a, b := q[i], q[j]
	if at, bt := a.next(), b.next(); at != bt {
		return at > bt
	}
	ar, br := a.ready(), b.ready()
	if !ar || !br {
		return !ar && br
	}
	return a.buf[a.pos].before(&b.buf[b.pos]) < 0
}

// Push implements [heap.Interface].
func (q *queue) Push(x any) { *q = append(*q, x.(*stream)) }

// Pop implements [heap.Interface].
func (q *queue) Pop() any {
	last := len(*q) - 1
	s := (*q)[last]
	*q = (*q)[:last]
	return s
}
