//go:build lab

package tcx

import (
	"net"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/test/lab"
)

// nicStats is what libvirt says of a guest's first NIC.
func nicStats(t *testing.T, g *lab.Guest) bpf.NICTraffic {
	t.Helper()
	s, err := g.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return bpf.NICTraffic{
		Incoming: bpf.Traffic{Packets: s["net.0.rx.pkts"], Bytes: s["net.0.rx.bytes"]},
		Outgoing: bpf.Traffic{Packets: s["net.0.tx.pkts"], Bytes: s["net.0.tx.bytes"]},
	}
}

func TestAGuestsPacketsAreThoseThatLibvirtCounts(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	if err := l.StartLibvirt(ctx); err != nil {
		t.Fatal(err)
	}
	g, err := l.StartGuest(ctx, lab.GuestSpec{})
	if err != nil {
		t.Fatal(err)
	}
	h := open(t, Options{})
	tap, err := net.InterfaceByName(g.NICs()[0].Tap)
	if err != nil {
		t.Fatal(err)
	}
	before := nicStats(t, g)
	if err := h.Attach(); err != nil {
		t.Fatal(err)
	}
	if err := h.Follow([]collectors.Target{{ID: 1, NICs: []collectors.TargetNIC{{ID: 2, Index: tap.Index}}}}); err != nil {
		t.Fatal(err)
	}
	h.settle(t)
	if quiet := nicStats(t, g); quiet.Incoming != before.Incoming || quiet.Outgoing != before.Outgoing {
		t.Fatalf("the guest is not quiet: %+v after %+v", quiet, before)
	}
	const out, in = 20000, 5000
	if answer, err := g.Exec(ctx, "udp 20000 1000"); err != nil {
		t.Fatal(err, answer)
	}
	if err := g.SendUDP(ctx, in, 300); err != nil {
		t.Fatal(err)
	}
	var got bpf.NICTraffic
	for range 50 {
		// The guest has given its frames to QEMU, which takes its time.
		if err := h.tcx.Read(func(_ uint32, n *bpf.NICTraffic) { got = *n }); err != nil {
			t.Fatal(err)
		}
		if got.Outgoing.Packets >= out {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	after := nicStats(t, g)
	t.Logf("libvirt: %+v; hook: %+v, %+v", after, got.Incoming, got.Outgoing)
	for way, c := range map[string][3]bpf.Traffic{
		"incoming": {before.Incoming, after.Incoming, got.Incoming},
		"outgoing": {before.Outgoing, after.Outgoing, got.Outgoing},
	} {
		packets, bytes := c[1].Packets-c[0].Packets, c[1].Bytes-c[0].Bytes
		if c[2].Packets != packets || c[2].Bytes != bytes || c[2].Segments != packets {
			t.Errorf("%s: libvirt counted %d packets and %d bytes, the hook %+v", way, packets, bytes, c[2])
		}
	}
	if got.Outgoing.Packets != out || got.Outgoing.Bytes != out*1042 || got.Incoming.Packets != in || got.Incoming.Bytes != in*342 {
		t.Errorf("got %+v and %+v, want %d packets out of 1042 bytes and %d in of 342", got.Outgoing, got.Incoming, out, in)
	}
}
