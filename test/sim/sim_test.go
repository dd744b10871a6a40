package sim

import (
	"context"
	"flag"
	"math"
	"math/big"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

var (
	schedules = flag.Uint64("schedules", 300, "how many fault schedules to run")
	firstSeed = flag.Uint64("seed", 1, "seed of the first")
	verbose   = flag.Bool("steps", false, "print what happens")
)

// check compares what was made with what is stored, and returns how many samples
// there are and how many are missing.
func (w *world) check() (made, missing int) {
	ctx := context.Background()
	stored := map[sampleKey]int{}
	newest := map[[2]string]store.Sample{}
	used := map[[2]string]uint64{} // by how much the highest exceeds the first in time
	high := map[[2]string]uint64{}
	if err := w.store.Samples(ctx, store.Filter{}, func(s store.Sample) bool {
		key := sampleKey{s.Resource, s.Name, s.Volume.Bits}
		stored[key]++
		n := w.nodes[s.Resource[1]-'0']
		at, known := n.made[key]
		if !known || at != s.Time || s.Volume.Tag != sample.U64 || s.Project != "p" || s.Origin != sample.Walk || s.Incarnation != sample.IncarnationOf(s.Resource) {
			w.t.Errorf("stored and never made: %+v", s)
		}
		// Newest first: the volumes fall, unless the clock was set.
		series := [2]string{s.Resource, s.Name}
		if before, ok := newest[series]; ok && !n.stepped && before.Volume.Bits < s.Volume.Bits {
			w.t.Errorf("the counter %v goes back: %d at %d, %d at %d", series, s.Volume.Bits, s.Time, before.Volume.Bits, before.Time)
		}
		newest[series] = s
		high[series] = max(high[series], s.Volume.Bits)
		used[series] = high[series] - s.Volume.Bits
		return true
	}); err != nil {
		w.t.Fatal(err)
	}
	if err := w.store.Usage(ctx, store.UsageQuery{From: 0, To: math.MaxInt64}, func(u store.Usage) bool {
		series := [2]string{u.Resource, u.Name}
		is := func(n uint64) bool { return u.Quantity.Rat().Cmp(new(big.Rat).SetInt(new(big.Int).SetUint64(n))) == 0 }
		// Where the first came in a batch of the notifier's, it counts from zero.
		if !is(used[series]) && !is(high[series]) {
			w.t.Errorf("usage of %v is %s, want %d, or all %d", series, u.Quantity, used[series], high[series])
		}
		return true
	}); err != nil {
		w.t.Fatal(err)
	}
	gaps, err := w.store.Gaps(ctx, 0, math.MaxInt64)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, g := range gaps {
		w.note("gap of %s: %s %s from %d to %d: %s", g.Node, g.Meter, g.Resource, g.From, g.To, g.Reason)
	}
	for _, n := range w.nodes {
		made += len(n.made)
		for key, at := range n.made {
			if c := stored[key]; c > 1 {
				w.t.Errorf("stored %d times: %+v", c, key)
			} else if c == 1 {
				continue
			}
			missing++
			if n.options.Spool.Path == "" && n.unsafe[key] {
				continue // there is no disk that could know of it
			}
			if n.untimed[key] {
				continue // the clock was set while the sample was only in memory
			}
			if !slices.ContainsFunc(gaps, func(g sample.Gap) bool {
				return g.Node == n.name && (g.Meter == "*" || g.Meter == key.meter) && (g.Resource == "*" || g.Resource == key.resource) && g.From <= at && at <= g.To
			}) {
				w.t.Errorf("missing, and in no gap: %+v of %d", key, at)
			}
			if !n.unsafe[key] && !n.dropped {
				w.t.Errorf("missing, though it was on disk and nothing was dropped: %+v of %d", key, at)
			}
		}
	}
	for _, g := range gaps {
		if n := w.nodes[g.Node[1]-'0']; w.counts["agent killed"]+w.counts["agent's host loses power"]+w.counts["agent's disk fails"] == 0 && !n.dropped {
			w.t.Errorf("a gap where nothing can be lost: %+v", g)
		}
	}
	slices.Sort(w.dead)
	slices.Sort(w.poison)
	if !slices.Equal(slices.Compact(w.dead), w.poison) {
		w.t.Errorf("dead letters %q, want %q", w.dead, w.poison)
	}
	return made, missing
}

// simulate runs a schedule.
func simulate(t *testing.T, seed uint64, total map[string]int) (hash uint64) {
	dir, err := os.MkdirTemp("", "kvmeter-sim")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ok := t.Run("", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			w := newWorld(t, seed, dir)
			for range 40 + w.rand.IntN(120) {
				w.step()
			}
			w.settle()
			for _, n := range w.nodes {
				n.countDrops()
			}
			made, missing := w.check()
			w.close()
			hash = w.hash()
			for kind, n := range w.counts {
				total["fault: "+kind] += n
			}
			total["schedules"]++
			total["samples made"] += made
			total["samples missing"] += missing
			total["simulated hours"] += int(time.Since(began).Hours())
			if t.Failed() || *verbose {
				for _, line := range w.log {
					t.Log(line)
				}
			}
		})
	})
	if !ok {
		t.Errorf("seed %d: run it again with -seed %d -schedules 1", seed, seed)
	}
	return hash
}

// TestFaults runs random schedules of faults. The seeds follow each other, so that
// a run says all of them by its first.
func TestFaults(t *testing.T) {
	n := *schedules
	if testing.Short() && n == 300 {
		n = 40
	}
	t.Logf("seeds %d to %d", *firstSeed, *firstSeed+n-1)
	total := map[string]int{}
	for seed := *firstSeed; seed < *firstSeed+n && !t.Failed(); seed++ {
		simulate(t, seed, total)
	}
	t.Log(total)
}

// TestASeedIsARun runs some schedules twice.
func TestASeedIsARun(t *testing.T) {
	for seed := uint64(1000); seed < 1010; seed++ {
		if a, b := simulate(t, seed, map[string]int{}), simulate(t, seed, map[string]int{}); a != b {
			t.Errorf("seed %d gives %x and then %x", seed, a, b)
		}
	}
}
