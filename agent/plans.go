package agent

import (
	"slices"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// MeterPlan says how a meter is polled.
type MeterPlan struct {
	*sample.Meter
	// Intervals are those of the sources of polling.yaml that ask for it, shortest
	// first; none: it is not polled.
	Intervals []time.Duration
}

// Plans returns how an agent of this configuration polls each meter of the
// catalogue, and what an operator would not expect of that. Whether the host has
// what counts them it does not know.
func Plans(cfg Config) ([]MeterPlan, []string, error) {
	if err := cfg.Check(); err != nil {
		return nil, nil, err
	}
	sources, err := loadPolling(cfg.Polling, cfg.Interval)
	if err != nil {
		return nil, nil, err
	}
	plans, notes := makePlans(sources, &cfg)
	plans = append(plans, bmcPlans(sources, cfg.IPMI.Interval)...)
	checks := wantedChecks(sources)
	all := make([]MeterPlan, len(sample.Catalogue))
	for i, m := range sample.Catalogue {
		all[i].Meter = m
		if checks[m] && cfg.CrosscheckInterval > 0 {
			all[i].Intervals = []time.Duration{cfg.CrosscheckInterval}
		}
		for _, p := range plans {
			if slices.Contains(p.meters, m) {
				all[i].Intervals = append(all[i].Intervals, p.interval)
			}
		}
		slices.Sort(all[i].Intervals)
	}
	return all, notes, nil
}
