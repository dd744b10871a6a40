//go:build lab

package bpf

import (
	"encoding/binary"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// empty loads a program that does nothing: what running one costs.
func empty(t testing.TB, spec *ebpf.ProgramSpec) *ebpf.Program {
	t.Helper()
	spec = spec.Copy()
	spec.Name = "empty"
	spec.Instructions = asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}
	spec.License = "GPL"
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// perRun runs a program for packets often, and returns the kernel's ns for
// one: the least of several, since others have the CPU at times.
func perRun(t testing.TB, p *ebpf.Program, packet []byte, gsoSize uint32) float64 {
	t.Helper()
	const repeat, runs = 200_000, 15
	var context [192]byte // struct __sk_buff
	binary.NativeEndian.PutUint32(context[176:], gsoSize)
	attr := progRunAttr{
		progFD:     uint32(p.FD()),
		dataSizeIn: uint32(len(packet)), dataIn: uint64(uintptr(unsafe.Pointer(&packet[0]))),
		ctxSizeIn: uint32(len(context)), ctxIn: uint64(uintptr(unsafe.Pointer(&context))),
		repeat: repeat,
	}
	var ns []uint32
	for range runs {
		_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		if errno != 0 {
			t.Fatal(errno)
		}
		ns = append(ns, attr.duration)
	}
	runtime.KeepAlive(packet)
	slices.Sort(ns)
	return float64(ns[0])
}

// tcpPacket is an Ethernet frame with IPv4 and TCP.
func tcpPacket(size int) []byte {
	b := make([]byte, size)
	b[12], b[13] = 0x08, 0x00
	b[14], b[23] = 0x45, unix.IPPROTO_TCP
	b[46] = 0x80
	return b
}

// BenchmarkCostTCX is the cost of a packet, hot. ns/packet is net of an empty
// program's.
func BenchmarkCostTCX(b *testing.B) {
	const lo = 1 // the interface of packets in a test run
	for name, tc := range map[string]struct {
		opts    TCXOptions
		follow  bool
		size    int
		gsoSize uint32
	}{
		"of another interface":                  {},
		"of a guest":                            {follow: true},
		"of a guest, with sizes":                {opts: TCXOptions{Sizes: true}, follow: true},
		"of a guest that leaves it to be split": {follow: true, size: 3000, gsoSize: 1448},
	} {
		b.Run(name, func(b *testing.B) {
			t, err := LoadTCX(tc.opts)
			if err != nil {
				b.Fatal(err)
			}
			defer t.Close()
			// As many as there may be: a full map is the slowest.
			for i := range maxNICs - 1 {
				if err := t.Add(uint32(i+2), i+1000); err != nil {
					b.Fatal(err)
				}
			}
			if tc.follow {
				if err := t.Add(1, lo); err != nil {
					b.Fatal(err)
				}
			}
			spec := &ebpf.ProgramSpec{Type: ebpf.SchedCLS}
			floor := empty(b, spec)
			packet := tcpPacket(max(tc.size, 64))
			for range b.N {
				none := perRun(b, floor, packet, tc.gsoSize)
				in := perRun(b, t.objs.FromGuest, packet, tc.gsoSize)
				out := perRun(b, t.objs.ToGuest, packet, tc.gsoSize)
				b.ReportMetric((in+out)/2-none, "ns/packet")
				b.ReportMetric(none, "ns/empty")
			}
		})
	}
}

// statistics makes the kernel measure how long programs run.
func statistics(t testing.TB) {
	t.Helper()
	s, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
}

// runs returns how often a program ran, and for how long.
func runs(t testing.TB, p *ebpf.Program) (n uint64, d time.Duration) {
	t.Helper()
	s, err := p.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return s.RunCount, s.Runtime
}

// netCost makes events happen, with an empty program attached to the same
// point, and returns the ns of one run of prog above that one's: the median of
// several rounds.
func netCost(t testing.TB, prog *ebpf.Program, spec *ebpf.ProgramSpec, happen func()) float64 {
	t.Helper()
	floor := empty(t, spec)
	l, err := link.AttachTracing(link.TracingOptions{Program: floor})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	statistics(t)
	var net []float64
	for range 15 {
		n0, d0 := runs(t, prog)
		e0, f0 := runs(t, floor)
		happen()
		n1, d1 := runs(t, prog)
		e1, f1 := runs(t, floor)
		if n1 == n0 || e1 == e0 {
			t.Fatalf("the programs ran %d and %d times", n1-n0, e1-e0)
		}
		net = append(net, float64(d1-d0)/float64(n1-n0)-float64(f1-f0)/float64(e1-e0))
	}
	slices.Sort(net)
	return net[len(net)/2]
}

// BenchmarkCostDropOfAnother is the cost of a packet that the host drops, of an
// interface that is not a guest's.
func BenchmarkCostDropOfAnother(b *testing.B) {
	t, err := LoadTCX(TCXOptions{Drops: true})
	if err != nil {
		b.Fatal(err)
	}
	defer t.Close()
	if len(t.reasons) == 0 {
		b.Skipf("the kernel does not tell reasons: %v", t.dropsErr)
	}
	for i := range maxNICs {
		if err := t.Add(uint32(i+1), i+1000); err != nil {
			b.Fatal(err)
		}
	}
	if err := t.Attach(); err != nil {
		b.Fatal(err)
	}
	// Nobody listens there: each is dropped, and answered by ICMP.
	c, err := net.Dial("udp4", "127.0.0.1:9")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	spec := &ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "kfree_skb"}
	for range b.N {
		b.ReportMetric(netCost(b, t.objs.Dropped, spec, func() {
			for range 20_000 {
				_, _ = c.Write([]byte("x"))
			}
		}), "ns/drop")
	}
}

// pingPong returns a function that has the CPU switch n times from the calling
// thread, which it names, to another process and back.
func pingPong(t testing.TB, name string, n int) func() {
	t.Helper()
	runtime.LockOSThread() // for good: it is renamed and kept on a CPU
	if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData(name+"\x00"))), 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	for cpu, found := len(set)*64-1, false; cpu >= 0; cpu-- {
		if found {
			set.Clear(cpu)
		}
		found = found || set.IsSet(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	echo := exec.Command("cat") // inherits the CPU
	in, err := echo.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := echo.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := echo.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = echo.Wait()
	})
	to, from := int(in.(*os.File).Fd()), int(out.(*os.File).Fd()) // blocking from here on
	buf := make([]byte, 1)
	return func() {
		for range n {
			if _, err := unix.Write(to, buf); err != nil {
				t.Fatal(err)
			}
			if _, err := unix.Read(from, buf); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// BenchmarkCostSwitch is the cost of a switch from a thread of a domain to another
// process or back, and of one between others.
func BenchmarkCostSwitch(b *testing.B) {
	for name, tc := range map[string]struct {
		thread string
		watch  bool
	}{
		"of others":                {"CPU 0/KVM", false},
		"of a vCPU thread":         {"CPU 0/KVM", true},
		"of a domain's other ones": {"worker", true},
	} {
		b.Run(name, func(b *testing.B) {
			r, err := LoadRunQueue()
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			for i := range maxDomains - 1 {
				if err := r.Add(uint32(i+2), Proc{PID: 1<<21 + i*67}); err != nil {
					b.Fatal(err)
				}
			}
			if tc.watch {
				if err := r.Add(1, Proc{PID: os.Getpid()}); err != nil {
					b.Fatal(err)
				}
			}
			if err := r.Attach(); err != nil {
				b.Fatal(err)
			}
			happen := pingPong(b, tc.thread, 20_000)
			spec := &ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "sched_switch"}
			for range b.N {
				b.ReportMetric(netCost(b, r.objs.Switched, spec, happen), "ns/switch")
			}
		})
	}
}
