package agent

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample"
)

// Reloadable are the settings that an agent which runs takes over from a
// configuration that is loaded anew.
var Reloadable = []string{"polling", "interval", "qemu_interval", "histogram_interval", "legacy_meters"}

// reload is what a running agent is to do from now on.
type reload struct {
	sources []pollSource
	plans   []plan
	notes   []string
	done    chan struct{}
}

// Reload has the agent poll by polling.yaml as it is now, and by the settings of
// cfg that are [Reloadable]. It returns what changed, a sentence each; on an error
// nothing has. Plans that stay the same go on undisturbed. It may be called while
// Run runs, by one goroutine.
func (a *Agent) Reload(ctx context.Context, cfg Config) (changes []string, err error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	r := &reload{done: make(chan struct{})}
	if r.sources, err = loadPolling(cfg.Polling, cfg.Interval); err != nil {
		return nil, err
	}
	r.plans, r.notes = a.planAll(r.sources, &cfg)
	a.mu.Lock()
	changes = planChanges(a.plans, r.plans)
	a.mu.Unlock()
	a.checks.Lock()
	wanted := wantedChecks(r.sources)
	for _, m := range sample.Catalogue {
		if m.Check != nil && wanted[m] != a.checks.wanted[m] {
			verb := "is not sent any more"
			if wanted[m] {
				verb = "is sent"
			}
			changes = append(changes, m.Name+" "+verb)
		}
	}
	a.checks.Unlock()
	select {
	case a.reloads <- r:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	<-r.done
	return changes, nil
}

// planAll returns the plans of sources, those of the BMC too, and what an operator
// would not expect of them.
func (a *Agent) planAll(sources []pollSource, cfg *Config) ([]plan, []string) {
	plans, notes := makePlans(sources, cfg)
	if a.hardware != nil {
		plans = append(plans, bmcPlans(sources, cfg.IPMI.Interval)...)
	}
	return plans, notes
}

// planChanges says how the plans differ, a sentence for the meters that change
// alike.
func planChanges(before, after []plan) []string {
	intervals := func(plans []plan) map[string]string {
		all := map[string][]time.Duration{}
		for _, p := range plans {
			for _, m := range p.meters {
				all[m.Name] = append(all[m.Name], p.interval)
			}
		}
		texts := map[string]string{}
		for name, list := range all {
			slices.Sort(list)
			parts := make([]string, len(list))
			for i, d := range list {
				parts[i] = "every " + d.String()
			}
			texts[name] = strings.Join(parts, " and ")
		}
		return texts
	}
	old, now := intervals(before), intervals(after)
	names := maps.Clone(old)
	maps.Copy(names, now)
	alike := map[string][]string{}
	for name := range names {
		from, to := old[name], now[name]
		switch {
		case from == to:
		case to == "":
			alike["not polled any more"] = append(alike["not polled any more"], name)
		case from == "":
			alike["polled "+to] = append(alike["polled "+to], name)
		default:
			how := "polled " + to + ", not " + from
			alike[how] = append(alike[how], name)
		}
	}
	var changes []string
	for how, meters := range alike {
		slices.Sort(meters)
		changes = append(changes, strings.Join(meters, ", ")+": "+how)
	}
	slices.Sort(changes)
	return changes
}

// running is a plan that is being polled.
type running struct {
	plan
	stop context.CancelFunc
	done chan struct{}
}

// same reports whether two plans are polled alike.
func (p *plan) same(o *plan) bool {
	return p.interval == o.interval && p.qemu == o.qemu && p.bmc == o.bmc && slices.Equal(p.meters, o.meters)
}

// keepPolling polls the agent's plans, and those of each reload instead, until
// ctx ends.
func (a *Agent) keepPolling(ctx context.Context) {
	var polls sync.WaitGroup
	defer polls.Wait()
	var all []*running
	start := func(p plan) {
		pctx, stop := context.WithCancel(ctx)
		r := &running{p, stop, make(chan struct{})}
		all = append(all, r)
		polls.Go(func() {
			defer close(r.done)
			defer stop()
			a.schedule(pctx, newTask(p, a.hooks))
		})
	}
	for _, p := range a.plans {
		start(p)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-a.reloads:
			// A meter must not be polled twice at once: first end, then begin.
			old := all
			all = nil
			for _, one := range old {
				if slices.ContainsFunc(r.plans, func(p plan) bool { return p.same(&one.plan) }) {
					all = append(all, one)
				} else {
					one.stop()
				}
			}
			kept := slices.Clone(all)
			for _, one := range old {
				if !slices.Contains(kept, one) {
					<-one.done
				}
			}
			a.take(r)
			for _, p := range r.plans {
				if !slices.ContainsFunc(kept, func(one *running) bool { return p.same(&one.plan) }) {
					start(p)
				}
			}
			a.log.Info("polling anew", zap.Int("plans", len(r.plans)), zap.Int("undisturbed", len(kept)))
			close(r.done)
		}
	}
}

// take makes the plans of a reload the agent's.
func (a *Agent) take(r *reload) {
	a.checks.Lock()
	a.checks.wanted = wantedChecks(r.sources)
	a.checks.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.plans, a.planNotes = r.plans, r.notes
	a.fallover = newFallover(r.plans, a.billing)
	a.lives.task = lastTask(r.plans, a.hooks)
	a.noted = false
}
