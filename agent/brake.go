package agent

import (
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
)

// brakeEvery is how long the cost is averaged over.
const brakeEvery = 30 * time.Second

// brake keeps what metering costs within the budget, by switching hooks off. It
// is guarded by the agent's lock.
type brake struct {
	budget float64 // part of one core; 0: none
	since  time.Time
	spent  time.Duration // by then
	over   bool          // the time before was over the budget
}

// shedding lists the hooks in the order in which they are switched off: what
// costs the most per event and matters least to a bill goes first.
var shedding = []string{"exits", "runqueue", "tcx", "disk"}

// look compares the cost of the time since the last look, once that was
// brakeEvery ago, and switches off a hook if it was over the budget twice in
// succession. spent is the CPU time of the collectors up to now.
func (b *brake) look(hs *hooks, now time.Time, spent time.Duration) {
	for _, h := range hs.list {
		spent += h.spent
	}
	took := now.Sub(b.since)
	if b.budget == 0 || !b.since.IsZero() && took < brakeEvery {
		return
	}
	cost := float64(spent-b.spent) / float64(took)
	over := !b.since.IsZero() && cost > b.budget
	shed := over && b.over
	b.since, b.spent, b.over = now, spent, over && !shed
	if !shed {
		return
	}
	for _, name := range shedding {
		if i := slices.IndexFunc(hs.list, func(h *hook) bool { return h.Name() == name && h.on }); i >= 0 {
			h := hs.list[i]
			hs.log.Warn("metering costs more than its budget: a hook is switched off", zap.String("hook", name),
				zap.Float64("percent_of_a_core", cost*100), zap.Float64("budget", b.budget*100))
			if err := hs.turn(h, false); err == nil {
				h.shed = true
				h.idle = fmt.Sprintf("switched off, since metering took %.1f %% of a core and its budget is %.1f %%", cost*100, b.budget*100)
			}
			return
		}
	}
}
