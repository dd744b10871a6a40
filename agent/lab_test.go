//go:build lab

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// recorder is a bus that keeps the samples of some guests, and checks that no
// counter goes back.
type recorder struct {
	t    *testing.T
	mu   sync.Mutex
	news *sync.Cond
	all  []arrived
	gaps []sample.Gap
	last map[string]sample.Sample
	dec  *sample.Decoder
}

type arrived struct {
	sample.Sample
	at time.Time
}

func newRecorder(t *testing.T) *recorder {
	dec, err := sample.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{t: t, dec: dec, last: map[string]sample.Sample{}}
	r.news = sync.NewCond(&r.mu)
	return r
}

func (r *recorder) Publish(_ context.Context, ms ...bus.Message) error {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range ms {
		b, err := r.dec.Decode(m.Body)
		if err != nil {
			r.t.Error(err)
			continue
		}
		r.gaps = append(r.gaps, b.Gaps...)
		for s := range b.Samples() {
			r.all = append(r.all, arrived{s, now})
			key := fmt.Sprint(s.Name, s.Resource, s.Incarnation)
			if old, ok := r.last[key]; ok && s.Kind == sample.Cumulative && s.Volume.Bits < old.Volume.Bits {
				r.t.Errorf("%s of %s went back from %s to %s", s.Name, s.Resource, old.Volume, s.Volume)
			}
			r.last[key] = s
		}
	}
	r.news.Broadcast()
	return nil
}

// await returns the first sample of the meter and resource that was made after
// a time.
func (r *recorder) await(meter *sample.Meter, resource string, after time.Time) arrived {
	r.t.Helper()
	found := make(chan arrived, 1)
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	defer context.AfterFunc(ctx, r.news.Broadcast)()
	go func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		defer close(found)
		for i := 0; ctx.Err() == nil; {
			for ; i < len(r.all); i++ {
				if s := r.all[i]; s.Name == meter.Name && s.Resource == resource && s.Time > after.UnixMicro() {
					found <- s
					return
				}
			}
			r.news.Wait()
		}
	}()
	s, ok := <-found
	if !ok {
		r.t.Fatalf("no sample of %s of %s within a minute", meter.Name, resource)
	}
	return s
}

// awaitGap waits for a gap of the resource whose reason has the words.
func (r *recorder) awaitGap(resource, words string) {
	r.t.Helper()
	r.awaitGapAfter(resource, words, time.Time{})
}

// awaitGapAfter waits for one that ends after a time.
func (r *recorder) awaitGapAfter(resource, words string, after time.Time) {
	r.t.Helper()
	for range 600 {
		r.mu.Lock()
		for _, g := range r.gaps {
			if g.Resource == resource && strings.Contains(g.Reason, words) && g.To > after.UnixMicro() {
				r.mu.Unlock()
				return
			}
		}
		r.mu.Unlock()
		time.Sleep(100 * time.Millisecond)
	}
	r.t.Fatalf("no gap of %s with %q within a minute; there are %+v", resource, words, r.gaps)
}

// startAgent meters the lab twice a second, QEMU included.
func startAgent(t *testing.T, l *lab.Lab, r *recorder, adapt ...func(*Config, *Deps)) *Agent {
	t.Helper()
	polling := filepath.Join(t.TempDir(), "polling.yaml")
	var named []string
	for _, m := range sample.Catalogue {
		named = append(named, m.Name)
	}
	text := "sources: [{name: all, interval: 500ms, meters: [" + strings.Join(named, ", ") + "]}]"
	if err := os.WriteFile(polling, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	log := zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel))
	readers, notes := all.Usage(log, false)
	links, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Node, cfg.Polling, cfg.Spread, cfg.Socket = "lab", polling, false, filepath.Join(t.TempDir(), "agent.sock")
	cfg.Counters, cfg.Spool.Path = filepath.Join(t.TempDir(), "counters"), filepath.Join(t.TempDir(), "spool")
	cfg.Libvirt, cfg.LibvirtTimeout = Sockets{l.ReadOnlySocket()}, 2*time.Second
	cfg.CrosscheckInterval = time.Second
	cfg.IPMI.Device = ""
	deps := Deps{Log: log, Publisher: r, Usage: readers, Links: links, Notes: notes}
	for _, f := range adapt {
		f(&cfg, &deps)
	}
	a, err := New(cfg, deps)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, all.Close(readers), links.Close()); err != nil {
			t.Error(err)
		}
	})
	return a
}

// started returns when a process was started, to the clock tick.
func started(t *testing.T, pid int) time.Time {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	ticks, _, err := procfs.ParseStat(data)
	must(t, err)
	return time.Now().Add(time.Duration(ticks)*clockTick - uptime())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLab(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	r := newRecorder(t)
	startAgent(t, l, r)
	g, err := l.StartGuest(ctx, lab.GuestSpec{Disks: []lab.Disk{{}, {Format: "qcow2"}}})
	must(t, err)
	k, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn", VCPUs: 2})
	must(t, err)
	begin := time.Time{}

	t.Run("the first samples of a guest leave soon after its start", func(t *testing.T) {
		for _, g := range []*lab.Guest{g, k} {
			first := r.await(sample.CPU, g.UUID, begin)
			took := first.at.Sub(started(t, g.PID()))
			t.Logf("%s: %s", g.Name, took)
			if took > 15*time.Second { // 1 s where nothing else runs
				t.Errorf("the first sample of %s left %s after its start", g.Name, took)
			}
			if first.Project == "" || !strings.Contains(string(first.Metadata), `"display_name"`) {
				t.Errorf("the first sample does not say whose guest it is: %+v", first)
			}
		}
	})

	t.Run("CPU of a paused guest is the kernel's figure", func(t *testing.T) {
		// libvirt's questions make QEMU work even while its guest is paused: ask
		// the kernel before and after.
		for _, g := range []*lab.Guest{g, k} {
			must(t, g.Pause(ctx))
			best := int64(1 << 62)
			for range 10 {
				before, err := bpf.ProcessCPUClock(g.PID())
				must(t, err)
				p := r.await(sample.CPUProcess, g.UUID, time.Now())
				after, err := bpf.ProcessCPUClock(g.PID())
				must(t, err)
				off := outside(p.Volume.Bits, before, after)
				if off < 0 {
					off = -off
				}
				if best = min(best, off); best == 0 {
					break
				}
			}
			must(t, g.Resume(ctx))
			if best != 0 {
				t.Errorf("%s: cpu.process is %d ns off the process's CPU clock", g.Name, best)
			}
		}
	})

	t.Run("what a guest does is counted exactly", func(t *testing.T) {
		vda, vdb := g.UUID+"-vda", g.UUID+"-vdb"
		nic := g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap
		type counter struct {
			meter    *sample.Meter
			resource string
			want     uint64
		}
		counters := []counter{
			{sample.DiskWriteRequests, vda, 512},
			{sample.DiskWriteBytes, vda, 512 * 65536},
			{sample.DiskReadRequests, vda, 1000},
			{sample.DiskReadBytes, vda, 1000 * 4096},
			{sample.DiskFlushRequests, vda, 1},
			{sample.DiskWriteRequests, vdb, 16},
			{sample.DiskWriteBytes, vdb, 16 * 4096},
			{sample.NetOutPackets, nic, 2000},
			{sample.NetOutBytes, nic, 2000 * 142},
			{sample.NetInPackets, nic, 2000},
			{sample.NetInBytes, nic, 2000 * 142},
		}
		read := func() (all []uint64) {
			at := time.Now()
			for _, c := range counters {
				all = append(all, r.await(c.meter, c.resource, at).Volume.Bits)
			}
			return all
		}
		clock := func() uint64 {
			ns, err := bpf.ProcessCPUClock(g.PID())
			must(t, err)
			return ns
		}
		before := read()
		outer0 := clock()
		cpu0 := r.await(sample.CPUProcess, g.UUID, time.Now())
		inner0 := clock()
		host0 := r.await(sample.DiskHostWriteBytes, g.UUID, time.Now())
		for _, command := range []string{"write 65536 512", "read 4096 1000", "flush", "write 4096 16 vdb", "udp 2000 100", "cpusec 2"} {
			if out, err := g.Exec(ctx, command); err != nil {
				t.Fatalf("%s: %v %s", command, err, out)
			}
		}
		must(t, g.SendUDP(ctx, 2000, 100))
		after := read()
		inner1 := clock()
		cpu1 := r.await(sample.CPUProcess, g.UUID, time.Now())
		outer1 := clock()
		host1 := r.await(sample.DiskHostWriteBytes, g.UUID, time.Now())
		for i, c := range counters {
			if got := after[i] - before[i]; got != c.want {
				t.Errorf("%s of %s: %d, want %d", c.meter.Name, c.resource, got, c.want)
			}
		}
		if ours := cpu1.Volume.Bits - cpu0.Volume.Bits; ours < inner1-inner0 || ours > outer1-outer0 {
			t.Errorf("CPU: %d ns, the kernel counted %d ns within and %d ns around it", ours, inner1-inner0, outer1-outer0)
		}
		if got := host1.Volume.Bits - host0.Volume.Bits; got < 512*65536 {
			t.Errorf("the host wrote %d bytes, the guest %d", got, 512*65536)
		}
	})

	t.Run("libvirt's figure lies within ours to its own resolution", func(t *testing.T) {
		check := r.await(sample.CheckCPUProcess.Difference, k.UUID, time.Now())
		if off := int64(check.Volume.Bits); off > 0 || off < -tick {
			t.Errorf("libvirt's cpu.time is %d ns outside of our readings", off)
		}
	})

	t.Run("a burning KVM guest uses its vCPUs", func(t *testing.T) {
		a := r.await(sample.CPU, k.UUID, time.Now())
		b := r.await(sample.CPU, k.UUID, time.UnixMicro(a.Time))
		wait0, wait1 := r.await(sample.CPUWait, k.UUID, time.UnixMicro(a.Time-1)), r.await(sample.CPUWait, k.UUID, time.UnixMicro(b.Time-1))
		wall := float64(b.Time-a.Time) * 1e3
		got := float64(b.Volume.Bits-a.Volume.Bits) + float64(wait1.Volume.Bits-wait0.Volume.Bits)
		if got < 1.5*wall || got > 2.5*wall {
			t.Errorf("run and wait are %.2f vCPUs, want about 2", got/wall)
		}
	})

	plug := func(t *testing.T, target string) {
		t.Helper()
		conn, err := l.Connect(ctx)
		must(t, err)
		image := filepath.Join(l.Dir(), target+".raw")
		must(t, os.WriteFile(image, make([]byte, 1<<20), 0o666))
		must(t, conn.DomainAttachDeviceFlags(g.Domain(), `<disk type='file' device='disk'><driver name='qemu' type='raw'/>
			<source file='`+image+`'/><target dev='`+target+`' bus='virtio'/><serial>c1d2</serial></disk>`, 1))
	}
	t.Run("a disk that is plugged in is metered at once", func(t *testing.T) {
		plug(t, "vdc")
		at := time.Now()
		s := r.await(sample.DiskReadBytes, g.UUID+"-vdc", at)
		if took := s.at.Sub(at); took > 30*time.Second {
			t.Errorf("its first sample left after %s", took)
		}
	})

	t.Run("a libvirtd that is killed costs only what libvirt says", func(t *testing.T) {
		old := r.await(sample.DiskReadBytes, g.UUID+"-vda", begin)
		must(t, l.KillLibvirt(ctx))
		killed := time.Now()
		for range 3 {
			s := r.await(sample.CPU, g.UUID, time.Now())
			if s.Project != old.Project || s.Project == "" {
				t.Errorf("project %q, was %q", s.Project, old.Project)
			}
			r.await(sample.NetInBytes, g.Name+"-"+g.UUID+"-"+g.NICs()[0].Tap, time.Now())
		}
		r.awaitGap("*", "libvirt does not answer")
		must(t, l.StartLibvirt(ctx))
		plug(t, "vdd") // most likely before the agent has connected again
		r.await(sample.DiskReadBytes, g.UUID+"-vdd", killed)
		again := r.await(sample.DiskReadBytes, g.UUID+"-vda", killed.Add(time.Second))
		if again.Incarnation != old.Incarnation {
			t.Error("the disk has another incarnation")
		}
	})

	t.Run("a guest that is started again counts from zero", func(t *testing.T) {
		old := r.await(sample.CPU, k.UUID, time.Now())
		must(t, k.PowerOff(ctx))
		must(t, k.Start(ctx))
		for at := time.Now(); ; {
			s := r.await(sample.CPU, k.UUID, at)
			if s.Incarnation != old.Incarnation {
				break
			}
			at = time.UnixMicro(s.Time)
		}
	})

	t.Run("a guest that is destroyed costs only itself", func(t *testing.T) {
		must(t, k.Destroy(ctx))
		r.awaitGap(k.UUID, "ended")
		r.await(sample.CPU, g.UUID, time.Now())
		r.await(sample.DiskReadBytes, g.UUID+"-vda", time.Now())
	})
}

func TestLabWhatHangs(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	stuck, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM})
	must(t, err)
	well, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM})
	must(t, err)
	r := newRecorder(t)
	startAgent(t, l, r)
	r.await(sample.DiskReadBytes, stuck.UUID+"-hda", time.Time{})
	// stop stops a process, and returns what continues it.
	stop := func(t *testing.T, pid int) func() {
		must(t, syscall.Kill(pid, syscall.SIGSTOP))
		return sync.OnceFunc(func() {
			if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
				t.Error(err)
			}
		})
	}
	// steady checks that nobody waits for what hangs.
	steady := func(t *testing.T) {
		t.Helper()
		for range 5 {
			at := time.Now()
			for _, g := range []*lab.Guest{stuck, well} {
				s := r.await(sample.CPUProcess, g.UUID, at)
				if late := s.at.Sub(at); late > 3*time.Second {
					t.Errorf("cpu.process of %s came after %s", g.Name, late)
				}
			}
		}
	}

	t.Run("a QEMU that hangs costs its own disks only", func(t *testing.T) {
		resume := stop(t, stuck.PID())
		defer resume()
		r.awaitGap(stuck.UUID+"-hda", "")
		steady(t)
		at := time.Now()
		r.await(sample.DiskReadBytes, well.UUID+"-hda", at)
		r.await(sample.DiskReadBytes, well.UUID+"-hda", time.Now())
		resume()
		r.await(sample.DiskReadBytes, stuck.UUID+"-hda", time.Now())
	})

	t.Run("a libvirtd that hangs costs what it would have said", func(t *testing.T) {
		pid, err := l.LibvirtPID()
		must(t, err)
		resume := stop(t, pid)
		defer resume()
		r.awaitGap("*", "libvirt does not answer")
		steady(t)
		resume()
		r.await(sample.DiskReadBytes, well.UUID+"-hda", time.Now())
		r.await(sample.DiskReadBytes, stuck.UUID+"-hda", time.Now())
	})
}

// TestDropCapabilities runs itself in a process of its own, since what is
// dropped does not come back.
func TestDropCapabilities(t *testing.T) {
	const child = "KVMETER_TEST_DROP"
	if os.Getenv(child) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestDropCapabilities$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	readers, notes := all.Usage(zap.NewNop(), false)
	if len(readers) < 2 {
		t.Fatalf("BPF cannot be used: %q", notes)
	}
	cfg := testConfig()
	cfg.Libvirt = Sockets{"/nowhere"}
	life, err := bpf.OpenLife(bpf.LifeOptions{})
	must(t, err)
	a, err := New(cfg, Deps{Log: zap.NewNop(), Publisher: newBus(), Usage: readers, Life: life})
	must(t, err)
	must(t, a.DropCapabilities(t.Context()))
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	must(t, err)
	for _, path := range tasks {
		data, err := os.ReadFile(path)
		must(t, err)
		for line := range strings.Lines(string(data)) {
			for _, set := range []string{"CapEff:", "CapPrm:", "CapInh:", "CapAmb:"} {
				if value, ok := strings.CutPrefix(line, set); ok && strings.Trim(value, "0\t\n") != "" {
					t.Errorf("%s: %s", path, line)
				}
			}
			if line == "NoNewPrivs:\t0\n" {
				t.Errorf("%s: %s", path, line)
			}
		}
	}
	var out [1]bpf.Usage
	must(t, readers[0].Read(t.Context(), []bpf.Proc{{PID: os.Getppid()}}, out[:]))
	if out[0].Err != nil || out[0].Process == 0 || !out[0].HasIO {
		t.Errorf("after dropping: %+v", out[0])
	}
	start, err := procfs.StartTicks(os.Getppid())
	must(t, err)
	parent := bpf.Proc{PID: os.Getppid(), StartTicks: start}
	if _, err := life.Follow(parent); err != nil {
		t.Errorf("after dropping: %v", err)
	}
	if _, err := life.Lived(parent); !errors.Is(err, bpf.ErrAlive) {
		t.Errorf("after dropping: got %v, want %v", err, bpf.ErrAlive)
	}
	must(t, life.Forget(parent))
}
