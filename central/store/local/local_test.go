package local

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/storetest"
	"github.com/kvmeter/kvmeter/sample"
)

func TestMain(m *testing.M) {
	if crashChild() {
		return
	}
	os.Exit(m.Run())
}

func testEngine(options Options, settle func(s *Store) error) storetest.Engine {
	return storetest.Engine{
		Open: func(t testing.TB, dir string, clock func() time.Time) store.Store {
			o := options
			o.Clock, o.MinFree, o.Retention, o.EventRetention = clock, 1, -1, -1
			return open(t, dir, o)
		},
		Settle: func(t testing.TB, s store.Store) {
			if err := settle(s.(*Store)); err != nil {
				t.Errorf("settle: %v", err)
			}
		},
		Durable: true,
	}
}

func flush(s *Store) error { return s.Flush(context.Background()) }

func TestStore(t *testing.T) {
	storetest.Run(t, testEngine(Options{}, func(s *Store) error { return s.Roll(context.Background()) }))
}

// With a tiny head every few batches are flushed on their own.
func TestStoreThatFlushesAllTheTime(t *testing.T) {
	storetest.Run(t, testEngine(Options{HeadBytes: 3000}, flush))
}

func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	if o.MinFree == 0 {
		o.MinFree = 1
	}
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closeStore(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// tick makes a batch of three resources with two meters each. Its volumes are
// the batch's seq, so that its samples are known by them.
func tick(node string, seq uint64, at int64) *sample.Batch {
	b := &sample.Batch{
		ID: sample.NewBatchID(time.UnixMicro(at)), Node: node, Epoch: 1, Seq: seq, Base: at,
		Meters: []sample.MeterRef{sample.CPU.MeterRef, {Name: "memory", Kind: sample.Gauge, Unit: "MB"}},
	}
	for i := range 3 {
		b.Rows = append(b.Rows, sample.Row{
			Resource: fmt.Sprint(node, "-vm-", i), Offset: int64(i), Source: "openstack", Project: fmt.Sprint("p", seq%2),
			Metadata: fmt.Appendf(nil, `{"seq":%d}`, seq/3),
		})
	}
	for m := range b.Meters {
		b.Columns = append(b.Columns, sample.Column{Meter: m, Origin: sample.Walk, Bitmap: []byte{7}, Values: []uint64{seq, seq, seq}})
	}
	return b
}

const perTick = 6

func received(t testing.TB, b *sample.Batch) store.Received {
	t.Helper()
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.Encode(nil, b)
	if err != nil {
		t.Fatal(err)
	}
	return store.Received{Body: body, Batch: b}
}

func appendTick(t testing.TB, s *Store, b *sample.Batch) {
	t.Helper()
	if _, err := s.Append(context.Background(), []store.Received{received(t, b)}); err != nil {
		t.Fatal(err)
	}
}

func list(t testing.TB, s *Store, f store.Filter) []store.Sample {
	t.Helper()
	var out []store.Sample
	if err := s.Samples(context.Background(), f, func(s store.Sample) bool {
		out = append(out, s)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

const start = int64(1767225600e6) // 2026-01-01

func TestSecondProcessIsToldWhoHasTheStore(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	_, err := Open(dir, Options{})
	if err == nil || !strings.Contains(err.Error(), "another kvmeter uses this store") {
		t.Errorf("got %v", err)
	}
	closeStore(t, s)
	closeStore(t, open(t, dir, Options{}))
}

func TestNewerFormatIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"samples": func(t *testing.T, dir string) {
			db, err := pebble.Open(filepath.Join(dir, "samples"), &pebble.Options{FormatMajorVersion: pebble.FormatNewest})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(db.Set(stateKey(), []byte{formatVersion + 1, 0, 0}, pebble.Sync), db.Close()); err != nil {
				t.Fatal(err)
			}
		},
		"catalogue": func(t *testing.T, dir string) {
			db, err := sql.Open("sqlite", filepath.Join(dir, "catalogue.db"))
			if err != nil {
				t.Fatal(err)
			}
			_, err = db.Exec(fmt.Sprint("PRAGMA user_version = ", catalogueVersion+1))
			if err := errors.Join(err, db.Close()); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			closeStore(t, open(t, dir, Options{}))
			spoil(t, dir)
			_, err := Open(dir, Options{})
			known := formatVersion
			if name == "catalogue" {
				known = catalogueVersion
			}
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("written by a newer kvmeter (format %d; this program knows up to %d)", known+1, known)) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestFolderThatCannotBeMadeIsAnError(t *testing.T) {
	if _, err := Open("/proc/kvmeter/store", Options{}); err == nil || !strings.Contains(err.Error(), "open store") {
		t.Errorf("got %v", err)
	}
}

func TestMetricsAreRegisteredWhileTheStoreIsOpen(t *testing.T) {
	reg := prometheus.NewRegistry()
	dir := t.TempDir()
	s := open(t, dir, Options{Registry: reg})
	appendTick(t, s, tick("a", 1, start))
	appendTick(t, s, tick("a", 1, start))
	if n := metric(t, reg, "kvmeter_store_samples_total", ""); n != perTick {
		t.Errorf("got %v samples, want %d", n, perTick)
	}
	if n := metric(t, reg, "kvmeter_store_batches_total", "duplicate"); n != 1 {
		t.Errorf("got %v duplicates, want 1", n)
	}
	if _, err := Open(t.TempDir(), Options{Registry: reg}); err == nil {
		t.Error("two stores share their metrics")
	}
	closeStore(t, s)
	closeStore(t, open(t, dir, Options{Registry: reg}))
}

// metric returns the value of a metric with the given result, or 0.
func metric(t *testing.T, reg *prometheus.Registry, name, result string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if labels := m.GetLabel(); f.GetName() == name && (len(labels) == 0 || labels[0].GetValue() == result) {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestFlushHappensByAge(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := open(t, t.TempDir(), Options{FlushEvery: 10 * time.Millisecond, Registry: reg})
	defer closeStore(t, s)
	appendTick(t, s, tick("a", 1, start))
	for deadline := time.Now().Add(10 * time.Second); metric(t, reg, "kvmeter_store_flushes_total", "ok") == 0; {
		if time.Now().After(deadline) {
			t.Fatal("nothing was flushed")
		}
		time.Sleep(5 * time.Millisecond)
	}
	if n := len(list(t, s, store.Filter{})); n != perTick {
		t.Errorf("got %d samples, want %d", n, perTick)
	}
}

func TestDaysPastTheirRetentionAreDropped(t *testing.T) {
	dir := t.TempDir()
	var now atomic.Int64 // µs
	now.Store(start)
	o := Options{Retention: 3 * 24 * time.Hour, Clock: func() time.Time { return time.UnixMicro(now.Load()) }}
	s := open(t, dir, o)
	defer func() { closeStore(t, s) }()
	// Node a reports on days 0 to 5, node b on day 0 only, node c on days 0 and 5.
	seq := uint64(0)
	for d := range int64(6) {
		now.Store(start + d*dayLength + dayLength/2)
		for _, node := range []string{"a", "b", "c"} {
			if node == "a" || d == 0 || node == "c" && d == 5 {
				seq++
				appendTick(t, s, tick(node, seq, now.Load()))
			}
		}
		if err := s.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	first := list(t, s, store.Where(store.FieldTime, store.Lt, start+dayLength))
	if len(first) != 3*perTick {
		t.Fatalf("got %d samples of the first day, want %d", len(first), 3*perTick)
	}
	if err := s.expire(); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		// 12:00 of day 5 less 3 days is in day 2, so days 0 and 1 are gone.
		if got, want := len(list(t, s, store.Filter{})), (4+1)*perTick; got != want {
			t.Errorf("got %d samples, want %d", got, want)
		}
		if _, err := s.Sample(context.Background(), first[0].ID); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("dropped sample: got %v, want %v", err, store.ErrNotFound)
		}
		got, err := s.Resources(context.Background(), store.Filter{})
		if err != nil {
			t.Fatal(err)
		}
		noon := start + dayLength/2
		want := []store.Resource{{ID: "a-vm-0", First: noon + 2*dayLength, Last: noon + 5*dayLength}, {ID: "c-vm-0", First: noon + 5*dayLength, Last: noon + 5*dayLength}}
		if len(got) != 6 {
			t.Errorf("got %d resources, want 6", len(got))
		}
		for _, w := range want {
			found := false
			for _, g := range got {
				found = found || g.ID == w.ID && g.First == w.First && g.Last == w.Last && len(g.Meters) == 2
			}
			if !found {
				t.Errorf("got %+v, want among them %+v", got, w)
			}
		}
		if ms, err := s.Meters(context.Background(), store.Filter{}); err != nil || len(ms) != 12 {
			t.Errorf("got %d meters, %v, want 12", len(ms), err)
		}
	}
	check()
	closeStore(t, s)
	s = open(t, dir, o)
	check()
	left := 0
	end := func(kind byte) []byte {
		if kind == keyBatch {
			return appendDay([]byte{kind}, dayOf(start)+2)
		}
		return appendHour([]byte{kind}, hourOf(start+2*dayLength))
	}
	for _, kind := range []byte{keyChunk, keyRows, keyBatch} {
		if err := s.scan([]byte{kind}, end(kind), func(_, _ []byte) error {
			left++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if left > 0 {
		t.Errorf("%d records of dropped days are left", left)
	}
}

func TestABatchThatComesAgainLongAfterItsSamplesWentChangesNothing(t *testing.T) {
	var now atomic.Int64 // µs
	now.Store(start)
	dir, o := t.TempDir(), Options{Retention: 3 * 24 * time.Hour, Clock: func() time.Time { return time.UnixMicro(now.Load()) }}
	s := open(t, dir, o)
	defer func() { closeStore(t, s) }()
	numbered, named := tick("a", 1, start), tick("b", 1, start)
	for i := range perTick {
		named.IDs = append(named.IDs, fmt.Sprint("foreign-", i))
	}
	both := []store.Received{received(t, numbered), received(t, named)}
	if stored, err := s.Append(t.Context(), both); err != nil || stored[0] != (store.Stored{}) || stored[1] != (store.Stored{}) {
		t.Fatalf("%+v, %v", stored, err)
	}
	for range 10 {
		now.Add(dayLength)
		appendTick(t, s, tick("c", uint64(now.Load()), now.Load()))
		if err := errors.Join(s.Flush(t.Context()), s.expire()); err != nil {
			t.Fatal(err)
		}
	}
	before := len(list(t, s, store.Filter{}))
	for range 2 {
		stored, err := s.Append(t.Context(), both)
		if err != nil || !stored[0].Duplicate || stored[1].Refused == nil {
			t.Errorf("%+v, %v: want a duplicate and a refusal", stored, err)
		}
		if after := len(list(t, s, store.Filter{})); after != before {
			t.Errorf("%d samples, %d before", after, before)
		}
		closeStore(t, s)
		s = open(t, dir, o)
	}
}

func TestClosedStoreTakesNothingAndLeavesNothingRunning(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	s := open(t, t.TempDir(), Options{})
	appendTick(t, s, tick("a", 1, start))
	if err := s.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	list(t, s, store.Filter{})
	closeStore(t, s)
	closeStore(t, s)
	if _, err := s.Append(context.Background(), []store.Received{received(t, tick("a", 1, start))}); !errors.Is(err, errClosed) {
		t.Errorf("append: got %v, want %v", err, errClosed)
	}
	if err := s.Flush(context.Background()); !errors.Is(err, errClosed) {
		t.Errorf("flush: got %v, want %v", err, errClosed)
	}
}

func TestCloseWaitsForQueriesAndRefusesNewOnes(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	appendTick(t, s, tick("a", 1, start))
	closed := make(chan struct{})
	n := 0
	err := s.Samples(context.Background(), store.Filter{}, func(store.Sample) bool {
		if n++; n == 1 {
			go func() {
				closeStore(t, s)
				close(closed)
			}()
			for {
				// A query within a query is refused, and does not wait for itself.
				if _, err := s.Meters(context.Background(), store.Filter{}); errors.Is(err, errClosed) {
					break
				}
				time.Sleep(time.Millisecond)
			}
			select {
			case <-closed:
				t.Error("the store was closed under a query")
			default:
			}
		}
		return true
	})
	if err != nil || n != perTick {
		t.Errorf("got %d samples, %v, want %d", n, err, perTick)
	}
	<-closed
	if _, err := s.Resources(context.Background(), store.Filter{}); !errors.Is(err, errClosed) {
		t.Errorf("got %v, want %v", err, errClosed)
	}
}

func TestRowsOfManyPartsAreAllFound(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	defer closeStore(t, s)
	const n = 2*maxRows + 10
	b := &sample.Batch{ID: sample.NewBatchID(time.UnixMicro(start)), Node: "a", Seq: 1, Base: start, Meters: []sample.MeterRef{sample.CPU.MeterRef}}
	c := sample.Column{Bitmap: make([]byte, (n+7)/8)}
	for i := range n {
		b.Rows = append(b.Rows, sample.Row{Resource: "vm", Offset: int64(i)})
		c.Bitmap[i/8] |= 1 << (i % 8)
		c.Values = append(c.Values, uint64(i))
	}
	b.Columns = []sample.Column{c}
	appendTick(t, s, b)
	if err := s.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	got := list(t, s, store.Filter{})
	if len(got) != n {
		t.Fatalf("got %d samples, want %d", len(got), n)
	}
	for i := range got {
		if got[i].Volume.Bits != uint64(n-1-i) || got[i].ID != b.SampleID(n-1-i) {
			t.Fatalf("sample %d: got %+v", i, got[i])
		}
	}
}
