package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeBus keeps what is published.
type fakeBus struct {
	mu   sync.Mutex
	down bool
	ms   []bus.Message
	got  chan struct{} // receives at every Publish
}

func newBus() *fakeBus { return &fakeBus{got: make(chan struct{}, 1)} }

func (f *fakeBus) Publish(_ context.Context, ms ...bus.Message) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case f.got <- struct{}{}:
	default:
	}
	if f.down {
		return errors.New("no broker")
	}
	f.ms = append(f.ms, ms...)
	return nil
}

func (f *fakeBus) set(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

// batches returns what arrived, opened and verified.
func (f *fakeBus) batches(t testing.TB, secret []byte) []*sample.Batch {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	dec, err := sample.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	o := bus.Opener{Keys: sample.Keys{"node": secret}, AllowUnsigned: secret == nil, Decoder: dec}
	var all []*sample.Batch
	for i := range f.ms {
		b, err := o.Open(&f.ms[i])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func testConfig() Config {
	cfg := DefaultConfig()
	cfg.Node, cfg.Libvirt, cfg.Spread, cfg.Socket = "node", nil, false, ""
	cfg.ShutdownTimeout = time.Second
	return cfg
}

func newTestDelivery(t *testing.T, pub bus.Publisher, bound int64, secret []byte) *delivery {
	t.Helper()
	m, err := newMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig()
	cfg.QueueBytes = bound
	d, err := newDelivery(zaptest.NewLogger(t), m, pub, &cfg, secret, 0)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// value returns what a self-metric says.
func value(t testing.TB, m prometheus.Metric) float64 {
	t.Helper()
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		t.Fatal(err)
	}
	return out.GetCounter().GetValue() + out.GetGauge().GetValue()
}

// addBatch adds a batch of one sample whose volume is n, at n seconds.
func addBatch(d *delivery, n int64) {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r", Source: "openstack"})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(uint64(n)))
	d.add(b, n*1e6, (n-1)*1e6)
}

// deliver runs d until everything that is queued is confirmed.
func deliver(t *testing.T, d *delivery) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { d.run(ctx) })
	fctx, stop := context.WithTimeout(ctx, 10*time.Second)
	if left := d.flush(fctx); left != 0 {
		t.Errorf("%d batches were not delivered", left)
	}
	stop()
	cancel()
	wg.Wait()
}

func TestDelivery(t *testing.T) {
	secret := []byte("0123456789abcdef")
	pub := newBus()
	d := newTestDelivery(t, pub, 1<<20, secret)
	for n := range int64(200) {
		addBatch(d, n+1)
	}
	deliver(t, d)
	got := pub.batches(t, secret)
	if len(got) != 200 {
		t.Fatalf("%d batches arrived, want 200", len(got))
	}
	for i, b := range got {
		if b.Seq != uint64(i+1) || b.Epoch != d.epoch || b.Base != int64(i+1)*1e6 || b.Columns[0].Values[0] != uint64(i+1) {
			t.Fatalf("batch %d is %+v", i, b)
		}
	}
	if pub.ms[0].RoutingKey != bus.SamplesKey("node", 1) {
		t.Errorf("routing key %q", pub.ms[0].RoutingKey)
	}
}

func TestAFullQueueDropsTheOldestAndSaysSo(t *testing.T) {
	pub := newBus()
	d := newTestDelivery(t, pub, 1<<20, nil)
	addBatch(d, 1)
	size := d.bytes
	d.bound = 10*size + size/2 // gaps make some batches a little larger
	d.addGap(sample.Gap{Meter: "*", Resource: "lost", From: 1, To: 2, Reason: "kept although its batch is dropped"})
	for n := int64(2); n <= 100; n++ {
		addBatch(d, n)
	}
	if d.bytes > d.bound {
		t.Errorf("%d bytes are queued, the bound is %d", d.bytes, d.bound)
	}
	addBatch(d, 101)
	d.bound = 1 << 20
	deliver(t, d)
	got := pub.batches(t, nil)
	var seqs []uint64
	var gaps []sample.Gap
	for _, b := range got {
		if b.Len() > 0 { // the last has gaps only
			seqs = append(seqs, b.Seq)
		}
		gaps = append(gaps, b.Gaps...)
	}
	if !slices.IsSorted(seqs) || seqs[len(seqs)-1] != 101 {
		t.Errorf("sequence numbers %v: want a rising end of 1 to 101", seqs)
	}
	first := int64(seqs[0])
	if first == 1 {
		t.Fatal("nothing was dropped")
	}
	// All that was dropped is told of by what arrived, each batch once.
	dropped := 0
	var from, to int64 = 1 << 62, 0
	for _, g := range gaps {
		if g.Resource == "lost" {
			continue
		}
		n := 0
		if _, err := fmt.Sscan(g.Reason, &n); err != nil {
			t.Fatalf("gap %+v", g)
		}
		dropped += n
		from, to = min(from, g.From), max(to, g.To)
	}
	if missing := 101 - len(seqs); dropped != missing {
		t.Errorf("gaps tell of %d batches, %d are missing", dropped, missing)
	}
	if from != 0 || to < (first-1)*1e6 {
		t.Errorf("gaps reach from %d to %d µs, want from 0 to at least %d", from, to, (first-1)*1e6)
	}
	if !slices.ContainsFunc(gaps, func(g sample.Gap) bool { return g.Resource == "lost" }) {
		t.Error("the gap of a dropped batch was lost with it")
	}
	if n := value(t, d.metrics.dropped.WithLabelValues("cpu")); int(n) != dropped {
		t.Errorf("the counter of dropped samples says %v, want %d", n, dropped)
	}
}

func TestDeliveryGoesOnAfterTheBusComesBack(t *testing.T) {
	pub := newBus()
	pub.set(true)
	d := newTestDelivery(t, pub, 1<<20, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { d.run(ctx) })
	addBatch(d, 1)
	<-pub.got // refused
	addBatch(d, 2)
	pub.set(false)
	fctx, stop := context.WithTimeout(ctx, 10*time.Second)
	if left := d.flush(fctx); left != 0 {
		t.Errorf("%d batches left", left)
	}
	stop()
	cancel()
	wg.Wait()
	var seqs []uint64
	for _, b := range pub.batches(t, nil) {
		seqs = append(seqs, b.Seq)
	}
	if diff := cmp.Diff([]uint64{1, 2}, seqs); diff != "" {
		t.Errorf("sequence numbers (-want +got):\n%s", diff)
	}
}

func TestFlushSaysWhatIsLeft(t *testing.T) {
	pub := newBus()
	pub.set(true)
	d := newTestDelivery(t, pub, 1<<20, nil)
	addBatch(d, 1)
	addBatch(d, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { d.run(ctx) })
	if left := d.flush(ctx); left != 2 {
		t.Errorf("%d batches left, want 2", left)
	}
	wg.Wait()
}

func TestAGapIsDeliveredWithoutSamples(t *testing.T) {
	pub := newBus()
	d := newTestDelivery(t, pub, 1<<20, nil)
	want := sample.Gap{Meter: "cpu", Resource: "r", From: 1, To: 2, Reason: "why"}
	d.addGap(want)
	d.add(sample.NewBuilder(), 5, 4)
	d.add(sample.NewBuilder(), 6, 5) // nothing to say: no batch
	deliver(t, d)
	got := pub.batches(t, nil)
	if len(got) != 1 || len(got[0].Gaps) != 1 || got[0].Gaps[0] != want {
		t.Errorf("got %+v", got)
	}
}

func TestGapsThatWaitAreBounded(t *testing.T) {
	d := newTestDelivery(t, newBus(), 1<<20, nil)
	for i := range int64(3 * maxGaps) {
		d.addGap(sample.Gap{Meter: "*", Resource: "r", From: 100 + i, To: 101 + i, Reason: "why"})
	}
	if len(d.gaps) > maxGaps {
		t.Errorf("%d gaps wait, the bound is %d", len(d.gaps), maxGaps)
	}
	var from, to int64 = 1 << 62, 0
	for _, g := range d.gaps {
		from, to = min(from, g.From), max(to, g.To)
	}
	if from != 100 || to != 100+3*maxGaps {
		t.Errorf("gaps reach from %d to %d, want 100 to %d", from, to, 100+3*maxGaps)
	}
	if !strings.Contains(d.gaps[0].Reason, "why") {
		t.Errorf("reason %q", d.gaps[0].Reason)
	}
}

func TestSpreadDelaysTheSending(t *testing.T) {
	d := newTestDelivery(t, newBus(), 1<<20, nil)
	d.delay = time.Hour
	addBatch(d, 1)
	ms, wait := d.due(time.Now())
	if ms != nil || wait < 59*time.Minute {
		t.Errorf("%d messages are due, or in %s; want in an hour", len(ms), wait)
	}
	if ms, _ := d.due(time.Now().Add(time.Hour)); len(ms) != 1 {
		t.Errorf("%d messages are due after the delay, want 1", len(ms))
	}
}

func TestAReaderThatTakesOverAddsOnlyItsOwnCount(t *testing.T) {
	m, err := newMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	m.countReader("walk", bpf.Stats{Retries: 10})
	m.countReader("cpuclock", bpf.Stats{Retries: 2})
	m.countReader("walk", bpf.Stats{Retries: 11})
	if n := value(t, m.retries); n != 13 {
		t.Errorf("%v retries, want 13", n)
	}
}
