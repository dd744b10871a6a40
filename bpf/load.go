package bpf

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Reasons why the programs can't be loaded.
var (
	// ErrNoBTF says that the kernel does not describe its types.
	ErrNoBTF = errors.New("the kernel has no BTF (/sys/kernel/btf/vmlinux; built without CONFIG_DEBUG_INFO_BTF)")
	// ErrNoCapability says that the process may not load BPF programs.
	ErrNoCapability = errors.New("BPF needs capabilities that are missing")
	// ErrRefused says that the kernel refuses BPF to a process that has the capabilities.
	ErrRefused = errors.New("the kernel refuses BPF although CAP_BPF and CAP_PERFMON are there (lockdown, a security module, or a container with a seccomp filter or user namespace of its own)")
	// ErrNoTaskIterator says that the kernel can't walk threads on request.
	ErrNoTaskIterator = errors.New("the kernel lacks the open-coded task iterator (Linux 6.7)")
	// ErrPIDNamespace says that /proc's PIDs are not those that BPF programs see.
	ErrPIDNamespace = errors.New("BPF programs know processes by the host's PIDs, and this process is in a PID namespace of its own (run it in the host's: --pid=host, hostPID: true)")
)

// initPIDNamespace is the inode of the initial PID namespace: PROC_PID_INIT_INO
// in linux/proc_ns.h.
const initPIDNamespace = 0xEFFFFFFC

// checkPIDNamespace fails with [ErrPIDNamespace] outside the initial one: the
// programs would read other processes than those that were meant.
func checkPIDNamespace() error {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return fmt.Errorf("look up own PID namespace: %w", err)
	}
	if st.Ino != initPIDNamespace {
		return ErrPIDNamespace
	}
	return nil
}

// explain turns an error of loading a program into one that says what is
// missing. The library's own text blames the memory limit for every EPERM.
func explain(err error) error {
	_, btfErr := os.Stat("/sys/kernel/btf/vmlinux")
	missing, capErr := missingCapabilities()
	if capErr != nil {
		return capErr
	}
	return explanation(err, btfErr == nil, missing)
}

func explanation(err error, hasBTF bool, missing []string) error {
	switch {
	case !hasBTF:
		return ErrNoBTF
	case len(missing) > 0:
		return fmt.Errorf("%w: %s; run as root, or grant them to the service (AmbientCapabilities=)",
			ErrNoCapability, strings.Join(missing, " and "))
	case errors.Is(err, unix.EPERM):
		return ErrRefused
	case errors.Is(err, ebpf.ErrNotSupported) && strings.Contains(err.Error(), "kfunc"):
		return ErrNoTaskIterator
	}
	return err
}

// missingCapabilities names those of CAP_BPF and CAP_PERFMON that the process
// lacks. CAP_SYS_ADMIN stands for both.
func missingCapabilities() ([]string, error) {
	has, err := ownCapabilities()
	if err != nil || has(unix.CAP_SYS_ADMIN) {
		return nil, err
	}
	var missing []string
	if !has(unix.CAP_BPF) {
		missing = append(missing, "CAP_BPF")
	}
	if !has(unix.CAP_PERFMON) {
		missing = append(missing, "CAP_PERFMON")
	}
	return missing, nil
}

// ownCapabilities tells which capabilities are effective.
func ownCapabilities() (has func(capability int) bool, err error) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	return func(capability int) bool {
		return data[capability/32].Effective&(1<<(capability%32)) != 0
	}, nil
}
