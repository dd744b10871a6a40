package bpf

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

// The values of enum status and FIELD_* in include/usage.h.
const (
	statusGone = iota
	statusOK
	statusReused
	statusTorn
	statusTooManyThreads
	statusKernelThread
	statusUnchanged

	fieldIO   = 1
	fieldWait = 2
)

// maxProcesses and maxVCPUs are MAX_PROCESSES and MAX_VCPUS in include/usage.h.
const (
	maxProcesses = 1024
	maxVCPUs     = 16384
)

// errOf is the error that a status stands for.
func errOf(status uint32) error {
	switch status {
	case statusOK:
		return nil
	case statusReused:
		return ErrReused
	case statusTorn:
		return ErrTorn
	case statusTooManyThreads:
		return ErrTooManyThreads
	case statusKernelThread:
		return ErrKernelThread
	}
	return ErrGone
}

// usage turns what a program recorded of a process into u.
func (s *Stats) usage(rec *gen.WalkUsage, u *Usage) {
	s.Retries += uint64(rec.Retries)
	if err := errOf(rec.Status); err != nil {
		s.fail(u, err)
		return
	}
	*u = Usage{
		Run:                 rec.RunNs,
		Slice:               rec.SliceNs,
		Wait:                rec.WaitNs,
		Switches:            rec.Switches,
		Exited:              rec.ExitedNs,
		Process:             rec.ExitedNs,
		ReadBytes:           rec.ReadBytes,
		WriteBytes:          rec.WriteBytes,
		CancelledWriteBytes: rec.CancelledWriteBytes,
		Threads:             rec.Threads,
		VCPUs:               rec.Vcpus,
		HasSplit:            true,
		HasIO:               rec.Fields&fieldIO != 0,
	}
	switches := uint64(0)
	for c := range Classes {
		u.Process += u.Run[c] + u.Slice[c]
		switches += u.Switches[c]
	}
	// A kernel may have the field and count only under a boot option.
	u.HasWait = rec.Fields&fieldWait != 0 && switches > 0
	s.LostVCPUs += uint64(rec.Vcpus - rec.VcpuNumber)
}

// fail makes u say only why its process could not be read.
func (s *Stats) fail(u *Usage, err error) {
	s.Failed++
	*u = Usage{Err: err}
}

// vcpu turns what a program recorded of a vCPU thread into a usage.
func vcpu(rec *gen.WalkVcpu) VCPUUsage {
	number := (*[8]byte)(unsafe.Pointer(&rec.Number))
	return VCPUUsage{
		Index: vcpuNumber(number[:]), TID: rec.Tid,
		Run: rec.RunNs, Slice: rec.SliceNs, Wait: rec.WaitNs, Switches: rec.Switches,
	}
}

// array is a program's array, mapped.
type array[T any] struct {
	mem    []byte
	values []T
}

// mapArray maps a program's array, for the caller to unmap.
func mapArray[T any](m *ebpf.Map) (a array[T], err error) {
	if size := unsafe.Sizeof(*new(T)); uintptr(m.ValueSize()) != size {
		return a, fmt.Errorf("values of %d bytes instead of %d", m.ValueSize(), size)
	}
	page := os.Getpagesize()
	bytes := (int(m.ValueSize()*m.MaxEntries()) + page - 1) / page * page
	if a.mem, err = unix.Mmap(m.FD(), 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return a, fmt.Errorf("map its memory: %w", err)
	}
	a.values = unsafe.Slice((*T)(unsafe.Pointer(&a.mem[0])), m.MaxEntries())
	return a, nil
}

func (a *array[T]) unmap() error {
	if a.mem == nil {
		return nil
	}
	mem := a.mem
	*a = array[T]{}
	return unix.Munmap(mem)
}

// bytesOf is the memory of s.
func bytesOf[T any](s []T) []byte {
	if len(s) == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(&s[0])), len(s)*int(unsafe.Sizeof(s[0])))
}
