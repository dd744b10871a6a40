// Package runqueue tells how long the vCPU threads of domains waited for a CPU,
// and who had it meanwhile.
package runqueue

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// The first series. Lengths of waits follow.
const (
	switches = iota
	bySelf
	byDomain
	byHost
	byQuota
	firstWait
)

// switchCost is what a vCPU thread's coming onto a CPU and leaving it take, about.
const switchCost = 110 * time.Nanosecond

// Hook is the [collectors.Hook] runqueue: see [bpf.RunQueue]. It needs no
// capability but to open.
type Hook struct {
	queue  *bpf.RunQueue
	series []collectors.Series
	ids    collectors.Followed
	stats  collectors.HookStats

	emit func(id uint32, w *bpf.RunQueueWaits)
	to   func(id uint32, series int, count uint64) // of the Read in progress
}

// Open loads the programs. The errors are those of [bpf.LoadRunQueue].
func Open() (*Hook, error) {
	q, err := bpf.LoadRunQueue()
	if err != nil {
		return nil, err
	}
	h := &Hook{queue: q, series: series(), ids: collectors.Followed{}}
	h.emit = h.tell
	return h, nil
}

func series() []collectors.Series {
	all := []collectors.Series{switches: {MeterRef: sample.MeterRef{Name: "runqueue.switches"}, Tally: true, Cost: switchCost}}
	for _, m := range []*sample.Meter{
		bySelf: sample.CPUPreemptedSelf, byDomain: sample.CPUPreemptedDomain,
		byHost: sample.CPUPreemptedHost, byQuota: sample.CPUPreemptedQuota,
	}[bySelf:] {
		all = append(all, collectors.Series{MeterRef: m.MeterRef, Meter: m})
	}
	for i := range bpf.Waits {
		m := sample.CPUWaitLatency
		all = append(all, collectors.Series{MeterRef: m.Part(strconv.Itoa(bpf.WaitExponent(i))), Meter: m})
	}
	return all
}

// Name returns runqueue.
func (h *Hook) Name() string { return "runqueue" }

// Origin returns [sample.RunQueue].
func (h *Hook) Origin() sample.Origin { return sample.RunQueue }

// Series lists what it counts. Switches of vCPU threads are for the comparison
// with the scheduler's own figure only.
func (h *Hook) Series() []collectors.Series { return h.series }

// Attach makes the programs run.
func (h *Hook) Attach() error { return h.queue.Attach() }

// Detach stops them.
func (h *Hook) Detach() error { return h.queue.Detach() }

// Follow watches the vCPU threads of the targets' processes. Where there are new
// ones, it visits each thread of the host once.
func (h *Hook) Follow(targets []collectors.Target) error {
	errs := []error{h.ids.Replace(collectors.IDs(targets), h.queue.Remove)}
	for _, t := range targets {
		errs = append(errs, h.queue.Add(t.ID, t.Proc))
	}
	return errors.Join(append(errs, h.queue.Adopt())...)
}

// Read emits what was counted of each domain. It does not allocate.
func (h *Hook) Read(ctx context.Context, emit func(id uint32, series int, count uint64)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h.to = emit
	return h.queue.Read(h.emit)
}

// tell emits what was counted of a domain.
func (h *Hook) tell(id uint32, w *bpf.RunQueueWaits) {
	h.to(id, switches, w.Switches)
	h.to(id, bySelf, w.By[bpf.Self])
	h.to(id, byDomain, w.By[bpf.Domain])
	h.to(id, byHost, w.By[bpf.Host])
	h.to(id, byQuota, w.By[bpf.Quota])
	for i, n := range w.Buckets {
		if n != 0 {
			h.to(id, firstWait+i, n)
		}
	}
}

// Stats counts what the hook has met. Orphans are switches of threads that it
// was about to watch.
func (h *Hook) Stats() collectors.HookStats {
	// Where they can't be read any more, the last figures stand.
	if missed, strangers, err := h.queue.Lost(); err == nil {
		h.stats.Misses, h.stats.Orphans = missed, strangers
	}
	h.stats.Entries, h.stats.MaxEntries = h.queue.Watched()
	return h.stats
}

// Close detaches and unloads the programs.
func (h *Hook) Close() error { return h.queue.Close() }
