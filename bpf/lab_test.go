//go:build lab

package bpf_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/test/lab"
)

type reader interface {
	Origin() string
	Read(ctx context.Context, procs []bpf.Proc, out []bpf.Usage) error
	VCPUs(i int) []bpf.VCPUUsage
	Stats() bpf.Stats
	Close() error
}

// readers returns one of each that the kernel can run.
func readers(t testing.TB) []reader {
	t.Helper()
	var all []reader
	walk, err := bpf.LoadWalk()
	switch {
	case errors.Is(err, bpf.ErrNoTaskIterator):
		t.Logf("without walk: %v", err)
	case err != nil:
		t.Fatal(err)
	default:
		all = append(all, walk)
	}
	iter, err := bpf.LoadIter()
	if err != nil {
		t.Fatal(err)
	}
	all = append(all, iter, procfs.New(zap.NewNop()))
	t.Cleanup(func() {
		for _, r := range all {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return all
}

func read(t testing.TB, r reader, procs ...bpf.Proc) []bpf.Usage {
	t.Helper()
	out := make([]bpf.Usage, len(procs))
	if err := r.Read(t.Context(), procs, out); err != nil {
		t.Fatalf("%s: %v", r.Origin(), err)
	}
	return out
}

// ok reads one process that must be readable.
func ok(t testing.TB, r reader, p bpf.Proc) bpf.Usage {
	t.Helper()
	u := read(t, r, p)[0]
	if u.Err != nil {
		t.Fatalf("%s: %v", r.Origin(), u.Err)
	}
	return u
}

func sum(u bpf.Usage) uint64 {
	total := u.Exited
	for c := range bpf.Classes {
		total += u.Run[c] + u.Slice[c]
	}
	return total
}

func sorted(v []bpf.VCPUUsage) []bpf.VCPUUsage {
	v = slices.Clone(v)
	slices.SortFunc(v, func(x, y bpf.VCPUUsage) int {
		return cmp.Or(cmp.Compare(x.Index, y.Index), cmp.Compare(x.TID, y.TID))
	})
	return v
}

const qemuLike = "*CPU 0/KVM,*CPU 1/TCG,*IO iothread1,.IO mon_iothread,*worker,*vhost-4711,!worker,!worker,.call_rcu"

func TestReadersAgreeToTheNanosecondOnAStoppedProcess(t *testing.T) {
	c := startChild(t, qemuLike)
	time.Sleep(300 * time.Millisecond)
	c.stop(t)
	clock, err := bpf.ProcessCPUClock(c.proc.PID)
	if err != nil {
		t.Fatal(err)
	}
	var first bpf.Usage
	var vcpus []bpf.VCPUUsage
	for i, r := range readers(t) {
		u := ok(t, r, c.proc)
		if u.Process != clock || sum(u) != clock {
			t.Errorf("%s: process %d ns, sum of its classes %d ns, its CPU clock %d ns", r.Origin(), u.Process, sum(u), clock)
		}
		if i == 0 {
			first, vcpus = u, sorted(r.VCPUs(0))
		}
		if u != first {
			t.Errorf("%s differs:\ngot  %+v\nwant %+v", r.Origin(), u, first)
		}
		if got := sorted(r.VCPUs(0)); !slices.Equal(got, vcpus) {
			t.Errorf("%s's vCPUs differ:\ngot  %+v\nwant %+v", r.Origin(), got, vcpus)
		}
	}
	if first.VCPUs != 2 || len(vcpus) != 2 || vcpus[0].Index != 0 || vcpus[1].Index != 1 {
		t.Errorf("got %d vCPU threads, %+v, want 2", first.VCPUs, vcpus)
	}
	var whole bpf.VCPUUsage
	for _, v := range vcpus {
		whole.Run += v.Run
		whole.Wait += v.Wait
		whole.Switches += v.Switches
	}
	if whole.Run != first.Run[bpf.VCPU] || whole.Wait != first.Wait[bpf.VCPU] || whole.Switches != first.Switches[bpf.VCPU] {
		t.Errorf("vCPUs %+v don't add up to their class in %+v", vcpus, first)
	}
	for class := range bpf.Classes {
		if first.Run[class] == 0 || first.Switches[class] == 0 {
			t.Errorf("no time or no switches in class %s", class)
		}
	}
	if !first.HasIO || !first.HasWait || !first.HasSplit {
		t.Errorf("not all is there: %+v", first)
	}
	if exited := uint64(2 * 20 * time.Millisecond); first.Exited < exited {
		t.Errorf("two threads worked for 20 ms and exited; got %d ns", first.Exited)
	}
}

func TestBytesOfExitedThreadsCount(t *testing.T) {
	file := t.TempDir() + "/file"
	const size = 1 << 20
	var fs unix.Statfs_t
	if err := unix.Statfs(t.TempDir(), &fs); err != nil {
		t.Fatal(err)
	}
	least, most := uint64(size), uint64(2*size)
	if fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC {
		least, most = 0, 0 // no device is written to
	}
	var before []bpf.Usage
	self := bpf.Proc{PID: os.Getpid()}
	all := readers(t)
	for _, r := range all {
		before = append(before, ok(t, r, self))
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread exits
		f, err := os.Create(file)
		if err == nil {
			_, err = f.Write(make([]byte, size))
			err = errors.Join(err, f.Sync(), f.Close())
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for i, r := range all {
		after := ok(t, r, self)
		if got := after.WriteBytes - before[i].WriteBytes; got < least || got > most {
			t.Errorf("%s: got %d bytes written, want %d to %d", r.Origin(), got, least, most)
		}
	}
}

// threadClock is the exact CPU time of a thread of this process.
func threadClock(t testing.TB, tid int) uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(^int32(tid)<<3|4|2, &ts); err != nil {
		t.Fatal(err)
	}
	return uint64(ts.Nano())
}

func TestARunningThreadIsCountedUpToNow(t *testing.T) {
	tid := make(chan int)
	var stop atomic.Bool
	go func() {
		nameThread("CPU 0/KVM")
		tid <- unix.Gettid()
		for !stop.Load() {
		}
	}()
	id := <-tid
	defer stop.Store(true)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Where the CPUs' clocks differ, so does the scheduler's, by up to a tick.
	bound := 20 * time.Microsecond
	source, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains([]string{"hpet\n", "acpi_pm\n", "jiffies\n"}, string(source)) {
		bound = 10 * time.Millisecond
	}
	self := []bpf.Proc{{PID: os.Getpid()}}
	for _, r := range readers(t) {
		if r.Origin() == bpf.OriginCPUClock {
			continue // counts up to the last tick
		}
		out := make([]bpf.Usage, 1)
		var behind, ahead []time.Duration
		for range 300 {
			time.Sleep(3 * time.Millisecond)
			start := time.Now()
			if err := r.Read(t.Context(), self, out); err != nil {
				t.Fatal(err)
			}
			exact := threadClock(t, id)
			if out[0].Err != nil {
				t.Fatalf("%s: %v", r.Origin(), out[0].Err)
			}
			took := time.Since(start)
			off := time.Duration(exact - out[0].Run[bpf.VCPU] - out[0].Slice[bpf.VCPU])
			behind = append(behind, off-took)
			ahead = append(ahead, -off)
		}
		slices.Sort(behind)
		slices.Sort(ahead)
		at := func(d []time.Duration, percent int) time.Duration { return d[len(d)*percent/100] }
		t.Logf("%s: behind the exact clock by p50 %v p95 %v p99 %v max %v; ahead of it by p95 %v p99 %v max %v",
			r.Origin(), at(behind, 50), at(behind, 95), at(behind, 99), behind[len(behind)-1], at(ahead, 95), at(ahead, 99), ahead[len(ahead)-1])
		if got := at(behind, 90); got > bound {
			t.Errorf("%s: 90 %% of the reads should be at most %v behind, got %v", r.Origin(), bound, got)
		}
		if got := at(ahead, 90); got > bound {
			t.Errorf("%s: 90 %% of the reads should be at most %v ahead, got %v", r.Origin(), bound, got)
		}
	}
}

// counted is what the kernel has counted of a process.
func counted(u bpf.Usage) uint64 {
	n := u.Process
	for _, ns := range u.Slice {
		n -= ns
	}
	return n
}

func TestTheProcessNeverLosesTime(t *testing.T) {
	// Many threads make a read long, and threads that exit all the time tear it.
	c := startChild(t, qemuLike+strings.Repeat(",.idle", 200)+strings.Repeat(",~worker", 4))
	for _, r := range readers(t) {
		out := make([]bpf.Usage, 1)
		var last bpf.Usage
		reads, torn := 0, 0
		for start := time.Now(); reads < 600 && time.Since(start) < 5*time.Second; reads++ {
			before, err := bpf.ProcessCPUClock(c.proc.PID)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Read(t.Context(), []bpf.Proc{c.proc}, out); err != nil {
				t.Fatal(err)
			}
			u := out[0]
			if errors.Is(u.Err, bpf.ErrTorn) {
				torn++
				continue
			}
			if u.Err != nil {
				t.Fatalf("%s: %v", r.Origin(), u.Err)
			}
			if u.Process < before || sum(u) != u.Process {
				t.Fatalf("%s: process %d ns, sum %d ns, CPU clock just before %d ns", r.Origin(), u.Process, sum(u), before)
			}
			// The slice in progress is an estimate, which whoever publishes it holds.
			if counted(u) < counted(last) || u.Exited < last.Exited {
				t.Fatalf("%s: went from %+v to %+v", r.Origin(), last, u)
			}
			if u.Run[bpf.VCPU] < last.Run[bpf.VCPU] {
				t.Fatalf("%s: vCPU time went from %d to %d", r.Origin(), last.Run[bpf.VCPU], u.Run[bpf.VCPU])
			}
			last = u
			time.Sleep(100 * time.Microsecond)
		}
		t.Logf("%s: torn %d of %d, %+v", r.Origin(), torn, reads, r.Stats())
		if torn > reads/10 {
			t.Errorf("%s: torn %d of %d times", r.Origin(), torn, reads)
		}
	}
}

func TestAProcessThatIsNotTheOneMeantIsNamed(t *testing.T) {
	c := startChild(t, ".CPU 0/KVM")
	alive := startChild(t, ".CPU 0/KVM")
	dead := startChild(t, ".CPU 0/KVM")
	dead.kill()
	self := bpf.Proc{PID: os.Getpid()}
	// A thread that is not its process's first. Who has that one keeps it.
	threads := make(chan int)
	for range 2 {
		go func() {
			runtime.LockOSThread()
			threads <- unix.Gettid()
			select {}
		}()
	}
	thread := <-threads
	if other := <-threads; thread == self.PID {
		thread = other
	}
	reused := c.proc
	reused.StartTicks++
	procs := []bpf.Proc{dead.proc, reused, {PID: 2}, {PID: thread}, {PID: 1 << 30}, {PID: 1<<32 + 1}, {PID: -5}, {}, alive.proc, self}
	want := []error{bpf.ErrGone, bpf.ErrReused, bpf.ErrKernelThread, bpf.ErrGone, bpf.ErrGone, bpf.ErrGone, bpf.ErrGone, bpf.ErrGone, nil, nil}
	for _, r := range readers(t) {
		for i, u := range read(t, r, procs...) {
			if u.Err != want[i] {
				t.Errorf("%s: %+v: got %v, want %v", r.Origin(), procs[i], u.Err, want[i])
			}
			if u.Err == nil && u.Process == 0 || u.Err != nil && u != (bpf.Usage{Err: u.Err}) {
				t.Errorf("%s: %+v: %+v", r.Origin(), procs[i], u)
			}
		}
		if s := r.Stats(); s.Failed != 8 || s.Processes != 10 || s.Reads != 1 {
			t.Errorf("%s: %+v", r.Origin(), s)
		}
	}
}

func TestMoreProcessesThanFitOnceAreAllRead(t *testing.T) {
	procs := make([]bpf.Proc, 1300)
	for i := range procs {
		procs[i] = bpf.Proc{PID: 1<<30 + i}
	}
	for _, i := range []int{0, 511, 512, 1299} {
		procs[i] = startChild(t, ".CPU 0/KVM").proc
	}
	for _, r := range readers(t) {
		for i, u := range read(t, r, procs...) {
			if real := procs[i].StartTicks != 0; real != (u.Err == nil) || real && u.VCPUs != 1 {
				t.Errorf("%s: process %d: %+v", r.Origin(), i, u)
			}
		}
	}
}

// TestWhatIsRememberedIsRight reads a process whose threads work, rest, exit,
// start and are renamed, again and again with readers that have seen it before,
// and holds it against /proc each time that it is stopped.
func TestWhatIsRememberedIsRight(t *testing.T) {
	c := startChild(t, qemuLike+strings.Repeat(",.idle", 20)+",%x,%y,~worker,~CPU 3/KVM")
	idle := startChild(t, ".CPU 0/KVM,.CPU 1/KVM")
	other := startChild(t, ".CPU 0/KVM")
	procs := []bpf.Proc{idle.proc, c.proc}
	all := readers(t)
	proc := all[len(all)-1]
	time.Sleep(100 * time.Millisecond)
	for round := range 60 {
		for _, r := range all[:len(all)-1] {
			read(t, r, procs...)
			if round%7 == 3 {
				read(t, r, other.proc) // alone, in between
			}
		}
		if round%20 == 10 {
			procs[0], procs[1] = procs[1], procs[0]
		}
		time.Sleep(time.Duration(round%5) * 300 * time.Microsecond)
		c.stop(t)
		want := read(t, proc, procs...)
		for _, r := range all[:len(all)-1] {
			got := read(t, r, procs...)
			for i := range procs {
				if got[i] != want[i] {
					t.Errorf("round %d, %s:\ngot  %+v\nwant %+v", round, r.Origin(), got[i], want[i])
				}
				if v, w := sorted(r.VCPUs(i)), sorted(proc.VCPUs(i)); !slices.Equal(v, w) {
					t.Errorf("round %d, %s: vCPUs\ngot  %+v\nwant %+v", round, r.Origin(), v, w)
				}
			}
			if again := read(t, r, procs...); !slices.Equal(again, got) {
				t.Errorf("round %d, %s: read twice, %+v and %+v", round, r.Origin(), got, again)
			}
		}
		if t.Failed() {
			return
		}
		c.resume(t)
	}
	for _, r := range all {
		s := r.Stats()
		t.Logf("%s: %+v", r.Origin(), s)
		if r.Origin() == bpf.OriginWalk && (s.Idle < 100 || s.Idle > s.Processes*3/4) {
			t.Errorf("%d of %d processes had not run: want most of those of the idle one", s.Idle, s.Processes)
		}
	}
}

func TestAProcessThatBecomesAnotherByExecGoesOn(t *testing.T) {
	t.Setenv("KVMETER_BPF_NEXT", ".CPU 0/KVM,.CPU 1/KVM,.worker")
	for _, r := range readers(t) {
		c := startChild(t, "^")
		before := ok(t, r, c.proc)
		if err := c.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		c.ready(t)
		after := ok(t, r, c.proc)
		if before.VCPUs != 0 || after.VCPUs != 2 || len(r.VCPUs(0)) != 2 || after.Process <= before.Process {
			t.Errorf("%s: from %+v to %+v", r.Origin(), before, after)
		}
	}
}

func TestAPIDThatIsUsedAgainWithinOnePollIsAnotherProcess(t *testing.T) {
	for _, r := range readers(t) {
		old := startChild(t, ".CPU 0/KVM")
		ok(t, r, old.proc)
		var c *child
		for try := 0; ; try++ {
			if try == 50 {
				t.Fatal("the PID is not given again")
			}
			if c != nil {
				c.kill()
			}
			old.kill()
			time.Sleep(20 * time.Millisecond) // two clock ticks, the resolution of start times
			// The kernel gives the PIDs after that one in turn.
			if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(old.proc.PID-1)), 0); err != nil {
				t.Fatal(err)
			}
			if c = startChild(t, ".CPU 0/KVM,.CPU 1/KVM"); c.proc.PID == old.proc.PID {
				break
			}
		}
		if u := read(t, r, old.proc)[0]; u.Err != bpf.ErrReused || len(r.VCPUs(0)) != 0 {
			t.Errorf("%s: %+v, want %v", r.Origin(), u, bpf.ErrReused)
		}
		if u := ok(t, r, c.proc); u.VCPUs != 2 || len(r.VCPUs(0)) != 2 {
			t.Errorf("%s: %+v", r.Origin(), u)
		}
	}
}

// TestManyThreads has more threads than the walk remembers, and more vCPUs than
// there are records for in a pass.
func TestManyThreads(t *testing.T) {
	const count, vcpus, room = 5, 4000, 16384
	names := make([]string, vcpus)
	for i := range names {
		names[i] = fmt.Sprintf("CPU %d/KVM", i)
	}
	var procs []bpf.Proc
	for _, pid := range lab.StartHerd(t, lab.HerdSpec{Count: count, Threads: names}) {
		start, err := procfs.StartTicks(pid)
		if err != nil {
			t.Fatal(err)
		}
		procs = append(procs, bpf.Proc{PID: pid, StartTicks: start})
	}
	small := startChild(t, ".CPU 0/KVM,.worker")
	all := readers(t)
	want := read(t, all[len(all)-1], procs...)
	for _, r := range all[:len(all)-1] {
		for range 3 {
			got := read(t, r, procs...)
			told := 0
			for i, u := range got {
				if u != want[i] || u.VCPUs != vcpus || u.Threads != vcpus+1 {
					t.Errorf("%s: process %d:\ngot  %+v\nwant %+v", r.Origin(), i, u, want[i])
				}
				told += len(r.VCPUs(i))
			}
			if told < room-vcpus || told > room && r.Origin() != bpf.OriginWalk {
				t.Errorf("%s: %d vCPUs are told of, want %d or a process less", r.Origin(), told, room)
			}
		}
		if s := r.Stats(); s.LostVCPUs < count*vcpus-room || s.Failed != 0 {
			t.Errorf("%s: %+v", r.Origin(), s)
		}
		if u := ok(t, r, small.proc); u.VCPUs != 1 || len(r.VCPUs(0)) != 1 {
			t.Errorf("%s: after them a small one: %+v", r.Origin(), u)
		}
		one := ok(t, r, procs[0])
		if v := sorted(r.VCPUs(0)); one != want[0] || len(v) != vcpus || v[0].Index != 0 || v[vcpus-1].Index != vcpus-1 {
			t.Errorf("%s: alone: %+v, %d vCPUs", r.Origin(), one, len(v))
		}
	}
}

func TestCapabilitiesAreNeededOnlyToLoad(t *testing.T) {
	for name, caps := range map[string][]uintptr{
		"CAP_BPF and CAP_PERFMON are enough, and Read needs none": {unix.CAP_BPF, unix.CAP_PERFMON},
		"without CAP_PERFMON the error names it":                  {unix.CAP_BPF},
		"without capabilities the error names both":               nil,
	} {
		t.Run(name, func(t *testing.T) {
			c := startChild(t, qemuLike)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), childEnv+"=unprivileged", fmt.Sprintf("PROC=%d", c.proc.PID))
			cmd.SysProcAttr = &syscall.SysProcAttr{
				Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
				AmbientCaps: caps,
			}
			got, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, got)
			}
			want := ""
			switch len(caps) {
			case 2:
				want = "walk ok\niter ok\n"
				if readers(t)[0].Origin() != bpf.OriginWalk {
					want = fmt.Sprintf("load walk: %v\niter ok\n", bpf.ErrNoTaskIterator)
				}
			case 1:
				want = missing("walk", "CAP_PERFMON") + missing("iter", "CAP_PERFMON")
			case 0:
				want = missing("walk", "CAP_BPF and CAP_PERFMON") + missing("iter", "CAP_BPF and CAP_PERFMON")
			}
			if string(got) != want {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}

func missing(who, caps string) string {
	return fmt.Sprintf("load %s: %v: %s; run as root, or grant them to the service (AmbientCapabilities=)\n",
		who, bpf.ErrNoCapability, caps)
}

// beUnprivileged loads both programs, drops every capability, and reads.
func beUnprivileged() int {
	var proc bpf.Proc
	fmt.Sscan(os.Getenv("PROC"), &proc.PID)
	var all []reader
	walk, err := bpf.LoadWalk()
	if err != nil {
		fmt.Println(err)
	} else {
		all = append(all, walk)
	}
	iter, err := bpf.LoadIter()
	if err != nil {
		fmt.Println(err)
	} else {
		all = append(all, iter)
	}
	if err := dropAll(); err != nil {
		fmt.Println(err)
		return 1
	}
	for _, r := range all {
		out := make([]bpf.Usage, 1)
		if err := r.Read(context.Background(), []bpf.Proc{proc}, out); err != nil || out[0].Err != nil {
			fmt.Println(r.Origin(), err, out[0].Err)
			return 1
		}
		if out[0].VCPUs != 2 || out[0].Exited == 0 || out[0].ReadBytes+out[0].WriteBytes+out[0].Process == 0 {
			fmt.Printf("%s: %+v\n", r.Origin(), out[0])
			return 1
		}
		fmt.Println(r.Origin(), "ok")
	}
	return 0
}

// dropAll drops every capability of the calling goroutine, which keeps its thread.
func dropAll() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	runtime.LockOSThread() // the capabilities are this thread's
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if status, err := os.ReadFile("/proc/thread-self/status"); err != nil || !strings.Contains(string(status), "CapEff:\t0000000000000000") {
		return fmt.Errorf("capabilities are still there (%v)", err)
	}
	return nil
}

func TestReadingAllocatesNothing(t *testing.T) {
	c := startChild(t, qemuLike)
	r := readers(t)[0]
	if r.Origin() != bpf.OriginWalk {
		t.Skip("the kernel lacks the open-coded task iterator")
	}
	procs := []bpf.Proc{c.proc, {PID: 1}}
	out := make([]bpf.Usage, len(procs))
	if n := testing.AllocsPerRun(100, func() {
		if err := r.Read(context.Background(), procs, out); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("got %v allocations a read, want 0", n)
	}
}

// BenchmarkRead measures a poll. ns/op is wall clock on a busy machine;
// cpu-ns/process is the thread's CPU time.
func BenchmarkRead(b *testing.B) {
	for _, size := range []struct {
		procs   int
		threads string
	}{
		{20, strings.Repeat(".CPU 0/KVM,", 1) + ".worker"},
		{200, strings.Repeat(".CPU 0/KVM,", 6) + ".worker"},
	} {
		var procs []bpf.Proc
		for range size.procs {
			procs = append(procs, startChild(b, size.threads).proc)
		}
		out := make([]bpf.Usage, len(procs))
		for _, r := range readers(b) {
			if err := r.Read(b.Context(), procs, out); err != nil {
				b.Fatal(err)
			}
			var threads uint32
			for _, u := range out {
				threads += u.Threads
			}
			b.Run(fmt.Sprintf("%s/%dprocesses,%dthreads", r.Origin(), len(procs), threads), func(b *testing.B) {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				b.ReportAllocs()
				start := threadClock(b, unix.Gettid())
				for b.Loop() {
					if err := r.Read(b.Context(), procs, out); err != nil {
						b.Fatal(err)
					}
				}
				perOp := float64(threadClock(b, unix.Gettid())-start) / float64(b.N)
				b.ReportMetric(perOp/1e3, "cpu-µs/op")
				b.ReportMetric(perOp/float64(len(procs)), "cpu-ns/process")
			})
		}
	}
}
