package ceilometer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
	wire "github.com/kvmeter/kvmeter/sample/ceilometer"
)

// fakeBroker keeps what it takes.
type fakeBroker struct {
	taken  []bus.Message
	refuse error // of the next call
	pings  int
}

func (b *fakeBroker) Publish(_ context.Context, ms ...bus.Message) error {
	if err := b.refuse; err != nil {
		b.refuse = nil
		return err
	}
	b.taken = append(b.taken, ms...)
	return nil
}

func (b *fakeBroker) Ping(context.Context) error {
	b.pings++
	return nil
}

// batch makes a batch of the meters cpu and memory.usage of some domains, as a
// message.
func batch(t testing.TB, domains int, gaps ...sample.Gap) bus.Message {
	t.Helper()
	b := sample.NewBuilder()
	for i := range domains {
		b.Row(sample.Row{Resource: fmt.Sprintf("d%d", i), Source: "openstack", Project: "p", Metadata: fmt.Appendf(nil, `{"n": [%d, 1.0, "é"]}`, i)})
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<63+uint64(i)))
		b.Add(sample.MeterRef{Name: "memory.usage", Kind: sample.Gauge, Unit: "MiB"}, sample.Libvirt, sample.Float(float64(i)))
	}
	for _, g := range gaps {
		b.Gap(g)
	}
	built := b.Build()
	built.ID, built.Node, built.Epoch, built.Seq, built.Base = sample.NewBatchID(time.Now()), "n", 1, 1, 1_800_000_000_000_001
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.Encode(nil, built)
	if err != nil {
		t.Fatal(err)
	}
	return bus.Seal("samples.0", built, body, nil)
}

func open(t testing.TB, cfg Config, b broker) *Publisher {
	t.Helper()
	p, err := New(cfg, b, zap.NewNop(), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func counted(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// message is what a message says.
type message struct {
	MessageID   string `json:"message_id"`
	PublisherID string `json:"publisher_id"`
	EventType   string `json:"event_type"`
	Priority    string
	Payload     struct{ Samples []json.RawMessage }
	Timestamp   string
	UniqueID    string `json:"_unique_id"`
}

func read(t *testing.T, m bus.Message) (out message) {
	t.Helper()
	var envelope map[string]string
	if err := json.Unmarshal(m.Body, &envelope); err != nil || envelope["oslo.version"] != "2.0" {
		t.Fatalf("envelope %s: %v", m.Body, err)
	}
	if err := json.Unmarshal([]byte(envelope["oslo.message"]), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestMessages(t *testing.T) {
	cfg := DefaultConfig()
	cfg.BatchSize, cfg.Topics, cfg.TelemetrySecret = 3, []string{"notifications", "other"}, "secret"
	b := &fakeBroker{}
	p := open(t, cfg, b)
	in := batch(t, 4, sample.Gap{Meter: "*", Resource: "*"})
	if err := p.Publish(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	var got []string
	unique := map[string]bool{}
	for _, m := range b.taken {
		r := read(t, m)
		line := m.Exchange + " " + m.RoutingKey
		for _, s := range r.Payload.Samples {
			var of struct {
				Name      string          `json:"counter_name"`
				Volume    json.RawMessage `json:"counter_volume"`
				Resource  string          `json:"resource_id"`
				Signature string          `json:"message_signature"`
			}
			if err := json.Unmarshal(s, &of); err != nil || of.Signature != wire.Signature(s, "secret") {
				t.Errorf("signature of %s: %v", s, err)
			}
			line += fmt.Sprintf(" %s:%s=%s", of.Resource, of.Name, of.Volume)
		}
		got = append(got, line)
		if m.ContentType != "application/json" || m.ContentEncoding != "utf-8" || m.ID != r.UniqueID || unique[m.ID] {
			t.Errorf("properties %+v", m)
		}
		unique[m.ID] = true
		r.Payload.Samples, r.MessageID, r.UniqueID = nil, "", ""
		want := message{PublisherID: "ceilometer.polling", EventType: "telemetry.polling", Priority: "SAMPLE", Timestamp: "2027-01-15 08:00:00.000001"}
		if diff := cmp.Diff(want, r); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
	var want []string
	for _, part := range []string{
		"d0:cpu=9223372036854775808 d1:cpu=9223372036854775809 d2:cpu=9223372036854775810",
		"d3:cpu=9223372036854775811 d0:memory.usage=0.0 d1:memory.usage=1.0",
		"d2:memory.usage=2.0 d3:memory.usage=3.0",
	} {
		want = append(want, "ceilometer notifications.sample "+part, "ceilometer other.sample "+part)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if m, s, g := counted(t, p.messages), counted(t, p.samples), counted(t, p.gaps); m != 6 || s != 8 || g != 1 {
		t.Errorf("counted %v messages, %v samples, %v gaps, want 6, 8, 1", m, s, g)
	}
}

func TestWhatComesAgainIsTheSame(t *testing.T) {
	b := &fakeBroker{}
	p := open(t, DefaultConfig(), b)
	in := batch(t, 2)
	for range 2 {
		if err := p.Publish(t.Context(), in); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(b.taken[0], b.taken[1]); diff != "" || len(b.taken) != 2 {
		t.Errorf("%d messages, want the same one twice:\n%s", len(b.taken), diff)
	}
}

func TestWhatWasTakenIsNotSentAgain(t *testing.T) {
	cfg := DefaultConfig()
	cfg.BatchSize = 0
	b := &fakeBroker{}
	p := open(t, cfg, b)
	first, second := batch(t, 1), batch(t, 1)
	bad := second
	bad.ID, bad.Body = "bad", []byte("no batch")
	fails := func(err error) {
		t.Helper()
		publish := func(ms ...bus.Message) error { b.taken = nil; return p.Publish(t.Context(), ms...) }
		if err := publish(first); err != nil || len(b.taken) != 2 {
			t.Fatalf("a message a sample: got %d, %v", len(b.taken), err)
		}
		b.refuse = err
		if got := publish(second, first); !errors.Is(got, err) || len(b.taken) != 0 {
			t.Fatalf("got %v and %d messages", got, len(b.taken))
		}
		if err := publish(first, bad); err != nil || len(b.taken) != 2 {
			t.Fatalf("got %v and %d messages", err, len(b.taken))
		}
	}
	fails(errors.New("the broker is away"))
	if b.pings != 0 {
		t.Errorf("%d pings, want none", b.pings)
	}
	fails(bus.ErrUnroutable)
	if b.pings != 1 {
		t.Errorf("a queue that was deleted is made anew: %d pings, want 1", b.pings)
	}
	if n := counted(t, p.lost); n != 2 {
		t.Errorf("%v batches lost, want 2", n)
	}
	// The second of three fails: the first is not sent again.
	third := batch(t, 1)
	b.taken = nil
	p.broker = &nth{b, 2}
	if err := p.Publish(t.Context(), first, second, third); err == nil || len(b.taken) != 2 {
		t.Fatalf("got %v and %d messages", err, len(b.taken))
	}
	if err := p.Publish(t.Context(), first, second, third); err != nil || len(b.taken) != 6 {
		t.Errorf("got %v and %d messages, want 6", err, len(b.taken))
	}
}

// nth fails in the given call.
type nth struct {
	*fakeBroker
	left int
}

func (n *nth) Publish(ctx context.Context, ms ...bus.Message) error {
	if n.left--; n.left == 0 {
		return errors.New("away")
	}
	return n.fakeBroker.Publish(ctx, ms...)
}

func TestASecretThatChangesIsTakenWithoutARestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	cfg, b := DefaultConfig(), &fakeBroker{}
	cfg.TelemetrySecretFile = file
	var p *Publisher
	for _, step := range []struct{ file, want string }{{"one\n", "one"}, {"two\n", "two"}, {"", "two"}} {
		if err := os.WriteFile(file, []byte(step.file), 0o600); err != nil {
			t.Fatal(err)
		}
		if p == nil {
			p = open(t, cfg, b)
		}
		if err := p.Publish(t.Context(), batch(t, 1)); err != nil {
			t.Fatal(err)
		}
		for _, s := range read(t, b.taken[len(b.taken)-1]).Payload.Samples {
			var of struct {
				Signature string `json:"message_signature"`
			}
			if err := json.Unmarshal(s, &of); err != nil || of.Signature != wire.Signature(s, step.want) {
				t.Errorf("with %q in the file: error %v, signature %s is not by %q", step.file, err, of.Signature, step.want)
			}
		}
	}
}

func TestConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(" s \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"ok":                                   func(c *Config) { c.TelemetrySecretFile = file },
		"ceilometer.control_exchange is empty": func(c *Config) { c.ControlExchange = "" },
		"ceilometer.topics is empty":           func(c *Config) { c.Topics = nil },
		"ceilometer.batch_size -1":             func(c *Config) { c.BatchSize = -1 },
		"ceilometer.queue_arguments: ":         func(c *Config) { c.QueueArguments = map[string]any{"x": struct{}{}} },
		"ceilometer.telemetry_secret_file: ":   func(c *Config) { c.TelemetrySecretFile = file + "x" },
	} {
		cfg := DefaultConfig()
		change(&cfg)
		got := "ok"
		if _, err := New(cfg, nil, zap.NewNop(), prometheus.NewRegistry()); err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		if secret, _ := cfg.secret(); want == "ok" && secret != "s" {
			t.Errorf("secret %q", secret)
		}
	}
}

// BenchmarkPublish makes messages of a poll of 500 domains, 40 samples each,
// without a broker.
func BenchmarkPublish(b *testing.B) {
	builder := sample.NewBuilder()
	metadata := `{"display_name": "vm", "flavor": {"name": "m1", "vcpus": 1}, "image": null, "x": "` + strings.Repeat("x", 700) + `"}`
	for i := range 500 {
		builder.Row(sample.Row{Resource: fmt.Sprintf("5e1f0000-0000-4000-8000-%012d", i), Source: "openstack", Project: "p", Metadata: []byte(metadata)})
		for m := range 40 {
			builder.Add(sample.MeterRef{Name: fmt.Sprintf("meter.%d", m), Kind: sample.Cumulative, Unit: "ns"}, sample.Walk, sample.Uint(uint64(i)<<40))
		}
	}
	built := builder.Build()
	enc, err := sample.NewEncoder()
	if err != nil {
		b.Fatal(err)
	}
	body, err := enc.Encode(nil, built)
	if err != nil {
		b.Fatal(err)
	}
	in := bus.Seal("samples.0", built, body, nil)
	p := open(b, DefaultConfig(), discard{})
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Publish(b.Context(), in); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*built.Len()), "ns/sample")
}

type discard struct{}

func (discard) Publish(context.Context, ...bus.Message) error { return nil }

func (discard) Ping(context.Context) error { return nil }
