//go:build lab

package exits

import (
	"errors"
	"os"
	"testing"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/test/boot"
	"github.com/kvmeter/kvmeter/test/vm/vmm"
)

func open(t testing.TB) *Hook {
	t.Helper()
	h, err := Open()
	if errors.Is(err, bpf.ErrNoExits) && os.Getenv(boot.GuestVariable) == "" {
		t.Skip(err)
	}
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

func TestDomainsAreFollowed(t *testing.T) {
	h := open(t)
	if err := h.Attach(); err != nil {
		t.Fatal(err)
	}
	self := collectors.Target{ID: 1, Proc: bpf.Proc{PID: os.Getpid()}}
	other := collectors.Target{ID: 2, Proc: bpf.Proc{PID: 1<<22 - 1}}
	if err := h.Follow([]collectors.Target{self, other}); err != nil {
		t.Fatal(err)
	}
	read := func() map[uint32]map[string]uint64 {
		all := map[uint32]map[string]uint64{1: {}, 2: {}}
		err := h.Read(t.Context(), func(id uint32, series int, count uint64) {
			all[id][h.Series()[series].Name] = count
		})
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	const runs = 200
	if _, err := os.Stat("/dev/kvm"); err == nil || os.Getenv(boot.GuestVariable) != "" {
		if err := vmm.OnThread(func(v *vmm.VM) error { return v.Run(runs) }); err != nil {
			t.Fatal(err)
		}
	}
	got := read()
	t.Logf("%v", got[1])
	// A CPU that is emulated by a hypervisor below us may have no exits.
	if os.Getenv(boot.GuestVariable) != "" {
		var times uint64
		for i := range bpf.ExitTimes {
			times += got[1][h.Series()[firstTime+i].Name]
		}
		if n := got[1]["exits.exits"]; n < runs || times < runs-2 || got[1]["kvm.exits.time"] == 0 {
			t.Errorf("got %v, want %d exits", got[1], runs)
		}
	}
	if _, ok := got[1]["kvm.exits.time"]; !ok || got[2]["exits.exits"] != 0 {
		t.Errorf("got %v, want none of another process", got)
	}
	if s := h.Stats(); s.Entries != 2 || s.MaxEntries != 1024 || s.Misses != 0 || s.Dropped != 0 {
		t.Errorf("got %+v", s)
	}
	if err := h.Follow([]collectors.Target{other}); err != nil {
		t.Fatal(err)
	}
	if got := read(); len(got[1]) != 0 || len(got[2]) == 0 {
		t.Errorf("got %v after the first was left", got)
	}
}

func TestReadAllocatesNothing(t *testing.T) {
	h := open(t)
	if err := h.Follow([]collectors.Target{{ID: 1, Proc: bpf.Proc{PID: os.Getpid()}}}); err != nil {
		t.Fatal(err)
	}
	var sum uint64
	emit := func(_ uint32, _ int, count uint64) { sum += count }
	if n := testing.AllocsPerRun(100, func() {
		if err := h.Read(t.Context(), emit); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("got %v allocations a read, want 0", n)
	}
}
