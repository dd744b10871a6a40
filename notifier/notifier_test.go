package notifier_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

var keys = sample.Keys{"node-1": []byte("secret of node-1"), "notifier-1": []byte("secret of notifier-1")}

// batch makes the seq-th batch of node-1: cpu of two domains, network of one.
func batch(seq uint64) *sample.Batch {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "domain-a", Source: "openstack", Project: "p", User: "u", Incarnation: 7, Metadata: []byte(`{"name": "a"}`)})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1000+seq))
	b.Row(sample.Row{Resource: "nic-a", Source: "openstack", Project: "p", Incarnation: 8})
	b.Add(sample.NetInBytes.MeterRef, sample.RTNL, sample.Uint(1<<63+seq))
	b.Row(sample.Row{Resource: "domain-b", Source: "openstack", Offset: 5, Incarnation: 9})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(2000+seq))
	b.Gap(sample.Gap{Meter: "*", Resource: "domain-c", From: 1, To: 2, Reason: "stuck"})
	out := b.Build()
	out.ID = sample.NewBatchID(time.Unix(1_800_000_000+int64(seq), 0))
	out.Node, out.Epoch, out.Seq, out.Base = "node-1", 42, seq, 1_800_000_000_000_000
	return out
}

func sealed(t testing.TB, b *sample.Batch) bus.Message {
	t.Helper()
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.Encode(nil, b)
	if err != nil {
		t.Fatal(err)
	}
	return bus.Seal(bus.SamplesKey(b.Node, 1), b, body, keys[b.Node])
}

func open(t testing.TB, m bus.Message) *sample.Batch {
	t.Helper()
	dec, err := sample.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	b, err := (&bus.Opener{Keys: keys, Relays: []string{"notifier-1"}, Decoder: dec}).Open(&m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rig is a notifier on an in-process bus, with a recorder as central.
type rig struct {
	t     *testing.T
	local *bus.Local
	reg   *prometheus.Registry
	n     *notifier.Notifier

	mu     sync.Mutex
	stored []bus.Message
}

func start(t *testing.T, pipeline string, schemes []publisher.Scheme, change func(*notifier.Config)) *rig {
	t.Helper()
	return startWith(t, pipeline, schemes, change, nil)
}

func startWith(t *testing.T, pipeline string, schemes []publisher.Scheme, change func(*notifier.Config), wire func(*notifier.Deps, *bus.Local)) *rig {
	t.Helper()
	r := &rig{t: t, local: bus.NewLocal(1, zap.NewNop()), reg: prometheus.NewPedanticRegistry()}
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline, cfg.EventPipeline = "notifier-1", "", ""
	if pipeline != "" {
		cfg.Pipeline = write(t, pipeline)
	}
	if change != nil {
		change(&cfg)
	}
	deps := notifier.Deps{
		Log: zap.NewNop(), Consumer: r.local, Publisher: r.local, Keys: keys, Publishers: schemes, Registry: r.reg,
	}
	if wire != nil {
		wire(&deps, r.local)
	}
	n, err := notifier.New(cfg, deps)
	if err != nil {
		t.Fatal(err)
	}
	r.n = n
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := n.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := n.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	wg.Go(func() {
		err := r.local.Consume(ctx, bus.StoreQueue(0), 100, func(_ context.Context, ds []*bus.Delivery) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			for _, d := range ds {
				r.stored = append(r.stored, d.Message)
				d.Ack()
			}
			return nil
		})
		if err != nil {
			t.Errorf("Consume: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return r
}

func write(t testing.TB, pipeline string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "pipeline.yaml")
	if err := os.WriteFile(file, []byte(pipeline), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// send publishes and returns when the notifier has settled all.
func (r *rig) send(ms ...bus.Message) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := r.local.Publish(ctx, ms...); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) taken() []bus.Message {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.stored)
}

func TestABatchThatPassesWholeReachesTheStoreByteForByte(t *testing.T) {
	for name, pipeline := range map[string]string{
		"without a pipeline file": "",
		"when a source names all meters that it has": `
sources: [{name: s, meters: ["cpu*", "network.*"], sinks: [k]}]
sinks: [{name: k, publishers: ["store://"]}]`,
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, pipeline, all.Publishers, nil)
			m := sealed(t, batch(1))
			r.send(m)
			want := m
			want.RoutingKey = "store.0"
			if diff := cmp.Diff([]bus.Message{want}, r.taken()); diff != "" {
				t.Errorf("messages (-want +got):\n%s", diff)
			}
		})
	}
}

func TestABadBatchIsADeadLetterAndCostsNoOther(t *testing.T) {
	good := sealed(t, batch(1))
	change := func(f func(*bus.Message)) bus.Message {
		m := good
		m.Body = bytes.Clone(m.Body)
		f(&m)
		return m
	}
	other := batch(2)
	other.Node = "node-2"
	otherNode := sealed(t, other)
	otherNode.KeyID, otherNode.HMAC = "node-1", sample.Sign(keys["node-1"], otherNode.Body)
	garbage := []byte("garbage")
	for name, tc := range map[string]struct {
		bad    bus.Message
		reason string // part of the dead letter's
		label  string
	}{
		"one that is not signed":           {change(func(m *bus.Message) { m.KeyID, m.HMAC = "", "" }), "not signed", "unsigned"},
		"one of an unknown key":            {change(func(m *bus.Message) { m.KeyID = "node-9" }), `unknown key "node-9"`, "unknown_key"},
		"one whose body was changed":       {change(func(m *bus.Message) { m.Body[9] ^= 1 }), "signature does not match", "bad_signature"},
		"one of another node than its key": {otherNode, `node "node-2", key "node-1"`, "wrong_node"},
		"one that is no batch, but signed": {change(func(m *bus.Message) {
			m.Body, m.HMAC = garbage, sample.Sign(keys["node-1"], garbage)
		}), "malformed batch", "malformed"},
		"one of a foreign type": {change(func(m *bus.Message) { m.ContentType = "application/json" }), `"application/json"`, "other"},
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, "", all.Publishers, nil)
			before, after := sealed(t, batch(3)), sealed(t, batch(4))
			r.send(before, tc.bad, after)
			var ids []string
			for _, m := range r.taken() {
				ids = append(ids, m.ID)
			}
			if diff := cmp.Diff([]string{before.ID, after.ID}, ids); diff != "" {
				t.Errorf("stored batches (-want +got):\n%s", diff)
			}
			dead, _ := r.local.Dead()
			if len(dead) != 1 || !strings.Contains(dead[0].Reason, tc.reason) || !bytes.Equal(dead[0].Body, tc.bad.Body) {
				t.Errorf("dead letters %+v, want one with reason %q", dead, tc.reason)
			}
			if got := counter(t, r.reg, "kvmeter_notifier_refused_batches_total", tc.label); got != 1 {
				t.Errorf("refused batches by %s: %v, want 1", tc.label, got)
			}
		})
	}
}

// counter returns the value of a counter with one label.
func counter(t *testing.T, reg *prometheus.Registry, name, label string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && len(m.GetLabel()) == 1 && m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestUnsignedBatchesAreTakenWhereThatIsAllowed(t *testing.T) {
	r := start(t, "", all.Publishers, func(c *notifier.Config) { c.AllowUnsigned = true })
	m := sealed(t, batch(1))
	m.KeyID, m.HMAC = "", ""
	r.send(m)
	if got := r.taken(); len(got) != 1 || got[0].HMAC != "" {
		t.Errorf("stored %+v, want the unsigned batch", got)
	}
}

func TestAPipelineThatSelectsDerivesABatch(t *testing.T) {
	r := start(t, `
sources: [{name: s, meters: ["cpu"], sinks: [k]}]
sinks: [{name: k, publishers: ["store://"]}]`, all.Publishers, nil)
	in := batch(1)
	m := sealed(t, in)
	r.send(m)
	r.send(m) // delivered again
	got := r.taken()
	if len(got) != 2 {
		t.Fatalf("%d messages, want 2", len(got))
	}
	if diff := cmp.Diff(got[0], got[1]); diff != "" {
		t.Errorf("a redelivered batch gives another message (-first +second):\n%s", diff)
	}
	if got[0].KeyID != "notifier-1" || got[0].RoutingKey != "store.0" {
		t.Errorf("key id %q, routing key %q", got[0].KeyID, got[0].RoutingKey)
	}
	out := open(t, got[0])
	want := &sample.Batch{
		ID: sample.DeriveBatchID(in.ID, "s:k"), Node: "notifier-1", Base: in.Base,
		Meters:  []sample.MeterRef{sample.CPU.MeterRef},
		Rows:    []sample.Row{in.Rows[0], in.Rows[2]},
		Columns: []sample.Column{{Meter: 0, Origin: sample.Walk, Bitmap: []byte{3}, Values: []uint64{1001, 2001}}},
		IDs:     []string{in.ID.Sample(0).String(), in.ID.Sample(1).String()},
		Gaps:    []sample.Gap{{Meter: "*", Resource: "domain-c", From: 1, To: 2, Reason: "stuck", Node: "node-1"}},
		Of:      in.Node,
	}
	if diff := cmp.Diff(want, out); diff != "" {
		t.Errorf("derived batch (-want +got):\n%s", diff)
	}
}

// fake is a publisher that fails as often as it is told.
type fake struct {
	mu    sync.Mutex
	fails int
	err   error
	calls [][]string // batch ids
}

func (f *fake) Publish(_ context.Context, parts []publisher.Part) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []string
	for _, p := range parts {
		ids = append(ids, p.From.ID.String())
	}
	f.calls = append(f.calls, ids)
	if len(f.calls) <= f.fails {
		return f.err
	}
	return nil
}

func (f *fake) Close() error { return nil }

func fakes(by map[string]*fake) []publisher.Scheme {
	return []publisher.Scheme{{Name: "fake", New: func(u *url.URL, _ publisher.Deps) (publisher.Publisher, error) {
		return by[u.Host], nil
	}}}
}

const twoFakes = `
sources: [{name: s, meters: ["*"], sinks: [k]}]
sinks: [{name: k, publishers: ["fake://a", "fake://b"]}]`

func TestABatchIsAckedOnlyWhenEveryPublisherHasTakenIt(t *testing.T) {
	a, b := &fake{}, &fake{fails: 2, err: errors.New("no disk")}
	r := start(t, twoFakes, fakes(map[string]*fake{"a": a, "b": b}), nil)
	m := sealed(t, batch(1))
	r.send(m)
	if diff := cmp.Diff([][]string{{m.ID}, {m.ID}, {m.ID}}, b.calls); diff != "" {
		t.Errorf("calls of the one that failed twice (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([][]string{{m.ID}}, a.calls); diff != "" {
		t.Errorf("calls of the one that had taken it (-want +got):\n%s", diff)
	}
}

func TestABatchThatAPublisherRefusesForGoodIsADeadLetter(t *testing.T) {
	a := &fake{}
	b := &fake{fails: 1, err: &publisher.Refusal{Part: 0, Err: errors.New("too large")}}
	r := start(t, twoFakes, fakes(map[string]*fake{"a": a, "b": b}), nil)
	r.send(sealed(t, batch(1)))
	r.send(sealed(t, batch(2)))
	dead, _ := r.local.Dead()
	if len(dead) != 1 || dead[0].Reason != "fake://b: too large" {
		t.Errorf("dead letters %+v, want one that is too large", dead)
	}
}

// TestABatchThatOneRefusesForGoodIsStillForTheOthers has one publisher that refuses
// at once and one that takes it at the third attempt.
func TestABatchThatOneRefusesForGoodIsStillForTheOthers(t *testing.T) {
	a := &fake{fails: 1, err: &publisher.Refusal{Part: publisher.All, Err: errors.New("too large")}}
	b := &fake{fails: 2, err: errors.New("no disk")}
	r := start(t, twoFakes, fakes(map[string]*fake{"a": a, "b": b}), nil)
	m := sealed(t, batch(1))
	r.send(m)
	if diff := cmp.Diff([][]string{{m.ID}, {m.ID}, {m.ID}}, b.calls); diff != "" {
		t.Errorf("calls of the one that failed twice (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([][]string{{m.ID}}, a.calls); diff != "" {
		t.Errorf("calls of the one that refused (-want +got):\n%s", diff)
	}
	if dead, n := r.local.Dead(); n != 1 || dead[0].Reason != "fake://a: too large" {
		t.Errorf("dead letters %+v, want one that is too large", dead)
	}
}

// TestAPublisherThatIsAwayHoldsUpNoOther has a receiver that refuses and comes
// back: meanwhile batches are acked, and nothing is lost.
func TestAPublisherThatIsAwayHoldsUpNoOther(t *testing.T) {
	var mu sync.Mutex
	away, got := true, map[string]int{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if away {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		var samples []struct{ ID string }
		if err := json.NewDecoder(r.Body).Decode(&samples); err != nil {
			t.Error(err)
		}
		for _, s := range samples {
			got[s.ID]++
		}
	}))
	defer s.Close()
	r := start(t, "sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: [store://, '"+s.URL+"']}]", all.Publishers,
		func(cfg *notifier.Config) { cfg.Spool = t.TempDir() })
	for seq := range uint64(20) {
		r.send(sealed(t, batch(seq))) // returns when it is acked
	}
	if n := len(r.taken()); n != 20 {
		t.Errorf("%d batches are in the store", n)
	}
	mu.Lock()
	away = false
	mu.Unlock()
	for range 1000 {
		mu.Lock()
		n := len(got)
		mu.Unlock()
		if n == 60 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(got) != 60 {
		t.Errorf("%d samples arrived, want 60", len(got))
	}
	for id, n := range got {
		if n != 1 {
			t.Errorf("sample %s arrived %d times", id, n)
		}
	}
	if n := counter(t, r.reg, "kvmeter_notifier_spooled_samples_total", s.URL); n != 60 {
		t.Errorf("%v samples are counted as spooled", n)
	}
}

func TestNewSaysWhatIsWrong(t *testing.T) {
	for name, tc := range map[string]struct{ pipeline, want string }{
		"an unknown publisher, with its line": {
			"sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['monasca://']}]",
			"pipeline.yaml:2: publisher monasca://: there is none of this scheme; there are ",
		},
		"a file that can't be opened, with its line": {
			"sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file:///nowhere/at/all']}]",
			"pipeline.yaml:2: publisher file:///nowhere/at/all: open /nowhere/at/all: no such file or directory",
		},
		"a key that derived batches need": {
			"sources: [{name: s, meters: ['cpu'], sinks: [k]}]\nsinks: [{name: k, publishers: ['store://']}]",
			"put a key named notifier-9.key",
		},
		"an option that store:// has not": {
			"sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['store://host']}]",
			"store:// takes no host",
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := notifier.DefaultConfig()
			cfg.Name, cfg.Pipeline = "notifier-9", write(t, tc.pipeline)
			_, err := notifier.New(cfg, notifier.Deps{Log: zap.NewNop(), Keys: keys, Publishers: all.Publishers})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

// hardware is a batch of node-1's BMC: two entries of its event log, a sensor that
// changed, and its temperature.
func hardware() *sample.Batch {
	b := sample.NewBuilder()
	for i, state := range []string{"Power Supply AC lost", "Presence detected"} {
		b.Row(sample.Row{Resource: "node-1-sel-event", Source: "openstack", Offset: int64(i), Metadata: fmt.Appendf(nil,
			`{"asserted":true,"node":"node-1","raw":"00ff","record":%d,"sensor":"PSU1","sensor_type":"Power Supply","state":%q,"time":"2026-01-01T00:00:0%dZ"}`, i+7, state, i)})
		b.Add(sample.IPMISELEvent.MeterRef, sample.IPMI, sample.Uint(1))
	}
	b.Row(sample.Row{Resource: "node-1-fan", Source: "openstack", Metadata: []byte(`{"node":"node-1","old_state":"ok","sensor":"Fan","state":"cr"}`)})
	b.Add(sample.IPMISensorEvent.MeterRef, sample.IPMI, sample.Uint(1))
	b.Row(sample.Row{Resource: "node-1-temp", Source: "openstack"})
	b.Add(sample.IPMITemperature.MeterRef, sample.IPMI, sample.Float(45))
	out := b.Build()
	out.ID = sample.NewBatchID(time.Unix(1_800_000_000, 0))
	out.Node, out.Epoch, out.Seq, out.Base = "node-1", 42, 1, 1_800_000_000_000_000
	return out
}

// TestEventsReachTheQueueOfTheStore has a batch and its copy delivered: the store
// gets the same signed messages.
func TestEventsReachTheQueueOfTheStore(t *testing.T) {
	for name, change := range map[string]func(*notifier.Config){
		"without an event pipeline file": func(c *notifier.Config) { c.EventPipeline = filepath.Join(t.TempDir(), "none.yaml") },
		"where the file names database://": func(c *notifier.Config) {
			c.EventPipeline = write(t, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['database://']}]")
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, "", all.Publishers, change)
			dec, err := sample.NewDecoder()
			if err != nil {
				t.Fatal(err)
			}
			opener := bus.Opener{Keys: keys, Relays: []string{"notifier-1"}, Decoder: dec}
			ctx, cancel := context.WithCancel(context.Background())
			var got []bus.Message
			var events []sample.Event
			ended := make(chan error, 1)
			go func() {
				ended <- r.local.Consume(ctx, bus.EventsQueue, 10, func(_ context.Context, ds []*bus.Delivery) error {
					for _, d := range ds {
						more, err := opener.OpenEvents(&d.Message)
						if err != nil {
							t.Error(err)
						}
						got, events = append(got, d.Message), append(events, more...)
						d.Ack()
					}
					return nil
				})
			}()
			in := hardware()
			r.send(sealed(t, in))
			r.send(sealed(t, in))
			cancel()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			if len(got) != 2 || len(events) != 6 || got[0].KeyID != "notifier-1" {
				t.Fatalf("%d messages with %d events, want 2 of notifier-1 with 3 each: %v", len(got), len(events), got)
			}
			if got[0].ID != got[1].ID || !bytes.Equal(got[0].Body, got[1].Body) {
				t.Error("the copy of a batch gives other events")
			}
			for i := range 3 {
				id := in.ID.Sample(i).String()
				if !slices.ContainsFunc(events[:3], func(e sample.Event) bool { return e.ID == id }) {
					t.Errorf("the event of sample %d is missing", i)
				}
			}
		})
	}
}

func TestEventsForTheStoreNeedAKey(t *testing.T) {
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline = "notifier-9", ""
	deps := notifier.Deps{Log: zap.NewNop(), Keys: keys, Publishers: all.Publishers}
	if _, err := notifier.New(cfg, deps); err != nil {
		t.Errorf("without a file it makes no events, and yet: %v", err)
	}
	cfg.EventPipeline = write(t, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['store://']}]")
	want := "pipeline.yaml:2: events that go to store:// are signed by the notifier: put a key named notifier-9.key among the keys"
	if _, err := notifier.New(cfg, deps); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
}

// TestOccurrencesAreEventsToo has a batch delivered twice, without notifications;
// two pipelines of events have the same file.
func TestOccurrencesAreEventsToo(t *testing.T) {
	dir := t.TempDir()
	every, some := filepath.Join(dir, "every"), filepath.Join(dir, "some")
	r := start(t, "", all.Publishers, func(c *notifier.Config) {
		c.EventPipeline = write(t, `
sources:
- {name: a, events: ["*"], sinks: [k]}
- {name: b, events: ["hardware.ipmi.sel"], sinks: [k, l]}
sinks:
- {name: k, publishers: ["file://`+every+`?json"]}
- {name: l, publishers: ["file://`+some+`?json"]}`)
	})
	in := hardware()
	m := sealed(t, in)
	r.send(m)
	r.send(m)
	want := m
	want.RoutingKey = "store.0"
	if diff := cmp.Diff([]bus.Message{want, want}, r.taken()); diff != "" {
		t.Errorf("batches in the store's queue (-want +got):\n%s", diff)
	}
	text := func(name, text string) sample.Trait {
		return sample.Trait{Name: name, Type: sample.TextTrait, Text: text}
	}
	entry := func(i int64, state string) sample.Event {
		return sample.Event{
			ID: in.ID.Sample(int(i)).String(), Type: "hardware.ipmi.sel", Generated: in.Base + i,
			Traits: []sample.Trait{
				text("asserted", "true"), text("host", "node-1"), text("node", "node-1"), text("raw", "00ff"),
				{Name: "record", Type: sample.IntTrait, Int: 7 + i},
				text("resource_id", "node-1-sel-event"),
				text("sensor", "PSU1"), text("sensor_type", "Power Supply"), text("state", state),
				{Name: "time", Type: sample.DatetimeTrait, Int: 1_767_225_600_000_000 + i*1_000_000},
			},
		}
	}
	entries := []sample.Event{entry(0, "Power Supply AC lost"), entry(1, "Presence detected")}
	change := sample.Event{
		ID: in.ID.Sample(2).String(), Type: "hardware.ipmi.sensor.state", Generated: in.Base,
		Traits: []sample.Trait{
			text("host", "node-1"), text("node", "node-1"), text("old_state", "ok"), text("resource_id", "node-1-fan"),
			text("sensor", "Fan"), text("state", "cr"),
		},
	}
	for file, want := range map[string][]sample.Event{some: entries, every: {change, entries[0], entries[1]}} {
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var lines []byte
		for i := range want {
			lines = append(wire.Event(lines, wire.JSON, &want[i]), '\n')
		}
		if diff := cmp.Diff(string(lines)+string(lines), string(got)); diff != "" {
			t.Errorf("%s, delivered twice (-want +got):\n%s", filepath.Base(file), diff)
		}
	}
	families, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "kvmeter_notifier_events_total" && f.GetMetric()[0].GetCounter().GetValue() != 6 {
			t.Errorf("%v, want 6 events", f)
		}
	}
}

// eventFake takes batches, and events after it has failed as often as it is told.
type eventFake struct {
	fake
	events []string
	tries  int
}

func (f *eventFake) PublishEvents(_ context.Context, es []sample.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tries++; f.tries <= 2 {
		return errors.New("no disk")
	}
	for i := range es {
		f.events = append(f.events, es[i].ID)
	}
	return nil
}

func TestABatchIsAckedOnlyWhenItsEventsAreTakenToo(t *testing.T) {
	f := &eventFake{}
	schemes := []publisher.Scheme{{Name: "fake", Events: true, New: func(*url.URL, publisher.Deps) (publisher.Publisher, error) { return f, nil }}}
	r := start(t, "sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['fake://a']}]", schemes, func(c *notifier.Config) {
		c.EventPipeline = write(t, "sources: [{name: s, events: ['*.sel'], sinks: [k]}]\nsinks: [{name: k, publishers: ['fake://a']}]")
	})
	in := hardware()
	r.send(sealed(t, in)) // returns when it is acked
	if diff := cmp.Diff([]string{in.ID.Sample(0).String(), in.ID.Sample(1).String()}, f.events); diff != "" || f.tries != 3 || len(f.calls) != 1 {
		t.Errorf("%d attempts, %d of the batch, events (-want +got):\n%s", f.tries, len(f.calls), diff)
	}
}
