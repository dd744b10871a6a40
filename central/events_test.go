package central_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/sample"
)

func event(i int) sample.Event {
	return sample.Event{
		ID: fmt.Sprintf("event %05d", i), Type: "compute.instance.exists", Generated: 1_800_000_000_000_000 + int64(i),
		Traits: []sample.Trait{{Name: "instance_id", Type: sample.TextTrait, Text: "a"}, {Name: "vcpus", Type: sample.IntTrait, Int: int64(i)}},
		Raw:    []byte(`{"payload": {}}`),
	}
}

// sealedEvents makes the message of some events.
func sealedEvents(t *testing.T, events ...sample.Event) bus.Message {
	t.Helper()
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.EncodeEvents(nil, events)
	if err != nil {
		t.Fatal(err)
	}
	return bus.SealEvents("node-1", time.UnixMicro(events[0].Generated), body, keys["node-1"])
}

// hesitant is a store that fails some times, and finds an event impossible.
type hesitant struct {
	*local.Store
	fails int
}

func (h *hesitant) AppendEvents(ctx context.Context, events []sample.Event) ([]store.Stored, error) {
	if h.fails > 0 {
		h.fails--
		return nil, store.ErrDiskFull
	}
	stored, err := h.Store.AppendEvents(ctx, events)
	for i := range stored {
		if events[i].Type == "impossible" {
			stored[i] = store.Stored{Refused: errors.New("impossible")}
		}
	}
	return stored, err
}

// TestEventsAreStoredOnce sends events, some of them again, to a real store that
// fails at first; what can't be stored is a dead letter and costs no other.
func TestEventsAreStoredOnce(t *testing.T) {
	s, err := local.Open(t.TempDir(), local.Options{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	r := &rig{t: t, local: bus.NewLocal(1, zap.NewNop()), reg: prometheus.NewPedanticRegistry()}
	cfg := central.DefaultIngestConfig()
	cfg.Relays = []string{"node-1"}
	in, err := central.NewIngest(cfg, central.IngestDeps{
		Log: zap.NewNop(), Consumer: r.local, Store: &hesitant{s, 2}, Keys: keys, Registry: r.reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- in.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	unsigned := sealedEvents(t, event(7000))
	unsigned.KeyID, unsigned.HMAC = "", ""
	garbage := unsigned
	garbage.Body = []byte("garbage")
	garbage.KeyID, garbage.HMAC = "node-1", sample.Sign(keys["node-1"], garbage.Body)
	impossible := event(7001)
	impossible.Type = "impossible"
	const many = 5000
	var ms []bus.Message
	for i := 0; i < many; i += 10 {
		var events []sample.Event
		for n := range 10 {
			events = append(events, event(i+n))
		}
		if i == 1000 {
			events = append(events, impossible)
			ms = append(ms, unsigned, garbage)
		}
		ms = append(ms, sealedEvents(t, events...))
	}
	r.send(ms...)
	r.send(ms[:5]...)
	var want, got []string
	for i := range many {
		want = append(want, event(i).ID)
	}
	if err := s.Events(t.Context(), store.EventQuery{Type: "compute.instance.exists"}, func(e sample.Event) bool {
		got = append(got, e.ID)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	e, err := s.Event(t.Context(), event(42).ID)
	if diff := cmp.Diff(event(42), e); err != nil || diff != "" {
		t.Errorf("an event, %v (-sent +stored):\n%s", err, diff)
	}
	dead, _ := r.local.Dead()
	reasons := map[string]string{}
	for _, d := range dead {
		reasons[d.Reason] = d.Queue
	}
	if len(dead) != 3 || reasons["impossible"] != bus.EventsQueue || reasons["batch is not signed"] == "" {
		t.Errorf("dead letters %v, want 3", reasons)
	}
	for name, want := range map[string]float64{"stored_events_total": many, "duplicate_events_total": 50, "refused_batches_total": 3, "store_failures_total": 2} {
		if got := r.counter(name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
}
