package collectors

import (
	"context"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/sample"
)

// Hook counts events of domains in BPF programs that run as the events happen:
// what the kernel itself keeps no count of. A kernel may skip an event of a
// hook, so that totals to bill from never come from one. It is for one
// goroutine at a time.
//
// Opening a hook loads its programs and takes the capabilities; Attach, Detach,
// Follow and Read need none, unless the hook has a method NeedsNetAdmin that says
// so.
type Hook interface {
	// Name is the hook's name in settings, metrics and gaps, such as disk.
	Name() string
	// Origin is the hook's name in samples.
	Origin() sample.Origin
	// Series lists what it counts. It stays the same once the hook is open.
	Series() []Series
	// Attach makes the programs run. Counters go on from where they were.
	Attach() error
	// Detach stops them. A hook is made detached.
	Detach() error
	// Follow says which domains there are from now on. What is counted of a
	// target with an ID that was there before goes on; what is not there any
	// more is forgotten. A target that cannot be followed costs no other; the
	// error joins the reasons.
	Follow(targets []Target) error
	// Read calls emit with what was counted since the ID was first followed,
	// all of one ID in succession. series is an index into Series. What a hook
	// cannot see of a resource it leaves out, so that it is no zero; zeros of
	// families (histograms, reasons) may be left out too.
	Read(ctx context.Context, emit func(id uint32, series int, count uint64)) error
	// Stats counts what the hook has met.
	Stats() HookStats
	// Close detaches and unloads the programs.
	Close() error
}

// Series is one counter of a hook.
type Series struct {
	sample.MeterRef
	// Meter is its entry in the catalogue, a family's for one of its parts.
	// nil: it is not published and only counts for the tally.
	Meter *sample.Meter
	// Tally says that the kernel keeps a total of the same: the sum of such
	// series of a domain (disk: bytes of all its disks; runqueue: switches;
	// exits: exits) or of a NIC (tcx: packets both ways) is compared with it
	// at each poll, and what the hook lacks is the meter check.hook.NAME.
	Tally bool
	// Cost is about the CPU time that counting one takes, as docs/cost.md has it.
	Cost time.Duration
}

// Target is a domain as hooks follow it. IDs are never 0, are one space for
// domains, disks and NICs, and are not given twice.
type Target struct {
	ID    uint32
	Proc  bpf.Proc
	Disks []TargetDisk
	NICs  []TargetNIC
}

// TargetDisk is a disk of a domain. Its ID changes with its incarnation.
type TargetDisk struct {
	ID     uint32
	Device string // target, such as vda
	// Sources are the paths in [Disk.Sources]; none: nothing on this host to follow.
	Sources []string
	Direct  bool // as [Disk.Direct]
}

// TargetNIC is a NIC of a domain. Its ID changes with its incarnation.
type TargetNIC struct {
	ID    uint32
	Index int // of the host's interface
}

// HookStats counts what a hook has met since it was opened.
type HookStats struct {
	Misses     uint64 // runs that the kernel skipped and tells of
	Dropped    uint64 // events not counted because a map was full
	Orphans    uint64 // events whose beginning or end was not seen
	Entries    int    // of the fullest of its bounded maps, as last read
	MaxEntries int    // that fit into that map
}
