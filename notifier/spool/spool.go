// Package spool stands between the notifier and a publisher: what the publisher
// does not take at once waits on disk, so that one that is slow or dead holds up
// nobody else.
package spool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// Options are what a spool is told.
type Options struct {
	Dir      string // its own folder
	MaxBytes int64  // on disk; the oldest is dropped beyond it
	Policy   publisher.Policy
	Log      *zap.Logger
	Counters Counters
	// Patience is how long the publisher may take while its callers wait; 0: 1 s.
	Patience time.Duration
	// Retry is the longest pause between attempts; 0: 15 s.
	Retry time.Duration
}

// Counters are told what happens.
type Counters interface {
	Spooled(n int)              // samples or events that had to wait
	Lost(reason string, n int)  // that will never be published
	Waiting(bytes, since int64) // bytes on disk, and since when: µs since the Unix epoch
}

// Why something is lost.
const (
	LostFull    = "full"    // the spool, or the queue of the policy queue
	LostPolicy  = "policy"  // policy=drop
	LostRefused = "refused" // the receiver finds it wrong
	LostSent    = "sent"    // a publisher that is best effort could not send it
	LostBroken  = "broken"  // the spool's file is damaged
)

// Kinds of the spool's records: what was given to the publisher at once.
const (
	ofSamples byte = 1 // a batch
	ofEvents  byte = 2 // a JSON list of events
)

// Spool is a publisher that takes everything. It is safe for concurrent use.
type Spool struct {
	to  publisher.Publisher
	o   Options
	enc *sample.Encoder // guarded by mu
	dec *sample.Decoder // of the goroutine that empties the spool

	mu   sync.Mutex
	disk *diskqueue.Queue
	busy bool // something waits, so what comes waits behind it

	wake    chan struct{}
	cancel  context.CancelFunc
	running sync.WaitGroup
}

// New opens the spool of a publisher, and sends what waits in it. It owns the
// publisher.
func New(to publisher.Publisher, o Options) (*Spool, error) {
	if o.Patience == 0 {
		o.Patience = time.Second
	}
	if o.Retry == 0 {
		o.Retry = 15 * time.Second
	}
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	dec, err := sample.NewDecoder()
	if err != nil {
		return nil, err
	}
	s := &Spool{to: to, o: o, enc: enc, dec: dec, wake: make(chan struct{}, 1)}
	s.disk, err = diskqueue.Open(diskqueue.Options{Dir: o.Dir, Damaged: func(d diskqueue.Damage) {
		s.lose(LostBroken, max(d.N, d.Records, 1), fmt.Errorf("%s is damaged", d.File))
	}})
	if err != nil {
		return nil, fmt.Errorf("open the spool: %w", err)
	}
	s.busy = s.disk.Stats().Records > 0
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.running.Go(func() { s.run(ctx) })
	if s.busy {
		s.notify()
	}
	return s, nil
}

// Publish implements [publisher.Publisher]. Its errors are those of the spool's
// own disk.
func (s *Spool) Publish(ctx context.Context, parts []publisher.Part) error {
	n := 0
	for i := range parts {
		n += parts[i].Batch.Len()
	}
	if s.direct(ctx, n, func(ctx context.Context) error { return s.to.Publish(ctx, parts) }) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now().UnixMicro()
	var rs []diskqueue.Record
	for i := range parts {
		if parts[i].Batch.Len() == 0 {
			continue
		}
		body, err := s.enc.Encode(nil, parts[i].Batch)
		if err != nil {
			return err
		}
		rs = append(rs, diskqueue.Record{Kind: ofSamples, Time: now, N: parts[i].Batch.Len(), Body: body})
	}
	return s.put(rs, n)
}

// PublishEvents implements [publisher.EventPublisher].
func (s *Spool) PublishEvents(ctx context.Context, events []sample.Event) error {
	to, ok := s.to.(publisher.EventPublisher)
	if !ok {
		return errors.New("this publisher takes no events")
	}
	if len(events) == 0 || s.direct(ctx, len(events), func(ctx context.Context) error { return to.PublishEvents(ctx, events) }) {
		return nil
	}
	body := []byte{'['}
	for i := range events {
		if i > 0 {
			body = append(body, ',')
		}
		body = events[i].AppendJSON(body)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.put([]diskqueue.Record{{Kind: ofEvents, Time: time.Now().UnixMicro(), N: len(events), Body: append(body, ']')}}, len(events))
}

// direct tries the publisher unless something waits already, and reports
// whether the n samples or events are done with.
func (s *Spool) direct(ctx context.Context, n int, publish func(context.Context) error) bool {
	s.mu.Lock()
	busy := s.busy
	s.mu.Unlock()
	if busy {
		return s.o.Policy.Drop && s.lose(LostPolicy, n, nil)
	}
	patient, cancel := context.WithTimeout(ctx, s.o.Patience)
	defer cancel()
	err := publish(patient)
	switch {
	case s.final(err, n):
		return true
	case s.o.Policy.Drop && ctx.Err() == nil:
		return s.lose(LostPolicy, n, err)
	}
	if ctx.Err() == nil {
		s.o.Log.Warn("the publisher does not take samples; they wait in its spool", zap.Error(err))
	}
	return false
}

// final reports whether nothing is to be sent again after an error: there was
// none, or there would be the same one. A refusal of one part of several is not
// final for the others.
func (s *Spool) final(err error, n int) bool {
	var lost *publisher.Lost
	switch {
	case err == nil:
		return true
	case errors.As(err, &lost):
		return s.lose(LostSent, lost.N, err)
	}
	var refusal *publisher.Refusal
	return errors.As(err, &refusal) && refusal.Part == publisher.All && s.lose(LostRefused, n, err)
}

// lose counts what is lost, and returns true.
func (s *Spool) lose(reason string, n int, err error) bool {
	if n > 0 {
		s.o.Counters.Lost(reason, n)
		s.o.Log.Warn("samples or events are lost to a publisher", zap.String("reason", reason), zap.Int("number", n), zap.Error(err))
	}
	return true
}

// put appends records; mu is held.
func (s *Spool) put(rs []diskqueue.Record, n int) error {
	if _, err := s.disk.Put(false, rs...); err != nil {
		return fmt.Errorf("the publisher does not answer, and neither does its spool: %w", err)
	}
	s.o.Counters.Spooled(n)
	lost := 0
	for st := s.disk.Stats(); st.Bytes > s.o.MaxBytes || s.o.Policy.MaxQueue > 0 && st.Records > s.o.Policy.MaxQueue; st = s.disk.Stats() {
		n, _ := s.disk.DropOldest() // there is one: the bounds are not negative
		lost += n
	}
	s.lose(LostFull, lost, nil)
	s.busy = true
	s.waiting()
	s.notify()
	return nil
}

// waiting tells how much waits.
func (s *Spool) waiting() {
	st := s.disk.Stats()
	s.o.Counters.Waiting(st.Bytes, st.Oldest)
}

func (s *Spool) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run empties the spool whenever something waits.
func (s *Spool) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		}
		pause := min(100*time.Millisecond, s.o.Retry)
		for {
			more, err := s.step(ctx)
			if ctx.Err() != nil || err == nil && !more {
				break
			}
			if err == nil {
				pause = min(100*time.Millisecond, s.o.Retry)
				continue
			}
			s.o.Log.Debug("the publisher still takes no samples", zap.Error(err))
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			pause = min(2*pause, s.o.Retry)
		}
	}
}

// At most so much is read of the spool at once.
const (
	readRecords = 256
	readBytes   = 1 << 20
)

// step sends the oldest that waits and reports whether there is more.
func (s *Spool) step(ctx context.Context) (more bool, err error) {
	s.mu.Lock()
	taken, err := s.disk.Take(nil, diskqueue.OldestFirst, readRecords, readBytes)
	if err == nil && len(taken) == 0 {
		s.busy = false
		s.o.Counters.Waiting(0, 0)
	}
	s.mu.Unlock()
	if len(taken) == 0 {
		return false, err
	}
	for i := range taken {
		if err := s.send(ctx, &taken[i].Record); err != nil && !s.final(err, taken[i].N) {
			return true, errors.Join(err, s.taken(taken, i))
		}
	}
	return true, s.taken(taken, len(taken))
}

// taken says that the first n of some records are done with, and gives the
// others back.
func (s *Spool) taken(all []diskqueue.Entry, n int) error {
	refs := make([]diskqueue.Ref, len(all))
	for i := range all {
		refs[i] = all[i].Ref
	}
	err := s.disk.Done(refs[:n]...)
	s.disk.Return(refs[n:]...)
	s.waiting()
	return err
}

// send publishes a record.
func (s *Spool) send(ctx context.Context, r *diskqueue.Record) error {
	const patience = time.Minute
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if r.Kind == ofEvents {
		var raw []json.RawMessage
		if err := json.Unmarshal(r.Body, &raw); err != nil {
			return &publisher.Refusal{Part: publisher.All, Err: err}
		}
		var events []sample.Event
		for _, text := range raw {
			e, err := sample.ParseEvent(text)
			if err != nil {
				return &publisher.Refusal{Part: publisher.All, Err: err}
			}
			events = append(events, e)
		}
		return s.to.(publisher.EventPublisher).PublishEvents(ctx, events)
	}
	b, err := s.dec.Decode(r.Body)
	if err != nil {
		return &publisher.Refusal{Part: publisher.All, Err: err}
	}
	err = s.to.Publish(ctx, []publisher.Part{{From: b, Batch: b}})
	var refusal *publisher.Refusal
	if errors.As(err, &refusal) {
		return &publisher.Refusal{Part: publisher.All, Err: refusal.Err} // it was one part
	}
	return err
}

// Close ends what is being sent and closes the publisher. What waits is sent
// after the next start.
func (s *Spool) Close() error {
	s.cancel()
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.disk.Close(), s.to.Close())
}
