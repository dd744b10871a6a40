package agent

import (
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// Meters that a UsageReader counts, by index into usageState.
const (
	iCPU = iota
	iProcess
	iWait
	iEmulator
	iIOThread
	iWorker
	iVHost
	iExited
	iDiskRead
	iDiskWrite
	usageCount
)

var usageMeters = [usageCount]*sample.Meter{
	sample.CPU, sample.CPUProcess, sample.CPUWait, sample.CPUEmulator, sample.CPUIOThread,
	sample.CPUWorker, sample.CPUVhost, sample.CPUExited, sample.DiskHostReadBytes, sample.DiskHostWriteBytes,
}

// classMeters says which meter a class of threads counts into.
var classMeters = [bpf.Classes]int{
	bpf.VCPU: iCPU, bpf.Emulator: iEmulator, bpf.IOThread: iIOThread, bpf.Worker: iWorker, bpf.VHost: iVHost,
}

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
	diskCount
)

var diskMeters = [diskCount]*sample.Meter{
	sample.DiskReadBytes, sample.DiskWriteBytes, sample.DiskReadRequests, sample.DiskWriteRequests, sample.DiskFlushRequests,
}

// domain is a running guest and what was last published of it. It lives as
// long as its QEMU process.
type domain struct {
	process
	proc        bpf.Proc
	incarnation sample.Incarnation
	found       time.Time
	def         *collectors.Definition // libvirt's; nil: not known
	ready       bool                   // its samples may go out: def is known, or will not be soon
	defined     time.Time              // last call of define
	replaced    bool                   // a process that started later has its UUID: what libvirt says is of that one

	uuid, name string
	row        sample.Row
	usage      usageState
	origin     sample.Origin // of the last usage
	vcpus      int
	nics       []nic
	disks      []disk
	unplugged  []disk // one of each device and serial, as last read

	sent  int64  // time of the last sample or gap of its usage, µs since the epoch
	fault string // why it could not be read last time; empty: it could
	blind bool   // without libvirt its NICs are not known, for lack of rights

	requests [2]requestCount // of all disks, at the last two readings
}

type requestCount struct {
	at time.Time
	n  uint64
}

type nic struct {
	device string
	index  int  // of the host's interface; 0: it has none now
	lost   bool // the index was not there at the last reading
	row    sample.Row
	last   [nicCount]uint64
	sent   int64  // time of the last sample or gap, µs since the epoch; 0: none
	fault  string // why it could not be read last time; empty: it could
}

type disk struct {
	device, serial string
	lives          int // how often its counters started at zero again under this agent
	row            sample.Row
	last           [diskCount]uint64
	sent           int64 // time of the last sample or gap, µs since the epoch
}

func newDomain(p *process, bootID string, now time.Time) *domain {
	start := strconv.FormatUint(p.start, 10)
	d := &domain{
		process: *p, found: now,
		proc:        bpf.Proc{PID: p.pid, StartTicks: p.start},
		incarnation: sample.IncarnationOf(bootID, start),
		uuid:        p.uuid, name: p.name,
	}
	if !isUUID(d.uuid) { // started by hand: one of its own, for as long as it runs
		d.uuid = uuid.NewSHA1(uuid.NameSpaceOID, []byte(bootID+"/"+start+"/"+strconv.Itoa(p.pid))).String()
	}
	if d.name == "" {
		d.name = "qemu-" + strconv.Itoa(p.pid)
	}
	return d
}

// define takes over what libvirt says, or with nil what can be known without
// it. index finds the interface index of a tap. Counters of devices that stay
// go on.
func (d *domain) define(now time.Time, def *collectors.Definition, source, host string, taps []string, index func(string) int) {
	d.def, d.defined = def, now
	if def == nil {
		def = undefined(d, host, taps)
	}
	d.name = def.Name
	d.row = sample.Row{
		Resource: d.uuid, Incarnation: d.incarnation, Source: source,
		Project: def.Project, User: def.User, Metadata: def.Metadata,
	}
	own := strconv.FormatUint(uint64(d.incarnation), 16)

	nics := make([]nic, 0, len(def.NICs))
	for _, n := range def.NICs {
		i := index(n.Device)
		// A NIC is (interface index, its creation). The kernel tells no time of
		// creation; the process that made the tap stands for it.
		inc := sample.IncarnationOf("nic", own, strconv.Itoa(i))
		next := nic{device: n.Device, index: i}
		for _, old := range d.nics {
			if old.device == n.Device && old.index == i {
				next = old
			}
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
		} else if i := next.in(d.unplugged); i >= 0 {
			next = d.unplugged[i]
			d.unplugged = slices.Delete(d.unplugged, i, i+1)
			next.sent = 0
			if !k.Removable {
				next.lives++
				next.last = [diskCount]uint64{}
			}
		}
		next.row = sample.Row{
			Resource: k.Resource, Source: source,
			Project: def.Project, User: def.User, Metadata: k.Metadata,
		}
		next.row.Incarnation = d.diskIncarnation(&next)
		disks = append(disks, next)
	}
	for _, old := range d.disks {
		old.row = sample.Row{}
		d.unplugged = append(d.unplugged, old)
	}
	d.disks = disks
}

// in returns where the disk is among others, or -1.
func (k *disk) in(disks []disk) int {
	return slices.IndexFunc(disks, func(o disk) bool { return o.device == k.device && o.serial == k.serial })
}

// lostNIC reports whether it is time to look for the interface of a NIC again:
// it was not there at the last reading, and may have been made anew.
func (d *domain) lostNIC(now time.Time) bool {
	for i := range d.nics {
		if d.nics[i].lost || d.nics[i].index == 0 && now.Sub(d.defined) >= retryTaps {
			return true
		}
	}
	return false
}

// diskIncarnation names the disk's attachment: the process, the target, what is
// attached there, and how often that started anew under this agent.
func (d *domain) diskIncarnation(k *disk) sample.Incarnation {
	parts := []string{"disk", strconv.FormatUint(uint64(d.incarnation), 16), k.device, k.serial}
	if k.lives > 0 {
		parts = append(parts, strconv.Itoa(k.lives))
	}
	return sample.IncarnationOf(parts...)
}

// advance takes over a disk's counters. QEMU's never shrink while a disk stays
// attached: one that did is another attachment, which started at zero.
func (d *domain) advance(k *disk, s *collectors.DiskStats) {
	now := [diskCount]uint64{
		iReadBytes: s.ReadBytes, iWriteBytes: s.WriteBytes,
		iReadRequests: s.ReadRequests, iWriteRequests: s.WriteRequests, iFlushRequests: s.FlushRequests,
	}
	for i := range now {
		if now[i] < k.last[i] {
			k.lives++
			k.row.Incarnation = d.diskIncarnation(k)
			break
		}
	}
	k.last = now
}

// usageState is what was published of a process, and what it was made of.
type usageState struct {
	last [usageCount]uint64
	has  uint32 // bits: which meters the last reading had
	had  uint32 // which meters any reading had

	run    [bpf.Classes]uint64 // as last read
	carry  [bpf.Classes]uint64 // time of threads of the class that exited since
	wait   uint64
	waited uint64 // wait of vCPU threads that exited since
	exited uint64
	split  bool // run, wait and exited were read before
}

// advance takes over a reading. A published number never decreases: where a
// reading is lower it is held, and held is called with the meter's index.
//
// The time of a class shrinks when one of its threads exits; the kernel then
// counts it as the process's. It stays in its class here, so that cpu goes on
// growing after a vCPU was unplugged, and "exited" is what is left: time after
// the last reading of threads that have exited, and of those never seen alive.
func (s *usageState) advance(u *bpf.Usage, held func(meter int)) {
	s.has = 0
	set := func(i int, v uint64) {
		s.has |= 1 << i
		if v < s.last[i] {
			held(i)
			return
		}
		s.last[i] = v
	}
	set(iProcess, u.Process)
	if u.HasSplit {
		gone := uint64(0) // of the time that moved to exited threads, what no class claims yet
		if s.split && u.Exited > s.exited {
			gone = u.Exited - s.exited
		}
		sum := uint64(0)
		for c, run := range u.Run {
			if s.split && run < s.run[c] && s.run[c]-run <= gone {
				lost := s.run[c] - run
				gone -= lost
				s.carry[c] += lost
				if c == int(bpf.VCPU) && u.Wait < s.wait {
					s.waited += s.wait - u.Wait
				}
			}
			i := classMeters[c]
			set(i, run+s.carry[c])
			sum += s.last[i]
		}
		rest := uint64(0)
		if u.Process > sum {
			rest = u.Process - sum
		}
		set(iExited, rest)
		s.run, s.exited, s.split = u.Run, u.Exited, true
	}
	if u.HasWait {
		set(iWait, u.Wait+s.waited)
		s.wait = u.Wait
	}
	if u.HasIO {
		set(iDiskRead, u.ReadBytes)
		set(iDiskWrite, u.WriteBytes)
	}
	s.had |= s.has
}
