package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// The cross-check asks libvirt, one domain at a time and each once an interval,
// for what the agent counts too, and compares. It bills nothing.

// idleCheck is how soon the cross-check looks again where there is nothing to
// check.
const idleCheck = 5 * time.Second

// checker is what the checks of all domains share.
type checker struct {
	*sync.Mutex // held during a check; taken before the agent's others
	builder     *sample.Builder
	tolerances  map[*sample.Check]Tolerance
	wanted      map[*sample.Meter]bool // that polling.yaml asks for
}

func newChecker(cfg *Config, sources []pollSource) (checker, error) {
	t, err := tolerances(cfg.CrosscheckTolerance)
	return checker{&sync.Mutex{}, sample.NewBuilder(), t, wantedChecks(sources)}, err
}

// checkState is what is known of a domain's comparisons.
type checkState struct {
	at    time.Time // of the last; zero: never
	last  []comparison
	disks map[sample.Incarnation]diskCheck // of the disks, at the last one
}

// figures are what both sides count of one thing.
type figures struct {
	check     *sample.Check
	row       *sample.Row
	device    string // of a NIC or disk
	low, high uint64 // ours, right before libvirt was asked and right after
	theirs    uint64
	counters  int    // that each figure is the sum of
	since     int64  // when both began to count, µs since the epoch; 0: with the counter itself
	why       string // why there is nothing to compare; empty: there is
	failed    bool   // because it could not be read now
}

// comparison is what came of it.
type comparison struct {
	check        *sample.Check
	resource     string
	device       string
	since        int64
	ours, theirs uint64 // ours: of what was read before and after, the nearest to theirs
	difference   int64  // theirs less ours
	relative     float64
	tolerance    uint64
	verdict      int
	why          string
	alarm        bool // the operator was told that they differ
}

// key names what is compared.
func (c *comparison) key() string { return c.check.Of.Name + " of " + c.resource }

// compare decides.
func (f *figures) compare(t Tolerance) comparison {
	c := comparison{check: f.check, resource: f.row.Resource, device: f.device, since: f.since, verdict: sample.NotComparable, why: f.why}
	if f.why != "" {
		return c
	}
	c.difference = outside(f.theirs, f.low, f.high)
	c.theirs, c.ours = f.theirs, f.theirs-uint64(c.difference)
	greater := max(c.ours, c.theirs)
	if greater > 0 {
		c.relative = float64(c.difference) / float64(greater)
	}
	c.tolerance = t.of(greater, f.counters)
	c.verdict = sample.Agrees
	if size(c.difference) > c.tolerance {
		c.verdict = sample.Differs
	}
	return c
}

func size(v int64) uint64 {
	if v < 0 {
		return uint64(-v)
	}
	return uint64(v)
}

// own is what the agent reads of a domain right before and after libvirt is
// asked.
type own struct {
	usage bpf.Usage
	links []rtnl.Link
	err   error      // of links
	disks []diskRead // of the domain's disks, in their order

	exits     uint64 // from the guest to KVM
	exitVCPUs uint32 // whose they are
	exitsWhy  string // why they are not known; empty: they are
	exitsFail bool   // because they could not be read now
}

// observe reads the agent's own sources of one domain.
func (a *Agent) observe(ctx context.Context, d *domain) (o own) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, readAtMost)
	defer cancel()
	var out [1]bpf.Usage
	if err := a.readers[a.reader].Read(ctx, []bpf.Proc{d.proc}, out[:]); err != nil {
		out[0].Err = err
	}
	o.usage = out[0]
	switch {
	case a.links == nil:
		o.err = errors.New("there are none")
	case len(d.nics) > 0:
		o.links, o.err = a.links.Read(ctx, nil)
	}
	o.disks = a.observeDisks(ctx, d)
	a.observeKVM(ctx, d, &o)
	return o
}

// observeKVM reads KVM's statistics of one domain.
func (a *Agent) observeKVM(ctx context.Context, d *domain, o *own) {
	if a.kvm.reader == nil {
		o.exitsWhy = "the agent does not read KVM's statistics"
		return
	}
	var out [1]bpf.KVMUsage
	if err := a.kvm.reader.Read(ctx, []bpf.Proc{d.proc}, []uint32{o.usage.VCPUs}, out[:]); err != nil {
		out[0].Err = err
	}
	n := slices.Index(a.kvm.reader.Fields(), "exits")
	switch {
	case out[0].Err != nil:
		o.exitsWhy, o.exitsFail = "the agent cannot read KVM's statistics: "+out[0].Err.Error(), true
	case out[0].VCPUs == 0 || n < 0:
		o.exitsWhy = "the domain does not run under KVM"
	default:
		o.exits, o.exitVCPUs = out[0].Counts[n], out[0].VCPUs
	}
}

// crosscheck checks one domain after the other, so that each comes once an
// interval, until ctx ends.
func (a *Agent) crosscheck(ctx context.Context) {
	interval := a.cfg.CrosscheckInterval
	next := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		step := min(interval, idleCheck)
		if n := a.checkNext(ctx); n > 0 {
			step = interval / time.Duration(n)
		}
		next = next.Add(step)
		if now := time.Now(); next.Before(now) { // no burst after what took long
			next = now
		}
		timer.Reset(time.Until(next))
	}
}

// checkNext checks the domain whose last check is the longest ago, if its turn has
// come, and returns how many there are.
func (a *Agent) checkNext(ctx context.Context) int {
	ds := a.defined()
	if len(ds) == 0 {
		return 0
	}
	d := slices.MinFunc(ds, func(x, y *domain) int { return a.checked(x).Compare(a.checked(y)) })
	if time.Since(a.checked(d)) >= a.cfg.CrosscheckInterval-a.cfg.CrosscheckInterval/time.Duration(2*len(ds)) {
		a.check(ctx, d)
	}
	return len(ds)
}

// checkSoon reports whether the domain's next check would come before another
// reading after this interval: it is then made with this one, in one call.
func (a *Agent) checkSoon(d *domain, interval time.Duration) bool {
	return a.cfg.CrosscheckInterval > 0 && time.Since(a.checked(d)) > a.cfg.CrosscheckInterval-interval
}

// checked returns when a domain was checked last.
func (a *Agent) checked(d *domain) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return d.check.at
}

// check compares what the agent and libvirt count of one domain, and sends what
// comes of it. A domain that ends meanwhile costs nothing.
func (a *Agent) check(ctx context.Context, d *domain) {
	a.checks.Lock()
	defer a.checks.Unlock()
	start := a.runs.crosscheck.begin()
	base := time.Now().UnixMicro()
	q := a.ask(ctx, d, 0, true)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.domains[d.pid] == d && ctx.Err() == nil { // else it ended meanwhile, or the agent is being stopped
		a.judge(d, q, base)
	}
	a.runs.crosscheck.done(start, q.err)
}

// answer is what libvirt said of a domain when it was asked.
type answer struct {
	collectors.GuestStats
	err           error
	at            time.Time
	before, after own // what the agent read around it, for a check
}

// ask has libvirt tell groups of statistics of a domain, and for a check what that
// compares as well, in one call.
func (a *Agent) ask(ctx context.Context, d *domain, groups collectors.Groups, check bool) (q answer) {
	a.asking.Lock()
	defer a.asking.Unlock()
	if check {
		q.before = a.observe(ctx, d)
		groups |= collectors.CPUStatistics | collectors.VCPUStatistics | collectors.NICStatistics
		if slices.ContainsFunc(q.before.disks, func(k diskRead) bool { return k.why == "" }) {
			groups |= collectors.DiskStatistics
		}
	}
	if stopped, err := procfs.Stopped(a.proc, d.pid); err == nil && stopped {
		q.err = errStopped
	} else {
		q.GuestStats, q.err = a.guest.Stats(ctx, d.uuid, groups)
	}
	q.at = time.Now()
	if check {
		q.after = a.observe(ctx, d)
	}
	return q
}

// errStopped says that a process cannot answer: libvirt is not asked for it.
var errStopped = errors.New("its QEMU process is stopped, by a signal or a debugger")

// judge compares what the agent and libvirt count, and sends what comes of it.
// The caller holds the locks of the checks and of the agent.
func (a *Agent) judge(d *domain, q answer, base int64) {
	before, after, s, err, at := q.before, q.after, q.GuestStats, q.err, q.at
	t := &task{builder: a.checks.builder, last: orNow(d.check.at.UnixMicro(), base)}
	if d.check.at.IsZero() {
		t.last = base
	}
	var all []comparison
	for _, f := range d.figures(&before, &after, &s, err, at.UnixMicro()) {
		c := f.compare(a.checks.tolerances[f.check])
		a.emitCheck(t, &f, &c, at.UnixMicro(), base)
		all = append(all, c)
	}
	if err == nil {
		a.emitLibvirtExits(t, d, &s, at.UnixMicro(), base)
	}
	a.flush(t, base)
	a.alarm(d, all)
	d.check.at, d.check.last = at, all
}

// emitCheck adds what came of a comparison.
func (a *Agent) emitCheck(t *task, f *figures, c *comparison, at, base int64) {
	a.metrics.countCheck(c)
	r := *f.row
	r.Offset = at - base
	values := map[*sample.Meter]sample.Volume{f.check.Verdict: sample.Uint(uint64(c.verdict))}
	if c.verdict != sample.NotComparable {
		values[f.check.Difference] = sample.Int(c.difference)
		values[f.check.Relative] = sample.Float(c.relative)
	}
	started := false
	for _, m := range f.check.Meters() {
		v, ok := values[m]
		switch {
		case !a.checks.wanted[m]:
		case ok:
			if !started {
				a.row(t, &r, len(values), base)
				started = true
			}
			t.builder.Add(m.MeterRef, sample.Libvirt, v)
		case f.failed:
			a.deliver.AddGap(sample.Gap{Meter: m.Name, Resource: r.Resource, From: t.last, To: at, Reason: f.why})
		}
	}
}

// figures sets what the agent read of the domain against what libvirt said.
func (d *domain) figures(before, after *own, s *collectors.GuestStats, err error, now int64) []figures {
	all := d.cpuFigures(before, after, s)
	all = append(all, d.diskFigures(before, after, s, now)...)
	for i := range d.nics {
		all = append(all, d.nics[i].figures(before, after, s)...)
	}
	if err != nil && !s.HasCPU { // else it is what QEMU did not tell, and only that is missing
		for i := range all {
			all[i].why, all[i].failed = "libvirt: "+err.Error(), true
		}
	}
	return all
}

func (d *domain) cpuFigures(before, after *own, s *collectors.GuestStats) []figures {
	b, e := &before.usage, &after.usage
	vcpu := func(c *sample.Check, low, high uint64, vcpus [2]uint32, why string, theirs func(*collectors.VCPUStats) (uint64, bool)) figures {
		f := figures{check: c, row: &d.row, low: low, high: high, counters: len(s.VCPUs), why: why}
		known := true
		for i := range s.VCPUs {
			v, ok := theirs(&s.VCPUs[i])
			f.theirs += v
			known = known && ok
		}
		switch {
		case why != "":
		case len(s.VCPUs) == 0 || !known:
			f.why = "libvirt does not tell it of each vCPU"
		case vcpus[0] != vcpus[1] || int(vcpus[1]) != len(s.VCPUs):
			f.why = fmt.Sprintf("the process has %d vCPU threads, libvirt counts %d vCPUs", vcpus[1], len(s.VCPUs))
		}
		return f
	}
	process := figures{check: sample.CheckCPUProcess, row: &d.row, low: b.Process, high: e.Process, theirs: s.CPUTime}
	if !s.HasCPU {
		process.why, process.failed = "libvirt does not tell the process's CPU time", true
	}
	threads := func(ok bool) string {
		if !ok {
			return "the agent cannot read it of each thread"
		}
		return ""
	}
	vcpus := [2]uint32{b.VCPUs, e.VCPUs}
	all := []figures{
		vcpu(sample.CheckCPU, b.Run[bpf.VCPU], e.Run[bpf.VCPU], vcpus, threads(b.HasSplit && e.HasSplit),
			func(v *collectors.VCPUStats) (uint64, bool) { return v.Time, v.HasTime }),
		process,
		vcpu(sample.CheckCPUWait, b.Wait[bpf.VCPU], e.Wait[bpf.VCPU], vcpus, threads(b.HasWait && e.HasWait),
			func(v *collectors.VCPUStats) (uint64, bool) { return v.Delay, v.HasDelay }),
	}
	for _, u := range []*bpf.Usage{b, e} {
		for i := range all {
			if u.Err != nil {
				all[i].why, all[i].failed = "the agent cannot read it: "+u.Err.Error(), true
			}
		}
	}
	exits := vcpu(sample.CheckKVMExits, before.exits, after.exits, [2]uint32{before.exitVCPUs, after.exitVCPUs},
		cmp.Or(before.exitsWhy, after.exitsWhy), func(v *collectors.VCPUStats) (uint64, bool) { return v.Exits, v.HasExits })
	exits.failed = before.exitsFail || after.exitsFail
	return append(all, exits)
}

func (k *nic) figures(before, after *own, s *collectors.GuestStats) []figures {
	b, okBefore := rtnl.Find(before.links, k.index)
	e, okAfter := rtnl.Find(after.links, k.index)
	low, high := k.counters(b), k.counters(e)
	why, failed := "", false
	err := cmp.Or(before.err, after.err)
	n := slices.IndexFunc(s.NICs, func(n collectors.NICStats) bool { return n.Device == k.device })
	switch {
	case err != nil:
		why, failed = "the agent cannot read link statistics: "+err.Error(), true
	case k.index == 0 || !okBefore || !okAfter:
		why = "the host has no interface " + k.device
	case n < 0:
		why = "libvirt has no statistics of " + k.device
	}
	all := make([]figures, 0, 4)
	add := func(c *sample.Check, counter int, theirs uint64) {
		all = append(all, figures{check: c, row: &k.row, device: k.device, low: low[counter], high: high[counter], theirs: theirs, why: why, failed: failed})
	}
	var theirs collectors.NICStats
	if n >= 0 {
		theirs = s.NICs[n]
	}
	add(sample.CheckNetInBytes, iInBytes, theirs.InBytes)
	add(sample.CheckNetOutBytes, iOutBytes, theirs.OutBytes)
	add(sample.CheckNetInPackets, iInPackets, theirs.InPackets)
	add(sample.CheckNetOutPackets, iOutPackets, theirs.OutPackets)
	return all
}

// alarm tells the operator once when figures of a domain begin to differ, and
// once when they agree again.
func (a *Agent) alarm(d *domain, all []comparison) {
	was := map[string]bool{}
	for i := range d.check.last {
		was[d.check.last[i].key()] = d.check.last[i].alarm
	}
	a.metrics.differ(d.check.last, -1)
	var began, ended []string
	for i := range all {
		c := &all[i]
		old := was[c.key()]
		c.alarm = c.verdict == sample.Differs || old && c.verdict == sample.NotComparable
		switch {
		case c.alarm && !old:
			began = append(began, fmt.Sprintf("%s: kvmeter %d %s, libvirt %+d", c.key(), c.ours, c.check.Of.Unit, c.difference))
		case old && !c.alarm:
			ended = append(ended, c.key())
		}
	}
	a.metrics.differ(all, 1)
	name, id := zap.String("name", d.name), zap.String("domain", d.uuid)
	if len(began) > 0 {
		a.log.Warn("libvirt counts otherwise, by more than the tolerance; see kvmeter crosscheck", id, name, zap.String("what", strings.Join(began, "; ")))
	}
	if len(ended) > 0 {
		a.log.Warn("libvirt and kvmeter agree again", id, name, zap.String("what", strings.Join(ended, "; ")))
	}
}
