package local

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/fleet"
)

// testFleet is a fleet for a benchmark.
type testFleet struct{ *fleet.Fleet }

func newFleet(tb testing.TB, nodes, domains int) *testFleet {
	f, err := fleet.New(nodes, domains)
	if err != nil {
		tb.Fatal(err)
	}
	return &testFleet{f}
}

// batch makes the next batch. It is good until the node's next one.
func (f *testFleet) batch(tb testing.TB) store.Received {
	body, b, err := f.Next()
	if err != nil {
		tb.Fatal(err)
	}
	return store.Received{Body: body, Batch: b}
}

// cpuTime returns the process's user and system time, and that of the thread.
func cpuTime(tb testing.TB) (process, thread time.Duration) {
	var p, t unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &p); err != nil {
		tb.Fatal(err)
	}
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &t); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(p.Utime.Nano() + p.Stime.Nano()), time.Duration(t.Utime.Nano() + t.Stime.Nano())
}

// ingest appends samples in commits of 10,000 and returns the store's CPU time,
// without that of making the batches.
func ingest(tb testing.TB, s *Store, f *testFleet, samples int) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start, _ := cpuTime(tb)
	var making time.Duration
	group := make([]store.Received, 10)
	for n := 0; n < samples; {
		_, before := cpuTime(tb)
		for i := range group {
			group[i] = f.batch(tb)
			n += group[i].Batch.Len()
		}
		_, after := cpuTime(tb)
		making += after - before
		if _, err := s.Append(context.Background(), group); err != nil {
			tb.Fatal(err)
		}
	}
	end, _ := cpuTime(tb)
	return end - start - making
}

// settle flushes, rolls up and compacts, so that the folder holds what rests.
func settle(tb testing.TB, s *Store) {
	if err := s.Roll(context.Background()); err != nil {
		tb.Fatal(err)
	}
	if err := s.db.Flush(); err != nil {
		tb.Fatal(err)
	}
	if err := s.db.Compact(context.Background(), []byte{0}, []byte{0xff}, false); err != nil {
		tb.Fatal(err)
	}
}

func diskBytes(tb testing.TB, dir string) (n int64) {
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if info, err := d.Info(); err == nil {
				n += info.Size()
			}
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

// benchSamples is how many samples a benchmark stores; KVMETER_BENCH_SAMPLES
// sets it, 20000000 is the size that published figures are of.
func benchSamples(tb testing.TB) int {
	if v := os.Getenv("KVMETER_BENCH_SAMPLES"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			tb.Fatal(err)
		}
		return n
	}
	return 5_000_000
}

// BenchmarkAppend stores samples of nodes with 50 domains each and prints the CPU
// time a sample, from decoded batches to where they rest, rolled up, and the
// bytes that it takes there. One operation is one sample. A million series sends
// each minute, so that the samples are of as much of an hour as they can be.
func BenchmarkAppend(b *testing.B) {
	for _, fl := range []struct {
		name  string
		nodes int
		step  int64
	}{{"10,000 series", 10, fleet.Step}, {"100,000 series", 100, fleet.Step}, {"1,000,000 series", 1000, 6 * fleet.Step}} {
		b.Run(fl.name, func(b *testing.B) { benchAppend(b, fl.nodes, fl.step) })
	}
}

func benchAppend(b *testing.B, nodes int, step int64) {
	b.ReportAllocs()
	n := max(b.N, benchSamples(b))
	dir := b.TempDir()
	o := Options{MinFree: 1, Retention: -1}
	s, err := Open(dir, o)
	if err != nil {
		b.Fatal(err)
	}
	f := newFleet(b, nodes, 50)
	f.Step = step
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	cpu := ingest(b, s, f, n)
	wall := time.Since(start)
	runtime.ReadMemStats(&after)
	started, _ := cpuTime(b)
	settle(b, s)
	ended, _ := cpuTime(b)
	b.StopTimer()
	cpu += ended - started
	// A restart drops Pebble's spare log files.
	for range 2 {
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		if s, err = Open(dir, o); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(cpu.Nanoseconds())/float64(n), "cpu-ns/sample")
	b.ReportMetric(float64(n)/cpu.Seconds(), "samples/core-s")
	b.ReportMetric(float64(diskBytes(b, dir))/float64(n), "B/sample")
	b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(n), "allocs/sample")
	b.ReportMetric(float64(wall.Nanoseconds())/float64(n), "wall-ns/sample")
	b.ReportMetric(peakMiB(b), "peak-MiB")
}

// BenchmarkCommit stores 10,000 samples of 100,000 series ten times a second and
// prints how long that takes beside an fdatasync of as many bytes to a file of its
// own. One operation is one commit.
func BenchmarkCommit(b *testing.B) { benchPaced(b, 100) }

// BenchmarkPaced is BenchmarkCommit with a million series, as a fleet of 1,000
// hosts sends them, each every ten seconds: run it for -benchtime 6000x, which is
// ten minutes. It prints the cores that the store took as well, the memory, and
// how far it fell behind.
func BenchmarkPaced(b *testing.B) { benchPaced(b, 1000) }

func benchPaced(b *testing.B, nodes int) {
	const pace = 100 * time.Millisecond
	dir := b.TempDir()
	s, err := Open(filepath.Join(dir, "store"), Options{MinFree: 1, Retention: -1})
	if err != nil {
		b.Fatal(err)
	}
	defer closeStore(b, s)
	file, err := os.Create(filepath.Join(dir, "bare"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	f := newFleet(b, nodes, 50)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var commits, bare, lags []time.Duration
	var making time.Duration
	group := make([]store.Received, 10)
	start := time.Now()
	cpu, _ := cpuTime(b)
	for b.Loop() {
		due := start.Add(time.Duration(len(commits)) * pace)
		time.Sleep(time.Until(due))
		var bytes []byte
		_, before := cpuTime(b)
		for i := range group {
			group[i] = f.batch(b)
			bytes = append(bytes, group[i].Body...)
		}
		_, after := cpuTime(b)
		making += after - before
		began := time.Now()
		if _, err := s.Append(context.Background(), group); err != nil {
			b.Fatal(err)
		}
		commits = append(commits, time.Since(began))
		lags = append(lags, time.Since(due))
		began = time.Now()
		if _, err := file.Write(bytes); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			b.Fatal(err)
		}
		bare = append(bare, time.Since(began))
	}
	took := time.Since(start)
	end, _ := cpuTime(b)
	b.ReportMetric(0, "ns/op")
	for _, list := range []struct {
		name string
		of   []time.Duration
	}{{"commit", commits}, {"fdatasync", bare}, {"lag", lags}} {
		slices.Sort(list.of)
		for _, q := range []float64{0.5, 0.99, 1} {
			b.ReportMetric(float64(list.of[int(q*float64(len(list.of)-1))].Microseconds())/1000, fmt.Sprintf("%s-p%g-ms", list.name, q*100))
		}
	}
	b.ReportMetric((end-cpu-making).Seconds()/took.Seconds(), "cores")
	b.ReportMetric(float64(len(commits))*10_000/took.Seconds(), "samples/s")
	b.ReportMetric(peakMiB(b), "peak-MiB")
}

// peakMiB returns the largest resident set that the process had.
func peakMiB(tb testing.TB) float64 {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		tb.Fatal(err)
	}
	return float64(usage.Maxrss) / 1024
}

// BenchmarkMonth asks a store of 10,000 series with a month of samples:
// KVMETER_BENCH_POINTS of each, 10000 for published figures.
func BenchmarkMonth(b *testing.B) {
	points := 500
	if v := os.Getenv("KVMETER_BENCH_POINTS"); v != "" {
		var err error
		if points, err = strconv.Atoi(v); err != nil {
			b.Fatal(err)
		}
	}
	dir := os.Getenv("KVMETER_BENCH_STORE") // is kept where it is named
	if dir == "" {
		dir = b.TempDir()
	}
	s, err := Open(dir, Options{MinFree: 1, Retention: -1, RollupRetention: -1})
	if err != nil {
		b.Fatal(err)
	}
	defer closeStore(b, s)
	f := newFleet(b, 10, 50)
	f.Step = 30 * dayLength / int64(points)
	if rs, err := s.Resources(context.Background(), store.Filter{}); err != nil {
		b.Fatal(err)
	} else if len(rs) == 0 {
		ingest(b, s, f, points*10_000)
		settle(b, s)
	}
	resource := func(i int) store.Filter { return store.Where(store.FieldResource, store.Eq, f.row(i).Resource) }
	project := func(i int) store.Filter { return store.Where(store.FieldProject, store.Eq, f.row(i).Project) }
	start := int64(fleet.Start)
	month := store.And(store.Where(store.FieldTime, store.Ge, start), store.Where(store.FieldTime, store.Lt, start+30*dayLength))
	metadata := func(key string, op store.Op, value any) store.Filter {
		return store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: key, Op: op, Value: value}}
	}
	for _, q := range []struct {
		name string
		ask  func(b *testing.B, i int)
	}{
		{"newest 100 of a series", func(b *testing.B, i int) { benchList(b, s, 100, store.And(f.meter(i), resource(i))) }},
		{"statistics by hour, series", func(b *testing.B, i int) {
			benchStatistics(b, s, store.StatisticsQuery{Filter: store.And(f.meter(i), resource(i), month), Period: 3600, Start: &start})
		}},
		{"statistics by hour from any second, series", func(b *testing.B, i int) {
			from := start + 1234567890
			benchStatistics(b, s, store.StatisticsQuery{Filter: store.And(f.meter(i), resource(i), store.Where(store.FieldTime, store.Ge, from)), Period: 3600, Start: &from})
		}},
		{"statistics by hour, project by resource", func(b *testing.B, i int) {
			benchStatistics(b, s, store.StatisticsQuery{Filter: store.And(f.meter(i), project(i), month), Period: 3600, Start: &start, GroupBy: []store.Group{{Field: store.FieldResource}}})
		}},
		{"complex query with metadata", func(b *testing.B, i int) {
			not := store.And(metadata("status", store.Eq, "deleted"))
			benchList(b, s, 100, store.And(
				f.meter(i), store.Filter{Or: []store.Filter{metadata("flavor.name", store.Eq, fmt.Sprint("m1.size", i%8)), metadata("vcpus", store.Gt, 4.0)}},
				store.Filter{Not: &not}, store.Where(store.FieldVolume, store.Ge, sample.Uint(0)), store.Where(store.FieldTime, store.Lt, start+int64(1+i%29)*dayLength),
			))
		}},
		{"meters of a resource", func(b *testing.B, i int) {
			if ms, err := s.Meters(context.Background(), resource(i)); err != nil || len(ms) != len(f.Columns) {
				b.Fatal(len(ms), err)
			}
		}},
		{"usage of a project", func(b *testing.B, i int) {
			n := 0
			if err := s.Usage(context.Background(), store.UsageQuery{From: start, To: start + 30*dayLength, Filter: project(i)}, func(store.Usage) bool {
				n++
				return true
			}); err != nil || n != 1000 {
				b.Fatal(n, err)
			}
		}},
	} {
		b.Run(q.name, func(b *testing.B) { benchAsk(b, q.ask) })
	}
}

// benchAsk prints the CPU time of a query.
func benchAsk(b *testing.B, ask func(b *testing.B, i int)) {
	b.ReportAllocs()
	i := 0
	before, _ := cpuTime(b)
	for b.Loop() {
		ask(b, i)
		i++
	}
	after, _ := cpuTime(b)
	b.ReportMetric(float64((after-before).Microseconds())/float64(i)/1000, "cpu-ms/op")
}

// benchStore is a store with samples: half of them settled, the rest in memory
// and in fresh chunks; or all settled.
func benchStore(b *testing.B, settled bool) (*Store, *testFleet) {
	s, err := Open(b.TempDir(), Options{MinFree: 1, Retention: -1})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { closeStore(b, s) })
	f := newFleet(b, 100, 50)
	ingest(b, s, f, benchSamples(b)/2)
	settle(b, s)
	ingest(b, s, f, benchSamples(b)/2)
	if settled {
		settle(b, s)
	}
	return s, f
}

func (f *testFleet) meter(i int) store.Filter {
	return store.Where(store.FieldMeter, store.Eq, f.Columns[i%len(f.Columns)].Ref.Name)
}

func (f *testFleet) row(i int) *sample.Row {
	rows := f.Nodes[i%len(f.Nodes)].Batch.Rows
	return &rows[i/len(f.Nodes)%len(rows)]
}

func benchList(b *testing.B, s *Store, limit int, filter store.Filter) (last store.Sample) {
	n := 0
	if err := s.Samples(context.Background(), filter, func(sm store.Sample) bool {
		n++
		last = sm
		return n < limit
	}); err != nil {
		b.Fatal(err)
	}
	if n == 0 {
		b.Fatal("nothing found")
	}
	return last
}

func benchStatistics(b *testing.B, s *Store, q store.StatisticsQuery) {
	rows, err := s.Statistics(context.Background(), q)
	if err != nil || len(rows) == 0 {
		b.Fatal(rows, err)
	}
}

// BenchmarkQuery asks a store of 100,000 series, each time for something else.
func BenchmarkQuery(b *testing.B) {
	for _, settled := range []bool{false, true} {
		name := "half in memory"
		if settled {
			name = "all in chunks"
		}
		b.Run(name, func(b *testing.B) {
			s, f := benchStore(b, settled)
			resource := func(i int) store.Filter { return store.Where(store.FieldResource, store.Eq, f.row(i).Resource) }
			project := func(i int) store.Filter { return store.Where(store.FieldProject, store.Eq, f.row(i).Project) }
			for _, q := range []struct {
				name string
				ask  func(b *testing.B, i int)
			}{
				{"newest 100 of a series", func(b *testing.B, i int) { benchList(b, s, 100, store.And(f.meter(i), resource(i))) }},
				{"newest 100 of a project's meter", func(b *testing.B, i int) { benchList(b, s, 100, store.And(f.meter(i), project(i))) }},
				{"newest 100 of a meter", func(b *testing.B, i int) { benchList(b, s, 100, f.meter(i)) }},
				{"newest 100 of all", func(b *testing.B, _ int) { benchList(b, s, 100, store.Filter{}) }},
				{"a series by minutes", func(b *testing.B, i int) {
					benchStatistics(b, s, store.StatisticsQuery{Filter: store.And(f.meter(i), resource(i)), Period: 60})
				}},
				{"a series' last five minutes", func(b *testing.B, i int) {
					benchStatistics(b, s, store.StatisticsQuery{Filter: store.And(f.meter(i), resource(i), store.Where(store.FieldTime, store.Ge, f.Now-300e6))})
				}},
				{"a project's meter by resource", func(b *testing.B, i int) {
					benchStatistics(b, s, store.StatisticsQuery{Filter: store.And(f.meter(i), project(i)), GroupBy: []store.Group{{Field: store.FieldResource}}})
				}},
				{"a meter by project", func(b *testing.B, i int) {
					benchStatistics(b, s, store.StatisticsQuery{Filter: f.meter(i), GroupBy: []store.Group{{Field: store.FieldProject}}})
				}},
				{"a flavour's meter by project", func(b *testing.B, i int) {
					flavour := store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: "flavor.id", Op: store.Eq, Value: fmt.Sprint(i % 8)}}
					benchStatistics(b, s, store.StatisticsQuery{Filter: store.And(f.meter(i), flavour), GroupBy: []store.Group{{Field: store.FieldProject}}})
				}},
				{"a sample by id", func(b *testing.B, i int) {
					old := benchList(b, s, 100, store.And(f.meter(i), resource(i)))
					if got, err := s.Sample(context.Background(), old.ID); err != nil || got.ID != old.ID {
						b.Fatal(got, err)
					}
				}},
				{"meters of a resource", func(b *testing.B, i int) {
					if ms, err := s.Meters(context.Background(), resource(i)); err != nil || len(ms) != len(f.Columns) {
						b.Fatal(len(ms), err)
					}
				}},
				{"all resources", func(b *testing.B, _ int) {
					if rs, err := s.Resources(context.Background(), store.Filter{}); err != nil || len(rs) != 5000 {
						b.Fatal(len(rs), err)
					}
				}},
				{"resources of the last minute", func(b *testing.B, _ int) {
					if rs, err := s.Resources(context.Background(), store.Where(store.FieldTime, store.Ge, f.Now-60e6)); err != nil || len(rs) != 5000 {
						b.Fatal(len(rs), err)
					}
				}},
			} {
				b.Run(q.name, func(b *testing.B) { benchAsk(b, q.ask) })
			}
		})
	}
}

// BenchmarkForeign stores samples of one series with foreign ids, a thousand a
// batch, all with the same time or each a ms before the last, and prints the CPU time
// a sample, encoding included: what it costs to tell whether each is new.
func BenchmarkForeign(b *testing.B) {
	for name, step := range map[string]int64{"one time": 0, "each before the last": 1000} {
		for _, n := range []int{10_000, 40_000} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				for b.Loop() {
					benchForeign(b, n, step)
				}
			})
		}
	}
}

func benchForeign(b *testing.B, n int, step int64) {
	s, err := Open(b.TempDir(), Options{MinFree: 1, Retention: -1})
	if err != nil {
		b.Fatal(err)
	}
	defer closeStore(b, s)
	before, _ := cpuTime(b)
	for first := 0; first < n; first += 1000 {
		batch := &sample.Batch{
			ID: sample.DeriveBatchID(sample.NewBatchID(time.UnixMicro(fleet.Start)), fmt.Sprint(first)), Node: "http", Base: fleet.Start,
			Meters: []sample.MeterRef{{Name: "requests", Kind: sample.Delta, Unit: "request"}},
		}
		column := sample.Column{Tag: sample.U64, Bitmap: bytes.Repeat([]byte{0xff}, 1000/8)}
		for i := first; i < first+1000; i++ {
			batch.Rows = append(batch.Rows, sample.Row{Resource: "balancer", Offset: int64(n-i) * step})
			column.Values = append(column.Values, uint64(i))
			batch.IDs = append(batch.IDs, fmt.Sprint("request-", i))
		}
		batch.Columns = []sample.Column{column}
		if st, err := s.Append(context.Background(), []store.Received{received(b, batch)}); err != nil || st[0].Refused != nil {
			b.Fatal(st, err)
		}
	}
	settle(b, s)
	after, _ := cpuTime(b)
	b.ReportMetric(float64((after-before).Nanoseconds())/float64(n), "cpu-ns/sample")
}
