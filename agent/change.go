package agent

import (
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// change is a meter that follows from how far counters moved between two polls
// of a plan.
type change struct {
	meter *sample.Meter
	of    func(m *moved) sample.Volume
}

// maxMoving is the most counters that a change may follow from.
const maxMoving = max(nicCount, diskCount)

// moved is how far counters moved between two polls.
type moved struct {
	by      [maxMoving]uint64
	seconds float64
	vcpus   int
}

// past is the reading before, of one plan.
type past struct {
	at   time.Time
	last [maxMoving]uint64
}

// pasts are those of each plan that has changes of a resource.
type pasts map[*task]*past

// move takes over a reading, and returns how far the counters moved since the
// one before; nil: there was none. A counter that is lower has started at zero
// again.
func (p *pasts) move(t *task, at time.Time, counters []uint64) *moved {
	old := (*p)[t]
	if old == nil {
		if *p == nil {
			*p = pasts{}
		}
		old = &past{at: at}
		copy(old.last[:], counters)
		(*p)[t] = old
		return nil
	}
	m := &t.moved
	if m.seconds = at.Sub(old.at).Seconds(); m.seconds <= 0 {
		return nil
	}
	for i, v := range counters {
		m.by[i] = v
		if v >= old.last[i] {
			m.by[i] = v - old.last[i]
		}
	}
	old.at = at
	copy(old.last[:], counters)
	return m
}

// perSecond is the rate at which counters moved together.
func perSecond(counters ...int) func(*moved) sample.Volume {
	return func(m *moved) sample.Volume {
		var sum float64
		for _, i := range counters {
			sum += float64(m.by[i])
		}
		return sample.Float(sum / m.seconds)
	}
}

// cpuChanges follow from iCPU.
var cpuChanges = []change{
	{sample.CPUDelta, func(m *moved) sample.Volume { return sample.Uint(m.by[iCPU]) }},
	{sample.CPUUtil, func(m *moved) sample.Volume {
		return sample.Float(100 * float64(m.by[iCPU]) / 1e9 / m.seconds / float64(max(1, m.vcpus)))
	}},
}

// nicChanges follow from the counters of a NIC.
var nicChanges = []change{
	{sample.NetInBytesRate, perSecond(iInBytes)},
	{sample.NetOutBytesRate, perSecond(iOutBytes)},
	{sample.NetInPacketsRate, perSecond(iInPackets)},
	{sample.NetOutPacketsRate, perSecond(iOutPackets)},
}

// diskChanges follow from the counters of a disk, sumChanges from those of all
// disks of a domain.
var (
	diskChanges = changesOfDisks(
		sample.DiskReadBytesRate, sample.DiskWriteBytesRate, sample.DiskReadRequestsRate, sample.DiskWriteRequestsRate,
		sample.DiskIOPS, sample.DiskLatency)
	sumChanges = changesOfDisks(
		sample.AllReadBytesRate, sample.AllWriteBytesRate, sample.AllReadRequestsRate, sample.AllWriteRequestsRate,
		sample.AllIOPS, sample.AllLatency)
)

func changesOfDisks(readBytes, writeBytes, reads, writes, iops, latency *sample.Meter) []change {
	return []change{
		{readBytes, perSecond(iReadBytes)},
		{writeBytes, perSecond(iWriteBytes)},
		{reads, perSecond(iReadRequests)},
		{writes, perSecond(iWriteRequests)},
		{iops, perSecond(iReadRequests, iWriteRequests)},
		{latency, func(m *moved) sample.Volume {
			requests := m.by[iReadRequests] + m.by[iWriteRequests]
			return sample.Float(float64(m.by[iReadLatency]+m.by[iWriteLatency]) / 1e6 / float64(max(1, requests)))
		}},
	}
}

// wanted returns those of the changes that the plan asks for.
func (p *plan) wanted(all []change) (some []change) {
	for _, c := range all {
		for _, m := range p.meters {
			if m == c.meter {
				some = append(some, c)
			}
		}
	}
	return some
}

// addChanges adds what follows from how far counters moved to the current row.
func (t *task) addChanges(changes []change, m *moved, origin sample.Origin) {
	if m == nil {
		return
	}
	for _, c := range changes {
		t.builder.Add(c.meter.MeterRef, origin, c.of(m))
	}
}
