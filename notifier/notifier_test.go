package notifier_test

import (
	"bytes"
	"context"
	"errors"
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
	b, err := (&bus.Opener{Keys: keys, Decoder: dec}).Open(&m)
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

	mu     sync.Mutex
	stored []bus.Message
}

func start(t *testing.T, pipeline string, schemes []publisher.Scheme, change func(*notifier.Config)) *rig {
	t.Helper()
	r := &rig{t: t, local: bus.NewLocal(1, zap.NewNop()), reg: prometheus.NewPedanticRegistry()}
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline = "notifier-1", ""
	if pipeline != "" {
		cfg.Pipeline = write(t, pipeline)
	}
	if change != nil {
		change(&cfg)
	}
	n, err := notifier.New(cfg, notifier.Deps{
		Log: zap.NewNop(), Consumer: r.local, Publisher: r.local, Keys: keys, Publishers: schemes, Registry: r.reg,
	})
	if err != nil {
		t.Fatal(err)
	}
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

func TestNewSaysWhatIsWrong(t *testing.T) {
	for name, tc := range map[string]struct{ pipeline, want string }{
		"an unknown publisher, with its line": {
			"sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['gnocchi://']}]",
			"pipeline.yaml:2: there is no publisher gnocchi://; there are [file:// store://]",
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
