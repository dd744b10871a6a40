package storetest

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

// testRandom feeds the engine and the reference with the same batches and
// asks both the same questions.
func testRandom(t *testing.T, f *fixture) {
	if _, itself := f.Store.(*memory.Store); itself {
		return // the reference, compared with itself, cannot fail
	}
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	for seed := range uint64(rounds) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			f := newFixture(t, f.engine)
			g := &generator{Rand: rand.New(rand.NewPCG(seed, 42)), seqs: map[string]uint64{}}
			reference := memory.New(f.clock)
			for range 40 {
				step(t, f, reference, g)
				switch g.IntN(12) {
				case 0:
					f.reopen(t)
				case 1, 2:
					f.settle(t)
				case 3, 4, 5:
					ask(t, f.Store, reference, g)
				}
			}
			f.everywhere(t, func(t *testing.T) {
				for range 20 {
					ask(t, f.Store, reference, g)
				}
			})
		})
	}
}

func step(t *testing.T, f *fixture, reference store.Store, g *generator) {
	f.advance(time.Duration(g.IntN(3)) * time.Second)
	var batches []store.Received
	for range 1 + g.IntN(4) {
		if len(g.sent) > 0 && g.IntN(5) == 0 {
			batches = append(batches, g.sent[g.IntN(len(g.sent))])
			continue
		}
		b := seal(g.batch())
		g.sent = append(g.sent, b)
		batches = append(batches, b)
	}
	want, err := reference.Append(context.Background(), batches)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, f.append(t, batches...), want)
}

// ask compares the answers to one random question of each kind.
func ask(t *testing.T, s, reference store.Store, g *generator) {
	ctx := context.Background()
	filter := g.filter(3)
	got, want := collect(t, s, filter), collect(t, reference, filter)
	if !slices.EqualFunc(got, want, sameSample) {
		diff := cmp.Diff(want, got, emptyBytes)
		t.Fatalf("samples %s:\ngot (+) is not what is wanted (-):\n%s", describe(filter), diff)
	}
	if all := collect(t, reference, store.Filter{}); len(all) > 0 {
		want := all[g.IntN(len(all))]
		// Several samples may share a foreign id; any of them will do.
		if got, err := s.Sample(ctx, want.ID); err != nil || got.ID != want.ID {
			t.Fatalf("sample %s: got %v, %v", want.ID, got, err)
		}
	}
	resources, err := s.Resources(ctx, filter)
	if err != nil {
		t.Fatal(err)
	}
	wantResources, _ := reference.Resources(ctx, filter)
	if diff := cmp.Diff(wantResources, resources, emptyBytes); diff != "" {
		t.Fatalf("resources %s:\ngot (+) is not what is wanted (-):\n%s", describe(filter), diff)
	}
	filter = g.filter(2, store.FieldTime, store.FieldRecorded, store.FieldVolume, store.FieldID)
	meters, err := s.Meters(ctx, filter)
	if err != nil {
		t.Fatal(err)
	}
	wantMeters, _ := reference.Meters(ctx, filter)
	if diff := cmp.Diff(wantMeters, meters); diff != "" {
		t.Fatalf("meters %s:\ngot (+) is not what is wanted (-):\n%s", describe(filter), diff)
	}
	q := g.statistics()
	stats, err := s.Statistics(ctx, q)
	if err != nil {
		t.Fatal(err)
	}
	wantStats, _ := reference.Statistics(ctx, q)
	if diff := cmp.Diff(wantStats, stats, cmp.Comparer(sameStatistics)); diff != "" {
		t.Fatalf("statistics %+v %s:\ngot (+) is not what is wanted (-):\n%s", q, describe(q.Filter), diff)
	}
	askUsage(t, s, reference, g)
	from := base - hour + g.Int64N(2*hour)
	to := from + g.Int64N(hour)
	gaps, err := s.Gaps(ctx, from, to)
	if err != nil {
		t.Fatal(err)
	}
	wantGaps, _ := reference.Gaps(ctx, from, to)
	if diff := cmp.Diff(wantGaps, gaps); diff != "" {
		t.Fatalf("gaps:\ngot (+) is not what is wanted (-):\n%s", diff)
	}
}

// askUsage compares the usage of a random period: to the last unit.
func askUsage(t *testing.T, s, reference store.Store, g *generator) {
	q := g.usage()
	want, got := collectUsage(t, reference, q), collectUsage(t, s, q)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("usage from %d to %d by %q %s:\ngot (+) is not what is wanted (-):\n%s", q.From, q.To, q.SplitBy, describe(q.Filter), diff)
	}
	if len(got) == 0 || q.To-q.From < 2 {
		return
	}
	// The parts of a period add up to it.
	type key struct{ resource, name, kind, unit, project, source, split string }
	sums := map[key]store.Exact{}
	middle := q.From + 1 + g.Int64N(q.To-q.From-1)
	part := func(from, to int64, sign int) {
		for _, u := range collectUsage(t, s, store.UsageQuery{From: from, To: to, Filter: q.Filter, SplitBy: q.SplitBy}) {
			k := key{u.Resource, u.Name, string(u.Kind), u.Unit, u.Project, u.Source, ""}
			for _, v := range u.Split {
				if v == nil {
					k.split += "-"
				} else {
					k.split += "+" + *v
				}
			}
			sum := sums[k]
			if sign > 0 {
				sum.Add(u.Quantity)
			} else {
				sum.Sub(u.Quantity)
			}
			sums[k] = sum
		}
	}
	part(q.From, middle, 1)
	part(middle, q.To, 1)
	part(q.From, q.To, -1)
	for k, sum := range sums {
		if sum.Sign() != 0 {
			t.Fatalf("usage of %v from %d to %d, parted at %d, is off by %s", k, q.From, q.To, middle, sum)
		}
	}
}

func collectUsage(t testing.TB, s store.Store, q store.UsageQuery) []store.Usage {
	t.Helper()
	var out []store.Usage
	if err := s.Usage(context.Background(), q, func(u store.Usage) bool {
		out = append(out, u)
		return true
	}); err != nil {
		t.Fatalf("usage: %v", err)
	}
	return out
}

// sameSample is much faster than cmp.
func sameSample(a, b store.Sample) bool {
	metadata := string(a.Metadata) == string(b.Metadata)
	a.Metadata, b.Metadata = nil, nil
	return metadata && reflect.DeepEqual(a, b)
}

// sameStatistics allows sums to differ by what float64 rounds away.
func sameStatistics(a, b store.Statistics) bool {
	if store.Compare(a.Min, b.Min) != 0 || store.Compare(a.Max, b.Max) != 0 {
		return false
	}
	largest := max(math.Abs(a.Min.Float64()), math.Abs(a.Max.Float64()))
	close := func(x, y, scale float64) bool {
		return x == y || math.Abs(x-y) <= 1e-12*scale*float64(a.Count) || math.IsInf(scale, 0)
	}
	return close(a.Sum, b.Sum, largest) && close(a.SumSquares, b.SumSquares, largest*largest) &&
		slices.EqualFunc(a.Group, b.Group, func(x, y *string) bool { return cmp.Equal(x, y) }) &&
		slices.Equal(a.Cardinality, b.Cardinality) && a.Unit == b.Unit && a.Count == b.Count &&
		a.First == b.First && a.Last == b.Last && a.Bucket == b.Bucket && a.Start == b.Start
}

// describe prints a filter.
func describe(f store.Filter) string {
	join := func(fs []store.Filter, op string) string {
		s := "("
		for i := range fs {
			if i > 0 {
				s += " " + op + " "
			}
			s += describe(fs[i])
		}
		return s + ")"
	}
	switch {
	case f.Cond != nil:
		return fmt.Sprintf("%s%s %s %v", f.Cond.Field, f.Cond.Key, f.Cond.Op, f.Cond.Value)
	case f.Not != nil:
		return "not " + describe(*f.Not)
	case f.Or != nil:
		return join(f.Or, "or")
	}
	return join(f.And, "and")
}

// generator makes random batches and queries out of a few names, so that
// they meet.
type generator struct {
	*rand.Rand
	seqs map[string]uint64
	sent []store.Received
}

func pick[T any](g *generator, from ...T) T { return from[g.IntN(len(from))] }

func (g *generator) resource() string { return fmt.Sprint("vm-", g.IntN(6)) }
func (g *generator) meterName() string {
	return pick(g, "cpu", "memory", "disk.read.bytes", "power")
}
func (g *generator) unit() string    { return pick(g, "ns", "ns", "ns", "MB") }
func (g *generator) kind() string    { return pick(g, "cumulative", "cumulative", "gauge") }
func (g *generator) project() string { return pick(g, "p1", "p1", "p2", "") }
func (g *generator) user() string    { return pick(g, "u1", "u1", "u1", "u2", "") }
func (g *generator) source() string  { return pick(g, "openstack", "openstack", "openstack", "other") }

func (g *generator) time() int64 {
	switch g.IntN(12) {
	case 0:
		return base + g.Int64N(6*day) - 3*day
	case 1:
		return base + pick(g, 0, second, 5*minute, day, -day) // likely equal to others
	case 2:
		return pick(g, math.MinInt64/2, int64(0), int64(-1), math.MaxInt64/2)
	}
	return base + g.Int64N(20*minute)
}

func (g *generator) metadata() []byte {
	return []byte(pick(g,
		``, `{}`, `{"flavor":{"name":"small","vcpus":2},"tags":["a","b"]}`,
		`{"flavor":{"name":"small","vcpus":2},"tags":["a","b"]}`, `{"flavor":{"name":"large","vcpus":4.5},"up":true}`,
		`{"flavor":null,"up":"true"}`, `{"flavor.name":"small"}`, `[1]`, `{`))
}

func (g *generator) volume(tag sample.Tag) sample.Volume {
	switch tag {
	case sample.U64:
		return sample.Uint(pick(g, g.Uint64N(10), g.Uint64N(10), g.Uint64(), math.MaxUint64, 1<<53+g.Uint64N(3)))
	case sample.I64:
		return sample.Int(pick(g, g.Int64N(10)-5, int64(g.Uint64()), math.MinInt64, math.MaxInt64))
	}
	return sample.Float(pick(g, float64(g.IntN(1000))/100, g.NormFloat64(), 0, math.Copysign(0, -1), float64(g.IntN(10)), g.ExpFloat64()*1e12))
}

// counter returns what a counter has at a time of a clock that is set to and fro by
// minutes.
func (g *generator) counter(tag sample.Tag, t int64) sample.Volume {
	n := int64(0)
	if t > base-4*day {
		n = (min(t-base+4*day, 8*day)/second+g.Int64N(600))<<43 + g.Int64N(3)
	}
	switch tag {
	case sample.U64:
		return sample.Uint(uint64(n))
	case sample.I64:
		return sample.Int(n)
	}
	return sample.Float(float64(n))
}

func (g *generator) batch() *sample.Batch {
	node := pick(g, "node-1", "node-2", "node-3")
	g.seqs[node] += 1 + g.Uint64N(2)
	b := &sample.Batch{
		ID: sample.NewBatchID(time.UnixMicro(base + g.Int64N(hour))), Node: node,
		Epoch: uint64(1 + g.IntN(2)), Seq: g.seqs[node], Base: g.time(),
	}
	if b.Seq > 3 && g.IntN(6) == 0 {
		b.Seq = 1 + g.Uint64N(b.Seq) // out of order; may be taken
	}
	for range 1 + g.IntN(8) {
		b.Rows = append(b.Rows, sample.Row{
			Resource: g.resource(), Offset: pick(g, 0, 0, 0, g.Int64N(minute), -g.Int64N(second)),
			Incarnation: sample.Incarnation(g.Uint64N(2) << 40), Source: g.source(), Project: g.project(), User: g.user(), Metadata: g.metadata(),
		})
	}
	for range g.IntN(5) {
		meter := sample.MeterRef{Name: g.meterName(), Kind: sample.Kind(g.kind()), Unit: g.unit()}
		m := slices.Index(b.Meters, meter)
		if m < 0 {
			m = len(b.Meters)
			b.Meters = append(b.Meters, meter)
		}
		c := sample.Column{
			Meter: m, Origin: pick(g, sample.Walk, sample.Walk, sample.Libvirt, ""), Tag: pick(g, sample.U64, sample.U64, sample.I64, sample.F64),
			Bitmap: make([]byte, (len(b.Rows)+7)/8),
		}
		for r := range b.Rows {
			if g.IntN(4) > 0 {
				c.Bitmap[r/8] |= 1 << (r % 8)
				v := g.volume(c.Tag)
				if row := &b.Rows[r]; meter.Kind == sample.Cumulative && row.Incarnation != 0 {
					v = g.counter(c.Tag, b.Base+row.Offset)
				}
				c.Values = append(c.Values, v.Bits)
			}
		}
		b.Columns = append(b.Columns, c)
	}
	for range g.IntN(3) / 2 {
		from := base - hour + g.Int64N(2*hour)
		b.Gaps = append(b.Gaps, sample.Gap{Meter: pick(g, "*", "cpu"), Resource: g.resource(), From: from, To: from + g.Int64N(hour), Reason: "test"})
	}
	if g.IntN(5) == 0 {
		b.IDs = []string{}
		for range b.Len() {
			b.IDs = append(b.IDs, g.id())
		}
	}
	return b
}

// id returns an id for a foreign sample: new, or that of another sample.
func (g *generator) id() string {
	if len(g.sent) > 0 && g.IntN(4) == 0 {
		if b := g.sent[g.IntN(len(g.sent))].Batch; b.Len() > 0 {
			return b.SampleID(g.IntN(b.Len())).String()
		}
	}
	return pick(g, fmt.Sprint("foreign-", g.IntN(50)), sample.NewBatchID(time.UnixMicro(base)).Sample(g.IntN(9)).String())
}

// filter makes a filter of at most depth levels that names none of the fields
// in without.
func (g *generator) filter(depth int, without ...store.Field) store.Filter {
	if depth > 1 {
		switch g.IntN(6) {
		case 0, 1, 2:
			return store.Filter{And: g.filters(depth, without)}
		case 3:
			return store.Filter{Or: g.filters(depth, without)}
		case 4:
			sub := g.filter(depth-1, without...)
			return store.Filter{Not: &sub}
		}
	}
	for {
		c := g.cond()
		if !slices.Contains(without, c.Field) {
			return store.Filter{Cond: &c}
		}
	}
}

func (g *generator) filters(depth int, without []store.Field) []store.Filter {
	fs := make([]store.Filter, g.IntN(4))
	for i := range fs {
		fs[i] = g.filter(depth-1, without...)
	}
	return fs
}

func (g *generator) cond() store.Cond {
	c := g.comparison()
	switch g.IntN(12) {
	case 0:
		return g.list(c)
	case 1:
		c.Op, c.Value = store.Match, pick(g, "1$", "^cpu", "[a-m]", ":00", "(?i)A", ".")
	}
	return c
}

// list makes a condition of a list of some values that a comparison of the
// same field may have.
func (g *generator) list(c store.Cond) store.Cond {
	var values []any
	for len(values) < 3 {
		if other := g.comparison(); other.Field == c.Field && other.Value != nil {
			values = append(values, other.Value)
		}
	}
	c.Op, c.Value = store.In, values
	return c
}

func (g *generator) comparison() store.Cond {
	op := pick(g, store.Eq, store.Eq, store.Eq, store.Eq, store.Ne, store.Lt, store.Le, store.Gt, store.Ge)
	text := func(f store.Field, v string) store.Cond {
		if g.IntN(8) == 0 {
			return store.Cond{Field: f, Op: store.Eq}
		}
		return store.Cond{Field: f, Op: op, Value: v}
	}
	switch g.IntN(13) {
	case 0, 1:
		return text(store.FieldMeter, g.meterName())
	case 2, 3:
		return text(store.FieldResource, g.resource())
	case 4:
		return text(store.FieldProject, g.project())
	case 5:
		return text(store.FieldUser, g.user())
	case 6:
		return pick(g, text(store.FieldSource, g.source()), text(store.FieldKind, g.kind()), text(store.FieldUnit, g.unit()))
	case 7, 8:
		return store.Cond{Field: store.FieldTime, Op: op, Value: g.time()}
	case 9:
		return store.Cond{Field: store.FieldRecorded, Op: op, Value: time.Date(2026, 1, 2, 3, 4, g.IntN(60), 678000, time.UTC).UnixMicro()}
	case 10:
		return store.Cond{Field: store.FieldVolume, Op: op, Value: g.volume(pick(g, sample.U64, sample.I64, sample.F64))}
	case 11:
		return text(store.FieldID, g.id())
	}
	return store.Cond{
		Field: store.FieldMetadata, Key: pick(g, "flavor.name", "flavor.vcpus", "tags[0]", "up", "flavor", "missing"), Op: op,
		Value: pick[any](g, "small", "large", 2.0, 4.5, true, "true", "a", nil),
	}
}

func (g *generator) usage() store.UsageQuery {
	q := store.UsageQuery{Filter: store.Filter{}}
	if g.IntN(2) == 0 {
		q.Filter = g.filter(2, store.FieldTime, store.FieldRecorded, store.FieldVolume, store.FieldID)
	}
	unit := pick(g, 1, minute, 5*minute, hour, day) // whole periods are what rollups have
	q.From = (base - hour + g.Int64N(90*minute)) / unit * unit
	q.To = q.From + unit*(1+g.Int64N(3*hour/min(unit, hour)))
	for range g.IntN(3) {
		q.SplitBy = append(q.SplitBy, pick(g, "flavor.name", "flavor.vcpus", "up"))
	}
	return q
}

func (g *generator) statistics() store.StatisticsQuery {
	q := store.StatisticsQuery{Filter: g.filter(3), Period: pick(g, 0, 0, 60, 600, int64(86400))}
	if g.IntN(2) == 0 {
		q.Start = new(base + g.Int64N(hour) - hour/2)
	}
	for range g.IntN(3) {
		q.GroupBy = append(q.GroupBy, pick(g, store.Group{Field: store.FieldResource}, store.Group{Field: store.FieldProject},
			store.Group{Field: store.FieldMeter}, store.Group{Field: store.FieldMetadata, Key: "flavor.name"}, store.Group{Field: store.FieldMetadata, Key: "flavor"}))
	}
	if g.IntN(2) == 0 {
		q.Cardinality = []store.Field{store.FieldUser, store.FieldResource}
	}
	return q
}
