//go:build lab

package runqueue

import (
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
)

func open(t testing.TB) *Hook {
	t.Helper()
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// beVCPU makes the calling test's thread a vCPU thread, for good.
func beVCPU(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	name := "CPU 0/KVM\x00"
	if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData(name))), 0, 0, 0); err != nil {
		t.Fatal(err)
	}
}

// counts returns what was counted by ID and name.
func counts(t testing.TB, h *Hook) map[uint32]map[string]uint64 {
	t.Helper()
	all := map[uint32]map[string]uint64{}
	err := h.Read(t.Context(), func(id uint32, series int, count uint64) {
		if all[id] == nil {
			all[id] = map[string]uint64{}
		}
		all[id][h.Series()[series].Name] = count
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestDomainsAreFollowed(t *testing.T) {
	beVCPU(t)
	h := open(t)
	if err := h.Attach(); err != nil {
		t.Fatal(err)
	}
	self := collectors.Target{ID: 1, Proc: bpf.Proc{PID: os.Getpid()}}
	gone := collectors.Target{ID: 2, Proc: bpf.Proc{PID: 1<<22 - 1}}
	if err := h.Follow([]collectors.Target{self, gone}); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		nap := unix.NsecToTimespec(time.Millisecond.Nanoseconds())
		_ = unix.Nanosleep(&nap, nil)
	}
	got := counts(t, h)
	var waits uint64
	for i := range bpf.Waits {
		waits += got[1][h.Series()[firstWait+i].Name]
	}
	if n := got[1]["runqueue.switches"]; n < 45 || waits < 45 || waits > n {
		t.Errorf("slept 50 times; got %v", got[1])
	}
	for _, name := range []string{"cpu.preempted.self", "cpu.preempted.domain", "cpu.preempted.host", "cpu.preempted.quota"} {
		if _, ok := got[1][name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	if got[2]["runqueue.switches"] != 0 {
		t.Errorf("a process that is gone has %v", got[2])
	}
	if s := h.Stats(); s.Entries != 2 || s.MaxEntries != 1024 || s.Misses != 0 {
		t.Errorf("got %+v", s)
	}
	if err := h.Follow([]collectors.Target{gone}); err != nil {
		t.Fatal(err)
	}
	if got := counts(t, h); len(got) != 1 || got[1] != nil {
		t.Errorf("got %v after the first was left", got)
	}
}

func TestReadAllocatesNothing(t *testing.T) {
	if n := testing.AllocsPerRun(100, reader(t, 20)); n != 0 {
		t.Errorf("got %v allocations a read, want 0", n)
	}
}

// reader returns a function that reads a hook with n domains.
func reader(t testing.TB, n int) func() {
	h := open(t)
	var targets []collectors.Target
	for i := range n {
		targets = append(targets, collectors.Target{ID: uint32(i + 1), Proc: bpf.Proc{PID: 1<<21 + i}})
	}
	if err := h.Follow(targets); err != nil {
		t.Fatal(err)
	}
	var sum uint64
	emit := func(_ uint32, _ int, count uint64) { sum += count }
	return func() {
		if err := h.Read(t.Context(), emit); err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkCostRead100Domains(b *testing.B) {
	read := reader(b, 100)
	b.ReportAllocs()
	for b.Loop() {
		read()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/domain")
}
