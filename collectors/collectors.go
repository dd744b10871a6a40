// Package collectors holds the types that collectors share. A collector reads
// from one source and keeps no rate, no retry and no clock of its own.
package collectors

import (
	"context"

	"github.com/kvmeter/kvmeter/bpf"
)

// UsageReader reads what processes have used since they started. It is for one
// goroutine at a time.
type UsageReader interface {
	// Origin is the reader's name in samples: walk, iter or cpuclock.
	Origin() string
	// Read fills out[i] with what procs[i] has used. A process that could not
	// be read has only [bpf.Usage.Err] set; an error of Read itself means that
	// none was read.
	Read(ctx context.Context, procs []bpf.Proc, out []bpf.Usage) error
	// VCPUs returns what the vCPU threads of the i-th process have used, as of
	// the last Read and until the next one.
	VCPUs(i int) []bpf.VCPUUsage
	// Stats counts what the reader has met.
	Stats() bpf.Stats
	// Close frees what the reader holds.
	Close() error
}

// Definition is what libvirt says of a running domain. It is never changed once
// it is made, so that a new one is a change.
type Definition struct {
	UUID     string
	Name     string // libvirt's, such as instance-00000001
	Display  string // Nova's name of the instance; empty without Nova
	Project  string // Nova's project id; empty without Nova
	User     string // Nova's user id; empty without Nova
	VCPUs    int    // now plugged in
	State    int    // libvirt's number of its state, 0 to 7
	Memory   uint64 // KiB that it has now, as its balloon was set
	Perf     bool   // hardware counters are enabled
	Flavor   *Flavor
	Metadata []byte // resource_metadata of the domain's samples, a JSON object
	// The same with the number of vCPUs, for samples of its CPU time, and with
	// the names of its disks, for sums over them.
	CPUMetadata, DisksMetadata []byte

	NICs  []NIC
	Disks []Disk
}

// Flavor is what a domain was ordered as, by Nova's metadata.
type Flavor struct {
	Name                  string
	RootGiB, EphemeralGiB int
}

// Images are the files that the domain's disks are in.
func (d *Definition) Images() (paths []string) {
	for i := range d.Disks {
		if path := d.Disks[i].Image(); path != "" {
			paths = append(paths, path)
		}
	}
	return paths
}

// NIC is a network interface of a domain.
type NIC struct {
	Device   string // host's end, such as tap0
	MAC      string
	Resource string // resource id of its samples
	Metadata []byte // a JSON object
	// Macvtap says that the device is a macvtap, which counts in the guest's own
	// direction: what it transmits, the guest sent. A tap is the other end of the
	// guest's cable.
	Macvtap bool
}

// Disk is a disk of a domain that has a medium.
type Disk struct {
	Device string // target, such as vda
	// Sources are the paths on the host of its image or block device, of what
	// that is based on and of what it is mirrored to. Images without a path
	// (librbd, vhost-user) are left out.
	Sources []string
	Direct  bool // its I/O passes the host's page cache by: cache mode none or directsync
	// Kind is how its image is reached: file, block, network, vhostuser, …; Format
	// is its driver's, such as raw, and may be empty.
	Kind, Format string

	Serial    string // Nova puts the Cinder volume's id here; may be empty
	Removable bool   // a CD or floppy drive: it stays, and its counters, when its medium goes
	Resource  string // resource id of its samples
	Metadata  []byte // a JSON object
}

// Image is the file that the disk is in; empty: it is in none.
func (k *Disk) Image() string {
	if k.Kind != "file" || len(k.Sources) == 0 {
		return ""
	}
	return k.Sources[0]
}

// Groups are kinds of statistics that libvirt can be asked for.
type Groups uint

// The groups. All but NICStatistics and PerfStatistics make QEMU work.
const (
	CPUStatistics    Groups = 1 << iota // the process's CPU time
	VCPUStatistics                      // each vCPU's times and, under KVM, exits
	DiskStatistics                      // each disk's requests and sizes
	NICStatistics                       // each NIC's packets
	MemoryStatistics                    // what the guest's balloon driver tells
	PerfStatistics                      // hardware counters
)

// GuestStats is what libvirt and QEMU say of a domain.
type GuestStats struct {
	CPUTime uint64 // cpu.time in ns
	HasCPU  bool
	VCPUs   []VCPUStats
	Disks   []DiskStats
	NICs    []NICStats
	Memory  MemoryStats
	Perf    map[string]uint64 // by libvirt's names of the events, such as cpu_cycles
}

// MemoryStats is what a guest's balloon driver tells, in KiB. All but Asked are
// false without a driver or where it has not told yet.
type MemoryStats struct {
	Asked                                       bool // QEMU answered
	Available, Unused, Usable                   uint64
	SwapIn, SwapOut                             uint64
	HasAvailable, HasUnused, HasUsable, HasSwap bool
}

// VCPUStats is what libvirt says of a vCPU's thread.
type VCPUStats struct {
	Time                        uint64 // on a CPU, ns, in ticks of 10 ms; vcpu.N.time
	Delay                       uint64 // runnable and on no CPU, ns; vcpu.N.delay
	Exits                       uint64 // from the guest to KVM; vcpu.N.exits.sum
	HasTime, HasDelay, HasExits bool
}

// DiskStats counts what a guest asked of a disk since its QEMU has had it.
type DiskStats struct {
	Device                      string // target, such as vda
	ReadBytes, WriteBytes       uint64
	ReadRequests, WriteRequests uint64
	FlushRequests               uint64
	ReadNs, WriteNs             uint64 // that requests took, added up
	// Sizes in bytes: as the guest sees it; of its image, what is in use; of its
	// image on the host.
	Capacity, Allocation, Physical uint64
	HasAllocation                  bool
}

// NICStats counts what went through a NIC since the host's interface was made,
// in the guest's direction.
type NICStats struct {
	Device                string // host's end, such as tap0
	InBytes, OutBytes     uint64
	InPackets, OutPackets uint64
	InErrors, OutErrors   uint64
	InDrops, OutDrops     uint64
}
