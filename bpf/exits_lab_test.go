//go:build lab

package bpf_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/test/boot"
	"github.com/kvmeter/kvmeter/test/vm/vmm"
)

func loadExits(t testing.TB) *bpf.ExitTimer {
	t.Helper()
	x, err := bpf.LoadExits()
	if errors.Is(err, bpf.ErrNoExits) && os.Getenv(boot.GuestVariable) == "" {
		t.Skip(err)
	}
	must(t, err)
	t.Cleanup(func() { must(t, x.Close()) })
	return x
}

func hostTimes(t testing.TB, x *bpf.ExitTimer) map[uint32]bpf.HostTime {
	t.Helper()
	all := map[uint32]bpf.HostTime{}
	must(t, x.Read(func(id uint32, h *bpf.HostTime) { all[id] = *h }))
	return all
}

// TestExitsAreTimed has a machine of the test's own exit. On a CPU that has no
// exits, as where KVM emulates all of a guest, nothing is to be seen.
func TestExitsAreTimed(t *testing.T) {
	x := loadExits(t)
	must(t, x.Add(1, bpf.Proc{PID: os.Getpid()}))
	must(t, x.Add(1, bpf.Proc{PID: os.Getpid()}))
	other := startChild(t, ".CPU 0/KVM")
	must(t, x.Add(2, other.proc))
	must(t, x.Attach())
	must(t, x.Attach())
	if _, err := os.Stat("/dev/kvm"); err != nil && os.Getenv(boot.GuestVariable) == "" {
		t.Skip("this machine has no KVM")
	}
	const exits = 500
	run := func() (took time.Duration) {
		must(t, vmm.OnThread(func(v *vmm.VM) error {
			begin := time.Now()
			defer func() { took = time.Since(begin) }()
			return v.Run(exits)
		}))
		return took
	}
	took := run()
	got := hostTimes(t, x)
	h := got[1]
	t.Logf("%d exits in %v: %+v", exits, took, h)
	if got[2] != (bpf.HostTime{}) {
		t.Errorf("another process has %+v", got[2])
	}
	if os.Getenv(boot.GuestVariable) == "" && h.Exits == 0 {
		return
	}
	if h.Exits < exits || h.Exits > exits+exits/2 {
		t.Errorf("got %d exits, want %d and a few more", h.Exits, exits)
	}
	// The last exit is followed by no entry.
	if h.Entries < h.Exits-2 || h.Entries > h.Exits {
		t.Errorf("got %d entries after %d exits", h.Entries, h.Exits)
	}
	if h.Ns == 0 || h.Ns > uint64(took) {
		t.Errorf("got %v in the host, of %v in all", time.Duration(h.Ns), took)
	}
	var lengths uint64
	for _, n := range h.Buckets {
		lengths += n
	}
	if lengths != h.Entries {
		t.Errorf("got %d times, want one an entry, %d", lengths, h.Entries)
	}
	if missed, dropped, err := x.Lost(); err != nil || missed+dropped != 0 {
		t.Errorf("lost %d and %d, %v", missed, dropped, err)
	}

	must(t, x.Detach())
	run()
	if again := hostTimes(t, x)[1]; again != h {
		t.Errorf("counted %+v after %+v while detached", again, h)
	}
	must(t, x.Attach())
	must(t, x.Remove(2))
	must(t, x.Remove(77))
	run()
	again := hostTimes(t, x)
	if len(again) != 1 || again[1].Exits < h.Exits+exits {
		t.Errorf("got %+v after %+v, want %d exits more", again, h, exits)
	}
}

func TestReadingExitsAllocatesNothing(t *testing.T) {
	x := loadExits(t)
	must(t, x.Add(1, bpf.Proc{PID: os.Getpid()}))
	var exits uint64
	emit := func(_ uint32, h *bpf.HostTime) { exits += h.Exits }
	if n := testing.AllocsPerRun(100, func() { must(t, x.Read(emit)) }); n != 0 {
		t.Errorf("got %v allocations a read, want 0", n)
	}
}
