//go:build lab

package bpf_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/procfs"
)

// bpffs returns a BPF file system of the test's own.
func bpffs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func openLife(t testing.TB, opts bpf.LifeOptions) *bpf.Life {
	t.Helper()
	l, err := bpf.OpenLife(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// qemuBinary is a copy of this test under the name of a QEMU.
func qemuBinary(t testing.TB) string {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "qemu-system-x86_64")
	if err := os.WriteFile(path, self, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// qemu returns a process that works as threads says, and then exits.
func qemu(path, threads string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), childEnv+"="+threads, "GOMAXPROCS=2")
	cmd.Stderr = os.Stderr
	return cmd
}

// next waits for an event of the process.
func next(t testing.TB, l *bpf.Life, pid int) bpf.LifeEvent {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		e, err := l.Next(deadline)
		if err != nil {
			t.Fatalf("no event of %d: %v", pid, err)
		}
		if e.Proc.PID == pid {
			return e
		}
	}
}

// run starts a QEMU, waits until it exits, and returns its PID and what wait4
// says that it used.
func run(t testing.TB, cmd *exec.Cmd) (pid int, used time.Duration) {
	t.Helper()
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	r := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	return cmd.Process.Pid, time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// ended waits for the end of the process, with all its threads.
func ended(t testing.TB, l *bpf.Life, pid int) *bpf.Lived {
	t.Helper()
	e := next(t, l, pid)
	for e.Lived == nil {
		e = next(t, l, pid)
	}
	return whole(t, l, e.Proc)
}

// taken waits until what the process used is told.
func taken(t testing.TB, l *bpf.Life, p bpf.Proc) *bpf.Lived {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		lived, err := l.Lived(p)
		if err == nil {
			return lived
		}
		if !errors.Is(err, bpf.ErrAlive) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// whole waits for the threads that come later than the first one.
func whole(t testing.TB, l *bpf.Life, p bpf.Proc) *bpf.Lived {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		lived := taken(t, l, p)
		if lived.Whole() {
			return lived
		}
		if time.Now().After(deadline) {
			t.Fatalf("threads are missing: %+v", lived)
		}
	}
}

const burner = "=CPU 0/KVM,=CPU 1/KVM,=IO iothread1,=worker,.call_rcu"

func TestAQEMUIsFollowedFromItsExec(t *testing.T) {
	l := openLife(t, bpf.LifeOptions{})
	names := []string{"qemu-system-x86_64", "qemu-system-s390x", "qemu-kvm", "kvm"}
	others := []string{"qemu-img", "kvmd", "qemu-kvmx", "bash"}
	self := qemuBinary(t)
	for _, name := range append(names, others...) {
		path := filepath.Join(t.TempDir(), name)
		if err := os.Link(self, path); err != nil {
			t.Fatal(err)
		}
		args := []string{"-name", "guest=a \"b\" 'c'\n\t\xff\u00e4,debug-threads=on", "-uuid", "", strings.Repeat("x", 3000), strings.Repeat("y", 3000)}
		cmd := qemu(path, ".CPU 0/KVM", args...)
		stdin, err := cmd.StdinPipe() // it runs until this is closed
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		start, err := procfs.StartTicks(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		p := bpf.Proc{PID: cmd.Process.Pid, StartTicks: start}
		if slices.Contains(names, name) {
			e := next(t, l, p.PID)
			line := path + "\x00" + strings.Join(args, "\x00") + "\x00"
			if e.Proc != p || e.Lived != nil || !e.Cut || string(e.Args) != line[:4096] {
				t.Errorf("got %+v, want %+v with %q", e, p, line[:4096])
			}
			if late := now() - e.At; late < 0 || late > 10*time.Second {
				t.Errorf("exec was %v ago", late)
			}
			if _, err := l.Lived(p); err != bpf.ErrAlive {
				t.Errorf("%s: got %v, want %v", name, err, bpf.ErrAlive)
			}
		}
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		if _, err := l.Lived(p); slices.Contains(others, name) && err != bpf.ErrNotFollowed {
			t.Errorf("%s: got %v, want %v", name, err, bpf.ErrNotFollowed)
		}
	}
}

func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

func TestAProcessIsAccountedToTheMicrosecondThatWaitReports(t *testing.T) {
	l := openLife(t, bpf.LifeOptions{})
	path := qemuBinary(t)
	for range 3 {
		pid, used := run(t, qemu(path, burner))
		lived := ended(t, l, pid)
		// wait4 rounds user and system time down to 1 µs each.
		if off := time.Duration(lived.Process) - used; off < 0 || off > 2*time.Microsecond {
			t.Errorf("got %v, want wait4's %v: %v off", time.Duration(lived.Process), used, off)
		}
		var sum time.Duration
		for class, least := range [bpf.Classes]time.Duration{bpf.VCPU: 200 * time.Millisecond, bpf.Emulator: 1, bpf.IOThread: 100 * time.Millisecond, bpf.Worker: 100 * time.Millisecond} {
			got := time.Duration(lived.Run[class])
			if got < least {
				t.Errorf("class %s: got %v, want at least %v", bpf.Class(class), got, least)
			}
			if least > 0 && lived.Switches[class] == 0 {
				t.Errorf("class %s was never put on a CPU", bpf.Class(class))
			}
			sum += got
		}
		if after := sum - time.Duration(lived.Process); after > used/4 {
			t.Errorf("the threads ran for %v after the process's clock had ended, which had come to %v", after, used)
		}
		if !lived.HasIO || !lived.HasWait || lived.Threads < 6 || lived.Wait[bpf.VCPU] == 0 {
			t.Errorf("not all is there: %+v", lived)
		}
		if err := l.Forget(lived.Proc); err != nil {
			t.Error(err)
		}
		if _, err := l.Lived(lived.Proc); err != bpf.ErrNotFollowed {
			t.Errorf("got %v of a process that was forgotten", err)
		}
	}
}

func TestBytesOfAProcessAreThoseOfItsEnd(t *testing.T) {
	var fs unix.Statfs_t
	dir := t.TempDir()
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	want := uint64(1 << 20)
	if fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC {
		want = 0 // no device is written to
	}
	l := openLife(t, bpf.LifeOptions{})
	cmd := qemu(qemuBinary(t), "written")
	cmd.Dir = dir
	pid, _ := run(t, cmd)
	if lived := ended(t, l, pid); lived.WriteBytes < want || lived.WriteBytes > 2*want {
		t.Errorf("got %d bytes written, want %d", lived.WriteBytes, want)
	}
}

func TestAProcessFoundByOtherMeansIsAccounted(t *testing.T) {
	l := openLife(t, bpf.LifeOptions{})
	c := startChild(t, qemuLike)
	time.Sleep(50 * time.Millisecond)
	if before, err := l.Follow(c.proc); before != nil || err != nil {
		t.Fatalf("got %+v, %v", before, err)
	}
	if before, err := l.Follow(c.proc); before != nil || err != nil {
		t.Fatalf("a second time: got %+v, %v", before, err)
	}
	if _, err := l.Lived(c.proc); err != bpf.ErrAlive {
		t.Errorf("got %v, want %v", err, bpf.ErrAlive)
	}
	c.kill()
	lived := taken(t, l, next(t, l, c.proc.PID).Proc)
	r := c.cmd.ProcessState.SysUsage().(*syscall.Rusage)
	used := time.Duration(r.Utime.Nano() + r.Stime.Nano())
	if off := time.Duration(lived.Process) - used; off < 0 || off > 2*time.Microsecond {
		t.Errorf("got %v, want wait4's %v", time.Duration(lived.Process), used)
	}
	// Two of its threads had exited before.
	if lived.Whole() {
		t.Errorf("%+v has more than was seen", lived)
	}
}

// qemuWithPID starts a QEMU that gets a certain PID. It does not run on.
func qemuWithPID(t *testing.T, path string, pid int) bool {
	t.Helper()
	for range 200 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, pid-1), 0); err != nil {
			t.Fatal(err)
		}
		cmd := qemu(path, ".CPU 0/KVM")
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if cmd.Process.Pid == pid {
			return true
		}
	}
	return false
}

func TestAPIDThatIsGivenAgainCostsNeitherProcessItsTime(t *testing.T) {
	l := openLife(t, bpf.LifeOptions{})
	path := qemuBinary(t)
	pid, used := run(t, qemu(path, burner))
	first := ended(t, l, pid)
	if !qemuWithPID(t, path, pid) {
		t.Fatalf("PID %d was not given again", pid)
	}
	var got []*bpf.Lived
	for len(got) < 2 {
		// An end may be told twice, and so may that the PID was given again.
		if e := next(t, l, pid); e.Lived != nil && (e.Replaced && len(got) == 0 || e.Proc != first.Proc) {
			got = append(got, e.Lived)
		}
	}
	if !first.Whole() {
		t.Errorf("%+v lacks threads", first)
	}
	if *got[0] != *first || time.Duration(got[0].Process).Truncate(time.Microsecond)-used > 2*time.Microsecond {
		t.Errorf("got  %+v\nwant %+v", got[0], first)
	}
	got[1] = taken(t, l, got[1].Proc)
	if got[1].Proc == first.Proc || got[1].Process == 0 || got[1].Process > first.Process/2 {
		t.Errorf("the second process has %+v, the first %+v", got[1], first)
	}
	// Where the new one was not seen at its exec, who follows it gets the old.
	c := startChild(t, ".CPU 0/KVM")
	c.proc = bpf.Proc{PID: pid, StartTicks: got[1].Proc.StartTicks + 1}
	before, err := l.Follow(c.proc)
	if err != nil || before == nil || before.Proc != got[1].Proc {
		t.Errorf("got %+v, %v, want %+v", before, err, got[1])
	}
}

func TestProcessesForWhichThereIsNoRoomAreCounted(t *testing.T) {
	l := openLife(t, bpf.LifeOptions{Processes: 1})
	path := qemuBinary(t)
	first, _ := run(t, qemu(path, ".CPU 0/KVM"))
	kept := ended(t, l, first)
	second, _ := run(t, qemu(path, ".CPU 0/KVM"))
	e := next(t, l, second)
	if e.Lived != nil || len(e.Args) == 0 {
		t.Errorf("got %+v, want the exec", e)
	}
	if _, err := l.Lived(e.Proc); err != bpf.ErrNotFollowed {
		t.Errorf("got %v, want %v", err, bpf.ErrNotFollowed)
	}
	if _, err := l.Follow(startChild(t, ".CPU 0/KVM").proc); !errors.Is(err, bpf.ErrFull) {
		t.Errorf("got %v, want %v", err, bpf.ErrFull)
	}
	// Other QEMUs of the machine may come too.
	s, err := l.Stats()
	if err != nil || s.NotFollowed < 1 || s.Followed != 1 || s.Room != 1 {
		t.Errorf("got %+v, %v", s, err)
	}
	if got, err := l.Lived(kept.Proc); err != nil || *got != *kept {
		t.Errorf("the one that there was room for is now %+v, %v", got, err)
	}
}

func TestEventsForWhichThereIsNoRoomAreCounted(t *testing.T) {
	l := openLife(t, bpf.LifeOptions{EventBytes: 64 << 10})
	path := qemuBinary(t)
	var last int
	for range 40 { // 15 fit
		last, _ = run(t, qemu(path, "nothing"))
	}
	s, err := l.Stats()
	if err != nil || s.ExecsLost < 20 || s.EndsLost < 1 {
		t.Errorf("got %+v, %v", s, err)
	}
	// What ended is there all the same.
	found := false
	for deadline := time.Now().Add(10 * time.Second); !found && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		err := l.Each(func(p bpf.Proc) {
			if p.PID == last {
				_, err := l.Lived(p)
				found = err == nil
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if !found {
		t.Error("the last process is not there")
	}
}

func TestWhatEndsWhileNobodyLooksIsThereAfterwards(t *testing.T) {
	dir := filepath.Join(bpffs(t), "kvmeter")
	path := qemuBinary(t)
	l := openLife(t, bpf.LifeOptions{Pins: dir})
	if err := l.Unkept(); err != nil {
		t.Fatal(err)
	}
	if other := openLife(t, bpf.LifeOptions{Pins: dir}); other.Unkept() == nil || !strings.Contains(other.Unkept().Error(), "another agent") {
		t.Errorf("two use the same pins: %v", other.Unkept())
	}
	c := startChild(t, "*CPU 0/KVM")
	if _, err := l.Follow(c.proc); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	pid, used := run(t, qemu(path, burner, "-uuid", "a"))
	c.kill()
	l = openLife(t, bpf.LifeOptions{Pins: dir})
	if e := next(t, l, pid); e.Lived != nil || !strings.HasSuffix(string(e.Args), "\x00-uuid\x00a\x00") {
		t.Errorf("got %+v, want the exec", e)
	}
	lived := ended(t, l, pid)
	if off := time.Duration(lived.Process) - used; off < 0 || off > 2*time.Microsecond {
		t.Errorf("got %v, want wait4's %v", time.Duration(lived.Process), used)
	}
	ended(t, l, c.proc.PID)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}

	// Maps of another form, and those of another layout, are given up.
	stale := filepath.Join(dir, "v0")
	if err := os.Mkdir(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	l = openLife(t, bpf.LifeOptions{Pins: dir, Processes: 7})
	if s, err := l.Stats(); err != nil || s.Room != 7 || l.Unkept() != nil {
		t.Errorf("got %+v, %v, %v", s, err, l.Unkept())
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the stale layout is there: %v", err)
	}
	pid, _ = run(t, qemu(path, burner))
	if lived := ended(t, l, pid); lived.Run[bpf.VCPU] > lived.Process*3/4 {
		t.Errorf("%+v was counted twice", lived)
	}
}

func TestWithoutABPFFileSystemNothingIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kvmeter")
	l := openLife(t, bpf.LifeOptions{Pins: dir})
	if err := l.Unkept(); err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("got %v, want what to do", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder stays: %v", err)
	}
	pid, _ := run(t, qemu(qemuBinary(t), burner))
	ended(t, l, pid)
}

func TestTheEndOfAProcessNeedsNoCapabilities(t *testing.T) {
	path := qemuBinary(t)
	for _, dir := range []string{filepath.Dir(path), filepath.Dir(filepath.Dir(path))} { // of t.TempDir
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// What an administrator has to do so that an ordinary user can pin.
	open, closed := bpffs(t), bpffs(t)
	own := filepath.Join(open, "kvmeter")
	if err := errors.Join(os.Chmod(open, 0o711), os.Mkdir(own, 0o700), os.Chown(own, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ pins, want string }{
		{closed, "not kept\nok\n"},
		{own, "kept\nok\n"},
		{own, "kept\nok\n"}, // again: the pinned hooks go on
	} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"=unprivileged-life", "QEMU="+path, "PINS="+tc.pins)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
			AmbientCaps: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON},
		}
		if got, err := cmd.CombinedOutput(); err != nil || string(got) != tc.want {
			t.Errorf("%s: got %q, %v, want %q", tc.pins, got, err, tc.want)
		}
	}
	links, err := filepath.Glob(own + "/v1/*")
	if err != nil || len(links) < 7 {
		t.Errorf("pinned are %v, %v", links, err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=unprivileged-life")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
		AmbientCaps: []uintptr{unix.CAP_BPF},
	}
	if got, err := cmd.CombinedOutput(); err == nil || string(got) != missing("life", "CAP_PERFMON") {
		t.Errorf("got %q, %v, want %q", got, err, missing("life", "CAP_PERFMON"))
	}
}

// beUnprivilegedLife loads the hooks, drops every capability, and has a QEMU live.
func beUnprivilegedLife() int {
	l, err := bpf.OpenLife(bpf.LifeOptions{Pins: os.Getenv("PINS")})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if l.Unkept() == nil {
		fmt.Println("kept")
	} else {
		fmt.Println("not kept")
	}
	if err := dropAll(); err != nil {
		fmt.Println(err)
		return 1
	}
	if _, err := l.Follow(bpf.Proc{PID: 4711, StartTicks: 1}); err != nil {
		fmt.Println(err)
		return 1
	}
	if err := l.Forget(bpf.Proc{PID: 4711, StartTicks: 1}); err != nil {
		fmt.Println(err)
		return 1
	}
	cmd := qemu(os.Getenv("QEMU"), "nothing")
	if err := cmd.Run(); err != nil {
		fmt.Println(err)
		return 1
	}
	for {
		e, err := l.Next(time.Now().Add(10 * time.Second))
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if e.Proc.PID != cmd.Process.Pid || e.Lived == nil {
			continue
		}
		for _, err = l.Lived(e.Proc); errors.Is(err, bpf.ErrAlive); _, err = l.Lived(e.Proc) {
			time.Sleep(time.Millisecond)
		}
		_, err2 := l.Stats()
		if err != nil || err2 != nil {
			fmt.Println(err, err2)
			return 1
		}
		fmt.Println("ok")
		return 0
	}
}

// BenchmarkLife starts processes that are no QEMU, and has the kernel measure
// what each hook costs them, its own clock reads (some 35 ns) included.
func BenchmarkLife(b *testing.B) {
	openLife(b, bpf.LifeOptions{})
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	for b.Loop() {
		if err := exec.Command("/bin/true").Run(); err != nil {
			b.Fatal(err)
		}
	}
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue
		}
		info, err := p.Info()
		stats, err2 := p.Stats()
		if err == nil && err2 == nil && strings.HasPrefix(info.Name, "life_") && stats.RunCount > 0 {
			b.ReportMetric(float64(stats.Runtime.Nanoseconds())/float64(stats.RunCount), info.Name+"-ns")
		}
		p.Close()
	}
}
