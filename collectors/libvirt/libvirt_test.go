package libvirt

import (
	stdcmp "cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/collectors"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// listen serves each connection to a socket with handle until the test ends.
func listen(t *testing.T, handle func(net.Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() { handle(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return path
}

func swallow(c net.Conn) { _, _ = io.Copy(io.Discard, c) }

func TestDialGivesUp(t *testing.T) {
	for name, tc := range map[string]struct {
		handle func(net.Conn)
		want   string
	}{
		"on a daemon that never answers": {swallow, "does not answer within"},
		"on one that hangs up":           {func(c net.Conn) { _ = c.Close() }, "libvirt"},
		"on something that is no libvirt": {func(c net.Conn) {
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			swallow(c)
		}, "libvirt"},
		"on a packet shorter than its head": {func(c net.Conn) {
			_, _ = c.Write([]byte{0, 0, 0, 5, 1, 2, 3, 4, 5})
			swallow(c)
		}, "libvirt"},
		"on an answer that is cut off": {func(c net.Conn) {
			_, _ = c.Write([]byte{0, 0, 0, 64, 1, 2, 3})
			_ = c.Close()
		}, "libvirt"},
	} {
		t.Run(name, func(t *testing.T) {
			path := listen(t, tc.handle)
			start := time.Now()
			k, err := dial(t.Context(), []string{path}, 300*time.Millisecond)
			if err == nil {
				k.close()
				t.Fatal("dial succeeded")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q, want one with %q", err, tc.want)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("dial took %s", took)
			}
		})
	}
}

func TestDialSaysWhichSocketsAreMissing(t *testing.T) {
	_, err := dial(t.Context(), []string{"/nowhere/a", "/nowhere/b"}, time.Second)
	if want := "there is no socket /nowhere/a or /nowhere/b (is libvirtd or virtqemud there? one in a container may have its socket elsewhere, which the setting libvirt names)"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %q", err, want)
	}
}

func TestAHungDaemonCostsLibvirtsNumbersOnly(t *testing.T) {
	path := listen(t, swallow)
	c := New(zaptest.NewLogger(t), Options{Sockets: []string{path}, Host: "h", Timeout: 100 * time.Millisecond})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { c.Run(ctx); close(done) }()
	<-c.Changes()
	if err := c.Err(); !errors.Is(err, errTimeout) {
		t.Errorf("Err() = %v, want %v", err, errTimeout)
	}
	if _, err := c.Stats(ctx, "c0ffee00-1111-4222-8333-444455556666", collectors.CPUStatistics); !errors.Is(err, errTimeout) {
		t.Errorf("Stats() = %v, want %v", err, errTimeout)
	}
	cancel()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("Run did not end with its context")
	}
}

func TestPacketConnPassesPacketsOnWhole(t *testing.T) {
	server, client := net.Pipe()
	defer func() { _ = server.Close() }()
	var sent []byte
	for _, n := range []int{28, 40, 1000} {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(i)
		}
		binary.BigEndian.PutUint32(p, uint32(n))
		sent = append(sent, p...)
	}
	go func() {
		for _, b := range sent { // one by one: heads come in parts
			_, _ = server.Write([]byte{b})
		}
		_ = server.Close()
	}()
	got, err := io.ReadAll(&packetConn{Conn: client, dead: make(chan struct{})})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sent, got); diff != "" {
		t.Errorf("read (-sent +got):\n%s", diff)
	}
}

func param(name string, v any) golibvirt.TypedParam {
	return golibvirt.TypedParam{Field: name, Value: golibvirt.TypedParamValue{I: v}}
}

func TestGuestStats(t *testing.T) {
	disk := func(i, name string, n uint64) []golibvirt.TypedParam {
		b := "block." + i
		return []golibvirt.TypedParam{
			param(b+".name", name), param(b+".path", "/x"), param(b+".backingIndex", uint32(1)),
			param(b+".rd.reqs", n), param(b+".rd.bytes", n+1), param(b+".rd.times", n+9),
			param(b+".wr.reqs", n+2), param(b+".wr.bytes", n+3), param(b+".fl.reqs", n+4),
		}
	}
	stats := func(name string, n uint64) collectors.DiskStats {
		return collectors.DiskStats{Device: name, ReadRequests: n, ReadBytes: n + 1, WriteRequests: n + 2, WriteBytes: n + 3, FlushRequests: n + 4, ReadNs: 9 + n}
	}
	for name, tc := range map[string]struct {
		params []golibvirt.TypedParam
		groups collectors.Groups // 0: CPU and disks
		want   collectors.GuestStats
		err    error
	}{
		"two disks and the CPU time": {
			params: append(append([]golibvirt.TypedParam{param("cpu.time", uint64(7)), param("block.count", uint32(2))}, disk("0", "vda", 10)...), disk("1", "vdb", 1<<63)...),
			want:   collectors.GuestStats{CPUTime: 7, HasCPU: true, Disks: []collectors.DiskStats{stats("vda", 10), stats("vdb", 1<<63)}},
		},
		"a disk that libvirt could not ask for is left out": {
			params: append([]golibvirt.TypedParam{param("block.1.name", "vdb"), param("block.1.path", "/y")}, disk("0", "vda", 10)...),
			want:   collectors.GuestStats{Disks: []collectors.DiskStats{stats("vda", 10)}},
		},
		"a busy monitor is an error": {
			params: []golibvirt.TypedParam{param("block.count", uint32(1)), param("block.0.name", "vda")},
			err:    ErrBusy,
		},
		"a domain without disks has none": {
			params: []golibvirt.TypedParam{param("cpu.time", uint64(7)), param("block.count", uint32(0))},
			want:   collectors.GuestStats{CPUTime: 7, HasCPU: true},
		},
		"fields of other types and names are ignored": {
			params: []golibvirt.TypedParam{
				param("cpu.time", int32(-7)), param("block", uint64(1)), param("block.0", uint64(1)), param("x", "y"),
				param("vcpu.current", uint32(2)), param("vcpu.0.state", int32(1)), param("vcpu.0.halted", true), param("net.count", uint32(1)), param("net.0.rx.bytes", "7"),
			},
		},
		"vCPUs, those that are not under KVM without exits": {
			params: []golibvirt.TypedParam{
				param("vcpu.0.time", uint64(30e6)), param("vcpu.0.wait", uint64(9)), param("vcpu.0.delay", uint64(5)), param("vcpu.0.exits.sum", uint64(77)),
				param("vcpu.1.time", uint64(40e6)), param("vcpu.0.io_exits.sum", uint64(3)),
			},
			want: collectors.GuestStats{VCPUs: []collectors.VCPUStats{
				{Time: 30e6, HasTime: true, Delay: 5, HasDelay: true, Exits: 77, HasExits: true}, {Time: 40e6, HasTime: true},
			}},
		},
		"memory and hardware counters": {
			params: []golibvirt.TypedParam{
				param("balloon.current", uint64(8)), param("balloon.available", uint64(7)), param("balloon.unused", uint64(3)), param("balloon.usable", uint64(4)),
				param("balloon.swap_in", uint64(1)), param("balloon.swap_out", uint64(2)), param("balloon.rss", uint64(9)),
				param("perf.cpu_cycles", uint64(11)), param("perf.cmt", uint64(12)),
			},
			groups: collectors.MemoryStatistics,
			want: collectors.GuestStats{
				Memory: collectors.MemoryStats{
					Asked: true, Available: 7, HasAvailable: true, Unused: 3, HasUnused: true, Usable: 4, HasUsable: true, SwapIn: 1, SwapOut: 2, HasSwap: true,
				},
				Perf: map[string]uint64{"cpu_cycles": 11, "cmt": 12},
			},
		},
		"a guest without a balloon driver": {
			params: []golibvirt.TypedParam{param("balloon.current", uint64(8)), param("balloon.rss", uint64(9))},
			groups: collectors.MemoryStatistics,
			want:   collectors.GuestStats{Memory: collectors.MemoryStats{Asked: true}},
		},
		"memory of a busy monitor": {
			params: []golibvirt.TypedParam{param("balloon.current", uint64(8)), param("balloon.maximum", uint64(8))},
			groups: collectors.MemoryStatistics,
			err:    ErrBusy,
		},
		"NICs in the guest's direction, and none without a name": {
			params: []golibvirt.TypedParam{
				param("net.count", uint32(2)), param("net.0.name", "tap1"), param("net.1.rx.bytes", uint64(9)),
				param("net.0.rx.bytes", uint64(1)), param("net.0.rx.pkts", uint64(2)), param("net.0.rx.errs", uint64(3)), param("net.0.rx.drop", uint64(4)),
				param("net.0.tx.bytes", uint64(5)), param("net.0.tx.pkts", uint64(6)), param("net.0.tx.errs", uint64(7)), param("net.0.tx.drop", uint64(8)),
			},
			want: collectors.GuestStats{NICs: []collectors.NICStats{{
				Device: "tap1", InBytes: 1, InPackets: 2, InErrors: 3, InDrops: 4, OutBytes: 5, OutPackets: 6, OutErrors: 7, OutDrops: 8,
			}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := guestStats(tc.params, stdcmp.Or(tc.groups, collectors.CPUStatistics|collectors.DiskStatistics))
			if !errors.Is(err, tc.err) {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if diff := cmp.Diff(tc.want, got); err == nil && diff != "" {
				t.Errorf("stats (-want +got):\n%s", diff)
			}
		})
	}
}

// FuzzGuestStats: whatever libvirt says, there is no more than it has named, and
// everything has its name.
func FuzzGuestStats(f *testing.F) {
	f.Add("cpu.time", "vcpu.0.time", "block.0.name", "net.0.name", uint64(7), "vda", uint8(0))
	f.Add("block.0.rd.reqs", "block.1.name", "vcpu..time", "net.0.rx.bytes", uint64(1)<<63, "", uint8(1))
	f.Fuzz(func(t *testing.T, a, b, c, d string, count uint64, text string, kinds uint8) {
		var params []golibvirt.TypedParam
		for i, name := range []string{a, b, c, d} {
			for _, v := range [][]any{{count, text}, {text, count}, {int32(count), nil}, {count}}[kinds>>(2*i)&3] {
				params = append(params, golibvirt.TypedParam{Field: name, Value: golibvirt.TypedParamValue{I: v}})
			}
		}
		s, err := guestStats(params, collectors.CPUStatistics|collectors.VCPUStatistics|collectors.DiskStatistics|collectors.NICStatistics)
		if err != nil && !errors.Is(err, ErrBusy) {
			t.Errorf("error %v", err)
		}
		if n := len(s.Disks) + len(s.NICs) + len(s.VCPUs); n > len(params) {
			t.Errorf("%d things of %d parameters", n, len(params))
		}
		for _, k := range s.Disks {
			if k.Device == "" {
				t.Error("a disk without a name")
			}
		}
		for _, k := range s.NICs {
			if k.Device == "" {
				t.Error("a NIC without a name")
			}
		}
		for _, v := range s.VCPUs {
			if !v.HasTime && !v.HasDelay && !v.HasExits {
				t.Error("a vCPU of which nothing is known")
			}
		}
	})
}

func TestWhoADomainWasIsKnownForAWhile(t *testing.T) {
	c := New(zaptest.NewLogger(t), Options{})
	def := &collectors.Definition{UUID: "a", Project: "p"}
	c.off["a"] = def
	c.undefined("a")
	c.undefined("a") // as after two events
	c.undefined("b") // of which nothing was known
	if got := c.Last("a"); got != def || c.off["a"] != nil {
		t.Errorf("got %+v, want %+v, which is no domain any more", got, def)
	}
	if got := c.Last("b"); got != nil {
		t.Errorf("of a domain that was never known there is %+v", got)
	}
	c.former["a"] = former{def, time.Now().Add(-2 * keepFormer)}
	c.undefined("b")
	if got := c.Last("a"); got != nil {
		t.Errorf("long afterwards it is still %+v", got)
	}
}
