package sample

//go:generate go run ../cmd/internal/gendocs ../docs

// Meter is an entry of the catalogue: a kind of number that kvmeter itself
// makes. Names of kvmeter's own meters never change their meaning.
type Meter struct {
	MeterRef
	Resource string   // what the resource id is: "domain", "nic", "disk", "vcpu"
	Origins  []Origin // who can count it, best first; one takes over from another only within this list
	QEMU     bool     // reading it makes QEMU work (a monitor command), so wildcards poll it slowly
	Total    bool     // of a family: there is also a meter of its name alone
	Parts    string   // what ends the names of a family's members, such as "the reason"; empty: it is one meter
	Check    *Check   // the comparison that it comes of; nil: it is no comparison's
	Event    string   // each sample is an occurrence: the type of the event that is made of it; empty: it is none
	Legacy   bool     // of Ceilometer's older releases: wildcards match it only where the setting legacy_meters has it
	Help     string   // one sentence for docs/meters.md
}

func meter(name string, kind Kind, unit, resource, help string, origins ...Origin) *Meter {
	return &Meter{MeterRef: MeterRef{name, kind, unit}, Resource: resource, Origins: origins, Help: help}
}

// WithUnit returns the meter as it is named on the wire; with old, its unit is
// the one that Ceilometer gave it before 2026.1: MB and GB, which are as large
// as MiB and GiB there.
func (m *Meter) WithUnit(old bool) MeterRef {
	ref := m.MeterRef
	if old {
		switch ref.Unit {
		case "MiB":
			ref.Unit = "MB"
		case "GiB":
			ref.Unit = "GB"
		}
	}
	return ref
}

// OfBMC reports whether the host's BMC is asked for it.
func (m *Meter) OfBMC() bool { return m.Origins[0] == IPMI }

// Part returns a member of a family.
func (m *Meter) Part(part string) MeterRef {
	return MeterRef{m.Name + "." + part, m.Kind, m.Unit}
}

// family says what ends the names of the meter's members.
func (m *Meter) family(parts string) *Meter {
	m.Parts = parts
	return m
}

// withTotal says that there is also a meter of the family's name.
func (m *Meter) withTotal() *Meter {
	m.Total = true
	return m
}

// occurs says that each sample of the meter is also an event, of this type.
func (m *Meter) occurs(event string) *Meter {
	m.Event = event
	return m
}

func (m *Meter) asksQEMU() *Meter {
	m.QEMU = true
	return m
}

// legacy says that only older releases of Ceilometer had the meter.
func (m *Meter) legacy() *Meter {
	m.Legacy = true
	return m
}

// Meters of a domain's CPU time. Resource id: the domain's UUID.
var (
	// CPU is the time all vCPU threads spent on a CPU. Unit: ns since the
	// domain's process started.
	CPU = meter("cpu", Cumulative, "ns", "domain", "CPU time the domain's vCPU threads spent on a CPU.", Walk, Iter, CPUClock, Free)
	// CPUProcess is the time of every thread of the QEMU process, exited ones
	// included; the cpu.* classes and cpu always add up to it.
	CPUProcess  = meter("cpu.process", Cumulative, "ns", "domain", "CPU time of the whole QEMU process, exited threads included.", Walk, Iter, CPUClock, Free, Libvirt)
	CPUWait     = meter("cpu.wait", Cumulative, "ns", "domain", "Time the vCPU threads were runnable but not running; the guest sees it as steal.", Walk, Iter, CPUClock, Free)
	CPUEmulator = meter("cpu.emulator", Cumulative, "ns", "domain", "CPU time of QEMU's own threads: main loop, monitor and what has no class of its own.", Walk, Iter, CPUClock, Free)
	CPUIOThread = meter("cpu.iothread", Cumulative, "ns", "domain", "CPU time of the domain's iothreads.", Walk, Iter, CPUClock, Free)
	CPUWorker   = meter("cpu.worker", Cumulative, "ns", "domain", "CPU time of QEMU's worker-pool threads, as far as it was read while they lived.", Walk, Iter, CPUClock, Free)
	CPUVhost    = meter("cpu.vhost", Cumulative, "ns", "domain", "CPU time of vhost threads that belong to the QEMU process (Linux 6.4 and newer).", Walk, Iter, CPUClock, Free)
	CPUSwitches = meter("cpu.switches", Cumulative, "switch", "domain", "How often the vCPU threads were put on a CPU.", Walk, Iter, CPUClock, Free)
	CPUExited   = meter("cpu.exited", Cumulative, "ns", "domain", "CPU time of threads that have ended, after they were last read alive; a thread that was never read has all of it here.", Walk, Iter, CPUClock, Free)
)

// The same of the other classes of threads. The kernel keeps neither of threads
// that have ended: of those it is what they had when they were last read.
var (
	CPUEmulatorWait     = meter("cpu.emulator.wait", Cumulative, "ns", "domain", "Time QEMU's own threads were runnable but not running.", Walk, Iter, CPUClock, Free)
	CPUIOThreadWait     = meter("cpu.iothread.wait", Cumulative, "ns", "domain", "Time the iothreads were runnable but not running.", Walk, Iter, CPUClock, Free)
	CPUWorkerWait       = meter("cpu.worker.wait", Cumulative, "ns", "domain", "Time QEMU's worker-pool threads were runnable but not running, as far as it was read while they lived.", Walk, Iter, CPUClock, Free)
	CPUVhostWait        = meter("cpu.vhost.wait", Cumulative, "ns", "domain", "Time the vhost threads of the QEMU process were runnable but not running.", Walk, Iter, CPUClock, Free)
	CPUEmulatorSwitches = meter("cpu.emulator.switches", Cumulative, "switch", "domain", "How often QEMU's own threads were put on a CPU.", Walk, Iter, CPUClock, Free)
	CPUIOThreadSwitches = meter("cpu.iothread.switches", Cumulative, "switch", "domain", "How often the iothreads were put on a CPU.", Walk, Iter, CPUClock, Free)
	CPUWorkerSwitches   = meter("cpu.worker.switches", Cumulative, "switch", "domain", "How often QEMU's worker-pool threads were put on a CPU, as far as it was read while they lived.", Walk, Iter, CPUClock, Free)
	CPUVhostSwitches    = meter("cpu.vhost.switches", Cumulative, "switch", "domain", "How often the vhost threads of the QEMU process were put on a CPU.", Walk, Iter, CPUClock, Free)
)

// What each vCPU has used; it goes on where a vCPU is unplugged and plugged in
// again, whose samples pause in between. Resource id: domain UUID, "-vcpu", number.
var (
	VCPURun      = meter("vcpu.run", Cumulative, "ns", "vcpu", "Time the vCPU's thread spent on a CPU.", Walk, Iter, CPUClock)
	VCPUWait     = meter("vcpu.wait", Cumulative, "ns", "vcpu", "Time the vCPU's thread was runnable but not running.", Walk, Iter, CPUClock)
	VCPUSwitches = meter("vcpu.switches", Cumulative, "switch", "vcpu", "How often the vCPU's thread was put on a CPU.", Walk, Iter, CPUClock)
)

// What KVM counts of a domain's vCPUs. Resource id: the domain's UUID.
var (
	KVMExits    = meter("kvm.exits", Cumulative, "exit", "domain", "How often the vCPUs left the guest for KVM, in all and by kind. Not each exit is of a kind, some are of several.", KVM, Libvirt).family("the kernel's name for the kind, which differs between architectures: io, mmio, halt, irq and so on").withTotal()
	KVMHaltPoll = meter("kvm.halt_poll", Cumulative, "ns", "domain", "Time KVM polled for work after a vCPU had halted, before it gave the CPU away.", KVM)
)

// Waits of a domain's vCPU threads for a CPU, as the hook runqueue sees them:
// docs/hooks.md. Resource id: the domain's UUID.
var (
	CPUWaitLatency     = meter("cpu.wait.latency.bucket", Cumulative, "wait", "domain", "Waits of the vCPU threads for a CPU by length, each counted when the slice after it ends.", RunQueue).family("N: 2^N to 2^(N+1)-1 ns; 10 also has shorter ones, 33 longer")
	CPUPreemptedDomain = meter("cpu.preempted.domain", Cumulative, "ns", "domain", "Part of cpu.wait in which another domain had taken the CPU.", RunQueue)
	CPUPreemptedHost   = meter("cpu.preempted.host", Cumulative, "ns", "domain", "Part of cpu.wait in which a task of the host that is no domain's had taken the CPU.", RunQueue)
	CPUPreemptedQuota  = meter("cpu.preempted.quota", Cumulative, "ns", "domain", "Part of cpu.wait in which the CPU quota of the domain's cgroup was used up.", RunQueue)
	CPUPreemptedSelf   = meter("cpu.preempted.self", Cumulative, "ns", "domain", "Part of cpu.wait in which another thread of the domain had taken the CPU.", RunQueue)
)

// What the hook exits times. Resource id: the domain's UUID.
var (
	KVMExitsTime  = meter("kvm.exits.time", Cumulative, "ns", "domain", "Time from vCPUs' exits from the guest to their next entries, on a CPU or not; that a vCPU halted is in it.", Exits)
	KVMExitsTimes = meter("kvm.exits.time.bucket", Cumulative, "exit", "domain", "Exits of vCPUs by the time to the next entry.", Exits).family("N: 2^N to 2^(N+1)-1 ns; 8 also has shorter ones, 31 longer")
)

// Host-side disk use of a domain: what its process moved to and from storage,
// image metadata included, page-cache hits not. Resource id: the domain's UUID.
var (
	DiskHostReadBytes  = meter("disk.host.read.bytes", Cumulative, "B", "domain", "Bytes the QEMU process fetched from storage.", Walk, Iter, CPUClock, Free)
	DiskHostWriteBytes = meter("disk.host.write.bytes", Cumulative, "B", "domain", "Bytes the QEMU process sent to storage.", Walk, Iter, CPUClock, Free)
)

// Host-side disk use by device, as its requests reach the host's kernel: of the
// image, its backing chain and what it is mirrored to. Counted since the agent
// has followed the disk; latency is from submission to completion. Resource id: domain
// UUID, "-", device.
var (
	DiskHostDeviceReadRequests  = meter("disk.host.device.read.requests", Cumulative, "request", "disk", "Reads of the disk's image files and devices on the host.", Iomap)
	DiskHostDeviceReadBytes     = meter("disk.host.device.read.bytes", Cumulative, "B", "disk", "Bytes of those reads.", Iomap)
	DiskHostDeviceReadLatency   = meter("disk.host.device.read.latency", Cumulative, "ns", "disk", "Time that those reads took, added up.", Iomap)
	DiskHostDeviceReadBuckets   = meter("disk.host.device.read.latency.bucket", Cumulative, "request", "disk", "How many of those reads took from 2^N to 2^(N+1) ns; 9 also less, 36 also more.", Iomap).family("N")
	DiskHostDeviceWriteRequests = meter("disk.host.device.write.requests", Cumulative, "request", "disk", "Writes to the disk's image files and devices on the host.", Iomap)
	DiskHostDeviceWriteBytes    = meter("disk.host.device.write.bytes", Cumulative, "B", "disk", "Bytes of those writes.", Iomap)
	DiskHostDeviceWriteLatency  = meter("disk.host.device.write.latency", Cumulative, "ns", "disk", "Time that those writes took, added up.", Iomap)
	DiskHostDeviceWriteBuckets  = meter("disk.host.device.write.latency.bucket", Cumulative, "request", "disk", "How many of those writes took from 2^N to 2^(N+1) ns; 9 also less, 36 also more.", Iomap).family("N")
	DiskHostDeviceFlushRequests = meter("disk.host.device.flush.requests", Cumulative, "request", "disk", "Flushes (fsync, fdatasync) of the disk's image files and devices on the host.", Iomap)
	DiskHostDeviceFlushLatency  = meter("disk.host.device.flush.latency", Cumulative, "ns", "disk", "Time that those flushes took, added up.", Iomap)
)

// Guest-side disk use, as QEMU counts it. Resource id: domain UUID, "-", device.
var (
	DiskReadBytes     = meter("disk.device.read.bytes", Cumulative, "B", "disk", "Bytes the guest read from the disk.", Libvirt).asksQEMU()
	DiskWriteBytes    = meter("disk.device.write.bytes", Cumulative, "B", "disk", "Bytes the guest wrote to the disk.", Libvirt).asksQEMU()
	DiskReadRequests  = meter("disk.device.read.requests", Cumulative, "request", "disk", "Read requests of the guest.", Libvirt).asksQEMU()
	DiskWriteRequests = meter("disk.device.write.requests", Cumulative, "request", "disk", "Write requests of the guest.", Libvirt).asksQEMU()
	DiskFlushRequests = meter("disk.device.flush.requests", Cumulative, "request", "disk", "Cache flushes the guest asked for.", Libvirt).asksQEMU()
)

// Guest-side disk: how long its requests took, and how large it is.
var (
	DiskReadLatency  = meter("disk.device.read.latency", Cumulative, "ns", "disk", "Time that the guest's reads took, added up.", Libvirt).asksQEMU()
	DiskWriteLatency = meter("disk.device.write.latency", Cumulative, "ns", "disk", "Time that the guest's writes took, added up.", Libvirt).asksQEMU()
	DiskCapacity     = meter("disk.device.capacity", Gauge, "B", "disk", "Size of the disk as the guest sees it, or of its image where that is larger.", Libvirt).asksQEMU()
	DiskAllocation   = meter("disk.device.allocation", Gauge, "B", "disk", "Bytes of the image that are in use: up to the highest that was written to, or what a file takes on its file system.", Libvirt).asksQEMU()
	DiskUsage        = meter("disk.device.usage", Gauge, "B", "disk", "Size of the image on the host.", Libvirt).asksQEMU()
)

// What a domain is made of, as its definition, its flavor and its state say.
// Nobody is asked for them at a poll. Resource id: the domain's UUID.
var (
	VCPUs             = meter("vcpus", Gauge, "vcpu", "domain", "vCPUs that are plugged in.", Libvirt)
	Memory            = meter("memory", Gauge, "MiB", "domain", "Memory that the domain has now, as its balloon was set.", Libvirt)
	PowerState        = meter("power.state", Gauge, "", "domain", "State of the domain: 0 none, 1 running, 2 blocked, 3 paused, 4 shutting down, 5 off, 6 crashed, 7 suspended.", Libvirt)
	DiskRootSize      = meter("disk.root.size", Gauge, "GiB", "domain", "Root disk by the flavor of Nova's metadata: its disk less its ephemeral disk.", Libvirt)
	DiskEphemeralSize = meter("disk.ephemeral.size", Gauge, "GiB", "domain", "Ephemeral disk by the flavor of Nova's metadata.", Libvirt)
)

// Memory of a domain. Resource id: the domain's UUID.
var (
	MemoryResident  = meter("memory.resident", Gauge, "MiB", "domain", "Memory of the host that the QEMU process takes.", Proc)
	MemoryAvailable = meter("memory.available", Gauge, "MiB", "domain", "Memory that the guest's system has, by its balloon driver.", Libvirt).asksQEMU()
	MemoryUsage     = meter("memory.usage", Gauge, "MiB", "domain", "Memory that the guest's system cannot give away without swapping, by its balloon driver; by one that does not tell, all that is not free.", Libvirt).asksQEMU()
	MemorySwapIn    = meter("memory.swap.in", Cumulative, "MiB", "domain", "Memory that the guest's system has read from swap, by its balloon driver.", Libvirt).asksQEMU()
	MemorySwapOut   = meter("memory.swap.out", Cumulative, "MiB", "domain", "Memory that the guest's system has written to swap, by its balloon driver.", Libvirt).asksQEMU()
)

// Hardware counters of a domain in whose definition they are enabled. Counters,
// although their type is gauge, as in Ceilometer. Resource id: the domain's UUID.
var (
	PerfCPUCycles       = meter("perf.cpu.cycles", Gauge, "", "domain", "CPU cycles of the QEMU process since libvirt opened the counter.", Libvirt).asksQEMU()
	PerfInstructions    = meter("perf.instructions", Gauge, "", "domain", "Instructions that the QEMU process has executed since then.", Libvirt).asksQEMU()
	PerfCacheReferences = meter("perf.cache.references", Gauge, "", "domain", "Cache accesses of the QEMU process since then.", Libvirt).asksQEMU()
	PerfCacheMisses     = meter("perf.cache.misses", Gauge, "", "domain", "Cache misses of the QEMU process since then.", Libvirt).asksQEMU()
)

// Bytes of a NIC since the sample before, whatever interval that had. The first
// of a NIC is 0.
var (
	NetInBytesDelta  = meter("network.incoming.bytes.delta", Delta, "B", "nic", "Bytes the guest received since the sample before.", RTNL)
	NetOutBytesDelta = meter("network.outgoing.bytes.delta", Delta, "B", "nic", "Bytes the guest sent since the sample before.", RTNL)
)

// Meters of Ceilometer's older releases. Rates are of the time since the poll
// before.
var (
	Instance       = meter("instance", Gauge, "instance", "domain", "1 while there is the domain.", Libvirt).legacy()
	InstanceFlavor = meter("instance:FLAVOR", Gauge, "instance", "domain", "The same under the name of its flavor in Nova's metadata.", Libvirt).legacy()
	CPUUtil        = meter("cpu_util", Gauge, "%", "domain", "`cpu` by the time that all vCPUs could have had.", Walk, Iter, CPUClock).legacy()
	CPUDelta       = meter("cpu.delta", Delta, "ns", "domain", "Change of `cpu` since the sample before.", Walk, Iter, CPUClock).legacy()

	CPUL3Cache           = meter("cpu_l3_cache", Gauge, "B", "domain", "Last-level cache that the QEMU process takes (perf event cmt).", Libvirt).asksQEMU().legacy()
	MemoryBandwidthTotal = meter("memory.bandwidth.total", Gauge, "B/s", "domain", "Memory traffic of the QEMU process (perf event mbmt).", Libvirt).asksQEMU().legacy()
	MemoryBandwidthLocal = meter("memory.bandwidth.local", Gauge, "B/s", "domain", "The same on its own node (perf event mbml).", Libvirt).asksQEMU().legacy()

	NetInBytesRate    = meter("network.incoming.bytes.rate", Gauge, "B/s", "nic", "Rate of `network.incoming.bytes`.", RTNL).legacy()
	NetOutBytesRate   = meter("network.outgoing.bytes.rate", Gauge, "B/s", "nic", "Rate of `network.outgoing.bytes`.", RTNL).legacy()
	NetInPacketsRate  = meter("network.incoming.packets.rate", Gauge, "packet/s", "nic", "Rate of `network.incoming.packets`.", RTNL).legacy()
	NetOutPacketsRate = meter("network.outgoing.packets.rate", Gauge, "packet/s", "nic", "Rate of `network.outgoing.packets`.", RTNL).legacy()
	// NetOutPacketsDelta is what Ceilometer called network.outgoing.bytes.delta
	// from Wallaby to Zed (19), by mistake.
	NetOutPacketsDelta = meter("network.outgoing.packets.delta", Delta, "B", "nic", "`network.outgoing.bytes.delta` under the name that it had up to Ceilometer 19.", RTNL).legacy()

	DiskReadBytesRate     = meter("disk.device.read.bytes.rate", Gauge, "B/s", "disk", "Rate of `disk.device.read.bytes`.", Libvirt).asksQEMU().legacy()
	DiskWriteBytesRate    = meter("disk.device.write.bytes.rate", Gauge, "B/s", "disk", "Rate of `disk.device.write.bytes`.", Libvirt).asksQEMU().legacy()
	DiskReadRequestsRate  = meter("disk.device.read.requests.rate", Gauge, "request/s", "disk", "Rate of `disk.device.read.requests`.", Libvirt).asksQEMU().legacy()
	DiskWriteRequestsRate = meter("disk.device.write.requests.rate", Gauge, "request/s", "disk", "Rate of `disk.device.write.requests`.", Libvirt).asksQEMU().legacy()
	DiskIOPS              = meter("disk.device.iops", Gauge, "count/s", "disk", "Rate of reads and writes together.", Libvirt).asksQEMU().legacy()
	DiskLatency           = meter("disk.device.latency", Gauge, "ms", "disk", "Time that reads and writes took, on average; 0 where there were none.", Libvirt).asksQEMU().legacy()

	AllReadBytes         = meter("disk.read.bytes", Cumulative, "B", "domain", "`disk.device.read.bytes` of all disks that the domain has had.", Libvirt).asksQEMU().legacy()
	AllWriteBytes        = meter("disk.write.bytes", Cumulative, "B", "domain", "`disk.device.write.bytes` of the same.", Libvirt).asksQEMU().legacy()
	AllReadRequests      = meter("disk.read.requests", Cumulative, "request", "domain", "`disk.device.read.requests` of the same.", Libvirt).asksQEMU().legacy()
	AllWriteRequests     = meter("disk.write.requests", Cumulative, "request", "domain", "`disk.device.write.requests` of the same.", Libvirt).asksQEMU().legacy()
	AllReadBytesRate     = meter("disk.read.bytes.rate", Gauge, "B/s", "domain", "Rate of `disk.read.bytes`.", Libvirt).asksQEMU().legacy()
	AllWriteBytesRate    = meter("disk.write.bytes.rate", Gauge, "B/s", "domain", "Rate of `disk.write.bytes`.", Libvirt).asksQEMU().legacy()
	AllReadRequestsRate  = meter("disk.read.requests.rate", Gauge, "request/s", "domain", "Rate of `disk.read.requests`.", Libvirt).asksQEMU().legacy()
	AllWriteRequestsRate = meter("disk.write.requests.rate", Gauge, "request/s", "domain", "Rate of `disk.write.requests`.", Libvirt).asksQEMU().legacy()
	AllIOPS              = meter("disk.iops", Gauge, "count/s", "domain", "Rate of reads and writes of all disks together.", Libvirt).asksQEMU().legacy()
	AllLatency           = meter("disk.latency", Gauge, "ms", "domain", "Time that reads and writes of all disks took, on average; 0 where there were none.", Libvirt).asksQEMU().legacy()
	AllCapacity          = meter("disk.capacity", Gauge, "B", "domain", "`disk.device.capacity` of all disks.", Libvirt).asksQEMU().legacy()
	AllAllocation        = meter("disk.allocation", Gauge, "B", "domain", "`disk.device.allocation` of all disks.", Libvirt).asksQEMU().legacy()
	AllUsage             = meter("disk.usage", Gauge, "B", "domain", "`disk.device.usage` of all disks.", Libvirt).asksQEMU().legacy()
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

	NetInSegments  = meter("network.incoming.segments", Cumulative, "packet", "nic", "Packets for the guest as they are on a wire: one that is split later (GSO) counts as what it is split into. Those that the tap's queue had no room for are among them.", TCX)
	NetOutSegments = meter("network.outgoing.segments", Cumulative, "packet", "nic", "Packets from the guest as they are on a wire: one that is left to be split (GSO) counts as what it is split into.", TCX)
	NetInSizes     = meter("network.incoming.size.bucket", Cumulative, "packet", "nic", "Packets for the guest by size, one that is split later counting once.", TCX).family("N: 2^N to 2^(N+1)-1 bytes; 4 also has smaller ones, 19 larger")
	NetOutSizes    = meter("network.outgoing.size.bucket", Cumulative, "packet", "nic", "Packets from the guest by size, one that is left to be split counting once.", TCX).family("N: 2^N to 2^(N+1)-1 bytes; 4 also has smaller ones, 19 larger")
	NetDrops       = meter("network.drops", Cumulative, "packet", "nic", "Packets from or for the guest that the kernel dropped while they were the tap's, frames that nobody on the host handles included (Linux 5.17 and newer).", TCX).family("the kernel's name for the reason, such as full_ring, or other")
)

// Check are the meters of a comparison of a meter with what libvirt says of the
// same. Their resource is the meter's.
type Check struct {
	Of *Meter
	// Difference is libvirt's figure less ours: as far as it lies outside of our
	// readings right before and after it, in the unit of the meter.
	Difference *Meter
	// Relative is the difference in parts of the greater figure: -1 to 1.
	Relative *Meter
	// Verdict is 0, 1 or 2; see the constants.
	Verdict *Meter
}

// Verdicts of a comparison, as its verdict meter has them.
const (
	Agrees        = 0 // the difference is within the tolerance
	Differs       = 1 // it is beyond
	NotComparable = 2 // there are no two figures of the same thing
)

func check(of *Meter, theirs string) *Check {
	c := &Check{Of: of}
	name, what := "check."+of.Name, "`"+of.Name+"`"
	c.Difference = meter(name, Gauge, of.Unit, of.Resource,
		"How far libvirt's "+theirs+" lies below (negative) or above two readings of "+what+" around it; 0 between them.", Libvirt)
	c.Relative = meter(name+".relative", Gauge, "ratio", of.Resource, "The same in parts of the greater of both figures.", Libvirt)
	c.Verdict = meter(name+".verdict", Gauge, "verdict", of.Resource,
		"What came of it: 0 both agree, 1 they differ by more than the tolerance, 2 they cannot be compared.", Libvirt)
	for _, m := range c.Meters() {
		m.Check = c
	}
	return c
}

// Meters returns the meters of the comparison.
func (c *Check) Meters() []*Meter { return []*Meter{c.Difference, c.Relative, c.Verdict} }

// Comparisons with libvirt, at the cross-check's own cadence.
var (
	CheckCPU            = check(CPU, "`vcpu.N.time`, summed up,")
	CheckCPUProcess     = check(CPUProcess, "`cpu.time`")
	CheckCPUWait        = check(CPUWait, "`vcpu.N.delay`, summed up,")
	CheckKVMExits       = check(KVMExits, "`vcpu.N.exits.sum`, summed up,")
	CheckDiskReads      = check(DiskHostDeviceReadRequests, "`block.N.rd.reqs`")
	CheckDiskReadBytes  = check(DiskHostDeviceReadBytes, "`block.N.rd.bytes`")
	CheckDiskWrites     = check(DiskHostDeviceWriteRequests, "`block.N.wr.reqs`")
	CheckDiskWriteBytes = check(DiskHostDeviceWriteBytes, "`block.N.wr.bytes`")
	CheckNetInBytes     = check(NetInBytes, "`net.N.rx.bytes`")
	CheckNetOutBytes    = check(NetOutBytes, "`net.N.tx.bytes`")
	CheckNetInPackets   = check(NetInPackets, "`net.N.rx.pkts`")
	CheckNetOutPackets  = check(NetOutPackets, "`net.N.tx.pkts`")
)

// Checks lists the comparisons, in the order of the catalogue.
var Checks = []*Check{
	CheckCPU, CheckCPUProcess, CheckCPUWait, CheckKVMExits,
	CheckDiskReads, CheckDiskReadBytes, CheckDiskWrites, CheckDiskWriteBytes,
	CheckNetInBytes, CheckNetOutBytes, CheckNetInPackets, CheckNetOutPackets,
}

// meters returns the meters of comparisons.
func meters(checks []*Check) (all []*Meter) {
	for _, c := range checks {
		all = append(all, c.Meters()...)
	}
	return all
}

// What a total of the kernel counted and the hook that tallies the same did not,
// while it was attached, since the agent started. Negative: the hook saw more.
var (
	CheckHookDisk     = meter("check.hook.disk", Gauge, "B", "domain", "Bytes that the QEMU process moved to and from storage (disk.host.read.bytes and .write.bytes) and the disk hook did not see, buffered I/O included.", Iomap)
	CheckHookRunQueue = meter("check.hook.runqueue", Gauge, "switch", "domain", "Times that vCPU threads were put on a CPU (cpu.switches) and the runqueue hook did not see.", RunQueue)
	CheckHookExits    = meter("check.hook.exits", Gauge, "exit", "domain", "Exits that KVM has counted (kvm.exits) and the exits hook did not see.", Exits)
	CheckHookTCX      = meter("check.hook.tcx", Gauge, "packet", "nic", "Packets in the link's statistics, those that the tap's queue had no room for included, that the tcx hook did not see.", TCX)
)

// Meters of the host's own hardware, as its BMC tells them. Those of Ceilometer's
// ipmi namespace have its names. Resource ids: "sensor" is the node's name, "-",
// the sensor's name and number as ipmitool writes them, in lower case and with _
// for spaces, such as node1-cpu1_temp_(0x1); "host" is the node's name; "chassis",
// "sel" and "selevent" are that with "-chassis", "-sel" and "-sel-event".
var (
	IPMITemperature = meter("hardware.ipmi.temperature", Gauge, "C", "sensor", "Reading of a temperature sensor, in the sensor's unit.", IPMI)
	IPMICurrent     = meter("hardware.ipmi.current", Gauge, "Amps", "sensor", "Reading of a current sensor, in the sensor's unit.", IPMI)
	IPMIFan         = meter("hardware.ipmi.fan", Gauge, "RPM", "sensor", "Reading of a fan sensor, in the sensor's unit.", IPMI)
	IPMIVoltage     = meter("hardware.ipmi.voltage", Gauge, "V", "sensor", "Reading of a voltage sensor, in the sensor's unit.", IPMI)
	IPMIPower       = meter("hardware.ipmi.power", Gauge, "W", "sensor", "Reading of a sensor that measures watts.", IPMI)

	IPMISensorState  = meter("hardware.ipmi.sensor.state", Gauge, "level", "sensor", "How far a sensor with thresholds is from normal: 0 ok, 1 non-critical, 2 critical, 3 non-recoverable.", IPMI)
	IPMISensorStates = meter("hardware.ipmi.sensor.states", Gauge, "bits", "sensor", "States that a discrete sensor is in, bit n for state n; the metadata names them.", IPMI)
	IPMISensorAge    = meter("hardware.ipmi.sensor.age", Gauge, "s", "sensor", "Age of the last reading of a sensor that could not be read; the metadata says why not.", IPMI)
	IPMISensorEvent  = meter("hardware.ipmi.sensor.event", Delta, "event", "sensor", "A change of a sensor's state; the metadata has the sensor, its old state and the new one.", IPMI).occurs("hardware.ipmi.sensor.state")

	IPMINodePower      = meter("hardware.ipmi.node.power", Gauge, "W", "host", "Power of the machine, by Intel Node Manager.", IPMI)
	IPMINodeInlet      = meter("hardware.ipmi.node.temperature", Gauge, "C", "host", "Inlet temperature, by Intel Node Manager.", IPMI)
	IPMINodeOutlet     = meter("hardware.ipmi.node.outlet_temperature", Gauge, "C", "host", "Outlet temperature, by Intel Node Manager 3.0.", IPMI)
	IPMINodeAirflow    = meter("hardware.ipmi.node.airflow", Gauge, "CFM", "host", "Volumetric airflow, by Intel Node Manager 3.0.", IPMI)
	IPMINodeCUPS       = meter("hardware.ipmi.node.cups", Gauge, "CUPS", "host", "Index of how busy the machine is, by Intel Node Manager 3.0.", IPMI)
	IPMINodeCPUUtil    = meter("hardware.ipmi.node.cpu_util", Gauge, "%", "host", "Utilization of the CPUs, by Intel Node Manager 3.0.", IPMI)
	IPMINodeMemoryUtil = meter("hardware.ipmi.node.mem_util", Gauge, "%", "host", "Utilization of the memory bandwidth, by Intel Node Manager 3.0.", IPMI)
	IPMINodeIOUtil     = meter("hardware.ipmi.node.io_util", Gauge, "%", "host", "Utilization of the I/O bandwidth, by Intel Node Manager 3.0.", IPMI)

	IPMIDCMIPower     = meter("hardware.ipmi.dcmi.power", Gauge, "W", "host", "Power of the machine, by DCMI.", IPMI)
	IPMIDCMIPowerMin  = meter("hardware.ipmi.dcmi.power.min", Gauge, "W", "host", "Least power in DCMI's sampling period.", IPMI)
	IPMIDCMIPowerMax  = meter("hardware.ipmi.dcmi.power.max", Gauge, "W", "host", "Greatest power in DCMI's sampling period.", IPMI)
	IPMIDCMIPowerMean = meter("hardware.ipmi.dcmi.power.average", Gauge, "W", "host", "Average power over DCMI's sampling period.", IPMI)

	IPMIChassisPower  = meter("hardware.ipmi.chassis.power", Gauge, "on", "chassis", "1 while the machine is on.", IPMI)
	IPMIChassisFaults = meter("hardware.ipmi.chassis.faults", Gauge, "fault", "chassis", "Faults that the chassis reports; the metadata names them.", IPMI)

	IPMISELEntries = meter("hardware.ipmi.sel.entries", Gauge, "entry", "sel", "Entries of the system event log.", IPMI)
	IPMISELFree    = meter("hardware.ipmi.sel.free", Gauge, "B", "sel", "Free space of the system event log; 65535 stands for as much and more.", IPMI)
	IPMISELEvent   = meter("hardware.ipmi.sel.event", Delta, "event", "selevent", "A new entry of the system event log; the metadata is the entry.", IPMI).occurs("hardware.ipmi.sel")
)

// Catalogue lists every meter, in the order of docs/meters.md.
var Catalogue = append([]*Meter{
	CPU, CPUProcess, CPUWait, CPUSwitches, CPUEmulator, CPUIOThread, CPUWorker, CPUVhost, CPUExited,
	CPUEmulatorWait, CPUEmulatorSwitches, CPUIOThreadWait, CPUIOThreadSwitches,
	CPUWorkerWait, CPUWorkerSwitches, CPUVhostWait, CPUVhostSwitches,
	VCPURun, VCPUWait, VCPUSwitches,
	KVMExits, KVMHaltPoll,
	CPUWaitLatency, CPUPreemptedDomain, CPUPreemptedHost, CPUPreemptedQuota, CPUPreemptedSelf,
	KVMExitsTime, KVMExitsTimes,
	DiskHostReadBytes, DiskHostWriteBytes,
	DiskHostDeviceReadRequests, DiskHostDeviceReadBytes, DiskHostDeviceReadLatency, DiskHostDeviceReadBuckets,
	DiskHostDeviceWriteRequests, DiskHostDeviceWriteBytes, DiskHostDeviceWriteLatency, DiskHostDeviceWriteBuckets,
	DiskHostDeviceFlushRequests, DiskHostDeviceFlushLatency,
	DiskReadBytes, DiskWriteBytes, DiskReadRequests, DiskWriteRequests, DiskFlushRequests,
	DiskReadLatency, DiskWriteLatency, DiskCapacity, DiskAllocation, DiskUsage,
	NetInBytes, NetOutBytes, NetInPackets, NetOutPackets, NetInErrors, NetOutErrors, NetInDrops, NetOutDrops,
	NetInBytesDelta, NetOutBytesDelta,
	NetInSegments, NetOutSegments, NetInSizes, NetOutSizes, NetDrops,
	VCPUs, Memory, MemoryResident, MemoryAvailable, MemoryUsage, MemorySwapIn, MemorySwapOut, PowerState, DiskRootSize, DiskEphemeralSize,
	PerfCPUCycles, PerfInstructions, PerfCacheReferences, PerfCacheMisses,
	Instance, InstanceFlavor, CPUUtil, CPUDelta, CPUL3Cache, MemoryBandwidthTotal, MemoryBandwidthLocal,
	NetInBytesRate, NetOutBytesRate, NetInPacketsRate, NetOutPacketsRate, NetOutPacketsDelta,
	DiskReadBytesRate, DiskWriteBytesRate, DiskReadRequestsRate, DiskWriteRequestsRate, DiskIOPS, DiskLatency,
	AllReadBytes, AllWriteBytes, AllReadRequests, AllWriteRequests,
	AllReadBytesRate, AllWriteBytesRate, AllReadRequestsRate, AllWriteRequestsRate, AllIOPS, AllLatency,
	AllCapacity, AllAllocation, AllUsage,
	CheckHookDisk, CheckHookTCX, CheckHookRunQueue, CheckHookExits,
	IPMITemperature, IPMICurrent, IPMIFan, IPMIVoltage, IPMIPower, IPMISensorState, IPMISensorStates, IPMISensorAge, IPMISensorEvent,
	IPMINodePower, IPMINodeInlet, IPMINodeOutlet, IPMINodeAirflow, IPMINodeCUPS, IPMINodeCPUUtil, IPMINodeMemoryUtil, IPMINodeIOUtil,
	IPMIDCMIPower, IPMIDCMIPowerMin, IPMIDCMIPowerMax, IPMIDCMIPowerMean, IPMIChassisPower, IPMIChassisFaults,
	IPMISELEntries, IPMISELFree, IPMISELEvent,
}, meters(Checks)...)
