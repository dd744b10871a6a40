// Package notifier takes batches from the bus, verifies them, passes them
// through pipeline.yaml and acks them when every publisher has taken them.
package notifier

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// Deps is what a notifier works with.
type Deps struct {
	Log        *zap.Logger
	Consumer   bus.Consumer
	Publisher  bus.Publisher
	Keys       sample.Keys           // of the nodes, and the notifier's own
	Publishers []publisher.Scheme    // what pipeline.yaml may name
	Registry   prometheus.Registerer // nil: no metrics
}

// Notifier is the daemon.
type Notifier struct {
	cfg      Config
	deps     Deps
	log      *zap.Logger
	refusals *zap.Logger // of single batches, sampled
	pipe     *pipeline.Config
	targets  []target
	m        metrics
}

// target is a publisher with its name in metrics and errors.
type target struct {
	publisher.Publisher
	name string
}

// New reads the pipeline and opens its publishers. Whatever error it returns
// says what to change, and where.
func New(cfg Config, d Deps) (*Notifier, error) {
	n := &Notifier{cfg: cfg, deps: d, log: d.Log, m: newMetrics()}
	n.refusals = d.Log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Minute, 10, 1000)
	}))
	if err := n.m.register(d.Registry); err != nil {
		return nil, fmt.Errorf("notifier: %w", err)
	}
	data, err := os.ReadFile(cfg.Pipeline)
	switch file := cfg.Pipeline; {
	case file == "" || errors.Is(err, fs.ErrNotExist):
		if file != "" {
			n.log.Info("no pipeline file; everything goes to the store", zap.String("file", file))
		}
		n.pipe, err = pipeline.Load("the built-in pipeline", []byte(pipeline.Default))
	case err == nil:
		n.pipe, err = pipeline.Load(file, data)
	}
	if err != nil {
		return nil, err
	}
	if err := n.open(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// open opens the publishers.
func (n *Notifier) open() error {
	signs := make([]bool, len(n.pipe.Targets))
	var errs []error
	for i, t := range n.pipe.Targets {
		scheme, err := n.scheme(t.URL.Scheme)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", t.Where, err))
			continue
		}
		signs[i] = scheme.Signs
		p, err := scheme.New(t.URL, publisher.Deps{
			Log: n.log, Bus: n.deps.Publisher, Name: n.cfg.Name,
			Secret: n.deps.Keys[n.cfg.Name], Partitions: n.cfg.Partitions,
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: publisher %s: %w", t.Where, t.Name, err))
			continue
		}
		n.targets = append(n.targets, target{p, t.Name})
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if n.cfg.AllowUnsigned || len(n.deps.Keys[n.cfg.Name]) > 0 {
		return nil
	}
	for _, p := range n.pipe.Pipelines {
		for _, t := range p.Targets {
			if signs[t] && !p.Meters.All() {
				return fmt.Errorf("%s: pipeline %s passes only some meters to %s, and such batches are signed by the notifier: put a key named %s.key among the keys, here and at central",
					n.pipe.Targets[t].Where, p.Name, n.targets[t].name, n.cfg.Name)
			}
		}
	}
	return nil
}

func (n *Notifier) scheme(name string) (publisher.Scheme, error) {
	var names []string
	for _, s := range n.deps.Publishers {
		if s.Name == name {
			return s, nil
		}
		names = append(names, s.Name+"://")
	}
	return publisher.Scheme{}, fmt.Errorf("there is no publisher %s://; there are %v", name, names)
}

// Run consumes until ctx ends.
func (n *Notifier) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	partitions := max(1, n.cfg.Partitions)
	ended := make(chan error, partitions)
	for i := range partitions {
		dec, err := sample.NewDecoder()
		if err != nil {
			return err
		}
		w := &worker{
			n:        n,
			opener:   bus.Opener{Keys: n.deps.Keys, AllowUnsigned: n.cfg.AllowUnsigned, Decoder: dec},
			splitter: pipeline.NewSplitter(n.pipe, n.cfg.Name),
		}
		go func() {
			ended <- n.deps.Consumer.Consume(ctx, bus.SamplesQueue(i), max(1, n.cfg.Prefetch), w.handle)
			cancel()
		}()
	}
	var errs []error
	for range partitions {
		errs = append(errs, <-ended)
	}
	return errors.Join(errs...)
}

// Close closes the publishers. It is called after Run has returned.
func (n *Notifier) Close() error {
	var errs []error
	for _, t := range n.targets {
		if err := t.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", t.name, err))
		}
	}
	return errors.Join(errs...)
}

// worker handles the batches of one queue.
type worker struct {
	n        *Notifier
	opener   bus.Opener
	splitter *pipeline.Splitter
}

// work is the state of a delivery that was opened.
type work struct {
	parts   [][]publisher.Part // by target: what it has not taken yet
	refused error              // by a publisher, for good
}

// handle is a [bus.Handler]. Publishers that have taken a batch do not get it
// again while others fail.
func (w *worker) handle(ctx context.Context, ds []*bus.Delivery) error {
	jobs := make([]*work, 0, len(ds))
	kept := make([]*bus.Delivery, 0, len(ds))
	for _, d := range ds {
		if d.State == nil {
			w.open(d)
		}
		if job, ok := d.State.(*work); ok {
			jobs, kept = append(jobs, job), append(kept, d)
		}
	}
	errs := make([]error, len(w.n.targets))
	if len(errs) == 1 {
		errs[0] = w.publish(ctx, 0, jobs)
	} else {
		var wg sync.WaitGroup
		for t := range errs {
			wg.Go(func() { errs[t] = w.publish(ctx, t, jobs) })
		}
		wg.Wait()
	}
	for t, err := range errs {
		var refusal *publisher.Refusal
		if !errors.As(err, &refusal) {
			continue
		}
		if job := owner(jobs, t, refusal.Part); job != nil {
			job.refused = fmt.Errorf("%s: %w", w.n.targets[t].name, refusal.Err)
		}
	}
	for i, job := range jobs {
		for t, err := range errs {
			if err == nil {
				job.parts[t] = nil
			}
		}
		switch {
		case job.refused != nil:
			w.refuse(kept[i], job.refused)
		case !slices.ContainsFunc(job.parts, func(ps []publisher.Part) bool { return len(ps) > 0 }):
			kept[i].Ack()
		}
	}
	return errors.Join(errs...)
}

// open verifies a delivery and splits its batch; a bad one is rejected.
func (w *worker) open(d *bus.Delivery) {
	b, err := w.opener.Open(&d.Message)
	if err != nil {
		w.refuse(d, err)
		return
	}
	w.n.m.batches.Inc()
	w.n.m.samples.Add(float64(b.Len()))
	if d.Redelivered {
		w.n.m.redelivered.Inc()
	}
	job := &work{parts: make([][]publisher.Part, len(w.n.targets))}
	w.splitter.Split(b, func(p *pipeline.Pipeline, part *sample.Batch) {
		for _, t := range p.Targets {
			job.parts[t] = append(job.parts[t], publisher.Part{Message: &d.Message, From: b, Batch: part})
		}
	})
	d.State = job
}

// refuse moves a delivery to the dead letters.
func (w *worker) refuse(d *bus.Delivery, reason error) {
	d.Reject(reason)
	w.n.m.refused.WithLabelValues(bus.Reason(reason)).Inc()
	w.n.refusals.Warn("batch refused; it is in the dead-letter queue",
		zap.String("batch", d.ID), zap.String("key", d.KeyID), zap.Error(reason))
}

// publish gives a publisher all that it has not taken yet.
func (w *worker) publish(ctx context.Context, t int, jobs []*work) error {
	var parts []publisher.Part
	samples := 0
	for _, job := range jobs {
		for _, p := range job.parts[t] {
			samples += p.Batch.Len()
		}
		parts = append(parts, job.parts[t]...)
	}
	if len(parts) == 0 {
		return nil
	}
	name := w.n.targets[t].name
	if err := w.n.targets[t].Publish(ctx, parts); err != nil {
		w.n.m.failures.WithLabelValues(name).Inc()
		return fmt.Errorf("publisher %s: %w", name, err)
	}
	w.n.m.published.WithLabelValues(name).Add(float64(samples))
	return nil
}

// owner returns whose part a publisher's nth was, or nil.
func owner(jobs []*work, t, nth int) *work {
	for _, job := range jobs {
		if nth < len(job.parts[t]) {
			return job
		}
		nth -= len(job.parts[t])
	}
	return nil
}
