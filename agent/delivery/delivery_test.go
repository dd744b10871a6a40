package delivery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/diskqueue/crashfs"
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
	return decode(t, secret, f.ms)
}

func decode(t testing.TB, secret []byte, ms []bus.Message) []*sample.Batch {
	t.Helper()
	dec, err := sample.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	o := bus.Opener{Keys: sample.Keys{"node": secret}, AllowUnsigned: secret == nil, Decoder: dec}
	var all []*sample.Batch
	for i := range ms {
		b, err := o.Open(&ms[i])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func seqs(batches []*sample.Batch) (seqs []uint64) {
	for _, b := range batches {
		if b.Len() > 0 { // others have gaps only
			seqs = append(seqs, b.Seq)
		}
	}
	return seqs
}

// world is a delivery with a disk that can be broken and a clock.
type world struct {
	t       testing.TB
	o       Options
	fs      *crashfs.FS
	at      time.Time
	d       *Delivery
	metrics *Metrics
	last    int64 // time of the last batch
}

func newWorld(t testing.TB, change func(*Options)) *world {
	w := &world{t: t, fs: crashfs.New(), at: time.Unix(1_800_000_000, 0)}
	w.o = Options{
		Log: zaptest.NewLogger(t), Node: "node", Partitions: 1, Keys: sample.Keys{}, QueueBytes: 1 << 20, Interval: 10 * time.Second,
		Spool: DefaultSpool(), Wall: func() time.Time { return w.at }, Now: func() time.Time { return w.at },
	}
	w.o.Spool.Path = "/spool"
	if change != nil {
		change(&w.o)
	}
	w.start()
	return w
}

// start starts a delivery over what the disk holds.
func (w *world) start() {
	w.t.Helper()
	var err error
	if w.metrics, err = NewMetrics(prometheus.NewRegistry()); err != nil {
		w.t.Fatal(err)
	}
	w.o.Metrics, w.o.FS = w.metrics, w.fs
	if w.d, err = New(w.o); err != nil {
		w.t.Fatal(err)
	}
}

// kill starts it anew as after a SIGKILL.
func (w *world) kill() {
	w.t.Helper()
	w.start()
}

func (w *world) stop() {
	w.t.Helper()
	if err := w.d.Close(); err != nil {
		w.t.Error(err)
	}
}

// pass lets time go by, with the disk's work done.
func (w *world) pass(d time.Duration) {
	w.d.Spool(w.d.now())
	w.at = w.at.Add(d)
	w.d.Spool(w.d.now())
}

// add makes n batches of one sample, an interval apart.
func (w *world) add(n int) {
	for range n {
		addBatch(w.d, w.at)
		w.pass(w.o.Interval)
	}
}

func addBatch(d *Delivery, at time.Time) {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r", Source: "openstack"})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(uint64(at.UnixMicro())))
	d.Add(b, at.UnixMicro(), at.Add(-10*time.Second).UnixMicro())
}

// try publishes what is due, new or not, once, and returns it.
func (w *world) try(next func(time.Time) (*Group, time.Duration), confirmed bool) []*sample.Batch {
	w.t.Helper()
	g, _ := next(w.d.now())
	if g == nil {
		return nil
	}
	w.d.Settle(g, confirmed)
	w.d.Spool(w.d.now())
	return decode(w.t, w.o.Keys.Secret("node"), g.Messages)
}

func (w *world) spooled() int {
	w.d.mu.Lock()
	q := w.d.spool.queue
	w.d.mu.Unlock()
	return q.Stats().Records
}

func gapsOf(batches []*sample.Batch) (gaps []sample.Gap) {
	for _, b := range batches {
		gaps = append(gaps, b.Gaps...)
	}
	return gaps
}

func TestABatchIsOnDiskBeforeItIsSentAndGoneOnceConfirmed(t *testing.T) {
	w := newWorld(t, nil)
	addBatch(w.d, w.at)
	if g, wait := w.d.Live(w.d.now()); g != nil || wait != patience {
		t.Errorf("it is sent before it is on disk; else in %s", wait)
	}
	w.d.Spool(w.d.now())
	if n := w.spooled(); n != 1 {
		t.Errorf("%d batches on disk, want 1", n)
	}
	if got := seqs(w.try(w.d.Live, true)); !slices.Equal(got, []uint64{1}) {
		t.Errorf("sent %v", got)
	}
	if n := w.spooled(); n != 0 {
		t.Errorf("%d batches on disk, want none", n)
	}
	w.stop()
}

func TestADiskThatDoesNotAnswerDelaysABatchByItsPatience(t *testing.T) {
	w := newWorld(t, nil)
	addBatch(w.d, w.at)
	w.at = w.at.Add(patience)
	g, _ := w.d.Live(w.d.now())
	if g == nil || len(g.Messages) != 1 {
		t.Fatal("it is not sent")
	}
	w.d.Settle(g, true)
	w.d.Spool(w.d.now()) // the disk answers after all
	w.d.Spool(w.d.now())
	if n := w.spooled(); n != 0 {
		t.Errorf("%d batches on disk, want none", n)
	}
	w.stop()
}

func TestWhatWasNotConfirmedIsSentAfterAKillWithItsNumbers(t *testing.T) {
	w := newWorld(t, nil)
	w.add(3)
	epoch := w.d.numbers.epoch
	w.try(w.d.Live, false)
	w.kill()
	addBatch(w.d, w.at)
	w.d.Spool(w.d.now())
	fresh := w.try(w.d.Live, true)
	if n := seqs(fresh); len(n) != 1 || n[0] <= 3 || fresh[0].Epoch != epoch {
		t.Errorf("the first batch of the new life is %v of epoch %x, want more than 3 of %x", n, fresh[0].Epoch, epoch)
	}
	if gaps := gapsOf(fresh); len(gaps) != 1 || gaps[0].Meter != "*" || gaps[0].From != w.at.Add(-10*time.Second).UnixMicro() || gaps[0].To != w.at.UnixMicro() {
		t.Errorf("gaps %+v, want one since the last batch on disk", gaps)
	}
	w.pass(drainEvery)
	old := w.try(w.d.Backlog, true)
	if n := seqs(old); !slices.Equal(n, []uint64{1, 2, 3}) || old[0].Epoch != epoch {
		t.Errorf("sent %v", n)
	}
	w.stop()
}

func TestACleanRestartWithinTheIntervalIsNoGap(t *testing.T) {
	w := newWorld(t, nil)
	w.add(1)
	w.try(w.d.Live, true)
	w.stop()
	w.at = w.at.Add(5 * time.Second)
	w.start()
	w.add(1)
	got := w.try(w.d.Live, true)
	if n, gaps := seqs(got), gapsOf(got); !slices.Equal(n, []uint64{2}) || len(gaps) != 0 {
		t.Errorf("sent %v with gaps %+v, want 2 and none", n, gaps)
	}
	w.stop()
	w.at = w.at.Add(time.Hour)
	w.start()
	w.add(1)
	if gaps := gapsOf(w.try(w.d.Live, true)); len(gaps) != 1 || gaps[0].To-gaps[0].From != time.Hour.Microseconds() {
		t.Errorf("after an hour the gaps are %+v, want one of it", gaps)
	}
	w.stop()
}

func TestNumbersAreNeverGivenTwice(t *testing.T) {
	w := newWorld(t, nil)
	given := map[[2]uint64]bool{}
	for range 3 {
		for range block + 7 {
			w.d.mu.Lock()
			e, s := w.d.numbers.take()
			w.d.mu.Unlock()
			if given[[2]uint64{e, s}] {
				t.Fatalf("epoch %x gives %d twice", e, s)
			}
			given[[2]uint64{e, s}] = true
			if s%100 == 0 {
				w.d.Spool(w.d.now())
			}
		}
		w.kill()
	}
	epochs := map[uint64]bool{}
	for id := range given {
		epochs[id[0]] = true
	}
	if len(epochs) != 1 {
		t.Errorf("%d epochs while the disk held, want 1", len(epochs))
	}
	w.fs.Fail(func(crashfs.Op, string) error { return errors.New("read-only file system") })
	for range block + 7 {
		w.d.mu.Lock()
		e, s := w.d.numbers.take()
		w.d.mu.Unlock()
		if given[[2]uint64{e, s}] {
			t.Fatalf("epoch %x gives %d twice", e, s)
		}
		given[[2]uint64{e, s}] = true
		w.d.Spool(w.d.now())
	}
	w.fs.Fail(nil)
	w.stop()
}

func TestTheOrderOfWhatWaitsIsASetting(t *testing.T) {
	for order, want := range map[string][]uint64{"oldest": {1, 2, 3}, "newest": {3, 2, 1}} {
		t.Run(order, func(t *testing.T) {
			w := newWorld(t, func(o *Options) { o.Spool.Order = order })
			w.add(3)
			w.try(w.d.Live, false)
			var got []uint64
			for range 3 {
				w.pass(drainEvery)
				got = append(got, seqs(w.try(w.d.Backlog, true))...)
			}
			if diff := gocmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			w.stop()
		})
	}
}

// TestWhatWaitsIsSentAtABoundedRate beside new batches, which never wait for it.
func TestWhatWaitsIsSentAtABoundedRate(t *testing.T) {
	const outage, drain = 400, 20
	w := newWorld(t, func(o *Options) { o.Spool.Drain = drain; o.QueueBytes = 1 << 30 })
	for range outage {
		addBatch(w.d, w.at)
		w.pass(w.o.Interval)
		w.try(w.d.Live, false)
	}
	ticks, sent := 0, 0
	for ; w.spooled() > 0; ticks++ {
		addBatch(w.d, w.at)
		w.d.Spool(w.d.now())
		if fresh := w.try(w.d.Live, true); len(fresh) != 1 || fresh[0].Base != w.at.UnixMicro() {
			t.Fatalf("tick %d: %d new batches are sent, want the one", ticks, len(fresh))
		}
		of := 0
		for {
			got := w.try(w.d.Backlog, true)
			if got == nil {
				break
			}
			of += len(got)
		}
		if sent += of; of > 2*drain+1 {
			t.Fatalf("tick %d: %d batches of the spool are sent, want at most %d and one to begin with", ticks, of, 2*drain)
		}
		w.pass(w.o.Interval)
	}
	if sent != outage {
		t.Errorf("%d batches of the spool are sent, want %d", sent, outage)
	}
	if rate := float64(outage) / float64(ticks); rate < 0.9*drain || rate > 1.1*drain+1 {
		t.Errorf("it took %d ticks, which is %.1f times the new batches, want %d", ticks, rate, drain)
	}
	w.stop()
}

func TestWhatTheSpoolHasNoRoomForIsAGapOfEachMeter(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Options)
		batch  int // bytes of metadata, which make it large
		n      int
		reason string
	}{
		"too large": {func(o *Options) { o.Spool.MaxBytes = 1 << 20 }, 20 << 10, 100, lostFull},
		"too old":   {func(o *Options) { o.Spool.MaxAge = time.Hour }, 20 << 10, 500, lostOld},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, tc.change)
			r := rand.New(rand.NewPCG(1, 1))
			noise := make([]byte, tc.batch)
			begin := w.at
			for range tc.n {
				for i := range noise {
					noise[i] = "abcdefghijklmnopqrstuvwxyz234567"[r.IntN(32)]
				}
				b := sample.NewBuilder()
				b.Row(sample.Row{Resource: "r", Metadata: fmt.Appendf(nil, `{"x":"%s"}`, noise)})
				b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1))
				b.Add(sample.NetInBytes.MeterRef, sample.RTNL, sample.Uint(1))
				w.d.Add(b, w.at.UnixMicro(), w.at.Add(-w.o.Interval).UnixMicro())
				w.pass(w.o.Interval)
				w.try(w.d.Live, false)
				if bytes := value(t, w.metrics.spoolBytes); int64(bytes) > w.o.Spool.MaxBytes {
					t.Fatalf("the spool has %v bytes, its bound is %d", bytes, w.o.Spool.MaxBytes)
				}
			}
			w.last = w.at.Add(-w.o.Interval).UnixMicro()
			w.kill() // what was dropped stays told of
			w.d.Take()
			var got []*sample.Batch
			for w.spooled() > 0 {
				w.pass(drainEvery)
				got = append(got, w.try(w.d.Backlog, true)...)
			}
			have := seqs(got)
			if len(have) == tc.n {
				t.Fatal("nothing was dropped")
			}
			var oldest int64 = 1 << 62
			for _, b := range got {
				if b.Len() > 0 {
					oldest = min(oldest, b.Base)
				}
			}
			covered, lost := map[string]int64{}, map[string]int{}
			gaps := gapsOf(got)
			slices.SortFunc(gaps, func(a, b sample.Gap) int { return cmp.Compare(a.From, b.From) })
			for _, g := range gaps {
				if g.Meter == "*" && g.From == w.last { // of the kill
					continue
				}
				n := 0
				if _, err := fmt.Sscan(g.Reason, &n); err != nil || !strings.HasSuffix(g.Reason, tc.reason) {
					t.Errorf("reason %q", g.Reason)
				}
				lost[g.Meter] += n
				if from := max(begin.Add(-w.o.Interval).UnixMicro(), covered[g.Meter]); g.From != from {
					t.Errorf("%s: a gap begins at %d, want %d", g.Meter, g.From, from)
				}
				covered[g.Meter] = g.To
			}
			for _, m := range []string{"cpu", "network.incoming.bytes"} {
				if want := oldest - w.o.Interval.Microseconds(); covered[m] != want {
					t.Errorf("%s: gaps reach to %d, want %d", m, covered[m], want)
				}
				if want := tc.n - len(have); lost[m] != want {
					t.Errorf("%s: gaps tell of %d samples, want %d", m, lost[m], want)
				}
			}
			w.stop()
		})
	}
}

func TestWhereTheDiskFailsBatchesWaitInMemory(t *testing.T) {
	w := newWorld(t, nil)
	w.add(1)
	w.try(w.d.Live, false)
	w.fs.Fail(func(op crashfs.Op, _ string) error {
		if op == crashfs.Open {
			return nil
		}
		return errors.New("no space left on device")
	})
	w.add(2)
	if note := w.d.Note(); !strings.Contains(note, "no space left on device") {
		t.Errorf("the note is %q", note)
	}
	if v := value(t, w.metrics.spoolWrites); v != 0 {
		t.Errorf("spool_writable is %v", v)
	}
	w.try(w.d.Live, false)
	if got := seqs(w.try(w.d.Live, true)); !slices.Equal(got, []uint64{2, 3}) {
		t.Errorf("from memory %v, want 2 and 3", got)
	}
	w.add(1)
	w.fs.Fail(nil)
	w.pass(retryDisk)
	if note := w.d.Note(); note != "" {
		t.Errorf("the note is %q, want none", note)
	}
	if n := w.spooled(); n != 2 {
		t.Errorf("%d batches on disk, want the first and the last", n)
	}
	w.pass(time.Second)
	if got := seqs(w.try(w.d.Backlog, true)); !slices.Equal(got, []uint64{1}) {
		t.Errorf("from the spool %v, want 1", got)
	}
	w.stop()
}

func TestASpoolThatCannotBeOpenedIsOpenedLater(t *testing.T) {
	w := newWorld(t, nil)
	w.add(2)
	w.try(w.d.Live, false)
	w.fs = w.fs.Crash(100, rand.New(rand.NewPCG(1, 1)))
	w.fs.Fail(func(crashfs.Op, string) error { return errors.New("input/output error") })
	w.start()
	first := w.d.numbers.epoch
	w.add(1)
	if got := w.try(w.d.Live, true); len(got) != 1 || got[0].Epoch != first {
		t.Errorf("from memory %d batches", len(got))
	}
	w.fs.Fail(nil)
	w.pass(retryDisk)
	w.add(1)
	if got := w.try(w.d.Live, true); len(got) != 1 || got[0].Epoch == first {
		t.Errorf("got %d batches, want one of the epoch on disk", len(got))
	}
	w.pass(time.Second)
	if got := seqs(w.try(w.d.Backlog, true)); !slices.Equal(got, []uint64{1, 2}) {
		t.Errorf("from the spool %v, want 1 and 2", got)
	}
	w.stop()
}

func TestADamagedSpoolIsAGap(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, func(o *Options) { o.Spool.Path = dir })
	w.o.FS = diskqueue.OS{}
	var err error
	w.stop()
	if w.d, err = New(w.o); err != nil {
		t.Fatal(err)
	}
	w.add(3)
	w.try(w.d.Live, false)
	w.stop()
	files, _ := filepath.Glob(filepath.Join(dir, "*.spool"))
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2]++ // in the second of three
	if err := os.WriteFile(files[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	if w.d, err = New(w.o); err != nil {
		t.Fatal(err)
	}
	w.add(1)
	gaps := gapsOf(w.try(w.d.Live, true))
	begin := time.Unix(1_800_000_000, 0)
	if len(gaps) != 1 || gaps[0].Reason != lostDamaged || gaps[0].From != begin.UnixMicro() || gaps[0].To != begin.Add(20*time.Second).UnixMicro() {
		t.Errorf("gaps %+v, want one between the first and the third batch", gaps)
	}
	w.pass(time.Second)
	if got := seqs(w.try(w.d.Backlog, true)); !slices.Equal(got, []uint64{1, 3}) {
		t.Errorf("from the spool %v, want 1 and 3", got)
	}
	w.stop()
}

func TestWhatWaitsIsSignedByTheKeyOfTheDay(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Keys = sample.Keys{"node": []byte("the key of before")} })
	w.add(1)
	w.try(w.d.Live, false)
	w.stop()
	w.o.Keys = sample.Keys{"node": []byte("the key of the day")}
	w.start()
	w.pass(time.Second)
	if got := seqs(w.try(w.d.Backlog, true)); !slices.Equal(got, []uint64{1}) {
		t.Errorf("sent %v", got)
	}
	w.stop()
}

// memory is a delivery without a spool.
func memory(t *testing.T, pub bus.Publisher, bound int64, secret []byte) *Delivery {
	t.Helper()
	m, err := NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Options{Log: zaptest.NewLogger(t), Metrics: m, Publisher: pub, Node: "node", Partitions: 1, Keys: sample.Keys{"node": secret}, QueueBytes: bound})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// deliver runs d until everything that is queued is confirmed.
func deliver(t *testing.T, d *Delivery) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { d.Run(ctx) })
	fctx, stop := context.WithTimeout(ctx, 20*time.Second)
	if left := d.Flush(fctx); left != 0 {
		t.Errorf("%d batches were not delivered", left)
	}
	stop()
	cancel()
	wg.Wait()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// number adds a batch at n seconds.
func number(d *Delivery, n int64) {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r", Source: "openstack"})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(uint64(n)))
	d.Add(b, n*1e6, (n-1)*1e6)
}

func TestDelivery(t *testing.T) {
	secret := []byte("0123456789abcdef")
	for name, path := range map[string]string{"in memory": "", "with a spool": t.TempDir()} {
		t.Run(name, func(t *testing.T) {
			pub := newBus()
			d := memory(t, pub, 1<<20, secret)
			if path != "" {
				d.o.Spool = DefaultSpool()
				d.o.Spool.Path = path
				d.Spool(d.now())
			}
			for n := range int64(200) {
				number(d, n+1)
			}
			deliver(t, d)
			got := pub.batches(t, secret)
			if len(got) != 200 {
				t.Fatalf("%d batches arrived, want 200", len(got))
			}
			for i, b := range got {
				if b.Seq != uint64(i+1) || b.Epoch != d.numbers.epoch || b.Base != int64(i+1)*1e6 || b.Columns[0].Values[0] != uint64(i+1) || b.Since == 0 || b.Since > b.Base {
					t.Fatalf("batch %d is %+v", i, b)
				}
			}
			if pub.ms[0].RoutingKey != bus.SamplesKey("node", 1) {
				t.Errorf("routing key %q", pub.ms[0].RoutingKey)
			}
		})
	}
}

func TestAFullQueueDropsTheOldestAndSaysSo(t *testing.T) {
	pub := newBus()
	d := memory(t, pub, 1<<20, nil)
	number(d, 1)
	size := d.bytes
	d.o.QueueBytes = 10*size + size/2 // gaps make some batches a little larger
	d.AddGap(sample.Gap{Meter: "*", Resource: "lost", From: 1, To: 2, Reason: "kept although its batch is dropped"})
	for n := int64(2); n <= 100; n++ {
		number(d, n)
	}
	if d.bytes > d.o.QueueBytes {
		t.Errorf("%d bytes are queued, the bound is %d", d.bytes, d.o.QueueBytes)
	}
	number(d, 101)
	d.o.QueueBytes = 1 << 20
	deliver(t, d)
	got := pub.batches(t, nil)
	have := seqs(got)
	if !slices.IsSorted(have) || have[len(have)-1] != 101 {
		t.Errorf("sequence numbers %v: want a rising end of 1 to 101", have)
	}
	first := int64(have[0])
	if first == 1 {
		t.Fatal("nothing was dropped")
	}
	// All that was dropped is told of by what arrived, each sample once.
	dropped, told := 0, false
	var from, to int64 = 1 << 62, 0
	for _, g := range gapsOf(got) {
		if g.Resource == "lost" {
			told = true
			continue
		}
		n := 0
		if _, err := fmt.Sscan(g.Reason, &n); err != nil || g.Meter != "cpu" {
			t.Fatalf("gap %+v", g)
		}
		dropped += n
		from, to = min(from, g.From), max(to, g.To)
	}
	if missing := 101 - len(have); dropped != missing {
		t.Errorf("gaps tell of %d samples, %d are missing", dropped, missing)
	}
	if from != 0 || to < (first-1)*1e6 {
		t.Errorf("gaps reach from %d to %d µs, want from 0 to at least %d", from, to, (first-1)*1e6)
	}
	if !told {
		t.Error("the gap of a dropped batch was lost with it")
	}
	if n := value(t, d.o.Metrics.dropped.WithLabelValues("cpu")); int(n) != dropped {
		t.Errorf("the counter of dropped samples says %v, want %d", n, dropped)
	}
}

func TestDeliveryGoesOnAfterTheBusComesBack(t *testing.T) {
	pub := newBus()
	pub.set(true)
	d := memory(t, pub, 1<<20, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { d.Run(ctx) })
	number(d, 1)
	<-pub.got // refused
	number(d, 2)
	pub.set(false)
	fctx, stop := context.WithTimeout(ctx, 20*time.Second)
	if left := d.Flush(fctx); left != 0 {
		t.Errorf("%d batches left", left)
	}
	stop()
	cancel()
	wg.Wait()
	if diff := gocmp.Diff([]uint64{1, 2}, seqs(pub.batches(t, nil))); diff != "" {
		t.Errorf("sequence numbers (-want +got):\n%s", diff)
	}
}

// TestWhatWaitsIsDeliveredBesideWhatIsNew runs the goroutines over an outage and
// a restart.
func TestWhatWaitsIsDeliveredBesideWhatIsNew(t *testing.T) {
	pub := newBus()
	pub.set(true)
	spool := DefaultSpool()
	spool.Path = t.TempDir()
	start := func() (d *Delivery, stop func() int) {
		m, err := NewMetrics(prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		if d, err = New(Options{Log: zaptest.NewLogger(t), Metrics: m, Publisher: pub, Node: "node", Partitions: 1, QueueBytes: 1 << 20, Interval: 10 * time.Second, Spool: spool}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { d.Run(ctx) })
		return d, func() int {
			fctx, stop := context.WithTimeout(ctx, 10*time.Second)
			defer stop()
			left := d.Flush(fctx)
			cancel()
			wg.Wait()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			return left
		}
	}
	d, stop := start()
	for n := range int64(10) {
		number(d, n+1)
	}
	if left := stop(); left != 0 {
		t.Errorf("%d batches are lost, want them in the spool", left)
	}
	pub.set(false)
	d, stop = start()
	number(d, 11)
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline) && len(seqs(pub.batches(t, nil))) < 11; {
		time.Sleep(10 * time.Millisecond)
	}
	if left := stop(); left != 0 {
		t.Errorf("%d batches left", left)
	}
	got := seqs(pub.batches(t, nil))
	slices.Sort(got)
	if diff := gocmp.Diff([]uint64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, got); diff != "" {
		t.Errorf("sequence numbers (-want +got):\n%s", diff)
	}
}

func TestFlushSaysWhatIsLeft(t *testing.T) {
	pub := newBus()
	pub.set(true)
	d := memory(t, pub, 1<<20, nil)
	number(d, 1)
	number(d, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { d.Run(ctx) })
	if left := d.Flush(ctx); left != 2 {
		t.Errorf("%d batches left, want 2", left)
	}
	wg.Wait()
}

func TestAGapIsDeliveredWithoutSamples(t *testing.T) {
	pub := newBus()
	d := memory(t, pub, 1<<20, nil)
	want := sample.Gap{Meter: "cpu", Resource: "r", From: 1, To: 2, Reason: "why"}
	d.AddGap(want)
	d.Add(sample.NewBuilder(), 5, 4)
	d.Add(sample.NewBuilder(), 6, 5) // nothing to say: no batch
	deliver(t, d)
	got := pub.batches(t, nil)
	if len(got) != 1 || len(got[0].Gaps) != 1 || got[0].Gaps[0] != want {
		t.Errorf("got %+v", got)
	}
}

func TestGapsThatWaitAreBounded(t *testing.T) {
	d := memory(t, newBus(), 1<<20, nil)
	for i := range int64(3 * maxGaps) {
		d.AddGap(sample.Gap{Meter: "*", Resource: "r", From: 100 + i, To: 101 + i, Reason: "why"})
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
	d := memory(t, newBus(), 1<<20, nil)
	d.o.Delay = time.Hour
	number(d, 1)
	g, wait := d.Live(time.Now())
	if g != nil || wait < 59*time.Minute {
		t.Errorf("some are due, or in %s; want in an hour", wait)
	}
	if g, _ := d.Live(time.Now().Add(time.Hour)); g == nil || len(g.Messages) != 1 {
		t.Error("nothing is due after the delay, want 1")
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte("kvmeter agent epoch 0000000000000001 reserved 4097 seen 1800000000000000 clean false 00000000\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parseState(text)
		if err != nil {
			return
		}
		fs := crashfs.New()
		if err := fs.MkdirAll("/s"); err != nil {
			t.Fatal(err)
		}
		if err := writeState(fs, "/s/epoch", s); err != nil {
			t.Fatal(err)
		}
		if got, err := readState(fs, "/s/epoch"); err != nil || got != s {
			t.Errorf("%+v is read as %+v, %v", s, got, err)
		}
	})
}

func FuzzBatchRecord(f *testing.F) {
	f.Add(appendBatch(nil, 1, sample.BatchID{1}, "node", []byte("body")))
	f.Fuzz(func(t *testing.T, in []byte) {
		b, err := readBatch(&diskqueue.Record{Kind: ofBatch, Body: in})
		if err == nil && string(appendBatch(nil, b.from, b.id, b.node, b.body)) != string(in) {
			t.Errorf("%x is read as %+v", in, b)
		}
	})
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

func TestBatchesAreObservedWhenTheyAreMade(t *testing.T) {
	d := memory(t, newBus(), 1<<20, nil)
	var got []uint64
	d.o.Observe = func(b *sample.Batch) {
		for s := range b.Samples() {
			got = append(got, s.Volume.Bits)
		}
	}
	number(d, 1)
	number(d, 2)
	if !slices.Equal(got, []uint64{1, 2}) {
		t.Errorf("observed %v, want 1 and 2, before anything is sent", got)
	}
}

// TestTheWallClockCanBeSet by an hour, either way, and nothing waits longer or
// shorter for it, is dropped as too old, or has its number twice; a kill leaves a gap
// that holds what was lost.
func TestTheWallClockCanBeSet(t *testing.T) {
	for name, by := range map[string]time.Duration{"forward": time.Hour, "back": -time.Hour, "a leap second": -time.Second} {
		t.Run(name, func(t *testing.T) {
			skew := time.Duration(0)
			w := newWorld(t, func(o *Options) {
				now := o.Now
				o.Spool.MaxAge = 2 * time.Hour
				o.Wall = func() time.Time { return now().Add(skew) }
			})
			for range 3 {
				addBatch(w.d, w.o.Wall())
				w.pass(w.o.Interval)
			}
			w.try(w.d.Live, false)
			skew = by
			addBatch(w.d, w.o.Wall())
			if g, wait := w.d.Live(w.d.now()); g != nil || wait != patience {
				t.Errorf("a new batch waits for the disk for %s, want %s", wait, patience)
			}
			w.d.Spool(w.d.now())
			if got := w.try(w.d.Live, true); len(got) != 1 || got[0].Base != w.o.Wall().UnixMicro() {
				t.Errorf("%d new batches are sent, want 1", len(got))
			}
			w.pass(drainEvery)
			old := w.try(w.d.Backlog, true)
			if got := seqs(old); !slices.Equal(got, []uint64{1, 2, 3}) {
				t.Errorf("from the spool %v, want all three", got)
			}
			lost := w.o.Wall()
			addBatch(w.d, lost) // in memory only
			w.at = w.at.Add(time.Second)
			w.kill()
			addBatch(w.d, w.o.Wall())
			w.d.Spool(w.d.now())
			after := w.try(w.d.Live, true)
			if n := seqs(after); len(n) != 1 || n[0] <= 5 {
				t.Errorf("after the kill %v, want a number that was not given", n)
			}
			if gaps := gapsOf(after); len(gaps) != 1 || gaps[0].From > lost.UnixMicro() || gaps[0].To < lost.UnixMicro() {
				t.Errorf("gaps %+v, want one over %d", gaps, lost.UnixMicro())
			}
			w.stop()
		})
	}
}

// TestAClockSetBackBeforeAnythingIsSpooledIsKept has the disk know of a time that is
// to come, before it fails.
func TestAClockSetBackBeforeAnythingIsSpooledIsKept(t *testing.T) {
	skew := time.Duration(0)
	w := newWorld(t, func(o *Options) {
		now := o.Now
		o.Wall = func() time.Time { return now().Add(skew) }
	})
	w.d.Spool(w.d.now())
	skew = -time.Hour
	w.d.Spool(w.d.now())
	w.fs.Fail(func(op crashfs.Op, _ string) error {
		if op == crashfs.Write {
			return errors.New("no space left on device")
		}
		return nil
	})
	lost := w.o.Wall()
	addBatch(w.d, lost)
	w.d.Spool(w.d.now())
	w.at = w.at.Add(10 * time.Minute)
	w.fs.Fail(nil)
	w.kill()
	addBatch(w.d, w.o.Wall())
	w.d.Spool(w.d.now())
	if gaps := gapsOf(w.try(w.d.Live, true)); len(gaps) != 1 || gaps[0].From > lost.UnixMicro() || gaps[0].To < lost.UnixMicro() {
		t.Errorf("gaps %+v, want one over %d", gaps, lost.UnixMicro())
	}
	w.stop()
}
