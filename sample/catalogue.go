package sample

//go:generate go run ../cmd/internal/gendocs ../docs

// Meter is an entry of the catalogue: a kind of number that kvmeter itself
// makes. Names of kvmeter's own meters never change their meaning.
type Meter struct {
	MeterRef
	Resource string   // what the resource id is: "domain", "nic", "disk"
	Origins  []Origin // who can count it, best first; one takes over from another only within this list
	QEMU     bool     // reading it makes QEMU work (a monitor command), so wildcards poll it slowly
	Help     string   // one sentence for docs/meters.md
}

func meter(name string, kind Kind, unit, resource, help string, origins ...Origin) *Meter {
	return &Meter{MeterRef: MeterRef{name, kind, unit}, Resource: resource, Origins: origins, Help: help}
}

func (m *Meter) asksQEMU() *Meter {
	m.QEMU = true
	return m
}

// Meters of a domain's CPU time. Resource id: the domain's UUID.
var (
	// CPU is the time all vCPU threads spent on a CPU. Unit: ns since the
	// domain's process started.
	CPU = meter("cpu", Cumulative, "ns", "domain", "CPU time the domain's vCPU threads spent on a CPU.", Walk, Iter, CPUClock)
	// CPUProcess is the time of every thread of the QEMU process, exited ones
	// included; the cpu.* classes and cpu always add up to it.
	CPUProcess  = meter("cpu.process", Cumulative, "ns", "domain", "CPU time of the whole QEMU process, exited threads included.", Walk, Iter, CPUClock, Libvirt)
	CPUWait     = meter("cpu.wait", Cumulative, "ns", "domain", "Time the vCPU threads were runnable but not running; the guest sees it as steal.", Walk, Iter, CPUClock)
	CPUEmulator = meter("cpu.emulator", Cumulative, "ns", "domain", "CPU time of QEMU's own threads: main loop, monitor and what has no class of its own.", Walk, Iter, CPUClock)
	CPUIOThread = meter("cpu.iothread", Cumulative, "ns", "domain", "CPU time of the domain's iothreads.", Walk, Iter, CPUClock)
	CPUWorker   = meter("cpu.worker", Cumulative, "ns", "domain", "CPU time of QEMU's worker-pool threads, as far as it was read while they lived.", Walk, Iter, CPUClock)
	CPUVhost    = meter("cpu.vhost", Cumulative, "ns", "domain", "CPU time of vhost threads that belong to the QEMU process (Linux 6.4 and newer).", Walk, Iter, CPUClock)
	CPUExited   = meter("cpu.exited", Cumulative, "ns", "domain", "CPU time of threads that have ended, after they were last read alive; a thread that was never read has all of it here.", Walk, Iter, CPUClock)
)

// Host-side disk use of a domain: what its process moved to and from storage,
// image metadata included, page-cache hits not. Resource id: the domain's UUID.
var (
	DiskHostReadBytes  = meter("disk.host.read.bytes", Cumulative, "B", "domain", "Bytes the QEMU process fetched from storage.", Walk, Iter, CPUClock)
	DiskHostWriteBytes = meter("disk.host.write.bytes", Cumulative, "B", "domain", "Bytes the QEMU process sent to storage.", Walk, Iter, CPUClock)
)

// Guest-side disk use, as QEMU counts it. Resource id: domain UUID, "-", device.
var (
	DiskReadBytes     = meter("disk.device.read.bytes", Cumulative, "B", "disk", "Bytes the guest read from the disk.", Libvirt).asksQEMU()
	DiskWriteBytes    = meter("disk.device.write.bytes", Cumulative, "B", "disk", "Bytes the guest wrote to the disk.", Libvirt).asksQEMU()
	DiskReadRequests  = meter("disk.device.read.requests", Cumulative, "request", "disk", "Read requests of the guest.", Libvirt).asksQEMU()
	DiskWriteRequests = meter("disk.device.write.requests", Cumulative, "request", "disk", "Write requests of the guest.", Libvirt).asksQEMU()
	DiskFlushRequests = meter("disk.device.flush.requests", Cumulative, "request", "disk", "Cache flushes the guest asked for.", Libvirt).asksQEMU()
)

// Network use in the guest's direction. Resource id: the name of the NIC's
// filterref where Nova made the domain and gave the NIC one, else domain name, "-",
// domain UUID, "-", tap device.
var (
	NetInBytes    = meter("network.incoming.bytes", Cumulative, "B", "nic", "Bytes the guest received.", RTNL, Libvirt)
	NetOutBytes   = meter("network.outgoing.bytes", Cumulative, "B", "nic", "Bytes the guest sent.", RTNL, Libvirt)
	NetInPackets  = meter("network.incoming.packets", Cumulative, "packet", "nic", "Packets the guest received; one that was not split yet counts once.", RTNL, Libvirt)
	NetOutPackets = meter("network.outgoing.packets", Cumulative, "packet", "nic", "Packets the guest sent; one that was not split yet counts once.", RTNL, Libvirt)
	NetInErrors   = meter("network.incoming.packets.error", Cumulative, "packet", "nic", "Packets to the guest lost to errors.", RTNL, Libvirt)
	NetOutErrors  = meter("network.outgoing.packets.error", Cumulative, "packet", "nic", "Packets from the guest lost to errors.", RTNL, Libvirt)
	NetInDrops    = meter("network.incoming.packets.drop", Cumulative, "packet", "nic", "Packets to the guest that were dropped.", RTNL, Libvirt)
	NetOutDrops   = meter("network.outgoing.packets.drop", Cumulative, "packet", "nic", "Packets from the guest that were dropped.", RTNL, Libvirt)
)

// CheckCPU is how far the process CPU time by libvirt lies outside of our
// readings before and after it: 0 between them. Resource id: the domain's UUID.
var CheckCPU = meter("check.cpu.process", Gauge, "ns", "domain", "How far libvirt's cpu.time lies below (negative) or above two readings of cpu.process around it; 0 between them.", Libvirt).asksQEMU()

// Catalogue lists every meter, in the order of docs/meters.md.
var Catalogue = []*Meter{
	CPU, CPUProcess, CPUWait, CPUEmulator, CPUIOThread, CPUWorker, CPUVhost, CPUExited,
	DiskHostReadBytes, DiskHostWriteBytes,
	DiskReadBytes, DiskWriteBytes, DiskReadRequests, DiskWriteRequests, DiskFlushRequests,
	NetInBytes, NetOutBytes, NetInPackets, NetOutPackets, NetInErrors, NetOutErrors, NetInDrops, NetOutDrops,
	CheckCPU,
}
