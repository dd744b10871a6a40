package export

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/parquet-go/parquet-go"
	"github.com/parquet-go/parquet-go/format"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/sample"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newYear is 2026-01-01T00:00:00Z.
var newYear = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const firstFile = "samples/day=2026-01-01/part-0.parquet"

// fixture is a store, and a clock that only the test moves.
type fixture struct {
	*local.Store
	now atomic.Int64
	seq uint64
	dir string // exported to
}

func newFixture(t testing.TB) *fixture {
	f := &fixture{dir: t.TempDir()}
	f.setClock(newYear.Add(26 * time.Hour))
	var err error
	if f.Store, err = local.Open(t.TempDir(), local.Options{Clock: f.clock, MinFree: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fixture) clock() time.Time     { return time.UnixMicro(f.now.Load()) }
func (f *fixture) setClock(t time.Time) { f.now.Store(t.UnixMicro()) }

func (f *fixture) exporter(t testing.TB, s Store, change func(*Config)) *Exporter {
	t.Helper()
	cfg := DefaultConfig()
	cfg.To = f.dir
	if change != nil {
		change(&cfg)
	}
	e, err := New(cfg, Deps{Log: zap.NewNop(), Store: s, Clock: f.clock})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// put stores a batch with one row and column a sample.
func (f *fixture) put(t testing.TB, gaps []sample.Gap, samples ...sample.Sample) {
	t.Helper()
	f.seq++
	b := &sample.Batch{ID: sample.NewBatchID(newYear), Node: "node-1", Epoch: 7, Seq: f.seq, Base: newYear.UnixMicro(), Gaps: gaps}
	for i, s := range samples {
		b.Meters = append(b.Meters, sample.MeterRef{Name: s.Name, Kind: s.Kind, Unit: s.Unit})
		b.Rows = append(b.Rows, sample.Row{
			Resource: s.Resource, Offset: s.Time - b.Base, Incarnation: s.Incarnation, Source: s.Source,
			Project: s.Project, User: s.User, Metadata: s.Metadata,
		})
		bitmap := make([]byte, (len(samples)+7)/8)
		bitmap[i/8] |= 1 << (i % 8)
		b.Columns = append(b.Columns, sample.Column{Meter: i, Origin: s.Origin, Tag: s.Volume.Tag, Bitmap: bitmap, Values: []uint64{s.Volume.Bits}})
	}
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.Encode(nil, b)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := f.Append(context.Background(), []store.Received{{Body: body, Batch: b}})
	if err != nil || stored[0].Refused != nil {
		t.Fatalf("append: %v, %+v", err, stored)
	}
}

// cpu makes a sample of vm-1 so long after New Year.
func cpu(after time.Duration, v sample.Volume) sample.Sample {
	return sample.Sample{
		Name: "cpu", Kind: sample.Cumulative, Unit: "ns", Volume: v, Resource: "vm-1", Source: "openstack",
		Project: "p1", User: "u1", Time: newYear.Add(after).UnixMicro(), Origin: sample.Walk, Incarnation: 5,
	}
}

// random makes samples of some series around the first day of the year.
func random(n int) []sample.Sample {
	r := rand.New(rand.NewPCG(1, 2))
	volumes := []sample.Volume{
		sample.Uint(0), sample.Uint(math.MaxUint64), sample.Uint(1<<53 + 1), sample.Uint(1 << 60), sample.Int(-1), sample.Int(math.MinInt64),
		sample.Int(math.MaxInt64), sample.Float(0.1), sample.Float(-math.SmallestNonzeroFloat64), sample.Float(math.MaxFloat64),
	}
	var out []sample.Sample
	for range n {
		s := cpu(time.Duration(r.Int64N(int64(28*time.Hour)))-2*time.Hour, volumes[r.IntN(len(volumes))])
		s.Time -= s.Time % 1000 // some are at the same time
		s.Name = []string{"cpu", "disk.read.bytes", "Größe"}[r.IntN(3)]
		s.Resource = "vm-" + strconv.Itoa(r.IntN(4))
		s.Project = []string{"", "p1", "p2"}[r.IntN(3)]
		s.User = []string{"", "u1"}[r.IntN(2)]
		s.Metadata = [][]byte{nil, []byte(`{"flavor": {"vcpus": 2}}`), []byte(`{"name":"ü"}`)}[r.IntN(3)]
		s.Incarnation = sample.Incarnation(r.IntN(2))
		out = append(out, s)
	}
	return out
}

// rows reads a file that was exported.
func rows[T any](t *testing.T, data []byte) ([]T, *parquet.File) {
	t.Helper()
	p, err := parquet.OpenFile(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	out, err := parquet.Read[T](bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	return out, p
}

func (f *fixture) read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(f.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// sameAsStored compares a file with what the store says of New Year's Day.
func (f *fixture) sameAsStored(t *testing.T, data []byte) {
	t.Helper()
	var want []store.Sample
	if err := f.Samples(context.Background(), store.Filter{}, func(s store.Sample) bool {
		if at := time.UnixMicro(s.Time).UTC(); at.Year() == 2026 && at.YearDay() == 1 {
			want = append(want, s)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	// Rows of one series and time are in no certain order.
	order := func(am, ar, ai string, at int64, bm, br, bi string, bt int64) int {
		return cmp.Or(cmp.Compare(am, bm), cmp.Compare(ar, br), cmp.Compare(at, bt), cmp.Compare(ai, bi))
	}
	slices.SortFunc(want, func(a, b store.Sample) int {
		return order(a.Name, a.Resource, a.ID.String(), a.Time, b.Name, b.Resource, b.ID.String(), b.Time)
	})
	got, _ := rows[sampleRow](t, data)
	if !slices.IsSortedFunc(got, func(a, b sampleRow) int {
		return order(a.Meter, a.Resource, "", a.Timestamp, b.Meter, b.Resource, "", b.Timestamp)
	}) {
		t.Error("the rows are not sorted by meter, resource and time")
	}
	slices.SortFunc(got, func(a, b sampleRow) int {
		return order(a.Meter, a.Resource, a.ID, a.Timestamp, b.Meter, b.Resource, b.ID, b.Timestamp)
	})
	if len(want) == 0 || len(got) != len(want) {
		t.Fatalf("got %d rows, want %d and some", len(got), len(want))
	}
	text := func(s *string) string {
		if s == nil {
			return ""
		}
		return *s
	}
	for i, r := range got {
		volume := r.Exact
		if volume == nil {
			s := strconv.FormatFloat(r.Volume, 'g', -1, 64)
			if want[i].Volume.Tag != sample.F64 {
				s = strconv.FormatFloat(r.Volume, 'f', 0, 64)
			}
			volume = &s
		}
		exact := want[i].Volume.String()
		if want[i].Volume.Tag == sample.F64 {
			exact = strconv.FormatFloat(want[i].Volume.Float64(), 'g', -1, 64)
		}
		a := []any{r.Meter, r.Type, r.Unit, r.Resource, text(r.Project), text(r.User), r.Source, r.Timestamp, *volume, text(r.Metadata), r.ID, r.Origin, r.Incarnation, r.Recorded, r.Volume}
		w := &want[i]
		b := []any{w.Name, string(w.Kind), w.Unit, w.Resource, w.Project, w.User, w.Source, w.Time, exact, string(w.Metadata), w.ID.String(), string(w.Origin), w.Incarnation.String(), w.Recorded, w.Volume.Float64()}
		if diff := gocmp.Diff(b, a); diff != "" {
			t.Fatalf("row %d: got (+) is not what is wanted (-):\n%s", i, diff)
		}
	}
}

func TestADayIsExportedAsItIsStored(t *testing.T) {
	f := newFixture(t)
	all := random(3000)
	for chunk := range slices.Chunk(all, 500) {
		f.put(t, nil, chunk...)
	}
	e := f.exporter(t, f, nil)
	if err := e.pass(context.Background()); err != nil {
		t.Fatal(err)
	}
	data := f.read(t, firstFile)
	f.sameAsStored(t, data)
	_, p := rows[sampleRow](t, data)
	for _, column := range []string{
		"required int64 timestamp (TIMESTAMP(isAdjustedToUTC=true,unit=MICROS))", "required double volume", "required binary meter (STRING)",
		"optional binary project_id (STRING)", "optional binary volume_exact (STRING)",
	} {
		if schema := p.Schema().String(); !strings.Contains(schema, column) {
			t.Errorf("no column %q in %s", column, schema)
		}
	}
	for _, g := range p.Metadata().RowGroups {
		if len(g.SortingColumns) != 3 || g.SortingColumns[0].ColumnIdx != 0 || g.SortingColumns[1].ColumnIdx != 3 || g.SortingColumns[2].ColumnIdx != 7 {
			t.Errorf("got sorting columns %+v, want meter, resource_id, timestamp", g.SortingColumns)
		}
		for _, c := range g.Columns {
			if c.MetaData.Codec != format.Zstd {
				t.Errorf("column %v is not compressed with zstd", c.MetaData.PathInSchema)
			}
		}
	}
	// The last day of the year is over as well, the second of January is not.
	days, err := filepath.Glob(filepath.Join(f.dir, "*/*"))
	if err != nil || len(days) != 2 || filepath.Base(days[0]) != "day=2025-12-31" {
		t.Errorf("got folders %v, %v", days, err)
	}
}

func TestADayIsExportedAgainOnlyWhenMoreCame(t *testing.T) {
	f := newFixture(t)
	f.put(t, []sample.Gap{
		{Meter: "*", Resource: "*", From: newYear.UnixMicro() - 1, To: newYear.UnixMicro() + 5, Reason: "begins the day before", Node: "node-1"},
		{Meter: "cpu", Resource: "vm-1", From: newYear.UnixMicro(), To: newYear.UnixMicro() + 9, Reason: "mute", Node: "node-1"},
	}, cpu(time.Hour, sample.Uint(1)), cpu(25*time.Hour, sample.Uint(9)))
	f.setClock(newYear.Add(26*time.Hour - time.Microsecond))
	e := f.exporter(t, f, func(c *Config) { c.Days = 1 })
	pass := func(files float64) {
		t.Helper()
		if err := e.pass(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got := testutil.ToFloat64(e.m.files); got != files {
			t.Fatalf("got %v files, want %v", got, files)
		}
	}
	pass(1) // of the gap of New Year's Eve: New Year's Day is not due yet
	f.setClock(newYear.Add(26 * time.Hour))
	pass(3)
	f.sameAsStored(t, f.read(t, firstFile))
	gaps, _ := rows[gapRow](t, f.read(t, "gaps/day=2026-01-01/part-0.parquet"))
	if want := []gapRow{{"cpu", "vm-1", newYear.UnixMicro(), newYear.UnixMicro() + 9, "mute", "node-1"}}; !slices.Equal(gaps, want) {
		t.Errorf("got gaps %+v, want %+v", gaps, want)
	}
	pass(3)
	f.put(t, nil, cpu(26*time.Hour, sample.Uint(10))) // of another day
	pass(3)
	f.put(t, nil, cpu(time.Minute, sample.Uint(2)))
	pass(4)
	f.sameAsStored(t, f.read(t, firstFile))
	pass(4)
}

func TestEventsAreExportedWithTheirTraits(t *testing.T) {
	f := newFixture(t)
	events := []sample.Event{
		{ID: "later", Type: "compute.instance.create.end", Generated: newYear.Add(2 * time.Hour).UnixMicro(), Traits: []sample.Trait{
			{Name: "host", Type: sample.TextTrait, Text: "ö"},
			{Name: "vcpus", Type: sample.IntTrait, Int: -2},
			{Name: "ratio", Type: sample.FloatTrait, Float: 0.5},
			{Name: "launched_at", Type: sample.DatetimeTrait, Int: newYear.UnixMicro() + 1},
		}, Raw: []byte(`{"a": 1}`)},
		{ID: "next day", Type: "compute.instance.create.end", Generated: newYear.Add(24 * time.Hour).UnixMicro()},
		{ID: "first", Type: "compute.instance.create.end", Generated: newYear.UnixMicro()},
		{ID: "other", Type: "a", Generated: newYear.Add(24*time.Hour).UnixMicro() - 1},
	}
	if _, err := f.AppendEvents(t.Context(), events); err != nil {
		t.Fatal(err)
	}
	e := f.exporter(t, f, nil)
	for range 2 {
		if err := e.pass(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := testutil.ToFloat64(e.m.files); got != 1 {
		t.Errorf("got %v files, want one", got)
	}
	got, _ := rows[eventRow](t, f.read(t, "events/day=2026-01-01/part-0.parquet"))
	raw := `{"a": 1}`
	want := []eventRow{
		{Type: "a", ID: "other", Generated: events[3].Generated},
		{Type: "compute.instance.create.end", ID: "first", Generated: events[2].Generated},
		{Type: "compute.instance.create.end", ID: "later", Generated: events[0].Generated, Raw: &raw, Traits: []traitRow{
			{"host", "text", "ö"}, {"vcpus", "int", "-2"}, {"ratio", "float", "0.5"}, {"launched_at", "datetime", "2026-01-01T00:00:00.000001"},
		}},
	}
	if diff := gocmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("got (+) is not what is wanted (-):\n%s", diff)
	}
}

// broken is a store that fails at the n-th query of samples, and from then on.
type broken struct {
	Store
	good atomic.Int64
}

var errBroken = errors.New("broken")

func (b *broken) Samples(ctx context.Context, f store.Filter, yield func(store.Sample) bool) error {
	if b.good.Add(-1) < 0 {
		return errBroken
	}
	return b.Store.Samples(ctx, f, yield)
}

func TestAFileIsWholeOrNotThere(t *testing.T) {
	f := newFixture(t)
	f.put(t, nil, random(500)...)
	s := &broken{Store: f}
	s.good.Store(3)
	e := f.exporter(t, s, func(c *Config) { c.Days = 1 })
	if err := e.pass(context.Background()); !errors.Is(err, errBroken) {
		t.Fatalf("got %v, want that the store is broken", err)
	}
	if n := testutil.ToFloat64(e.m.failures); n != 1 {
		t.Errorf("got %v failures, want 1", n)
	}
	left, err := os.ReadDir(filepath.Join(f.dir, filepath.Dir(firstFile)))
	if err != nil || len(left) != 0 {
		t.Errorf("got %v, %v, want an empty folder", left, err)
	}
	// What a kill leaves behind is no hindrance.
	partial := filepath.Join(f.dir, filepath.Dir(firstFile), ".part-0.parquet.partial")
	if err := os.WriteFile(partial, bytes.Repeat([]byte("x"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.good.Store(math.MaxInt64)
	if err := e.pass(context.Background()); err != nil {
		t.Fatal(err)
	}
	f.sameAsStored(t, f.read(t, firstFile))
	if _, err := os.Stat(partial); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the partial file: got %v, want none", err)
	}
}

func TestRunTriesAgainWhatFailed(t *testing.T) {
	f := newFixture(t)
	f.put(t, nil, cpu(time.Hour, sample.Uint(1)))
	blocked := filepath.Join(f.dir, "samples")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil { // a file where the folder should be
		t.Fatal(err)
	}
	e := f.exporter(t, f, nil)
	e.again = time.Millisecond
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.Run(ctx)
	}()
	until(t, func() bool { return testutil.ToFloat64(e.m.failures) > 0 })
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	until(t, func() bool { return testutil.ToFloat64(e.m.files) > 0 })
	stop()
	<-done
	f.sameAsStored(t, f.read(t, firstFile))
}

func until(t *testing.T, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come to hold")
		}
	}
}

func TestAFileThatIsNotParquetIsLeftAlone(t *testing.T) {
	f := newFixture(t)
	f.put(t, nil, cpu(time.Hour, sample.Uint(1)))
	name := filepath.Join(f.dir, firstFile)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte("my diary"), 0o600)); err != nil {
		t.Fatal(err)
	}
	err := f.exporter(t, f, nil).pass(context.Background())
	if err == nil || !strings.Contains(err.Error(), "if it is damaged, delete it") {
		t.Errorf("got %v, want what to do", err)
	}
	if got := string(f.read(t, firstFile)); got != "my diary" {
		t.Errorf("it was overwritten with %q", got)
	}
}

// fakeS3 is a service with a bucket billing.
func fakeS3(t *testing.T) (*s3mem.Backend, *httptest.Server, S3) {
	t.Helper()
	backend := s3mem.New()
	if err := backend.CreateBucket("billing"); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(gofakes3.New(backend).Server())
	t.Cleanup(server.Close)
	keys := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(keys, []byte("[default]\naws_access_key_id = a\naws_secret_access_key = b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return backend, server, S3{Endpoint: server.URL, Region: "us-east-1", Credentials: keys}
}

func TestAnUploadInPartsIsWholeOrNotThere(t *testing.T) {
	_, _, s3 := fakeS3(t)
	b, err := newBucket(s3, "billing", "")
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	data := make([]byte, partBytes+1<<20)
	for i := range data {
		data[i] = byte(i >> 16)
	}
	err = b.create(ctx, "x", func(w io.Writer) error {
		_, err := w.Write(data)
		return errors.Join(err, errBroken)
	})
	if !errors.Is(err, errBroken) {
		t.Errorf("got %v, want why it was not written", err)
	}
	if _, err := b.open(ctx, "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("got %v, want that there is no object", err)
	}
	if err := b.create(ctx, "x", func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	f, err := b.open(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, f.size)
	if _, err := f.ReadAt(got, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Error("the object is not what was written")
	}
}

func TestExportToS3(t *testing.T) {
	backend, server, s3 := fakeS3(t)
	f := newFixture(t)
	f.put(t, nil, random(500)...)
	s := &broken{Store: f}
	s.good.Store(3)
	e := f.exporter(t, s, func(c *Config) {
		c.To, c.S3 = "s3://billing/kv/meter", s3
		c.Days = 1
	})
	object := func() ([]byte, error) {
		o, err := backend.GetObject("billing", "kv/meter/"+firstFile, nil)
		if err != nil {
			return nil, err
		}
		defer o.Contents.Close()
		return io.ReadAll(o.Contents)
	}
	if err := e.pass(context.Background()); !errors.Is(err, errBroken) {
		t.Fatalf("got %v, want that the store is broken", err)
	}
	if _, err := object(); !gofakes3.HasErrorCode(err, gofakes3.ErrNoSuchKey) {
		t.Fatalf("got %v of a file that is not whole, want that there is none", err)
	}
	s.good.Store(math.MaxInt64)
	for range 2 { // the second finds nothing to do
		if err := e.pass(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if n := testutil.ToFloat64(e.m.files); n != 1 {
		t.Errorf("got %v files, want 1", n)
	}
	data, err := object()
	if err != nil {
		t.Fatal(err)
	}
	f.sameAsStored(t, data)
	server.Close()
	if err := e.pass(context.Background()); err == nil {
		t.Error("got no error of a service that is gone")
	}
}

func TestRowGroupsAreBounded(t *testing.T) {
	var b bytes.Buffer
	w := newWriter[gapRow](&b, "meter", "resource_id", "from")
	for i := range int64(5000) {
		if err := w.add(gapRow{Meter: "m", From: i}, groupBytes/2000); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
	got, p := rows[gapRow](t, b.Bytes())
	if groups := len(p.RowGroups()); groups != 3 || len(got) != 5000 || w.n != 5000 {
		t.Errorf("got %d groups of %d rows, want 3 of 5000", groups, len(got))
	}
	for i := range got {
		if got[i].From != int64(i) {
			t.Fatalf("row %d is that of %d", i, got[i].From)
		}
	}
}

func TestVolumesThatAFloatHolds(t *testing.T) {
	for v, want := range map[sample.Volume]bool{
		sample.Uint(0): true, sample.Uint(1 << 53): true, sample.Uint(1<<53 + 1): false, sample.Uint(1<<53 + 2): true, sample.Uint(1 << 63): true,
		sample.Uint(math.MaxUint64): false, sample.Int(-1): true, sample.Int(math.MinInt64): true, sample.Int(math.MinInt64 + 1): false,
		sample.Int(math.MaxInt64): false, sample.Float(0.1): true,
	} {
		if got := isFloat(v); got != want {
			t.Errorf("%v: got %v, want %v", v, got, want)
		}
	}
}

func TestCheck(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string // part of the error
	}{
		"off is not looked at":                     {func(c *Config) { c.To, c.Days = "", -1 }, ""},
		"a folder":                                 {func(*Config) {}, ""},
		"no days":                                  {func(c *Config) { c.Days = 0 }, "export.days 0: must be at least 1"},
		"before the end":                           {func(c *Config) { c.After = -1 }, "export.after -1ns: must not be negative"},
		"what is deleted cannot be exported":       {func(c *Config) { c.Days = 30 }, "further than store.retention 720h0m0s"},
		"what other services there are":            {func(c *Config) { c.To = "gs://x/y" }, "write a path, or s3://BUCKET/PREFIX"},
		"a bucket has no port":                     {func(c *Config) { c.To = "s3://x:1/y" }, "write a path, or s3://BUCKET/PREFIX"},
		"a bucket needs credentials":               {func(c *Config) { c.To = "s3://x/y" }, "name a file of them in export.s3.credentials"},
		"the file of credentials must be there":    {func(c *Config) { c.To, c.S3.Credentials = "s3://x/y", "/nowhere/keys" }, "export.s3.credentials: stat /nowhere/keys"},
		"the endpoint is a URL":                    {func(c *Config) { c.To, c.S3.Credentials, c.S3.Endpoint = "s3://bucket/y", "/dev/null", "minio:9000" }, "export.s3.endpoint minio:9000: write https://HOST"},
		"a bucket with an endpoint and credential": {func(c *Config) { c.To, c.S3.Credentials = "s3://bucket/y", "/dev/null" }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.To = "/srv/export"
			tc.change(&cfg)
			err := cfg.Check(30 * day)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// BenchmarkExport exports a day of 100 series with a sample every 10 s.
func BenchmarkExport(b *testing.B) {
	f := newFixture(b)
	const series, points = 100, 8640
	for from := 0; from < points; from += 100 {
		var samples []sample.Sample
		for i := range 100 {
			for n := range series {
				s := cpu(time.Duration(from+i)*10*time.Second, sample.Uint(uint64(from+i)*3_141_592_653+uint64(n*i*977)))
				s.Resource, s.Metadata = "4ee4ee36-8bd8-4ef4-9dbb-"+strconv.Itoa(100_000_000_000+n), []byte(`{"flavor": {"name": "m1.small", "vcpus": 2}, "host": "compute-1"}`)
				samples = append(samples, s)
			}
		}
		f.put(b, nil, samples...)
	}
	if err := f.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	var size int64
	b.ReportAllocs()
	for b.Loop() {
		f.dir = b.TempDir()
		e := f.exporter(b, f, func(c *Config) { c.Days = 1 })
		if err := e.pass(context.Background()); err != nil {
			b.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(f.dir, firstFile))
		if err != nil {
			b.Fatal(err)
		}
		size = info.Size()
	}
	b.ReportMetric(float64(size)/(series*points), "B/sample")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(series*points), "ns/sample")
}
