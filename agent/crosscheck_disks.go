package agent

import (
	"context"
	"fmt"
	"slices"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// The disk hook counts what reaches the host's kernel, libvirt what the guest
// asked of its disk. They are the same for a raw image that the page cache is
// not in front of, and else they are not compared.

// diskChecks are the comparisons of a disk, and what libvirt says.
var diskChecks = [...]struct {
	check  *sample.Check
	theirs func(*collectors.DiskStats) uint64
}{
	{sample.CheckDiskReads, func(s *collectors.DiskStats) uint64 { return s.ReadRequests }},
	{sample.CheckDiskReadBytes, func(s *collectors.DiskStats) uint64 { return s.ReadBytes }},
	{sample.CheckDiskWrites, func(s *collectors.DiskStats) uint64 { return s.WriteRequests }},
	{sample.CheckDiskWriteBytes, func(s *collectors.DiskStats) uint64 { return s.WriteBytes }},
}

// diskRead is what the hook has counted of a disk, in the order of diskChecks.
type diskRead struct {
	counted [len(diskChecks)]uint64
	turns   int    // how often the hook was switched
	why     string // why it cannot be compared; empty: it can
	failed  bool   // because it could not be read now
}

// diskCheck is a disk at its last check: what is compared is what came since.
type diskCheck struct {
	at            int64 // µs since the epoch
	turns         int
	before, after [len(diskChecks)]uint64
	theirs        [len(diskChecks)]uint64
}

// incomparable says why a disk's host side is not its guest side, or nothing.
func incomparable(k *collectors.Disk) string {
	switch {
	case k == nil:
		return "libvirt does not describe it"
	case k.Kind != "file" && k.Kind != "block":
		return fmt.Sprintf("its image is no file or device of this host (%s)", k.Kind)
	case k.Format != "raw":
		return fmt.Sprintf("its image is %s: QEMU reads and writes more than the guest asks for", k.Format)
	case !k.Direct:
		return "the page cache stands between the guest and its image"
	case len(k.Sources) != 1:
		return fmt.Sprintf("it has %d images", len(k.Sources))
	}
	return ""
}

// observeDisks has the disk hook read, if it counts disks that can be compared.
func (a *Agent) observeDisks(ctx context.Context, d *domain) []diskRead {
	all := make([]diskRead, len(d.disks))
	hook := a.hooks.find("disk")
	read := false
	for i := range d.disks {
		k := &d.disks[i]
		var def *collectors.Disk
		if d.def != nil {
			if n := slices.IndexFunc(d.def.Disks, func(o collectors.Disk) bool { return o.Device == k.device }); n >= 0 {
				def = &d.def.Disks[n]
			}
		}
		o := &all[i]
		switch o.why = incomparable(def); {
		case o.why != "":
		case hook == nil || !hook.on:
			o.why = "the disk hook is not attached"
		default:
			read = true
		}
	}
	if !read {
		return all
	}
	err := hook.again(ctx)
	for i := range all {
		o := &all[i]
		if o.why != "" {
			continue
		}
		o.turns = hook.turns
		c := hook.counts[d.disks[i].id]
		switch {
		case err != nil:
			o.why, o.failed = "the disk hook cannot be read: "+err.Error(), true
		case c == nil || c.read != hook.reads:
			o.why = "the disk hook has seen nothing of it"
		default:
			for n := range diskChecks {
				o.counted[n] = hook.value(c, diskChecks[n].check.Of)
			}
		}
	}
	return all
}

// again reads the hook between two polls.
func (h *hook) again(ctx context.Context) error {
	h.reads++
	h.last = nil
	return h.Read(ctx, h.emit)
}

// value returns what was counted of a meter that is no family.
func (h *hook) value(c *counts, m *sample.Meter) uint64 {
	n := slices.IndexFunc(h.series, func(s collectors.Series) bool { return s.Meter == m })
	if n < 0 {
		return 0
	}
	return c.block.Words[n]
}

// diskFigures sets what the hook and libvirt counted since the last check
// against each other.
func (d *domain) diskFigures(before, after *own, s *collectors.GuestStats, now int64) (all []figures) {
	checked := map[sample.Incarnation]diskCheck{}
	for i := range d.disks {
		k := &d.disks[i]
		if i >= len(before.disks) || i >= len(after.disks) {
			break // plugged in meanwhile
		}
		b, e := &before.disks[i], &after.disks[i]
		f := figures{row: &k.row, device: k.device, why: b.why, failed: b.failed || e.failed}
		if f.why == "" {
			f.why = e.why
		}
		theirs := find(s.Disks, k.device)
		if f.why == "" && theirs == nil {
			f.why, f.failed = "libvirt has no statistics of it: QEMU's monitor is busy or stuck", true
		}
		base, ok := d.check.disks[k.row.Incarnation]
		if f.why == "" {
			next := diskCheck{at: now, turns: e.turns, before: b.counted, after: e.counted}
			for n := range diskChecks {
				next.theirs[n] = diskChecks[n].theirs(theirs)
			}
			checked[k.row.Incarnation] = next
			switch {
			case !ok:
				f.why = "it is compared from its second check on: each side counts from a time of its own"
			case b.turns != base.turns || e.turns != base.turns:
				f.why = "the disk hook was switched since the last check"
			}
		} else if ok {
			checked[k.row.Incarnation] = base // the next check compares over the longer time
		}
		for n := range diskChecks {
			f := f
			f.check = diskChecks[n].check
			if f.why == "" {
				f.since = base.at
				f.low, f.high = b.counted[n]-min(b.counted[n], base.after[n]), e.counted[n]-base.before[n]
				f.theirs = checked[k.row.Incarnation].theirs[n] - min(checked[k.row.Incarnation].theirs[n], base.theirs[n])
			}
			all = append(all, f)
		}
	}
	d.check.disks = checked
	return all
}
