package agent

import (
	"context"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// pollQEMU runs a plan of meters that libvirt asks QEMU for, one domain after
// the other, so that a QEMU that hangs costs its own numbers only. Nothing is
// locked while libvirt is asked.
func (a *Agent) pollQEMU(ctx context.Context, t *task) {
	base := time.Now().UnixMicro()
	defer func() {
		t.gaps.record(time.Now(), a.deliver.addGap)
		a.flush(t, base)
		t.last = base
	}()
	if a.guest == nil {
		return
	}
	start := time.Now()
	if err := a.guest.Err(); err != nil {
		a.runs.libvirt.done(start, err)
		for _, m := range t.meters {
			t.gaps.miss(m.Name, "*", orNow(t.last, base), base, "libvirt does not answer: "+err.Error())
		}
		return
	}
	var last error
	for _, d := range a.defined() {
		if ctx.Err() != nil {
			return
		}
		if err := a.pollGuest(ctx, t, d, base); err != nil {
			last = err
		}
	}
	a.runs.libvirt.done(start, last)
}

// defined returns the domains that libvirt knows.
func (a *Agent) defined() []*domain {
	a.mu.Lock()
	defer a.mu.Unlock()
	// What discovery cannot tell, the other polls log.
	_ = a.discover(time.Now())
	var ds []*domain
	for _, d := range a.order {
		if d.def != nil && !d.replaced {
			ds = append(ds, d)
		}
	}
	return ds
}

// pollGuest reads what libvirt and QEMU say of one domain. cpu.time is
// bracketed by readings of our own.
func (a *Agent) pollGuest(ctx context.Context, t *task, d *domain, base int64) error {
	a.asking.Lock()
	before, ok := a.processTime(ctx, t, d)
	s, err := a.guest.Stats(ctx, d.uuid, t.check, t.disk != 0)
	at := time.Now()
	after, ok2 := a.processTime(ctx, t, d)
	a.asking.Unlock()

	a.mu.Lock()
	defer a.mu.Unlock()
	if a.domains[d.pid] != d || ctx.Err() != nil {
		return nil // it ended meanwhile, or the agent is being stopped
	}
	now := at.UnixMicro()
	if err != nil {
		if t.check {
			t.gaps.miss(sample.CheckCPU.Name, d.uuid, orNow(t.last, base), now, err.Error())
		}
		for i := range d.disks {
			t.missDisk(&d.disks[i], now, err.Error())
		}
		return err
	}
	switch {
	case ok && ok2 && s.HasCPU:
		r := d.row
		r.Offset = now - base
		a.row(t, &r, 1, base)
		t.builder.Add(sample.CheckCPU.MeterRef, sample.Libvirt, sample.Int(outside(s.CPUTime, before, after)))
	case t.check:
		t.gaps.miss(sample.CheckCPU.Name, d.uuid, orNow(t.last, base), now, "libvirt or the agent could not tell the process's CPU time")
	}
	total := uint64(0)
	for i := range d.disks {
		k := &d.disks[i]
		stats := find(s.Disks, k.device)
		if stats == nil {
			if t.disk != 0 {
				t.missDisk(k, now, "QEMU has no statistics of the disk")
			}
			continue
		}
		d.advance(k, stats)
		k.sent = now
		total += stats.ReadRequests + stats.WriteRequests
		r := k.row
		r.Offset = now - base
		a.row(t, &r, diskCount, base)
		for i, m := range diskMeters {
			if t.disk&(1<<i) != 0 {
				t.builder.Add(m.MeterRef, sample.Libvirt, sample.Uint(k.last[i]))
			}
		}
	}
	if len(s.Disks) > 0 {
		d.requests[0], d.requests[1] = d.requests[1], requestCount{at, total}
	}
	return nil
}

// missDisk notes that a disk could not be read.
func (t *task) missDisk(k *disk, now int64, why string) {
	t.gaps.miss("*", k.row.Resource, orNow(k.sent, now), now, why)
	k.sent = now
}

func orNow(t, now int64) int64 {
	if t == 0 {
		return now
	}
	return t
}

func find(disks []collectors.DiskStats, device string) *collectors.DiskStats {
	for i := range disks {
		if disks[i].Device == device {
			return &disks[i]
		}
	}
	return nil
}

// processTime reads a domain's process CPU time for the check.
func (a *Agent) processTime(ctx context.Context, t *task, d *domain) (uint64, bool) {
	if !t.check {
		return 0, false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var out [1]bpf.Usage
	if err := a.readers[a.reader].Read(ctx, []bpf.Proc{d.proc}, out[:]); err != nil || out[0].Err != nil {
		return 0, false
	}
	return out[0].Process, true
}

// outside returns how far v lies outside of low to high: 0 if it does not.
func outside(v, low, high uint64) int64 {
	switch {
	case v < low:
		return -int64(low - v)
	case v > high:
		return int64(v - high)
	}
	return 0
}
