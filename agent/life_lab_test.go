//go:build lab

package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/boot"
)

// guestEnv makes the test binary a process like a QEMU instead, for as long as
// its value says.
const guestEnv = "KVMETER_AGENT_GUEST"

func init() {
	if life, err := time.ParseDuration(os.Getenv(guestEnv)); err == nil {
		beGuest(life)
		os.Exit(0)
	}
}

// beGuest has threads of all classes. One of them exits before the process does.
func beGuest(life time.Duration) {
	for _, name := range []string{"CPU 0/KVM", "CPU 1/KVM", "IO iothread1"} {
		go func() {
			nameThread(name)
			for {
				burn(time.Millisecond)
				time.Sleep(time.Duration(5+rand.IntN(10)) * time.Millisecond)
			}
		}()
	}
	go func() {
		nameThread("worker")
		burn(2 * time.Millisecond)
	}()
	time.Sleep(life)
}

func nameThread(name string) {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData(name+"\x00"))), 0, 0, 0); err != nil {
		panic(err)
	}
}

func burn(d time.Duration) {
	for until := clock(unix.CLOCK_THREAD_CPUTIME_ID) + d; clock(unix.CLOCK_THREAD_CPUTIME_ID) < until; {
	}
}

// host starts guests that the test waits for itself.
type host struct {
	t    *testing.T
	qemu string // a copy of the test
	mu   sync.Mutex
	used map[string]time.Duration // by UUID: what wait4 reported
}

func newHost(t *testing.T) *host {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	h := &host{t: t, qemu: filepath.Join(t.TempDir(), "qemu-system-x86_64"), used: map[string]time.Duration{}}
	must(t, os.WriteFile(h.qemu, self, 0o755))
	return h
}

// guest returns one that ends by itself after life.
func (h *host) guest(uuid, name string, life time.Duration) *exec.Cmd {
	cmd := exec.Command(h.qemu, "-name", "guest="+strings.ReplaceAll(name, ",", ",,")+",debug-threads=on", "-uuid", uuid)
	cmd.Env = append(os.Environ(), guestEnv+"="+life.String(), "GOMAXPROCS=2")
	return cmd
}

// run has a guest live and notes what it used.
func (h *host) run(uuid string, cmd *exec.Cmd) error {
	if err := cmd.Run(); cmd.ProcessState == nil {
		return fmt.Errorf("guest %s: %w", uuid, err)
	}
	r := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.used[uuid] = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	return nil
}

// lifeAgent is an agent that polls so seldom that it has to rely on its hooks.
type lifeAgent struct {
	*Agent
	r    *recorder
	life *bpf.Life
	stop func()
}

func startLifeAgent(t *testing.T, r *recorder, interval time.Duration, adapt ...func(*Config, *bpf.LifeOptions)) *lifeAgent {
	t.Helper()
	cfg := testConfig()
	cfg.Interval, cfg.Pins = interval, ""
	var opts bpf.LifeOptions
	for _, f := range adapt {
		f(&cfg, &opts)
	}
	opts.Pins = cfg.Pins
	log := zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel))
	readers, _ := all.Usage(log, false)
	life, err := bpf.OpenLife(opts)
	must(t, err)
	if cfg.Pins != "" {
		must(t, life.Unkept())
	}
	a, err := New(cfg, Deps{Log: log, Publisher: r, Usage: readers, Life: life, Registry: prometheus.NewRegistry()})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	l := &lifeAgent{Agent: a, r: r, life: life}
	l.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, life.Close(), all.Close(readers)); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(l.stop)
	return l
}

// awaitEnds waits until the ends of all guests of the host are accounted.
func (l *lifeAgent) awaitEnds(h *host) {
	h.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		finals, missing := l.r.finals(h.t), 0
		for uuid := range h.used {
			if finals[uuid] == nil {
				missing++
			}
		}
		if missing == 0 {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("the ends of %d of %d guests were not accounted", missing, len(h.used))
		}
	}
}

// finals returns the samples of domains' ends, by UUID and meter.
func (r *recorder) finals(t *testing.T) map[string]map[string]sample.Sample {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	finals := map[string]map[string]sample.Sample{}
	for _, s := range r.all {
		if s.Origin != sample.Free {
			continue
		}
		of := finals[s.Resource]
		if of == nil {
			of = map[string]sample.Sample{}
			finals[s.Resource] = of
		}
		if _, ok := of[s.Name]; ok {
			t.Errorf("%s of %s was accounted twice", s.Name, s.Resource)
		}
		of[s.Name] = s.Sample
	}
	return finals
}

// check holds what was accounted of each guest against what wait4 reported.
func (h *host) check(r *recorder) (worst time.Duration) {
	t := h.t
	t.Helper()
	finals := r.finals(t)
	wrong := 0
	for uuid, used := range h.used {
		f, ok := finals[uuid]
		if !ok {
			t.Errorf("guest %s is missing", uuid)
			continue
		}
		process := f[sample.CPUProcess.Name]
		off := time.Duration(process.Volume.Bits) - used
		if worst = max(worst, off, -off); max(off, -off) > 100*time.Microsecond+used/10_000 {
			if wrong++; wrong < 10 {
				t.Errorf("guest %s: got %v, wait4 reported %v", uuid, time.Duration(process.Volume.Bits), used)
			}
		}
		sum := uint64(0)
		for _, m := range []*sample.Meter{sample.CPU, sample.CPUEmulator, sample.CPUIOThread, sample.CPUWorker, sample.CPUVhost, sample.CPUExited} {
			sum += f[m.Name].Volume.Bits
		}
		if sum != process.Volume.Bits {
			t.Errorf("guest %s: the classes add up to %d, the process to %d", uuid, sum, process.Volume.Bits)
		}
		for _, m := range []*sample.Meter{sample.CPU, sample.CPUWait, sample.DiskHostReadBytes} {
			if _, ok := f[m.Name]; !ok {
				t.Errorf("guest %s: no %s", uuid, m.Name)
			}
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.gaps {
		if _, ok := h.used[g.Resource]; ok && g.Reason != endedUnknown {
			t.Errorf("gap: %+v", g)
		}
	}
	return worst
}

// quantile reads a histogram: the bound below which that part of what was
// observed lies.
func quantile(t *testing.T, h prometheus.Histogram, part float64) time.Duration {
	t.Helper()
	var m dto.Metric
	must(t, h.Write(&m))
	for _, b := range m.GetHistogram().GetBucket() {
		if float64(b.GetCumulativeCount()) >= part*float64(m.GetHistogram().GetSampleCount()) {
			return time.Duration(b.GetUpperBound() * 1e9)
		}
	}
	return time.Hour
}

func inVM() bool { return os.Getenv(boot.GuestVariable) != "" }

func TestOfAThousandGuestsBetweenTwoPollsNoneIsMissing(t *testing.T) {
	const atOnce = 50
	guests := 1000
	if inVM() {
		guests = 10
	}
	r := newRecorder(t)
	a := startLifeAgent(t, r, 10*time.Second)
	h := newHost(t)
	var group errgroup.Group
	group.SetLimit(atOnce)
	for n := range guests {
		life := 200*time.Millisecond + time.Duration(rand.Int64N(int64(1800*time.Millisecond)))
		group.Go(func() error { return h.run(guestUUID(n), h.guest(guestUUID(n), fmt.Sprint("guest ", n), life)) })
	}
	must(t, group.Wait())
	a.awaitEnds(h)
	a.stop()
	worst := h.check(r)
	s := a.metrics.life
	t.Logf("%d guests, at most %v off wait4; %+v", guests, worst, s)
	if s.NotFollowed+s.ExecsLost+s.EndsLost+s.NotHeld+s.Misses > 0 {
		t.Errorf("hooks lost something: %+v", s)
	}
}

func TestAnAgentKnowsADomainSoonAfterItsExec(t *testing.T) {
	r := newRecorder(t)
	a := startLifeAgent(t, r, 10*time.Second)
	h := newHost(t)
	guests := 200
	if inVM() {
		guests = 10
	}
	for n := range guests {
		must(t, h.run(guestUUID(n), h.guest(guestUUID(n), "a guest", 10*time.Millisecond)))
	}
	a.awaitEnds(h)
	a.stop()
	h.check(r)
	p50, p99 := quantile(t, a.metrics.execLatency, 0.5), quantile(t, a.metrics.execLatency, 0.99)
	t.Logf("from exec to known: p50 at most %v, p99 at most %v", p50, p99)
	if p99 > time.Second {
		t.Errorf("p99 is over %v", p99)
	}
}

func TestRealGuestsAreAccountedToTheirEnd(t *testing.T) {
	if inVM() {
		t.Skip(boot.NoLab)
	}
	// A ROM that burns from its first instruction on.
	rom := make([]byte, 64<<10)
	copy(rom[len(rom)-16:], "\xeb\xfe")
	path := filepath.Join(t.TempDir(), "rom")
	must(t, os.WriteFile(path, rom, 0o644))

	r := newRecorder(t)
	a := startLifeAgent(t, r, 10*time.Second)
	h := newHost(t)
	const guests = 30
	var group errgroup.Group
	group.SetLimit(4)
	for n := range guests {
		group.Go(func() error {
			cmd := exec.Command("qemu-system-x86_64", "-accel", "kvm", "-accel", "tcg", "-machine", "pc", "-m", "64", "-nodefaults",
				"-display", "none", "-bios", path, "-name", fmt.Sprintf("guest=rom%d,debug-threads=on", n), "-uuid", guestUUID(n))
			timer := time.AfterFunc(200*time.Millisecond+rand.N(1800*time.Millisecond), func() { _ = cmd.Process.Kill() })
			defer timer.Stop()
			return h.run(guestUUID(n), cmd)
		})
	}
	must(t, group.Wait())
	a.awaitEnds(h)
	a.stop()
	worst := h.check(r)
	for uuid, f := range r.finals(t) {
		// One that was ended at once may have had no vCPU yet.
		if process, vcpu := f[sample.CPUProcess.Name].Volume.Bits, f[sample.CPU.Name].Volume.Bits; vcpu == 0 && process > 1e8 || vcpu > process {
			t.Errorf("guest %s: its vCPU has %d of %d ns", uuid, vcpu, process)
		}
	}
	t.Logf("%d guests, at most %v off wait4", guests, worst)
}

func TestADomainThatIsPolledIsAccountedToItsEndAsWell(t *testing.T) {
	r := newRecorder(t)
	a := startLifeAgent(t, r, 100*time.Millisecond)
	h := newHost(t)
	must(t, h.run(guestUUID(1), h.guest(guestUUID(1), "a \"b\" 'c'\n\t,\xff", 1500*time.Millisecond)))
	a.awaitEnds(h)
	a.stop()
	h.check(r)
	last := r.finals(t)[guestUUID(1)][sample.CPUProcess.Name]
	polled := 0
	for _, s := range r.all {
		if s.Name != last.Name || s.Resource != last.Resource {
			continue
		}
		if s.Incarnation != last.Incarnation || s.Time > last.Time || s.Volume.Bits > last.Volume.Bits || string(s.Metadata) != string(last.Metadata) {
			t.Errorf("got %+v, then at the end %+v", s, last)
		}
		polled++
	}
	if polled < 5 {
		t.Errorf("it was sampled %d times", polled)
	}
}

func TestADomainThatEndsWhileNoAgentRunsIsAccountedByTheNext(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mount("bpf", dir, "bpf", 0, "mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	run := t.TempDir()
	pinned := func(c *Config, _ *bpf.LifeOptions) {
		c.Pins, c.Counters = filepath.Join(dir, "kvmeter"), filepath.Join(run, "counters")
	}
	r := newRecorder(t)
	h := newHost(t)

	a := startLifeAgent(t, r, 100*time.Millisecond, pinned)
	before := h.guest(guestUUID(1), "before", 10*time.Second)
	ended := make(chan error, 1)
	go func() { ended <- h.run(guestUUID(1), before) }()
	r.await(sample.CPU, guestUUID(1), time.Time{})
	a.stop()
	must(t, before.Process.Kill())
	must(t, <-ended)
	must(t, h.run(guestUUID(2), h.guest(guestUUID(2), "between", 300*time.Millisecond)))
	after := h.guest(guestUUID(3), "after", 2*time.Second)
	go func() { ended <- h.run(guestUUID(3), after) }()

	a = startLifeAgent(t, r, 100*time.Millisecond, pinned)
	must(t, <-ended)
	a.awaitEnds(h)
	a.stop()
	h.check(r)
	files, err := filepath.Glob(filepath.Join(run, "domains", "*"))
	must(t, err)
	for _, f := range files {
		text, err := os.ReadFile(f)
		must(t, err)
		if strings.Contains(string(text), guestUUID(0)[:8]) { // the machine may have other domains
			t.Errorf("%s is left of a domain that ended: %s", f, text)
		}
	}
	// Another start must find nothing to do.
	a = startLifeAgent(t, r, 100*time.Millisecond, pinned)
	time.Sleep(300 * time.Millisecond)
	a.stop()
	h.check(r)
}

func TestAPIDThatIsGivenAgainIsAnotherDomain(t *testing.T) {
	r := newRecorder(t)
	a := startLifeAgent(t, r, 10*time.Second)
	h := newHost(t)
	first := h.guest(guestUUID(0), "first", 50*time.Millisecond)
	must(t, h.run(guestUUID(0), first))
	guests, pid := 1, 0
	for pid != first.Process.Pid && guests < 200 {
		must(t, os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, first.Process.Pid-1), 0))
		next := h.guest(guestUUID(guests), "next", time.Millisecond)
		must(t, h.run(guestUUID(guests), next))
		guests, pid = guests+1, next.Process.Pid
	}
	if pid != first.Process.Pid {
		t.Fatalf("PID %d was not given again", first.Process.Pid)
	}
	a.awaitEnds(h)
	a.stop()
	h.check(r)
	finals := r.finals(t)
	one, other := finals[guestUUID(0)][sample.CPU.Name], finals[guestUUID(guests-1)][sample.CPU.Name]
	if one.Incarnation == other.Incarnation {
		t.Errorf("both are incarnation %s", one.Incarnation)
	}
}

func TestADomainForWhichThereIsNoRoomCostsOnlyItself(t *testing.T) {
	r := newRecorder(t)
	a := startLifeAgent(t, r, 100*time.Millisecond, func(_ *Config, o *bpf.LifeOptions) { o.Processes = 64 })
	h, unseen := newHost(t), newHost(t)
	// Others take all the room but that for one, whatever else runs on the machine.
	before, err := a.life.Stats()
	must(t, err)
	other := bpf.Proc{PID: 1 << 21, StartTicks: 1}
	for err == nil {
		other.PID++
		_, err = a.life.Follow(other)
	}
	if !errors.Is(err, bpf.ErrFull) {
		t.Fatal(err)
	}
	other.PID--
	must(t, a.life.Forget(other))
	ended := make(chan error, 2)
	go func() { ended <- h.run(guestUUID(1), h.guest(guestUUID(1), "followed", 2*time.Second)) }()
	r.await(sample.CPU, guestUUID(1), time.Time{})
	go func() { ended <- unseen.run(guestUUID(2), unseen.guest(guestUUID(2), "not followed", time.Second)) }()
	r.await(sample.CPU, guestUUID(2), time.Time{}) // it is metered all the same
	must(t, <-ended)
	must(t, <-ended)
	r.awaitGap(guestUUID(2), "not counted")
	a.awaitEnds(h)
	s, err := a.life.Stats()
	if err != nil || s.NotFollowed-before.NotFollowed != 1 {
		t.Errorf("got %+v after %+v, %v, want one process not followed", s, before, err)
	}
	a.stop()
	h.check(r)
}

func TestAnEndThatNoHookSawIsAGap(t *testing.T) {
	r := newRecorder(t)
	a := startLifeAgent(t, r, 100*time.Millisecond)
	h := newHost(t)
	cmd := h.guest(guestUUID(1), "unseen", time.Minute)
	ended := make(chan error, 1)
	go func() { ended <- h.run(guestUUID(1), cmd) }()
	r.await(sample.CPU, guestUUID(1), time.Time{})
	a.mu.Lock()
	d := a.domains[cmd.Process.Pid]
	must(t, a.life.Forget(d.proc)) // as if the kernel had skipped the hook
	a.mu.Unlock()
	must(t, cmd.Process.Kill())
	must(t, <-ended)
	r.awaitGap(guestUUID(1), "not counted")
	a.stop()
	if got := value(t, a.metrics.endsUnseen); got < 1 { // the machine may have other domains
		t.Errorf("%v ends were not seen", got)
	}
	if f := r.finals(t)[guestUUID(1)]; f != nil {
		t.Errorf("it was accounted: %+v", f)
	}
}

func TestWhatIsNoGuestIsNotFollowed(t *testing.T) {
	r := newRecorder(t)
	a := startLifeAgent(t, r, 10*time.Second)
	h := newHost(t)
	cmd := exec.Command(h.qemu, "-machine", "none", "-uuid", guestUUID(1)) // libvirt asks what it can do
	cmd.Env = append(os.Environ(), guestEnv+"=1s")
	must(t, cmd.Start())
	start, err := procfs.StartTicks(cmd.Process.Pid)
	must(t, err)
	p := bpf.Proc{PID: cmd.Process.Pid, StartTicks: start}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		// The exec comes right after the start, and then the agent.
		if _, err := a.life.Lived(p); errors.Is(err, bpf.ErrNotFollowed) && value(t, a.metrics.noDomains) >= 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v is followed", p)
		}
	}
	must(t, cmd.Wait())
	must(t, h.run(guestUUID(2), h.guest(guestUUID(2), "a guest", 200*time.Millisecond)))
	a.awaitEnds(h)
	a.stop()
	h.check(r)
	if got := value(t, a.metrics.strangers); got != 0 {
		t.Errorf("%v strangers", got)
	}
	if slices.ContainsFunc(r.all, func(s arrived) bool { return s.Resource == guestUUID(1) }) {
		t.Error("what is no guest was metered")
	}
}
