// Package exits tells how long the vCPUs of domains were out of their guests.
package exits

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// The first series. Lengths of times in the host follow.
const (
	exits = iota
	hostTime
	firstTime
)

// exitCost is what an exit and the entry after it take, about.
const exitCost = 150 * time.Nanosecond

// Hook is the [collectors.Hook] exits: see [bpf.ExitTimer]. It needs no
// capability but to open.
type Hook struct {
	timer  *bpf.ExitTimer
	series []collectors.Series
	ids    collectors.Followed
	stats  collectors.HookStats

	emit func(id uint32, t *bpf.HostTime)
	to   func(id uint32, series int, count uint64) // of the Read in progress
}

// Open loads the programs. The errors are those of [bpf.LoadExits].
func Open() (*Hook, error) {
	x, err := bpf.LoadExits()
	if err != nil {
		return nil, err
	}
	h := &Hook{timer: x, series: series(), ids: collectors.Followed{}}
	h.emit = h.tell
	return h, nil
}

func series() []collectors.Series {
	all := []collectors.Series{
		exits:    {MeterRef: sample.MeterRef{Name: "exits.exits"}, Tally: true, Cost: exitCost},
		hostTime: {MeterRef: sample.KVMExitsTime.MeterRef, Meter: sample.KVMExitsTime},
	}
	for i := range bpf.ExitTimes {
		m := sample.KVMExitsTimes
		all = append(all, collectors.Series{MeterRef: m.Part(strconv.Itoa(bpf.ExitExponent(i))), Meter: m})
	}
	return all
}

// Name returns exits.
func (h *Hook) Name() string { return "exits" }

// Origin returns [sample.Exits].
func (h *Hook) Origin() sample.Origin { return sample.Exits }

// Series lists what it counts. Exits are for the comparison with KVM's own
// figure only.
func (h *Hook) Series() []collectors.Series { return h.series }

// Attach makes the programs run.
func (h *Hook) Attach() error { return h.timer.Attach() }

// Detach stops them.
func (h *Hook) Detach() error { return h.timer.Detach() }

// Follow watches the vCPUs of the targets' processes.
func (h *Hook) Follow(targets []collectors.Target) error {
	errs := []error{h.ids.Replace(collectors.IDs(targets), h.timer.Remove)}
	for _, t := range targets {
		errs = append(errs, h.timer.Add(t.ID, t.Proc))
	}
	return errors.Join(errs...)
}

// Read emits what was counted of each domain. It does not allocate.
func (h *Hook) Read(ctx context.Context, emit func(id uint32, series int, count uint64)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h.to = emit
	return h.timer.Read(h.emit)
}

// tell emits what was counted of a domain.
func (h *Hook) tell(id uint32, t *bpf.HostTime) {
	h.to(id, exits, t.Exits)
	h.to(id, hostTime, t.Ns)
	for i, n := range t.Buckets {
		if n != 0 {
			h.to(id, firstTime+i, n)
		}
	}
}

// Stats counts what the hook has met.
func (h *Hook) Stats() collectors.HookStats {
	// Where they can't be read any more, the last figures stand.
	if missed, dropped, err := h.timer.Lost(); err == nil {
		h.stats.Misses, h.stats.Dropped = missed, dropped
	}
	h.stats.Entries, h.stats.MaxEntries = h.timer.Watched()
	return h.stats
}

// Close detaches and unloads the programs.
func (h *Hook) Close() error { return h.timer.Close() }
