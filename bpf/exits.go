package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/kvmeter/kvmeter/gen"
)

// ErrNoExits says that the kernel has no KVM to hook into.
var ErrNoExits = errors.New("the kernel has no tracepoints kvm_exit and kvm_entry: no KVM, or its module is not loaded (modprobe kvm)")

// firstExit is FIRST_EXIT in exits.bpf.c.
const firstExit = 8

// ExitTimes is how many buckets there are for times between an exit and the entry
// after it, EXITS in exits.bpf.c.
const ExitTimes = 24

// ExitExponent returns the exponent of a bucket of such times: it holds those of
// 2^n to 2^(n+1)-1 ns, the first shorter ones too, the last longer.
func ExitExponent(bucket int) int {
	return firstExit + bucket
}

// HostTime is how often and how long the vCPUs of a domain were out of their
// guest, since it was added.
type HostTime struct {
	Exits   uint64
	Entries uint64            // that followed an exit that was seen
	Ns      uint64            // from each of those exits to the entry, on a CPU or not
	Buckets [ExitTimes]uint64 // of the same, by length
}

// ExitTimer times what the host does between a vCPU's exit from its guest and
// its next entry. It is for one goroutine at a time.
//
// Loading takes CAP_BPF and CAP_PERFMON; nothing after that takes any (before
// Linux 5.19 CAP_BPF where kernel.unprivileged_bpf_disabled is set).
type ExitTimer struct {
	objs  gen.ExitsObjects
	watch watchlist
	times *ebpf.Memory
	out   HostTime
	buf   []gen.ExitsHostTime // of one domain, by CPU
}

// LoadExits loads the programs, detached. Its errors are those of [LoadWalk]
// but for [ErrNoTaskIterator], and [ErrNoExits].
func LoadExits() (*ExitTimer, error) {
	cpus, err := ebpf.PossibleCPU()
	if err == nil {
		err = checkPIDNamespace()
	}
	if err != nil {
		return nil, fmt.Errorf("load exits: %w", err)
	}
	x := &ExitTimer{buf: make([]gen.ExitsHostTime, cpus)}
	spec, err := gen.LoadExits()
	if err != nil {
		return nil, fmt.Errorf("load exits: %w", err)
	}
	spec.Maps[gen.ExitsMapHostTimes].MaxEntries = uint32(maxDomains * cpus)
	if err := spec.Variables[gen.ExitsVarCpus].Set(uint32(cpus)); err != nil {
		return nil, fmt.Errorf("load exits: %w", err)
	}
	if err := spec.LoadAndAssign(&x.objs, nil); err != nil {
		if errors.Is(err, btf.ErrNotFound) || errors.Is(err, ebpf.ErrNotSupported) {
			err = ErrNoExits
		}
		return nil, fmt.Errorf("load exits: %w", explain(err))
	}
	x.watch = newWatchlist(x.objs.Domains, x.objs.Epoch, x.objs.Since, x.objs.Maybe)
	if x.times, err = x.objs.HostTimes.Memory(); err != nil {
		x.objs.Close()
		return nil, fmt.Errorf("load exits: %w", err)
	}
	return x, nil
}

// Attach makes the programs run.
func (x *ExitTimer) Attach() error {
	if x.watch.attached() {
		return nil
	}
	err := x.watch.begin()
	if err == nil {
		err = x.watch.attach(x.objs.Left, x.objs.Entered)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("attach exits: %w", explain(err)), x.Detach())
	}
	return nil
}

// Detach stops the programs. What was counted stays.
func (x *ExitTimer) Detach() error {
	return x.watch.detach()
}

// Add watches the process of a domain as id, from zero. For an id that is
// watched already it does nothing. The error is [ErrTooManyDomains] or the
// kernel's.
func (x *ExitTimer) Add(id uint32, p Proc) error {
	_, err := x.watch.add(id, p, func(slot uint32) error {
		clear(x.buf)
		_, err := x.times.WriteAt(bytesOf(x.buf), offset(slot, x.buf))
		return err
	})
	return err
}

// Remove forgets id, if it is there.
func (x *ExitTimer) Remove(id uint32) error {
	return x.watch.remove(id)
}

// Read calls emit with what was counted of each domain, in order of Add. h is
// valid until emit returns. It does not allocate.
func (x *ExitTimer) Read(emit func(id uint32, h *HostTime)) error {
	for _, d := range x.watch.list {
		if _, err := x.times.ReadAt(bytesOf(x.buf), offset(d.slot, x.buf)); err != nil {
			return fmt.Errorf("read exits: %w", err)
		}
		x.out = HostTime{}
		for cpu := range x.buf {
			b := &x.buf[cpu]
			x.out.Exits += b.Exits
			x.out.Entries += b.Entries
			x.out.Ns += b.Ns
			for i, n := range b.Buckets {
				x.out.Buckets[i] += n
			}
		}
		emit(d.id, &x.out)
	}
	return nil
}

// Watched returns how many domains are watched, and how many can be.
func (x *ExitTimer) Watched() (n, limit int) {
	return len(x.watch.list), maxDomains
}

// Lost returns how many exits and entries the kernel has not shown to the
// programs, as far as it tells, and how many exits there was no memory for.
func (x *ExitTimer) Lost() (missed, dropped uint64, err error) {
	missed, err = misses(x.objs.Left, x.objs.Entered)
	if err == nil {
		err = x.objs.Dropped.Get(&dropped)
	}
	return missed, dropped, err
}

// Close detaches and unloads the programs.
func (x *ExitTimer) Close() error {
	return errors.Join(x.Detach(), x.objs.Close())
}
