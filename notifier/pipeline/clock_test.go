package pipeline_test

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/sample"
)

// TestGrowthIsCountedOnceWhateverTheClockDoes feeds a counter whose times are
// of a clock that is set, of a host that was suspended, of a leap second, and of an
// agent that sends what waited after what is new. The deltas add up to the counter's
// growth, and neither they nor rates are negative.
func TestGrowthIsCountedOnceWhateverTheClockDoes(t *testing.T) {
	const interval = 10 * time.Second
	type reading struct {
		at     time.Duration // by the wall clock
		volume uint64
	}
	// polls are readings at each interval of a clock that is set once, in the middle.
	polls := func(set time.Duration) (rs []reading) {
		r := rand.New(rand.NewPCG(1, 1))
		volume, at := uint64(1000), time.Duration(0)
		for i := range 1000 {
			if i == 100 {
				at += set
			}
			volume += r.Uint64N(1000)
			rs = append(rs, reading{at, volume})
			at += interval
		}
		return rs
	}
	drained := func() []reading {
		rs := polls(0)
		// 300 wait while 100 and more are lost to the bus, and come between new ones.
		waiting, fresh := rs[100:400], rs[400:]
		out := rs[:100:100]
		for len(waiting) > 0 {
			out = append(out, fresh[0])
			n := min(20, len(waiting))
			out, waiting, fresh = append(out, waiting[:n]...), waiting[n:], fresh[1:]
		}
		return append(out, fresh...)
	}
	for name, rs := range map[string][]reading{
		"set forward by an hour":       polls(time.Hour),
		"set back by an hour":          polls(-time.Hour),
		"set back by a second (leap)":  polls(-time.Second),
		"a host suspended for a day":   polls(24 * time.Hour),
		"a spool sent beside new ones": drained(),
	} {
		t.Run(name, func(t *testing.T) {
			for _, stages := range []string{"[{name: delta}]", "[{name: rate_of_change}]"} {
				cfg := chain(t, stages)
				dropped := 0
				c := cfg.Chains(pipeline.Bound{Series: 10}, func(d pipeline.Drop) {
					if dropped++; d.Reason != "late" && d.Reason != "first" {
						t.Errorf("a sample is dropped: %+v", d)
					}
				})[0]
				sum, n := 0.0, 0
				for _, r := range rs {
					s := sample.Sample{Name: "cpu", Kind: sample.Cumulative, Unit: "ns", Resource: "r", Origin: sample.Walk, Incarnation: 1, Time: r.at.Microseconds(), Volume: sample.Uint(r.volume)}
					cfg.Emit(0, c, []sample.Sample{s}, func(_ string, s *sample.Sample) {
						v := s.Volume.Float64()
						if v < 0 {
							t.Errorf("%s gives %v at %s", stages, v, r.at)
						}
						sum += v
						n++
					})
				}
				if n+dropped != len(rs) {
					t.Errorf("%s: %d of %d samples are neither passed nor dropped", stages, len(rs)-n-dropped, len(rs))
				}
				if want := float64(rs[len(rs)-1].volume - rs[0].volume); strings.Contains(stages, "delta") && sum != want {
					t.Errorf("the deltas add up to %v, the counter grew by %v", sum, want)
				}
			}
		})
	}
}
