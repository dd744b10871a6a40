package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// kvmGetStatsFD is a request of linux/kvm.h, since Linux 5.14.
const kvmGetStatsFD = 0xAECE

// Sizes of linux/kvm.h: struct kvm_stats_header, and struct kvm_stats_desc
// without its name.
const (
	statsHeaderSize = 24
	statsDescSize   = 16
)

// Stats returns what KVM counts of the vCPU, as KVM_GET_STATS_FD tells it.
func (v *VM) Stats() (map[string]uint64, error) {
	fd, err := ioctl(v.vcpu, kvmGetStatsFD, nil)
	if err != nil {
		return nil, fmt.Errorf("ask for the vCPU's statistics: %w", err)
	}
	f := os.NewFile(uintptr(fd), "kvm-vcpu-stats")
	defer f.Close()
	all := make([]byte, 64<<10)
	n, err := unix.Pread(fd, all, 0)
	if err != nil {
		return nil, fmt.Errorf("read the vCPU's statistics: %w", err)
	}
	return parseStats(all[:n])
}

func parseStats(all []byte) (map[string]uint64, error) {
	short := errors.New("the vCPU's statistics are cut off")
	if len(all) < statsHeaderSize {
		return nil, short
	}
	word := func(at uint32) uint32 { return binary.NativeEndian.Uint32(all[at:]) }
	nameSize, count, descs, data := word(4), word(8), word(16), word(20)
	stats := map[string]uint64{}
	for i := range count {
		at := descs + i*(statsDescSize+nameSize)
		if uint64(at)+uint64(statsDescSize+nameSize) > uint64(len(all)) {
			return nil, short
		}
		if binary.NativeEndian.Uint16(all[at+6:]) != 1 { // a histogram
			continue
		}
		value := uint64(data) + uint64(word(at+8))
		if value+8 > uint64(len(all)) {
			return nil, short
		}
		stats[unix.ByteSliceToString(all[at+statsDescSize:at+statsDescSize+nameSize])] = binary.NativeEndian.Uint64(all[value:])
	}
	return stats, nil
}
