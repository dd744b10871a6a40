package libvirt

import (
	"slices"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/kvmeter/kvmeter/collectors"
)

// indexed collects things that libvirt numbers, in the order in which it names
// them.
type indexed[T any] struct {
	byIndex map[string]*T
	order   []*T
}

func (x *indexed[T]) at(index string) *T {
	v := x.byIndex[index]
	if v == nil {
		if x.byIndex == nil {
			x.byIndex = map[string]*T{}
		}
		v = new(T)
		x.byIndex[index] = v
		x.order = append(x.order, v)
	}
	return v
}

// list returns those that keep accepts.
func (x *indexed[T]) list(keep func(*T) bool) (all []T) {
	for _, v := range x.order {
		if keep(v) {
			all = append(all, *v)
		}
	}
	return all
}

// countedDisk is a disk, and whether libvirt knew its counters.
type countedDisk struct {
	collectors.DiskStats
	counted bool
}

// guestStats reads the parameters of one domain. With nowait libvirt leaves out
// what it cannot ask QEMU for now: where disks or memory were asked for and could
// not be, the error is [ErrBusy].
func guestStats(params []golibvirt.TypedParam, groups collectors.Groups) (collectors.GuestStats, error) {
	var s collectors.GuestStats
	var vcpus indexed[collectors.VCPUStats]
	var disks indexed[countedDisk]
	var nics indexed[collectors.NICStats]
	for _, p := range params {
		name, isName := p.Value.I.(string)
		v, isCount := p.Value.I.(uint64)
		if p.Field == golibvirt.DomainStatsCPUTime {
			s.CPUTime, s.HasCPU = v, isCount
			continue
		}
		group, rest, _ := strings.Cut(p.Field, ".")
		index, field, ok := strings.Cut(rest, ".")
		switch {
		case group == "balloon" && isCount:
			readMemory(&s.Memory, rest, v)
		case group == "perf" && isCount:
			if s.Perf == nil {
				s.Perf = map[string]uint64{}
			}
			s.Perf[rest] = v
		case !ok:
		case group == "vcpu" && isCount:
			readVCPU(&vcpus, index, field, v)
		case group == "block" && isName && field == "name":
			disks.at(index).Device = name
		case group == "block" && isCount:
			readDisk(disks.at(index), field, v)
		case group == "net" && isName && field == "name":
			nics.at(index).Device = name
		case group == "net" && isCount:
			readNIC(nics.at(index), field, v)
		}
	}
	s.VCPUs = vcpus.list(func(*collectors.VCPUStats) bool { return true })
	s.NICs = nics.list(func(n *collectors.NICStats) bool { return n.Device != "" })
	for _, d := range disks.list(func(d *countedDisk) bool { return d.Device != "" && d.counted }) {
		s.Disks = append(s.Disks, d.DiskStats)
	}
	busy := groups&collectors.DiskStatistics != 0 && len(disks.order) > 0 && len(s.Disks) == 0 ||
		groups&collectors.MemoryStatistics != 0 && !s.Memory.Asked
	if busy {
		return s, ErrBusy
	}
	return s, nil
}

func readVCPU(vcpus *indexed[collectors.VCPUStats], index, field string, v uint64) {
	if !slices.Contains([]string{"time", "delay", "exits.sum"}, field) {
		return
	}
	c := vcpus.at(index)
	switch field {
	case "time":
		c.Time, c.HasTime = v, true
	case "delay":
		c.Delay, c.HasDelay = v, true
	default:
		c.Exits, c.HasExits = v, true
	}
}

func readDisk(d *countedDisk, field string, v uint64) {
	switch field {
	case "rd.reqs":
		d.ReadRequests, d.counted = v, true
	case "rd.bytes":
		d.ReadBytes = v
	case "wr.reqs":
		d.WriteRequests = v
	case "wr.bytes":
		d.WriteBytes = v
	case "fl.reqs":
		d.FlushRequests = v
	case "rd.times":
		d.ReadNs = v
	case "wr.times":
		d.WriteNs = v
	case "capacity":
		d.Capacity = v
	case "allocation":
		d.Allocation, d.HasAllocation = v, true
	case "physical":
		d.Physical = v
	}
}

// readMemory takes over a figure of the guest's memory. libvirt reads the size of
// the process, rss, last: whoever has that was asked.
func readMemory(m *collectors.MemoryStats, field string, v uint64) {
	switch field {
	case "rss":
		m.Asked = true
	case "available":
		m.Available, m.HasAvailable = v, true
	case "unused":
		m.Unused, m.HasUnused = v, true
	case "usable":
		m.Usable, m.HasUsable = v, true
	case "swap_in":
		m.SwapIn, m.HasSwap = v, true
	case "swap_out":
		m.SwapOut = v
	}
}

// readNIC takes over a counter of a NIC. libvirt tells them in the guest's
// direction: it swaps those of a tap, whose host receives what the guest sends.
func readNIC(n *collectors.NICStats, field string, v uint64) {
	switch field {
	case "rx.bytes":
		n.InBytes = v
	case "rx.pkts":
		n.InPackets = v
	case "rx.errs":
		n.InErrors = v
	case "rx.drop":
		n.InDrops = v
	case "tx.bytes":
		n.OutBytes = v
	case "tx.pkts":
		n.OutPackets = v
	case "tx.errs":
		n.OutErrors = v
	case "tx.drop":
		n.OutDrops = v
	}
}
