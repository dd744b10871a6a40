//go:build lab

package bpf_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
)

func loadRunQueue(t testing.TB) *bpf.RunQueue {
	t.Helper()
	r, err := bpf.LoadRunQueue()
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	return r
}

// waits returns what was counted of each domain.
func waits(t testing.TB, r *bpf.RunQueue) map[uint32]bpf.RunQueueWaits {
	t.Helper()
	all := map[uint32]bpf.RunQueueWaits{}
	must(t, r.Read(func(id uint32, w *bpf.RunQueueWaits) { all[id] = *w }))
	return all
}

// schedstat is what the kernel says of the vCPU threads of a process: ns that
// they waited, and how often they were put on a CPU.
func schedstat(t testing.TB, pid int) (delay, switches uint64) {
	t.Helper()
	for _, tid := range vcpus(t, pid) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/schedstat", pid, tid))
		must(t, err)
		var run, wait, times uint64
		_, err = fmt.Sscan(string(b), &run, &wait, &times)
		must(t, err)
		delay += wait
		switches += times
	}
	return delay, switches
}

// vcpus returns the vCPU threads of a process.
func vcpus(t testing.TB, pid int) (tids []int) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", pid))
	must(t, err)
	for _, f := range files {
		name, err := os.ReadFile(f)
		must(t, err)
		if bpf.ClassOf(strings.TrimSpace(string(name))) == bpf.VCPU {
			tid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			must(t, err)
			tids = append(tids, tid)
		}
	}
	return tids
}

// pin keeps the vCPU threads of a process on a CPU.
func pin(t testing.TB, pid, cpu int) {
	t.Helper()
	var set unix.CPUSet
	set.Set(cpu)
	for _, tid := range vcpus(t, pid) {
		must(t, unix.SchedSetaffinity(tid, &set))
	}
}

// prefer lets the vCPU threads of a process run in turn with each other, 100 ms
// each, and before anything else that this host does.
func prefer(t testing.TB, pid int) {
	t.Helper()
	for _, tid := range vcpus(t, pid) {
		must(t, unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 1}, 0))
	}
}

// limit gives a process 20 ms of CPU in 100 ms.
func limit(t testing.TB, pid int) {
	t.Helper()
	dir := "/sys/fs/cgroup/cpu" // version 1
	files := map[string]string{"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "20000"}
	if _, err := os.Stat(dir + "/cpu.cfs_quota_us"); err != nil {
		if dir, err = os.MkdirTemp("", "cgroup"); err != nil {
			t.Fatal(err)
		}
		must(t, unix.Mount("none", dir, "cgroup2", 0, ""))
		t.Cleanup(func() { must(t, errors.Join(unix.Unmount(dir, 0), os.Remove(dir))) })
		must(t, os.WriteFile(dir+"/cgroup.subtree_control", []byte("+cpu"), 0))
		files = map[string]string{"cpu.max": "20000 100000"}
	}
	group := filepath.Join(dir, fmt.Sprintf("kvmeter-test-%d", pid))
	must(t, os.Mkdir(group, 0o755))
	t.Cleanup(func() {
		// Who has died stays for a moment.
		for range 100 {
			if err := os.Remove(group); err == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("%s is still in use", group)
	})
	for name, value := range files {
		must(t, os.WriteFile(filepath.Join(group, name), []byte(value), 0))
	}
	must(t, os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
}

// TestRunQueue attaches once for most of what it tests: where QEMU emulates more
// than one CPU, one of them may go on executing the breakpoint by which the
// kernel patches the switch, and then all stand still.
func TestRunQueue(t *testing.T) {
	r := loadRunQueue(t)
	must(t, r.Attach())
	t.Run("waits have their culprit", func(t *testing.T) { testCulprits(t, r) })
	t.Run("new threads are watched", func(t *testing.T) { testNewThreads(t, r) })
	t.Run("reading allocates nothing", func(t *testing.T) {
		must(t, r.Add(1, startChild(t, "*CPU 0/KVM").proc))
		must(t, r.Adopt())
		var switches uint64
		emit := func(_ uint32, w *bpf.RunQueueWaits) { switches += w.Switches }
		if n := testing.AllocsPerRun(100, func() { must(t, r.Read(emit)) }); n != 0 {
			t.Errorf("got %v allocations a read, want 0", n)
		}
		must(t, r.Remove(1))
	})
	t.Run("domains come and go", func(t *testing.T) { testComeAndGo(t, r) })
}

func testCulprits(t *testing.T, r *bpf.RunQueue) {
	for name, tc := range map[string]struct {
		threads string
		other   string // threads of another process; it is watched if known
		known   bool
		limited bool
		alone   bool
		culprit []bpf.Culprit
	}{
		"a task of the host":       {threads: "#CPU 0/KVM", other: "#CPU 9/KVM", culprit: []bpf.Culprit{bpf.Host}},
		"another domain":           {threads: "#CPU 0/KVM", other: "#CPU 0/TCG", known: true, culprit: []bpf.Culprit{bpf.Domain}},
		"a domain, at wake-up":     {threads: "*CPU 0/KVM", other: "#CPU 0/TCG", known: true, culprit: []bpf.Culprit{bpf.Domain}},
		"another vCPU":             {threads: "#CPU 0/KVM,#CPU 1/KVM", culprit: []bpf.Culprit{bpf.Self}},
		"its quota":                {threads: "#CPU 0/KVM", limited: true, culprit: []bpf.Culprit{bpf.Quota}},
		"who was there at wake-up": {threads: "*CPU 0/KVM", alone: true, culprit: []bpf.Culprit{bpf.Nobody, bpf.Host, bpf.Self}},
	} {
		t.Run(name, func(t *testing.T) {
			var last int
			for cpu := range 64 {
				var set unix.CPUSet
				if unix.SchedGetaffinity(0, &set) == nil && set.IsSet(cpu) {
					last = cpu
				}
			}
			var other *child
			if tc.other != "" {
				other = startChild(t, tc.other)
				pin(t, other.proc.PID, last)
				prefer(t, other.proc.PID)
			}
			c := startChild(t, tc.threads)
			if tc.limited {
				defer c.kill() // before its group is removed
				limit(t, c.proc.PID)
			}
			pin(t, c.proc.PID, last)
			if !tc.limited && !tc.alone {
				prefer(t, c.proc.PID)
			}
			c.stop(t)
			must(t, r.Add(1, c.proc))
			if tc.known {
				must(t, r.Add(2, other.proc))
			}
			must(t, r.Adopt())
			defer func() { must(t, errors.Join(r.Remove(1), r.Remove(2))) }()
			delay, switches := schedstat(t, c.proc.PID)
			must(t, c.cmd.Process.Signal(syscall.SIGCONT))
			time.Sleep(1500 * time.Millisecond)
			c.stop(t)
			after, switchesAfter := schedstat(t, c.proc.PID)
			delay, switches = after-delay, switchesAfter-switches
			got := waits(t, r)[1]
			var sum, lengths uint64
			for _, ns := range got.By {
				sum += ns
			}
			for _, n := range got.Buckets {
				lengths += n
			}
			t.Logf("waited %v by schedstat, %v by the hook (%+d ns): nobody %v, self %v, domain %v, host %v, quota %v; %d switches, %d by the hook",
				time.Duration(delay), time.Duration(sum), int64(sum-delay), time.Duration(got.By[bpf.Nobody]), time.Duration(got.By[bpf.Self]),
				time.Duration(got.By[bpf.Domain]), time.Duration(got.By[bpf.Host]), time.Duration(got.By[bpf.Quota]), switches, got.Switches)
			// A kernel that does not show us a switch costs us its wait at most
			// where it is the first one.
			if diff := int64(sum - delay); diff > 0 || diff < -int64(delay)/50-int64(time.Millisecond) {
				t.Errorf("the hook saw %d ns of waits, the kernel counted %d", sum, delay)
			}
			if got.Switches > switches || got.Switches < switches*98/100 || lengths > switches || lengths < switches*98/100 {
				t.Errorf("the hook saw %d switches and %d waits, the kernel counted %d", got.Switches, lengths, switches)
			}
			var by uint64
			for _, c := range tc.culprit {
				by += got.By[c]
			}
			// The rest is what else this host does; a quota does not keep it off.
			if least := map[bool]uint64{false: 60, true: 20}[tc.limited]; by < sum*least/100 {
				t.Errorf("got %v, want %d %% of it by %s", got.By, least, name)
			}
			if !tc.known && got.By[bpf.Domain] != 0 || !tc.limited && got.By[bpf.Quota] != 0 {
				t.Errorf("got %v, where there is no other domain, or no quota", got.By)
			}
		})
	}
}

func testComeAndGo(t *testing.T, r *bpf.RunQueue) {
	a, b := startChild(t, "*CPU 0/KVM,*worker"), startChild(t, "*CPU 0/KVM")
	reused := b.proc
	reused.StartTicks++
	follow := func(id uint32, p bpf.Proc) {
		t.Helper()
		must(t, r.Add(id, p))
		must(t, r.Adopt())
	}
	follow(1, a.proc)
	follow(1, a.proc)
	follow(2, reused)
	time.Sleep(200 * time.Millisecond)
	first := waits(t, r)
	if len(first) != 2 || first[1].Switches == 0 || first[2].Switches != 0 {
		t.Errorf("got %+v, want switches of the first, and none of another process with its PID", first)
	}
	must(t, r.Remove(2))
	must(t, r.Remove(77))
	follow(3, b.proc)
	time.Sleep(200 * time.Millisecond)
	second := waits(t, r)
	if len(second) != 2 || second[1].Switches <= first[1].Switches || second[3].Switches == 0 {
		t.Errorf("got %+v after %+v, want more of the first, and some of the new one", second, first)
	}
	must(t, r.Detach())
	detached := waits(t, r)
	time.Sleep(100 * time.Millisecond)
	if got := waits(t, r); got[1] != detached[1] {
		t.Errorf("counted %+v after %+v while detached", got[1], detached[1])
	}
	begin := time.Now()
	must(t, r.Attach())
	time.Sleep(100 * time.Millisecond)
	got := waits(t, r)
	took := time.Since(begin)
	if got[1].Switches <= detached[1].Switches {
		t.Errorf("counted nothing after it was attached again")
	}
	// What it waited while detached is not put down to anybody.
	var sum uint64
	for c := range got[1].By {
		sum += got[1].By[c] - detached[1].By[c]
	}
	if sum > uint64(took) {
		t.Errorf("counted %v of waits in %v", time.Duration(sum), took)
	}
}

// strangers is how many switches were of threads that were not adopted yet.
func strangers(t testing.TB, r *bpf.RunQueue) uint64 {
	t.Helper()
	_, n, err := r.Lost()
	must(t, err)
	return n
}

func testNewThreads(t *testing.T, r *bpf.RunQueue) {
	c := startChild(t, "~CPU 0/KVM")
	must(t, r.Add(1, c.proc))
	must(t, r.Adopt())
	before := strangers(t, r)
	var switches, missed uint64
	for deadline := time.Now().Add(30 * time.Second); switches < 200 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
		switches, missed = waits(t, r)[1].Switches, strangers(t, r)-before
	}
	// The kernel gives a new thread no storage while it is interrupted in giving
	// one to another on that CPU.
	if switches < 200 || missed > switches/20 {
		t.Errorf("got %d switches of threads that are watched, and %d of strangers; want 200, hardly one of a stranger", switches, missed)
	}
	must(t, r.Remove(1))
}

func TestNoMoreDomainsThanFit(t *testing.T) {
	r := loadRunQueue(t)
	_, limit := r.Watched()
	for i := range limit {
		must(t, r.Add(uint32(i+1), bpf.Proc{PID: 1<<21 + i}))
	}
	if err := r.Add(9999, bpf.Proc{PID: 1}); !errors.Is(err, bpf.ErrTooManyDomains) {
		t.Errorf("got %v, want %v", err, bpf.ErrTooManyDomains)
	}
	must(t, r.Remove(1))
	must(t, r.Add(9999, bpf.Proc{PID: 1}))
}
