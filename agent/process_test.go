package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const uuidA = "c0ffee00-1111-4222-8333-444455556666"

func cmdline(args ...string) []byte { return []byte(strings.Join(args, "\x00") + "\x00") }

func TestParseCommand(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want *process // nil: no QEMU
	}{
		"libvirt's QEMU": {
			[]string{"/usr/bin/qemu-system-x86_64", "-name", "guest=instance-00000001,debug-threads=on", "-S", "-machine", "pc-i440fx-7.2,usb=off", "-uuid", strings.ToUpper(uuidA), "-netdev", "tap,fd=31,id=hostnet0"},
			&process{uuid: uuidA, name: "instance-00000001"},
		},
		"libvirt's QEMU under another name": {
			[]string{"/opt/emulator", "-name", "guest=a", "-uuid", uuidA}, &process{uuid: uuidA, name: "a"},
		},
		"a name with commas": {
			[]string{"qemu-kvm", "-name", "guest=a,,b,process=c"}, &process{name: "a,b"},
		},
		"a QEMU started by hand": {
			[]string{"qemu-system-aarch64", "-name", "mine", "--uuid", uuidA, "-netdev", "tap,id=n0,ifname=tap7,script=no", "-nic", "tap,ifname=tap8", "-netdev", `{"type":"tap","id":"n1","ifname":"tap9"}`, "-netdev", "user,id=u0"},
			&process{uuid: uuidA, name: "mine", taps: []string{"tap7", "tap8", "tap9"}},
		},
		"a QEMU that says nothing of itself":       {[]string{"/usr/bin/kvm"}, &process{}},
		"a QEMU that libvirt asks what it can do":  {[]string{"/usr/bin/qemu-system-x86_64", "-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=kvm:tcg", "-daemonize"}, nil},
		"another program":                          {[]string{"/usr/bin/qemu-img", "create", "-name", "x"}, nil},
		"another program with a UUID":              {[]string{"server", "-uuid", uuidA, "-name", "x"}, nil},
		"a shell that mentions QEMU":               {[]string{"sh", "-c", "qemu-system-x86_64 -uuid " + uuidA}, nil},
		"an option without a value is not a crash": {[]string{"qemu-system-x86_64", "-uuid"}, &process{}},
		"no arguments at all":                      {[]string{""}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := parseCommand(cmdline(tc.args...))
			if !ok {
				got = nil
			}
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(process{})); diff != "" {
				t.Errorf("process (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzParseCommand(f *testing.F) {
	f.Add(cmdline("qemu-kvm", "-name", "guest=a,,b", "-uuid", uuidA, "-netdev", `{"type":"tap","ifname":"t"}`))
	f.Add(cmdline("kvm", "-M", "none"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, ok := parseCommand(data); ok && p == nil {
			t.Error("a process that is none")
		}
	})
}

// fakeProc is a folder that looks like /proc.
type fakeProc struct {
	t   testing.TB
	dir string
}

func newProc(t testing.TB) fakeProc {
	p := fakeProc{t, t.TempDir()}
	p.write("sys/kernel/random/boot_id", "11111111-2222-4333-8444-555555555555\n")
	p.write("cpuinfo", "")
	return p
}

func (p fakeProc) write(name, text string) {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// file writes a file beside the processes, and returns its path.
func (p fakeProc) file(name, text string) string {
	p.write(name, text)
	return filepath.Join(p.dir, name)
}

func (p fakeProc) run(pid int, start uint64, args ...string) {
	p.write(strconv.Itoa(pid)+"/cmdline", string(cmdline(args...)))
	p.write(strconv.Itoa(pid)+"/status", fmt.Sprintf("Name:\tx\nTgid:\t%d\nPid:\t%d\n", pid, pid))
	p.write(strconv.Itoa(pid)+"/stat", fmt.Sprintf("%d (x) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 %d 0 0", pid, start))
}

func (p fakeProc) guest(pid int, start uint64, uuid, name string) {
	p.run(pid, start, "qemu-system-x86_64", "-name", "guest="+name, "-uuid", uuid)
}

func (p fakeProc) kill(pid int) {
	p.t.Helper()
	if err := os.RemoveAll(filepath.Join(p.dir, strconv.Itoa(pid))); err != nil {
		p.t.Fatal(err)
	}
}

func TestScanner(t *testing.T) {
	p := newProc(t)
	p.run(1, 1, "init")
	p.write("2/cmdline", "")
	p.write("2/stat", "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 12 0 0")
	p.guest(30, 300, uuidA, "a")
	p.run(40, 1000, "libvirtd")
	s := newScanner(p.dir, nil)
	up := 10 * time.Second // PID 40 was just started
	s.uptime = func() time.Duration { return up }
	now := time.Now()
	pass := func(d time.Duration) { now, up = now.Add(d), up+d }
	scan := func(all bool) []int {
		t.Helper()
		var pids []int
		if err := s.refresh(now, all, func(p *process) { pids = append(pids, p.pid) }); err != nil {
			t.Fatal(err)
		}
		slices.Sort(pids)
		return pids
	}
	expect := func(what string, got []int, want ...int) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	expect("the QEMU that is there", scan(false), 30)
	pass(time.Millisecond)
	p.guest(40, 1000, uuidA, "b")
	expect("a process seen before its exec, at once", scan(false), 30, 40)
	p.guest(30, 300, uuidA, "renamed")
	expect("a QEMU goes on being one", scan(false), 30, 40)

	p.guest(1, 1, uuidA, "c")
	pass(time.Second)
	expect("an old process is not looked at each time", scan(false), 30, 40)
	pass(1500 * time.Millisecond)
	expect("but within a quarter of its age", scan(false), 1, 30, 40)

	p.kill(30)
	p.run(50, 500, "sh")
	expect("a QEMU that ended", scan(false), 1, 40)
	pass(time.Hour)
	scan(false)
	p.guest(50, 500, uuidA, "d")
	pass(time.Second)
	expect("an old process that becomes QEMU", scan(false), 1, 40)
	expect("is found when libvirt says so", scan(true), 1, 40, 50)
	p.guest(40, 401, uuidA, "e")
	s.forget(40)
	expect("a PID that was used again", scan(false), 1, 40, 50)
	if c := s.known[2]; !c.next.IsZero() {
		t.Error("a kernel thread is looked at again")
	}
	if len(s.known) != 4 {
		t.Errorf("%d PIDs are remembered, 4 exist", len(s.known))
	}

	long := strings.Repeat("x", 20<<10)
	p.run(60, 600, "qemu-kvm", "-append", long, "-uuid", uuidA)
	scan(false)
	if c := s.known[60]; c.qemu == nil || c.qemu.uuid != uuidA {
		t.Error("a long command line is not read whole")
	}
}

// TestScannerFollowsTheLastPID: new processes are found without a listing.
func TestScannerFollowsTheLastPID(t *testing.T) {
	p := newProc(t)
	for pid := 10; pid < 20; pid++ {
		p.run(pid, 1, "sh")
	}
	p.write("loadavg", "0.00 0.01 0.05 1/123 19\n")
	s := newScanner(p.dir, nil)
	s.uptime = func() time.Duration { return time.Hour }
	now := time.Now()
	scan := func() (pids []int) {
		t.Helper()
		if err := s.refresh(now, false, func(p *process) { pids = append(pids, p.pid) }); err != nil {
			t.Fatal(err)
		}
		slices.Sort(pids)
		return pids
	}
	scan()
	p.guest(21, 2, uuidA, "a")
	p.guest(22, 2, uuidA, "a") // a thread of 21, which /proc has but does not list
	p.write("22/status", "Tgid:\t21\nPid:\t22\n")
	p.guest(30, 2, uuidA, "beyond")
	p.write("loadavg", "0.00 0.01 0.05 1/124 23\n")
	now = now.Add(time.Second)
	if got := scan(); !slices.Equal(got, []int{21}) || s.scan != 1 {
		t.Errorf("got %v with %d listings, want 21 with the first only", got, s.scan)
	}
	p.guest(18, 3, uuidA, "reused")
	p.write("loadavg", "0.00 0.01 0.05 1/124 18\n") // the PIDs start over
	now = now.Add(time.Second)
	if got := scan(); !slices.Contains(got, 21) || !slices.Contains(got, 30) || s.scan != 2 {
		t.Errorf("got %v with %d listings, want 21 and 30 with the second", got, s.scan)
	}
	p.kill(30)
	now = now.Add(time.Second)
	if got := scan(); !slices.Contains(got, 30) {
		t.Errorf("got %v, want 30 until the next listing", got)
	}
	s.forget(30)
	if got := scan(); slices.Contains(got, 30) {
		t.Errorf("got %v, 30 was forgotten", got)
	}
}

func TestOpenTaps(t *testing.T) {
	p := newProc(t)
	p.write("9/fdinfo/5", "pos:\t0\nflags:\t0104002\niff:\ttap1234-56\n")
	p.write("9/fdinfo/6", "pos:\t0\nflags:\t0104002\niff:\ttap1234-56\n")
	p.write("9/fdinfo/7", "pos:\t0\n")
	for fd, target := range map[string]string{"5": "/dev/net/tun", "6": "/dev/net/tun", "7": "/dev/kvm", "8": "/dev/net/tun"} {
		if err := os.MkdirAll(filepath.Join(p.dir, "9/fd"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(p.dir, "9/fd", fd)); err != nil {
			t.Fatal(err)
		}
	}
	if got, ok := openTaps(p.dir, 9); !ok || !slices.Equal(got, []string{"tap1234-56"}) {
		t.Errorf("got %v, %t; want tap1234-56, true", got, ok)
	}
	if got, ok := openTaps(p.dir, 10); ok || got != nil {
		t.Errorf("got %v, %t of a process that may not be looked into", got, ok)
	}
}

// BenchmarkScan is a scan of this machine's /proc with nothing new in it.
func BenchmarkScan(b *testing.B) {
	s := newScanner("/proc", nil)
	now := time.Now()
	if err := s.refresh(now, true, func(*process) {}); err != nil {
		b.Fatal(err)
	}
	for _, c := range s.known {
		c.next = now.Add(time.Hour)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := s.refresh(now, false, func(*process) {}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(s.known)), "pids")
}
