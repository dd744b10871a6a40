package bpf

import (
	"errors"
	"strings"
)

// Origins of what the readers count: the names under which samples tell who
// read them.
const (
	OriginWalk     = "walk"
	OriginIter     = "iter"
	OriginCPUClock = "cpuclock"
)

// Errors of a single process, in [Usage.Err].
var (
	// ErrGone says that no process has the PID (any more).
	ErrGone = errors.New("process is gone")
	// ErrReused says that another process has the PID now: its start time differs.
	ErrReused = errors.New("PID belongs to another process now")
	// ErrTorn says that threads exited during each attempt to read the
	// process. The next poll counts all of them.
	ErrTorn = errors.New("threads exited while the process was read")
	// ErrTooManyThreads says that the process has more threads than the bound
	// of 16,384 that a single read adds up.
	ErrTooManyThreads = errors.New("process has more than 16384 threads")
	// ErrKernelThread says that the PID is a kernel thread's.
	ErrKernelThread = errors.New("PID is a kernel thread's")
)

// Proc names a process for good: a PID alone is reused.
type Proc struct {
	// PID is the process's PID as /proc shows it.
	PID int
	// StartTicks is its start time, field 22 of /proc/PID/stat: clock ticks
	// (10 ms) since boot. 0 takes whatever process has the PID.
	StartTicks uint64
}

// key is the PID as the programs take it, 0 (nobody's) if there can't be such a one.
func (p Proc) key() uint32 {
	if p.PID < 1 || p.PID > maxPID {
		return 0
	}
	return uint32(p.PID)
}

// Class is a kind of thread in a QEMU process.
type Class int

// The classes. Every thread has exactly one, by its name.
const (
	VCPU     Class = iota // runs guest code: "CPU 0/KVM", "CPU 0/TCG"
	Emulator              // QEMU's main loop and whatever has no other class
	IOThread              // an <iothread>: "IO iothread1"
	Worker                // QEMU's thread pool and io_uring's kernel workers
	VHost                 // "vhost-PID", a task of the process since Linux 6.4; before, a kernel thread that nobody counts here
	Classes               // how many there are
)

var classNames = [Classes]string{"vcpu", "emulator", "iothread", "worker", "vhost"}

// String returns the name that meters use: vcpu, emulator, iothread, worker or vhost.
func (c Class) String() string {
	return classNames[c]
}

// ClassOf tells a thread's class by its name (/proc/PID/task/TID/comm, without
// the newline). QEMU names its threads under -name debug-threads=on, which
// libvirt always passes; without it they all are [Emulator].
func ClassOf(comm string) Class {
	switch {
	case strings.HasPrefix(comm, "CPU "), strings.HasPrefix(comm, "ALL CPUs"):
		return VCPU
	case comm == "IO mon_iothread": // libvirt's, for the monitor
		return Emulator
	case strings.HasPrefix(comm, "IO "):
		return IOThread
	case comm == "worker", strings.HasPrefix(comm, "iou-wrk-"), strings.HasPrefix(comm, "iou-sqp-"):
		return Worker
	case strings.HasPrefix(comm, "vhost-"):
		return VHost
	}
	return Emulator
}

// VCPUOf tells the guest's number of a vCPU by its thread's name, "CPU 3/KVM",
// or -1.
func VCPUOf(comm string) int {
	rest, ok := strings.CutPrefix(comm, "CPU ")
	if !ok {
		return -1
	}
	return vcpuNumber(rest)
}

// vcpuNumber reads the number before a slash.
func vcpuNumber[T string | []byte](text T) int {
	n := 0
	for i := range len(text) {
		c := text[i]
		switch {
		case c == '/' && i > 0:
			return n
		case c < '0' || c > '9' || i >= maxDigits:
			return -1
		}
		n = n*10 + int(c-'0')
	}
	return -1
}

// maxDigits bounds a vCPU's number. QEMU has at most some thousand.
const maxDigits = 5

// Usage is what a process has used since it started, as the kernel counts it.
// Where Err is set the rest is zero and means nothing.
type Usage struct {
	// Run is the time that live threads have been on a CPU, by class, in ns, as
	// the kernel has counted it: for a thread that is running, up to the last
	// tick. A class shrinks when one of its threads exits or is renamed.
	Run [Classes]uint64
	// Slice is what running threads have run since, in ns: an estimate that is
	// some µs off.
	Slice [Classes]uint64
	// Exited is the CPU time of threads that have exited, in ns.
	Exited uint64
	// Process is the CPU time of the whole process in ns: exactly the sum of
	// Run, Slice and Exited.
	Process uint64
	// Wait is the time that live threads were runnable but on no CPU, by class,
	// in ns, up to when each last got one. Absent without HasWait.
	Wait [Classes]uint64
	// Switches is how often live threads were put on a CPU, by class. Absent
	// without HasWait.
	Switches [Classes]uint64
	// ReadBytes and WriteBytes are what the process, exited threads included,
	// caused to be read from and written to block devices. Absent without HasIO.
	ReadBytes, WriteBytes uint64
	// CancelledWriteBytes is the part of WriteBytes that never reached a device,
	// because the file was truncated first. Absent without HasIO.
	CancelledWriteBytes uint64
	// Threads and VCPUs are how many live threads there are, and how many of
	// them are vCPU threads.
	Threads, VCPUs uint32
	// HasSplit says whether the time is known by thread. Without it Process is
	// exact, Run is zero and Exited stands for all threads.
	HasSplit bool
	// HasWait and HasIO say whether those fields could be read: they need a
	// kernel with CONFIG_SCHED_INFO, and with CONFIG_TASK_IO_ACCOUNTING and for
	// /proc the right to read /proc/PID/io.
	HasWait, HasIO bool
	// Err is nil, [ErrGone], [ErrReused], or another reason why this process
	// could not be read.
	Err error
}

// VCPUUsage is what a live vCPU thread has used since it was started.
type VCPUUsage struct {
	// Index is the guest's number of the vCPU; -1: its thread's name tells none.
	Index int
	// TID is the thread's.
	TID uint32
	// Run, Slice, Wait and Switches are the thread's part of [Usage]'s.
	Run, Slice, Wait, Switches uint64
}

// Stats counts what a reader met since it was made, beside the plain reads.
type Stats struct {
	Reads     uint64 // calls of Read
	Processes uint64 // processes asked for
	Failed    uint64 // of them, answered with an error
	Retries   uint64 // processes read again because a thread had exited
	Idle      uint64 // processes of which no thread had run since the last read
	LostVCPUs uint64 // vCPU threads that no record was left for: only in sums
}
