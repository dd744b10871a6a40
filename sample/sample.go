// Package sample holds what every part of kvmeter speaks of: samples, the
// meter catalogue, gaps, batches with their wire format, ids and signatures.
// It imports nothing else of kvmeter.
package sample

// Kind says how the volumes of a meter behave over time. Foreign samples may
// carry any text here; kvmeter's own are one of the three constants.
type Kind string

// The kinds, as Ceilometer spells them.
const (
	Cumulative Kind = "cumulative" // grows, and starts at zero with each incarnation
	Delta      Kind = "delta"      // amount since the previous sample
	Gauge      Kind = "gauge"      // value at an instant
)

// Origin names who counted a number.
type Origin string

// The origins of kvmeter's own samples.
const (
	Walk     Origin = "walk"     // BPF program that walks a process's threads
	Iter     Origin = "iter"     // BPF task iterator
	CPUClock Origin = "cpuclock" // process CPU clock and /proc
	Free     Origin = "free"     // BPF hook at the end of a process (sched_process_free)
	KVM      Origin = "kvm"      // KVM's own statistics of vCPUs, read by a BPF program
	Proc     Origin = "proc"     // /proc/PID/stat
	RTNL     Origin = "rtnl"     // link statistics by netlink
	Iomap    Origin = "iomap"    // BPF hooks on direct I/O of files
	TCX      Origin = "tcx"      // BPF program on a tap's traffic
	RunQueue Origin = "runqueue" // BPF hook on the scheduler's switches
	Exits    Origin = "exits"    // BPF hooks on vCPUs leaving and entering their guests
	IPMI     Origin = "ipmi"     // the host's BMC, over /dev/ipmi0
	Libvirt  Origin = "libvirt"  // domain statistics by libvirt's RPC
)

// Sample is one reading of one meter of one resource.
type Sample struct {
	ID          ID
	Name        string
	Kind        Kind
	Unit        string
	Volume      Volume
	Resource    string
	Source      string // Ceilometer's source; "openstack" unless configured
	Project     string // empty: unknown, null in the API
	User        string // empty: unknown, null in the API
	Time        int64  // µs since the Unix epoch, UTC
	Origin      Origin
	Incarnation Incarnation
	Metadata    []byte   // a JSON object, verbatim; empty: none
	Foreign     *Foreign // nil: the sample is kvmeter's own
}

// Gap is a stretch of time for which a number is missing, and why.
type Gap struct {
	Meter    string // "*": every meter
	Resource string // "*": every resource of the node
	From, To int64  // µs since the Unix epoch, UTC
	Reason   string
	Node     string // whose resources; empty: those of the batch's node
}
