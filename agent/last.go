package agent

import (
	"context"
	"maps"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// What was counted between the last poll and the end is read in time: of a
// process by the hook at its end, of a NIC from the kernel's news of removed
// interfaces, of disks while the domain is paused before it is taken away, of
// what hooks count as long as they follow the domain, which is until the next poll.

// lastTask returns the task that makes last samples, of all that the plans ask for.
func lastTask(plans []plan, hs *hooks) *task {
	t := &task{builder: sample.NewBuilder()}
	for _, p := range plans {
		one := newTask(p, hs)
		t.meters = append(t.meters, p.meters...)
		t.usage, t.nic, t.deltas = t.usage|one.usage, t.nic|one.nic, t.deltas || one.deltas
		t.disk, t.allDisks = t.disk|one.disk, t.allDisks|one.allDisks
	}
	t.hooks = hs.asked(t.meters)
	return t
}

// flushLast hands on the last samples, which are of the time base.
func (a *Agent) flushLast(base int64) {
	if a.lives.task.builder.Len() > 0 {
		a.flush(a.lives.task, base)
	}
}

// lastOfHooks sends what the hooks have counted of a domain that ended or whose
// devices change.
func (a *Agent) lastOfHooks(d *domain) {
	t := a.lives.task
	if d.id == 0 || len(t.hooks) == 0 {
		return
	}
	base := time.Now().UnixMicro()
	a.hooks.read(context.Background(), t.hooks, nil, fresh{}, base)
	a.emitHooked(t, d.id, &d.cpuRow, base)
	for i := range d.nics {
		a.emitHooked(t, d.nics[i].id, &d.nics[i].row, base)
	}
	for i := range d.disks {
		a.emitHooked(t, d.disks[i].id, &d.disks[i].row, base)
	}
	a.flushLast(base)
}

// lastOfNICs sends what NICs had counted in all whose interfaces were removed
// since it was called last: of the domains that run or whose ends are not
// accounted yet, and of others.
func (a *Agent) lastOfNICs(others ...*domain) {
	if a.links == nil {
		return
	}
	now := time.Now()
	base := now.UnixMicro()
	err := a.links.Removed(func(l rtnl.Removed) {
		known := false
		for _, d := range a.order {
			known = a.lastOfNIC(d, l, base) || known
		}
		for _, e := range a.lives.ends {
			known = e.d != nil && a.lastOfNIC(e.d, l, base) || known
		}
		for _, d := range others {
			known = a.lastOfNIC(d, l, base) || known
		}
		if !known {
			maps.DeleteFunc(a.lives.late, func(_ string, l lateLink) bool { return now.Sub(l.at) > lostAfter })
			a.lives.late[l.Name] = lateLink{l, now}
		}
	})
	if err != nil {
		a.log.Warn("what some NICs had counted at their end is not known", zap.Error(err))
	}
	a.flushLast(base)
}

// lateLink is an interface that was removed before anybody told whose it was.
type lateLink struct {
	rtnl.Removed
	at time.Time
}

// lateLink returns the interface of a NIC that was removed since the domain was
// found.
func (a *Agent) lateLink(d *domain, device string) (lateLink, bool) {
	l, ok := a.lives.late[device]
	return l, ok && l.at.After(d.found)
}

// indexOf returns the index of the interface that the domain has or had by that
// name, or 0.
func (a *Agent) indexOf(d *domain, device string) int {
	if a.links != nil && a.links.Elsewhere(d.pid, device) {
		return 0
	}
	i := a.index(device)
	if l, ok := a.lateLink(d, device); ok && (i == 0 || a.lives.ends[d.proc] != nil) {
		return l.Index
	}
	return i
}

// lastOfLateNICs sends what a domain's NICs had counted that were removed before
// anybody told whose they were.
func (a *Agent) lastOfLateNICs(d *domain) {
	base := time.Now().UnixMicro()
	for i := range d.nics {
		if l, ok := a.lateLink(d, d.nics[i].device); ok && a.lastOfNIC(d, l.Removed, base) {
			delete(a.lives.late, l.Name)
		}
	}
	a.flushLast(base)
}

// lastOfNIC sends what the domain's NIC had counted, and reports whether it is
// that one.
func (a *Agent) lastOfNIC(d *domain, l rtnl.Removed, base int64) (found bool) {
	for i := range d.nics {
		k := &d.nics[i]
		if k.index != l.Index || k.lost {
			continue
		}
		found = true
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
	return found
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
			if p.Over {
				a.resumed(p.UUID)
			} else {
				asking.Go(func() { a.lastOfDisks(ctx, p.UUID) })
			}
		}
	}
}

// resumed notes that a domain's disks count on.
func (a *Agent) resumed(uuid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if d := a.domainOf(uuid); d != nil {
		d.paused, d.pauses = false, d.pauses+1
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
