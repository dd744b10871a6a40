package bpf

import (
	"context"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// Walk reads processes by a BPF program that visits each of their threads when
// it is asked to. It needs Linux 6.7. It is for one goroutine at a time.
type Walk struct {
	objs     gen.WalkObjects
	requests *ebpf.Memory
	usages   *ebpf.Memory
	in       []gen.WalkRequest
	out      []gen.WalkUsage
	runner   *runner
	known    histories
}

// LoadWalk loads the program. That takes CAP_BPF and CAP_PERFMON; Read then
// needs neither (before Linux 5.19 it needs CAP_BPF where
// kernel.unprivileged_bpf_disabled is set). The error says what is missing:
// [ErrNoBTF], [ErrNoCapability], [ErrPIDNamespace] or [ErrNoTaskIterator].
func LoadWalk() (*Walk, error) {
	w := &Walk{
		in:    make([]gen.WalkRequest, maxProcesses),
		out:   make([]gen.WalkUsage, maxProcesses),
		known: histories{of: map[Proc]*history{}},
	}
	if err := checkPIDNamespace(); err != nil {
		return nil, fmt.Errorf("load walk: %w", err)
	}
	if err := gen.LoadWalkObjects(&w.objs, nil); err != nil {
		return nil, fmt.Errorf("load walk: %w", explain(err))
	}
	var err error
	if w.requests, err = w.objs.Requests.Memory(); err == nil {
		w.usages, err = w.objs.Usages.Memory()
	}
	if err != nil {
		w.objs.Close()
		return nil, fmt.Errorf("map the memory of walk: %w", err)
	}
	w.runner = newRunner(w.objs.Walk.FD())
	return w, nil
}

// Origin returns [OriginWalk].
func (w *Walk) Origin() string {
	return OriginWalk
}

// Read fills out[i] with what procs[i] has used up to now. A process that can't
// be read has its Err set and costs no other; the error of Read itself means
// that nothing could be read. It does not allocate once it knows the processes.
//
// A thread that is running is counted to within some µs of the call: the slice
// it is in is added to what the kernel has counted at the last tick. Where that
// turns out too much (a CPU's clocks that are not in step, time that the host's
// own hypervisor stole within the tick), the value is held until the kernel has
// counted as much: [Stats.Held].
func (w *Walk) Read(ctx context.Context, procs []Proc, out []Usage) error {
	if len(out) < len(procs) {
		return fmt.Errorf("read walk: room for %d of %d processes", len(out), len(procs))
	}
	w.known.stats.Reads++
	w.known.stats.Processes += uint64(len(procs))
	for len(procs) > 0 {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("read walk: %w", err)
		}
		n := min(len(procs), maxProcesses)
		if err := w.read(procs[:n], out[:n]); err != nil {
			return fmt.Errorf("read walk: %w", err)
		}
		procs, out = procs[n:], out[n:]
	}
	w.known.prune()
	return nil
}

func (w *Walk) read(procs []Proc, out []Usage) error {
	for i, p := range procs {
		w.in[i].Pid = p.key()
		w.in[i].StartTicks = p.StartTicks
	}
	if _, err := w.requests.WriteAt(bytesOf(w.in[:len(procs)]), 0); err != nil {
		return fmt.Errorf("write requests: %w", err)
	}
	if err := w.runner.run(uint32(len(procs))); err != nil {
		return err
	}
	if _, err := w.usages.ReadAt(bytesOf(w.out[:len(procs)]), 0); err != nil {
		return fmt.Errorf("read usages: %w", err)
	}
	for i, p := range procs {
		w.known.usage(p, &w.out[i], &out[i])
	}
	return nil
}

// Stats returns what the reader has met so far.
func (w *Walk) Stats() Stats {
	return w.known.stats
}

// Close unloads the program.
func (w *Walk) Close() error {
	return w.objs.Close()
}

// runner runs a SEC("syscall") program. [ebpf.Program.Run] does the same, but
// allocates each time.
type runner struct {
	attr progRunAttr
	ctx  walkContext
	own  unix.Timespec
}

// walkContext is struct run in walk.bpf.c.
type walkContext struct {
	count uint32
	_     uint32
}

// progRunAttr is the test member of union bpf_attr in linux/bpf.h.
type progRunAttr struct {
	progFD      uint32
	retval      uint32
	dataSizeIn  uint32
	dataSizeOut uint32
	dataIn      uint64
	dataOut     uint64
	repeat      uint32
	duration    uint32
	ctxSizeIn   uint32
	ctxSizeOut  uint32
	ctxIn       uint64
	ctxOut      uint64
	flags       uint32
	cpu         uint32
	batchSize   uint32
	_           uint32
}

func newRunner(fd int) *runner {
	r := &runner{}
	r.attr.progFD = uint32(fd)
	r.attr.ctxSizeIn = uint32(unsafe.Sizeof(r.ctx))
	r.attr.ctxIn = uint64(uintptr(unsafe.Pointer(&r.ctx)))
	return r
}

func (r *runner) run(count uint32) error {
	if err := syncRunQueue(&r.own); err != nil {
		return err
	}
	r.ctx.count = count
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN,
		uintptr(unsafe.Pointer(&r.attr)), unsafe.Sizeof(r.attr))
	runtime.KeepAlive(r)
	if errno != 0 {
		return fmt.Errorf("run program: %w", errno)
	}
	return nil
}

// syncRunQueue makes the kernel bring the clock of this CPU's run queue up to
// now, which reading the calling thread's own CPU clock does: the programs
// take the scheduler's clock from there.
func syncRunQueue(ts *unix.Timespec) error {
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, ts); err != nil {
		return fmt.Errorf("read own CPU clock: %w", err)
	}
	return nil
}
