// Package central is the control plane's end of the bus: what notifiers send
// goes into the store.
package central

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// A group of batches is stored, and synced, at once: as many as wait, up to
// groupSamples and about as many more as the last batch has. When fewer wait
// the next group begins groupEvery after this one did, so that a busy bus with
// small batches costs 20 syncs a second and a quiet one waits for nothing.
const (
	groupSamples = 10_000
	groupEvery   = 50 * time.Millisecond
)

// IngestConfig is the part of central.yaml about the bus.
type IngestConfig struct {
	// Name is central's node name and the id of its key, with which it signs
	// samples that were sent to the API on their way to the pipelines. Default:
	// the host's name.
	Name string `yaml:"name"`
	// Partitions is the number of queues; the program sets it from the bus's
	// configuration.
	Partitions int `yaml:"-"`
	// Prefetch is how many batches a queue may hand out before the first is
	// acked: it bounds what central holds in memory.
	Prefetch int `yaml:"prefetch"`
	// AllowUnsigned takes batches that are not signed.
	AllowUnsigned bool `yaml:"allow_unsigned"`
	// Relays are the names whose keys may sign what is made of other nodes'
	// batches, and events: those of the notifiers. Each other key speaks for its own
	// node only.
	Relays []string `yaml:"relays"`
}

// DefaultIngestConfig returns the configuration of one central behind RabbitMQ.
func DefaultIngestConfig() IngestConfig {
	host, err := os.Hostname()
	if err != nil {
		host = "central"
	}
	return IngestConfig{Name: host, Partitions: 1, Prefetch: 200, Relays: []string{}}
}

// IngestDeps is what an ingest works with.
type IngestDeps struct {
	Log      *zap.Logger
	Consumer bus.Consumer
	Store    interface {
		// Append is [store.Store.Append].
		Append(ctx context.Context, batches []store.Received) ([]store.Stored, error)
		// AppendEvents is [store.Events.AppendEvents].
		AppendEvents(ctx context.Context, events []sample.Event) ([]store.Stored, error)
	}
	Keys     bus.Keys              // of the nodes and the notifiers; nil: there are none
	Registry prometheus.Registerer // nil: no metrics
}

// Ingest takes batches and events from the bus into the store and acks them when
// the store has synced them. What can never be stored becomes a dead letter.
// While the store fails, for want of space or otherwise, nothing is acked and
// the bus keeps what comes.
type Ingest struct {
	cfg      IngestConfig
	deps     IngestDeps
	refusals *zap.Logger // of single batches, sampled
	m        ingestMetrics
}

// NewIngest returns an ingest that is not running yet.
func NewIngest(cfg IngestConfig, d IngestDeps) (*Ingest, error) {
	if d.Keys == nil {
		d.Keys = sample.Keys{}
	}
	in := &Ingest{cfg: cfg, deps: d, m: newIngestMetrics()}
	in.refusals = d.Log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Minute, 10, 1000)
	}))
	if err := in.m.register(d.Registry); err != nil {
		return nil, fmt.Errorf("ingest: %w", err)
	}
	return in, nil
}

// Run consumes until ctx ends.
func (in *Ingest) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	handlers := map[string]bus.Handler{} // by queue
	for i := range max(1, in.cfg.Partitions) {
		w, err := in.worker()
		if err != nil {
			return err
		}
		handlers[bus.StoreQueue(i)] = w.handle
	}
	w, err := in.worker()
	if err != nil {
		return err
	}
	handlers[bus.EventsQueue] = w.handleEvents
	ended := make(chan error, len(handlers))
	for queue, handle := range handlers {
		go func() {
			ended <- in.deps.Consumer.Consume(ctx, queue, max(1, in.cfg.Prefetch), handle)
			cancel()
		}()
	}
	var errs []error
	for range handlers {
		errs = append(errs, <-ended)
	}
	return errors.Join(errs...)
}

func (in *Ingest) worker() (*ingestWorker, error) {
	dec, err := sample.NewDecoder()
	if err != nil {
		return nil, err
	}
	return &ingestWorker{
		in:     in,
		opener: bus.Opener{Keys: in.deps.Keys, Relays: append([]string{in.cfg.Name}, in.cfg.Relays...), AllowUnsigned: in.cfg.AllowUnsigned, Decoder: dec},
		every:  groupEvery,
	}, nil
}

// ingestWorker handles the batches or events of one queue.
type ingestWorker struct {
	in     *Ingest
	opener bus.Opener
	every  time.Duration
	epochs epochs
}

// handle is a [bus.Handler].
func (w *ingestWorker) handle(ctx context.Context, ds []*bus.Delivery) error {
	began := time.Now()
	var group []*bus.Delivery
	samples := 0
	for _, d := range ds {
		b := w.open(d)
		if b == nil {
			continue
		}
		group = append(group, d)
		if samples += b.Len(); samples >= groupSamples {
			if err := w.store(ctx, group); err != nil {
				return err
			}
			group, samples = group[:0], 0
		}
	}
	if len(group) == 0 {
		return nil
	}
	if err := w.store(ctx, group); err != nil {
		return err
	}
	w.rest(ctx, began)
	return nil
}

// rest spaces groups that are small.
func (w *ingestWorker) rest(ctx context.Context, began time.Time) {
	rest := time.NewTimer(w.every - time.Since(began))
	defer rest.Stop()
	select {
	case <-rest.C:
	case <-ctx.Done():
	}
}

// groupEvents is how many events are stored at once, and those of the last
// message.
const groupEvents = 2000

// handleEvents is a [bus.Handler].
func (w *ingestWorker) handleEvents(ctx context.Context, ds []*bus.Delivery) error {
	began := time.Now()
	var group []*bus.Delivery
	var events []sample.Event
	for _, d := range ds {
		of, ok := d.State.([]sample.Event)
		if !ok {
			var err error
			if of, err = w.opener.OpenEvents(&d.Message); err != nil {
				w.refuse(d, err)
				continue
			}
			d.State = of
		}
		group, events = append(group, d), append(events, of...)
		if len(events) >= groupEvents {
			if err := w.storeEvents(ctx, group, events); err != nil {
				return err
			}
			group, events = group[:0], events[:0]
		}
	}
	if len(group) == 0 {
		return nil
	}
	if err := w.storeEvents(ctx, group, events); err != nil {
		return err
	}
	w.rest(ctx, began)
	return nil
}

// storeEvents appends the events of a group to the store and settles its
// deliveries. One of which an event can never be stored is rejected; its others
// are stored.
func (w *ingestWorker) storeEvents(ctx context.Context, group []*bus.Delivery, events []sample.Event) error {
	stored, err := w.in.deps.Store.AppendEvents(ctx, events)
	if err != nil {
		w.in.m.failures.Inc()
		return fmt.Errorf("store events: %w", err)
	}
	for _, d := range group {
		n := len(d.State.([]sample.Event))
		var refused []error
		for i := range stored[:n] {
			switch s := &stored[i]; {
			case s.Refused != nil:
				refused = append(refused, s.Refused)
			case s.Duplicate:
				w.in.m.duplicateEvents.Inc()
			default:
				w.in.m.events.Inc()
			}
		}
		stored = stored[n:]
		if len(refused) > 0 {
			w.refuse(d, errors.Join(refused...))
			continue
		}
		d.Ack()
	}
	return nil
}

// open returns the batch of a delivery, or nil where that is bad and was
// rejected.
func (w *ingestWorker) open(d *bus.Delivery) *sample.Batch {
	if b, ok := d.State.(*sample.Batch); ok {
		return b
	}
	b, err := w.opener.Open(&d.Message)
	if err != nil {
		w.refuse(d, err)
		return nil
	}
	d.State = b
	return b
}

// store appends a group to the store and settles its deliveries.
func (w *ingestWorker) store(ctx context.Context, group []*bus.Delivery) error {
	batches := make([]store.Received, len(group))
	for i, d := range group {
		batches[i] = store.Received{Body: d.Body, Batch: d.State.(*sample.Batch)}
	}
	began := time.Now()
	stored, err := w.in.deps.Store.Append(ctx, batches)
	if err != nil {
		w.in.m.failures.Inc()
		return fmt.Errorf("store: %w", err)
	}
	w.in.m.seconds.Observe(time.Since(began).Seconds())
	for i, d := range group {
		switch s := &stored[i]; {
		case s.Refused != nil:
			w.refuse(d, s.Refused)
			continue
		case s.Duplicate:
			w.in.m.duplicates.Inc()
		default:
			w.in.m.batches.Inc()
			w.in.m.samples.Add(float64(batches[i].Batch.Len()))
			w.watch(batches[i].Batch)
		}
		d.Ack()
	}
	return nil
}

// refuse moves a delivery to the dead letters.
func (w *ingestWorker) refuse(d *bus.Delivery, reason error) {
	d.Reject(reason)
	w.in.m.refused.WithLabelValues(bus.Reason(reason)).Inc()
	w.in.refusals.Warn("message refused; it is in the dead-letter queue",
		zap.String("id", d.ID), zap.String("key", d.KeyID), zap.Error(reason))
}
