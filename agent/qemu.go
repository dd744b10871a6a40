package agent

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// Sizes of a disk, by the bits of task.sizes.
const (
	iCapacity = iota
	iAllocation
	iUsage
	sizeCount
)

var (
	sizeMeters = [sizeCount]*sample.Meter{sample.DiskCapacity, sample.DiskAllocation, sample.DiskUsage}
	// allSizeMeters are sums over the disks of a domain.
	allSizeMeters = [sizeCount]*sample.Meter{sample.AllCapacity, sample.AllAllocation, sample.AllUsage}
	// allDiskMeters are sums over all disks that a domain has had.
	allDiskMeters = [diskCount]*sample.Meter{
		iReadBytes: sample.AllReadBytes, iWriteBytes: sample.AllWriteBytes,
		iReadRequests: sample.AllReadRequests, iWriteRequests: sample.AllWriteRequests,
	}
)

// Meters of what a guest's balloon driver tells, by the bits of task.memory.
const (
	iAvailable = iota
	iMemoryUsage
	iSwapIn
	iSwapOut
	memoryCount
)

var memoryMeters = [memoryCount]*sample.Meter{
	sample.MemoryAvailable, sample.MemoryUsage, sample.MemorySwapIn, sample.MemorySwapOut,
}

// perfMeters are the hardware counters by libvirt's names of them; the bits of
// task.perf are their indexes.
var perfMeters = []struct {
	meter *sample.Meter
	event string
}{
	{sample.PerfCPUCycles, "cpu_cycles"},
	{sample.PerfInstructions, "instructions"},
	{sample.PerfCacheReferences, "cache_references"},
	{sample.PerfCacheMisses, "cache_misses"},
	{sample.CPUL3Cache, "cmt"},
	{sample.MemoryBandwidthTotal, "mbmt"},
	{sample.MemoryBandwidthLocal, "mbml"},
}

// disks reports whether the plan asks for anything of a disk.
func (t *task) disks() bool {
	return t.disk|t.sizes|t.allDisks|t.allSizes != 0 || len(t.diskChanges)+len(t.sumChanges) > 0
}

// groups are what libvirt is asked for of a domain.
func (t *task) groups(def *collectors.Definition) (groups collectors.Groups) {
	if t.disks() && len(def.Disks) > 0 {
		groups |= collectors.DiskStatistics
	}
	if t.memory != 0 {
		groups |= collectors.MemoryStatistics
	}
	if t.perf != 0 && def.Perf {
		groups |= collectors.PerfStatistics
	}
	return groups
}

// pollQEMU runs a plan of meters that libvirt asks QEMU for, one domain after
// the other, so that a QEMU that hangs costs its own numbers only. Nothing is
// locked while libvirt is asked.
func (a *Agent) pollQEMU(ctx context.Context, t *task) {
	base := time.Now().UnixMicro()
	defer func() {
		t.gaps.record(time.Now(), a.deliver.AddGap)
		a.flush(t, base)
		t.last = base
	}()
	if a.guest == nil {
		return
	}
	start := a.runs.libvirt.begin()
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
	if err := a.pollStopped(ctx, t, base); err != nil {
		last = err
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

// pollGuest reads what libvirt and QEMU say of one domain.
func (a *Agent) pollGuest(ctx context.Context, t *task, d *domain, base int64) error {
	a.mu.Lock()
	groups, images := t.groups(d.def), d.def.Images()
	a.mu.Unlock()
	if groups == 0 {
		return nil
	}
	check := a.checkSoon(d, t.interval)
	if check {
		a.checks.Lock()
		defer a.checks.Unlock()
	}
	q := a.ask(ctx, d, groups, check)
	s, err, at := &q.GuestStats, q.err, q.at
	var lengths map[string]uint64
	if err == nil && t.sizes|t.allSizes != 0 {
		lengths = a.images.lengths(ctx, images)
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	if a.domains[d.pid] != d || ctx.Err() != nil {
		return nil // it ended meanwhile, or the agent is being stopped
	}
	if check {
		a.judge(d, q, base)
	}
	a.silent(d, err, at)
	if groups&collectors.DiskStatistics != 0 {
		a.emitDisks(t, d, s.Disks, lengths, at, base, err)
	}
	if groups&collectors.MemoryStatistics != 0 {
		a.emitMemory(t, d, &s.Memory, at.UnixMicro(), base, err)
	}
	if groups&collectors.PerfStatistics != 0 {
		a.emitPerf(t, d, s.Perf, at.UnixMicro(), base, err)
	}
	return err
}

// silent notes whether QEMU has answered.
func (a *Agent) silent(d *domain, err error, at time.Time) {
	if err == nil {
		d.answered, d.mute = at, ""
		a.metrics.silent.DeleteLabelValues(d.uuid)
		return
	}
	if d.mute == "" {
		a.log.Warn("QEMU does not answer libvirt; what only it knows of the domain is missing", zap.String("domain", d.uuid), zap.String("name", d.name), zap.Error(err))
	}
	if d.answered.IsZero() {
		d.answered = d.found
	}
	d.mute = err.Error()
	a.metrics.silent.WithLabelValues(d.uuid).Set(at.Sub(d.answered).Seconds())
}

// muteNotes says whose QEMU has not answered when it was asked last, and why.
func (a *Agent) muteNotes() (notes []string) {
	for _, d := range a.order {
		if d.mute != "" {
			notes = append(notes, fmt.Sprintf("QEMU of the domain %s (%s) has not told of its disks and memory for %s: %s", d.name, d.uuid, time.Since(d.answered).Round(time.Second), d.mute))
		}
	}
	return notes
}

// emitDisks adds what the guest asked of its disks. err is why nobody knows.
func (a *Agent) emitDisks(t *task, d *domain, all []collectors.DiskStats, lengths map[string]uint64, at time.Time, base int64, err error) {
	now := at.UnixMicro()
	if err != nil {
		for i := range d.disks {
			t.missDisk(&d.disks[i], now, err.Error())
		}
		return
	}
	var sums diskSizes
	requests, whole := uint64(0), true
	for i := range d.disks {
		k := &d.disks[i]
		stats := find(all, k.device)
		if stats == nil {
			t.missDisk(k, now, "QEMU has no statistics of the disk")
			whole = false
			continue
		}
		d.advance(k, stats)
		requests += stats.ReadRequests + stats.WriteRequests
		sizes := sizesOf(&d.def.Disks[i], stats, lengths)
		sums.add(&sizes)
		a.emitDisk(t, k, &sizes, at, base)
	}
	if len(all) > 0 {
		d.requests[0], d.requests[1] = d.requests[1], requestCount{at, requests}
	}
	if whole {
		a.emitSums(t, d, &sums, at, base)
	}
}

// diskSizes are the sizes of a disk, or of several.
type diskSizes struct {
	bytes   [sizeCount]uint64
	missing uint32 // bits: those that are not known
}

func (s *diskSizes) add(o *diskSizes) {
	for i, v := range o.bytes {
		s.bytes[i] += v
	}
	s.missing |= o.missing
}

// sizesOf are a disk's sizes as virDomainGetBlockInfo tells them, and with it
// Ceilometer, by what libvirt's statistics say: those have, of a file, what it
// takes on its file system in place of its length, which comes from lengths. A CD
// has whole blocks, so that its image may be larger.
func sizesOf(def *collectors.Disk, s *collectors.DiskStats, lengths map[string]uint64) (sizes diskSizes) {
	used, usage := s.Allocation, s.Physical
	if def.Kind == "file" && def.Format != "raw" || !s.HasAllocation {
		used = s.Physical
	}
	if path := def.Image(); path != "" && (s.Physical == 0 || used == 0 || used == s.Physical) {
		length, ok := lengths[path]
		if usage = length; !ok {
			sizes.missing = 1<<iCapacity | 1<<iUsage
		}
	}
	sizes.bytes = [sizeCount]uint64{iCapacity: max(s.Capacity, usage), iAllocation: used, iUsage: usage}
	return sizes
}

// emitDisk adds what was read of one disk.
func (a *Agent) emitDisk(t *task, k *disk, sizes *diskSizes, at time.Time, base int64) {
	from := orNow(k.sent, at.UnixMicro())
	k.sent = at.UnixMicro()
	if t.disk|t.sizes == 0 && len(t.diskChanges) == 0 {
		return
	}
	r := k.row
	r.Offset = k.sent - base
	a.row(t, &r, diskCount+sizeCount+len(t.diskChanges), base)
	t.addCounts(diskMeters[:], t.disk, k.last[:])
	t.addCounts(sizeMeters[:], t.sizes&^sizes.missing, sizes.bytes[:])
	for i, m := range sizeMeters {
		if t.sizes&sizes.missing&(1<<i) != 0 {
			t.gaps.miss(m.Name, k.row.Resource, from, k.sent, "the length of its image cannot be read (the agent needs search permission on the folders above it)")
		}
	}
	if len(t.diskChanges) > 0 {
		t.addChanges(t.diskChanges, k.past.move(t, at, k.last[:]), sample.Libvirt)
	}
}

// emitSums adds what was read of all disks of a domain together.
func (a *Agent) emitSums(t *task, d *domain, sizes *diskSizes, at time.Time, base int64) {
	if t.allDisks|t.allSizes == 0 && len(t.sumChanges) == 0 {
		return
	}
	sums := *d.gone
	for i := range d.disks {
		for n, v := range d.disks[i].last {
			sums[n] += v
		}
	}
	r := d.row
	r.Metadata, r.Offset = d.def.DisksMetadata, at.UnixMicro()-base
	a.row(t, &r, diskCount+sizeCount+len(t.sumChanges), base)
	t.addCounts(allDiskMeters[:], t.allDisks, sums[:])
	t.addCounts(allSizeMeters[:], t.allSizes&^sizes.missing, sizes.bytes[:])
	if len(t.sumChanges) > 0 {
		t.addChanges(t.sumChanges, d.sumPast.move(t, at, sums[:]), sample.Libvirt)
	}
}

// addCounts adds those of the meters that want says to the current row.
func (t *task) addCounts(meters []*sample.Meter, want uint32, values []uint64) {
	for i, m := range meters {
		if want&(1<<i) != 0 {
			t.builder.Add(m.MeterRef, sample.Libvirt, sample.Uint(values[i]))
		}
	}
}

// emitMemory adds what the guest's balloon driver tells. What it never told is
// not missing: there may be no driver. err is why nobody knows.
func (a *Agent) emitMemory(t *task, d *domain, s *collectors.MemoryStats, now, base int64, err error) {
	var values [memoryCount]sample.Volume
	var has uint32
	set := func(i int, ok bool, kib uint64) {
		if ok {
			values[i], has = mebibytes(kib), has|1<<i
		}
	}
	why := "the guest's balloon driver does not tell it any more"
	if err != nil {
		why = err.Error()
	} else {
		set(iAvailable, s.HasAvailable, s.Available)
		switch {
		case s.HasAvailable && s.HasUsable:
			set(iMemoryUsage, true, s.Available-min(s.Usable, s.Available))
		case s.HasAvailable && s.HasUnused:
			set(iMemoryUsage, true, s.Available-min(s.Unused, s.Available))
		}
		set(iSwapIn, s.HasSwap, s.SwapIn)
		set(iSwapOut, s.HasSwap, s.SwapOut)
		if s.HasSwap {
			d.advanceSwap(s)
		}
	}
	from := orNow(d.memory.sent, now)
	d.memory.sent = now
	want := t.memory & has
	if want != 0 {
		r := d.row
		r.Offset, r.Incarnation = now-base, d.memoryIncarnation()
		a.row(t, &r, memoryCount, base)
	}
	for i, m := range memoryMeters {
		switch {
		case want&(1<<i) != 0:
			t.builder.Add(a.ref(m), sample.Libvirt, values[i])
		case t.memory&d.memory.had&(1<<i) != 0:
			t.gaps.miss(m.Name, d.uuid, from, now, why)
		}
	}
	d.memory.had |= has
}

// guestMemory is what was published of a guest's own figures.
type guestMemory struct {
	*keptMemory
	had  uint32 // bits: which meters any reading had
	sent int64  // time of the last sample or gap, µs since the epoch; 0: none
}

// keptMemory outlives the agent: words of a block, of which new ones go to the end.
type keptMemory struct {
	lives           uint64 // how often the guest's counters started at zero again
	swapIn, swapOut uint64 // KiB
}

// advanceSwap takes over the guest's own counters, which start at zero when it
// is rebooted.
func (d *domain) advanceSwap(s *collectors.MemoryStats) {
	m := d.memory
	if s.SwapIn < m.swapIn || s.SwapOut < m.swapOut {
		m.lives++
	}
	m.swapIn, m.swapOut = s.SwapIn, s.SwapOut
	d.memoryBlock.Commit()
}

// memoryIncarnation names the run of the guest's system whose counters they are.
func (d *domain) memoryIncarnation() sample.Incarnation {
	if d.memory.lives == 0 {
		return d.incarnation
	}
	return sample.IncarnationOf("memory", strconv.FormatUint(uint64(d.incarnation), 16), strconv.FormatUint(d.memory.lives, 10))
}

// emitPerf adds the hardware counters that are enabled. err is why nobody knows.
func (a *Agent) emitPerf(t *task, d *domain, events map[string]uint64, now, base int64, err error) {
	from := orNow(d.perfSent, now)
	d.perfSent = now
	started := false
	for i, p := range perfMeters {
		v, ok := events[p.event]
		switch {
		case t.perf&(1<<i) == 0:
		case err != nil && d.perfHad&(1<<i) != 0:
			t.gaps.miss(p.meter.Name, d.uuid, from, now, err.Error())
		case ok:
			if !started {
				r := d.row
				r.Offset, started = now-base, true
				a.row(t, &r, len(perfMeters), base)
			}
			t.builder.Add(p.meter.MeterRef, sample.Libvirt, sample.Uint(v))
			d.perfHad |= 1 << i
		}
	}
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
