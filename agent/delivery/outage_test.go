package delivery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/diskqueue/crashfs"
	"github.com/kvmeter/kvmeter/sample"
)

// host makes batches like those of a host: each domain has counters of the
// process, of each of two disks and of a NIC, which move as those of guests do.
type host struct {
	rand     *rand.Rand
	rows     []sample.Row
	meters   [][]sample.MeterRef // by row
	counters [][]uint64
	builder  *sample.Builder
}

func newHost(domains int) *host {
	h := &host{rand: rand.New(rand.NewPCG(1, 1)), builder: sample.NewBuilder()}
	byResource := map[string][]sample.MeterRef{}
	for _, m := range sample.Catalogue {
		if m.Kind == sample.Cumulative && len(byResource[m.Resource]) < 8 {
			byResource[m.Resource] = append(byResource[m.Resource], m.MeterRef)
		}
	}
	add := func(id, kind string) {
		h.rows = append(h.rows, sample.Row{
			Resource: id, Source: "openstack", Incarnation: sample.IncarnationOf(id),
			Project: "8f3c6a9e5b7d4f0c8e2a1b3c4d5e6f70", User: "0a1b2c3d4e5f60718293a4b5c6d7e8f9",
			Metadata: fmt.Appendf(nil, `{"display_name":"%s","flavor":{"name":"m1.small","vcpus":2,"ram":2048},"host":"compute-1","status":"active"}`, id),
		})
		h.meters = append(h.meters, byResource[kind])
		h.counters = append(h.counters, make([]uint64, len(byResource[kind])))
	}
	for n := range domains {
		id := fmt.Sprintf("5e1f0000-0000-4000-8000-%012x", n)
		add(id, "domain")
		add(id+"-vda", "disk")
		add(id+"-vdb", "disk")
		add(id+"-tap0", "nic")
	}
	return h
}

// poll adds a batch, and returns how many samples it has.
func (h *host) poll(d *Delivery, at time.Time, interval time.Duration) int {
	for i := range h.rows {
		h.builder.Row(h.rows[i])
		for m, ref := range h.meters[i] {
			h.counters[i][m] += h.rand.Uint64N(1 << 30)
			h.builder.Add(ref, sample.Walk, sample.Uint(h.counters[i][m]))
		}
	}
	n := h.builder.Len()
	d.Add(h.builder, at.UnixMicro(), at.Add(-interval).UnixMicro())
	return n
}

// slowBus takes a time for each message, and can be away.
type slowBus struct {
	mu    sync.Mutex
	away  bool
	late  time.Duration // the longest between making and confirming a new batch
	fresh time.Time     // batches made since are new
	n     int
	each  time.Duration
}

func (s *slowBus) Publish(ctx context.Context, ms ...bus.Message) error {
	s.mu.Lock()
	away := s.away
	s.mu.Unlock()
	if away {
		<-ctx.Done()
		return errors.New("not confirmed")
	}
	time.Sleep(time.Duration(len(ms)) * s.each)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n += len(ms)
	for i := range ms {
		if !ms[i].Time.Before(s.fresh) {
			s.late = max(s.late, time.Since(ms[i].Time))
		}
	}
	return nil
}

// TestADayOfOutage has the bus away for 24 hours, with 50 domains polled each
// 10 s: it fits into the spool, and is sent at 20 times the rate of new samples
// afterwards, none of which is late by an interval.
func TestADayOfOutage(t *testing.T) {
	outage, domains := 24*time.Hour, 50
	if testing.Short() {
		outage, domains = 2*time.Hour, 5
	}
	synctest.Test(t, func(t *testing.T) {
		m, err := NewMetrics(prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		const interval = 10 * time.Second
		pub := &slowBus{each: 20 * time.Millisecond, away: true} // 50 messages/s: ten times slower than RabbitMQ with a quorum of one
		o := Options{Log: zap.NewNop(), Metrics: m, Publisher: pub, Node: "node", Partitions: 1, QueueBytes: 64 << 20, Interval: interval, Spool: DefaultSpool(), FS: crashfs.New()}
		o.Spool.Path = "/spool"
		d, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { d.Run(ctx) })
		h := newHost(domains)
		made, samples := 0, 0
		tick := func() {
			samples += h.poll(d, time.Now(), interval)
			made++
			time.Sleep(interval)
			synctest.Wait()
		}
		for begin := time.Now(); time.Since(begin) < outage; {
			tick()
		}
		size := value(t, m.spoolBytes)
		if value(t, m.dropped.WithLabelValues("cpu")) > 0 || size > 256<<20 {
			t.Errorf("it does not fit: %v bytes", size)
		}
		spooled := made
		pub.mu.Lock()
		pub.away, pub.fresh = false, time.Now().Add(publishTimeout) // what is being sent now will have waited for its timeout
		pub.mu.Unlock()
		back := time.Now()
		for value(t, m.spoolBatches) > 1 && time.Since(back) < outage {
			tick()
		}
		took := time.Since(back)
		t.Logf("%d batches with %d samples of %s in %.1f MB (%.2f B a sample); sent within %s, %.1f times the rate of new ones, which were confirmed within %s",
			spooled, samples*spooled/made, outage, size/1e6, size/float64(samples*spooled/made), took.Round(time.Second), float64(outage)/float64(took), pub.late)
		if rate := float64(outage) / float64(took); rate < 15 || rate > 25 {
			t.Errorf("it is sent at %.1f times the rate of new samples, want 20", rate)
		}
		if pub.late > interval {
			t.Errorf("a new batch was late by %s", pub.late)
		}
		if left := d.Flush(ctx); left > 0 {
			t.Errorf("%d batches left", left)
		}
		cancel()
		wg.Wait()
		if pub.n < made {
			t.Errorf("%d of %d batches arrived", pub.n, made)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestABusThatComesBackIsUsedAtOnce has a bus that answers nothing for ten minutes:
// once it does, what was made since the attempt that failed waits for no pause.
func TestABusThatComesBackIsUsedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, err := NewMetrics(prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		pub := &slowBus{away: true}
		d, err := New(Options{Log: zap.NewNop(), Metrics: m, Publisher: pub, Node: "node", Partitions: 1, QueueBytes: 1 << 20, Interval: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { d.Run(ctx) })
		addBatch(d, time.Now())
		time.Sleep(20*publishTimeout - time.Millisecond)
		pub.mu.Lock()
		pub.away = false
		pub.mu.Unlock()
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if pub.n != 1 {
			t.Errorf("%d batches arrived when an attempt had just ended, want 1", pub.n)
		}
		cancel()
		wg.Wait()
	})
}

// cpu returns the CPU time of the process.
func cpu(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchSpool opens a spool on the disk.
func benchSpool(b *testing.B) (*Delivery, *Metrics) {
	m, err := NewMetrics(prometheus.NewRegistry())
	if err != nil {
		b.Fatal(err)
	}
	o := Options{Log: zap.NewNop(), Metrics: m, Node: "node", Partitions: 1, Keys: sample.Keys{"node": []byte("0123456789abcdef")}, QueueBytes: 64 << 20, Interval: 10 * time.Second, Spool: DefaultSpool()}
	o.Spool.Path, o.Spool.MaxBytes, o.Spool.Drain = b.TempDir(), 1<<40, 1e9
	d, err := New(o)
	if err != nil {
		b.Fatal(err)
	}
	return d, m
}

// BenchmarkSpool is the way of a batch of 50 domains: encoded, signed, synced to
// the disk, read by who sends it, confirmed.
func BenchmarkSpool(b *testing.B) {
	d, _ := benchSpool(b)
	h := newHost(50)
	samples, size := 0, int64(0)
	before := cpu(b)
	b.ReportAllocs()
	for b.Loop() {
		samples += h.poll(d, time.Now(), 10*time.Second)
		d.Spool(d.now())
		g, _ := d.Live(d.now())
		size += int64(g.bytes)
		d.Settle(g, true)
	}
	used := cpu(b) - before
	b.ReportMetric(float64(used.Nanoseconds())/float64(samples), "cpu-ns/sample")
	b.ReportMetric(float64(size)/float64(samples), "B/sample")
	b.ReportMetric(float64(samples)/float64(b.N), "samples/op")
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkSpoolReplay sends a spool of 10 million samples after a restart: open,
// read, sign, confirm.
func BenchmarkSpoolReplay(b *testing.B) {
	const total = 10_000_000
	for b.Loop() {
		b.StopTimer()
		d, m := benchSpool(b)
		h := newHost(50)
		samples := 0
		for samples < total {
			samples += h.poll(d, time.Now(), 10*time.Second)
			if samples%100 == 0 || d.bytes > 32<<20 {
				d.Spool(d.now())
				for g, _ := d.Live(d.now()); g != nil; g, _ = d.Live(d.now()) {
					d.Settle(g, false)
				}
			}
		}
		d.Spool(d.now())
		for g, _ := d.Live(d.now()); g != nil; g, _ = d.Live(d.now()) {
			d.Settle(g, false)
		}
		if err := d.Close(); err != nil {
			b.Fatal(err)
		}
		size := 0.0
		before := cpu(b)
		b.StartTimer()
		o := d.o
		o.FS = diskqueue.OS{}
		d, err := New(o)
		if err != nil {
			b.Fatal(err)
		}
		size = max(size, value(b, m.spoolBytes))
		d.credit = 1 << 60
		for {
			g, _ := d.Backlog(d.now())
			if g == nil {
				break
			}
			d.Settle(g, true)
			d.Spool(d.now())
		}
		b.ReportMetric((cpu(b) - before).Seconds(), "cpu-s/10M-samples")
		b.ReportMetric(size/float64(samples), "B/sample")
		if left := value(b, m.spoolBatches); left > 0 {
			b.Fatalf("%v batches left", left)
		}
		if err := d.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
