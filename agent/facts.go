package agent

import (
	"errors"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/sample"
)

// Meters of what a domain is made of, by the bits of task.facts.
const (
	iInstance = iota
	iInstanceFlavor
	iVCPUs
	iMemory
	iPowerState
	iRootSize
	iEphemeralSize
	iResident
	factCount
)

var factMeters = [factCount]*sample.Meter{
	sample.Instance, sample.InstanceFlavor, sample.VCPUs, sample.Memory, sample.PowerState,
	sample.DiskRootSize, sample.DiskEphemeralSize, sample.MemoryResident,
}

// unknownState is the state of a domain of which libvirt says nothing.
const unknownState = -1

// ref is how the meter is named on the wire.
func (a *Agent) ref(m *sample.Meter) sample.MeterRef { return m.WithUnit(a.cfg.LegacyUnits) }

// fact returns what is known of a definition, and how it is named.
func (a *Agent) fact(i int, def *collectors.Definition) (sample.MeterRef, sample.Volume, bool) {
	ref := a.ref(factMeters[i])
	known := def != nil && def.State != unknownState
	switch i {
	case iInstance:
		return ref, sample.Uint(1), def != nil
	case iInstanceFlavor:
		if def == nil || def.Flavor == nil {
			return ref, sample.Volume{}, false
		}
		ref.Name = "instance:" + def.Flavor.Name
		return ref, sample.Uint(1), true
	case iVCPUs:
		return ref, sample.Uint(uint64(max(0, def.VCPUs))), known
	case iMemory:
		return ref, mebibytes(def.Memory), known
	case iPowerState:
		return ref, sample.Uint(uint64(max(0, def.State))), known
	case iRootSize:
		if def.Flavor != nil {
			return ref, sample.Int(int64(def.Flavor.RootGiB)), true
		}
	case iEphemeralSize:
		if def.Flavor != nil {
			return ref, sample.Int(int64(def.Flavor.EphemeralGiB)), true
		}
	}
	return ref, sample.Volume{}, false
}

// mebibytes is an amount of memory as Ceilometer tells it: always a float.
func mebibytes(kib uint64) sample.Volume { return sample.Float(float64(kib) / 1024) }

// emitFacts adds what the domain is made of, and the memory that its process
// takes.
func (a *Agent) emitFacts(t *task, d *domain, base int64) {
	if t.facts == 0 {
		return
	}
	a.row(t, &d.row, factCount, base)
	for i := range factMeters {
		switch {
		case t.facts&(1<<i) == 0:
		case i == iResident:
			if bytes, err := d.readResident(a.proc); errors.Is(err, bpf.ErrGone) {
				continue // it has ended since, which is accounted elsewhere; there is no memory to miss
			} else if err != nil {
				t.gaps.miss(factMeters[i].Name, d.uuid, t.since(d.residentAt, base), base, err.Error())
			} else {
				t.builder.Add(a.ref(factMeters[i]), sample.Proc, sample.Float(float64(bytes)/(1<<20)))
			}
			d.residentAt = base
		default:
			if ref, v, ok := a.fact(i, d.described); ok {
				t.builder.Add(ref, sample.Libvirt, v)
			}
		}
	}
}

// readResident returns the memory of the host that the process takes, in bytes.
func (d *domain) readResident(proc string) (bytes uint64, err error) {
	if d.resident == nil {
		if d.resident, err = procfs.OpenResident(proc, d.proc); err != nil {
			return 0, err
		}
	}
	return d.resident.Read()
}

// release frees what is open of a domain that ended.
func (d *domain) release() {
	if d.resident != nil {
		_ = d.resident.Close() // it was only read
		d.resident = nil
	}
}
