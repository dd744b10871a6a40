package local

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// days stores samples of two resources every ten minutes, for some days.
func fillDays(t *testing.T, s *Store, days int) {
	t.Helper()
	var batches []store.Received
	for i := range int64(days) * 144 {
		b := tick("node", uint64(i+1), start+i*600e6)
		b.Columns[0].Values = []uint64{uint64(1000 * i), uint64(2000 * i), uint64(3000 * i)}
		for r := range b.Rows {
			b.Rows[r].Project = fmt.Sprint("p", r)
			b.Rows[r].Metadata = fmt.Appendf(nil, `{"day":%d}`, i/144)
		}
		batches = append(batches, received(t, b))
	}
	for len(batches) > 0 {
		n := min(144, len(batches))
		if _, err := s.Append(context.Background(), batches[:n]); err != nil {
			t.Fatal(err)
		}
		batches = batches[n:]
	}
	if err := s.Roll(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func expireAll(t *testing.T, s *Store) {
	t.Helper()
	for _, do := range []func() error{s.expire, s.sweep, s.expireRollups, s.collect} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
}

func usageOf(t *testing.T, s *Store, from, to int64) (out []store.Usage) {
	t.Helper()
	if err := s.Usage(context.Background(), store.UsageQuery{From: from, To: to}, func(u store.Usage) bool {
		out = append(out, u)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRollupsOutliveTheirSamples(t *testing.T) {
	now := time.UnixMicro(start)
	dir := t.TempDir()
	o := Options{Clock: func() time.Time { return now }, Retention: 3 * 24 * time.Hour, RollupRetention: 6 * 24 * time.Hour}
	s := open(t, dir, o)
	defer func() { closeStore(t, s) }()
	fillDays(t, s, 8)
	byHour := store.StatisticsQuery{Period: 3600, Start: new(start), GroupBy: []store.Group{{Field: store.FieldResource}, {Field: store.FieldMetadata, Key: "day"}}}
	ask := func(from day) (stats []store.Statistics) {
		q := byHour
		q.Filter = store.Where(store.FieldTime, store.Ge, from.start())
		stats, err := s.Statistics(context.Background(), q)
		if err != nil {
			t.Fatal(err)
		}
		return stats
	}
	kept := dayOf(start) + 2 // rollups from this day on
	stats, usage := ask(kept), usageOf(t, s, kept.start(), start+8*dayLength)
	if len(stats) != 6*24*3*2 || len(usage) != 6 {
		t.Fatalf("got %d rows of statistics, %d of usage", len(stats), len(usage))
	}
	now = now.Add(8*24*time.Hour + time.Hour)
	expireAll(t, s)
	check := func() {
		t.Helper()
		// 01:00 of day 8 less 3 days is in day 5; less 6 days in day 2.
		if n := len(list(t, s, store.Filter{})); n != 3*144*perTick {
			t.Errorf("got %d samples, want %d", n, 3*144*perTick)
		}
		if diff := cmp.Diff(stats, ask(kept)); diff != "" {
			t.Errorf("statistics of what has expired: got (+) is not what was (-):\n%s", diff)
		}
		got := usageOf(t, s, kept.start(), start+8*dayLength)
		for i := range got {
			// The first sample that is left has none before it.
			if d := usage[i].Covered - got[i].Covered; d < 0 || d > 600e6 {
				t.Errorf("got %+v, was %+v", got[i], usage[i])
			}
		}
		if diff := cmp.Diff(usageOf(t, s, kept.start()+dayLength, start+7*dayLength), usageOf(t, s, kept.start()+dayLength, start+7*dayLength)); diff != "" {
			t.Error(diff)
		}
		if ps := verify(t, s); len(ps) > 0 {
			t.Errorf("got %q", ps)
		}
		if n := len(ask(kept - 2)); n != len(stats) {
			t.Errorf("got %d rows of statistics of all, want %d", n, len(stats))
		}
		empty := 0
		for _, m := range s.catalogue.metas[1:] {
			if len(m) == 0 {
				empty++
			}
		}
		if empty != 2 {
			t.Errorf("%d of %d versions of metadata are collected, want those of the first 2 days", empty, len(s.catalogue.metas)-1)
		}
	}
	check()
	closeStore(t, s)
	s = open(t, dir, o)
	check()
	// What was collected comes again.
	b := tick("node", 9999, start+8*dayLength)
	for r := range b.Rows {
		b.Rows[r].Metadata = []byte(`{"day":0}`)
	}
	appendTick(t, s, b)
	again := store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: "day", Op: store.Eq, Value: 0.0}}
	if n := len(list(t, s, again)); n != perTick {
		t.Errorf("got %d samples with metadata as it was once, want %d", n, perTick)
	}
}

func TestSeriesAreKeptAsTheirTimeToLiveSays(t *testing.T) {
	now := time.UnixMicro(start)
	dir := t.TempDir()
	matcher := func(p string) *sample.Matcher {
		m, err := sample.NewMatcher([]string{p})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	o := Options{
		Clock: func() time.Time { return now }, Retention: 3 * 24 * time.Hour, RollupRetention: 4 * 24 * time.Hour,
		TimeToLive: []TTL{
			{Meters: matcher("cpu"), Project: "p1", Samples: 5 * 24 * time.Hour, Rollups: 24 * time.Hour},
			{Meters: matcher("mem*"), Samples: 24 * time.Hour},
		},
	}
	s := open(t, dir, o)
	defer func() { closeStore(t, s) }()
	fillDays(t, s, 8)
	now = now.Add(8*24*time.Hour + time.Hour)
	for range 2 {
		expireAll(t, s)
		for _, tc := range []struct {
			resource, meter string
			days            int // of samples
			rollups         int // days of samples or rollups
		}{
			{"node-vm-0", "cpu", 3, 4}, {"node-vm-1", "cpu", 5, 5}, {"node-vm-0", "memory", 1, 4}, {"node-vm-1", "memory", 1, 4},
		} {
			f := store.And(store.Where(store.FieldResource, store.Eq, tc.resource), store.Where(store.FieldMeter, store.Eq, tc.meter))
			if n := len(list(t, s, f)); n != tc.days*144 {
				t.Errorf("%s of %s: got %d samples, want %d", tc.meter, tc.resource, n, tc.days*144)
			}
			got, err := s.Statistics(context.Background(), store.StatisticsQuery{Filter: f})
			if err != nil || len(got) != 1 || got[0].Count != int64(tc.rollups*144) {
				t.Errorf("%s of %s: got %+v, %v, want %d samples counted", tc.meter, tc.resource, got, err, tc.rollups*144)
			}
		}
		if ps := verify(t, s); len(ps) > 0 {
			t.Errorf("got %q", ps)
		}
		closeStore(t, s)
		s = open(t, dir, o)
	}
}
