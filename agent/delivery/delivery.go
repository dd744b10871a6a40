// Package delivery makes batches of samples into messages and publishes them.
// Each batch is synced to a spool on disk before it is sent, and leaves it when the
// bus has confirmed it. What could not be sent waits there and is sent later, at a
// bounded rate beside what is new. Where the disk fails, batches wait in memory.
//
// Three goroutines work on it (see [Delivery.Run]), none of which ever keeps a
// poll waiting: one writes to the disk, one sends what is new, and one what
// waits. Each is a loop around one step, which simulations call themselves.
package delivery

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/sample"
)

// Bounds of the delivery.
const (
	maxInFlight    = 64      // messages published together
	maxBytes       = 4 << 20 // of the spool's messages that are published together
	publishTimeout = 30 * time.Second
	retryFirst     = 500 * time.Millisecond
	retryLast      = 15 * time.Second
	maxGaps        = 8192            // gaps that wait for a batch, enough for 500 domains with 4 disks and 4 NICs; beyond it they become one
	patience       = 5 * time.Second // that a new batch waits for the disk before it is sent without
	retryDisk      = 30 * time.Second
	drainEvery     = time.Second // the least rate of the spool: a batch of it
	never          = time.Hour   // to wait when there is nothing to do but to be woken
)

// Options are what a delivery works with.
type Options struct {
	Log        *zap.Logger
	Metrics    *Metrics
	Publisher  bus.Publisher
	Node       string
	Partitions int           // of the bus
	Keys       bus.Keys      // that of the node signs; nil, or where it has none: nothing is signed
	QueueBytes int64         // bound of what waits in memory
	Delay      time.Duration // between making and sending a batch
	Interval   time.Duration // of the polls: a shorter absence is no gap
	Spool      Spool
	FS         diskqueue.FS        // of the spool; nil: the host's
	Observe    func(*sample.Batch) // gets each batch when it is made; nil: nobody does
	Wall       func() time.Time    // the wall clock, which may be set; nil: time.Now
	Now        func() time.Time    // a clock that only goes on; nil: time.Now, by its monotonic part
}

// Delivery delivers the batches of one node. Adding never waits for the bus or
// for the disk.
type Delivery struct {
	o     Options
	key   string        // routing key
	start time.Time     // by Now
	ahead time.Duration // was the wall clock at that time

	disk disk // of the goroutine that writes to the disk

	mu       sync.Mutex // no call of the spool's queue is made with it held
	enc      *sample.Encoder
	numbers  numbers
	queue    []*queued // new batches
	bytes    int64     // of those
	gaps     []sample.Gap
	losses   losses // for the next batch
	out      int    // so many at its head are being published
	draining bool   // some of the spool are
	settled  settled
	credit   float64   // bytes of the spool that may be sent
	biggest  float64   // group of new batches lately, in bytes
	drained  time.Time // when some of the spool were sent last
	spool    spoolState

	wakeDisk, wakeLive, wakeSpool chan struct{}
	closed                        chan struct{} // closed when the agent stops
	empty                         chan struct{} // closed when it stops and nothing is queued
	emptied                       sync.Once
}

// queued is a batch that was made and neither confirmed nor left to the spool.
type queued struct {
	id        sample.BatchID
	msg       bus.Message
	added     time.Time
	after     time.Time // not to be sent earlier
	from, to  int64     // µs since the epoch: what its samples tell of
	samples   []meterCount
	gaps      []sample.Gap
	losses    losses // that it tells of
	ref       diskqueue.Ref
	spooled   bool
	confirmed bool
}

type meterCount struct {
	meter string
	n     int
}

// settled is what the disk's goroutine is to be told about records of the spool.
type settled struct{ done, returned []diskqueue.Ref }

// New returns a delivery with its spool open. Trouble with the disk is no error.
func New(o Options) (*Delivery, error) {
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	if o.Wall == nil {
		o.Wall = time.Now
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Keys == nil {
		o.Keys = sample.Keys{}
	}
	if o.FS == nil {
		o.FS = diskqueue.OS{}
	}
	d := &Delivery{
		o: o, key: bus.SamplesKey(o.Node, o.Partitions), start: o.Now(), enc: enc,
		numbers:  numbers{epoch: newEpoch(), next: 1, reserved: math.MaxUint64},
		wakeDisk: make(chan struct{}, 1), wakeLive: make(chan struct{}, 1), wakeSpool: make(chan struct{}, 1),
		closed: make(chan struct{}), empty: make(chan struct{}),
	}
	d.ahead = o.Wall().Sub(d.start)
	if d.disk.dec, err = sample.NewDecoder(); err != nil {
		return nil, err
	}
	if o.Spool.Path != "" {
		d.Spool(d.now())
	}
	return d, nil
}

// numbers are what a node counts its batches by.
type numbers struct {
	epoch    uint64
	next     uint64 // seq of the next batch
	reserved uint64 // seqs below it are not given again, whatever happens
	kept     bool   // on disk
}

func newEpoch() uint64 {
	var epoch [8]byte
	_, _ = rand.Read(epoch[:]) // never fails: crypto/rand ends the program instead
	return binary.NativeEndian.Uint64(epoch[:])
}

// take returns the next number. Where the disk holds no more of them, a new epoch
// begins, so that no number is ever used twice.
func (n *numbers) take() (epoch, seq uint64) {
	if n.next >= n.reserved {
		*n = numbers{epoch: newEpoch(), next: 1, reserved: math.MaxUint64}
	}
	n.next++
	return n.epoch, n.next - 1
}

// now is the time by which the delivery waits: monotonic, whatever is done to the
// wall clock.
func (d *Delivery) now() time.Time { return d.start.Add(d.o.Now().Sub(d.start)) }

// AddGap records a gap, which goes out with the next batch.
func (d *Delivery) AddGap(g sample.Gap) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.o.Metrics.gaps.Inc()
	g.From = min(g.From, g.To) // the wall clock may have been set back
	d.keepGaps(g)
}

func (d *Delivery) keepGaps(gs ...sample.Gap) { d.gaps = boundGaps(append(d.gaps, gs...)) }

// boundGaps makes one gap of more than fit.
func boundGaps(gaps []sample.Gap) []sample.Gap {
	if len(gaps) <= maxGaps {
		return gaps
	}
	all := sample.Gap{Meter: "*", Resource: "*", From: gaps[0].From, To: gaps[0].To}
	for _, g := range gaps {
		all.From, all.To = min(all.From, g.From), max(all.To, g.To)
	}
	all.Reason = fmt.Sprintf("%d gaps could not be told apart for lack of room; one was: %s", len(gaps), gaps[0].Reason)
	return append(gaps[:0], all)
}

// Add queues what the builder holds as one batch and resets the builder. base
// is the batch's time and from the time of the one before it, in µs since the
// epoch.
func (d *Delivery) Add(b *sample.Builder, base, from int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer b.Reset()
	now := d.now()
	q := &queued{added: now, after: now.Add(d.o.Delay), from: min(from, base), to: base, gaps: d.gaps, losses: d.losses}
	for _, g := range q.gaps {
		b.Gap(g)
	}
	for _, g := range boundGaps(q.losses.gaps()) {
		b.Gap(g)
	}
	batch := b.Build()
	if batch.Len() == 0 && len(batch.Gaps) == 0 {
		return
	}
	if d.o.Observe != nil {
		d.o.Observe(batch)
	}
	q.samples = make([]meterCount, 0, len(batch.Columns))
	for i := range batch.Columns {
		c := &batch.Columns[i]
		q.samples = append(q.samples, meterCount{batch.Meters[c.Meter].Name, len(c.Values)})
	}
	msg, err := d.seal(batch, base)
	if err != nil { // of a batch within the bounds of poll: cannot happen
		d.o.Log.Error("batch lost", zap.Error(err))
		d.drop(q)
		return
	}
	d.gaps, d.losses = nil, losses{}
	q.id, q.msg = batch.ID, msg
	d.queue = append(d.queue, q)
	d.bytes += int64(len(msg.Body))
	d.o.Metrics.batches.Inc()
	d.o.Metrics.samples.Add(float64(batch.Len()))
	d.bound()
	d.measure()
	wake(d.wakeDisk)
	wake(d.wakeLive)
}

// seal numbers, encodes and signs a batch; mu is held.
func (d *Delivery) seal(batch *sample.Batch, base int64) (bus.Message, error) {
	batch.ID, batch.Node, batch.Base = sample.NewBatchID(d.o.Wall()), d.o.Node, base
	batch.Since = min(base, d.o.Wall().Add(-d.now().Sub(d.start)).UnixMicro()) // as the clock goes that may have been set
	batch.Epoch, batch.Seq = d.numbers.take()
	body, err := d.enc.Encode(nil, batch)
	if err != nil {
		return bus.Message{}, err
	}
	return bus.Seal(d.key, batch, body, d.o.Keys.Secret(d.o.Node)), nil
}

// bound drops the oldest batches that are only in memory beyond its bound, but
// for those that are being published, and the newest.
func (d *Delivery) bound() {
	for i := d.out; d.bytes > d.o.QueueBytes && i < len(d.queue)-1; {
		q := d.queue[i]
		if q.spooled {
			i++
			continue
		}
		d.remove(i)
		d.keepGaps(q.gaps...)
		d.losses.join(q.losses)
		d.drop(q)
	}
}

// remove takes a batch off the queue.
func (d *Delivery) remove(i int) {
	d.bytes -= int64(len(d.queue[i].msg.Body))
	copy(d.queue[i:], d.queue[i+1:])
	d.queue[len(d.queue)-1] = nil
	d.queue = d.queue[:len(d.queue)-1]
}

// drop counts a batch that will never be sent.
func (d *Delivery) drop(q *queued) {
	for _, m := range q.samples {
		d.o.Metrics.dropped.WithLabelValues(m.meter).Add(float64(m.n))
		d.losses.add(m.meter, lostInMemory, span{q.from, q.to, m.n})
	}
}

func (d *Delivery) measure() {
	d.o.Metrics.queueBytes.Set(float64(d.bytes))
	d.o.Metrics.queueBatches.Set(float64(len(d.queue)))
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Group is what is published together.
type Group struct {
	Messages []bus.Message
	batches  []*queued       // new ones
	refs     []diskqueue.Ref // else, of the spool
	bytes    int
}

// Live returns the new batches that are due, or how long to wait. They are to be
// settled before it is called again.
func (d *Delivery) Live(now time.Time) (*Group, time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.out > 0 || len(d.queue) == 0 {
		return nil, never
	}
	g := &Group{}
	wait := time.Duration(0)
	for _, q := range d.queue {
		if wait = d.waits(q, now); wait > 0 || len(g.batches) == maxInFlight {
			break
		}
		g.batches = append(g.batches, q)
		g.Messages = append(g.Messages, q.msg)
		g.bytes += len(q.msg.Body)
	}
	if len(g.batches) == 0 {
		return nil, wait
	}
	d.out = len(g.batches)
	return g, 0
}

// waits returns how long a new batch is not to be sent yet.
func (d *Delivery) waits(q *queued, now time.Time) time.Duration {
	wait := q.after.Sub(now)
	if d.closing() {
		wait = 0
	}
	if !q.spooled && d.spool.takes() {
		wait = max(wait, q.added.Add(patience).Sub(now))
		if wait <= 0 && !d.spool.slow {
			d.spool.slow = true
			d.o.Log.Warn("the spool's disk does not answer; batches are sent without being kept there")
		}
	}
	return wait
}

// Settle ends the publishing of a group: all of it was confirmed, or perhaps
// none of it.
func (d *Delivery) Settle(g *Group, confirmed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if g.batches == nil {
		d.draining = false
		if confirmed {
			d.credit -= float64(g.bytes)
			d.settled.done = append(d.settled.done, g.refs...)
		} else {
			d.settled.returned = append(d.settled.returned, g.refs...)
		}
		wake(d.wakeDisk)
		return
	}
	d.out = 0
	kept := d.queue[:0]
	for i, q := range d.queue {
		switch {
		case i >= len(g.batches) || !confirmed && !q.spooled:
			kept = append(kept, q)
			continue
		case q.spooled && confirmed:
			d.settled.done = append(d.settled.done, q.ref)
		case q.spooled:
			d.settled.returned = append(d.settled.returned, q.ref)
		}
		q.confirmed = confirmed
		d.bytes -= int64(len(q.msg.Body))
	}
	clear(d.queue[len(kept):])
	d.queue = kept
	if confirmed {
		allowed := d.o.Spool.Drain * float64(g.bytes)
		d.biggest = max(allowed, d.biggest*0.99)
		d.credit = min(d.credit+allowed, 2*d.biggest)
		wake(d.wakeSpool)
	}
	wake(d.wakeDisk)
	d.measure()
	if len(d.queue) == 0 && d.closing() {
		d.emptied.Do(func() { close(d.empty) })
	}
}

// Run publishes until ctx ends.
func (d *Delivery) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { d.send(ctx, d.Live, d.wakeLive, d.o.Log) })
	if d.o.Spool.Path != "" {
		wg.Go(func() { d.send(ctx, d.Backlog, d.wakeSpool, zap.NewNop()) }) // the other one says it
		wg.Go(func() { d.keep(ctx) })
	}
	wg.Wait()
}

// send publishes what next returns.
func (d *Delivery) send(ctx context.Context, next func(time.Time) (*Group, time.Duration), woken <-chan struct{}, log *zap.Logger) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	pause := time.Duration(0)
	for {
		g, wait := next(d.now())
		if g == nil {
			timer.Reset(wait)
			select {
			case <-ctx.Done():
				return
			case <-woken:
			case <-timer.C:
			}
			continue
		}
		began := time.Now()
		pctx, cancel := context.WithTimeout(ctx, publishTimeout)
		err := d.o.Publisher.Publish(pctx, g.Messages...)
		cancel()
		d.Settle(g, err == nil)
		if err == nil {
			if pause > 0 {
				log.Info("the bus can be reached again")
			}
			pause = 0
			continue
		}
		if ctx.Err() != nil {
			return
		}
		d.o.Metrics.publishErrors.Inc()
		if pause == 0 {
			log.Warn("cannot publish; batches wait", zap.Bool("on disk", d.onDisk()), zap.Error(err))
		}
		pause = min(max(2*pause, retryFirst), retryLast)
		// An attempt that took as long was pause enough: new batches waited for it.
		d.pause(ctx, pause/2+mathrand.N(pause/2)-time.Since(began))
	}
}

func (d *Delivery) onDisk() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.spool.takes()
}

func (d *Delivery) closing() bool {
	select {
	case <-d.closed:
		return true
	default:
		return false
	}
}

// pause waits before a retry, not for long once the agent is stopping.
func (d *Delivery) pause(ctx context.Context, wait time.Duration) {
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

// Flush sends what is new, due or not, and the gaps that wait, until the
// deadline of ctx, and returns how many batches were neither confirmed nor are in
// the spool. Nothing may be added any more.
func (d *Delivery) Flush(ctx context.Context) int {
	now := d.o.Wall().UnixMicro()
	d.Add(sample.NewBuilder(), now, now)
	d.mu.Lock()
	close(d.closed)
	if len(d.queue) == 0 {
		d.emptied.Do(func() { close(d.empty) })
	}
	d.mu.Unlock()
	wake(d.wakeLive)
	select {
	case <-d.empty:
	case <-ctx.Done():
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	left := 0
	for _, q := range d.queue {
		if !q.spooled {
			left++
		}
	}
	return left
}

// Take takes the new batches, so that they are never sent: for who only wants
// to see them.
func (d *Delivery) Take() []bus.Message {
	d.mu.Lock()
	defer d.mu.Unlock()
	ms := make([]bus.Message, len(d.queue))
	for i, q := range d.queue {
		ms[i] = q.msg
	}
	d.queue, d.bytes = nil, 0
	return ms
}
