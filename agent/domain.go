package agent

import (
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/sample"
)

// Meters of a NIC, by index into nic.last: the guest's direction.
const (
	iInBytes = iota
	iOutBytes
	iInPackets
	iOutPackets
	iInErrors
	iOutErrors
	iInDrops
	iOutDrops
	nicCount
)

var nicMeters = [nicCount]*sample.Meter{
	sample.NetInBytes, sample.NetOutBytes, sample.NetInPackets, sample.NetOutPackets,
	sample.NetInErrors, sample.NetOutErrors, sample.NetInDrops, sample.NetOutDrops,
}

// Meters of a disk, by index into disk.last.
const (
	iReadBytes = iota
	iWriteBytes
	iReadRequests
	iWriteRequests
	iFlushRequests
	iReadLatency
	iWriteLatency
	diskCount
)

var diskMeters = [diskCount]*sample.Meter{
	sample.DiskReadBytes, sample.DiskWriteBytes, sample.DiskReadRequests, sample.DiskWriteRequests, sample.DiskFlushRequests,
	sample.DiskReadLatency, sample.DiskWriteLatency,
}

// domain is a running guest and what was last published of it. It lives as
// long as its QEMU process.
type domain struct {
	process
	proc        bpf.Proc
	incarnation sample.Incarnation
	owner       sample.Incarnation // of its counters in kept: two started within a tick have one incarnation
	kept        *state.File
	found       time.Time
	def         *collectors.Definition // libvirt's; nil: not known
	ready       bool                   // its samples may go out: def is known, or will not be soon
	defined     time.Time              // last call of define
	replaced    bool                   // a process that started later has its UUID: what libvirt says is of that one

	uuid, name string
	described  *collectors.Definition // def, or what is known without libvirt
	row        sample.Row
	cpuRow     sample.Row // of its CPU time
	usage      usageState
	kvm        kvmState
	origin     sample.Origin // of the last usage
	vcpus      int
	nics       []nic
	disks      []disk

	sent   int64  // time of the last sample or gap of its usage, µs since the epoch
	fault  string // why it could not be read last time; empty: it could
	unseen bool   // its end is not accounted
	blind  bool   // without libvirt its NICs are not known, for lack of rights

	check   checkState
	libvirt standby // for cpu.process

	answered time.Time // when its QEMU answered last; zero: it was not asked yet
	mute     string    // why it did not when it was asked last; empty: it did

	requests [2]requestCount // of all disks, at the last two readings

	paused bool // its disks were read since its vCPUs were stopped: they have counted all
	pauses int  // how many are over

	gone      *[diskCount]uint64 // of disks that were unplugged, or attached anew; words of goneBlock
	goneBlock *state.Block

	memory      guestMemory
	memoryBlock *state.Block

	perfHad  uint32 // bits: which hardware counters any reading had
	perfSent int64  // time of the last sample or gap of them, µs since the epoch

	resident   *procfs.Resident // nil: not open
	residentAt int64            // time of the last sample or gap of memory.resident, µs since the epoch

	cpuPast, sumPast pasts // of the CPU time, and of all disks together

	id    uint32      // under which hooks follow it; 0: none yet
	short []shortfall // by hook
}

type requestCount struct {
	at time.Time
	n  uint64
}

type nic struct {
	device  string
	macvtap bool // as [collectors.NIC.Macvtap]
	index   int  // of the host's interface; 0: it has none now
	lost    bool // the index was not there at the last reading
	absent  int  // how often it was looked for, and never found: its network namespace is another
	libvirt standby
	row     sample.Row
	block   *state.Block
	*keptNIC
	past  pasts
	sent  int64       // time of the last sample or gap, µs since the epoch; 0: none
	fault string      // why it could not be read last time; empty: it could
	id    uint32      // under which hooks follow it; 0: none yet
	short []shortfall // by hook
}

// keptNIC outlives the agent: words of a block, of which new ones go to the end.
type keptNIC struct {
	last [nicCount]uint64

	// What the last sample of the changes had counted up to, and 1 if there was one.
	toldIn, toldOut, told uint64
}

type disk struct {
	device, serial string
	row            sample.Row
	block          *state.Block
	*keptDisk
	sent    int64  // time of the last sample or gap, µs since the epoch
	id      uint32 // under which hooks follow it; 0: none yet
	past    pasts
	sources []string // paths on the host
	direct  bool     // past the host's page cache
}

// keptDisk outlives the agent: words of a block, of which new ones go to the end.
type keptDisk struct {
	known    uint64 // 1: it was attached before
	attached uint64 // 0: it is not, now
	lives    uint64 // how often its counters started at zero again
	last     [diskCount]uint64
}

func newDomain(p *process, bootID string, now time.Time, kept *state.File) *domain {
	start := strconv.FormatUint(p.start, 10)
	d := &domain{
		process: *p, found: now, kept: kept,
		proc:        bpf.Proc{PID: p.pid, StartTicks: p.start},
		incarnation: sample.IncarnationOf(bootID, start),
		owner:       ownerOf(bpf.Proc{PID: p.pid, StartTicks: p.start}, bootID),
		uuid:        p.uuid, name: p.name,
	}
	if !isUUID(d.uuid) { // started by hand: one of its own, for as long as it runs
		d.uuid = uuid.NewSHA1(uuid.NameSpaceOID, []byte(bootID+"/"+start+"/"+strconv.Itoa(p.pid))).String()
	}
	if d.name == "" {
		d.name = "qemu-" + strconv.Itoa(p.pid)
	}
	d.usage = newUsageState(kept, d.owner, d.uuid)
	d.goneBlock = kept.Block(d.owner, state.KeyOf("disks"), diskCount)
	d.gone = state.View[[diskCount]uint64](d.goneBlock)
	d.memoryBlock = kept.Block(d.owner, state.KeyOf("memory"), state.Words[keptMemory]())
	d.memory.keptMemory = state.View[keptMemory](d.memoryBlock)
	return d
}

// ownerOf names a process among those whose counters are kept.
func ownerOf(p bpf.Proc, bootID string) sample.Incarnation {
	return sample.IncarnationOf("process", bootID, strconv.FormatUint(p.StartTicks, 10), strconv.Itoa(p.PID))
}

// define takes over what libvirt says, or with nil what can be known without
// it. index finds the interface index of a tap. Counters of devices that stay
// go on.
func (d *domain) define(now time.Time, def *collectors.Definition, source, host string, taps []string, index func(string) int) {
	d.def, d.defined = def, now
	if def == nil {
		def = undefined(d, host, taps)
	}
	d.described = def
	d.name = def.Name
	d.row = sample.Row{
		Resource: d.uuid, Incarnation: d.incarnation, Source: source,
		Project: def.Project, User: def.User, Metadata: def.Metadata,
	}
	d.cpuRow = d.row
	if len(def.CPUMetadata) > 0 {
		d.cpuRow.Metadata = def.CPUMetadata
	}
	own := strconv.FormatUint(uint64(d.incarnation), 16)

	nics := make([]nic, 0, len(def.NICs))
	for _, n := range def.NICs {
		i := index(n.Device)
		// A NIC is (interface index, its creation). The kernel tells no time of
		// creation; the process that made the tap stands for it.
		inc := sample.IncarnationOf("nic", own, strconv.Itoa(i))
		next := nic{device: n.Device, macvtap: n.Macvtap, index: i, absent: 1}
		for _, old := range d.nics {
			switch {
			case old.device == n.Device && old.index == i:
				next = old
				next.absent++
			case old.device == n.Device:
				next.absent = 0
			}
		}
		if i != 0 {
			next.absent = 0
		}
		if next.block == nil {
			next.block = d.kept.Block(d.owner, state.KeyOf("nic", n.Device, strconv.Itoa(i)), state.Words[keptNIC]())
			next.keptNIC = state.View[keptNIC](next.block)
		}
		next.row = sample.Row{
			Resource: n.Resource, Incarnation: inc, Source: source,
			Project: def.Project, User: def.User, Metadata: n.Metadata,
		}
		nics = append(nics, next)
	}
	d.nics = nics

	disks := make([]disk, 0, len(def.Disks))
	for _, k := range def.Disks {
		next := disk{device: k.Device, serial: k.Serial}
		if i := next.in(d.disks); i >= 0 {
			next = d.disks[i]
			d.disks = slices.Delete(d.disks, i, i+1)
		} else {
			next.block = d.kept.Block(d.owner, state.KeyOf("disk", k.Device, k.Serial), state.Words[keptDisk]())
			next.keptDisk = state.View[keptDisk](next.block)
			switch back := next.known != 0 && next.attached == 0; {
			case back && k.Removable: // its counters go on
				d.part(&next.last, rest)
			case back:
				next.lives++
				next.last = [diskCount]uint64{}
			}
		}
		if next.attached == 0 {
			next.known, next.attached = 1, 1
			next.block.Commit()
		}
		next.sources, next.direct = k.Sources, k.Direct
		next.row = sample.Row{
			Resource: k.Resource, Source: source,
			Project: def.Project, User: def.User, Metadata: k.Metadata,
		}
		next.row.Incarnation = d.diskIncarnation(&next)
		disks = append(disks, next)
	}
	for _, old := range d.disks {
		old.attached = 0
		old.block.Commit()
		d.part(&old.last, sum)
	}
	d.disks = disks
}

// part takes what a disk has counted into what the domain's former disks have, or
// out of it.
func (d *domain) part(last *[diskCount]uint64, into func(all, own uint64) uint64) {
	for i, v := range last {
		d.gone[i] = into(d.gone[i], v)
	}
	d.goneBlock.Commit()
}

func sum(all, own uint64) uint64  { return all + own }
func rest(all, own uint64) uint64 { return all - min(all, own) }

// in returns where the disk is among others, or -1.
func (k *disk) in(disks []disk) int {
	return slices.IndexFunc(disks, func(o disk) bool { return o.device == k.device && o.serial == k.serial })
}

// lostNIC reports whether it is time to look for the interface of a NIC again:
// it was not there at the last reading, and may have been made anew.
func (d *domain) lostNIC(now time.Time) bool {
	for i := range d.nics {
		if k := &d.nics[i]; k.lost || k.index == 0 && (k.absent == 1 || now.Sub(d.defined) >= retryTaps) {
			return true
		}
	}
	return false
}

// diskIncarnation names the disk's attachment: the process, the target, what is
// attached there, and how often that started anew.
func (d *domain) diskIncarnation(k *disk) sample.Incarnation {
	parts := []string{"disk", strconv.FormatUint(uint64(d.incarnation), 16), k.device, k.serial}
	if k.lives > 0 {
		parts = append(parts, strconv.FormatUint(k.lives, 10))
	}
	return sample.IncarnationOf(parts...)
}

// advance takes over a disk's counters. QEMU's never shrink while a disk stays
// attached: one that did is another attachment, which started at zero.
func (d *domain) advance(k *disk, s *collectors.DiskStats) {
	now := [diskCount]uint64{
		iReadBytes: s.ReadBytes, iWriteBytes: s.WriteBytes,
		iReadRequests: s.ReadRequests, iWriteRequests: s.WriteRequests, iFlushRequests: s.FlushRequests,
		iReadLatency: s.ReadNs, iWriteLatency: s.WriteNs,
	}
	for i := range now {
		if now[i] < k.last[i] {
			d.part(&k.last, sum)
			k.lives++
			k.row.Incarnation = d.diskIncarnation(k)
			k.id = 0
			break
		}
	}
	k.last = now
	k.block.Commit()
}
