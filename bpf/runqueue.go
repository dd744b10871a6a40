package bpf

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/kvmeter/kvmeter/gen"
)

// firstWait is FIRST_WAIT in runqueue.bpf.c.
const firstWait = 10

// Waits is how many buckets there are for waits, WAITS in runqueue.bpf.c.
const Waits = 24

// WaitExponent returns the exponent of a bucket of waits: it holds those of 2^n
// to 2^(n+1)-1 ns, the first shorter ones too, the last longer.
func WaitExponent(bucket int) int {
	return firstWait + bucket
}

// Culprit is who had the CPU that a vCPU thread waited for.
type Culprit int

// The culprits, as enum culprit in runqueue.bpf.c has them from 1 on.
const (
	Nobody   Culprit = iota // the CPU was idle and had to wake up
	Self                    // another thread of the same domain
	Domain                  // a thread of another domain that is watched
	Host                    // any other task
	Quota                   // nobody: the thread's cgroup had used up its CPU quota
	Culprits                // how many there are
)

// RunQueueWaits is how the vCPU threads of a domain waited for a CPU, as far as
// seen since it was added. A wait is added when the slice after it ends.
type RunQueueWaits struct {
	Switches uint64           // times that they were put on a CPU
	By       [Culprits]uint64 // time that they waited, in ns
	Buckets  [Waits]uint64    // waits by length; a thread that got a CPU at once waited 0 ns
}

// RunQueue counts how long vCPU threads wait for a CPU, at each switch of the
// scheduler. It is for one goroutine at a time.
//
// A wait is the growth of the kernel's own figure for it (run_delay, what
// schedstat shows), and is put down to one culprit: where the thread was
// runnable when it left its CPU, to its cgroup's quota if that was used up, else
// to the task that took the CPU; where it had slept, to the task that had the CPU
// just before it got it. Who else ran meanwhile, and where, is not looked at.
//
// Loading takes CAP_BPF and CAP_PERFMON; nothing after that takes any (before
// Linux 5.19 CAP_BPF where kernel.unprivileged_bpf_disabled is set).
type RunQueue struct {
	objs  gen.RunQueueObjects
	watch watchlist
	waits *ebpf.Memory
	iter  *link.Iter
	fresh bool // domains were added whose threads are not adopted
	out   RunQueueWaits
	buf   []gen.RunQueueWait // of one domain, by CPU
}

// LoadRunQueue loads the programs, detached. Its errors are those of
// [LoadWalk] but for [ErrNoTaskIterator].
func LoadRunQueue() (*RunQueue, error) {
	cpus, err := ebpf.PossibleCPU()
	if err == nil {
		err = checkPIDNamespace()
	}
	if err != nil {
		return nil, fmt.Errorf("load runqueue: %w", err)
	}
	r := &RunQueue{buf: make([]gen.RunQueueWait, cpus)}
	spec, err := gen.LoadRunQueue()
	if err != nil {
		return nil, fmt.Errorf("load runqueue: %w", err)
	}
	spec.Maps[gen.RunQueueMapWaits].MaxEntries = uint32(maxDomains * cpus)
	if err := spec.Variables[gen.RunQueueVarCpus].Set(uint32(cpus)); err != nil {
		return nil, fmt.Errorf("load runqueue: %w", err)
	}
	if err := spec.LoadAndAssign(&r.objs, nil); err != nil {
		return nil, fmt.Errorf("load runqueue: %w", explain(err))
	}
	r.watch = newWatchlist(r.objs.Domains, r.objs.Epoch, r.objs.Since, r.objs.Maybe)
	if r.waits, err = r.objs.Waits.Memory(); err == nil {
		r.iter, err = link.AttachIter(link.IterOptions{Program: r.objs.Adopt})
	}
	if err != nil {
		r.objs.Close()
		return nil, fmt.Errorf("load runqueue: %w", explain(err))
	}
	return r, nil
}

// Attach makes the programs run.
func (r *RunQueue) Attach() error {
	if r.watch.attached() {
		return nil
	}
	err := r.watch.begin()
	if err == nil {
		// First new threads, then those there are, so that none is missed.
		err = r.watch.attach(r.objs.ThreadMade, r.objs.Renamed)
	}
	if err == nil {
		r.fresh = true
		err = r.Adopt()
	}
	if err == nil {
		err = r.watch.attach(r.objs.Switched)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("attach runqueue: %w", explain(err)), r.Detach())
	}
	return nil
}

// Detach stops the programs. What was counted stays.
func (r *RunQueue) Detach() error {
	return r.watch.detach()
}

// Add watches the process of a domain as id, from zero. [RunQueue.Adopt] has to
// follow. For an id that is watched already it does nothing. The error is
// [ErrTooManyDomains] or the kernel's.
func (r *RunQueue) Add(id uint32, p Proc) error {
	fresh, err := r.watch.add(id, p, func(slot uint32) error {
		clear(r.buf)
		_, err := r.waits.WriteAt(bytesOf(r.buf), offset(slot, r.buf))
		return err
	})
	r.fresh = r.fresh || fresh
	return err
}

// Remove forgets id, if it is there.
func (r *RunQueue) Remove(id uint32) error {
	return r.watch.remove(id)
}

// Adopt visits the threads of the host, if domains were added, and watches
// theirs. Threads that are made from then on are watched as they are.
func (r *RunQueue) Adopt() error {
	if !r.fresh || !r.watch.attached() {
		return nil
	}
	it, err := r.iter.Open()
	if err != nil {
		return fmt.Errorf("open iterator: %w", err)
	}
	defer it.Close()
	// The program writes nothing there: the first read runs it to the end.
	var buf [1]byte
	for err == nil {
		_, err = it.Read(buf[:])
	}
	if err != io.EOF {
		return fmt.Errorf("run iterator: %w", err)
	}
	r.fresh = false
	return nil
}

// Read calls emit with what was counted of each domain, in order of Add. w is
// valid until emit returns. It does not allocate.
func (r *RunQueue) Read(emit func(id uint32, w *RunQueueWaits)) error {
	for _, d := range r.watch.list {
		if _, err := r.waits.ReadAt(bytesOf(r.buf), offset(d.slot, r.buf)); err != nil {
			return fmt.Errorf("read runqueue: %w", err)
		}
		r.out = RunQueueWaits{}
		for cpu := range r.buf {
			b := &r.buf[cpu]
			r.out.Switches += b.Switches
			for c := range r.out.By {
				r.out.By[c] += b.ByNs[c+1]
			}
			for i, n := range b.Buckets {
				r.out.Buckets[i] += n
			}
		}
		emit(d.id, &r.out)
	}
	return nil
}

// Watched returns how many domains are watched, and how many can be.
func (r *RunQueue) Watched() (n, limit int) {
	return len(r.watch.list), maxDomains
}

// Lost returns how many switches the kernel has not shown to the program, as
// far as it tells, and how many were of threads that were not adopted yet.
func (r *RunQueue) Lost() (missed, strangers uint64, err error) {
	missed, err = misses(r.objs.Switched)
	if err == nil {
		err = r.objs.Strangers.Get(&strangers)
	}
	return missed, strangers, err
}

// Close detaches and unloads the programs.
func (r *RunQueue) Close() error {
	return errors.Join(r.Detach(), r.iter.Close(), r.objs.Close())
}
