package tcp

import (
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"testing"

	"github.com/vmihailenco/msgpack/v5"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// read returns the resource of the next sample, as sg-core frames it.
func read(t *testing.T, conn net.Conn) string {
	t.Helper()
	var length [8]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.LittleEndian.Uint64(length[:]))
	if _, err := io.ReadFull(conn, body); err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := msgpack.Unmarshal(body, &m); err != nil || len(m) != 16 || m["publisher_id"] != "node1" {
		t.Fatalf("got %v, %v", m, err)
	}
	return m["resource_id"].(string)
}

func TestASampleAfterTheConnectionBrokeGoesOverANewOne(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse("tcp://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop(), Name: "node1"})
	if err != nil {
		t.Fatal(err)
	}
	publish := func(resource string) error {
		b := sample.NewBuilder()
		b.Row(sample.Row{Resource: resource})
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1))
		return p.Publish(t.Context(), []publisher.Part{{Batch: b.Build()}})
	}
	for _, names := range [][]string{{"a", "b"}, {"c"}, {"d"}} {
		done := make(chan net.Conn, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				t.Error(err)
			}
			done <- conn
		}()
		for _, name := range names {
			if err := publish(name); err != nil {
				t.Fatal(err)
			}
		}
		conn := <-done
		for _, name := range names {
			if got := read(t, conn); got != name {
				t.Errorf("got %s, want %s", got, name)
			}
		}
		if err := conn.Close(); err != nil { // the publisher finds out by itself
			t.Error(err)
		}
	}
	_ = l.Close()
	if err := publish("e"); err == nil {
		t.Error("no error where nobody listens")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
