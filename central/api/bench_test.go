package api_test

import (
	"context"
	"fmt"
	"net/http"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// canned is a store that answers at once, so that a benchmark measures the
// API.
type canned struct {
	store.Store
	samples []store.Sample
	rows    []store.Statistics
}

func (c canned) Samples(_ context.Context, _ store.Filter, yield func(store.Sample) bool) error {
	for _, s := range c.samples {
		if !yield(s) {
			break
		}
	}
	return nil
}

func (c canned) Statistics(context.Context, store.StatisticsQuery) ([]store.Statistics, error) {
	return c.rows, nil
}

// sink is a response that nobody reads.
type sink struct {
	header http.Header
	status int
	bytes  int64
}

func (s *sink) Header() http.Header { return s.header }

func (s *sink) WriteHeader(status int) { s.status = status }

func (s *sink) Write(b []byte) (int, error) {
	s.bytes += int64(len(b))
	return len(b), nil
}

func benchmark(b *testing.B, c canned, path string, entries int) {
	b.Helper()
	h := api.New(c, api.Options{})
	r, err := http.NewRequest(http.MethodGet, "http://api.example"+path, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	var w *sink
	for b.Loop() {
		w = &sink{header: http.Header{}}
		h.ServeHTTP(w, r)
	}
	if w.status > http.StatusOK {
		b.Fatalf("status %d", w.status)
	}
	b.SetBytes(w.bytes)
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(entries), "ns/entry")
}

// BenchmarkSampleList prints the newest 100 samples of 10 domains.
func BenchmarkSampleList(b *testing.B) {
	var c canned
	for i := range 100 {
		s := gauge("", fmt.Sprintf("5e1f7a3c-0d49-4c4e-8ad1-%012d", i%10), int64(i)*second, 0)
		s.ID = sample.NewBatchID(recordedAt).Sample(i)
		s.Volume = sample.Uint(549_630_000_000 + uint64(i))
		s.Metadata = fmt.Appendf(nil, `{"display_name":"web%d","name":"instance-%08x","flavor":{"name":"m1.small","vcpus":2,"ram":2048},"image":{"id":"0a4d6c52-8f0e-4d8c-9a67-d5b1f7a0d8e2"},"host":"compute-1","status":"active"}`, i%10, i%10)
		c.samples = append(c.samples, store.Sample{Sample: s, Recorded: s.Time + second})
	}
	benchmark(b, c, "/v2/samples", 100)
}

// BenchmarkStatistics prints a day in minutes.
func BenchmarkStatistics(b *testing.B) {
	var c canned
	for i := range int64(1440) {
		c.rows = append(c.rows, store.Statistics{
			Unit: "%", Count: 60, Min: sample.Float(float64(i) / 3), Max: sample.Float(float64(i) / 2), Sum: float64(i) * 25.1,
			SumSquares: 31, First: at + i*60*second, Last: at + i*60*second + 59*second, Bucket: i, Start: at,
		})
	}
	benchmark(b, c, "/v2/meters/cpu_util/statistics?period=60", 1440)
}
