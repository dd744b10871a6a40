package agent

import (
	"context"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// KVMReader reads what KVM counts of vCPUs. It is for one goroutine at a time.
type KVMReader interface {
	// Fields names the counters, as the kernel does; see [bpf.KVM.Fields].
	Fields() []string
	// Read fills out[i] with what is counted for procs[i], which has vcpus[i]
	// vCPUs (0: not known). An error means that none was read.
	Read(ctx context.Context, procs []bpf.Proc, vcpus []uint32, out []bpf.KVMUsage) error
}

// kvm reads KVM's statistics, at an interval of its own. It is guarded by the
// agent's lock.
type kvm struct {
	reader KVMReader // nil: there is none
	series []kvmSeries
	key    state.Key
	vcpus  []uint32
	out    []bpf.KVMUsage
	fault  string // why nothing could be read last time
	run    run
}

// kvmSeries is one meter, and the reader's counters that add up to it.
type kvmSeries struct {
	meter  *sample.Meter
	ref    sample.MeterRef
	fields []int
}

// kvmState is what was published of a domain, by series, and what it was made of.
type kvmState struct {
	block *state.Block // the counters as last read, then what was published
	has   bool         // the last reading had it
	exits uint64       // in all, that KVM has counted
	sent  int64        // time of the last sample, µs since the epoch; 0: none
}

// kvmSeriesOf sorts the counters that a kernel has into series.
func kvmSeriesOf(fields []string) (all []kvmSeries) {
	add := func(m *sample.Meter, ref sample.MeterRef, field int) {
		if i := slices.IndexFunc(all, func(s kvmSeries) bool { return s.ref == ref }); i >= 0 {
			all[i].fields = append(all[i].fields, field)
			return
		}
		all = append(all, kvmSeries{m, ref, []int{field}})
	}
	for i, f := range fields {
		kind := bpf.KVMExitKind(f)
		switch {
		case f == "exits":
			add(sample.KVMExits, sample.KVMExits.MeterRef, i)
		case kind != "":
			add(sample.KVMExits, sample.KVMExits.Part(kind), i)
		case strings.HasPrefix(f, "halt_poll_"):
			add(sample.KVMHaltPoll, sample.KVMHaltPoll.MeterRef, i)
		}
	}
	return all
}

// readKVM reads the statistics of all domains.
func (a *Agent) readKVM(ctx context.Context) {
	k := a.kvm
	if k.reader == nil || len(a.order) == 0 {
		return
	}
	start := k.run.begin()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readAtMost)
	defer cancel()
	k.vcpus = k.vcpus[:0]
	for _, d := range a.order {
		k.vcpus = append(k.vcpus, uint32(d.vcpus))
	}
	for len(k.out) < len(a.order) {
		k.out = append(k.out, bpf.KVMUsage{})
	}
	err := k.reader.Read(ctx, a.procs, k.vcpus, k.out)
	k.run.done(start, err)
	if err != nil {
		if k.fault == "" {
			a.log.Warn("KVM's statistics cannot be read", zap.Error(err))
		}
		k.fault = err.Error()
		for _, d := range a.order {
			d.kvm.has = false
		}
		return
	}
	k.fault = ""
	if k.series == nil {
		fields := k.reader.Fields()
		k.series, k.key = kvmSeriesOf(fields), state.KeyOf(append([]string{"kvm"}, fields...)...)
	}
	for i, d := range a.order {
		u := &k.out[i]
		if d.kvm.has = u.Err == nil && u.VCPUs > 0; !d.kvm.has {
			continue
		}
		if d.kvm.block == nil {
			d.kvm.block = d.kept.Block(d.owner, k.key, 2*len(k.series))
		}
		d.kvm.advance(k.series, u)
	}
}

// advance takes over a reading. Where it is lower, a vCPU was unplugged with
// what it had counted.
func (s *kvmState) advance(series []kvmSeries, u *bpf.KVMUsage) {
	read, last := s.block.Words[:len(series)], s.block.Words[len(series):]
	for i := range series {
		now := uint64(0)
		for _, f := range series[i].fields {
			now += u.Counts[f]
		}
		last[i] += now - min(now, read[i])
		read[i] = now
		if series[i].ref == sample.KVMExits.MeterRef {
			s.exits = last[i]
		}
	}
	s.block.Commit()
}

// emitLibvirtExits adds what libvirt told of the domain's exits when it was
// asked for the cross-check, where KVM's statistics cannot be read.
func (a *Agent) emitLibvirtExits(t *task, d *domain, s *collectors.GuestStats, at, base int64) {
	asked := slices.ContainsFunc(a.plans, func(p plan) bool { return slices.Contains(p.meters, sample.KVMExits) })
	if !asked || a.kvm.reader != nil && a.kvm.fault == "" || len(s.VCPUs) == 0 {
		return
	}
	exits := uint64(0)
	for _, v := range s.VCPUs {
		if !v.HasExits {
			return // it does not run under KVM
		}
		exits += v.Exits
	}
	last := d.kept.Block(d.owner, state.KeyOf("kvm", "libvirt"), 1)
	last.Words[0] = max(last.Words[0], exits, d.kvm.exits)
	last.Commit()
	r := d.row
	r.Offset = at - base
	a.row(t, &r, 1, base)
	t.builder.Add(sample.KVMExits.MeterRef, sample.Libvirt, sample.Uint(last.Words[0]))
}

// kvmDue reports whether it is time for the plan to have KVM's statistics.
func (a *Agent) kvmDue(t *task, now time.Time) bool {
	if !t.kvm || a.kvm.reader == nil || now.Sub(t.kvmAt) < a.cfg.KVMInterval-t.interval/2 {
		return false
	}
	t.kvmAt = now
	return true
}

// emitKVM adds what KVM has counted of the domain.
func (a *Agent) emitKVM(t *task, d *domain, base int64) {
	k := a.kvm
	if k.fault != "" && d.kvm.sent != 0 {
		t.gaps.miss(sample.KVMExits.Name, d.uuid, t.since(d.kvm.sent, base), base, k.fault)
		d.kvm.sent = base
	}
	if !d.kvm.has {
		return
	}
	d.kvm.sent = base
	a.row(t, &d.row, len(k.series), base)
	for i, s := range k.series {
		if slices.Contains(t.meters, s.meter) {
			t.builder.Add(s.ref, sample.KVM, sample.Uint(d.kvm.block.Words[len(k.series)+i]))
		}
	}
}
