package bpf

import (
	"unsafe"

	"github.com/kvmeter/kvmeter/gen"
)

// The values of enum status and FIELD_* in include/usage.h.
const (
	statusGone = iota
	statusOK
	statusReused
	statusTorn
	statusTooManyThreads
	statusKernelThread

	fieldIO   = 1
	fieldWait = 2
)

// maxProcesses is MAX_PROCESSES in include/usage.h.
const maxProcesses = 512

// maxHistories bounds what is remembered of processes that nobody asks for
// any more and that were never seen to be gone.
const maxHistories = 8 * maxProcesses

// history is what was last told of a process. Most of it is there because of
// the slice that a running thread has not been credited with yet: our figure
// for it may be some µs too high, and a thread that exits takes with it up to a
// tick that the kernel then credits to nobody.
type history struct {
	counted [Classes]uint64 // run_ns, the kernel's own
	told    [Classes]uint64 // Usage.Run
	process uint64          // Usage.Process
	read    uint64          // number of the read that told it
}

// histories keeps what was told from decreasing.
type histories struct {
	of    map[Proc]*history
	stats Stats
}

// usage turns what a program recorded of p into u.
func (h *histories) usage(p Proc, rec *gen.WalkUsage, u *Usage) {
	h.stats.Retries += uint64(rec.Retries)
	switch rec.Status {
	case statusOK:
	case statusReused:
		h.fail(p, u, ErrReused)
		return
	case statusTorn:
		h.fail(p, u, ErrTorn)
		return
	case statusTooManyThreads:
		h.fail(p, u, ErrTooManyThreads)
		return
	case statusKernelThread:
		h.fail(p, u, ErrKernelThread)
		return
	default:
		h.fail(p, u, ErrGone)
		return
	}
	*u = Usage{
		Exited:              rec.ExitedNs,
		Wait:                rec.VcpuWaitNs,
		WaitAll:             rec.WaitNs,
		Switches:            rec.Switches,
		ReadBytes:           rec.ReadBytes,
		WriteBytes:          rec.WriteBytes,
		CancelledWriteBytes: rec.CancelledWriteBytes,
		Threads:             rec.Threads,
		VCPUs:               rec.Vcpus,
		HasSplit:            true,
		HasIO:               rec.Fields&fieldIO != 0,
		// A kernel may have the field and count only under a boot option.
		HasWait: rec.Fields&fieldWait != 0 && rec.Switches > 0,
	}
	last := h.of[p]
	if last == nil {
		last = &history{}
		h.of[p] = last
	}
	h.hold(last, rec, u)
}

// fail makes u say only why p could not be read.
func (h *histories) fail(p Proc, u *Usage, err error) {
	if err != ErrTorn {
		delete(h.of, p)
	}
	h.stats.Failed++
	*u = Usage{Err: err}
}

// hold sets u's times: what the kernel counted plus the slices in progress, but
// never less than was told before. A class may shrink when the kernel's own
// figure for it has shrunk, which means that a thread left it; the process never.
func (h *histories) hold(last *history, rec *gen.WalkUsage, u *Usage) {
	var held uint64
	shrunk := Emulator
	u.Process = u.Exited
	for c := range Classes {
		counted := rec.RunNs[c]
		run := counted + rec.SliceNs[c]
		switch {
		case counted < last.counted[c]:
			shrunk = c
		case run < last.told[c]:
			held += last.told[c] - run
			run = last.told[c]
		}
		u.Run[c] = run
		u.Process += run
		last.counted[c] = counted
	}
	if u.Process < last.process {
		missing := last.process - u.Process
		u.Run[shrunk] += missing
		u.Process = last.process
		held += missing
	}
	last.told = u.Run
	last.process = u.Process
	last.read = h.stats.Reads
	if held > 0 {
		h.stats.Held++
		h.stats.HeldNs = max(h.stats.HeldNs, held)
	}
}

// prune forgets processes that were not asked for in the current read, once
// there are too many to keep.
func (h *histories) prune() {
	if len(h.of) <= maxHistories {
		return
	}
	for p, last := range h.of {
		if last.read != h.stats.Reads {
			delete(h.of, p)
		}
	}
}

// bytesOf is the memory of s.
func bytesOf[T any](s []T) []byte {
	if len(s) == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(&s[0])), len(s)*int(unsafe.Sizeof(s[0])))
}
