package notifier

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/slab"
	"github.com/kvmeter/kvmeter/sample"
)

// eventRoutes says which events go to which targets, as event_pipeline.yaml
// does.
type eventRoutes struct {
	cfg     *pipeline.Config
	targets []int // by target of cfg: its index in those of the notifier

	occurrences []*sample.Meter // whose samples are events as well
}

// loadEvents reads event_pipeline.yaml. Where there is none, all events go to the
// store, if the notifier has a key to sign them with.
func (n *Notifier) loadEvents(file string, dispatchers []string) (*eventRoutes, error) {
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !n.signs():
		n.log.Info("no events are made: there is no event pipeline file, and no key named "+n.cfg.Name+".key to sign what would go to the store", zap.String("file", file))
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		n.log.Info("no event pipeline file; events go to the store", zap.String("file", file))
		file, data = "the built-in event pipeline", []byte(pipeline.DefaultEvents)
	case err != nil:
		return nil, fmt.Errorf("read event pipeline: %w", err)
	}
	cfg, err := pipeline.LoadEvents(file, data)
	if err != nil {
		return nil, err
	}
	if err := cfg.Dispatch(dispatchers); err != nil {
		return nil, fmt.Errorf("event_dispatchers: %w", err)
	}
	for _, w := range cfg.Warnings() {
		n.log.Warn("odd in the event pipeline file", zap.Error(w))
	}
	r := &eventRoutes{cfg: cfg}
	for _, m := range sample.Catalogue {
		if m.Event != "" {
			r.occurrences = append(r.occurrences, m)
		}
	}
	return r, nil
}

// openEvents opens the publishers of events. One that pipeline.yaml names as well
// is shared.
func (n *Notifier) openEvents(s, old *setup) error {
	var errs []error
	for _, t := range s.events.cfg.Targets {
		at := slices.IndexFunc(s.pipe.Targets, func(o pipeline.Target) bool { return o.URL.String() == t.URL.String() })
		if at < 0 {
			at = len(s.targets)
			if err := n.openTarget(s, old, t); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if s.targets[at].signs && !n.signs() {
			errs = append(errs, fmt.Errorf("%s: events that go to %s are signed by the notifier: put a key named %s.key among the keys, here and at central, and the name among central's relays",
				t.Where, t.Name, n.cfg.Name))
		}
		if !s.targets[at].events {
			errs = append(errs, fmt.Errorf("%s: publisher %s takes no events", t.Where, t.Name))
		}
		s.events.targets = append(s.events.targets, at)
	}
	return errors.Join(errs...)
}

// route adds an event to a job, for each target of the pipelines that pass it.
func (r *eventRoutes) route(made *slab.Slab[*sample.Event], e *sample.Event, job *work) {
	for i := range r.cfg.Pipelines {
		p := &r.cfg.Pipelines[i]
		if !p.Match.Match(e.Type) {
			continue
		}
		for _, t := range r.cfg.Sinks[p.Sink].Targets {
			given := &job.due[r.targets[t]].events
			if *given == nil {
				*given = made.Take(1)[:0]
			}
			if n := len(*given); n == 0 || (*given)[n-1] != e { // another pipeline's target may be the same
				*given = append(*given, e)
			}
		}
	}
}

// routeOf adds the events to a job that samples of a batch are, and returns how
// many those are.
func (r *eventRoutes) routeOf(made *slab.Slab[*sample.Event], b *sample.Batch, job *work) (n int) {
	for _, m := range r.occurrences {
		i := slices.Index(b.Meters, m.MeterRef)
		if i < 0 {
			continue
		}
		keep := make([]bool, len(b.Meters))
		keep[i] = true
		b.Visit(keep, func(_ int, s *sample.Sample) {
			r.route(made, sample.EventOf(s, b.Node, m.Event), job)
			n++
		})
	}
	return n
}
