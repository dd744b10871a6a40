package udp

import (
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

func TestEachSampleIsADatagram(t *testing.T) {
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	u, err := url.Parse("udp://" + l.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop(), Name: "node1", TelemetrySecret: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r1", Source: "openstack", Metadata: []byte(`{"a": {"b": [1, null]}}`)})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<64-1))
	b.Row(sample.Row{Resource: "too long", Metadata: []byte(`{"x": "` + strings.Repeat("x", 70_000) + `"}`)})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(2))
	b.Row(sample.Row{Resource: "r3"})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(3))
	err = p.Publish(t.Context(), []publisher.Part{{Batch: b.Build()}})
	var lost *publisher.Lost
	if !errors.As(err, &lost) || lost.N != 1 || !strings.Contains(err.Error(), "message too long") {
		t.Errorf("got %v, want one that is too long", err)
	}
	buf := make([]byte, 1<<16)
	for _, want := range []struct {
		resource string
		volume   any
		fields   int
	}{{"r1", uint64(1<<64 - 1), 15}, {"r3", int8(3), 15}} {
		if err := l.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, _, err := l.ReadFrom(buf)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := msgpack.Unmarshal(buf[:n], &m); err != nil {
			t.Fatal(err)
		}
		if m["resource_id"] != want.resource || m["counter_volume"] != want.volume || len(m) != want.fields || len(m["message_signature"].(string)) != 64 {
			t.Errorf("got %v (%T)", m, m["counter_volume"])
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
