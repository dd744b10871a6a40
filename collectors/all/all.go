// Package all lists the collectors.
package all

import (
	"errors"
	"fmt"
	"io"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/ebpf"
	"github.com/kvmeter/kvmeter/collectors/procfs"
)

// Usage opens readers of CPU time and disk bytes, best first. The last needs
// no privilege and no BPF. The notes say which could not be opened, why, and
// what is missing without it.
func Usage(log *zap.Logger, withoutBPF bool) (readers []collectors.UsageReader, notes []string) {
	var r collectors.UsageReader
	err := errors.New("it is switched off")
	if !withoutBPF {
		r, err = ebpf.Open(log, ebpf.Options{})
	}
	if err != nil {
		notes = append(notes, fmt.Sprintf("CPU time is read from /proc, at more cost, since BPF cannot be used: %v", err))
	} else {
		readers = append(readers, r)
	}
	return append(readers, procfs.New(log)), notes
}

// KVM opens the reader of KVM's statistics.
func KVM(withoutBPF bool) (*bpf.KVM, error) {
	if withoutBPF {
		return nil, errors.New("BPF is switched off")
	}
	return bpf.LoadKVM()
}

// Close closes readers or hooks.
func Close[T io.Closer](all []T) error {
	var errs []error
	for _, c := range all {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
