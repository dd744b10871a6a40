package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// Where the agent's own reading of a process or NIC fails, or the setting
// origins says so, libvirt counts: at a cadence of its own, in a goroutine of its
// own, so that no poll waits for it. It reads the same counters of the kernel.

// standby says what libvirt counts of a process or NIC. Like the domain that it
// is in, it is guarded by the agent's lock.
type standby struct {
	counts uint32    // bits: indexes of the meters
	since  time.Time // that it is to
	at     time.Time // of its last reading
}

// newFallover returns the task of what libvirt may have to count of the plans,
// or nil where that is nothing.
func newFallover(plans []plan, b *billing) *task {
	t := &task{builder: sample.NewBuilder()}
	for _, p := range plans {
		for _, m := range p.meters {
			t.usage |= bit(usageMeters[:], m) & b.usageLibvirt
			t.nic |= bit(nicMeters[:], m) & b.nicLibvirt
		}
	}
	if t.usage|t.nic == 0 {
		return nil
	}
	return t
}

// libvirtCounts says what libvirt counts of a process or NIC now, of what it may
// count and of what it is the first to. What it did not tell in time is not
// among that, but is still asked for.
func (a *Agent) libvirtCounts(d *domain, s *standby, failed bool, may, first uint32) uint32 {
	counts := first
	if failed {
		counts = may
	}
	if counts == 0 || a.guest == nil || d.def == nil || d.replaced || a.guest.ErrOf(d.uuid) != nil {
		*s = standby{}
		return 0
	}
	now := time.Now()
	if s.counts == 0 {
		s.since = now
		select {
		case a.falling <- struct{}{}:
		default:
		}
	}
	s.counts = counts
	if now.Sub(s.since) > a.patience() && now.Sub(s.at) > a.patience() {
		return 0
	}
	return counts
}

// patience is how long a reading by libvirt holds.
func (a *Agent) patience() time.Duration { return 2*a.cfg.FalloverInterval + a.cfg.LibvirtTimeout }

// standIn has libvirt count what it is to, until ctx ends.
func (a *Agent) standIn(ctx context.Context) {
	var last time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.falling:
		case <-timer.C:
		}
		wait := a.cfg.FalloverInterval - time.Since(last)
		if wait <= 0 && a.pollLibvirt(ctx) {
			last, wait = time.Now(), a.cfg.FalloverInterval
		}
		if wait > 0 {
			timer.Reset(wait)
		}
	}
}

// pollLibvirt sends what libvirt is to count, and reports whether there was any.
func (a *Agent) pollLibvirt(ctx context.Context) bool {
	cpu, nics := a.toCount()
	if len(cpu) == 0 && !nics {
		return false
	}
	start := a.runs.fallover.begin()
	all, err := a.guest.Counters(ctx, cpu, nics)
	a.runs.fallover.done(start, err)
	if err != nil {
		a.log.Warn("libvirt cannot stand in", zap.Error(err))
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fallover == nil { // a reload has just made it so
		return true
	}
	now := time.Now()
	base := now.UnixMicro()
	for _, d := range a.order {
		s, ok := all[d.uuid]
		if !ok || d.replaced || !d.ready {
			continue
		}
		if s.HasCPU && d.libvirt.counts != 0 {
			d.libvirt.at = now
			a.standFor(&d.cpuRow, a.fallover.usage&d.libvirt.counts, usageMeters[:], base, func(i int) uint64 {
				return hold(&d.usage.last[i], s.CPUTime, a.metrics.heldUsage[i])
			})
			d.usage.block.Commit()
		}
		for i := range d.nics {
			k := &d.nics[i]
			n := slices.IndexFunc(s.NICs, func(n collectors.NICStats) bool { return n.Device == k.device })
			if n < 0 || k.libvirt.counts == 0 || k.index == 0 && k.absent == 0 || k.lost {
				continue
			}
			k.libvirt.at, k.sent = now, base
			theirs := libvirtCounters(&s.NICs[n])
			a.standFor(&k.row, a.fallover.nic&k.libvirt.counts, nicMeters[:], base, func(i int) uint64 {
				return hold(&k.last[i], theirs[i], a.metrics.heldNIC[i])
			})
			k.block.Commit()
		}
	}
	a.flush(a.fallover, base)
	a.fallover.last = base
	return true
}

// toCount returns of which domains libvirt is to tell the CPU time, and whether
// it is to tell that of NICs.
func (a *Agent) toCount() (cpu []string, nics bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fallover == nil {
		return nil, false
	}
	for _, d := range a.order {
		if d.libvirt.counts != 0 {
			cpu = append(cpu, d.uuid)
		}
		nics = nics || slices.ContainsFunc(d.nics, func(k nic) bool { return k.libvirt.counts != 0 })
	}
	return cpu, nics
}

// standFor sends those of a row's meters that want says.
func (a *Agent) standFor(r *sample.Row, want uint32, meters []*sample.Meter, base int64, value func(i int) uint64) {
	if want == 0 {
		return
	}
	a.row(a.fallover, r, len(meters), base)
	for i, m := range meters {
		if want&(1<<i) != 0 {
			a.fallover.builder.Add(m.MeterRef, sample.Libvirt, sample.Uint(value(i)))
		}
	}
}

// hold takes over a reading where it is no lower than the last value, and
// returns what is published.
func hold(last *uint64, v uint64, held interface{ Inc() }) uint64 {
	if v < *last {
		held.Inc()
	} else {
		*last = v
	}
	return *last
}

// libvirtCounters returns the counters of a NIC by libvirt.
func libvirtCounters(n *collectors.NICStats) [nicCount]uint64 {
	return [nicCount]uint64{
		iInBytes: n.InBytes, iOutBytes: n.OutBytes, iInPackets: n.InPackets, iOutPackets: n.OutPackets,
		iInErrors: n.InErrors, iOutErrors: n.OutErrors, iInDrops: n.InDrops, iOutDrops: n.OutDrops,
	}
}

// miss notes what a plan asks for and nobody counts of a resource.
func (t *task) miss(meters []*sample.Meter, asked, counted uint32, resource string, from, now int64, reason string) {
	if counted == 0 {
		t.gaps.miss("*", resource, from, now, reason)
		return
	}
	for i, m := range meters {
		if asked&^counted&(1<<i) != 0 {
			t.gaps.miss(m.Name, resource, from, now, reason)
		}
	}
}

// notAllowed is why a meter is missing that an origin counts.
func notAllowed(o sample.Origin) string {
	return "the setting origins does not have it billed from " + string(o)
}

// falloverNotes says what libvirt counts in place of the agent's own readers,
// and what nobody may.
func (a *Agent) falloverNotes() (notes []string) {
	processes, nics := 0, 0
	for _, d := range a.order {
		if d.libvirt.counts != 0 {
			processes++
		}
		for i := range d.nics {
			if d.nics[i].libvirt.counts != 0 {
				nics++
			}
		}
	}
	if processes+nics > 0 {
		notes = append(notes, fmt.Sprintf("libvirt counts cpu.process of %d domains and network.* of %d NICs, every %s", processes, nics, a.cfg.FalloverInterval))
	}
	origin := sample.Origin(a.readers[a.reader].Origin())
	for i, m := range usageMeters {
		if (a.billing.usage[origin]|a.billing.usageLibvirt)&(1<<i) == 0 {
			notes = append(notes, fmt.Sprintf("%s is not collected: %s counts, and the setting origins leaves it out", m.Name, origin))
		}
	}
	return notes
}
