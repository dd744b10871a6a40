package pipeline_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/sample"
)

// chains are sinks of all transformers that look back.
var chains = map[string]string{
	"rate_of_change":   "[{name: rate_of_change, parameters: {target: {name: r, unit: /s, type: gauge}}}]",
	"delta":            "[{name: delta, parameters: {growth_only: true}}]",
	"accumulator":      "[{name: accumulator, parameters: {size: 25}}]",
	"aggregator":       "[{name: aggregator, parameters: {size: 40, timestamp: last, resource_metadata: last}}]",
	"aggregator, time": "[{name: aggregator, parameters: {size: null, retention_time: 30, user_id: last, project_id: first}}]",
	"arithmetic":       "[{name: arithmetic, parameters: {target: {name: x, expr: '$(m0) + 2 * $(m1)'}}}]",
	"several":          "[{name: rate_of_change}, {name: unit_conversion, parameters: {target: {scale: 2}}}, {name: aggregator, parameters: {size: 30}}, {name: accumulator, parameters: {size: 3}}]",
}

// ticks makes the batches of a node: meters of some resources, cumulative, with
// resets, a batch that is late, and what foreign samples have.
func ticks(r *rand.Rand, n int) []*sample.Batch {
	var all []*sample.Batch
	volumes := map[string]uint64{}
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range n {
		at := begin.Add(time.Duration(i) * 10 * time.Second)
		b := sample.NewBuilder()
		for res := range 12 {
			if r.IntN(5) == 0 {
				continue
			}
			row := sample.Row{
				Resource: fmt.Sprint("resource ", res), Source: "openstack", Project: fmt.Sprint("p", res%3), User: fmt.Sprint("u", r.IntN(2)),
				Incarnation: sample.Incarnation(i / 20), Metadata: fmt.Appendf(nil, `{"tick": %d}`, i),
			}
			if res%4 == 0 {
				row.Foreign = &sample.Foreign{UserName: "name", HasMonotonic: true, Monotonic: float64(i) * 10.5, Timestamp: at.Format("2006-01-02 15:04:05")}
			}
			b.Row(row)
			for m := range 3 {
				name := fmt.Sprint("m", m)
				volumes[name+row.Resource] += r.Uint64N(1 << (8 << r.IntN(3)))
				kind := []sample.Kind{sample.Cumulative, sample.Gauge, sample.Delta}[m]
				switch {
				case m == 1:
					b.Add(sample.MeterRef{Name: name, Kind: kind, Unit: "B"}, sample.Walk, sample.Float(float64(volumes[name+row.Resource])/3))
				case r.IntN(4) > 0:
					b.Add(sample.MeterRef{Name: name, Kind: kind, Unit: "B"}, sample.Walk, sample.Uint(volumes[name+row.Resource]))
				}
			}
		}
		out := b.Build()
		out.ID, out.Node, out.Epoch, out.Seq, out.Base = sample.NewBatchID(at), "node-1", 1, uint64(i), at.UnixMicro()
		all = append(all, out)
	}
	for i := 5; i+1 < n; i += 17 {
		all[i], all[i+1] = all[i+1], all[i]
	}
	return all
}

// text is what a batch has given, with all that samples have; in which rows they
// are does not matter.
func text(made [][]*sample.Batch) string {
	var lines []string
	for sink, parts := range made {
		for _, part := range parts {
			lines = append(lines, fmt.Sprintf("sink %d, batch %s of %s, measured by %s, metered since %d\n", sink, part.ID, part.Node, part.Host(), part.Since))
			for s := range part.Samples() {
				f := sample.Foreign{}
				if s.Foreign != nil {
					f = *s.Foreign
				}
				s.Foreign = nil
				lines = append(lines, fmt.Sprintf("%+v %+v\n", s, f))
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// TestAKeeperGoesOnWhereverItsRecordsEnd kills a keeper at random, before or after
// a record is written, delivers again what was not taken and sometimes what was,
// writes snapshots, and compares all that comes out with what one undisturbed
// keeper gives.
func TestAKeeperGoesOnWhereverItsRecordsEnd(t *testing.T) {
	for name, stages := range chains {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(7, 8))
			cfg := chain(t, stages)
			batches := ticks(r, 120)
			undisturbed := keeper(t, cfg, 1000)
			var want []string
			for _, b := range batches {
				want = append(want, text(undisturbed.Make(b)))
			}
			if len(strings.Join(want, "")) < 1000 {
				t.Fatalf("only %q comes out", want)
			}
			k := keeper(t, cfg, 1000)
			k.Track()
			var log [][]byte
			taken := make([]bool, len(batches))
			deaths := 0
			for next := 0; next < len(batches); {
				// A few are delivered, in order: those that are not taken first.
				first := slices.Index(taken, false)
				for ; first < min(next+4, len(batches)); first++ {
					got := text(k.Make(batches[first]))
					if taken[first] && got == "" {
						continue
					}
					if got != want[first] {
						t.Fatalf("batch %d, after %d deaths (-want +got):\n%s", first, deaths, cmp.Diff(want[first], got))
					}
				}
				dead := r.IntN(4)
				if dead > 0 {
					if record := k.Changes(); record != nil {
						log = append(log, record)
					}
				}
				if dead > 1 { // recorded, and so published
					for i := range first {
						if !taken[i] && r.IntN(6) > 0 {
							taken[i] = true
							k.Taken(batches[i].ID)
						}
					}
					next = first
				}
				if r.IntN(10) == 0 {
					k.Changes()
					log = k.All()
				}
				if dead <= 2 {
					deaths++
					k = keeper(t, cfg, 1000)
					if _, err := k.Load(log); err != nil {
						t.Fatal(err)
					}
					k.Track()
					// What was taken and is not recorded as such may come again, and gives
					// the same: to whom it is sent knows its id.
					for i := max(0, next-10); i < next; i++ {
						if got := text(k.Make(batches[i])); got != "" && got != want[i] {
							t.Fatalf("batch %d, taken before death %d, gives (-want +got):\n%s", i, deaths, cmp.Diff(want[i], got))
						}
					}
				}
			}
			if deaths < 20 {
				t.Errorf("%d deaths only", deaths)
			}
		})
	}
}

// TestPartitionsGetEachSampleOnce splits batches by resource: what the keepers of
// all partitions get is what there is, with its ids, each resource in one.
func TestPartitionsGetEachSampleOnce(t *testing.T) {
	cfg, err := pipeline.Load("p.yaml", []byte(`
sources:
- {name: all, meters: ["*"], sinks: [plain]}
- {name: some, meters: ["m0", "m2"], sinks: [rate]}
- {name: others, meters: ["m2", "m3"], sinks: [rate, sums]}
sinks:
- {name: plain, publishers: [store://]}
- {name: rate, transformers: [{name: rate_of_change}], publishers: [store://]}
- {name: sums, transformers: [{name: aggregator, parameters: {size: 10}}], publishers: [test://]}`))
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(5, 6))
	const partitions = 5
	s := pipeline.NewSplitter(keeper(t, cfg, 100), partitions)
	where := map[string]sample.BatchID{}
	for range 500 {
		b := random(r)
		var want, got []string
		line := func(s *sample.Sample) string { return fmt.Sprintf("%+v", *s) }
		for x := range b.Samples() {
			if x.Name == "m0" || x.Name == "m2" || x.Name == "m3" {
				want = append(want, line(&x))
			}
		}
		gaps, whole := 0, 0
		ids := map[sample.BatchID]bool{}
		clear(where)
		s.Split(b, func(targets []int, part *sample.Batch) {
			switch {
			case part == b:
				whole++
			case targets[0] != pipeline.Elsewhere:
				gaps++
				if part.Len() > 0 || len(part.Gaps) != len(b.Gaps) {
					t.Fatalf("sinks that look back get %d samples here", part.Len())
				}
			default:
				if err := part.Check(); err != nil {
					t.Fatal(err)
				}
				if ids[part.ID] || len(part.Gaps) > 0 || part.Node != "notifier-1" || part.Len() == 0 {
					t.Fatalf("got %+v", part)
				}
				ids[part.ID] = true
				for x := range part.Samples() {
					got = append(got, line(&x))
					if other, ok := where[x.Resource]; ok && other != part.ID {
						t.Fatalf("%s is in two partitions", x.Resource)
					}
					where[x.Resource] = part.ID
				}
			}
		})
		if whole != 1 || gaps != 2*min(1, len(b.Gaps)) {
			t.Fatalf("%d whole and %d for gaps of %d", whole, gaps, len(b.Gaps))
		}
		slices.Sort(want)
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("samples (-want +got):\n%s", diff)
		}
	}
}

// TestStateOfUnchangedStagesIsKept loads what a configuration remembers into
// another one.
func TestStateOfUnchangedStagesIsKept(t *testing.T) {
	const before = "[{name: unit_conversion, parameters: {target: {scale: 2}}}, {name: rate_of_change}, {name: accumulator, parameters: {size: 3000}}]"
	for name, tc := range map[string]struct {
		after string
		kept  int
	}{
		"the same": {before, 2},
		"the same, written otherwise": {`
  - name: unit_conversion
    parameters:
      "target": {"scale": 0x2}
  # a comment
  - {parameters: {}, name: rate_of_change}
  - {name: accumulator, parameters: {size: 3000}}`, 2},
		"another last one":  {"[{name: unit_conversion, parameters: {target: {scale: 2}}}, {name: rate_of_change}, {name: accumulator, parameters: {size: 4}}]", 1},
		"another first one": {"[{name: unit_conversion, parameters: {target: {scale: 3}}}, {name: rate_of_change}, {name: accumulator, parameters: {size: 3000}}]", 0},
		"one less":          {"[{name: rate_of_change}, {name: accumulator, parameters: {size: 3000}}]", 0},
	} {
		t.Run(name, func(t *testing.T) {
			k := keeper(t, chain(t, before), 100)
			for _, b := range ticks(rand.New(rand.NewPCG(1, 2)), 3) {
				k.Make(b)
			}
			to := keeper(t, chain(t, tc.after), 100)
			if kept, err := to.Load(k.All()); kept != tc.kept || err != nil {
				t.Errorf("state of %d stages is kept, %v, want %d", kept, err, tc.kept)
			}
		})
	}
}

// TestWhatIsOldIsForgotten has a sample come, lets time pass, and has another one
// come, then the first series again.
func TestWhatIsOldIsForgotten(t *testing.T) {
	for name, tc := range map[string]struct {
		stages string
		wait   time.Duration
		want   string // what comes out after the first batch
		drops  string // why something is dropped then
	}{
		"a point of a series that is not old": {"[{name: rate_of_change}]", 59 * time.Minute, "m 1.0", ""},
		"a point of a series":                 {"[{name: rate_of_change}]", 3 * time.Hour, "", "first"},
		"an aggregate that is not old":        {"[{name: aggregator, parameters: {size: 100}}]", 59 * time.Minute, "", ""},
		"an aggregate":                        {"[{name: aggregator, parameters: {size: 100}}]", 61 * time.Minute, "m 3", ""},
		"held samples":                        {"[{name: accumulator, parameters: {size: 100}}]", 61 * time.Minute, "m 3", ""},
		"a meter that waits":                  {"[{name: arithmetic, parameters: {target: {expr: $(m) + $(other)}}}]", 61 * time.Minute, "", "old"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var drops []string
				k, err := pipeline.NewKeeper(chain(t, tc.stages), pipeline.Bound{Series: 100, Age: time.Hour}, "n", func(d pipeline.Drop) { drops = append(drops, d.Reason) })
				if err != nil {
					t.Fatal(err)
				}
				var got []string
				come := func(volumes ...uint64) {
					b := sample.NewBuilder()
					for _, v := range volumes {
						b.Row(sample.Row{Resource: "r"})
						b.Add(sample.MeterRef{Name: "m", Kind: sample.Delta}, sample.Walk, sample.Uint(v))
					}
					in := b.Build()
					in.ID, in.Base = sample.NewBatchID(time.Now()), time.Now().UnixMicro()
					for _, parts := range k.Make(in) {
						for _, part := range parts {
							for s := range part.Samples() {
								got = append(got, s.Name+" "+s.Volume.String())
							}
						}
					}
				}
				if come(3); len(got) > 0 {
					t.Fatalf("the first batch gives %s", got)
				}
				drops = nil
				for range 3 { // of other resources
					time.Sleep(tc.wait / 3)
					come()
				}
				come(3 + uint64(tc.wait/time.Second))
				if strings.Join(got, " ") != tc.want || strings.Join(drops, " ") != tc.drops {
					t.Errorf("got %q and dropped for %q, want %q and %q", got, drops, tc.want, tc.drops)
				}
			})
		})
	}
}

// FuzzLoadState: no record makes a keeper fail, and what one reads it can write.
func FuzzLoadState(f *testing.F) {
	pack, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	unpack, err := zstd.NewReader(nil)
	if err != nil {
		f.Fatal(err)
	}
	names := slices.Sorted(func(yield func(string) bool) {
		for name := range chains {
			if !yield(name) {
				return
			}
		}
	})
	batches := ticks(rand.New(rand.NewPCG(1, 2)), 6)
	for i, name := range names {
		k := keeper(f, chain(f, chains[name]), 100)
		k.Track()
		for _, b := range batches {
			k.Make(b)
		}
		for _, record := range append(k.All(), k.Changes()) {
			raw, err := unpack.DecodeAll(record[1:], nil)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(byte(i), raw)
		}
	}
	f.Fuzz(func(t *testing.T, which byte, raw []byte) {
		cfg := chain(t, chains[names[int(which)%len(names)]])
		k := keeper(t, cfg, 100)
		_, _ = k.Load([][]byte{pack.EncodeAll(raw, []byte{1})})
		k.Track()
		for _, b := range batches {
			k.Make(b)
		}
		if k.Changes() == nil && len(raw) == 0 {
			t.Error("batches that come for the first time change nothing")
		}
		again := keeper(t, cfg, 100)
		if _, err := again.Load(k.All()); err != nil {
			t.Error(err)
		}
	})
}
