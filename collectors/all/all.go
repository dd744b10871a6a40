// Package all lists the collectors.
package all

import (
	"errors"
	"fmt"

	"go.uber.org/zap"

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

// Close closes readers.
func Close(readers []collectors.UsageReader) error {
	var errs []error
	for _, r := range readers {
		errs = append(errs, r.Close())
	}
	return errors.Join(errs...)
}
