//go:build lab

package bpf_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/test/tap"
)

// ways are the two ways to attach.
var ways = map[string]bpf.TCXOptions{
	"tcx":    {Sizes: true, Drops: true},
	"clsact": {Sizes: true, Drops: true, Clsact: true},
}

func loadTCX(t testing.TB, opts bpf.TCXOptions) *bpf.TCX {
	t.Helper()
	x, err := bpf.LoadTCX(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := x.Close(); err != nil {
			t.Error(err)
		}
	})
	return x
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// traffic returns what was counted of each NIC.
func traffic(t testing.TB, x *bpf.TCX) map[uint32]bpf.NICTraffic {
	t.Helper()
	all := map[uint32]bpf.NICTraffic{}
	must(t, x.Read(func(id uint32, n *bpf.NICTraffic) {
		got := *n
		got.Drops = append([]uint64(nil), n.Drops...)
		all[id] = got
	}))
	return all
}

func linkOf(t testing.TB, c *rtnl.Conn, index int) rtnl.Link {
	t.Helper()
	links, err := c.Read(t.Context(), nil)
	must(t, err)
	l, ok := rtnl.Find(links, index)
	if !ok {
		t.Fatalf("interface %d is not among %+v", index, links)
	}
	return l
}

func openLinks(t testing.TB) *rtnl.Conn {
	t.Helper()
	c, err := rtnl.Open()
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// sendTo sends frames out of an interface.
func sendTo(t testing.TB, index int, frames ...[]byte) {
	t.Helper()
	sock, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(sock)
	for _, f := range frames {
		must(t, unix.Sendto(sock, f, 0, &unix.SockaddrLinklayer{Ifindex: index}))
	}
}

func total(sizes [bpf.Sizes]uint64) (n uint64) {
	for _, packets := range sizes {
		n += packets
	}
	return n
}

// TestTrafficEqualsTheLinksStatistics carries TCP and UDP both ways between
// two network stacks, large packets that are left to be split among them.
func TestTrafficEqualsTheLinksStatistics(t *testing.T) {
	for name, opts := range ways {
		t.Run(name, func(t *testing.T) {
			tap.Namespace(t)
			c := openLinks(t)
			tp := tap.Add(t, "vnet0", tap.Options{Header: true})
			must(t, tap.Address("vnet0", "10.9.0.1/24"))
			x := loadTCX(t, opts)
			must(t, x.Attach())
			must(t, x.Add(7, tp.Index))
			must(t, x.Wait(time.Minute))
			guest := tap.AddGuest(t, tp, "10.9.0.2/24")

			const size = 20 << 20
			var inside net.Listener
			outside, err := net.Listen("tcp4", "10.9.0.1:0")
			must(t, err)
			defer outside.Close()
			guest.Do(t, func() (err error) {
				inside, err = net.Listen("tcp4", "10.9.0.2:0")
				return err
			})
			defer inside.Close()
			in := receive(inside)
			sent, err := net.Dial("tcp4", inside.Addr().String())
			must(t, err)
			send(t, sent, size)
			if got := <-in; got != size {
				t.Fatalf("the guest got %d bytes, want %d", got, size)
			}
			out := receive(outside)
			guest.Do(t, func() (err error) {
				sent, err = net.Dial("tcp4", outside.Addr().String())
				return err
			})
			send(t, sent, size)
			if got := <-out; got != size {
				t.Fatalf("the host got %d bytes, want %d", got, size)
			}
			datagrams(t, guest)

			before := linkOf(t, c, tp.Index)
			got := settled(t, x, c, tp.Index)[7]
			after := linkOf(t, c, tp.Index)
			if before.TxDropped != 0 {
				t.Fatalf("the tap's queue dropped %d packets", before.TxDropped)
			}
			want := rtnl.Link{
				Index:     tp.Index,
				RxPackets: got.Outgoing.Packets, RxBytes: got.Outgoing.Bytes,
				TxPackets: got.Incoming.Packets, TxBytes: got.Incoming.Bytes,
			}
			if after != want {
				t.Errorf("the link counted %+v\nand %s     %+v", after, name, want)
			}
			for way, n := range map[string]bpf.Traffic{"incoming": got.Incoming, "outgoing": got.Outgoing} {
				t.Logf("%s: %d packets, %d segments, %d bytes", way, n.Packets, n.Segments, n.Bytes)
				// The MSS is 1460 or, with time stamps, 1448.
				if least, most := uint64(size/1460), uint64(size/1448)+n.Packets; n.Segments < least || n.Segments > most {
					t.Errorf("%s: got %d segments of %d packets, want %d to %d", way, n.Segments, n.Packets, least, most)
				}
				if n.Packets >= n.Segments {
					t.Errorf("%s: got %d packets and %d segments: none was left to be split", way, n.Packets, n.Segments)
				}
				if total(n.Sizes) != n.Packets {
					t.Errorf("%s: sizes of %d packets, want %d", way, total(n.Sizes), n.Packets)
				}
			}
		})
	}
}

// settled reads once nothing passes the interface any more.
func settled(t testing.TB, x *bpf.TCX, c *rtnl.Conn, index int) map[uint32]bpf.NICTraffic {
	t.Helper()
	last := linkOf(t, c, index)
	for {
		time.Sleep(50 * time.Millisecond)
		now := linkOf(t, c, index)
		if now == last {
			return traffic(t, x)
		}
		last = now
	}
}

// receive counts the bytes of a connection.
func receive(l net.Listener) <-chan int64 {
	got := make(chan int64, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- -1
			return
		}
		n, _ := io.Copy(io.Discard, c)
		c.Close()
		got <- n
	}()
	return got
}

func send(t testing.TB, c net.Conn, size int) {
	t.Helper()
	_, err := c.Write(make([]byte, size))
	must(t, err)
	must(t, c.Close())
}

// datagrams sends 500 of 1,000 bytes to the guest, and it sends each back.
func datagrams(t testing.TB, guest *tap.Guest) {
	t.Helper()
	var inside *net.UDPConn
	guest.Do(t, func() (err error) {
		inside, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 9, 0, 2)})
		return err
	})
	defer inside.Close()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := inside.ReadFromUDP(buf)
			if err != nil {
				return
			}
			_, _ = inside.WriteToUDP(buf[:n], from)
		}
	}()
	c, err := net.Dial("udp4", inside.LocalAddr().String())
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	buf := make([]byte, 2048)
	for range 500 {
		_, err := c.Write(make([]byte, 1000))
		must(t, err)
		_, err = c.Read(buf)
		must(t, err)
	}
}

// tagged is a frame with a VLAN tag, which the kernel takes out of a packet.
func tagged(size int) []byte {
	b := tap.Frame(size)
	copy(b[12:], []byte{0x81, 0x00, 0x00, 0x05, 0x88, 0xb5})
	return b
}

func TestSizesQueuesAndTags(t *testing.T) {
	for name, opts := range ways {
		t.Run(name, func(t *testing.T) {
			tap.Namespace(t)
			c := openLinks(t)
			x := loadTCX(t, opts)
			must(t, x.Attach())
			many := tap.Add(t, "vnet0", tap.Options{Queues: 4})
			other := tap.Add(t, "vnet1", tap.Options{})
			must(t, x.Add(1, many.Index))
			must(t, x.Add(2, other.Index))
			must(t, x.Wait(time.Minute))
			// From the guest, each queue its own size; then to it.
			var bytes uint64
			for i, q := range many.Queues {
				for range 10 * (i + 1) {
					_, err := q.Write(tap.Frame(60 << i))
					must(t, err)
					bytes += 60 << i
				}
			}
			_, err := many.Queues[3].Write(tagged(1504))
			must(t, err)
			sendTo(t, many.Index, tap.Frame(64), tap.Frame(127), tap.Frame(128), tagged(104))
			for _, q := range many.Queues {
				must(t, q.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
				for err == nil {
					_, err = q.Read(make([]byte, 2048))
				}
				err = nil
			}
			got := settled(t, x, c, many.Index)
			want := bpf.NICTraffic{
				Incoming: bpf.Traffic{Packets: 4, Segments: 4, Bytes: 64 + 127 + 128 + 104},
				Outgoing: bpf.Traffic{Packets: 101, Segments: 101, Bytes: bytes + 1504},
			}
			for exponent, packets := range map[int]uint64{5: 10, 6: 20, 7: 30, 8: 40, 10: 1} {
				want.Outgoing.Sizes[exponent-bpf.SizeExponent(0)] = packets
			}
			want.Incoming.Sizes[6-bpf.SizeExponent(0)] = 3
			want.Incoming.Sizes[7-bpf.SizeExponent(0)] = 1
			n := got[1]
			if n.Incoming != want.Incoming || n.Outgoing != want.Outgoing {
				t.Errorf("got  %+v\nwant %+v", n, want)
			}
			l := linkOf(t, c, many.Index)
			if l.TxBytes != n.Incoming.Bytes || l.RxBytes != n.Outgoing.Bytes {
				t.Errorf("the link counted %+v, %s %+v", l, name, n)
			}
			if n := got[2]; n.Incoming != (bpf.Traffic{}) || n.Outgoing != (bpf.Traffic{}) {
				t.Errorf("the other NIC has %+v", n)
			}
		})
	}
}

func TestANICComesAndGoes(t *testing.T) {
	for name, opts := range ways {
		t.Run(name, func(t *testing.T) {
			tap.Namespace(t)
			x := loadTCX(t, opts)
			first := tap.Add(t, "vnet0", tap.Options{})
			must(t, x.Add(1, first.Index))
			write(t, first, 1)
			if got := traffic(t, x); len(got) != 0 {
				t.Errorf("got %+v before the programs were attached", got)
			}
			must(t, x.Attach())
			must(t, x.Wait(time.Minute))
			write(t, first, 2)
			must(t, x.Detach())
			must(t, x.Wait(time.Minute))
			write(t, first, 4)
			must(t, x.Attach())
			must(t, x.Attach())
			must(t, x.Wait(time.Minute))
			write(t, first, 8)
			if got := traffic(t, x)[1].Outgoing.Packets; got != 10 {
				t.Errorf("got %d packets, want the 2 and 8 while attached", got)
			}
			if err := x.Add(2, first.Index); err == nil {
				t.Error("an interface was followed twice")
			}
			index := first.Index
			first.Remove()
			must(t, x.Add(3, index+1))
			if err := x.Wait(time.Minute); !errors.Is(err, bpf.ErrNoInterface) {
				t.Errorf("got %v, want %v", err, bpf.ErrNoInterface)
			}
			again := tap.Add(t, "vnet0", tap.Options{})
			if again.Index != index+1 {
				t.Fatalf("the new tap has index %d, want %d", again.Index, index+1)
			}
			must(t, x.Add(3, index+1))
			must(t, x.Wait(time.Minute))
			write(t, again, 16)
			got := traffic(t, x)
			if len(got) != 2 || got[1].Outgoing.Packets != 10 || got[3].Outgoing.Packets != 16 {
				t.Errorf("got %+v, want 10 packets of the first and 16 of the second", got)
			}
			must(t, x.Remove(1))
			must(t, x.Remove(99))
			must(t, x.Wait(time.Minute))
			if got := traffic(t, x); len(got) != 1 || got[3].Outgoing.Packets != 16 {
				t.Errorf("got %+v, want the second only", got)
			}
		})
	}
}

func write(t testing.TB, tp *tap.Tap, frames int) {
	t.Helper()
	for range frames {
		_, err := tp.Queues[0].Write(tap.Frame(100))
		must(t, err)
	}
}

func TestNoMoreNICsThanFit(t *testing.T) {
	tap.Namespace(t)
	x := loadTCX(t, bpf.TCXOptions{})
	_, limit := x.Followed()
	for i := range limit {
		must(t, x.Add(uint32(i+1), i+1000))
	}
	if err := x.Add(9999, 1); !errors.Is(err, bpf.ErrTooManyNICs) {
		t.Errorf("got %v, want %v", err, bpf.ErrTooManyNICs)
	}
	must(t, x.Remove(1))
	must(t, x.Add(9999, 1))
}

func TestDropsHaveTheirReasons(t *testing.T) {
	tap.Namespace(t)
	x := loadTCX(t, bpf.TCXOptions{Drops: true})
	reasons, err := x.Reasons()
	if err != nil {
		t.Skipf("the kernel does not tell reasons: %v", err)
	}
	must(t, x.Attach())
	unread := tap.Add(t, "vnet0", tap.Options{})
	other := tap.Add(t, "vnet1", tap.Options{})
	must(t, x.Add(1, unread.Index))
	must(t, x.Add(2, other.Index))
	must(t, x.Wait(time.Minute))
	c := openLinks(t)
	// A guest that takes nothing: its queue is full at some time.
	frames := make([][]byte, 3000)
	for i := range frames {
		frames[i] = tap.Frame(100)
	}
	sendTo(t, unread.Index, frames...)
	got := traffic(t, x)
	l := linkOf(t, c, unread.Index)
	byName := map[string]uint64{}
	var sum uint64
	for i, n := range got[1].Drops {
		if n > 0 {
			byName[reasons[i]] = n
			sum += n
		}
	}
	t.Logf("link: %+v; dropped: %v", l, byName)
	if l.TxDropped == 0 || sum != l.TxDropped || byName["full_ring"] != sum {
		t.Errorf("got %v, want %d for a full_ring", byName, l.TxDropped)
	}
	if got := got[1].Incoming.Packets - l.TxPackets; got != 3000 {
		t.Errorf("%d packets to the guest were counted before its queue, want 3000", got)
	}
	if len(got[2].Drops) != 0 {
		t.Errorf("the other NIC has drops: %v", got[2].Drops)
	}
}

func TestReadingTrafficAllocatesNothing(t *testing.T) {
	tap.Namespace(t)
	x := loadTCX(t, bpf.TCXOptions{Sizes: true, Drops: true})
	must(t, x.Attach())
	for i := range 10 {
		must(t, x.Add(uint32(i+1), tap.Add(t, fmt.Sprintf("vnet%d", i), tap.Options{}).Index))
	}
	must(t, x.Wait(time.Minute))
	var packets uint64
	emit := func(_ uint32, n *bpf.NICTraffic) { packets += n.Incoming.Packets }
	if n := testing.AllocsPerRun(100, func() { must(t, x.Read(emit)) }); n != 0 {
		t.Errorf("got %v allocations a read, want 0", n)
	}
}

func TestCapabilitiesThatPacketsNeed(t *testing.T) {
	all := []uintptr{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN}
	hasTCX := !loadTCX(t, bpf.TCXOptions{}).NeedsNetAdmin()
	noAdmin := fmt.Sprintf("%v: run as root, or grant it to the service (AmbientCapabilities=)\n", bpf.ErrNoNetAdmin)
	for name, tc := range map[string]struct {
		way  string
		caps []uintptr
		want string
	}{
		"CAP_NET_ADMIN is needed to load":                      {"tcx", all[:2], "load tcx: " + noAdmin},
		"with TCX no capability is needed to follow":           {"tcx", all, "5 packets\n"},
		"with clsact CAP_NET_ADMIN is needed again, and named": {"clsact", all, "attach to interface 1: " + noAdmin},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.way == "tcx" && len(tc.caps) == 3 && !hasTCX {
				t.Skip("the kernel lacks TCX")
			}
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), childEnv+"="+tc.way)
			cmd.SysProcAttr = &syscall.SysProcAttr{
				Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
				AmbientCaps: tc.caps,
				Cloneflags:  unix.CLONE_NEWNET,
			}
			if got, err := cmd.CombinedOutput(); err != nil || string(got) != tc.want {
				t.Errorf("got %v:\n%swant:\n%s", err, got, tc.want)
			}
		})
	}
}

// beUnprivilegedTCX loads the programs, drops every capability, and follows lo.
func beUnprivilegedTCX(opts bpf.TCXOptions) int {
	const lo = 1
	x, err := bpf.LoadTCX(opts)
	if err == nil {
		err = tap.Up("lo")
	}
	if err == nil {
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&none[0])), 0)
		if errno != 0 {
			err = errno
		}
	}
	if err == nil {
		err = errors.Join(x.Attach(), x.Add(1, lo))
	}
	if err == nil {
		err = x.Wait(time.Minute)
	}
	if err == nil {
		err = sendDatagrams(5)
	}
	if err == nil {
		err = x.Read(func(_ uint32, n *bpf.NICTraffic) { fmt.Println(n.Outgoing.Packets, "packets") })
	}
	if err != nil {
		fmt.Println(err)
	}
	return 0
}

// sendDatagrams sends so many over lo.
func sendDatagrams(n int) error {
	to, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer to.Close()
	for range n {
		if _, err := to.WriteTo([]byte("x"), to.LocalAddr()); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkCostTCXAttach is how long attaching to and detaching from a tap take,
// most of which the kernel waits.
func BenchmarkCostTCXAttach(b *testing.B) {
	for name, opts := range ways {
		b.Run(name, func(b *testing.B) {
			tap.Namespace(b)
			x := loadTCX(b, opts)
			must(b, x.Attach())
			var taps []*tap.Tap
			for i := range 50 {
				taps = append(taps, tap.Add(b, fmt.Sprintf("vnet%d", i), tap.Options{}))
			}
			start := time.Now()
			for i, tp := range taps {
				must(b, x.Add(uint32(i+1), tp.Index))
			}
			must(b, x.Wait(time.Minute))
			add := time.Since(start)
			start = time.Now()
			must(b, x.Detach())
			must(b, x.Wait(time.Minute))
			b.ReportMetric(float64(add.Microseconds())/50, "µs/attach")
			b.ReportMetric(float64(time.Since(start).Microseconds())/50, "µs/detach")
		})
	}
}
