package local

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// groupBytes bounds the bodies that are committed together.
const groupBytes = 4 << 20

// request is a call of Append or AppendEvents.
type request struct {
	ctx     context.Context
	batches []store.Received
	events  []sample.Event
	run     func() // what the committer is to do instead
	stored  []store.Stored
	err     error
	done    chan struct{} // closed when stored and err are set
}

// Append implements [store.Store].
func (s *Store) Append(ctx context.Context, batches []store.Received) ([]store.Stored, error) {
	return s.submit(&request{ctx: ctx, batches: batches, done: make(chan struct{})})
}

// submit hands a request to the committer and waits until it is done.
func (s *Store) submit(r *request) ([]store.Stored, error) {
	ctx := r.ctx
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := s.failure(); err != nil {
		return nil, err
	}
	if err := s.disk.check(); err != nil {
		return nil, err
	}
	stalled := s.disk.stalled()
	select {
	case s.requests <- r:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-stalled:
		return nil, s.disk.full()
	case <-s.failing:
		return nil, s.failure()
	case <-s.stop:
		return nil, errClosed
	}
	select {
	case <-r.done:
		return r.stored, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-stalled:
		return nil, s.disk.full()
	case <-s.failing:
		return nil, s.failure()
	case <-s.stop:
		return nil, errClosed
	}
}

// commitLoop stores the requests: those that wait while the disk syncs are
// committed together next.
func (s *Store) commitLoop() {
	for {
		var group []*request
		select {
		case r := <-s.requests:
			if r.run != nil {
				r.run()
				close(r.done)
				continue
			}
			group = append(group, r)
		case <-s.stop:
			return
		}
		size := group[0].size()
	fill:
		for size < groupBytes {
			select {
			case r := <-s.requests:
				if r.run != nil {
					r.run()
					close(r.done)
					continue
				}
				group = append(group, r)
				size += r.size()
			default:
				break fill
			}
		}
		err := s.store(group)
		for _, r := range group {
			if r.err == nil {
				r.err = err
			}
			close(r.done)
		}
	}
}

// inCommitter lets the committer do something between two commits.
func (s *Store) inCommitter(do func()) error {
	r := &request{run: do, done: make(chan struct{})}
	select {
	case s.requests <- r:
	case <-s.failing:
		return s.failure()
	case <-s.stop:
		return errClosed
	}
	select {
	case <-r.done:
		return nil
	case <-s.failing:
		return s.failure()
	case <-s.stop:
		return errClosed
	}
}

func (r *request) size() int {
	n := 0
	for _, b := range r.batches {
		n += len(b.Body)
	}
	for i := range r.events {
		n += eventBytes(&r.events[i])
	}
	return n
}

// newBatch is a batch on its way into the store.
type newBatch struct {
	*sample.Batch
	seq uint64
}

// store commits the batches of the requests in one Pebble batch and puts them
// into the head.
func (s *Store) store(group []*request) error {
	if err := s.room(); err != nil {
		return err
	}
	recorded := s.options.Clock().UnixMicro()
	w := s.db.NewBatch()
	var accepted []newBatch
	epochs := map[epoch]seqSet{}
	ids := map[sample.BatchID]bool{}
	next := s.next
	events := s.newEvents(w)
	if slices.ContainsFunc(group, func(r *request) bool { return len(r.events) > 0 }) {
		s.eventWriting.Lock()
		defer s.eventWriting.Unlock()
	}
	for _, r := range group {
		if r.err = r.ctx.Err(); r.err != nil {
			continue
		}
		r.stored = make([]store.Stored, len(r.batches)+len(r.events))
		for i := range r.events {
			var err error
			if r.stored[i], err = events.add(&r.events[i]); err != nil {
				return err
			}
		}
		for i, in := range r.batches {
			b := in.Batch
			err := store.CheckBatch(b)
			if err == nil && s.forgotten(b) {
				err = fmt.Errorf("the batch's id is of %s, when what was stored is no longer known: whether it is new can't be told", b.ID.Time().UTC().Format(time.DateOnly))
			}
			if err != nil {
				r.stored[i].Refused = err
				s.metrics.refused()
				continue
			}
			known, err := s.known(b, epochs, ids)
			if err != nil {
				return err
			}
			if known {
				r.stored[i].Duplicate = true
				s.metrics.duplicate()
				continue
			}
			if err := s.logBatch(w, next, recorded, in); err != nil {
				return err
			}
			accepted = append(accepted, newBatch{b, next})
			next++
		}
	}
	if len(accepted) == 0 && events.count == 0 {
		return nil
	}
	if err := events.finish(); err != nil {
		return err
	}
	for e, set := range epochs {
		if err := w.Set(seqsKey(e.node, e.epoch), set.append(nil), nil); err != nil {
			return err
		}
	}
	if err := s.commit(w); err != nil {
		return err
	}
	events.committed()
	s.next = next
	for e, set := range epochs {
		s.epochs[e] = set
	}
	for _, b := range accepted {
		if err := s.absorb(b.Batch, b.seq, recorded); err != nil {
			return s.fail(err)
		}
	}
	return nil
}

// known reports whether the batch is stored, and else remembers it in epochs
// or ids, which hold what this commit adds.
func (s *Store) known(b *sample.Batch, epochs map[epoch]seqSet, ids map[sample.BatchID]bool) (bool, error) {
	if b.IDs != nil {
		if ids[b.ID] {
			return true, nil
		}
		ids[b.ID] = true
		_, closer, err := s.db.Get(batchIDKey(b.ID))
		if errors.Is(err, pebble.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look up batch: %w", err)
		}
		return true, closer.Close()
	}
	e := epoch{b.Node, b.Epoch}
	set, ok := epochs[e]
	if !ok {
		set = append(seqSet(nil), s.epochs[e]...) // a copy: the commit may fail
	}
	if set.has(b.Seq) {
		return true, nil
	}
	epochs[e] = set.add(b.Seq)
	return false, nil
}

// logBatch adds the records that make the batch survive.
func (s *Store) logBatch(w *pebble.Batch, seq uint64, recorded int64, in store.Received) error {
	op := w.SetDeferred(9, 8+len(in.Body))
	copy(op.Key, walKey(seq))
	binary.BigEndian.PutUint64(op.Value, uint64(recorded))
	copy(op.Value[8:], in.Body)
	if err := op.Finish(); err != nil {
		return fmt.Errorf("store batch: %w", err)
	}
	if in.Batch.IDs == nil {
		return nil
	}
	if err := w.Set(batchIDKey(in.Batch.ID), (&place{}).append(nil), nil); err != nil {
		return fmt.Errorf("store batch: %w", err)
	}
	return nil
}

// absorb puts a batch that is on disk into the head.
func (s *Store) absorb(b *sample.Batch, seq uint64, recorded int64) error {
	hb, err := s.prepare(context.Background(), b, seq, recorded)
	if err != nil {
		return fmt.Errorf("take batch %s into memory: %w", b.ID, err)
	}
	s.publish(hb, b.Host(), b.Gaps)
	s.metrics.stored(len(hb.values))
	return nil
}

// room waits until the head has room, that is for the flusher.
func (s *Store) room() error {
	for {
		s.mu.Lock()
		full := s.active.bytes >= s.options.HeadBytes
		if full && s.frozen == nil {
			s.freeze()
			full = false
		}
		thawed, err := s.thawed, s.flushErr
		s.mu.Unlock()
		switch {
		case !full:
			return nil
		case err != nil:
			return fmt.Errorf("memory is full and cannot be flushed: %w", err)
		}
		select {
		case <-thawed:
		case <-s.failing:
			return s.failure()
		case <-s.stop:
			return errClosed
		}
	}
}

// replay reads the batches that no flush has consumed.
func (s *Store) replay(flushed uint64) error {
	s.next, s.published = flushed+1, flushed
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: walKey(flushed + 1), UpperBound: []byte{keyWAL + 1}})
	if err != nil {
		return fmt.Errorf("replay: %w", err)
	}
	defer it.Close()
	n := 0
	for ok := it.First(); ok; ok = it.Next() {
		seq := binary.BigEndian.Uint64(it.Key()[1:])
		value := it.Value()
		if len(value) < 8 {
			return fmt.Errorf("replay batch %d: %w", seq, errCorrupt)
		}
		b, err := s.decoder.Decode(value[8:])
		if err != nil && s.options.lenient {
			s.log.Error("a received batch cannot be read and is dropped", zap.Uint64("batch", seq), zap.Error(err))
			s.next = seq + 1
			continue
		}
		if err != nil {
			return fmt.Errorf("replay batch %d: %w", seq, err)
		}
		s.next = seq + 1
		if err := s.absorb(b, seq, int64(binary.BigEndian.Uint64(value))); err != nil {
			return fmt.Errorf("replay: %w", err)
		}
		if n++; s.active.bytes >= s.options.HeadBytes {
			if err := s.flushAll(); err != nil {
				return fmt.Errorf("replay: %w", err)
			}
		}
	}
	if n > 0 {
		s.log.Info("batches read again that were not flushed", zap.Int("batches", n))
	}
	return it.Error()
}
