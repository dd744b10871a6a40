package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/sample"
)

// freshCheck is how old a check may be that is not made again on request, so
// that impatient askers don't keep QEMU busy.
const freshCheck = time.Second

// serveCrosscheck answers GET and POST /v1/crosscheck?domain=NAME.
func (a *Agent) serveCrosscheck(w http.ResponseWriter, r *http.Request) {
	which := r.URL.Query().Get("domain")
	if r.Method == http.MethodPost && a.guest != nil {
		for _, d := range a.defined() {
			if r.Context().Err() != nil {
				return
			}
			if d.answersTo(which) && time.Since(a.checked(d)) > freshCheck {
				a.check(r.Context(), d)
			}
		}
	}
	s := a.crosschecks(which)
	if which != "" && len(s.Domains) == 0 {
		http.Error(w, fmt.Sprintf("there is no domain %q on this host", which), http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(s) // an error means that the reader is gone
}

// answersTo reports whether which is the domain's UUID or one of its names, or
// empty.
func (d *domain) answersTo(which string) bool {
	return which == "" || which == d.uuid || which == d.name || d.def != nil && which == d.def.Display
}

// crosschecks tells what came of the last checks.
func (a *Agent) crosschecks(which string) client.Crosscheck {
	a.mu.Lock()
	defer a.mu.Unlock()
	// What discovery cannot tell, the polls log.
	_ = a.discover(time.Now())
	s := client.Crosscheck{Node: a.cfg.Node, Interval: a.cfg.CrosscheckInterval.Seconds(), Domains: []client.CheckedGuest{}}
	switch {
	case a.guest == nil:
		s.Notes = append(s.Notes, "libvirt is off, so that there is nothing to compare with")
	case a.guest.Err() != nil:
		s.Notes = append(s.Notes, "libvirt does not answer: "+a.guest.Err().Error())
	case a.cfg.CrosscheckInterval == 0:
		s.Notes = append(s.Notes, "crosscheck_interval is 0s: domains are checked on request only")
	}
	for _, d := range a.order {
		if !d.ready || !d.answersTo(which) {
			continue
		}
		g := client.CheckedGuest{UUID: d.uuid, Name: d.name, Comparisons: []client.Comparison{}}
		if d.def != nil {
			g.Display = d.def.Display
		}
		if at := d.check.at.UTC(); !d.check.at.IsZero() {
			g.Time = &at
		}
		for i := range d.check.last {
			g.Comparisons = append(g.Comparisons, d.check.last[i].tell())
		}
		s.Domains = append(s.Domains, g)
	}
	return s
}

func (c *comparison) tell() client.Comparison {
	t := client.Comparison{
		Meter: c.check.Of.Name, Resource: c.resource, Device: c.device, Unit: c.check.Of.Unit,
		Verdict: verdicts[c.verdict], Why: c.why,
	}
	if c.verdict != sample.NotComparable {
		t.Figures = &client.Figures{Ours: c.ours, Theirs: c.theirs, Difference: c.difference, Relative: c.relative, Tolerance: c.tolerance}
		if c.since != 0 {
			since := time.UnixMicro(c.since).UTC()
			t.Figures.Since = &since
		}
	}
	return t
}
