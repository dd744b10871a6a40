package agent

import (
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// gapEvery is how often a gap that lasts is recorded. What was not recorded yet
// is lost if the agent is killed.
const gapEvery = time.Minute

// openGaps are what a plan could not read in its last poll. A fault that lasts
// is one gap, which is recorded when it begins, every gapEvery and when it ends.
// The zero value has none.
type openGaps struct {
	open map[gapKey]*openGap
	poll uint64 // number of the poll
	over []sample.Gap
}

type gapKey struct{ meter, resource string }

type openGap struct {
	recorded int64     // up to when it was recorded, µs since the epoch
	to       int64     // up to when it reaches
	at       time.Time // when it was recorded; zero: never
	poll     uint64    // the last poll with the fault
	reason   string
}

// miss notes that the poll at now could not read the meters of a resource, and
// that they were last read, or their gap recorded, at from: µs since the epoch.
func (g *openGaps) miss(meter, resource string, from, now int64, reason string) {
	key := gapKey{meter, resource}
	o := g.open[key]
	if o != nil && now < o.to { // the wall clock was set back
		g.over = append(g.over, o.rest(key))
		o = nil
	}
	if o == nil {
		if g.open == nil {
			g.open = map[gapKey]*openGap{}
		}
		o = &openGap{recorded: from}
		g.open[key] = o
	}
	o.to, o.poll, o.reason = now, g.poll, reason
}

// record ends a poll: it calls add with what is to be recorded now.
func (g *openGaps) record(now time.Time, add func(sample.Gap)) {
	for _, gap := range g.over {
		add(gap)
	}
	g.over = g.over[:0]
	for key, o := range g.open {
		over := o.poll != g.poll
		if over && o.to > o.recorded || !over && now.Sub(o.at) >= gapEvery {
			add(o.rest(key))
			o.recorded, o.at = o.to, now
		}
		if over {
			delete(g.open, key)
		}
	}
	g.poll++
}

// end records what is left when there will be no other poll.
func (g *openGaps) end(add func(sample.Gap)) { g.record(time.Time{}, add) }

// rest is what was not recorded yet.
func (o *openGap) rest(key gapKey) sample.Gap {
	return sample.Gap{Meter: key.meter, Resource: key.resource, From: o.recorded, To: o.to, Reason: o.reason}
}
