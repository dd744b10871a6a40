package agent

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
)

// DropCapabilities gives up, for all threads and for good, the capabilities
// that the agent needs no more: all of them if its readers go on working
// without, else all but those that they need. A daemon calls it between New and
// Run. It needs a build without cgo.
func (a *Agent) DropCapabilities(ctx context.Context) error {
	var have capabilities
	if err := have.get(); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	if have.permitted == 0 {
		return nil
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("refuse new privileges: %w", err)
	}
	couldIO, err := a.probe(ctx)
	if err != nil {
		return fmt.Errorf("read a process before dropping capabilities: %w", err)
	}
	const readers = 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_SYS_PTRACE
	none := uint64(0)
	if a.guest == nil || a.readers[0].Origin() == bpf.OriginCPUClock {
		// NICs are found by looking into QEMU, and its disk bytes in /proc.
		none = 1 << unix.CAP_SYS_PTRACE
	}
	if libvirt.Searches(a.cfg.Libvirt) {
		// The folders of other processes and users, and sockets that are theirs.
		none |= 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_DAC_READ_SEARCH | 1<<unix.CAP_DAC_OVERRIDE
	}
	for _, h := range a.hooks.list {
		if n, ok := h.Hook.(interface{ NeedsNetAdmin() bool }); ok && n.NeedsNetAdmin() {
			none |= 1 << unix.CAP_NET_ADMIN
		}
	}
	none &= have.permitted
	for _, keep := range []uint64{none, (none | readers) & have.permitted} {
		// Effective first, which can be taken back.
		try := capabilities{effective: keep, permitted: have.permitted}
		if err := try.set(); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
		if canIO, err := a.probe(ctx); keep == none && (err != nil || couldIO && !canIO) {
			a.log.Info("the readers go on needing capabilities", zap.Error(err))
			continue
		}
		try.permitted = keep
		if err := try.set(); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
		break
	}
	return nil
}

// probe says what the best reader can read of a process of another user.
func (a *Agent) probe(ctx context.Context) (hasIO bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var got [2]bpf.Usage
	if err := a.readers[0].Read(ctx, []bpf.Proc{{PID: os.Getpid()}, {PID: 1}}, got[:]); err != nil {
		return false, err
	}
	if a.lives.Lifecycle != nil {
		if _, err := a.lives.Stats(); err != nil {
			return false, err
		}
	}
	return got[1].HasIO, got[0].Err
}

// capabilities are sets of CAP_*, one bit each.
type capabilities struct{ effective, permitted uint64 }

func (c *capabilities) get() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	c.effective = uint64(data[1].Effective)<<32 | uint64(data[0].Effective)
	c.permitted = uint64(data[1].Permitted)<<32 | uint64(data[0].Permitted)
	return nil
}

// set applies to all threads, and leaves nothing to be inherited.
func (c *capabilities) set() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(c.effective), Permitted: uint32(c.permitted)},
		{Effective: uint32(c.effective >> 32), Permitted: uint32(c.permitted >> 32)},
	}
	return allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0)
}

func allThreads(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall(trap, a1, a2, a3); errno != 0 {
		return errno
	}
	return nil
}
