package bpf

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// maxPID is PID_MAX_LIMIT of linux/threads.h.
const maxPID = 1 << 22

// ProcessCPUClock returns the CPU time in ns of the process pid: of all of its
// threads, those that have exited included. It needs no privilege, and pid is
// one of the caller's own PID namespace. It is the kernel's figure as of the
// last tick; [Usage.Process] of [Walk] and [Iter] adds the slices in progress.
// The error is [ErrGone] if there is no such process.
func ProcessCPUClock(pid int) (uint64, error) {
	if pid < 1 || pid > maxPID {
		return 0, fmt.Errorf("read CPU clock of process %d: %w", pid, ErrGone)
	}
	var ts unix.Timespec
	// The clock's id is the inverted PID above the kind: CPUCLOCK_SCHED (2), of
	// the process. See MAKE_PROCESS_CPUCLOCK in linux/posix-timers.h.
	clock := ^int32(pid)<<3 | 2
	err := unix.ClockGettime(clock, &ts)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ESRCH) {
		err = ErrGone
	}
	if err != nil {
		return 0, fmt.Errorf("read CPU clock of process %d: %w", pid, err)
	}
	return uint64(ts.Nano()), nil
}
