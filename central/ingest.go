// Package central is the control plane's end of the bus: what notifiers send
// goes into the store.
package central

import (
	"context"
	"errors"
	"fmt"
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
	// Partitions is the number of queues; the program sets it from the bus's
	// configuration.
	Partitions int `yaml:"-"`
	// Prefetch is how many batches a queue may hand out before the first is
	// acked: it bounds what central holds in memory.
	Prefetch int `yaml:"prefetch"`
	// AllowUnsigned takes batches that are not signed.
	AllowUnsigned bool `yaml:"allow_unsigned"`
}

// DefaultIngestConfig returns the configuration of one central behind RabbitMQ.
func DefaultIngestConfig() IngestConfig { return IngestConfig{Partitions: 1, Prefetch: 200} }

// IngestDeps is what an ingest works with.
type IngestDeps struct {
	Log      *zap.Logger
	Consumer bus.Consumer
	Store    interface {
		// Append is [store.Store.Append].
		Append(ctx context.Context, batches []store.Received) ([]store.Stored, error)
	}
	Keys     sample.Keys           // of the nodes and the notifiers
	Registry prometheus.Registerer // nil: no metrics
}

// Ingest takes batches from the bus into the store and acks them when the
// store has synced them. Batches that can never be stored become dead letters.
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
	partitions := max(1, in.cfg.Partitions)
	ended := make(chan error, partitions)
	for i := range partitions {
		dec, err := sample.NewDecoder()
		if err != nil {
			return err
		}
		w := &ingestWorker{
			in:     in,
			opener: bus.Opener{Keys: in.deps.Keys, AllowUnsigned: in.cfg.AllowUnsigned, Decoder: dec},
			every:  groupEvery,
		}
		go func() {
			ended <- in.deps.Consumer.Consume(ctx, bus.StoreQueue(i), max(1, in.cfg.Prefetch), w.handle)
			cancel()
		}()
	}
	var errs []error
	for range partitions {
		errs = append(errs, <-ended)
	}
	return errors.Join(errs...)
}

// ingestWorker handles the batches of one queue.
type ingestWorker struct {
	in     *Ingest
	opener bus.Opener
	every  time.Duration
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
	rest := time.NewTimer(w.every - time.Since(began))
	defer rest.Stop()
	select {
	case <-rest.C:
	case <-ctx.Done():
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
		}
		d.Ack()
	}
	return nil
}

// refuse moves a delivery to the dead letters.
func (w *ingestWorker) refuse(d *bus.Delivery, reason error) {
	d.Reject(reason)
	w.in.m.refused.WithLabelValues(bus.Reason(reason)).Inc()
	w.in.refusals.Warn("batch refused; it is in the dead-letter queue",
		zap.String("batch", d.ID), zap.String("key", d.KeyID), zap.Error(reason))
}
