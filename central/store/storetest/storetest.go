// Package storetest holds the tests that every storage engine passes: fixed
// cases, and random data and queries compared with the naive engine of package
// memory.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// Engine is a storage engine under test.
type Engine struct {
	// Open opens the store in an empty or used folder.
	Open func(t testing.TB, dir string, clock func() time.Time) store.Store
	// Settle writes what is in memory to where the engine keeps it, so that
	// queries are tested against both. Nil: the engine has one place only.
	Settle func(t testing.TB, s store.Store)
	// Durable engines keep their content over Close and Open.
	Durable bool
}

// Run runs the suite.
func Run(t *testing.T, e Engine) {
	for name, test := range map[string]func(*testing.T, *fixture){
		"volumes are exact":                                       testExact,
		"a batch is stored once":                                  testOnce,
		"a sample is stored once":                                 testSampleOnce,
		"samples of one time differ by their ids alone":           testOneTime,
		"a batch that can never be stored costs no other":         testRefused,
		"samples come newest first and in stored order":           testOrder,
		"a sample is found by its id":                             testByID,
		"a sample shows what was true at its time":                testMetadataVersions,
		"metadata compares by type":                               testMetadataTypes,
		"what is unknown is neither selected nor excluded":        testUnknown,
		"meters show the owner of their newest sample":            testMeters,
		"resources show what matches and who owns them":           testResources,
		"statistics are cut into buckets from their start":        testBuckets,
		"statistics of large counters are exact":                  testLargeCounters,
		"gaps are found by the time they cover":                   testGaps,
		"a query stops when its context or its reader does":       testStop,
		"random data and queries agree with the naive reference":  testRandom,
		"readers see whole batches while writers write":           testConcurrent,
		"usage counts what counters went up by and gauges held":   testUsage,
		"summaries of regular samples are those of the samples":   testDense,
		"an event is stored once":                                 testEventOnce,
		"an event that can never be stored costs no other":        testEventRefused,
		"events are found by what they say":                       testEventQueries,
		"a query of events stops when its context or reader does": testEventStop,
		"random events and queries agree with the reference":      testRandomEvents,
	} {
		t.Run(name, func(t *testing.T) {
			test(t, newFixture(t, e))
		})
	}
}

// fixture is a store and a clock that only the test moves.
type fixture struct {
	store.Store
	engine Engine
	dir    string

	mu  sync.Mutex
	now time.Time
	seq uint64
}

func newFixture(t *testing.T, e Engine) *fixture {
	f := &fixture{engine: e, dir: t.TempDir(), now: time.Date(2026, 1, 2, 3, 4, 5, 678000, time.UTC)}
	f.Store = e.Open(t, f.dir, f.clock)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return f
}

func (f *fixture) clock() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *fixture) advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
}

func (f *fixture) settle(t testing.TB) {
	if f.engine.Settle != nil {
		f.engine.Settle(t, f.Store)
	}
}

// reopen closes the store and opens it again.
func (f *fixture) reopen(t testing.TB) {
	if !f.engine.Durable {
		return
	}
	if err := f.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	f.Store = f.engine.Open(t, f.dir, f.clock)
}

// everywhere runs check with the data in memory, settled, and after a restart.
func (f *fixture) everywhere(t *testing.T, check func(t *testing.T)) {
	t.Run("in memory", check)
	f.reopen(t)
	t.Run("replayed", check)
	f.settle(t)
	t.Run("settled", check)
	f.reopen(t)
	t.Run("reopened", check)
}

const (
	second = int64(1e6)
	minute = 60 * second
	hour   = 60 * minute
	day    = 24 * hour
	// base is a moment shortly before midnight, so that tests cross days.
	base = int64(1767311700) * second // 2026-01-01T23:55:00Z
)

// batch makes the node's next batch out of samples.
func (f *fixture) batch(samples ...sample.Sample) store.Received {
	f.seq++
	return received(f.seq, nil, samples...)
}

// received makes a batch with one row and column a sample.
func received(seq uint64, ids []string, samples ...sample.Sample) store.Received {
	b := &sample.Batch{
		ID: sample.NewBatchID(time.UnixMicro(base)), Node: "node-1", Epoch: 7, Seq: seq, Base: base, IDs: ids,
	}
	for i, s := range samples {
		b.Meters = append(b.Meters, sample.MeterRef{Name: s.Name, Kind: s.Kind, Unit: s.Unit})
		b.Rows = append(b.Rows, sample.Row{
			Resource: s.Resource, Offset: s.Time - base, Incarnation: s.Incarnation, Source: s.Source,
			Project: s.Project, User: s.User, Metadata: s.Metadata,
		})
		bitmap := make([]byte, (len(samples)+7)/8)
		bitmap[i/8] |= 1 << (i % 8)
		b.Columns = append(b.Columns, sample.Column{Meter: i, Origin: s.Origin, Tag: s.Volume.Tag, Bitmap: bitmap, Values: []uint64{s.Volume.Bits}})
	}
	return seal(b)
}

// encoder makes one encoder for all tests: it is large.
var encoder = sync.OnceValues(sample.NewEncoder)

var encoding sync.Mutex

// seal encodes the batch.
func seal(b *sample.Batch) store.Received {
	encoding.Lock()
	defer encoding.Unlock()
	enc, err := encoder()
	if err != nil {
		panic(err)
	}
	body, err := enc.Encode(nil, b)
	if err != nil {
		panic(err)
	}
	return store.Received{Body: body, Batch: b}
}

// cpu makes a sample of vm-1 at a time after base.
func cpu(after int64, v sample.Volume) sample.Sample {
	return sample.Sample{
		Name: "cpu", Kind: sample.Cumulative, Unit: "ns", Volume: v, Resource: "vm-1", Source: "openstack",
		Project: "p1", User: "u1", Time: base + after, Origin: sample.Walk, Incarnation: 5,
	}
}

func (f *fixture) append(t testing.TB, batches ...store.Received) []store.Stored {
	t.Helper()
	stored, err := f.Append(context.Background(), batches)
	if err != nil {
		t.Fatalf("append: %v", err)
	}
	if len(stored) != len(batches) {
		t.Fatalf("append: got %d answers for %d batches", len(stored), len(batches))
	}
	return stored
}

func (f *fixture) samples(t testing.TB, filter store.Filter) []store.Sample {
	t.Helper()
	return collect(t, f.Store, filter)
}

func collect(t testing.TB, s store.Store, filter store.Filter) []store.Sample {
	t.Helper()
	var out []store.Sample
	if err := s.Samples(context.Background(), filter, func(s store.Sample) bool {
		out = append(out, s)
		return true
	}); err != nil {
		t.Fatalf("samples: %v", err)
	}
	return out
}

func equal(t testing.TB, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("got (+) is not what is wanted (-):\n%s", diff)
	}
}

func testExact(t *testing.T, f *fixture) {
	volumes := []sample.Volume{
		sample.Uint(0), sample.Uint(math.MaxUint64), sample.Uint(1<<63 + 1), sample.Uint(1<<53 + 1),
		sample.Int(-1), sample.Int(math.MinInt64), sample.Int(math.MaxInt64), sample.Int(0),
		sample.Float(math.Copysign(0, -1)), sample.Float(0), sample.Float(331.15446339017050), sample.Float(0.1),
		sample.Float(math.MaxFloat64), sample.Float(-math.SmallestNonzeroFloat64), sample.Float(1.0 / 3), sample.Float(12.25),
		sample.Float(100), sample.Float(1e300), sample.Float(-2.5), sample.Float(1 << 60),
	}
	var want []sample.Volume
	for i, v := range volumes {
		f.append(t, f.batch(cpu(int64(i)*minute+1, v)))
		want = append([]sample.Volume{v}, want...)
	}
	f.everywhere(t, func(t *testing.T) {
		var got []sample.Volume
		for i, s := range f.samples(t, store.Filter{}) {
			got = append(got, s.Volume)
			if at := base + int64(len(volumes)-1-i)*minute + 1; s.Time != at {
				t.Errorf("sample %d: got time %d, want %d", i, s.Time, at)
			}
		}
		equal(t, got, want)
	})
}

func testOnce(t *testing.T, f *fixture) {
	one, two := f.batch(cpu(1, sample.Uint(1))), f.batch(cpu(2, sample.Uint(2)))
	f.seq += 5
	later := f.batch(cpu(3, sample.Uint(3)))
	explicit := received(1, []string{"foreign-1"}, cpu(4, sample.Uint(4)))
	first, second := one, one
	stored := f.append(t, first, second)
	equal(t, []bool{stored[0].Duplicate, stored[1].Duplicate}, []bool{false, true})
	f.append(t, later, two, explicit)
	again := one
	copied := *one.Batch
	copied.ID = sample.NewBatchID(time.UnixMicro(base)) // the same seq under another id
	again.Batch = &copied
	f.everywhere(t, func(t *testing.T) {
		for i, s := range f.append(t, again, two, later, explicit) {
			if !s.Duplicate || s.Refused != nil {
				t.Errorf("batch %d: got %+v, want a duplicate", i, s)
			}
		}
		if n := len(f.samples(t, store.Filter{})); n != 4 {
			t.Errorf("got %d samples, want 4", n)
		}
	})
	other := *two.Batch
	other.Epoch++
	if s := f.append(t, seal(&other)); s[0].Duplicate {
		t.Error("a batch of another epoch is taken for a duplicate")
	}
}

func testSampleOnce(t *testing.T, f *fixture) {
	native := f.batch(cpu(1, sample.Uint(1)), cpu(2, sample.Uint(2)))
	forwarded := received(0, []string{native.Batch.SampleID(1).String(), "another"}, cpu(2, sample.Uint(2)), cpu(2, sample.Uint(2)))
	f.append(t, native)
	f.settle(t)
	if s := f.append(t, forwarded)[0]; s.Duplicate || s.Refused != nil {
		t.Errorf("got %+v, want the batch stored", s)
	}
	f.everywhere(t, func(t *testing.T) {
		var got []string
		for _, s := range f.samples(t, store.Filter{}) {
			got = append(got, s.ID.String())
		}
		equal(t, got, []string{native.Batch.SampleID(1).String(), "another", native.Batch.SampleID(0).String()})
		stats, err := f.Statistics(context.Background(), store.StatisticsQuery{})
		if err != nil || len(stats) != 1 || stats[0].Count != 3 {
			t.Errorf("got %+v, %v, want a count of 3", stats, err)
		}
	})
}

func testOneTime(t *testing.T, f *fixture) {
	// They come in batches that overlap; some have ids of a batch that is stored, too.
	native := f.batch(cpu(1, sample.Uint(0)), cpu(1, sample.Uint(1)))
	f.append(t, native)
	have := 2
	send := func(from, to int) {
		t.Helper()
		ids := []string{native.Batch.SampleID(from % 2).String()}
		for i := from; i < to; i++ {
			ids = append(ids, fmt.Sprint("id-", i))
		}
		f.append(t, received(0, ids, slices.Repeat([]sample.Sample{cpu(1, sample.Uint(2))}, len(ids))...))
		have = max(have, to+2)
	}
	send(0, 40)
	f.settle(t)
	send(20, 60)
	f.everywhere(t, func(t *testing.T) {
		send(have-30, have+10)
		if got := len(f.samples(t, store.Filter{})); got != have {
			t.Errorf("got %d samples, want %d", got, have)
		}
	})
	// The same id at another time, or of another series, is another sample.
	other := cpu(1, sample.Uint(3))
	other.Resource = "vm-2"
	f.append(t, received(0, []string{"id-1", "id-1"}, cpu(-1, sample.Uint(3)), other))
	if got := len(f.samples(t, store.Filter{})); got != have+2 {
		t.Errorf("got %d samples, want %d", got, have+2)
	}
}

func testRefused(t *testing.T, f *fixture) {
	good, bad, odd := f.batch(cpu(1, sample.Uint(1))), f.batch(cpu(2, sample.Uint(2))), f.batch(cpu(3, sample.Uint(3)))
	broken := *bad.Batch
	broken.Columns = []sample.Column{{Meter: 0, Tag: sample.F64, Bitmap: []byte{1}, Values: []uint64{math.Float64bits(math.NaN())}}}
	bad.Batch = &broken
	overflow := *odd.Batch
	overflow.Base = math.MaxInt64
	overflow.Rows = []sample.Row{{Resource: "vm-1", Offset: 1}}
	odd.Batch = &overflow
	stored := f.append(t, good, bad, odd)
	if stored[0].Refused != nil || stored[1].Refused == nil || stored[2].Refused == nil {
		t.Errorf("got %+v, want the second and third refused", stored)
	}
	if n := len(f.samples(t, store.Filter{})); n != 1 {
		t.Errorf("got %d samples, want 1", n)
	}
}

func testOrder(t *testing.T, f *fixture) {
	var want []uint64
	for i := range uint64(30) {
		a, b := cpu(10*minute, sample.Uint(i)), cpu(10*minute, sample.Uint(100+i))
		b.Name = "memory"
		f.append(t, f.batch(a, b), f.batch(cpu(int64(i)*second, sample.Uint(200+i))))
		want = append(want, i, 100+i)
		if i%10 == 9 {
			f.settle(t)
		}
	}
	for i := range uint64(30) {
		want = append(want, 229-i)
	}
	f.everywhere(t, func(t *testing.T) {
		var got []uint64
		for _, s := range f.samples(t, store.Filter{}) {
			got = append(got, s.Volume.Bits)
		}
		equal(t, got, want)
	})
}

func testByID(t *testing.T, f *fixture) {
	native := f.batch(cpu(1, sample.Uint(1)), cpu(2, sample.Uint(2)), cpu(-3*day, sample.Uint(3)))
	derived := sample.DeriveBatchID(native.Batch.ID, "sink").Sample(0).String()
	foreign := received(0, []string{"foreign-1", derived}, cpu(3, sample.Uint(4)), cpu(4, sample.Uint(5)))
	f.append(t, native, foreign)
	f.everywhere(t, func(t *testing.T) {
		for id, want := range map[sample.ID]uint64{
			native.Batch.SampleID(0): 1, native.Batch.SampleID(1): 2, native.Batch.SampleID(2): 3,
			{Text: "foreign-1"}: 4, sample.ParseID(derived): 5,
		} {
			s, err := f.Sample(context.Background(), id)
			if err != nil || s.Volume.Bits != want || s.ID != id {
				t.Errorf("sample %s: got %v, %v, want volume %d", id, s, err, want)
			}
			if got := f.samples(t, store.Where(store.FieldID, store.Eq, id.String())); len(got) != 1 || got[0].Volume.Bits != want {
				t.Errorf("filter by id %s: got %v, want volume %d", id, got, want)
			}
		}
		for _, id := range []sample.ID{native.Batch.SampleID(3), {Text: "foreign-2"}, {}, foreign.Batch.ID.Sample(0)} {
			if s, err := f.Sample(context.Background(), id); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("sample %s: got %v, %v, want %v", id, s, err, store.ErrNotFound)
			}
		}
	})
}

func testMetadataVersions(t *testing.T, f *fixture) {
	versions := []string{`{"flavor":{"name":"small"}}`, ``, `{"flavor":{"name":"large"}}`, `{"flavor":{"name":"small"}}`, `not JSON`}
	for i, v := range versions {
		s := cpu(int64(i)*minute*3, sample.Uint(uint64(i)))
		s.Metadata, s.Project, s.Incarnation, s.Origin = []byte(v), fmt.Sprint("p", i), sample.Incarnation(i)<<60, sample.Origin(fmt.Sprint("o", i))
		f.append(t, f.batch(s))
		f.advance(time.Second)
	}
	f.everywhere(t, func(t *testing.T) {
		got := f.samples(t, store.Filter{})
		for i, s := range got {
			n := len(versions) - 1 - i
			if string(s.Metadata) != versions[n] || s.Project != fmt.Sprint("p", n) || s.Incarnation != sample.Incarnation(n)<<60 || s.Origin != sample.Origin(fmt.Sprint("o", n)) {
				t.Errorf("sample %d: got %+v", n, s)
			}
			if want := f.clock().Add(time.Duration(n-len(versions)) * time.Second).UnixMicro(); s.Recorded != want {
				t.Errorf("sample %d: got recorded at %d, want %d", n, s.Recorded, want)
			}
		}
		small := store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: "flavor.name", Op: store.Eq, Value: "small"}}
		if n := len(f.samples(t, small)); n != 2 {
			t.Errorf("got %d samples with the flavor, want 2", n)
		}
	})
}

func testMetadataTypes(t *testing.T, f *fixture) {
	s := cpu(0, sample.Uint(1))
	s.Metadata = []byte(`{"int":2,"float":2.5,"big":9007199254740993,"text":"2","yes":true,"none":null,"list":["a",{"b":1}],
		"nested":{"deep":{"key":"v"}},"dotted.key":{"more":"w"},"date":"2026-01-01"}`)
	f.append(t, f.batch(s))
	f.everywhere(t, func(t *testing.T) {
		for _, tc := range []struct {
			key   string
			op    store.Op
			value any
			match bool
		}{
			{"int", store.Eq, 2.0, true},
			{"int", store.Eq, 2, true},
			{"int", store.Eq, "2", false},
			{"int", store.Ne, "2", true},
			{"int", store.Eq, true, false},
			{"int", store.Lt, 2.5, true},
			{"int", store.Lt, "3", false},
			{"float", store.Ge, 2.5, true},
			{"float", store.Gt, 2.5, false},
			{"big", store.Eq, int64(9007199254740993), true},
			{"big", store.Eq, 9007199254740992.0, false},
			{"text", store.Eq, "2", true},
			{"text", store.Eq, 2.0, false},
			{"text", store.Gt, "1", true},
			{"yes", store.Eq, true, true},
			{"yes", store.Eq, 1.0, false},
			{"yes", store.Ne, false, true},
			{"none", store.Eq, nil, true},
			{"none", store.Eq, "None", false},
			{"missing", store.Eq, nil, false},
			{"missing", store.Ne, "x", false},
			{"list", store.Eq, []any{"a", map[string]any{"b": 1.0}}, true},
			{"list", store.Eq, []any{"a"}, false},
			{"list[0]", store.Eq, "a", true},
			{"list[1].b", store.Eq, 1.0, true},
			{"list[2]", store.Eq, nil, false},
			{"nested.deep.key", store.Eq, "v", true},
			{"nested.deep", store.Eq, map[string]any{"key": "v"}, true},
			{"dotted.key.more", store.Eq, "w", true},
			{"date", store.Ge, "2025-12-31", true},
		} {
			filter := store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: tc.key, Op: tc.op, Value: tc.value}}
			if got := len(f.samples(t, filter)) == 1; got != tc.match {
				t.Errorf("%s %s %v: got %v, want %v", tc.key, tc.op, tc.value, got, tc.match)
			}
		}
	})
}

func testUnknown(t *testing.T, f *fixture) {
	s := cpu(0, sample.Uint(1))
	s.Project = ""
	f.append(t, f.batch(s))
	is := func(field store.Field, op store.Op, v any) store.Filter { return store.Where(field, op, v) }
	not := func(f store.Filter) store.Filter { return store.Filter{Not: &f} }
	key := store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: "x", Op: store.Eq, Value: "y"}}
	f.everywhere(t, func(t *testing.T) {
		for name, tc := range map[string]struct {
			filter store.Filter
			match  bool
		}{
			"unknown is not equal":              {is(store.FieldProject, store.Eq, "p1"), false},
			"unknown is not different":          {is(store.FieldProject, store.Ne, "p1"), false},
			"not unknown is unknown":            {not(is(store.FieldProject, store.Eq, "p1")), false},
			"nil finds the unknown":             {is(store.FieldProject, store.Eq, nil), true},
			"not nil excludes the unknown":      {not(is(store.FieldProject, store.Eq, nil)), false},
			"nil does not find the known":       {is(store.FieldUser, store.Eq, nil), false},
			"a missing key is unknown":          {key, false},
			"so is its negation":                {not(key), false},
			"unknown or true is true":           {store.Filter{Or: []store.Filter{key, is(store.FieldUser, store.Eq, "u1")}}, true},
			"unknown and false is false":        {not(store.And(key, is(store.FieldUser, store.Eq, "u2"))), true},
			"unknown and true is unknown":       {not(store.And(key, is(store.FieldUser, store.Eq, "u1"))), false},
			"an empty list of terms is true":    {store.And(), true},
			"an empty or is false":              {store.Filter{Or: []store.Filter{}}, false},
			"a time bound is exact below":       {is(store.FieldTime, store.Ge, base), true},
			"and above":                         {is(store.FieldTime, store.Lt, base), false},
			"a volume compares over its kinds":  {is(store.FieldVolume, store.Eq, sample.Float(1)), true},
			"a volume is not rounded":           {is(store.FieldVolume, store.Gt, sample.Float(0.999)), true},
			"the record's time is a field":      {is(store.FieldRecorded, store.Eq, f.clock().UnixMicro()), true},
			"kind and unit are fields as well":  {store.And(is(store.FieldKind, store.Eq, "cumulative"), is(store.FieldUnit, store.Ne, "B")), true},
			"names are ordered as bytes":        {is(store.FieldMeter, store.Gt, "cpt"), true},
			"a resource that is not there":      {is(store.FieldResource, store.Eq, "vm-9"), false},
			"bounds that exclude each other":    {store.And(is(store.FieldTime, store.Gt, base), is(store.FieldTime, store.Lt, base)), false},
			"the same field may be named twice": {store.And(is(store.FieldMeter, store.Eq, "cpu"), is(store.FieldMeter, store.Eq, "memory")), false},
		} {
			if got := len(f.samples(t, tc.filter)) == 1; got != tc.match {
				t.Errorf("%s: got %v, want %v", name, got, tc.match)
			}
		}
	})
	for _, bad := range []store.Filter{
		is("colour", store.Eq, "red"), is(store.FieldMeter, "like", "c%"), is(store.FieldTime, store.Eq, "now"),
		is(store.FieldVolume, store.Eq, 1), is(store.FieldProject, store.Ne, nil),
	} {
		if err := f.Samples(context.Background(), bad, func(store.Sample) bool { return true }); err == nil {
			t.Errorf("%+v: got no error", bad.Cond)
		}
	}
}

func testMeters(t *testing.T, f *fixture) {
	old, newer, late := cpu(0, sample.Uint(1)), cpu(minute, sample.Uint(2)), cpu(-day, sample.Uint(3))
	newer.Project, newer.Metadata = "p2", []byte(`{"a":1}`)
	other := cpu(0, sample.Uint(1))
	other.Name, other.Resource = "a.meter", "vm-0"
	f.append(t, f.batch(newer, other))
	f.settle(t)
	f.append(t, f.batch(old))
	f.append(t, f.batch(late))
	f.everywhere(t, func(t *testing.T) {
		for name, tc := range map[string]struct {
			filter store.Filter
			want   []store.Meter
		}{
			"all are sorted by name": {store.Filter{}, []store.Meter{
				{MeterRef: sample.MeterRef{Name: "a.meter", Kind: sample.Cumulative, Unit: "ns"}, Resource: "vm-0", Source: "openstack", Project: "p1", User: "u1"},
				{MeterRef: sample.CPU.MeterRef, Resource: "vm-1", Source: "openstack", Project: "p2", User: "u1"},
			}},
			"a former owner finds nothing": {store.And(store.Where(store.FieldProject, store.Eq, "p1"), store.Where(store.FieldMeter, store.Eq, "cpu")), nil},
			"the newest metadata counts": {store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: "a", Op: store.Eq, Value: 1.0}}, []store.Meter{
				{MeterRef: sample.CPU.MeterRef, Resource: "vm-1", Source: "openstack", Project: "p2", User: "u1"},
			}},
		} {
			got, err := f.Meters(context.Background(), tc.filter)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			equal(t, got, tc.want)
		}
		if _, err := f.Meters(context.Background(), store.Where(store.FieldTime, store.Gt, base)); err == nil {
			t.Error("a filter by time is taken")
		}
	})
}

func testResources(t *testing.T, f *fixture) {
	first, last := cpu(0, sample.Uint(1)), cpu(10*minute, sample.Uint(2))
	first.Metadata = []byte(`{"a":1}`)
	last.Name, last.User, last.Metadata = "memory", "u2", []byte(`{"a":2}`)
	other := cpu(minute, sample.Uint(1))
	other.Resource, other.Project = "vm-0", ""
	f.append(t, f.batch(first), f.batch(last, other))
	f.everywhere(t, func(t *testing.T) {
		vm0 := store.Resource{ID: "vm-0", Source: "openstack", User: "u1", First: base + minute, Last: base + minute, Meters: []string{"cpu"}}
		vm1 := store.Resource{
			ID: "vm-1", Source: "openstack", Project: "p1", User: "u2", Metadata: []byte(`{"a":2}`),
			First: base, Last: base + 10*minute, Meters: []string{"cpu", "memory"},
		}
		early := vm1
		early.Last = base
		for name, tc := range map[string]struct {
			filter store.Filter
			want   []store.Resource
		}{
			"all are sorted by id":                      {store.Filter{}, []store.Resource{vm0, vm1}},
			"one is found by its id":                    {store.Where(store.FieldResource, store.Eq, "vm-1"), []store.Resource{vm1}},
			"a time bound narrows first and last":       {store.Where(store.FieldTime, store.Lt, base+minute), []store.Resource{early}},
			"metadata of any sample selects":            {store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: "a", Op: store.Eq, Value: 1.0}}, []store.Resource{early}},
			"a former user selects by his samples":      {store.And(store.Where(store.FieldUser, store.Eq, "u1"), store.Where(store.FieldProject, store.Eq, "p1")), []store.Resource{early}},
			"a meter selects by its samples":            {store.And(store.Where(store.FieldMeter, store.Eq, "cpu"), store.Where(store.FieldResource, store.Ne, "vm-0")), []store.Resource{early}},
			"an id that is not there finds no resource": {store.Where(store.FieldResource, store.Eq, "vm-9"), nil},
		} {
			got, err := f.Resources(context.Background(), tc.filter)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if diff := cmp.Diff(tc.want, got, emptyBytes); diff != "" {
				t.Errorf("%s: got (+) is not what is wanted (-):\n%s", name, diff)
			}
		}
	})
}

// emptyBytes makes no difference between nil and empty metadata.
var emptyBytes = cmp.Comparer(func(a, b []byte) bool { return string(a) == string(b) })

func text(s string) *string { return &s }

func testBuckets(t *testing.T, f *fixture) {
	for i, after := range []int64{0, 5 * minute, 10*minute - 1, 10 * minute, 30 * minute} {
		s := cpu(after, sample.Uint(uint64(i+1)))
		s.User = fmt.Sprint("u", i%2)
		if i == 4 {
			s.User = ""
		}
		s.Metadata = fmt.Appendf(nil, `{"n":%d}`, i/3)
		f.append(t, f.batch(s))
	}
	start := base - 5*minute
	f.everywhere(t, func(t *testing.T) {
		for name, tc := range map[string]struct {
			query store.StatisticsQuery
			want  []store.Statistics
		}{
			"one bucket without a period": {store.StatisticsQuery{Cardinality: []store.Field{store.FieldUser, store.FieldResource}}, []store.Statistics{
				{Unit: "ns", Count: 5, Min: sample.Uint(1), Max: sample.Uint(5), Sum: 15, SumSquares: 10, First: base, Last: base + 30*minute, Start: base, Cardinality: []int64{2, 1}},
			}},
			"buckets begin at the first sample and empty ones are absent": {store.StatisticsQuery{Period: 600}, []store.Statistics{
				{Unit: "ns", Count: 3, Min: sample.Uint(1), Max: sample.Uint(3), Sum: 6, SumSquares: 2, First: base, Last: base + 10*minute - 1, Start: base},
				{Unit: "ns", Count: 1, Min: sample.Uint(4), Max: sample.Uint(4), Sum: 4, First: base + 10*minute, Last: base + 10*minute, Bucket: 1, Start: base},
				{Unit: "ns", Count: 1, Min: sample.Uint(5), Max: sample.Uint(5), Sum: 5, First: base + 30*minute, Last: base + 30*minute, Bucket: 3, Start: base},
			}},
			"buckets begin at the start that is asked for": {store.StatisticsQuery{Period: 600, Start: &start, Filter: store.Where(store.FieldTime, store.Le, base+5*minute)}, []store.Statistics{
				{Unit: "ns", Count: 1, Min: sample.Uint(1), Max: sample.Uint(1), Sum: 1, First: base, Last: base, Start: start},
				{Unit: "ns", Count: 1, Min: sample.Uint(2), Max: sample.Uint(2), Sum: 2, First: base + 5*minute, Last: base + 5*minute, Bucket: 1, Start: start},
			}},
			"groups are sorted, unknown first": {store.StatisticsQuery{GroupBy: []store.Group{{Field: store.FieldUser}}}, []store.Statistics{
				{Group: []*string{nil}, Unit: "ns", Count: 1, Min: sample.Uint(5), Max: sample.Uint(5), Sum: 5, First: base + 30*minute, Last: base + 30*minute, Start: base + 30*minute},
				{Group: []*string{text("u0")}, Unit: "ns", Count: 2, Min: sample.Uint(1), Max: sample.Uint(3), Sum: 4, SumSquares: 2, First: base, Last: base + 10*minute - 1, Start: base},
				{Group: []*string{text("u1")}, Unit: "ns", Count: 2, Min: sample.Uint(2), Max: sample.Uint(4), Sum: 6, SumSquares: 2, First: base + 5*minute, Last: base + 10*minute, Start: base + 5*minute},
			}},
			"metadata groups by its text": {store.StatisticsQuery{GroupBy: []store.Group{{Field: store.FieldMetadata, Key: "n"}}}, []store.Statistics{
				{Group: []*string{text("0")}, Unit: "ns", Count: 3, Min: sample.Uint(1), Max: sample.Uint(3), Sum: 6, SumSquares: 2, First: base, Last: base + 10*minute - 1, Start: base},
				{Group: []*string{text("1")}, Unit: "ns", Count: 2, Min: sample.Uint(4), Max: sample.Uint(5), Sum: 9, SumSquares: 0.5, First: base + 10*minute, Last: base + 30*minute, Start: base + 10*minute},
			}},
			"a group that is missing everywhere gives no rows": {store.StatisticsQuery{GroupBy: []store.Group{{Field: store.FieldMetadata, Key: "m"}}}, nil},
			"no matching sample gives no rows":                 {store.StatisticsQuery{Period: 1, Filter: store.Where(store.FieldMeter, store.Eq, "memory")}, nil},
		} {
			got, err := f.Statistics(context.Background(), tc.query)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("%s: got (+) is not what is wanted (-):\n%s", name, diff)
			}
		}
		for _, bad := range []store.StatisticsQuery{
			{Period: -1},
			{Period: math.MaxInt64},
			{GroupBy: []store.Group{{Field: store.FieldTime}}},
			{Cardinality: []store.Field{store.FieldVolume}},
		} {
			if _, err := f.Statistics(context.Background(), bad); err == nil {
				t.Errorf("%+v: got no error", bad)
			}
		}
		for most, want := range map[int]error{2: store.ErrTooManyRows, 3: nil} {
			if _, err := f.Statistics(context.Background(), store.StatisticsQuery{Period: 600, MaxRows: most}); !errors.Is(err, want) {
				t.Errorf("three rows of at most %d: got %v, want %v", most, err, want)
			}
		}
	})
}

func testLargeCounters(t *testing.T, f *fixture) {
	big := uint64(1) << 62
	f.append(t, f.batch(cpu(0, sample.Uint(big+1)), cpu(1, sample.Uint(big)), cpu(2, sample.Int(-5)), cpu(3, sample.Float(0.5))))
	f.everywhere(t, func(t *testing.T) {
		got, err := f.Statistics(context.Background(), store.StatisticsQuery{})
		if err != nil || len(got) != 1 {
			t.Fatalf("got %v, %v", got, err)
		}
		equal(t, []sample.Volume{got[0].Min, got[0].Max}, []sample.Volume{sample.Int(-5), sample.Uint(big + 1)})
	})
	g := newFixture(t, f.engine)
	var batches []store.Received
	for i := range 1000 {
		batches = append(batches, g.batch(cpu(int64(i), sample.Uint(9_000_000_000_000+uint64(i)))))
	}
	g.append(t, batches...)
	got, err := g.Statistics(context.Background(), store.StatisticsQuery{})
	if err != nil || len(got) != 1 {
		t.Fatalf("got %v, %v", got, err)
	}
	equal(t, []float64{got[0].Sum, math.Round(got[0].SumSquares)}, []float64{9_000_000_000_499_500, 83_333_250})
}

func testGaps(t *testing.T, f *fixture) {
	late, early := f.batch(), f.batch(cpu(0, sample.Uint(1)))
	a := sample.Gap{Meter: "*", Resource: "vm-1", From: base + minute, To: base + 2*minute, Reason: "monitor stuck"}
	b := sample.Gap{Meter: "cpu", Resource: "*", From: base, To: base + minute, Reason: "agent was down"}
	late.Batch.Gaps, early.Batch.Gaps = []sample.Gap{a}, []sample.Gap{b}
	late, early = seal(late.Batch), seal(early.Batch)
	f.append(t, late, early, late)
	ga, gb := a, b
	ga.Node, gb.Node = "node-1", "node-1"
	// A pipeline that passes a part of a batch sends its gaps on in a batch of
	// the notifier, and two such pipelines do so twice.
	for range 2 {
		derived := f.batch()
		derived.Batch.Node, derived.Batch.Gaps = "notifier-1", []sample.Gap{ga}
		f.append(t, seal(derived.Batch))
	}
	f.everywhere(t, func(t *testing.T) {
		for name, tc := range map[string]struct {
			from, to int64
			want     []sample.Gap
		}{
			"all are oldest first":           {base - hour, base + hour, []sample.Gap{gb, ga}},
			"a gap that ends at the start":   {base + 2*minute, base + hour, []sample.Gap{ga}},
			"a gap that begins at the end":   {base - hour, base, []sample.Gap{gb}},
			"neither before nor after a gap": {base + 2*minute + 1, base + hour, nil},
		} {
			got, err := f.Gaps(context.Background(), tc.from, tc.to)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("%s: got (+) is not what is wanted (-):\n%s", name, diff)
			}
		}
	})
}

func testStop(t *testing.T, f *fixture) {
	var batches []store.Received
	for i := range 3000 {
		batches = append(batches, f.batch(cpu(int64(i), sample.Uint(uint64(i)))))
	}
	f.append(t, batches...)
	f.everywhere(t, func(t *testing.T) {
		n := 0
		err := f.Samples(context.Background(), store.Filter{}, func(store.Sample) bool {
			n++
			return n < 100
		})
		if err != nil || n != 100 {
			t.Errorf("got %d samples, %v, want 100", n, err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		n = 0
		err = f.Samples(ctx, store.Filter{}, func(store.Sample) bool {
			n++
			return true
		})
		if !errors.Is(err, context.Canceled) || n == 3000 {
			t.Errorf("got %d samples, %v, want %v", n, err, context.Canceled)
		}
		if _, err := f.Statistics(ctx, store.StatisticsQuery{}); !errors.Is(err, context.Canceled) {
			t.Errorf("statistics: got %v, want %v", err, context.Canceled)
		}
		if _, err := f.Append(ctx, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("append: got %v, want %v", err, context.Canceled)
		}
	})
}

// testConcurrent writes batches of ten samples from several goroutines, half
// of them twice, while readers count: every count is a multiple of ten and no
// acknowledged batch is ever missing.
func testConcurrent(t *testing.T, f *fixture) {
	const writers, each, size = 4, 60, 10
	var acked sync.Map // seq → true
	var wg, readers sync.WaitGroup
	done := make(chan struct{})
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				seq := uint64(i)*writers + uint64(w)/2 // two writers share each seq
				var samples []sample.Sample
				for k := range size {
					s := cpu(int64(seq)*second, sample.Uint(seq))
					s.Resource = fmt.Sprint("vm-", k)
					samples = append(samples, s)
				}
				if _, err := f.Append(context.Background(), []store.Received{received(seq, nil, samples...)}); err != nil {
					t.Errorf("append: %v", err)
				}
				acked.Store(seq, true)
			}
		})
	}
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				want := map[uint64]bool{}
				acked.Range(func(k, _ any) bool {
					want[k.(uint64)] = true
					return true
				})
				got := map[uint64]int{}
				for _, s := range collect(t, f.Store, store.Filter{}) {
					got[s.Volume.Bits]++
				}
				for seq, n := range got {
					if n != size {
						t.Errorf("batch %d: got %d samples, want %d", seq, n, size)
					}
				}
				for seq := range want {
					if got[seq] == 0 {
						t.Errorf("batch %d is acknowledged and missing", seq)
					}
				}
				if rs, err := f.Resources(context.Background(), store.Filter{}); err != nil || len(rs) != size && len(want) > 0 {
					t.Errorf("got %d resources, %v, want %d", len(rs), err, size)
				}
			}
		})
	}
	readers.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(5 * time.Millisecond):
				f.settle(t)
			}
		}
	})
	wg.Wait()
	close(done)
	readers.Wait()
	f.everywhere(t, func(t *testing.T) {
		if n := len(f.samples(t, store.Filter{})); n != writers*each*size/2 {
			t.Errorf("got %d samples, want %d", n, writers*each*size/2)
		}
	})
}
