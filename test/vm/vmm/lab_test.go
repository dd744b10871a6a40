//go:build lab

package vmm

import (
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/test/boot"
)

const exits = 2000

// counter counts how often the calling process passes a tracepoint.
func counter(t *testing.T, tracepoint string) func() uint64 {
	t.Helper()
	counts, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { counts.Close() })
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:    ebpf.RawTracepoint,
		License: "GPL",
		Instructions: asm.Instructions{
			asm.FnGetCurrentPidTgid.Call(),
			asm.RSh.Imm(asm.R0, 32),
			asm.JNE.Imm(asm.R0, int32(os.Getpid()), "out"),
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, counts.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.Mov.Imm(asm.R1, 1),
			asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: tracepoint, Program: program})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return func() (n uint64) {
		if err := counts.Lookup(uint32(0), &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
}

func TestAMachineExitsAsOftenAsItIsTold(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil && os.Getenv(boot.GuestVariable) == "" {
		t.Skip("this machine has no KVM")
	}
	userspace := counter(t, "kvm_userspace_exit")
	exited, entered := counter(t, "kvm_exit"), counter(t, "kvm_entry")
	begin := time.Now()
	if err := OnThread(func(v *VM) error { return v.Run(exits) }); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d exits in %v: kvm_userspace_exit %d, kvm_exit %d, kvm_entry %d", exits, time.Since(begin), userspace(), exited(), entered())
	// A signal of Go's scheduler ends a run as well, without an exit of its own.
	if got := userspace(); got < exits || got > exits+exits/10 {
		t.Errorf("got %d exits to user space, want %d", got, exits)
	}
	if os.Getenv(boot.GuestVariable) == "" {
		return // hypervisors that emulate, as some that are nested do, have no exits of the CPU
	}
	for name, got := range map[string]uint64{"kvm_exit": exited(), "kvm_entry": entered()} {
		if got < exits || got > exits+exits/10 {
			t.Errorf("got %d of %s, want a few more than %d", got, name, exits)
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if release := unix.ByteSliceToString(u.Release[:]); release != os.Getenv(boot.GuestVariable) {
		t.Errorf("runs on %s, want %s", release, os.Getenv(boot.GuestVariable))
	}
}
