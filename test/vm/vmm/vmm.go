// Package vmm runs a virtual machine of one CPU and one page on /dev/kvm, for
// tests of what counts a machine's exits: they know how many there are.
package vmm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of linux/kvm.h.
const (
	kvmGetAPIVersion       = 0xAE00
	kvmCreateVM            = 0xAE01
	kvmGetVCPUMmapSize     = 0xAE04
	kvmCreateVCPU          = 0xAE41
	kvmRun                 = 0xAE80
	kvmSetUserMemoryRegion = 0x4020AE46
	kvmGetSRegs            = 0x8138AE83
	kvmSetSRegs            = 0x4138AE84
	kvmSetRegs             = 0x4090AE82

	apiVersion = 12
	exitIO     = 2
)

const (
	pageSize = 4096
	// Port is where the machine writes to.
	Port = 0x80
)

// program is real-mode code: out %al,$0x80; jmp to it. Each out ends a KVM_RUN.
var program = []byte{0xe6, Port, 0xeb, 0xfc}

// memoryRegion is struct kvm_userspace_memory_region.
type memoryRegion struct {
	slot, flags      uint32
	guest, size, mem uint64
}

// Offsets in struct kvm_sregs of cs.base and cs.selector, and in struct kvm_run
// of exit_reason.
const (
	sregsSize   = 312
	regsSize    = 144
	csBase      = 0
	csSelector  = 12
	regsRIP     = 128
	regsRFLAGS  = 136
	rflagsFixed = 2
	runReason   = 8
)

// VM is a virtual machine. It belongs to the thread that made it.
type VM struct {
	kvm, vm, vcpu int
	memory, run   []byte
}

// New makes a machine. Its thread is the calling goroutine's, which must be
// locked to it: see [runtime.LockOSThread].
func New() (vm *VM, err error) {
	v := &VM{kvm: -1, vm: -1, vcpu: -1}
	defer func() {
		if err != nil {
			_ = v.Close()
		}
	}()
	if v.kvm, err = unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open /dev/kvm: %w (load kvm_intel or kvm_amd)", err)
	}
	if version, err := ioctl(v.kvm, kvmGetAPIVersion, nil); err != nil || version != apiVersion {
		return nil, fmt.Errorf("KVM's version is %d (%w), want %d", version, err, apiVersion)
	}
	if v.vm, err = ioctl(v.kvm, kvmCreateVM, nil); err != nil {
		return nil, fmt.Errorf("create a VM: %w", err)
	}
	if v.memory, err = unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
		return nil, fmt.Errorf("map its memory: %w", err)
	}
	copy(v.memory, program)
	region := memoryRegion{size: pageSize, mem: uint64(uintptr(unsafe.Pointer(&v.memory[0])))}
	if _, err := ioctl(v.vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return nil, fmt.Errorf("give it memory: %w", err)
	}
	if v.vcpu, err = ioctl(v.vm, kvmCreateVCPU, nil); err != nil {
		return nil, fmt.Errorf("create a vCPU: %w", err)
	}
	size, err := ioctl(v.kvm, kvmGetVCPUMmapSize, nil)
	if err != nil {
		return nil, fmt.Errorf("size of kvm_run: %w", err)
	}
	if v.run, err = unix.Mmap(v.vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map kvm_run: %w", err)
	}
	return v, v.reset()
}

// reset makes the vCPU begin at address 0, where the program is.
func (v *VM) reset() error {
	var sregs [sregsSize / 8]uint64
	var regs [regsSize / 8]uint64
	if _, err := ioctl(v.vcpu, kvmGetSRegs, unsafe.Pointer(&sregs)); err != nil {
		return fmt.Errorf("read segments: %w", err)
	}
	sregs[csBase/8] = 0
	*(*uint16)(unsafe.Add(unsafe.Pointer(&sregs), csSelector)) = 0
	if _, err := ioctl(v.vcpu, kvmSetSRegs, unsafe.Pointer(&sregs)); err != nil {
		return fmt.Errorf("set segments: %w", err)
	}
	regs[regsRIP/8], regs[regsRFLAGS/8] = 0, rflagsFixed
	if _, err := ioctl(v.vcpu, kvmSetRegs, unsafe.Pointer(&regs)); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	return nil
}

// Run lets the machine write n times to [Port], which makes it exit to user
// space as often.
func (v *VM) Run(n int) error {
	for i := range n {
		if _, err := ioctl(v.vcpu, kvmRun, nil); err != nil {
			return fmt.Errorf("run the vCPU: %w", err)
		}
		if reason := *(*uint32)(unsafe.Pointer(&v.run[runReason])); reason != exitIO {
			return fmt.Errorf("exit %d of %d has reason %d, want %d", i, n, reason, exitIO)
		}
	}
	return nil
}

// Close ends the machine.
func (v *VM) Close() error {
	var errs []error
	for _, m := range [][]byte{v.run, v.memory} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	for _, fd := range []int{v.vcpu, v.vm, v.kvm} {
		if fd >= 0 {
			errs = append(errs, os.NewSyscallError("close", unix.Close(fd)))
		}
	}
	return errors.Join(errs...)
}

// ioctl goes on after signals, which Go's scheduler sends.
func ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// OnThread calls do with a machine on a thread of its own.
func OnThread(do func(*VM) error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the machine
		v, err := New()
		if err == nil {
			err = errors.Join(do(v), v.Close())
		}
		done <- err
	}()
	return <-done
}
