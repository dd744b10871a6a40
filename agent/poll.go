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
	check            bool
	builder          *sample.Builder
	bytes            int   // rough size of what the builder holds
	last             int64 // time of the last poll, µs since the epoch
	gaps             openGaps
}

func newTask(p plan) *task {
	t := &task{plan: p, builder: sample.NewBuilder()}
	for _, m := range p.meters {
		t.usage |= bit(usageMeters[:], m)
		t.nic |= bit(nicMeters[:], m)
		t.disk |= bit(diskMeters[:], m)
		t.check = t.check || m == sample.CheckCPU
	}
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
	a.deliver.add(t.builder, base, from)
	t.bytes = 0
}

// poll runs a plan of meters that cost nobody but the agent.
func (a *Agent) poll(ctx context.Context, t *task) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.discover(time.Now()); err != nil {
		a.log.Warn("cannot look for domains; the known ones are polled", zap.Error(err))
	}
	base := a.read(ctx, t.usage != 0, t.nic != 0).UnixMicro()
	for _, d := range a.order {
		if !d.ready {
			continue
		}
		if t.usage != 0 {
			a.emit(t, d, base)
		}
		for n := range d.nics {
			if t.nic != 0 {
				a.emitNIC(t, &d.nics[n], base)
			}
		}
	}
	t.gaps.record(time.Now(), a.deliver.addGap)
	a.flush(t, base)
	t.last = base
	a.metrics.libvirt.Set(0)
	if a.guest != nil && a.guest.Err() == nil {
		a.metrics.libvirt.Set(1)
	}
	if !a.noted {
		a.noted = true
		for _, n := range a.allNotes() {
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
	from := t.since(d.sent, base)
	if d.fault != "" {
		t.gaps.miss("*", d.uuid, from, base, d.fault)
		d.sent = base
		return
	}
	want, missing := t.usage&d.usage.has, t.usage&d.usage.had&^d.usage.has
	if want|missing == 0 {
		return
	}
	d.sent = base
	a.row(t, &d.row, usageCount, base)
	for i, m := range usageMeters {
		switch {
		case want&(1<<i) != 0:
			t.builder.Add(m.MeterRef, d.origin, sample.Uint(d.usage.last[i]))
		case missing&(1<<i) != 0:
			t.gaps.miss(m.Name, d.uuid, from, base, string(d.origin)+" cannot count it")
		}
	}
}

// emitNIC adds what went through a NIC. That a NIC was unplugged is recorded
// once; nothing is missing from then on.
func (a *Agent) emitNIC(t *task, k *nic, base int64) {
	switch {
	case k.fault != "":
		t.gaps.miss("*", k.row.Resource, t.since(k.sent, base), base, k.fault)
		k.sent = base
	case k.lost && k.sent != 0:
		a.deliver.addGap(sample.Gap{Meter: "*", Resource: k.row.Resource, From: k.sent, To: base, Reason: "the host has no interface " + k.device + " any more"})
		k.sent = 0
	case !k.lost && k.index != 0:
		k.sent = base
		a.row(t, &k.row, nicCount, base)
		for i, m := range nicMeters {
			if t.nic&(1<<i) != 0 {
				t.builder.Add(m.MeterRef, sample.RTNL, sample.Uint(k.last[i]))
			}
		}
	}
}

// discover brings the list of domains up to date.
func (a *Agent) discover(now time.Time) (err error) {
	if now.Sub(a.scanned) >= minScan {
		start := time.Now()
		err = a.scan(now)
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
		d := a.domains[p.pid]
		if d == nil || d.start != p.start {
			d = newDomain(p, a.bootID, now)
			fresh = true
			a.log.Info("domain found", zap.String("domain", d.uuid), zap.String("name", d.name), zap.Int("pid", d.pid))
			if a.guest != nil && a.guest.Definitions()[d.uuid] == nil {
				a.guest.Refresh(d.uuid)
			}
		}
		found = append(found, d)
	})
	if err != nil {
		return err
	}
	a.found = found
	a.scanned, a.scanAll = now, false
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

// ended records what is lost with a domain whose process ended.
func (a *Agent) ended(d *domain, now int64) {
	a.log.Info("domain ended", zap.String("domain", d.uuid), zap.String("name", d.name), zap.Int("pid", d.pid))
	lost := a.devices(d)
	a.lost(append(lost, device{d.uuid, d.sent}), d, now, "the domain ended; what it used since its last sample is not counted")
}

// device is a NIC or a disk, and when it was last sampled.
type device struct {
	resource string
	sent     int64 // µs since the epoch; 0: never
}

// devices returns the NICs and disks of a domain that are polled.
func (a *Agent) devices(d *domain) []device {
	var nics, disks bool
	for _, p := range a.plans {
		nics = nics || slices.ContainsFunc(p.meters, func(m *sample.Meter) bool { return m.Resource == "nic" })
		disks = disks || slices.ContainsFunc(p.meters, func(m *sample.Meter) bool { return m.Resource == "disk" })
	}
	var all []device
	for i := range d.nics {
		if k := &d.nics[i]; nics && k.index != 0 && !k.lost {
			all = append(all, device{k.row.Resource, k.sent})
		}
	}
	for i := range d.disks {
		if disks {
			all = append(all, device{d.disks[i].row.Resource, d.disks[i].sent})
		}
	}
	return all
}

// lost records that the counters of some of a domain's resources are gone.
func (a *Agent) lost(devices []device, d *domain, now int64, why string) {
	found := now - time.Since(d.found).Microseconds()
	for _, k := range devices {
		a.deliver.addGap(sample.Gap{Meter: "*", Resource: k.resource, From: orNow(k.sent, found), To: now, Reason: why})
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
}

// identify brings in what libvirt says of a domain. A new domain waits for that
// a moment, so that its samples don't begin under no project.
func (a *Agent) identify(d *domain, now time.Time) {
	var def *collectors.Definition
	if a.guest != nil && !d.replaced {
		def = a.guest.Definitions()[d.uuid]
	}
	var taps []string
	switch {
	case def != nil:
		// While libvirt is away, a tap of that name may be another domain's.
		if def == d.def && (!d.lostNIC(now) || a.guest.Err() != nil) {
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
	before := a.devices(d)
	d.define(now, def, a.cfg.Source, a.cfg.Node, taps, a.index)
	d.ready = true
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
func (a *Agent) read(ctx context.Context, usage, links bool) time.Time {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readAtMost)
	defer cancel()
	at := time.Now()
	if usage && len(a.procs) > 0 {
		start := time.Now()
		err := a.readUsage(ctx, at.UnixMicro())
		a.runs.usage.done(start, err)
	}
	if links && a.links != nil && len(a.order) > 0 {
		start := time.Now()
		err := a.readLinks(ctx)
		a.runs.links.done(start, err)
	}
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
	gone := false
	for i, d := range a.order {
		u := &a.usages[i]
		switch {
		case u.Err == nil:
			d.usage.advance(u, func(m int) { a.metrics.heldUsage[m].Inc() })
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
			k.fault = fault
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

// advance takes over the counters of the NIC's interface, in the guest's
// direction: what the host transmits, the guest receives.
func (k *nic) advance(l rtnl.Link, m *metrics) {
	now := [nicCount]uint64{
		iInBytes: l.TxBytes, iOutBytes: l.RxBytes, iInPackets: l.TxPackets, iOutPackets: l.RxPackets,
		iInErrors: l.TxErrors, iOutErrors: l.RxErrors, iInDrops: l.TxDropped, iOutDrops: l.RxDropped,
	}
	for i, v := range now {
		if v < k.last[i] {
			m.heldNIC[i].Inc()
			continue
		}
		k.last[i] = v
	}
}
