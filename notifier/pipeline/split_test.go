package pipeline_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/sample"
)

func load(t testing.TB, meters string) *pipeline.Config {
	t.Helper()
	cfg, err := pipeline.Load("p.yaml", []byte("sources: [{name: s, meters: ["+meters+"], sinks: [k]}]\nsinks: [{name: k, publishers: [store://]}]"))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// random makes a batch of some meters and rows, with ids of its own or not.
func random(r *rand.Rand) *sample.Batch {
	b := sample.NewBuilder()
	meters := 1 + r.IntN(6)
	for i := range r.IntN(40) {
		b.Row(sample.Row{Resource: fmt.Sprint("r", i), Offset: int64(i)})
		for m := range meters {
			if r.IntN(3) == 0 {
				origin := []sample.Origin{sample.Walk, sample.Libvirt}[r.IntN(2)]
				b.Add(sample.MeterRef{Name: fmt.Sprint("m", m), Kind: sample.Cumulative}, origin, sample.Uint(r.Uint64()))
			}
		}
	}
	if r.IntN(4) == 0 {
		b.Gap(sample.Gap{Meter: "*", Resource: "*", Reason: "late"})
	}
	out := b.Build()
	out.ID, out.Node, out.Seq = sample.NewBatchID(time.UnixMilli(r.Int64N(1<<40))), "node-1", r.Uint64()
	out.Since = r.Int64N(3)
	if r.IntN(3) == 0 {
		for i := range out.Len() {
			out.IDs = append(out.IDs, fmt.Sprint("foreign ", i))
		}
	}
	return out
}

func TestNoPipelineMakesLosesOrChangesASample(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	cfg := load(t, `"*", "!m1", "!m3"`)
	s := splitter(t, cfg, 0)
	for range 2000 {
		b := random(r)
		var want, got []sample.Sample
		for x := range b.Samples() {
			if x.Name != "m1" && x.Name != "m3" {
				want = append(want, x)
			}
		}
		calls := 0
		s.Split(b, func(_ []int, part *sample.Batch) {
			calls++
			if err := part.Check(); err != nil {
				t.Fatal(err)
			}
			for x := range part.Samples() {
				got = append(got, x)
			}
			gaps := slices.Clone(b.Gaps)
			for i := range gaps {
				if part != b {
					gaps[i].Node = "node-1"
				}
			}
			if diff := cmp.Diff(gaps, part.Gaps); diff != "" {
				t.Fatalf("gaps (-want +got):\n%s", diff)
			}
			if whole := len(want) == b.Len(); whole != (part == b) {
				t.Fatalf("%d of %d samples pass, but whole is %v", len(want), b.Len(), part == b)
			}
			if part != b && (part.ID != sample.DeriveBatchID(b.ID, "s:k") || part.Node != "notifier-1" || part.IDs == nil) {
				t.Fatalf("derived batch %s of %s, ids %v", part.ID, part.Node, part.IDs)
			}
			if part.Host() != "node-1" || part.Since != b.Since {
				t.Fatalf("measured by %q, metered since %d, want node-1 and %d", part.Host(), part.Since, b.Since)
			}
		})
		if !reflect.DeepEqual(want, got) { // much faster than cmp.Diff
			t.Fatalf("samples (-want +got):\n%s", cmp.Diff(want, got))
		}
		if some := len(want) > 0 || len(b.Gaps) > 0 || b.Len() == 0; some != (calls == 1) {
			t.Fatalf("%d samples and %d gaps pass in %d parts", len(want), len(b.Gaps), calls)
		}
	}
}

// tick is what a host of 50 domains sends: 20 meters each.
func tick() *sample.Batch {
	b := sample.NewBuilder()
	for i := range 50 {
		b.Row(sample.Row{Resource: fmt.Sprintf("5e1f0000-0000-4000-8000-%012d", i), Source: "openstack", Metadata: make([]byte, 640)})
		for _, m := range sample.Catalogue[:20] {
			b.Add(m.MeterRef, m.Origins[0], sample.Uint(uint64(i)<<40))
		}
	}
	out := b.Build()
	out.ID, out.Node = sample.NewBatchID(time.Now()), "node-1"
	return out
}

func BenchmarkSplit(b *testing.B) {
	for name, meters := range map[string]string{
		"all":          `"*"`,
		"all by names": `"cpu*", "disk.*", "network.*", "check.*"`,
		"one of 20":    `cpu`,
		"19 of 20":     `"*", "!cpu"`,
	} {
		b.Run(name, func(b *testing.B) {
			cfg := load(b, meters)
			s := splitter(b, cfg, 0)
			in := tick()
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				s.Split(in, func(_ []int, part *sample.Batch) { n += part.Len() })
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*in.Len()), "ns/sample")
		})
	}
}
