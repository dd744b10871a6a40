package storetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

func (f *fixture) usage(t testing.TB, from, to int64, splitBy ...string) []string {
	t.Helper()
	var out []string
	for _, u := range collectUsage(t, f.Store, store.UsageQuery{From: base + from, To: base + to, SplitBy: splitBy}) {
		line := fmt.Sprint(u.Name, " ", u.Resource, " ", u.Project, " ", u.Quantity, " of ", u.Count, ", covers ", u.Covered/second, " s")
		for _, s := range u.Split {
			if s != nil {
				line += " " + *s
			} else {
				line += " -"
			}
		}
		for _, g := range u.Gaps {
			line += " gap: " + g.Reason
		}
		out = append(out, line)
	}
	return out
}

// reading makes a sample of a meter.
func reading(name string, kind sample.Kind, after int64, v sample.Volume, incarnation sample.Incarnation) sample.Sample {
	s := cpu(after, v)
	s.Name, s.Kind, s.Incarnation = name, kind, incarnation
	return s
}

func testUsage(t *testing.T, f *fixture) {
	add := func(samples ...sample.Sample) { f.append(t, f.batch(samples...)) }
	add(reading("other", sample.Gauge, -2*hour, sample.Uint(1), 1)) // the node is metered from here on
	c := sample.Cumulative
	add(reading("cpu", c, -10*minute, sample.Uint(700), 5), reading("cpu", c, 0, sample.Uint(1000), 5), reading("cpu", c, minute, sample.Uint(1500), 5))
	add(reading("cpu", c, 3*minute, sample.Uint(40), 6), reading("cpu", c, 4*minute, sample.Uint(45), 6)) // started anew
	late := reading("cpu", c, 2*minute, sample.Uint(1600), 5)
	add(late)
	large := reading("cpu", c, 5*minute, sample.Uint(50), 6)
	large.Metadata, large.Project = []byte(`{"flavor":{"name":"large"}}`), "p2"
	add(large)
	// A foreign counter that goes back started anew; its first sample says nothing.
	for i, v := range []uint64{10, 30, 7, 9} {
		s := reading("foreign", c, int64(i)*minute, sample.Uint(v), 0)
		s.Resource = "vm-2"
		f.append(t, received(100+uint64(i), []string{fmt.Sprint("f-", i)}, s))
	}
	// The clock of its node was set back by four minutes after the fifth.
	for i, after := range []int64{-20, 0, 2, 4, 6, 3, 5, 7, 8} {
		s := reading("stepped", c, after*minute, sample.Uint(100+uint64(i)*10), 7)
		s.Resource = "vm-3"
		add(s)
	}
	on := func(node string, m sample.Sample, resource string) {
		m.Resource = resource
		b := f.batch(m)
		b.Batch.Node = node
		f.append(t, seal(b.Batch))
	}
	// It migrates to another node, and both have it for a while.
	on("node-2", reading("migrates", c, -hour, sample.Uint(1), 10), "vm-4") // it is metered from here on
	on("node-1", reading("migrates", c, 0, sample.Uint(100), 8), "vm-4")
	on("node-2", reading("migrates", c, minute, sample.Uint(0), 9), "vm-4")
	on("node-1", reading("migrates", c, 2*minute, sample.Uint(160), 8), "vm-4")
	on("node-2", reading("migrates", c, 3*minute, sample.Uint(30), 9), "vm-4")
	on("node-1", reading("migrates", c, 3*minute+1, sample.Uint(165), 8), "vm-4")
	on("node-2", reading("migrates", c, 4*minute, sample.Uint(70), 9), "vm-4")
	// It ran for a year before its node was metered; its disks are polled seldom.
	on("node-3", reading("old cpu", c, 0, sample.Uint(1_000_000), 11), "vm-5")
	on("node-3", reading("old disk", c, 5*minute, sample.Uint(9_000_000), 12), "vm-5")
	on("node-3", reading("old disk", c, 6*minute, sample.Uint(9_000_006), 12), "vm-5")
	// Its node had no domains before, but was metered.
	empty := f.batch(reading("first", c, 0, sample.Uint(70), 13))
	empty.Batch.Node, empty.Batch.Since, empty.Batch.Rows[0].Resource = "node-4", base-hour, "vm-6"
	f.append(t, seal(empty.Batch))
	// A notifier, which central has known for long, passes a part of what another node
	// measures: of a domain that ran before, and of one that came later.
	relayed := func(resource string, after int64, v uint64, incarnation sample.Incarnation) {
		m := reading("relayed", c, after, sample.Uint(v), incarnation)
		m.Resource = resource
		b := f.batch(m).Batch
		b.IDs = []string{m.ID.String()}
		b.Node, b.Of, b.Since, b.Epoch, b.Seq = "node-2", "node-5", base-minute, 0, 0
		f.append(t, seal(b))
	}
	relayed("vm-7", 0, 5_000_000, 14)
	relayed("vm-7", minute, 5_000_003, 14)
	relayed("vm-8", 20*minute, 90, 15)
	add(reading("events", sample.Delta, 0, sample.Uint(3), 0), reading("events", sample.Delta, 5*minute, sample.Uint(4), 0), reading("events", sample.Delta, 10*minute, sample.Uint(5), 0))
	// 2.5 for 10 minutes, 7.5 of them in the period; then nothing for two hours.
	g := sample.Gauge
	add(reading("memory", g, -minute*5/2, sample.Float(2.5), 5), reading("memory", g, minute*15/2, sample.Float(4), 5), reading("memory", g, 130*minute, sample.Float(8), 5))
	gap := f.batch()
	gap.Batch.Gaps = []sample.Gap{
		{Meter: "cpu", Resource: "vm-1", From: base, To: base + minute, Reason: "stuck"},
		{Meter: "*", Resource: "vm-9", From: base, To: base + minute, Reason: "another's"},
		{Meter: "*", Resource: "*", From: base + 9*minute, To: base + 11*minute, Reason: "agent was down"},
	}
	f.append(t, seal(gap.Batch))
	f.everywhere(t, func(t *testing.T) {
		equal(t, f.usage(t, 0, 10*minute), []string{
			"cpu vm-1 p1 945 of 5, covers 180 s gap: stuck gap: agent was down",
			"cpu vm-1 p2 5 of 1, covers 60 s gap: stuck gap: agent was down",
			"events vm-1 p1 7 of 2, covers 0 s gap: agent was down",
			fmt.Sprint("memory vm-1 p1 ", 450*5*second/2, " of 1, covers 450 s gap: agent was down"),
			"foreign vm-2 p1 29 of 4, covers 180 s gap: agent was down",
			"stepped vm-3 p1 80 of 8, covers 480 s gap: agent was down",
			"migrates vm-4 p1 235 of 6, covers 360 s gap: agent was down",
			"old cpu vm-5 p1 0 of 1, covers 0 s",
			"old disk vm-5 p1 6 of 2, covers 60 s",
			"first vm-6 p1 70 of 1, covers 0 s",
			"relayed vm-7 p1 3 of 2, covers 60 s",
		})
		if rows := f.usage(t, 15*minute, 25*minute); !slices.Contains(rows, "relayed vm-8 p1 90 of 1, covers 0 s") {
			t.Errorf("got %q, a domain that came when its node was metered for long counts from zero", rows)
		}
		parts := map[int64]string{0: "50 of 3", 4: "10 of 3", 7: "20 of 2"} // they add up
		for from, to := range map[int64]int64{0: 4, 4: 7, 7: 9} {
			rows := f.usage(t, from*minute, to*minute)
			if got := rows[slices.IndexFunc(rows, func(r string) bool { return strings.HasPrefix(r, "stepped") })]; !strings.HasPrefix(got, "stepped vm-3 p1 "+parts[from]) {
				t.Errorf("from minute %d to %d: got %q, want %q", from, to, got, parts[from])
			}
		}
		equal(t, f.usage(t, 2*minute, 6*minute, "flavor.name")[:2], []string{
			"cpu vm-1 p1 145 of 3, covers 60 s -",
			"cpu vm-1 p2 5 of 1, covers 60 s large",
		})
		if err := f.Usage(context.Background(), store.UsageQuery{From: base, To: base}, nil); err == nil {
			t.Error("an empty period: got no error")
		}
		if err := f.Usage(context.Background(), store.UsageQuery{From: base, To: base + 1, Filter: store.Where(store.FieldTime, store.Gt, base)}, nil); err == nil {
			t.Error("a filter by time: got no error")
		}
	})
}

// testDense feeds hours of regular samples, some late, with owners, metadata and
// incarnations that change now and then, and compares what an engine can make of
// summaries with the reference.
func testDense(t *testing.T, f *fixture) {
	if _, itself := f.Store.(*memory.Store); itself {
		return // the reference, compared with itself, cannot fail
	}
	for seed := range uint64(2) {
		f := newFixture(t, f.engine)
		reference := memory.New(f.clock)
		g := &generator{Rand: rand.New(rand.NewPCG(seed, 7)), seqs: map[string]uint64{}}
		d := newDense(g)
		step := 20 * second
		if testing.Short() {
			step = 90 * second
		}
		var late []store.Received
		n := 0
		for at := base - 90*minute; at < base+100*minute; at += step {
			b := d.batch(at)
			switch g.IntN(40) {
			case 0:
				late = append(late, b)
				continue
			case 1:
				late = append(late, d.foreign(at-g.Int64N(hour)))
			}
			batches := []store.Received{b}
			if len(late) > 0 && g.IntN(30) == 0 {
				batches = append(batches, late...)
				late = nil
			}
			want, err := reference.Append(context.Background(), batches)
			if err != nil {
				t.Fatal(err)
			}
			equal(t, f.append(t, batches...), want)
			if n++; n%97 == 0 {
				f.settle(t)
			}
		}
		f.everywhere(t, func(t *testing.T) {
			for range 12 {
				q := g.usage()
				want, got := collectUsage(t, reference, q), collectUsage(t, f.Store, q)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("usage from %d to %d by %q %s:\ngot (+) is not what is wanted (-):\n%s", q.From, q.To, q.SplitBy, describe(q.Filter), diff)
				}
				s := g.statistics()
				s.Filter = g.filter(2, store.FieldRecorded, store.FieldVolume, store.FieldID, store.FieldTime)
				from, unit := base-hour+g.Int64N(hour), pick(g, 1, 5*minute, hour)
				s.Filter = store.And(s.Filter, store.Where(store.FieldTime, store.Ge, from/unit*unit), store.Where(store.FieldTime, store.Lt, (from+g.Int64N(2*hour)+hour)/unit*unit))
				s.NoSquares = g.IntN(2) == 0
				stats, err := f.Statistics(context.Background(), s)
				if err != nil {
					t.Fatal(err)
				}
				wantStats, _ := reference.Statistics(context.Background(), s)
				if diff := cmp.Diff(wantStats, stats, cmp.Comparer(sameStatistics)); diff != "" {
					t.Fatalf("statistics %+v %s:\ngot (+) is not what is wanted (-):\n%s", s, describe(s.Filter), diff)
				}
			}
		})
	}
}

// dense makes the samples of a node with a few resources.
type dense struct {
	*generator
	rows   []sample.Row
	values [][]uint64 // by row and meter
	seq    uint64
}

var denseMeters = []sample.MeterRef{
	{Name: "cpu", Kind: sample.Cumulative, Unit: "ns"},
	{Name: "memory", Kind: sample.Gauge, Unit: "MB"},
	{Name: "power", Kind: sample.Gauge, Unit: "ns"},
	{Name: "disk.read.bytes", Kind: sample.Delta, Unit: "ns"},
}

func newDense(g *generator) *dense {
	d := &dense{generator: g}
	for i := range 3 {
		d.rows = append(d.rows, sample.Row{Resource: fmt.Sprint("vm-", i), Source: "openstack", Project: "p1", User: "u1", Incarnation: 1 << 40, Metadata: g.metadata()})
		d.values = append(d.values, make([]uint64, len(denseMeters)))
	}
	return d
}

func (d *dense) batch(at int64) store.Received {
	d.seq++
	b := &sample.Batch{ID: sample.NewBatchID(time.UnixMicro(base)), Node: "node-1", Epoch: 1, Seq: d.seq, Base: at, Meters: denseMeters}
	for i := range d.rows {
		r := &d.rows[i]
		switch d.IntN(150) {
		case 0:
			r.Metadata = d.metadata()
		case 1:
			r.Project = d.project()
		case 2:
			r.Incarnation++
			d.values[i][0] = 0
		}
		row := *r
		row.Offset = d.Int64N(second)
		b.Rows = append(b.Rows, row)
	}
	for m := range denseMeters {
		c := sample.Column{Meter: m, Origin: pick(d.generator, sample.Walk, sample.Walk, sample.Walk, sample.Iter), Bitmap: []byte{0}}
		if m == 2 {
			c.Tag = sample.F64
		}
		for i := range d.rows {
			v := &d.values[i][m]
			switch m {
			case 0:
				*v += d.Uint64N(2e10)
			case 2:
				*v = sample.Float(100 + 50*d.Float64()).Bits
			default:
				*v = d.Uint64N(50)
			}
			if m == 1 && d.IntN(3) > 0 {
				continue // a slower meter
			}
			c.Bitmap[0] |= 1 << i
			c.Values = append(c.Values, *v)
		}
		b.Columns = append(b.Columns, c)
	}
	return seal(b)
}

// foreign makes late samples without incarnation, of counters that may go back.
func (d *dense) foreign(at int64) store.Received {
	d.seq++
	b := &sample.Batch{ID: sample.NewBatchID(time.UnixMicro(base)), Node: "notifier", Epoch: 1, Seq: d.seq, Base: at, Meters: denseMeters[:2], IDs: []string{}}
	for i := range 4 {
		b.Rows = append(b.Rows, sample.Row{Resource: "vm-1", Offset: int64(i) * 10 * second, Source: "other", Project: d.project(), Metadata: d.metadata()})
		b.IDs = append(b.IDs, d.id())
	}
	c := sample.Column{Meter: 0, Bitmap: []byte{15}, Tag: sample.I64}
	for range 4 {
		c.Values = append(c.Values, uint64(d.Int64N(100)-20))
	}
	b.Columns = append(b.Columns, c)
	return seal(b)
}
