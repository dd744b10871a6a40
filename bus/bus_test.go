package bus_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
)

func TestANodeKeepsItsQueue(t *testing.T) {
	// These are what agents and notifiers of different versions agree on.
	for node, want := range map[string][]string{
		"node-1":           {"samples.0", "samples.1", "samples.3"},
		"compute-17.cloud": {"samples.0", "samples.0", "samples.6"},
		"":                 {"samples.0", "samples.1", "samples.5"},
	} {
		var got []string
		for _, n := range []int{1, 2, 8} {
			got = append(got, bus.SamplesKey(node, n))
			if s := bus.StoreKey(node, n); strings.TrimPrefix(s, "store.") != strings.TrimPrefix(got[len(got)-1], "samples.") {
				t.Errorf("%q of %d: %s, but %s", node, n, got[len(got)-1], s)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", node, diff)
		}
	}
}

func TestPublishEndsWithItsContext(t *testing.T) {
	l := bus.NewLocal(1, zap.NewNop())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	ms, _ := messages(1)
	if err := l.Publish(ctx, ms...); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "not taken yet") {
		t.Errorf("without a consumer: %v", err)
	}
	ms, _ = messages(200)
	if err := l.Publish(ctx, ms...); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the queue is full") {
		t.Errorf("into a full queue: %v", err)
	}
}

func TestOnlyTheNewestDeadLettersAreKept(t *testing.T) {
	l := bus.NewLocal(1, zap.NewNop())
	consume(t, l, "kvmeter.samples.0", 10, func(_ context.Context, ds []*bus.Delivery) error {
		for _, d := range ds {
			d.Reject(nil)
		}
		return nil
	})
	ms, ids := messages(250)
	publish(t, l, ms...)()
	dead, n := l.Dead()
	if n != 250 || len(dead) != 100 || dead[0].ID != ids[150] || dead[99].ID != ids[249] || dead[0].Reason == "" {
		t.Errorf("%d dead letters in all, kept %d from %s", n, len(dead), dead[0].ID)
	}
}

func TestNewAMQPSaysWhatIsWrong(t *testing.T) {
	junk := filepath.Join(t.TempDir(), "junk.pem")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cfg  bus.Config
		want string
	}{
		"a URL of another scheme":    {bus.Config{URL: "http://u:hush@h/"}, "not of the form amqp://"},
		"a password that breaks it":  {bus.Config{URL: "amqp://u:hu%sh@h/"}, "special characters in the password are written as %XX"},
		"TLS files without TLS":      {bus.Config{URL: "amqp://h/", TLSCA: "x"}, "use amqps://"},
		"a CA that is not there":     {bus.Config{URL: "amqps://h/", TLSCA: "/nowhere"}, "tls_ca: open /nowhere"},
		"a CA that is none":          {bus.Config{URL: "amqps://h/", TLSCA: junk}, "holds no certificate in PEM form"},
		"a certificate without key":  {bus.Config{URL: "amqps://h/", TLSCert: junk}, "tls_cert and tls_key"},
		"a certificate that is none": {bus.Config{URL: "amqps://h/", TLSCert: junk, TLSKey: junk}, "tls_cert and tls_key"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := bus.NewAMQP(tc.cfg, "test", zap.NewNop())
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "hu") && strings.Contains(err.Error(), "sh@") {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func TestABrokerThatDoesNotAnswerIsSaidInOneSentence(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := lis.Addr().String()
	_ = lis.Close() // so that nobody listens there
	core, logs := observer.New(zapcore.DebugLevel)
	b, err := bus.NewAMQP(bus.Config{URL: "amqp://u:hush@" + addr + "/"}, "test", zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	want := "RabbitMQ at amqp://" + addr + " does not answer (connection refused): is it running, and is this its port?"
	if err := b.Ping(t.Context()); err == nil || err.Error() != want {
		t.Errorf("Ping returned %v, want %s", err, want)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := b.Publish(ctx, message("a")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Publish returned %v", err)
	}
	if err := b.Consume(ctx, "kvmeter.samples.0", 1, nil); err != nil {
		t.Errorf("Consume returned %v", err)
	}
	all := logs.All()
	if len(all) != 1 || fmt.Sprint(all[0].ContextMap()["error"]) != want {
		t.Errorf("said %+v, want that once", all)
	}
}

func sealed(t testing.TB) bus.Message { return sealedWith(t, func(*sample.Batch) {}) }

func sealedWith(t testing.TB, change func(*sample.Batch)) bus.Message {
	t.Helper()
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r", Metadata: []byte("{}")})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<63))
	out := b.Build()
	out.ID, out.Node = sample.NewBatchID(time.Unix(1_800_000_000, 0)), "node-1"
	change(out)
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.Encode(nil, out)
	if err != nil {
		t.Fatal(err)
	}
	return bus.Seal("samples.0", out, body, secret)
}

var secret = []byte("secret of node-1")

func opener(t testing.TB, unsigned bool) *bus.Opener {
	t.Helper()
	dec, err := sample.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	return &bus.Opener{Keys: sample.Keys{"node-1": secret}, AllowUnsigned: unsigned, Decoder: dec}
}

func TestOpen(t *testing.T) {
	good := sealed(t)
	for name, tc := range map[string]struct {
		change   func(m *bus.Message)
		unsigned bool
		want     error // nil: opens
		reason   string
	}{
		"a signed batch opens":                              {func(*bus.Message) {}, false, nil, ""},
		"a signed batch opens where unsigned ones do":       {func(*bus.Message) {}, true, nil, ""},
		"an unsigned batch opens where that is allowed":     {func(m *bus.Message) { m.HMAC, m.KeyID = "", "" }, true, nil, ""},
		"an unsigned batch is refused else":                 {func(m *bus.Message) { m.HMAC, m.KeyID = "", "" }, false, sample.ErrUnsigned, "unsigned"},
		"a bad signature is refused even where none is due": {func(m *bus.Message) { m.HMAC = "00" }, true, sample.ErrBadSignature, "bad_signature"},
		"an unknown key is refused":                         {func(m *bus.Message) { m.KeyID = "node-2" }, false, sample.ErrUnknownKey, "unknown_key"},
		"garbage is refused":                                {func(m *bus.Message) { m.Body = []byte("x"); m.HMAC = sample.Sign(secret, m.Body) }, false, sample.ErrMalformed, "malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			m := good
			tc.change(&m)
			b, err := opener(t, tc.unsigned).Open(&m)
			if !errors.Is(err, tc.want) || (b == nil) != (tc.want != nil) {
				t.Errorf("Open returned %v, %v; want error %v", b, err, tc.want)
			}
			if tc.want != nil && bus.Reason(err) != tc.reason {
				t.Errorf("reason %q, want %q", bus.Reason(err), tc.reason)
			}
		})
	}
	for name, tc := range map[string]struct {
		change   func(*sample.Batch)
		relay    bool
		unsigned bool
		want     error
	}{
		"a node speaks for itself":                          {func(b *sample.Batch) { b.Gaps = []sample.Gap{{Meter: "*", Resource: "*", Node: "node-1"}} }, false, false, nil},
		"a node speaks for no other":                        {func(b *sample.Batch) { b.Node = "node-2" }, false, false, bus.ErrWrongNode},
		"a relay does neither":                              {func(b *sample.Batch) { b.Node = "node-2" }, true, false, bus.ErrWrongNode},
		"a node sends nothing that another measured":        {func(b *sample.Batch) { b.Of = "node-2" }, false, false, bus.ErrWrongNode},
		"a node tells of no other's gaps":                   {func(b *sample.Batch) { b.Gaps = []sample.Gap{{Meter: "*", Resource: "*", Node: "node-2"}} }, false, false, bus.ErrWrongNode},
		"a relay tells of others' gaps":                     {func(b *sample.Batch) { b.Gaps = []sample.Gap{{Meter: "*", Resource: "*", Node: "node-2"}} }, true, false, nil},
		"a node gives no ids":                               {func(b *sample.Batch) { b.IDs = make([]string, b.Len()) }, false, false, bus.ErrWrongNode},
		"a relay gives ids":                                 {func(b *sample.Batch) { b.IDs = make([]string, b.Len()) }, true, false, nil},
		"everybody gives ids where unsigned ones are taken": {func(b *sample.Batch) { b.IDs = make([]string, b.Len()) }, false, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			o := opener(t, tc.unsigned)
			if tc.relay {
				o.Relays = []string{"node-1"}
			}
			m := sealedWith(t, func(b *sample.Batch) {
				tc.change(b)
				for i := range b.IDs {
					b.IDs[i] = fmt.Sprint(i)
				}
			})
			m.KeyID = "node-1"
			if _, err := o.Open(&m); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
	m := good
	m.ID = "other"
	if _, err := opener(t, false).Open(&m); err == nil || bus.Reason(err) != "other" {
		t.Errorf("another message id: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	m := sealed(f)
	f.Add(m.ContentType, m.ContentEncoding, m.KeyID, m.HMAC, m.ID, m.Body, true)
	f.Add(m.ContentType, m.ContentEncoding, "", "", m.ID, m.Body, true)
	f.Add("application/json", "", "", "", "", []byte("{}"), false)
	signed, unsigned := opener(f, false), opener(f, true)
	f.Fuzz(func(t *testing.T, kind, encoding, key, hmac, id string, body []byte, allow bool) {
		m := bus.Message{ContentType: kind, ContentEncoding: encoding, KeyID: key, HMAC: hmac, ID: id, Body: body}
		o := signed
		if allow {
			o = unsigned
		}
		b, err := o.Open(&m)
		if err != nil {
			if bus.Reason(err) == "" {
				t.Errorf("no reason for %v", err)
			}
			return
		}
		if b.Check() != nil || b.ID.String() != id {
			t.Errorf("opened %+v", b)
		}
		if !allow && (key != "node-1" || hmac != "" && !bytes.EqualFold([]byte(hmac), []byte(sample.Sign(secret, body)))) {
			t.Errorf("opened with key %q and signature %q", key, hmac)
		}
	})
}

func BenchmarkLocal(b *testing.B) {
	l := bus.NewLocal(1, zap.NewNop())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- l.Consume(ctx, "kvmeter.samples.0", 100, func(_ context.Context, ds []*bus.Delivery) error {
			for _, d := range ds {
				d.Ack()
			}
			return nil
		})
	}()
	m := message("a")
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Publish(ctx, m); err != nil {
			b.Fatal(err)
		}
	}
	cancel()
	<-ended
}
