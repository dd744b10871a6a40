// Package notifier takes batches from the bus, verifies them, passes them
// through pipeline.yaml and acks them when every publisher has taken them.
package notifier

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/conversion"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/slab"
	"github.com/kvmeter/kvmeter/notifier/spool"
	"github.com/kvmeter/kvmeter/sample"
)

// Deps is what a notifier works with.
type Deps struct {
	Log        *zap.Logger
	Consumer   bus.Consumer
	Publisher  bus.Publisher
	Keys       bus.Keys              // of the nodes, and the notifier's own
	AMQP       bus.Config            // the broker of publishers that name none
	Publishers []publisher.Scheme    // what pipeline.yaml may name
	Registry   prometheus.Registerer // nil: no metrics
	// Memory and Counter are for partitions of stages: who keeps what they remember,
	// and who knows how many consumers a queue has.
	Memory  bus.RecordKeeper
	Counter interface {
		Consumers(ctx context.Context, queue string) (int, error)
	}
	// Subscribers are the brokers of OpenStack's services.
	Subscribers []bus.Subscriber
}

// Notifier is the daemon.
type Notifier struct {
	cfg      Config // as it started
	deps     Deps
	log      *zap.Logger
	refusals *zap.Logger // of single batches, sampled
	m        metrics

	// mu is held for reading while deliveries are handled, and for writing while a
	// reload puts another setup in place.
	mu        sync.RWMutex
	setup     *setup
	memory    *memory // of what sinks that look back remember, unless partitions keep it
	scatterer scatterer

	balanceEvery time.Duration
}

// New reads the pipeline and opens its publishers. Whatever error it returns
// says what to change, and where.
func New(cfg Config, d Deps) (*Notifier, error) {
	if d.Keys == nil {
		d.Keys = sample.Keys{}
	}
	n := &Notifier{cfg: cfg, deps: d, log: d.Log, m: newMetrics(), balanceEvery: balanceEvery}
	n.refusals = d.Log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Minute, 10, 1000)
	}))
	if err := n.m.register(d.Registry); err != nil {
		return nil, fmt.Errorf("notifier: %w", err)
	}
	if cfg.StagePartitions < 0 {
		return nil, fmt.Errorf("stage_partitions: %d is no number of queues; 0 keeps all state in this notifier", cfg.StagePartitions)
	}
	if cfg.StagePartitions > 0 && (d.Memory == nil || d.Counter == nil) {
		return nil, errors.New("stage_partitions: what transformers remember is kept in RabbitMQ; `kvmeter notifier` has it")
	}
	var err error
	if n.scatterer.enc, err = sample.NewEncoder(); err != nil {
		return nil, err
	}
	s, err := n.newSetup(cfg, nil)
	if err != nil {
		return nil, err
	}
	n.setup = s
	if n.memory, err = n.openMemory(s); err != nil {
		return nil, errors.Join(err, s.close(nil))
	}
	return n, nil
}

// Run consumes until ctx ends.
func (n *Notifier) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var consumers []func() error
	for i := range max(1, n.cfg.Partitions) {
		opener, err := n.newOpener()
		if err != nil {
			return err
		}
		w := &worker{n: n}
		w.open = func(d *bus.Delivery) { w.batch(opener, d) }
		consumers = append(consumers, func() error {
			return n.deps.Consumer.Consume(ctx, bus.SamplesQueue(i), max(1, n.cfg.Prefetch), w.handle)
		})
	}
	if n.cfg.Notifications.Enabled {
		for _, from := range n.deps.Subscribers {
			for _, s := range n.cfg.Notifications.subscriptions() {
				consumers = append(consumers, func() error { return n.listen(ctx, from, s) })
			}
		}
	}
	if n.cfg.StagePartitions > 0 {
		owners, err := n.owners()
		if err != nil {
			return err
		}
		consumers = append(consumers, func() error { return owners.run(ctx) })
	}
	ended := make(chan error, len(consumers))
	for _, consume := range consumers {
		go func() {
			ended <- consume()
			cancel()
		}()
	}
	var errs []error
	for range consumers {
		errs = append(errs, <-ended)
	}
	return errors.Join(errs...)
}

// newOpener returns what verifies and decodes the messages of one queue.
func (n *Notifier) newOpener() (*bus.Opener, error) {
	dec, err := sample.NewDecoder()
	if err != nil {
		return nil, err
	}
	return &bus.Opener{Keys: n.deps.Keys, Relays: append([]string{n.cfg.Name}, n.cfg.Relays...), AllowUnsigned: n.cfg.AllowUnsigned, Decoder: dec}, nil
}

// Close closes the publishers. It is called after Run has returned.
func (n *Notifier) Close() error { return errors.Join(n.setup.close(nil), n.memory.close()) }

// worker handles the batches or notifications of one queue.
type worker struct {
	n *Notifier
	// open reads a delivery and sets its State to its work, or rejects it.
	open  func(*bus.Delivery)
	owner *owner // of the queue, if that is one of a partition of stages

	// What follows from the setup at hand.
	setup     *setup
	memory    *memory
	splitter  *pipeline.Splitter
	converter *conversion.Converter // of notifications

	works  slab.Slab[work]
	dues   slab.Slab[due]
	parts  slab.Slab[publisher.Part]
	events slab.Slab[*sample.Event]
}

// work is the state of a delivery that was opened.
type work struct {
	setup   *setup
	id      sample.BatchID   // of what sinks that look back have got
	due     []due            // by target
	scatter []publisher.Part // what is for those who keep the state
	lost    error            // why they will never get some of it
}

// due is what a target has not taken yet, and why it will never take some of what
// it was given.
type due struct {
	parts   []publisher.Part
	events  []*sample.Event
	refused error
}

func (w *worker) newWork(id sample.BatchID) *work {
	job := w.works.New()
	job.setup, job.id, job.due = w.setup, id, w.dues.Take(len(w.setup.targets))
	return job
}

// move makes the work one of another setup. What is for a publisher that is there
// no more is done with.
func (job *work) move(to *setup) {
	old, from := job.due, job.setup
	job.setup, job.due = to, make([]due, len(to.targets))
	for t, target := range to.targets {
		if i := slices.Index(from.targets, target); i >= 0 {
			job.due[t] = old[i]
		}
	}
}

// renew takes over the setup at hand.
func (w *worker) renew(ctx context.Context) error {
	if w.owner != nil {
		if err := w.owner.renew(ctx); err != nil {
			return err
		}
		w.setup = w.n.setup
		return nil
	}
	if w.setup == w.n.setup {
		return nil
	}
	w.setup, w.memory = w.n.setup, w.n.memory
	w.splitter = pipeline.NewSplitter(w.memory.keeper, w.n.cfg.StagePartitions)
	if w.setup.definitions != nil {
		w.converter = conversion.NewConverter(w.setup.definitions)
	}
	return nil
}

// handle is a [bus.Handler]. Publishers that have taken what a delivery gives do
// not get it again while others fail.
func (w *worker) handle(ctx context.Context, ds []*bus.Delivery) error {
	if w.owner != nil {
		if err := w.owner.take(ctx); err != nil {
			return err
		}
	}
	w.n.mu.RLock()
	defer w.n.mu.RUnlock()
	if err := w.renew(ctx); err != nil {
		return err
	}
	jobs := make([]*work, 0, len(ds))
	kept := make([]*bus.Delivery, 0, len(ds))
	for _, d := range ds {
		if d.State == nil {
			w.open(d)
			if err := w.memory.commitMany(ctx); err != nil {
				return err
			}
		}
		if job, ok := d.State.(*work); ok {
			if job.setup != w.setup {
				job.move(w.setup)
			}
			jobs, kept = append(jobs, job), append(kept, d)
		}
	}
	// What was made of them is recorded before anybody sees it.
	if err := w.memory.commit(ctx); err != nil {
		return err
	}
	errs := make([]error, len(w.setup.targets), len(w.setup.targets)+1)
	if len(errs) == 1 {
		errs[0] = w.publish(ctx, 0, jobs)
	} else {
		var wg sync.WaitGroup
		for t := range errs {
			wg.Go(func() { errs[t] = w.publish(ctx, t, jobs) })
		}
		wg.Wait()
	}
	errs = append(errs, w.n.scatter(ctx, jobs))
	for i, job := range jobs {
		switch refused := job.refused(); {
		case !job.done():
		case refused != nil:
			w.refuse(kept[i], refused, bus.Reason(refused))
		default:
			w.memory.keeper.Taken(job.id)
			kept[i].Ack()
		}
	}
	return errors.Join(errs...)
}

// done reports whether nothing is left to publish.
func (job *work) done() bool {
	for t := range job.due {
		if len(job.due[t].parts) > 0 || len(job.due[t].events) > 0 {
			return false
		}
	}
	return len(job.scatter) == 0
}

// refused returns why some of the work will never be taken, if so.
func (job *work) refused() error {
	err := job.lost
	for t := range job.due {
		err = errors.Join(err, job.due[t].refused)
	}
	return err
}

// batch verifies a delivery and splits its batch; a bad one is rejected.
func (w *worker) batch(opener *bus.Opener, d *bus.Delivery) {
	b, err := opener.Open(&d.Message)
	if err != nil {
		w.refuse(d, err, bus.Reason(err))
		return
	}
	w.n.m.batches.Inc()
	w.n.m.samples.Add(float64(b.Len()))
	if d.Redelivered {
		w.n.m.redelivered.Inc()
	}
	job := w.newWork(b.ID)
	w.split(job, d, b, b)
	if w.setup.events != nil {
		w.n.m.events.Add(float64(w.setup.events.routeOf(&w.events, b, job)))
	}
	d.State = job
}

// split adds what the pipelines make of b to a job; from is what d carries.
func (w *worker) split(job *work, d *bus.Delivery, b, from *sample.Batch) {
	w.splitter.Split(b, func(targets []int, part *sample.Batch) {
		for _, t := range targets {
			p := publisher.Part{Message: &d.Message, From: from, Batch: part}
			if t == pipeline.Elsewhere {
				job.scatter = append(job.scatter, p)
			} else {
				given := &job.due[t].parts
				if *given == nil {
					*given = w.parts.Take(1)[:0]
				}
				*given = append(*given, p)
			}
		}
	})
}

// refuse moves a delivery to the dead letters; word is what metrics count it
// under.
func (w *worker) refuse(d *bus.Delivery, reason error, word string) {
	d.Reject(reason)
	w.n.m.refused.WithLabelValues(word).Inc()
	w.n.refusals.Warn("message refused; it is in the dead-letter queue",
		zap.String("id", d.ID), zap.String("key", d.KeyID), zap.Error(reason))
}

// publish gives a publisher all that it has not taken yet.
func (w *worker) publish(ctx context.Context, t int, jobs []*work) error {
	nParts, nEvents := 0, 0
	for _, job := range jobs {
		nParts, nEvents = nParts+len(job.due[t].parts), nEvents+len(job.due[t].events)
	}
	parts, ofParts := make([]publisher.Part, 0, nParts), make([]*work, 0, nParts) // ofParts: whose each is
	samples := 0
	for _, job := range jobs {
		for _, p := range job.due[t].parts {
			samples += p.Batch.Len()
			parts, ofParts = append(parts, p), append(ofParts, job)
		}
	}
	err := w.give(t, ofParts, samples, func() error { return w.setup.targets[t].Publish(ctx, parts) }, func(job *work) { job.due[t].parts = nil })
	events, ofEvents := make([]sample.Event, 0, nEvents), make([]*work, 0, nEvents)
	for _, job := range jobs {
		for _, e := range job.due[t].events {
			events, ofEvents = append(events, *e), append(ofEvents, job)
		}
	}
	return errors.Join(err, w.give(t, ofEvents, len(events), func() error {
		return w.setup.targets[t].Publisher.(publisher.EventPublisher).PublishEvents(ctx, events)
	}, func(job *work) { job.due[t].events = nil }))
}

// give publishes n samples or events to a target, and calls done for those whose
// they are: once they are taken, or where they are refused for good, of which each
// owner is told.
func (w *worker) give(t int, owners []*work, n int, publish func() error, done func(*work)) error {
	if len(owners) == 0 {
		return nil
	}
	name := w.setup.targets[t].name
	err := publish()
	var lost *publisher.Lost
	var refusal *publisher.Refusal
	switch {
	case errors.As(err, &lost):
		w.n.m.lost.WithLabelValues(name, spool.LostSent).Add(float64(lost.N))
		n -= lost.N
		err = nil
	case errors.As(err, &refusal):
		for i, job := range owners {
			if refusal.Part == i || refusal.Part == publisher.All {
				job.due[t].refused = errors.Join(job.due[t].refused, fmt.Errorf("%s: %w", name, refusal.Err))
				done(job)
			}
		}
	}
	if err != nil {
		w.n.m.failures.WithLabelValues(name).Inc()
		return fmt.Errorf("publisher %s: %w", name, err)
	}
	for _, job := range owners {
		done(job)
	}
	w.n.m.published.WithLabelValues(name).Add(float64(n))
	return nil
}
