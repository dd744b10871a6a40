package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
)

// Bounds of the delivery.
const (
	maxInFlight    = 64 // messages published together
	publishTimeout = 30 * time.Second
	retryFirst     = 500 * time.Millisecond
	retryLast      = 15 * time.Second
	maxGaps        = 8192 // gaps that wait for a batch, enough for 500 domains with 4 disks and 4 NICs; beyond it they become one
)

// delivery makes batches into messages and publishes them, in order, from a
// bounded queue. Adding never waits for the bus.
type delivery struct {
	log     *zap.Logger
	metrics *metrics
	pub     bus.Publisher
	node    string
	key     string // routing key
	secret  []byte
	bound   int64
	delay   time.Duration // between making and sending a batch
	epoch   uint64

	mu       sync.Mutex
	enc      *sample.Encoder
	seq      uint64
	queue    []queued
	inFlight int // at the head of the queue: being published, must stay
	bytes    int64
	gaps     []sample.Gap // for the next batch
	dropped  dropped      // for the next batch
	wake     chan struct{}
	closed   chan struct{} // closed when the agent stops
	empty    chan struct{} // closed when it stops and nothing is queued
	emptied  sync.Once
}

// queued is a message with what is lost if it is dropped.
type queued struct {
	msg      bus.Message
	after    time.Time // not to be sent earlier
	from, to int64     // µs since the epoch: what its samples tell of
	samples  []meterCount
	gaps     []sample.Gap
	dropped  dropped // the gap of earlier drops that it carries
}

type meterCount struct {
	meter string
	n     int
}

// dropped adds up the batches that were dropped since a batch last said so.
type dropped struct {
	from, to         int64
	batches, samples int
}

func (d *dropped) add(o dropped) {
	if o.batches == 0 {
		return
	}
	if d.batches == 0 {
		d.from, d.to = o.from, o.to
	}
	d.from, d.to = min(d.from, o.from), max(d.to, o.to)
	d.batches += o.batches
	d.samples += o.samples
}

func (d *dropped) gap() sample.Gap {
	return sample.Gap{
		Meter: "*", Resource: "*", From: d.from, To: d.to,
		Reason: fmt.Sprintf("%d batches with %d samples were dropped: the bus could not be reached and the agent's queue was full", d.batches, d.samples),
	}
}

func newDelivery(log *zap.Logger, m *metrics, pub bus.Publisher, cfg *Config, secret []byte, delay time.Duration) (*delivery, error) {
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	var epoch [8]byte
	_, _ = rand.Read(epoch[:]) // never fails: crypto/rand ends the program instead
	return &delivery{
		log: log, metrics: m, pub: pub, node: cfg.Node, key: bus.SamplesKey(cfg.Node, cfg.Partitions),
		secret: secret, bound: cfg.QueueBytes, delay: delay, enc: enc,
		epoch: binary.NativeEndian.Uint64(epoch[:]), wake: make(chan struct{}, 1),
		closed: make(chan struct{}), empty: make(chan struct{}),
	}, nil
}

// addGap records a gap, which goes out with the next batch.
func (d *delivery) addGap(g sample.Gap) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.metrics.gaps.Inc()
	g.From = min(g.From, g.To) // the wall clock may have been set back
	d.keepGaps(g)
}

func (d *delivery) keepGaps(gs ...sample.Gap) {
	d.gaps = append(d.gaps, gs...)
	if len(d.gaps) <= maxGaps {
		return
	}
	all := sample.Gap{Meter: "*", Resource: "*", From: d.gaps[0].From, To: d.gaps[0].To}
	for _, g := range d.gaps {
		all.From, all.To = min(all.From, g.From), max(all.To, g.To)
	}
	all.Reason = fmt.Sprintf("%d gaps could not be told apart for lack of room; one was: %s", len(d.gaps), d.gaps[0].Reason)
	d.gaps = append(d.gaps[:0], all)
}

// add queues what the builder holds as one batch and resets the builder. base
// is the batch's time and from the time of the one before it, in µs since the
// epoch.
func (d *delivery) add(b *sample.Builder, base, from int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer b.Reset()
	q := queued{after: time.Now().Add(d.delay), from: min(from, base), to: base, gaps: d.gaps, dropped: d.dropped}
	for _, g := range q.gaps {
		b.Gap(g)
	}
	if q.dropped.batches > 0 {
		b.Gap(q.dropped.gap())
	}
	batch := b.Build()
	if batch.Len() == 0 && len(batch.Gaps) == 0 {
		return
	}
	d.seq++
	batch.ID, batch.Node = sample.NewBatchID(time.Now()), d.node
	batch.Epoch, batch.Seq, batch.Base = d.epoch, d.seq, base
	q.samples = make([]meterCount, 0, len(batch.Columns))
	for i := range batch.Columns {
		c := &batch.Columns[i]
		q.samples = append(q.samples, meterCount{batch.Meters[c.Meter].Name, len(c.Values)})
	}
	body, err := d.enc.Encode(nil, batch)
	if err != nil { // of a batch within the bounds of poll: cannot happen
		d.log.Error("batch lost", zap.Error(err))
		d.drop(&q)
		return
	}
	d.gaps, d.dropped = nil, dropped{}
	q.msg = bus.Seal(d.key, batch, body, d.secret)
	d.queue = append(d.queue, q)
	d.bytes += int64(len(body))
	d.metrics.batches.Inc()
	d.metrics.samples.Add(float64(batch.Len()))
	for d.bytes > d.bound && len(d.queue) > d.inFlight+1 {
		old := d.queue[d.inFlight]
		d.queue = slices.Delete(d.queue, d.inFlight, d.inFlight+1)
		d.bytes -= int64(len(old.msg.Body))
		d.keepGaps(old.gaps...)
		d.dropped.add(old.dropped)
		d.drop(&old)
	}
	d.measure()
	d.signal()
}

// drop counts a batch that will never be sent.
func (d *delivery) drop(q *queued) {
	o := dropped{from: q.from, to: q.to, batches: 1}
	for _, m := range q.samples {
		o.samples += m.n
		d.metrics.dropped.WithLabelValues(m.meter).Add(float64(m.n))
	}
	d.dropped.add(o)
}

func (d *delivery) measure() {
	d.metrics.queueBytes.Set(float64(d.bytes))
	d.metrics.queueBatches.Set(float64(len(d.queue)))
}

func (d *delivery) signal() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// run publishes until ctx ends.
func (d *delivery) run(ctx context.Context) {
	wait := time.Duration(0)
	for {
		ms := d.next(ctx)
		if ms == nil {
			return
		}
		pctx, cancel := context.WithTimeout(ctx, publishTimeout)
		err := d.pub.Publish(pctx, ms...)
		cancel()
		d.done(len(ms), err == nil)
		if err == nil {
			if wait > 0 {
				d.log.Info("the bus can be reached again")
			}
			wait = 0
			continue
		}
		if ctx.Err() != nil {
			return
		}
		d.metrics.publishErrors.Inc()
		if wait == 0 {
			d.log.Warn("cannot publish; batches wait in memory", zap.Error(err))
		}
		wait = min(max(2*wait, retryFirst), retryLast)
		d.pause(ctx, wait/2+mathrand.N(wait/2))
	}
}

// next waits for messages that are due and returns as many as may go together,
// which stay at the head of the queue. It returns nil once ctx ends.
func (d *delivery) next(ctx context.Context) []bus.Message {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		ms, wait := d.due(time.Now())
		if ms != nil {
			return ms
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-d.wake:
		case <-timer.C:
		}
	}
}

// due returns the messages that are due, or how long to wait.
func (d *delivery) due(now time.Time) ([]bus.Message, time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ms []bus.Message
	for i := range d.queue {
		if wait := d.queue[i].after.Sub(now); wait > 0 && !d.closing() {
			if i == 0 {
				return nil, wait
			}
			break
		}
		if len(ms) == maxInFlight {
			break
		}
		ms = append(ms, d.queue[i].msg)
	}
	d.inFlight = len(ms)
	return ms, time.Hour
}

// done takes the first n messages off the queue if they were confirmed.
func (d *delivery) done(n int, confirmed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.inFlight = 0
	if confirmed {
		for i := range d.queue[:n] {
			d.bytes -= int64(len(d.queue[i].msg.Body))
		}
		d.queue = slices.Delete(d.queue, 0, n)
	}
	d.measure()
	if len(d.queue) == 0 && d.closing() {
		d.emptied.Do(func() { close(d.empty) })
	}
}

func (d *delivery) closing() bool {
	select {
	case <-d.closed:
		return true
	default:
		return false
	}
}

// pause waits before a retry, not for long once the agent is stopping.
func (d *delivery) pause(ctx context.Context, wait time.Duration) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-d.closed:
		select {
		case <-ctx.Done():
		case <-time.After(min(wait, retryFirst)):
		}
	}
}

// flush sends what is queued, due or not, and the gaps that wait, until the
// deadline of ctx, and returns how many batches were not confirmed. Nothing may
// be added any more.
func (d *delivery) flush(ctx context.Context) int {
	now := time.Now().UnixMicro()
	d.add(sample.NewBuilder(), now, now)
	d.mu.Lock()
	close(d.closed)
	if len(d.queue) == 0 {
		d.emptied.Do(func() { close(d.empty) })
	}
	d.mu.Unlock()
	d.signal()
	select {
	case <-d.empty:
	case <-ctx.Done():
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.queue)
}
