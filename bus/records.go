package bus

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"
)

// Headers of the messages of a queue of records.
const (
	headerGeneration = "kvmeter-generation" // of the snapshot that the record is part of, or follows
	headerSeq        = "kvmeter-seq"        // its number there, or after it
	headerParts      = "kvmeter-parts"      // records that the snapshot has; 0: this one follows it
)

// recordsWithin is how long the broker may take to confirm records: one that has
// just come back may have lost what it was sent before its queues had leaders.
const recordsWithin = 20 * time.Second

// recordsWindow is how many records of a snapshot may be on their way.
const recordsWindow = 50

// RecordKeeper keeps the records of what partitions of stages remember.
type RecordKeeper interface {
	// Recall waits until nobody else has the records of a partition, and returns
	// them.
	Recall(ctx context.Context, partition int) (*Records, [][]byte, error)
}

// Records are those of one partition: the queue [MemoryQueue] holds a snapshot
// and what followed it. The queue has one active consumer, and records are
// written over the connection that consumes, so that nobody can write any more
// once another one reads. What was read stays unacked, and so in the queue, until
// a newer snapshot has taken its place. It is for use by one goroutine at a time.
type Records struct {
	l          *link
	key        string
	returns    chan amqp.Return
	generation int64  // of what is there
	newest     int64  // that was ever begun
	seq        int64  // of the next record after the snapshot
	acked      uint64 // the last delivery that is

	mu     sync.Mutex
	first  map[int64]uint64 // by generation: the delivery of its first record
	active bool             // something was delivered
	end    string           // the id of the message that ends what there is
	ended  bool             // it was delivered
	got    []record         // until then
	came   chan struct{}    // holds one when something was delivered
	lost   chan struct{}
	reason error // why it was lost
}

// record is one of the queue.
type record struct {
	generation, seq, parts int64
	body                   []byte
}

// Recall implements [RecordKeeper].
func (a *AMQP) Recall(ctx context.Context, partition int) (*Records, [][]byte, error) {
	retry := a.retry
	l := a.connect(ctx, &retry)
	if l == nil {
		return nil, nil, ctx.Err()
	}
	defer context.AfterFunc(ctx, l.close)() // ends what waits for the broker
	r := &Records{
		l: l, key: memoryKey(partition), returns: l.ch.NotifyReturn(make(chan amqp.Return, recordsWindow)),
		first: map[int64]uint64{}, came: make(chan struct{}, 1), lost: make(chan struct{}),
	}
	queue := MemoryQueue(partition)
	if err := r.recall(ctx, a, queue); err != nil {
		l.close()
		<-r.lost
		return nil, nil, fmt.Errorf("read the records in %s: %w", queue, cmp.Or(ctx.Err(), err))
	}
	all, missing := latest(r.got)
	if missing > 0 {
		a.log.Error("records of what transformers remember are missing; they go on without", zap.String("queue", queue), zap.Int64("records", missing))
	}
	for i := range r.got {
		r.newest = max(r.newest, r.got[i].generation)
	}
	r.got = nil
	return r, all, nil
}

// recall reads all that there is.
func (r *Records) recall(ctx context.Context, a *AMQP, queue string) error {
	lost := r.l.ch.NotifyClose(make(chan *amqp.Error, 1))
	cancelled := r.l.ch.NotifyCancel(make(chan string, 1))
	err := r.l.ch.Confirm(false)
	if err == nil {
		err = r.l.ch.Qos(math.MaxUint16, 0, false) // not 0: with quorum queues RabbitMQ takes that for 2,000
	}
	var in <-chan amqp.Delivery
	if err == nil {
		err = a.ask(r.l, queue, func() (err error) {
			in, err = r.l.ch.Consume(queue, "", false, false, false, false, nil)
			return err
		})
	}
	if err != nil {
		close(r.lost)
		return err
	}
	go r.receive(in, lost, cancelled)
	// Nobody says when this consumer becomes the active one but the first delivery.
	// Until then what is sent goes to the one before, who may still write.
	for {
		if err := r.send(ctx, amqp.Publishing{Type: typeEnd}); err != nil {
			return err
		}
		active, err := r.wait(ctx, time.Second, func() bool { return r.active })
		if err != nil {
			return err
		}
		if active {
			break
		}
	}
	// What is delivered before this comes back is all that there is.
	id := rand.Text()
	r.mu.Lock()
	r.end = id
	r.mu.Unlock()
	if err := r.send(ctx, amqp.Publishing{MessageId: id, Type: typeEnd}); err != nil {
		return err
	}
	for {
		r.mu.Lock()
		before := len(r.got)
		r.mu.Unlock()
		ended, err := r.wait(ctx, recordsWithin, func() bool { return r.ended })
		if err != nil || ended {
			return err
		}
		if r.mu.Lock(); len(r.got) == before {
			err = errors.New("the broker does not hand out what there is")
		}
		if r.mu.Unlock(); err != nil {
			return err
		}
	}
}

// typeEnd is the type of messages that are no records.
const typeEnd = "end"

// wait waits until ready says so; it gives up after a while, unless that is 0.
func (r *Records) wait(ctx context.Context, while time.Duration, ready func() bool) (bool, error) {
	var over <-chan time.Time
	if while > 0 {
		t := time.NewTimer(while)
		defer t.Stop()
		over = t.C
	}
	for {
		r.mu.Lock()
		is := ready()
		r.mu.Unlock()
		if is {
			return true, nil
		}
		select {
		case <-r.came:
		case <-over:
			return false, nil
		case <-r.lost:
			return false, r.reason
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// receive takes what is delivered, until the connection is lost.
func (r *Records) receive(in <-chan amqp.Delivery, lost chan *amqp.Error, cancelled <-chan string) {
	defer close(r.lost)
	for {
		select {
		case d, ok := <-in:
			if !ok {
				r.reason = lostBy(lost)
				return
			}
			r.take(&d)
		case <-cancelled:
			r.reason = errors.New("the broker has ended it: the queue was deleted, or its node is down")
			r.l.close()
			for range in { // what the library still hands out
			}
			return
		}
		select {
		case r.came <- struct{}{}:
		default:
		}
	}
}

func (r *Records) take(d *amqp.Delivery) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.active = true
	if d.Type == typeEnd {
		r.ended = r.ended || r.end != "" && d.MessageId == r.end
		return
	}
	number := func(name string) int64 {
		n, _ := d.Headers[name].(int64)
		return n
	}
	rec := record{number(headerGeneration), number(headerSeq), number(headerParts), d.Body}
	if rec.parts > 0 && rec.seq == 0 {
		r.first[rec.generation] = d.DeliveryTag
	}
	if !r.ended {
		r.got = append(r.got, rec)
	}
}

// latest returns the newest snapshot that is whole and what followed it, and how
// many records are missing.
func latest(all []record) (bodies [][]byte, missing int64) {
	parts := map[int64]map[int64]bool{} // by generation: those that are there
	newest := int64(0)                  // nothing but what followed an empty snapshot
	for _, rec := range all {
		if rec.parts == 0 {
			continue
		}
		if parts[rec.generation] == nil {
			parts[rec.generation] = map[int64]bool{}
		}
		if parts[rec.generation][rec.seq] = true; int64(len(parts[rec.generation])) == rec.parts {
			newest = max(newest, rec.generation)
		}
	}
	var of []record
	for _, rec := range all {
		if rec.generation == newest {
			of = append(of, rec)
		}
	}
	slices.SortStableFunc(of, func(a, b record) int {
		return cmp.Or(cmp.Compare(min(b.parts, 1), min(a.parts, 1)), cmp.Compare(a.seq, b.seq)) // the snapshot first
	})
	followed := int64(0)
	for i, rec := range of {
		if i > 0 && of[i-1].seq == rec.seq && min(of[i-1].parts, 1) == min(rec.parts, 1) {
			continue // it is there twice
		}
		if rec.parts == 0 {
			missing += rec.seq - followed
			followed = rec.seq + 1
		}
		if len(rec.body) > 0 {
			bodies = append(bodies, rec.body)
		}
	}
	return bodies, missing
}

// send publishes records and returns when they are confirmed. Where the broker
// leaves it open, the connection is given up.
func (r *Records) send(ctx context.Context, ms ...amqp.Publishing) error {
	for begin := 0; begin < len(ms); begin += recordsWindow {
		var confirms []*amqp.DeferredConfirmation
		for _, m := range ms[begin:min(len(ms), begin+recordsWindow)] {
			m.DeliveryMode = amqp.Persistent
			c, err := r.l.ch.PublishWithDeferredConfirmWithContext(ctx, Exchange, r.key, true, false, m)
			if err != nil {
				return err
			}
			confirms = append(confirms, c)
		}
		within, cancel := context.WithTimeout(ctx, recordsWithin)
		defer cancel()
		for _, c := range confirms {
			ok, err := c.WaitContext(within)
			if err != nil {
				r.l.close()
				return fmt.Errorf("not confirmed by RabbitMQ: %w", err)
			}
			if !ok {
				select {
				case <-r.lost:
					return r.reason
				default:
					return errNacked
				}
			}
		}
		select {
		case <-r.returns:
			return ErrUnroutable
		default:
		}
	}
	return nil
}

func (r *Records) message(generation, seq, parts int64, body []byte) amqp.Publishing {
	return amqp.Publishing{Headers: amqp.Table{headerGeneration: generation, headerSeq: seq, headerParts: parts}, Body: body}
}

// Append adds a record and returns when it is confirmed. After an error it may
// have been added; it is added once if it is appended again.
func (r *Records) Append(ctx context.Context, record []byte) error {
	if err := r.send(ctx, r.message(r.generation, r.seq, 0, record)); err != nil {
		return err
	}
	r.seq++
	return nil
}

// Replace puts records in the place of all there are, and returns when they are
// confirmed. It comes before anything is appended. After an error what was there
// counts, unless the records are lost.
func (r *Records) Replace(ctx context.Context, records [][]byte) error {
	r.newest++
	generation := r.newest
	ms := make([]amqp.Publishing, max(1, len(records)))
	for i := range ms {
		var body []byte
		if i < len(records) {
			body = records[i]
		}
		ms[i] = r.message(generation, int64(i), int64(len(ms)), body)
	}
	if err := r.send(ctx, ms...); err != nil {
		if !errors.Is(err, errNacked) {
			r.l.close() // the snapshot may be whole
		}
		return err
	}
	r.generation, r.seq = generation, 0
	// What is unacked before the snapshot is known once that is delivered.
	delivered, err := r.wait(ctx, recordsWithin, func() bool { return r.first[generation] > 0 })
	if !delivered {
		r.l.close()
		return cmp.Or(err, errors.New("the broker does not hand out what was written"))
	}
	r.mu.Lock()
	before := r.first[generation] - 1
	clear(r.first)
	r.mu.Unlock()
	if before > r.acked {
		if err := r.l.ch.Ack(before, true); err != nil {
			return err
		}
		r.acked = before
	}
	return nil
}

// Lost is closed when the records may be another one's: they are to be recalled.
func (r *Records) Lost() <-chan struct{} { return r.lost }

// Close lets go of the records, for another one to recall.
func (r *Records) Close() error {
	r.l.close()
	<-r.lost
	return nil
}
