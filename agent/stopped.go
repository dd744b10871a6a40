package agent

import (
	"context"
	"time"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// always are the bits of task.facts that a domain has whether it runs or not;
// stopped are those that it has beside, where stopped domains are asked for.
const (
	always  = 1<<iInstance | 1<<iInstanceFlavor | 1<<iRootSize | 1<<iEphemeralSize
	stopped = 1<<iVCPUs | 1<<iMemory | 1<<iPowerState
)

// idle returns the domains that do not run.
func (a *Agent) idle() []*collectors.Definition {
	if a.guest == nil || a.guest.Err() != nil {
		return nil
	}
	return a.guest.Stopped()
}

// stoppedRow is the row of a domain that does not run. It has gauges only, which
// count nothing.
func (a *Agent) stoppedRow(def *collectors.Definition, resource string, metadata []byte) sample.Row {
	return sample.Row{
		Resource: resource, Incarnation: sample.IncarnationOf("stopped", resource), Source: a.cfg.Source,
		Project: def.Project, User: def.User, Metadata: metadata,
	}
}

// emitStopped adds what domains that do not run are made of.
func (a *Agent) emitStopped(t *task, base int64) {
	want := t.facts & always
	if a.cfg.StoppedDomains {
		want |= t.facts & stopped
	}
	if want == 0 {
		return
	}
	for _, def := range a.idle() {
		if a.running(def.UUID) {
			continue
		}
		r := a.stoppedRow(def, def.UUID, def.Metadata)
		a.row(t, &r, factCount, base)
		for i := range factMeters {
			if want&(1<<i) == 0 {
				continue
			}
			if ref, v, ok := a.fact(i, def); ok {
				t.builder.Add(ref, sample.Libvirt, v)
			}
		}
	}
}

// pollStopped adds the sizes of the disks of domains that do not run.
func (a *Agent) pollStopped(ctx context.Context, t *task, base int64) error {
	if !a.cfg.StoppedDomains || t.sizes == 0 {
		return nil
	}
	var last error
	for _, def := range a.idle() {
		for i := range def.Disks {
			k := &def.Disks[i]
			s, err := a.guest.Sizes(ctx, def.UUID, k.Device)
			now := time.Now().UnixMicro()
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				last = err
				t.gaps.miss("*", k.Resource, orNow(t.last, now), now, err.Error())
				continue
			}
			a.mu.Lock()
			r := a.stoppedRow(def, k.Resource, k.Metadata)
			r.Offset = now - base
			a.row(t, &r, sizeCount, base)
			t.addCounts(sizeMeters[:], t.sizes, []uint64{iCapacity: max(s.Capacity, s.Physical), iAllocation: s.Allocation, iUsage: s.Physical})
			a.mu.Unlock()
		}
	}
	return last
}

// running reports whether a process has the domain's UUID: what libvirt says of it may
// be older.
func (a *Agent) running(uuid string) bool {
	for _, d := range a.order {
		if d.uuid == uuid {
			return true
		}
	}
	return false
}
