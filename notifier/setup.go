package notifier

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/conversion"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/spool"
)

// setup is what the configuration and its files say. A reload makes a new one.
type setup struct {
	cfg     Config
	pipe    *pipeline.Config
	targets []*target    // those of pipe in its order, then those of events only
	events  *eventRoutes // nil: no events are published
	secret  string       // of Ceilometer's own forms

	definitions *conversion.Definitions // nil: no notifications are taken
	files       map[string]string       // of definitions: a digest of what is in them
}

// target is a publisher with its name in metrics and errors.
type target struct {
	publisher.Publisher
	name   string
	url    string
	events bool // it is a [publisher.EventPublisher]
	signs  bool // what it passes on needs the notifier's signature
}

// newSetup reads the files and opens the publishers, but for those that old has
// as well.
func (n *Notifier) newSetup(cfg Config, old *setup) (s *setup, err error) {
	s = &setup{cfg: cfg}
	data, err := os.ReadFile(cfg.Pipeline)
	switch file := cfg.Pipeline; {
	case file == "" || errors.Is(err, fs.ErrNotExist):
		if file != "" {
			n.log.Info("no pipeline file; everything goes to the store", zap.String("file", file))
		}
		s.pipe, err = pipeline.Load("the built-in pipeline", []byte(pipeline.Default))
	case err == nil:
		s.pipe, err = pipeline.Load(file, data)
	}
	if err != nil {
		return nil, err
	}
	if err := s.pipe.Dispatch(cfg.Dispatchers); err != nil {
		return nil, fmt.Errorf("dispatchers: %w", err)
	}
	for _, w := range s.pipe.Warnings() {
		n.log.Warn("odd in the pipeline file", zap.Error(w))
	}
	if s.events, err = n.loadEvents(cfg.EventPipeline, cfg.EventDispatchers); err != nil {
		return nil, err
	}
	if err := n.loadDefinitions(s); err != nil {
		return nil, err
	}
	if s.secret, err = cfg.TelemetrySecret(); err != nil {
		return nil, err
	}
	if err := n.open(s, old); err != nil {
		return nil, errors.Join(err, s.close(old))
	}
	return s, nil
}

// open opens the publishers.
func (n *Notifier) open(s, old *setup) error {
	var errs []error
	for _, t := range s.pipe.Targets {
		errs = append(errs, n.openTarget(s, old, t))
	}
	if s.events != nil && errors.Join(errs...) == nil {
		errs = append(errs, n.openEvents(s, old))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if n.signs() {
		return nil
	}
	for _, p := range s.pipe.Pipelines {
		sink := &s.pipe.Sinks[p.Sink]
		for _, t := range sink.Targets {
			if s.targets[t].signs && (!p.Match.All() || len(sink.Stages) > 0 || s.definitions != nil) {
				why := "changes what it passes"
				if s.definitions != nil {
					why = "passes what notifications give"
				}
				return fmt.Errorf("%s: pipeline %s %s to %s, and such batches are signed by the notifier: put a key named %s.key among the keys, here and at central, and the name among central's relays",
					s.pipe.Targets[t].Where, p.Name, why, s.targets[t].name, n.cfg.Name)
			}
		}
		if n.cfg.StagePartitions > 0 && pipeline.Stateful(sink.Stages) {
			return fmt.Errorf("stage_partitions: pipeline %s passes samples to other notifiers, signed by this one: put a key named %s.key among the keys of all",
				p.Name, n.cfg.Name)
		}
	}
	return nil
}

// signs reports whether the notifier can pass on what it makes itself.
func (n *Notifier) signs() bool {
	return n.cfg.AllowUnsigned || len(n.deps.Keys.Secret(n.cfg.Name)) > 0
}

// openTarget opens the publisher of a URL, unless old has it, and adds it to the
// targets.
func (n *Notifier) openTarget(s, old *setup, t pipeline.Target) error {
	url := t.URL.String()
	if old != nil {
		if i := slices.IndexFunc(old.targets, func(o *target) bool { return o.url == url }); i >= 0 {
			s.targets = append(s.targets, old.targets[i])
			return nil
		}
	}
	p, scheme, err := publisher.Open(n.deps.Publishers, t.URL, publisher.Deps{
		Log: n.log.With(zap.String("publisher", t.Name)), Bus: n.deps.Publisher, Name: n.cfg.Name,
		Keys: n.deps.Keys, Partitions: n.cfg.Partitions, AMQP: n.deps.AMQP, TelemetrySecret: s.secret,
	})
	if err == nil && !scheme.Durable && n.cfg.Spool != "" {
		p, err = n.spooled(p, t)
	}
	if err != nil {
		return fmt.Errorf("%s: publisher %s: %w", t.Where, t.Name, err)
	}
	s.targets = append(s.targets, &target{p, t.Name, url, scheme.Events, scheme.Signs})
	return nil
}

// spooled puts a spool before a publisher.
func (n *Notifier) spooled(p publisher.Publisher, t pipeline.Target) (publisher.Publisher, error) {
	name := sha256.Sum256([]byte(t.URL.String()))
	options := publisher.NewOptions(t.URL)
	s, err := spool.New(p, spool.Options{
		Dir: filepath.Join(n.cfg.Spool, t.URL.Scheme+"-"+hex.EncodeToString(name[:6])), MaxBytes: n.cfg.SpoolBytes,
		Policy: publisher.PolicyOf(options), Log: n.log.With(zap.String("publisher", t.Name)), Counters: n.m.spool(t.Name),
	})
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return s, nil
}

// close closes the publishers that other does not have.
func (s *setup) close(other *setup) error {
	var errs []error
	for _, t := range s.targets {
		if other != nil && slices.Contains(other.targets, t) {
			continue
		}
		if err := t.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", t.name, err))
		}
	}
	return errors.Join(errs...)
}
