package central_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

var keys = sample.Keys{"node-1": []byte("secret of node-1")}

// sealed makes the message of node-1's seq-th batch, of n samples.
func sealed(t *testing.T, seq uint64, n int) bus.Message {
	t.Helper()
	b := sample.NewBuilder()
	for i := range n {
		b.Row(sample.Row{Resource: "domain-a", Source: "openstack", Offset: int64(i)})
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(seq+uint64(i)))
	}
	out := b.Build()
	out.ID = sample.NewBatchID(time.Unix(1_800_000_000+int64(seq), 0))
	out.Node, out.Epoch, out.Seq = "node-1", 42, seq
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.Encode(nil, out)
	if err != nil {
		t.Fatal(err)
	}
	return bus.Seal(bus.StoreKey("node-1", 1), out, body, keys["node-1"])
}

// fakeStore remembers what it is given.
type fakeStore struct {
	mu     sync.Mutex
	fails  int
	err    error
	refuse map[uint64]error // by seq
	seen   map[uint64]bool
	groups [][]uint64 // seqs
	began  []time.Time
}

func (f *fakeStore) Append(_ context.Context, batches []store.Received) ([]store.Stored, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.began = append(f.began, time.Now())
	if f.fails > 0 {
		f.fails--
		return nil, f.err
	}
	var group []uint64
	out := make([]store.Stored, len(batches))
	for i, r := range batches {
		seq := r.Batch.Seq
		group = append(group, seq)
		out[i] = store.Stored{Duplicate: f.seen[seq], Refused: f.refuse[seq]}
		if f.seen == nil {
			f.seen = map[uint64]bool{}
		}
		f.seen[seq] = true
	}
	f.groups = append(f.groups, group)
	return out, nil
}

func (f *fakeStore) AppendEvents(context.Context, []sample.Event) ([]store.Stored, error) {
	return nil, errors.New("this test has no events")
}

type rig struct {
	t     *testing.T
	local *bus.Local
	reg   *prometheus.Registry
	logs  *observer.ObservedLogs
}

func start(t *testing.T, s *fakeStore) *rig {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	log := zap.New(core)
	r := &rig{t, bus.NewLocal(1, log), prometheus.NewPedanticRegistry(), logs}
	in, err := central.NewIngest(central.DefaultIngestConfig(), central.IngestDeps{
		Log: log, Consumer: r.local, Store: s, Keys: keys, Registry: r.reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- in.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// send publishes and returns when the ingest has settled all.
func (r *rig) send(ms ...bus.Message) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := r.local.Publish(ctx, ms...); err != nil {
		r.t.Fatal(err)
	}
}

// counter returns the value of a counter, of all its labels together.
func (r *rig) counter(name string) (sum float64) {
	r.t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "kvmeter_central_"+name {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

func TestABatchIsAckedWhenItIsStoredAndDuplicatesCount(t *testing.T) {
	s := &fakeStore{}
	r := start(t, s)
	m := sealed(t, 1, 3)
	r.send(m)
	r.send(m)
	if diff := cmp.Diff([][]uint64{{1}, {1}}, s.groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	for name, want := range map[string]float64{"stored_batches_total": 1, "stored_samples_total": 3, "duplicate_batches_total": 1} {
		if got := r.counter(name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
}

func TestABatchThatCantBeStoredIsADeadLetterAndCostsNoOther(t *testing.T) {
	unsigned := sealed(t, 2, 1)
	unsigned.KeyID, unsigned.HMAC = "", ""
	foreign := sealed(t, 2, 1)
	foreign.ContentType = "application/json"
	for name, tc := range map[string]struct {
		bad    bus.Message
		reason string
		stored []uint64
	}{
		"one that is not signed":         {unsigned, "not signed", []uint64{1, 3}},
		"one of a foreign type":          {foreign, `"application/json"`, []uint64{1, 3}},
		"one that the store can't store": {sealed(t, 2, 1), "kind of cpu has changed", []uint64{1, 2, 3}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &fakeStore{refuse: map[uint64]error{2: errors.New("kind of cpu has changed")}}
			r := start(t, s)
			r.send(sealed(t, 1, 1), tc.bad, sealed(t, 3, 1))
			var got []uint64
			for _, g := range s.groups {
				got = append(got, g...)
			}
			if diff := cmp.Diff(tc.stored, got); diff != "" {
				t.Errorf("appended (-want +got):\n%s", diff)
			}
			dead, _ := r.local.Dead()
			if len(dead) != 1 || !strings.Contains(dead[0].Reason, tc.reason) || dead[0].Queue != "kvmeter.store.0" {
				t.Errorf("dead letters %+v, want one with reason %q", dead, tc.reason)
			}
			if got := r.counter("refused_batches_total"); got != 1 {
				t.Errorf("refused %v, want 1", got)
			}
		})
	}
}

func TestWhileTheStoreFailsNothingIsAckedAndItIsSaidOnce(t *testing.T) {
	s := &fakeStore{fails: 3, err: store.ErrDiskFull}
	r := start(t, s)
	r.send(sealed(t, 1, 1))
	if diff := cmp.Diff([][]uint64{{1}}, s.groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	if got := r.counter("store_failures_total"); got != 3 {
		t.Errorf("failures %v, want 3", got)
	}
	said := r.logs.FilterLevelExact(zapcore.WarnLevel).All()
	if len(said) != 1 || !strings.Contains(said[0].ContextMap()["error"].(string), store.ErrDiskFull.Error()) {
		t.Errorf("warnings %+v, want one that the disk is full", said)
	}
	for deadline := time.Now().Add(10 * time.Second); r.logs.FilterMessage("messages are taken again").Len() != 1; {
		if time.Now().After(deadline) {
			t.Fatalf("the end was not said once: %+v", r.logs.All())
		}
		time.Sleep(time.Millisecond)
	}
}

// waiting is a bus on which these messages wait.
type waiting []bus.Message

func (ms waiting) Consume(ctx context.Context, queue string, _ int, handle bus.Handler) error {
	if queue == bus.EventsQueue {
		return nil
	}
	var ds []*bus.Delivery
	for _, m := range ms {
		ds = append(ds, &bus.Delivery{Message: m})
	}
	return handle(ctx, ds)
}

func TestWhatWaitsIsStoredTogetherUpToABound(t *testing.T) {
	var ms waiting
	for seq := range uint64(8) {
		ms = append(ms, sealed(t, seq, 4000))
	}
	s := &fakeStore{}
	in, err := central.NewIngest(central.DefaultIngestConfig(), central.IngestDeps{Log: zap.NewNop(), Consumer: ms, Store: s, Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	// 10,000 samples make a group: three batches.
	if diff := cmp.Diff([][]uint64{{0, 1, 2}, {3, 4, 5}, {6, 7}}, s.groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
}

func TestSmallGroupsAreSpaced(t *testing.T) {
	s := &fakeStore{}
	r := start(t, s)
	for seq := range uint64(4) {
		r.send(sealed(t, seq, 1))
	}
	for i := 1; i < len(s.began); i++ {
		if d := s.began[i].Sub(s.began[i-1]); d < 45*time.Millisecond {
			t.Errorf("group %d began %v after the one before, want 50ms", i, d)
		}
	}
}
