package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// task is a plan that runs.
type task struct {
	plan
	usage, nic, disk uint32 // bits: indexes of the meters asked for
	vcpu, facts      uint32

	sizes, allDisks, allSizes, memory, perf         uint32
	cpuChanges, nicChanges, diskChanges, sumChanges []change
	deltas                                          bool      // some of deltaMeters are asked for
	moved                                           moved     // of the resource that is being sent
	at                                              time.Time // of the reading that is being sent
	kvm                                             bool      // some of KVM's statistics are asked for
	kvmAt                                           time.Time // when the plan had them last
	hooks                                           []taskHook
	builder                                         *sample.Builder
	bytes                                           int   // rough size of what the builder holds
	last                                            int64 // time of the last poll, µs since the epoch
	gaps                                            openGaps
}

func newTask(p plan, hs *hooks) *task {
	t := &task{plan: p, builder: sample.NewBuilder(), hooks: hs.asked(p.meters)}
	for _, m := range p.meters {
		t.usage |= bit(usageMeters[:], m)
		t.nic |= bit(nicMeters[:], m)
		t.disk |= bit(diskMeters[:], m)
		t.vcpu |= bit(vcpuMeters[:], m)
		t.facts |= bit(factMeters[:], m)
		t.sizes |= bit(sizeMeters[:], m)
		t.allDisks |= bit(allDiskMeters[:], m)
		t.allSizes |= bit(allSizeMeters[:], m)
		t.memory |= bit(memoryMeters[:], m)
		for i := range perfMeters {
			if perfMeters[i].meter == m {
				t.perf |= 1 << i
			}
		}
		t.deltas = t.deltas || slices.Contains(deltaMeters[:], m)
		t.kvm = t.kvm || m == sample.KVMExits || m == sample.KVMHaltPoll || m == sample.CheckHookExits
	}
	t.cpuChanges, t.nicChanges = p.wanted(cpuChanges), p.wanted(nicChanges)
	t.diskChanges, t.sumChanges = p.wanted(diskChanges), p.wanted(sumChanges)
	return t
}

func bit(list []*sample.Meter, m *sample.Meter) uint32 {
	if i := slices.Index(list, m); i >= 0 {
		return 1 << i
	}
	return 0
}

// maxBytes bounds a batch: it must decode, with room to spare.
const maxBytes = sample.MaxDecoded / 2

// Rough sizes on the wire, for the bound.
const (
	rowBytes    = 64
	sampleBytes = 10
)

// row starts a row, in another batch if this one is full.
func (a *Agent) row(t *task, r *sample.Row, samples int, base int64) {
	size := rowBytes + len(r.Resource) + len(r.Project) + len(r.User) + len(r.Metadata) + samples*sampleBytes
	if t.builder.Len()+samples > sample.MaxSamples || t.bytes+size > maxBytes {
		a.flush(t, base)
	}
	t.bytes += size
	t.builder.Row(*r)
}

// flush hands on what the builder holds.
func (a *Agent) flush(t *task, base int64) {
	from := t.last
	if from == 0 {
		from = base
	}
	a.deliver.Add(t.builder, base, from)
	t.bytes = 0
}

// poll runs a plan of meters that cost nobody but the agent.
func (a *Agent) poll(ctx context.Context, t *task) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.discover(time.Now()); err != nil {
		a.log.Warn("cannot look for domains; the known ones are polled", zap.Error(err))
	}
	usage, links := t.usage|t.vcpu != 0 || len(t.cpuChanges) > 0, t.nic != 0 || t.deltas || len(t.nicChanges) > 0
	for i := range t.hooks {
		total := totals[t.hooks[i].Name()]
		usage, links = usage || total.domain != nil, links || total.nic != nil
	}
	kvm := a.kvmDue(t, time.Now())
	at := a.read(ctx, usage, links, kvm, t.hooks)
	base := at.UnixMicro()
	t.at = at
	for _, d := range a.order {
		if !d.ready {
			continue
		}
		a.emit(t, d, base)
		a.emitFacts(t, d, base)
		a.emitVCPUs(t, d, base)
		if kvm {
			a.emitKVM(t, d, base)
		}
		for n := range d.nics {
			a.emitNIC(t, d, &d.nics[n], base)
		}
		for n := range d.disks {
			a.emitHooked(t, d.disks[n].id, &d.disks[n].row, base)
		}
	}
	a.emitStopped(t, base)
	t.missHooks(base)
	t.gaps.record(time.Now(), a.deliver.AddGap)
	a.flush(t, base)
	t.last = base
	a.brake.look(a.hooks, time.Now(), time.Duration(a.metrics.spent.Load()))
	a.metrics.libvirt.Set(0)
	if a.guest != nil && a.guest.Err() == nil {
		a.metrics.libvirt.Set(1)
	}
	if !a.noted {
		a.noted = true
		for _, n := range a.domainNotes() {
			a.log.Warn("not everything can be collected", zap.String("note", n))
		}
	}
}

// since returns from when on a resource is missing in the plan: it was last
// sent, by any plan, at sent; 0: never.
func (t *task) since(sent, now int64) int64 {
	if sent == 0 || t.last == 0 {
		return now
	}
	return min(sent, t.last)
}

// emit adds what the domain has used. A domain that could not be read is left
// out whole, and recorded as a gap; so is a meter that could be read before.
func (a *Agent) emit(t *task, d *domain, base int64) {
	if t.usage == 0 && len(t.hooks) == 0 && len(t.cpuChanges) == 0 {
		return
	}
	from := t.since(d.sent, base)
	byLibvirt := a.libvirtCounts(d, &d.libvirt, d.fault != "", a.billing.usageLibvirt, a.billing.usageFirst)
	if d.fault != "" {
		t.miss(usageMeters[:], t.usage, byLibvirt, d.uuid, from, base, d.fault)
		d.sent = base
		return
	}
	has := d.usage.has & a.billing.usage[d.origin]
	want, missing := t.usage&has&^byLibvirt, t.usage&uint32(d.usage.had)&^has&^byLibvirt
	hooked := t.hooked(d.id, d.short)
	if want|missing == 0 && hooked == 0 && len(t.cpuChanges) == 0 {
		return
	}
	d.sent = base
	a.row(t, &d.cpuRow, usageCount+len(t.cpuChanges)+hooked, base)
	if len(t.cpuChanges) > 0 && has&(1<<iCPU) != 0 {
		if m := d.cpuPast.move(t, t.at, []uint64{d.usage.value(iCPU)}); m != nil {
			m.vcpus = d.described.VCPUs
			t.addChanges(t.cpuChanges, m, d.origin)
		}
	}
	for i, m := range usageMeters {
		switch {
		case want&(1<<i) != 0:
			t.builder.Add(m.MeterRef, d.origin, sample.Uint(d.usage.value(i)))
		case missing&(1<<i) != 0:
			why := string(d.origin) + " cannot count it"
			if d.usage.has&(1<<i) != 0 {
				why = notAllowed(d.origin)
			}
			t.gaps.miss(m.Name, d.uuid, from, base, why)
		}
	}
	t.emitHooks(d.id, d.short)
}

// emitVCPUs adds what each vCPU that is plugged in has used.
func (a *Agent) emitVCPUs(t *task, d *domain, base int64) {
	want := t.vcpu & a.billing.vcpu[d.origin]
	if t.vcpu == 0 {
		return
	}
	for _, v := range d.usage.vcpus {
		if v == nil || v.left != 0 {
			continue
		}
		r := d.row
		r.Resource = v.resource
		from := t.since(v.sent, base)
		v.sent = base
		why := d.fault
		if why == "" && d.usage.has&(1<<iCPU) == 0 {
			why = string(d.origin) + " cannot count it"
		}
		if why == "" && want == 0 {
			why = notAllowed(d.origin)
		}
		if why != "" {
			t.gaps.miss("*", v.resource, from, base, why)
			continue
		}
		a.row(t, &r, vcpuCount, base)
		for i, m := range vcpuMeters {
			switch {
			case want&(1<<i) == 0:
			case i == iVCPURun || d.usage.has&(1<<iWait) != 0:
				t.builder.Add(m.MeterRef, d.origin, sample.Uint(v.last[i]))
			}
		}
	}
}

// emitNIC adds what went through a NIC. That a NIC was unplugged is recorded
// once; nothing is missing from then on.
func (a *Agent) emitNIC(t *task, d *domain, k *nic, base int64) {
	hooked := t.hooked(k.id, k.short)
	// That it was not found once may be a mistake, and to count on under another
	// incarnation would be one.
	failed := k.fault != "" && k.absent != 1
	byLibvirt := a.libvirtCounts(d, &k.libvirt, failed, a.billing.nicLibvirt, a.billing.nicFirst)
	switch {
	case t.nic == 0 && hooked == 0 && !t.deltas && len(t.nicChanges) == 0:
	case k.fault != "":
		t.miss(nicMeters[:], t.nic, byLibvirt, k.row.Resource, t.since(k.sent, base), base, k.fault)
		k.sent = base
	case k.lost && k.sent != 0:
		a.deliver.AddGap(sample.Gap{Meter: "*", Resource: k.row.Resource, From: k.sent, To: base, Reason: "the host has no interface " + k.device + " any more"})
		k.sent = 0
	case !k.lost && k.index != 0:
		from, asked := t.since(k.sent, base), t.nic&^byLibvirt
		if asked == 0 && hooked == 0 && !t.deltas && len(t.nicChanges) == 0 {
			return
		}
		k.sent = base
		a.row(t, &k.row, nicCount+len(deltaMeters)+len(t.nicChanges)+hooked, base)
		k.emitChanges(t)
		for i, m := range nicMeters {
			switch {
			case asked&a.billing.nicRTNL&(1<<i) != 0:
				t.builder.Add(m.MeterRef, sample.RTNL, sample.Uint(k.last[i]))
			case asked&(1<<i) != 0:
				t.gaps.miss(m.Name, k.row.Resource, from, base, notAllowed(sample.RTNL))
			}
		}
		t.emitHooks(k.id, k.short)
	}
}

// deltaMeters tell the change of a NIC's bytes since their sample before.
var deltaMeters = [...]*sample.Meter{sample.NetInBytesDelta, sample.NetOutBytesDelta, sample.NetOutPacketsDelta}

// emitChanges adds how far the NIC's counters moved. All plans share one past of
// the deltas, so that they add up to what was counted whatever their intervals.
func (k *nic) emitChanges(t *task) {
	if t.deltas {
		in, out := uint64(0), uint64(0)
		if k.told != 0 {
			in, out = k.last[iInBytes]-k.toldIn, k.last[iOutBytes]-k.toldOut
		}
		for i, v := range [len(deltaMeters)]uint64{in, out, out} {
			if slices.Contains(t.meters, deltaMeters[i]) {
				t.builder.Add(deltaMeters[i].MeterRef, sample.RTNL, sample.Uint(v))
			}
		}
		k.toldIn, k.toldOut, k.told = k.last[iInBytes], k.last[iOutBytes], 1
		k.block.Commit()
	}
	if len(t.nicChanges) > 0 {
		t.addChanges(t.nicChanges, k.past.move(t, t.at, k.last[:]), sample.RTNL)
	}
}

// discover brings the list of domains up to date.
func (a *Agent) discover(now time.Time) (err error) {
	if now.Sub(a.scanned) >= a.scanEvery() {
		start := a.runs.discovery.begin()
		err = errors.Join(a.scan(now), a.countLife())
		a.runs.discovery.done(start, err)
	}
	for _, d := range a.order {
		a.identify(d, now)
	}
	a.metrics.domains.Set(float64(len(a.order)))
	return err
}

func (a *Agent) scan(now time.Time) error {
	found := a.found[:0]
	fresh := false
	err := a.scanner.refresh(now, a.scanAll, func(p *process) {
		if a.lives.ends[bpf.Proc{PID: p.pid, StartTicks: p.start}] != nil {
			return // it still is there while it exits
		}
		d := a.domains[p.pid]
		if d == nil || d.start != p.start {
			d = a.newcomer(p, now)
			fresh = true
		}
		found = append(found, d)
	})
	if err != nil {
		return err
	}
	a.found = found
	a.scanned, a.scanAll = now, false
	if !a.swept && a.lives.swept { // of domains that ended while no agent ran, and of which nothing can be told
		a.swept = true
		a.state.Keep(func(owner sample.Incarnation) bool {
			return a.endsOf(owner) || slices.ContainsFunc(found, func(d *domain) bool { return d.owner == owner })
		})
	}
	if !fresh && len(found) == len(a.order) {
		return nil
	}
	gone := a.domains
	a.domains = make(map[int]*domain, len(found))
	for _, d := range found {
		a.domains[d.pid] = d
		if gone[d.pid] == d {
			delete(gone, d.pid)
		}
	}
	for _, d := range gone {
		a.ended(d, time.Now().UnixMicro())
	}
	a.setOrder(found)
	return nil
}

// newcomer takes in a domain that was found.
func (a *Agent) newcomer(p *process, now time.Time) *domain {
	d := newDomain(p, a.bootID, now, a.state)
	a.log.Info("domain found", zap.String("domain", d.uuid), zap.String("name", d.name), zap.Int("pid", d.pid))
	if a.guest != nil && a.guest.Definitions()[d.uuid] == nil {
		a.guest.Refresh(d.uuid)
	}
	a.followProcess(d)
	return d
}

// scanEvery is how often processes are looked for. Where execs are told, a scan
// only finds QEMUs of other names.
func (a *Agent) scanEvery() time.Duration {
	if a.lives.Lifecycle != nil && !a.lives.broken {
		return hookScan
	}
	return minScan
}

// ended lets go of a domain whose process ended. Where the hook at its end does
// not account it, what is lost is recorded.
func (a *Agent) ended(d *domain, now int64) {
	a.log.Info("domain ended", zap.String("domain", d.uuid), zap.String("name", d.name), zap.Int("pid", d.pid))
	a.metrics.differ(d.check.last, -1)
	a.metrics.silent.DeleteLabelValues(d.uuid)
	d.release()
	a.lastOfHooks(d)
	a.lastOfNICs(d)
	if !a.awaitEnd(d) {
		a.unaccounted(d, now)
	}
}

// unaccounted records what is lost with a domain.
func (a *Agent) unaccounted(d *domain, now int64) {
	a.state.Forget(d.owner)
	lost := a.devices(d)
	a.lost(append(lost, device{d.uuid, d.sent}), d, now, "the domain ended; what it used since its last sample is not counted")
}

// device is a NIC or a disk, and when it was last sampled.
type device struct {
	resource string
	sent     int64 // µs since the epoch; 0: never
}

// devices returns the NICs, disks and vCPUs of a domain that are polled; of disks
// those of which more is asked for than what hooks count to their end.
func (a *Agent) devices(d *domain) []device {
	var nics, disks, unhooked, vcpus bool
	for _, p := range a.plans {
		nics = nics || slices.ContainsFunc(p.meters, func(m *sample.Meter) bool { return m.Resource == "nic" })
		disks = disks || slices.ContainsFunc(p.meters, func(m *sample.Meter) bool { return m.Resource == "disk" })
		unhooked = unhooked || slices.ContainsFunc(p.meters, func(m *sample.Meter) bool { return m.Resource == "disk" && !a.hooks.count(m) })
		vcpus = vcpus || slices.ContainsFunc(p.meters, func(m *sample.Meter) bool { return m.Resource == "vcpu" })
	}
	var all []device
	for i := range d.nics {
		if k := &d.nics[i]; nics && (k.index != 0 && !k.lost || k.absent > 0) {
			all = append(all, device{k.row.Resource, k.sent})
		}
	}
	for i := range d.disks {
		if !d.paused && (unhooked || disks && d.disks[i].id == 0) {
			all = append(all, device{d.disks[i].row.Resource, d.disks[i].sent})
		}
	}
	for _, v := range d.usage.vcpus {
		if vcpus && v != nil && v.left == 0 {
			all = append(all, device{v.resource, v.sent})
		}
	}
	return all
}

// lost records that the counters of some of a domain's resources are gone.
func (a *Agent) lost(devices []device, d *domain, now int64, why string) {
	found := now - time.Since(d.found).Microseconds()
	for _, k := range devices {
		a.deliver.AddGap(sample.Gap{Meter: "*", Resource: k.resource, From: orNow(k.sent, found), To: now, Reason: why})
	}
}

func (a *Agent) setOrder(ds []*domain) {
	a.order = append(a.order[:0], ds...)
	slices.SortFunc(a.order, func(x, y *domain) int {
		return cmp.Or(cmp.Compare(x.uuid, y.uuid), cmp.Compare(x.start, y.start), cmp.Compare(x.pid, y.pid))
	})
	a.procs = a.procs[:0]
	for i, d := range a.order {
		a.procs = append(a.procs, d.proc)
		d.replaced = i+1 < len(a.order) && a.order[i+1].uuid == d.uuid
	}
	a.usages = make([]bpf.Usage, len(a.procs))
	a.hooks.stale = true
}

// identify brings in what libvirt says of a domain. A new domain waits for that
// a moment, so that its samples don't begin under no project.
func (a *Agent) identify(d *domain, now time.Time) {
	var def *collectors.Definition
	if a.guest != nil && !d.replaced {
		if def = a.guest.Definitions()[d.uuid]; def == nil && a.lives.ends[d.proc] != nil {
			def = a.guest.Last(d.uuid)
		}
	}
	var taps []string
	switch {
	case def != nil:
		// While libvirt is away, a tap of that name may be another domain's.
		if def == d.def && (!d.lostNIC(now) || a.guest.ErrOf(d.uuid) != nil) {
			return
		}
	case d.def != nil: // libvirt forgot it: what it said holds
		return
	case a.guest != nil && isUUID(d.process.uuid) && now.Sub(d.found) < grace && a.guest.Err() == nil:
		return
	case !d.ready || now.Sub(d.defined) >= retryTaps || d.lostNIC(now):
		var ok bool
		taps, ok = openTaps(a.proc, d.pid)
		d.blind = !ok && len(d.taps) == 0
		if len(taps) == 0 {
			taps = d.taps
		}
	default:
		return
	}
	a.lastOfHooks(d)
	a.lastOfNICs(d)
	before := a.devices(d)
	d.define(now, def, a.cfg.Source, a.cfg.Node, taps, func(name string) int { return a.indexOf(d, name) })
	d.ready, a.hooks.stale = true, true
	a.remember(d)
	a.lastOfLateNICs(d)
	after := a.devices(d)
	gone := slices.DeleteFunc(before, func(k device) bool { return slices.Contains(after, k) })
	a.lost(gone, d, time.Now().UnixMicro(), "the device was removed; what went through it since its last sample is not counted")
}

// index returns the index of the host's interface of that name, or 0.
func (a *Agent) index(name string) int {
	if a.links == nil {
		return 0
	}
	i, err := a.links.Index(name)
	if err != nil {
		return 0
	}
	return i
}

// read reads all domains, and returns when. It does not end with ctx: what only
// one asker gave up is no fault.
func (a *Agent) read(ctx context.Context, usage, links, kvm bool, asked []taskHook) time.Time {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readAtMost)
	defer cancel()
	a.hooks.follow(a.order)
	at := time.Now()
	if usage && len(a.procs) > 0 {
		start := a.runs.usage.begin()
		err := a.readUsage(ctx, at.UnixMicro())
		a.runs.usage.done(start, err)
	}
	if links && a.links != nil && len(a.order) > 0 {
		start := a.runs.links.begin()
		err := a.readLinks(ctx)
		a.runs.links.done(start, err)
	}
	if kvm {
		a.readKVM(ctx)
	}
	a.hooks.read(ctx, asked, a.order, fresh{usage, links, kvm}, at.UnixMicro())
	a.tell(at, usage && (links || a.links == nil))
	return at
}

// readUsage reads what all domains used, by the best reader that answers.
func (a *Agent) readUsage(ctx context.Context, now int64) error {
	var err error
	for i := range a.readers {
		err = a.readers[i].Read(ctx, a.procs, a.usages)
		if err == nil {
			a.changeReader(i)
			break
		}
		a.fault("usage", fmt.Sprintf("CPU time is not read by %s (%v)", a.readers[i].Origin(), err))
		if ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		for _, d := range a.order {
			a.failed(d, "no reader of CPU time answers: "+err.Error())
		}
		return err
	}
	r := a.readers[a.reader]
	a.metrics.countReader(r.Origin(), r.Stats())
	origin := sample.Origin(r.Origin())
	gone, held := false, a.metrics.heldCPU
	for i, d := range a.order {
		u := &a.usages[i]
		switch {
		case u.Err == nil:
			d.usage.advance(u, r.VCPUs(i), held)
			if a.sched != nil {
				d.usage.advanceSched(r.VCPUs(i), func(tid uint32) (uint64, error) { return a.sched.Wait(d.pid, tid) })
			}
			if d.vcpus != int(u.VCPUs) && d.vcpus != 0 && a.guest != nil { // libvirt has no event of that
				a.guest.Refresh(d.uuid)
			}
			d.origin, d.fault, d.vcpus = origin, "", int(u.VCPUs)
		case errors.Is(u.Err, bpf.ErrGone), errors.Is(u.Err, bpf.ErrReused):
			gone = true
			a.scanner.forget(d.pid)
			delete(a.domains, d.pid)
			a.ended(d, now)
		default:
			a.failed(d, u.Err.Error())
		}
	}
	if gone {
		left := make([]*domain, 0, len(a.domains))
		for _, d := range a.order {
			if a.domains[d.pid] == d {
				left = append(left, d)
			}
		}
		a.setOrder(left)
	}
	return nil
}

// failed notes that a domain could not be read.
func (a *Agent) failed(d *domain, why string) {
	if d.fault == "" {
		a.log.Warn("domain skipped", zap.String("domain", d.uuid), zap.String("reason", why))
	}
	d.fault = why
}

// changeReader notes which reader counts now.
func (a *Agent) changeReader(i int) {
	if i == 0 {
		delete(a.faults, "usage")
	}
	if i != a.reader {
		a.log.Warn("another reader counts CPU time now", zap.String("origin", a.readers[i].Origin()))
		a.reader = i
	}
}

func (a *Agent) fault(collector, what string) {
	if a.faults[collector] == "" {
		a.log.Warn("collector failed", zap.String("collector", collector), zap.String("reason", what))
	}
	a.faults[collector] = what
}

// readLinks reads the NICs of all domains.
func (a *Agent) readLinks(ctx context.Context) error {
	a.lastOfNICs()
	table, err := a.links.Read(ctx, a.table[:0])
	fault := ""
	if err != nil {
		fault = err.Error()
		a.fault("links", "network.* cannot be collected: "+fault)
	} else {
		a.table = table
		delete(a.faults, "links")
	}
	for _, d := range a.order {
		for i := range d.nics {
			k := &d.nics[i]
			if k.fault = fault; k.absent > 0 {
				k.fault = "the host has no interface " + k.device + "; it may be in another network namespace"
			}
			if err != nil || k.index == 0 {
				continue
			}
			l, ok := rtnl.Find(table, k.index)
			if k.lost = !ok; ok {
				k.advance(l, a.metrics)
			}
		}
	}
	return err
}

// advance takes over the counters of the NIC's interface.
func (k *nic) advance(l rtnl.Link, m *metrics) {
	for i, v := range k.counters(l) {
		if v < k.last[i] {
			m.heldNIC[i].Inc()
			continue
		}
		k.last[i] = v
	}
	k.block.Commit()
}

// counters returns the counters of the NIC's interface in the guest's direction:
// what a tap transmits the guest receives, what a macvtap transmits it sent.
func (k *nic) counters(l rtnl.Link) [nicCount]uint64 {
	if k.macvtap {
		return [nicCount]uint64{
			iInBytes: l.RxBytes, iOutBytes: l.TxBytes, iInPackets: l.RxPackets, iOutPackets: l.TxPackets,
			iInErrors: l.RxErrors, iOutErrors: l.TxErrors, iInDrops: l.RxDropped, iOutDrops: l.TxDropped,
		}
	}
	return [nicCount]uint64{
		iInBytes: l.TxBytes, iOutBytes: l.RxBytes, iInPackets: l.TxPackets, iOutPackets: l.RxPackets,
		iInErrors: l.TxErrors, iOutErrors: l.RxErrors, iInDrops: l.TxDropped, iOutDrops: l.RxDropped,
	}
}
