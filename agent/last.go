package agent

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// What was counted between the last poll and the end is read in time: of a
// process by the hook at its end, of a NIC from the kernel's news of removed
// interfaces, of disks while the domain is paused before it is taken away.

// lastTask returns the task that makes last samples, of all that the plans ask for.
func lastTask(plans []plan) *task {
	t := &task{builder: sample.NewBuilder()}
	for _, p := range plans {
		one := newTask(p, &hooks{})
		t.meters = append(t.meters, p.meters...)
		t.usage, t.nic, t.deltas = t.usage|one.usage, t.nic|one.nic, t.deltas || one.deltas
		t.disk, t.allDisks = t.disk|one.disk, t.allDisks|one.allDisks
	}
	return t
}

// flushLast hands on the last samples, which are of the time base.
func (a *Agent) flushLast(base int64) {
	if a.lives.task.builder.Len() > 0 {
		a.flush(a.lives.task, base)
	}
}

// lastOfNICs sends what NICs had counted in all whose interfaces were removed
// since it was called last: of the domains that run or whose ends are not
// accounted yet, and of others.
func (a *Agent) lastOfNICs(others ...*domain) {
	if a.links == nil {
		return
	}
	base := time.Now().UnixMicro()
	err := a.links.Removed(func(l rtnl.Removed) {
		for _, d := range a.order {
			a.lastOfNIC(d, l, base)
		}
		for _, e := range a.lives.ends {
			if e.d != nil {
				a.lastOfNIC(e.d, l, base)
			}
		}
		for _, d := range others {
			a.lastOfNIC(d, l, base)
		}
	})
	if err != nil {
		a.log.Warn("what some NICs had counted at their end is not known", zap.Error(err))
	}
	a.flushLast(base)
}

// lastOfNIC sends what the domain's NIC had counted, if it is that one.
func (a *Agent) lastOfNIC(d *domain, l rtnl.Removed, base int64) {
	for i := range d.nics {
		k := &d.nics[i]
		if k.index != l.Index || k.lost {
			continue
		}
		k.advance(l.Link, a.metrics)
		k.lost = true
		t := a.lives.task
		if want := t.nic & a.billing.nicRTNL; want != 0 || t.deltas {
			a.row(t, &k.row, nicCount+len(deltaMeters), base)
			k.emitChanges(t)
			for i, m := range nicMeters {
				if want&(1<<i) != 0 {
					t.builder.Add(m.MeterRef, sample.RTNL, sample.Uint(k.last[i]))
				}
			}
			k.sent = 0
		}
	}
}

// watchPauses has the disks of domains read whose vCPUs were stopped, until ctx
// ends.
func (a *Agent) watchPauses(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case p := <-a.guest.Pauses():
			if !p.Over {
				asking.Go(func() { a.lastOfDisks(ctx, p.UUID) })
				continue
			}
			a.mu.Lock()
			if d := a.domainOf(p.UUID); d != nil {
				d.paused, d.pauses = false, d.pauses+1
			}
			a.mu.Unlock()
		}
	}
}

// domainOf returns the domain that libvirt knows by the UUID, or nil.
func (a *Agent) domainOf(uuid string) *domain {
	for _, d := range a.order {
		if d.uuid == uuid && d.def != nil && !d.replaced {
			return d
		}
	}
	return nil
}

// Of a domain that is about to be taken away, libvirt's threads have the monitor
// now and then.
const (
	pauseTries = 100
	pauseRetry = 10 * time.Millisecond
)

// lastOfDisks sends what a domain's disks have counted while its vCPUs stand
// still: it may be taken away.
func (a *Agent) lastOfDisks(ctx context.Context, uuid string) {
	a.mu.Lock()
	d, t := a.domainOf(uuid), a.lives.task
	if d == nil || t.disk|t.allDisks == 0 || len(d.disks) == 0 {
		a.mu.Unlock()
		return
	}
	pauses := d.pauses
	a.mu.Unlock()
	for range pauseTries {
		q := a.ask(ctx, d, collectors.DiskStatistics, false)
		a.mu.Lock()
		over := a.domains[d.pid] != d || d.pauses != pauses || ctx.Err() != nil
		if !over && q.err == nil {
			over, d.paused = true, true
			base := q.at.UnixMicro()
			a.emitDisks(t, d, q.Disks, nil, q.at, base, nil)
			t.gaps.end(a.deliver.AddGap)
			a.flushLast(base)
		}
		a.mu.Unlock()
		if over {
			return
		}
		time.Sleep(pauseRetry)
	}
}
