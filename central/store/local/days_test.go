package local

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// daysOf counts the rollups of whole days.
func daysOf(t *testing.T, s *Store) (n int) {
	t.Helper()
	if err := s.scan([]byte{keyDay}, []byte{keyDay + 1}, func(_, _ []byte) error {
		n++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// usagePrinted prints the usage of a period.
func usagePrinted(t *testing.T, s *Store, from, to int64) (out string) {
	t.Helper()
	if err := s.Usage(context.Background(), store.UsageQuery{From: from, To: to}, func(u store.Usage) bool {
		out += fmt.Sprintln(u.Name, u.Kind, u.Resource, u.Project, u.Quantity, u.Count, u.First-from, u.Last-from, u.Covered, u.Origins)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// Days of a counter that restarts, of gauges with holes longer than [store.Hold],
// and of deltas: usage over whole days, over parts of them, and after late samples
// is what it is without rollups.
func TestUsageFromRollupsOfDaysIsThatOfTheSamples(t *testing.T) {
	ctx := context.Background()
	now := time.UnixMicro(start).Add(40 * 24 * time.Hour)
	o := Options{Clock: func() time.Time { return now }, Retention: -1, RollupRetention: -1}
	s, plain := open(t, t.TempDir(), o), open(t, t.TempDir(), o)
	defer closeStore(t, s)
	defer closeStore(t, plain)
	r := rand.New(rand.NewPCG(11, 12))
	first := dayOf(start).start()
	counter, incarnation := uint64(0), sample.Incarnation(1)
	seq := uint64(0)
	add := func(at int64) {
		t.Helper()
		if r.IntN(30) == 0 {
			counter, incarnation = uint64(r.IntN(5)), incarnation+1
		}
		counter += r.Uint64N(1000)
		seq++
		b := &sample.Batch{
			ID: sample.DeriveBatchID(sample.BatchID{1}, fmt.Sprint(seq)), Node: "n", Epoch: 1, Seq: seq, Base: at,
			Meters: []sample.MeterRef{{Name: "cpu", Kind: sample.Cumulative, Unit: "ns"}, {Name: "memory", Kind: sample.Gauge, Unit: "MB"}, {Name: "requests", Kind: sample.Delta, Unit: "request"}},
			Rows:   []sample.Row{{Resource: "vm", Project: fmt.Sprint("p", r.IntN(20)/19), Incarnation: incarnation, Metadata: fmt.Appendf(nil, `{"flavor":%d}`, r.IntN(40)/39)}},
			Columns: []sample.Column{
				{Meter: 0, Origin: sample.Walk, Tag: sample.U64, Bitmap: []byte{1}, Values: []uint64{counter}},
				{Meter: 1, Origin: sample.Walk, Tag: sample.U64, Bitmap: []byte{1}, Values: []uint64{r.Uint64N(4096)}},
				{Meter: 2, Origin: sample.Walk, Tag: sample.U64, Bitmap: []byte{1}, Values: []uint64{r.Uint64N(9)}},
			},
		}
		appendTick(t, s, b)
		appendTick(t, plain, b)
	}
	for at := first; at < first+5*dayLength; at += 60e6 + r.Int64N(40*60e6) {
		if r.IntN(40) == 0 {
			at += 3 * hourLength
		}
		add(at)
	}
	compare := func(when string) {
		t.Helper()
		for range 40 {
			from := first + r.Int64N(4)*dayLength
			to := from + (1+r.Int64N(4))*dayLength
			if r.IntN(2) == 0 {
				from, to = from-r.Int64N(2*dayLength), to+r.Int64N(dayLength)
			}
			if got, want := usagePrinted(t, s, from, to), usagePrinted(t, plain, from, to); got != want {
				t.Errorf("%s: from %d to %d: got\n%swant\n%s", when, from-first, to-first, got, want)
			}
		}
		if ps := verify(t, s); len(ps) > 0 {
			t.Errorf("%s: %q", when, ps)
		}
	}
	if err := s.Roll(ctx); err != nil {
		t.Fatal(err)
	}
	if n := daysOf(t, s); n != 3*5 {
		t.Fatalf("got rollups of %d days, want 15", n)
	}
	compare("all rolled up")
	late := first + dayLength + 5*hourLength
	add(late)
	compare("a late sample in memory")
	if err := s.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	compare("a late sample in a chunk")
	s.rolling.Lock()
	err := s.rollHour(hourOf(late))
	if n := daysOf(t, s); n != 3*4 {
		t.Errorf("after a late sample: got rollups of %d days, want 12", n)
	}
	compare("its hour rolled up again")
	s.rolling.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Roll(ctx); err != nil {
		t.Fatal(err)
	}
	if n := daysOf(t, s); n != 3*5 {
		t.Errorf("got rollups of %d days, want 15", n)
	}
	compare("its day rolled up again")
}
