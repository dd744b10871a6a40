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
	Metadata []byte // resource_metadata of the domain's samples, a JSON object
	NICs     []NIC
	Disks    []Disk
}

// NIC is a network interface of a domain.
type NIC struct {
	Device   string // host's end, such as tap0
	MAC      string
	Resource string // resource id of its samples
	Metadata []byte // a JSON object
}

// Disk is a disk of a domain that has a medium.
type Disk struct {
	Device    string // target, such as vda
	Serial    string // Nova puts the Cinder volume's id here; may be empty
	Removable bool   // a CD or floppy drive: it stays, and its counters, when its medium goes
	Resource  string // resource id of its samples
	Metadata  []byte // a JSON object
}

// GuestStats is what only libvirt and QEMU can say of a domain.
type GuestStats struct {
	CPUTime uint64 // cpu.time in ns
	HasCPU  bool
	Disks   []DiskStats
}

// DiskStats counts what a guest asked of a disk since its QEMU has had it.
type DiskStats struct {
	Device                      string // target, such as vda
	ReadBytes, WriteBytes       uint64
	ReadRequests, WriteRequests uint64
	FlushRequests               uint64
}
