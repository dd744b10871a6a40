package bpf

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// iterTries is how often a pass is repeated for processes of which threads
// exited meanwhile.
const iterTries = 3

// Iter reads processes by a BPF iterator over all threads of the system. It is
// for kernels that can't run [Walk]. It is for one goroutine at a time.
type Iter struct {
	objs   gen.IterObjects
	link   *link.Iter
	usages *ebpf.Memory
	asked  map[uint32]gen.IterSlot // what the map slots holds
	want   map[uint32]gen.IterSlot
	out    []gen.WalkUsage
	zero   []gen.WalkUsage
	buf    [1]byte
	own    unix.Timespec
	known  histories
}

// LoadIter loads and attaches the program. The privileges that it and Read
// need, and its errors, are those of [LoadWalk].
func LoadIter() (*Iter, error) {
	it := &Iter{
		asked: map[uint32]gen.IterSlot{},
		want:  map[uint32]gen.IterSlot{},
		out:   make([]gen.WalkUsage, maxProcesses),
		zero:  make([]gen.WalkUsage, maxProcesses),
		known: histories{of: map[Proc]*history{}},
	}
	if err := checkPIDNamespace(); err != nil {
		return nil, fmt.Errorf("load iter: %w", err)
	}
	if err := gen.LoadIterObjects(&it.objs, nil); err != nil {
		return nil, fmt.Errorf("load iter: %w", explain(err))
	}
	var err error
	if it.link, err = link.AttachIter(link.IterOptions{Program: it.objs.Iter}); err != nil {
		it.objs.Close()
		return nil, fmt.Errorf("attach iter: %w", explain(err))
	}
	if it.usages, err = it.objs.Usages.Memory(); err != nil {
		it.Close()
		return nil, fmt.Errorf("map the memory of iter: %w", err)
	}
	return it, nil
}

// Origin returns [OriginIter].
func (it *Iter) Origin() string {
	return OriginIter
}

// Read does what [Walk.Read] does. It visits every thread of the system once
// for each 512 processes, and allocates a little. Of several procs with the
// same PID it reads the last.
func (it *Iter) Read(ctx context.Context, procs []Proc, out []Usage) error {
	if len(out) < len(procs) {
		return fmt.Errorf("read iter: room for %d of %d processes", len(out), len(procs))
	}
	it.known.stats.Reads++
	it.known.stats.Processes += uint64(len(procs))
	for len(procs) > 0 {
		n := min(len(procs), maxProcesses)
		if err := it.read(ctx, procs[:n], out[:n]); err != nil {
			return fmt.Errorf("read iter: %w", err)
		}
		procs, out = procs[n:], out[n:]
	}
	it.known.prune()
	return nil
}

func (it *Iter) read(ctx context.Context, procs []Proc, out []Usage) error {
	if err := it.ask(procs); err != nil {
		return err
	}
	recs := it.out[:len(procs)]
	for try := uint32(0); ; try++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := it.pass(recs); err != nil {
			return err
		}
		if !markTorn(recs, try) || try == iterTries-1 {
			break
		}
	}
	for i, p := range procs {
		slot := it.asked[p.key()]
		if p.StartTicks != 0 && slot.StartTicks != p.StartTicks {
			it.known.fail(p, &out[i], ErrReused)
			continue
		}
		it.known.usage(p, &recs[slot.Index], &out[i])
	}
	return nil
}

// ask makes the map slots hold procs and nothing else.
func (it *Iter) ask(procs []Proc) error {
	clear(it.want)
	for i, p := range procs {
		it.want[p.key()] = gen.IterSlot{Index: uint32(i), StartTicks: p.StartTicks}
	}
	for pid := range it.asked {
		if _, ok := it.want[pid]; ok {
			continue
		}
		if err := it.objs.Slots.Delete(pid); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget process %d: %w", pid, err)
		}
		delete(it.asked, pid)
	}
	for pid, slot := range it.want {
		if old, ok := it.asked[pid]; ok && old == slot {
			continue
		}
		if err := it.objs.Slots.Put(pid, slot); err != nil {
			return fmt.Errorf("ask for process %d: %w", pid, err)
		}
		it.asked[pid] = slot
	}
	return nil
}

// pass runs the iterator over the system once.
func (it *Iter) pass(recs []gen.WalkUsage) error {
	if _, err := it.usages.WriteAt(bytesOf(it.zero[:len(recs)]), 0); err != nil {
		return fmt.Errorf("clear usages: %w", err)
	}
	r, err := it.link.Open()
	if err != nil {
		return fmt.Errorf("open iterator: %w", err)
	}
	defer r.Close()
	if err := syncRunQueue(&it.own); err != nil {
		return err
	}
	// The program writes nothing there: the first read runs it to the end.
	for err == nil {
		_, err = r.Read(it.buf[:])
	}
	if err != io.EOF {
		return fmt.Errorf("run iterator: %w", err)
	}
	if _, err := it.usages.ReadAt(bytesOf(recs), 0); err != nil {
		return fmt.Errorf("read usages: %w", err)
	}
	return nil
}

// markTorn notes in recs the try that read them, and which processes lost a
// thread before it was visited. It says whether any is torn.
func markTorn(recs []gen.WalkUsage, try uint32) bool {
	torn := false
	for i := range recs {
		r := &recs[i]
		r.Retries = try
		if r.Status == statusOK && r.Threads < r.Expected {
			r.Status = statusTorn
		}
		torn = torn || r.Status == statusTorn
	}
	return torn
}

// Stats returns what the reader has met so far.
func (it *Iter) Stats() Stats {
	return it.known.stats
}

// Close detaches and unloads the program.
func (it *Iter) Close() error {
	return errors.Join(it.link.Close(), it.objs.Close())
}
