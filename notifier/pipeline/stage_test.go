package pipeline_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

// chain loads a pipeline.yaml of one sink with the given transformers, as JSON
// or YAML in flow style.
func chain(t testing.TB, transformers string) *pipeline.Config {
	t.Helper()
	cfg, err := pipeline.Load("p.yaml", []byte(`
sources: [{name: s, meters: ["*"], sinks: [k]}]
sinks:
- name: k
  transformers: `+transformers+`
  publishers: [store://]
`))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// splitter returns one whose stages remember so many series.
func splitter(t testing.TB, cfg *pipeline.Config, series int) *pipeline.Splitter {
	t.Helper()
	return pipeline.NewSplitter(keeper(t, cfg, series), 0)
}

func keeper(t testing.TB, cfg *pipeline.Config, series int) *pipeline.Keeper {
	t.Helper()
	k, err := pipeline.NewKeeper(cfg, pipeline.Bound{Series: series}, "notifier-1", ignore)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// ignore is told of drops that a test does not look at.
func ignore(pipeline.Drop) {}

// run passes batches of samples through a sink and returns what comes out of
// each, as JSON without ids.
func run(t testing.TB, cfg *pipeline.Config, batches [][]json.RawMessage) [][]map[string]any {
	t.Helper()
	chains := cfg.Chains(pipeline.Bound{Series: 1000}, ignore)
	out := [][]map[string]any{}
	for _, raw := range batches {
		var samples []sample.Sample
		for _, text := range raw {
			s, err := sample.ParseForeign(text)
			if err != nil {
				t.Fatal(err)
			}
			samples = append(samples, s)
		}
		w := wire.NewWriter(wire.JSON)
		got := []map[string]any{}
		for i := range cfg.Sinks {
			cfg.Emit(i, chains[i], samples, func(_ string, s *sample.Sample) {
				got = append(got, decode(t, w.Sample(nil, s)))
			})
		}
		out = append(out, got)
	}
	return out
}

// decode reads a sample with the text of its numbers.
func decode(t testing.TB, raw []byte) map[string]any {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.UseNumber()
	var m map[string]any
	if err := dec.Decode(&m); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"id", "source", "user_name", "project_name", "monotonic_time"} {
		delete(m, key)
	}
	return m
}

// TestOracle compares with what Ceilometer's own transformers made of the same
// batches, to the last digit.
func TestOracle(t *testing.T) {
	files, err := filepath.Glob("testdata/t*.json")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d cases, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var c struct {
				Input struct {
					Batches      [][]json.RawMessage
					Transformers json.RawMessage
				}
				Expected struct{ Batches [][]json.RawMessage }
			}
			if err := json.Unmarshal(data, &c); err != nil {
				t.Fatal(err)
			}
			want := [][]map[string]any{}
			for _, b := range c.Expected.Batches {
				batch := []map[string]any{}
				for _, s := range b {
					batch = append(batch, decode(t, s))
				}
				want = append(want, batch)
			}
			got := run(t, chain(t, strings.ReplaceAll(string(c.Input.Transformers), "\n", " ")), c.Input.Batches)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// in is a batch in short: "name type unit volume resource second" by sample.
func in(samples ...string) []json.RawMessage {
	var out []json.RawMessage
	for _, s := range samples {
		var name, kind, unit, volume, resource, at, more string
		n, err := fmt.Sscan(s, &name, &kind, &unit, &volume, &resource, &at, &more)
		if n < 6 {
			panic(err)
		}
		out = append(out, json.RawMessage(fmt.Sprintf(
			`{"name": %q, "type": %q, "unit": %q, "volume": %s, "resource_id": %q, "timestamp": "2026-01-01T00:00:%s", "user_id": "u", "project_id": "p", "resource_metadata": {"n": %s}%s}`,
			name, kind, unit, volume, resource, at, volume, more)))
	}
	return out
}

// short is what came out, in the same short form.
func short(batches [][]map[string]any) []string {
	var out []string
	for _, b := range batches {
		var all []string
		for _, s := range b {
			all = append(all, fmt.Sprint(s["name"], " ", s["type"], " ", s["unit"], " ", s["volume"], " ", s["resource_id"], " ", strings.TrimPrefix(s["timestamp"].(string), "2026-01-01T00:00:")))
		}
		out = append(out, strings.Join(all, "; "))
	}
	return out
}

func TestStages(t *testing.T) {
	type batches = [][]json.RawMessage
	for name, tc := range map[string]struct {
		stages string
		in     batches
		want   []string // by batch
	}{
		"accumulator lets go once it holds enough, at the end of a batch": {
			"[{name: accumulator, parameters: {size: 3}}]",
			batches{in("a gauge x 1 r 00"), in("a gauge x 2 r 01", "a gauge x 3 r 02", "a gauge x 4 r 03"), in("a gauge x 5 r 04")},
			[]string{"", "a gauge x 1 r 00; a gauge x 2 r 01; a gauge x 3 r 02; a gauge x 4 r 03", ""},
		},
		"accumulator of size 0 holds nothing": {
			"[{name: accumulator, parameters: {size: 0}}]", batches{in("a gauge x 1 r 00")}, []string{"a gauge x 1 r 00"},
		},
		"accumulator without parameters lets go after each batch": {
			"[{name: accumulator}]", batches{in("a gauge x 1 r 00", "a gauge x 2 r 01")}, []string{"a gauge x 1 r 00; a gauge x 2 r 01"},
		},
		"unit_conversion with a number multiplies, and ints stay ints": {
			"[{name: unit_conversion, parameters: {target: {name: kb, unit: KB, scale: 1000}}}]",
			batches{in("a gauge x 18446744073709551 r 00", "a gauge x -2 r 00", "a gauge x 0.1 r 00")},
			[]string{"kb gauge KB 18446744073709551000 r 00; kb gauge KB -2000 r 00; kb gauge KB 100.0 r 00"},
		},
		"unit_conversion leaves other units alone": {
			"[{name: unit_conversion, parameters: {source: {unit: B}, target: {unit: KB, scale: volume / 1000.0}}}]",
			batches{in("a gauge B 1500 r 00", "a gauge x 1 r 00")},
			[]string{"a gauge KB 1.5 r 00; a gauge x 1 r 00"},
		},
		"unit_conversion without a scale renames only": {
			`[{name: unit_conversion, parameters: {source: {map_from: {name: "(disk\\.device|disk)\\.(read|write)", unit: "(B|request)"}}, target: {map_to: {name: "\\1.\\2.rate", unit: "\\g<1>/s"}, type: delta}}}]`,
			batches{in("disk.read gauge B 18446744073709551615 r 00", "disk.device.write gauge request 1 r 00", "cpu gauge ns 1 r 00")},
			[]string{"disk.read.rate delta B/s 18446744073709551615 r 00; disk.device.write.rate delta request/s 1 r 00; cpu delta ns 1 r 00"},
		},
		"max bounds what is scaled, as the number it is written as": {
			"[{name: unit_conversion, parameters: {target: {max: 100}}}]",
			batches{in("a gauge x 150.5 r 00", "a gauge x 99.5 r 00", "a gauge x 100.0 r 00")},
			[]string{"a gauge x 100 r 00; a gauge x 99.5 r 00; a gauge x 100.0 r 00"},
		},
		"an expression that cannot be evaluated costs its sample only": {
			`[{name: unit_conversion, parameters: {target: {scale: "10 / resource_metadata.n"}}}]`,
			batches{in("a gauge x 0 r 00", "a gauge x 4 r 00")},
			[]string{"a gauge x 2.5 r 00"},
		},
		"a rate of counters beyond 2^63 is exact": {
			`[{name: rate_of_change, parameters: {target: {name: rate, unit: /s, type: gauge}}}]`,
			batches{in("a cumulative x 18446744073709551605 r 00"), in("a cumulative x 18446744073709551615 r 04")},
			[]string{"", "rate gauge /s 2.5 r 04"},
		},
		"a counter that was reset grew by what it shows": {
			`[{name: rate_of_change, parameters: {target: {scale: "100.0 / (10**9 * 2)"}}}]`,
			batches{in("a cumulative x 50000000000 r 00"), in("a cumulative x 30000000000 r 50")},
			[]string{"", "a cumulative x 30.0 r 50"},
		},
		"at the same time the rate is 0.0, before it there is none, and the state stays": {
			`[{name: rate_of_change}]`,
			batches{in("a gauge x 1 r 10"), in("a gauge x 9 r 10"), in("a gauge x 5 r 09"), in("a gauge x 10 r 11")},
			[]string{"", "a gauge x 0.0 r 10", "", "a gauge x 1.0 r 11"},
		},
		"a numeric scale of a rate multiplies by the volume, as it always did": {
			`[{name: rate_of_change, parameters: {target: {scale: 2}}}]`,
			batches{in("a gauge x 1 r 10"), in("a gauge x 5 r 12")},
			[]string{"", "a gauge x 20.0 r 12"},
		},
		"the monotonic clock is believed where both samples have it": {
			`[{name: rate_of_change}]`,
			batches{in(`a gauge x 1 r 10 ,"monotonic_time":100.5`), in(`a gauge x 5 r 11 ,"monotonic_time":102.5`), in(`a gauge x 9 r 12`)},
			[]string{"", "a gauge x 2.0 r 11", "a gauge x 4.0 r 12"},
		},
		"series differ by meter and resource": {
			`[{name: delta, parameters: {target: {name: d}}}]`,
			batches{in("a cumulative x 1 r 00", "b cumulative x 10 r 00", "a cumulative x 100 q 00"), in("a cumulative x 3 r 01", "b cumulative x 10 r 01", "a cumulative x 99 q 01")},
			[]string{"", "d delta x 2 r 01; d delta x 0 r 01; d delta x -1 q 01"},
		},
		"growth_only drops what shrinks, and goes on from there": {
			`[{name: delta, parameters: {target: {name: d}, growth_only: true}}]`,
			batches{in("a cumulative x 5 r 00"), in("a cumulative x 2 r 01"), in("a cumulative x 4 r 02"), in("a cumulative x 1 r 01")},
			[]string{"", "", "d delta x 2 r 02", ""},
		},
		"aggregator without parameters aggregates each batch": {
			`[{name: aggregator}]`,
			batches{in("g gauge x 1 r 00", "g gauge x 2 r 01", "d delta x 18446744073709551615 r 00", "d delta x 0 r 01"), in("g gauge x 4 r 02")},
			[]string{"g gauge x 1.5 r 00; d delta x 18446744073709551615 r 00", "g gauge x 4.0 r 02"},
		},
		"aggregator scales each sample, and names do not change the average": {
			`[{name: aggregator, parameters: {size: 2, timestamp: last, target: {name: h, unit: y, scale: 10}}}]`,
			batches{in("g gauge x 1 r 00"), in("g gauge x 2 r 01")},
			[]string{"", "h gauge y 15.0 r 01"},
		},
		"aggregator by time lets go what is old": {
			`[{name: aggregator, parameters: {size: null, retention_time: 60}}]`,
			batches{in("g gauge x 1 r 00", "g gauge x 2 r 01")},
			[]string{"g gauge x 1.5 r 00"},
		},
		"aggregator counts all samples, not those of a key": {
			`[{name: aggregator, parameters: {size: "3"}}]`,
			batches{in("a cumulative x 5 r 00", "a cumulative x 7 r 01"), in("b cumulative x 9 r 02")},
			[]string{"", "a cumulative x 7 r 00; b cumulative x 9 r 02"},
		},
		"arithmetic waits for all meters of a resource, and has the time of the last sample": {
			`[{name: arithmetic, parameters: {target: {name: util, unit: "%", type: gauge, expr: "100 * $(memory.usage) / $(memory)"}}}]`,
			batches{in("memory gauge MB 512 r 00", "memory gauge MB 512 q 01"), in("memory.usage gauge MB 128 r 02", "other gauge x 1 z 03"), in("memory.usage gauge MB 1 r 04")},
			[]string{"", "util gauge % 25.0 r 03", ""},
		},
		"arithmetic reads fields, and gives a float": {
			`[{name: arithmetic, parameters: {target: {expr: "$(a) * $(b).resource_metadata.n + ($(a).unit == 'y')"}}}]`,
			batches{in("b gauge y 3 r 00", "a gauge x 2 r 01")},
			[]string{"a gauge x 6.0 r 01"},
		},
		"arithmetic takes the last of each meter, and a name is that of a meter it refers to": {
			`[{name: arithmetic, parameters: {target: {name: sum, expr: "cpu.volume + $(cpu) * ($(memory).resource_metadata.none or 7) + $(memory)"}}}]`,
			batches{in("cpu gauge x 1 r 00", "memory gauge x 1 r 01", "cpu gauge x 5 r 02")},
			[]string{"sum gauge x 41.0 r 02"},
		},
		"a factor that YAML 1.1 takes for text is an expression": {
			`[{name: rate_of_change, parameters: {target: {scale: 1e-1}}}]`,
			batches{in("a gauge x 1 r 10"), in("a gauge x 6 r 12")},
			[]string{"", "a gauge x 0.25 r 12"},
		},
		"each batch reaches a negative size": {
			`[{name: aggregator, parameters: {size: -1, retention_time: 1000000000}}]`,
			batches{in("d delta x 1 r 00", "d delta x 2 r 01")},
			[]string{"d delta x 3 r 00"},
		},
		"what a stage lets go passes the stages behind it": {
			`[{name: aggregator, parameters: {size: 2}}, {name: unit_conversion, parameters: {target: {name: c, scale: "volume * 2"}}}, {name: accumulator, parameters: {size: 2}}]`,
			batches{in("g gauge x 1 r 00", "g gauge x 2 r 01"), in("g gauge x 5 r 02", "g gauge x 5 r 03")},
			[]string{"", "c gauge x 3.0 r 00; c gauge x 10.0 r 02"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, short(run(t, chain(t, tc.stages), tc.in))); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestTransformersOfRocky compares with what the transformers of Ceilometer from
// Pike to Rocky make of chains and samples at random. What docs/ceilometer.md says
// is done otherwise is not among them.
func TestTransformersOfRocky(t *testing.T) {
	data, err := os.ReadFile("testdata/rocky.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	cases := 0
	for line := range bytes.Lines(data) {
		var group struct {
			Batches [][]json.RawMessage
			Chains  []struct {
				Transformers json.RawMessage
				Want         [][]json.RawMessage
			}
		}
		if err := json.Unmarshal(line, &group); err != nil {
			t.Fatal(err)
		}
		for _, c := range group.Chains {
			cases++
			want := [][]map[string]any{}
			for _, b := range c.Want {
				batch := []map[string]any{}
				for _, s := range b {
					batch = append(batch, decode(t, s))
				}
				want = append(want, batch)
			}
			if diff := cmp.Diff(want, run(t, chain(t, string(c.Transformers)), group.Batches)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", c.Transformers, diff)
			}
		}
	}
	if cases < 150 {
		t.Errorf("%d cases only", cases)
	}
}

func TestANewHolderOfACounterBeganAtZero(t *testing.T) {
	cfg := chain(t, "[{name: delta}]")
	c := cfg.Chains(pipeline.Bound{Series: 10}, ignore)[0]
	var got []string
	for i, s := range []sample.Sample{
		{Volume: sample.Uint(50), Incarnation: 1}, {Volume: sample.Uint(70), Incarnation: 1}, {Volume: sample.Uint(90), Incarnation: 2},
	} {
		s.Name, s.Kind, s.Origin, s.Time = "cpu", sample.Cumulative, sample.Walk, int64(i)
		cfg.Emit(0, c, []sample.Sample{s}, func(_ string, s *sample.Sample) { got = append(got, s.Volume.String()) })
	}
	if diff := cmp.Diff([]string{"20", "90"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestDerivedIDsFollowFromTheInput(t *testing.T) {
	cfg := chain(t, "[{name: unit_conversion, parameters: {source: {unit: B}, target: {unit: KB}}}, {name: aggregator}]")
	ids := func(id string) (all []string) {
		a, b := sample.Sample{ID: sample.ParseID(id), Name: "a", Unit: "B"}, sample.Sample{ID: sample.ParseID(id), Name: "b", Unit: "B"}
		cfg.Emit(0, cfg.Chains(pipeline.Bound{Series: 10}, ignore)[0], []sample.Sample{a, b}, func(_ string, s *sample.Sample) { all = append(all, s.ID.String()) })
		return all
	}
	first, again, other := ids("x"), ids("x"), ids("y")
	if diff := cmp.Diff(first, again); diff != "" || len(first) != 2 {
		t.Errorf("a second time (-first +second):\n%s", diff)
	}
	if all := slices.Concat(first, other); len(all) != 4 || len(slices.Compact(slices.Sorted(slices.Values(all)))) != 4 {
		t.Errorf("ids %v", all)
	}
	passed := chain(t, "[{name: unit_conversion, parameters: {source: {unit: MB}}}, {name: accumulator}]")
	passed.Emit(0, passed.Chains(pipeline.Bound{Series: 10}, ignore)[0], []sample.Sample{{ID: sample.ParseID("x"), Unit: "B"}}, func(_ string, s *sample.Sample) {
		if s.ID.Text != "x" {
			t.Errorf("a sample that is as it was has the id %s", s.ID)
		}
	})
}

// TestStagesForgetWhatTheyCannotHold gives each stage more series than it may
// remember.
func TestStagesForgetWhatTheyCannotHold(t *testing.T) {
	for stages, want := range map[string][2]int{ // what comes out of the last two rounds
		"[{name: rate_of_change}]":                                        {0, 0},
		"[{name: aggregator, parameters: {size: 1000000}}]":               {100, 100}, // let go early
		"[{name: accumulator, parameters: {size: 1000000}}]":              {100, 100},
		"[{name: arithmetic, parameters: {target: {expr: $(a) + $(b)}}}]": {0, 10},
	} {
		cfg := chain(t, stages)
		c := cfg.Chains(pipeline.Bound{Series: 10}, ignore)[0]
		var got [2]int
		for round, name := range []string{"a", "b"} {
			var samples []sample.Sample
			for i := range 100 {
				// Backwards: the newest of the first round come first.
				samples = append(samples, sample.Sample{Name: name, Resource: fmt.Sprint(99*round + i*(1-2*round)), Time: int64(round)})
			}
			cfg.Emit(0, c, samples, func(string, *sample.Sample) { got[round]++ })
		}
		if got != want {
			t.Errorf("%s: got %v, want %v", stages, got, want)
		}
	}
}

// TestABatchThatComesAgainGivesTheSameAgain has a rate, which would be 0 if it
// were computed a second time.
func TestABatchThatComesAgainGivesTheSameAgain(t *testing.T) {
	cfg := chain(t, "[{name: rate_of_change}]")
	s := splitter(t, cfg, 10)
	var got []string
	for _, at := range []int64{1, 2, 2, 1, 3} {
		b := sample.NewBuilder()
		b.Row(sample.Row{Resource: "r"})
		b.Add(sample.MeterRef{Name: "m", Kind: sample.Cumulative}, sample.Walk, sample.Uint(uint64(10*at*at)))
		in := b.Build()
		in.ID, in.Base = sample.NewBatchID(time.UnixMilli(1000)), at*1e6
		copy(in.ID[8:], []byte{0x80, byte(at), 0, 0, 0, 0})
		in.ID[6], in.ID[7] = 0x80, 0
		s.Split(in, func(_ []int, part *sample.Batch) {
			for s := range part.Samples() {
				got = append(got, fmt.Sprint(at, " ", s.Volume, " ", s.ID))
			}
		})
	}
	if len(got) != 3 || got[0] != got[1] || !strings.HasPrefix(got[0], "2 30.0 ") || !strings.HasPrefix(got[2], "3 50.0 ") {
		t.Errorf("got %q", got)
	}
}

// TestBatchesOfAChainAreTheItemsThatItEmits compares what a splitter makes of
// random batches with what comes out of the chain.
func TestBatchesOfAChainAreTheItemsThatItEmits(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, stages := range []string{
		"[{name: unit_conversion, parameters: {target: {name: x}}}]", // several meters become one: a row needs a copy
		"[{name: accumulator, parameters: {size: 20}}]",
		"[{name: aggregator, parameters: {size: 7}}, {name: delta}]",
	} {
		cfg := chain(t, stages)
		s, c := splitter(t, cfg, 1000), cfg.Chains(pipeline.Bound{Series: 1000}, ignore)[0]
		for range 300 {
			b := random(r)
			var want, got []string
			text := func(s *sample.Sample) string {
				return fmt.Sprint(s.ID, s.Name, s.Volume, s.Resource, s.Time, s.Origin)
			}
			cfg.Emit(0, c, slices.Collect(b.Samples()), func(_ string, s *sample.Sample) { want = append(want, text(s)) })
			s.Split(b, func(_ []int, part *sample.Batch) {
				if err := part.Check(); err != nil || part.IDs == nil && part.Len() > 0 || part.Node != "notifier-1" || len(part.Gaps) != len(b.Gaps) {
					t.Fatalf("got %+v, %v", part, err)
				}
				for x := range part.Samples() {
					got = append(got, text(&x))
				}
			})
			slices.Sort(want)
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("%s (-want +got):\n%s", stages, diff)
			}
		}
	}
}

func TestALargeBatchIsSplit(t *testing.T) {
	cfg := chain(t, "[{name: accumulator, parameters: {size: 70000}}]")
	s := splitter(t, cfg, 1<<20)
	var sizes []int
	ids := map[sample.BatchID]bool{}
	for range 2 {
		b := sample.NewBuilder()
		for i := range 40_000 {
			b.Row(sample.Row{Resource: fmt.Sprint(i)})
			b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(uint64(i)))
		}
		in := b.Build()
		in.ID = sample.NewBatchID(time.Now())
		s.Split(in, func(_ []int, part *sample.Batch) {
			sizes = append(sizes, part.Len())
			ids[part.ID] = true
			if err := part.Check(); err != nil {
				t.Error(err)
			}
		})
	}
	if diff := cmp.Diff([]int{1 << 16, 80_000 - 1<<16}, sizes); diff != "" || len(ids) != 2 {
		t.Errorf("%d ids (-want +got):\n%s", len(ids), diff)
	}
}

func BenchmarkStages(b *testing.B) {
	for name, stages := range map[string]string{
		"unit_conversion":             "[{name: unit_conversion, parameters: {source: {unit: ns}, target: {unit: s, scale: 'volume / 10**9'}}}]",
		"unit_conversion by a number": "[{name: unit_conversion, parameters: {target: {unit: x, scale: 0.001}}}]",
		"rate_of_change":              "[{name: rate_of_change, parameters: {target: {unit: /s, type: gauge}}}]",
	} {
		b.Run(name, func(b *testing.B) {
			cfg := chain(b, stages)
			s := splitter(b, cfg, 1<<20)
			in := tick()
			n := 0
			b.ReportAllocs()
			cpu := cpuTime(b)
			for b.Loop() {
				in.Base += 1e7
				binary.BigEndian.PutUint64(in.ID[:], uint64(in.Base)) // another batch
				s.Split(in, func(_ []int, part *sample.Batch) { n += part.Len() })
			}
			b.ReportMetric(float64(cpuTime(b)-cpu)/float64(b.N*in.Len()), "cpu-ns/sample")
		})
	}
}

// cpuTime is the CPU time that the process has used.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
