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
	usages array[gen.WalkUsage]
	vcpus  array[gen.WalkVcpu]
	asked  map[uint32]gen.IterSlot // what the map slots holds
	want   map[uint32]gen.IterSlot
	known  []known
	buf    [1]byte
	own    unix.Timespec
	stats  Stats
}

// LoadIter loads and attaches the program. The privileges that it and Read
// need, and its errors, are those of [LoadWalk].
func LoadIter() (*Iter, error) {
	it := &Iter{asked: map[uint32]gen.IterSlot{}, want: map[uint32]gen.IterSlot{}}
	if err := it.load(); err != nil {
		_ = it.Close()
		return nil, fmt.Errorf("load iter: %w", err)
	}
	return it, nil
}

func (it *Iter) load() error {
	if err := checkPIDNamespace(); err != nil {
		return err
	}
	if err := gen.LoadIterObjects(&it.objs, nil); err != nil {
		return explain(err)
	}
	var err error
	if it.link, err = link.AttachIter(link.IterOptions{Program: it.objs.Iter}); err != nil {
		return fmt.Errorf("attach: %w", explain(err))
	}
	if it.usages, err = mapArray[gen.WalkUsage](it.objs.Usages); err != nil {
		return err
	}
	it.vcpus, err = mapArray[gen.WalkVcpu](it.objs.Vcpus)
	return err
}

// Origin returns [OriginIter].
func (it *Iter) Origin() string {
	return OriginIter
}

// Read does what [Walk.Read] does. It visits every thread of the system once
// for each 1024 processes, and allocates a little. Of several procs with the
// same PID it reads the last.
func (it *Iter) Read(ctx context.Context, procs []Proc, out []Usage) error {
	if len(out) < len(procs) {
		return fmt.Errorf("read iter: room for %d of %d processes", len(out), len(procs))
	}
	for len(it.known) < len(procs) {
		it.known = append(it.known, known{})
	}
	it.stats.Reads++
	it.stats.Processes += uint64(len(procs))
	for i := 0; i < len(procs); i += maxProcesses {
		end := min(len(procs), i+maxProcesses)
		if err := it.read(ctx, procs[i:end], out[i:end], it.known[i:end]); err != nil {
			return fmt.Errorf("read iter: %w", err)
		}
	}
	return nil
}

func (it *Iter) read(ctx context.Context, procs []Proc, out []Usage, known []known) error {
	if err := it.ask(procs); err != nil {
		return err
	}
	recs := it.usages.values[:len(procs)]
	for try := uint32(0); ; try++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		clear(recs)
		if err := it.pass(); err != nil {
			return err
		}
		if !markTorn(recs, try) || try == iterTries-1 {
			break
		}
	}
	told := uint32(0)
	for i, p := range procs {
		known[i].vcpus = known[i].vcpus[:0]
		told += recs[i].VcpuNumber
		slot := it.asked[p.key()]
		if p.StartTicks != 0 && slot.StartTicks != p.StartTicks {
			it.stats.fail(&out[i], ErrReused)
			continue
		}
		it.stats.usage(&recs[slot.Index], &out[i])
	}
	// The threads of several processes come in turn.
	for v := range told {
		rec := &it.vcpus.values[v]
		if i := rec.Slot; out[i].Err == nil {
			known[i].vcpus = append(known[i].vcpus, vcpu(rec))
		}
	}
	return nil
}

// VCPUs does what [Walk.VCPUs] does.
func (it *Iter) VCPUs(i int) []VCPUUsage {
	return it.known[i].vcpus
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
func (it *Iter) pass() error {
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
	return it.stats
}

// Close detaches and unloads the program.
func (it *Iter) Close() error {
	var err error
	if it.link != nil {
		err = it.link.Close()
	}
	return errors.Join(err, it.usages.unmap(), it.vcpus.unmap(), it.objs.Close())
}
