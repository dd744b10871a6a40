package bpf

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// Walk reads processes by a BPF program that visits each of their threads when
// it is asked to, and remembers them: of a process that has not run since the
// last read it looks at little more than that. It needs Linux 6.7. It is for
// one goroutine at a time.
type Walk struct {
	objs     gen.WalkObjects
	requests array[gen.WalkRequest]
	usages   array[gen.WalkUsage]
	vcpus    array[gen.WalkVcpu]
	known    []known
	fresh    bool // what known holds is not what the program remembers
	runner   *runner[gen.WalkRun]
	held     uint32    // requests that the program may remember
	heldAt   time.Time // when there were as many
	stats    Stats
}

// forgetAfter is after how long with fewer requests the program forgets the
// others: single processes may be asked for between two polls of all.
const forgetAfter = time.Minute

// known is what was read of the process at that place last.
type known struct {
	usage Usage
	vcpus []VCPUUsage
}

// LoadWalk loads the program. That takes CAP_BPF and CAP_PERFMON; Read then
// needs neither (before Linux 5.19 it needs CAP_BPF where
// kernel.unprivileged_bpf_disabled is set). The error says what is missing:
// [ErrNoBTF], [ErrNoCapability], [ErrPIDNamespace] or [ErrNoTaskIterator].
func LoadWalk() (*Walk, error) {
	w := &Walk{fresh: true}
	if err := w.load(); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("load walk: %w", err)
	}
	return w, nil
}

func (w *Walk) load() error {
	if err := checkPIDNamespace(); err != nil {
		return err
	}
	spec, err := gen.LoadWalk()
	if err != nil {
		return err
	}
	if err := ownLeaders(spec); err != nil {
		return err
	}
	if err := spec.LoadAndAssign(&w.objs, nil); err != nil {
		return explain(err)
	}
	if w.requests, err = mapArray[gen.WalkRequest](w.objs.Requests); err != nil {
		return err
	}
	if w.usages, err = mapArray[gen.WalkUsage](w.objs.Usages); err != nil {
		return err
	}
	if w.vcpus, err = mapArray[gen.WalkVcpu](w.objs.Vcpus); err != nil {
		return err
	}
	w.runner = newRunner[gen.WalkRun](w.objs.Walk.FD())
	return nil
}

// ownLeaders tells the kernel that the map of processes holds references to
// their leaders. The source says so with __kptr, which clang 14 drops.
func ownLeaders(spec *ebpf.CollectionSpec) error {
	process, ok := spec.Maps[gen.WalkMapProcesses].Value.(*btf.Struct)
	if !ok || len(process.Members) == 0 {
		return errors.New("the map of processes has no struct")
	}
	leader, ok := process.Members[0].Type.(*btf.Pointer)
	if !ok {
		return errors.New("the map of processes does not begin with a pointer")
	}
	if _, ok := leader.Target.(*btf.TypeTag); !ok {
		leader.Target = &btf.TypeTag{Type: leader.Target, Value: "kptr"}
	}
	return nil
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
// own hypervisor stole within the tick), the next read may tell less.
func (w *Walk) Read(ctx context.Context, procs []Proc, out []Usage) error {
	if len(out) < len(procs) {
		return fmt.Errorf("read walk: room for %d of %d processes", len(out), len(procs))
	}
	for len(w.known) < len(procs) {
		w.known = append(w.known, known{})
	}
	w.stats.Reads++
	w.stats.Processes += uint64(len(procs))
	fresh := w.fresh || len(procs) > maxProcesses
	w.fresh = true // until all is read
	for i := 0; i < len(procs); i += maxProcesses {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("read walk: %w", err)
		}
		end := min(len(procs), i+maxProcesses)
		if err := w.read(procs[i:end], out[i:end], w.known[i:end], fresh); err != nil {
			return fmt.Errorf("read walk: %w", err)
		}
	}
	w.fresh = len(procs) > maxProcesses
	return nil
}

func (w *Walk) read(procs []Proc, out []Usage, known []known, fresh bool) error {
	for i, p := range procs {
		if r := &w.requests.values[i]; r.Pid != p.key() || r.StartTicks != p.StartTicks {
			r.Pid, r.StartTicks = p.key(), p.StartTicks
		}
	}
	run := gen.WalkRun{Count: uint32(len(procs))}
	if fresh {
		run.Fresh = 1
	}
	switch now := time.Now(); {
	case run.Count >= w.held:
		w.held, w.heldAt = run.Count, now
	case now.Sub(w.heldAt) > forgetAfter:
		run.Known, w.held, w.heldAt = w.held, run.Count, now
	}
	if err := w.runner.run(&run); err != nil {
		return err
	}
	for i := range procs {
		rec, k := &w.usages.values[i], &known[i]
		if rec.Status == statusUnchanged {
			w.stats.Idle++
			out[i] = k.usage
			continue
		}
		w.stats.usage(rec, &k.usage)
		out[i] = k.usage
		k.vcpus = k.vcpus[:0]
		if k.usage.Err != nil {
			continue
		}
		for v := range rec.VcpuNumber {
			k.vcpus = append(k.vcpus, vcpu(&w.vcpus.values[rec.FirstVcpu+v]))
		}
	}
	return nil
}

// VCPUs returns what the vCPU threads of the i-th process have used, as of the
// last Read and until the next one. Those that no record was left for are
// missing: [Stats.LostVCPUs].
func (w *Walk) VCPUs(i int) []VCPUUsage {
	return w.known[i].vcpus
}

// Stats returns what the reader has met so far.
func (w *Walk) Stats() Stats {
	return w.stats
}

// Close unloads the program.
func (w *Walk) Close() error {
	return errors.Join(w.requests.unmap(), w.usages.unmap(), w.vcpus.unmap(), w.objs.Close())
}

// runner runs a SEC("syscall") program with an argument of type T.
// [ebpf.Program.Run] does the same, but allocates each time.
type runner[T any] struct {
	attr progRunAttr
	arg  T
	own  unix.Timespec
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

func newRunner[T any](fd int) *runner[T] {
	r := &runner[T]{}
	r.attr.progFD = uint32(fd)
	r.attr.ctxSizeIn = uint32(unsafe.Sizeof(r.arg))
	r.attr.ctxIn = uint64(uintptr(unsafe.Pointer(&r.arg)))
	return r
}

func (r *runner[T]) run(arg *T) error {
	if err := syncRunQueue(&r.own); err != nil {
		return err
	}
	r.arg = *arg
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
