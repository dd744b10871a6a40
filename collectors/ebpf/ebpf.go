// Package ebpf reads what QEMU processes use from the kernel's own counters,
// by the best BPF program that the kernel takes.
package ebpf

import (
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
)

// Options choose a reader.
type Options struct {
	// Origin is bpf.OriginWalk or bpf.OriginIter to take no other, or empty.
	Origin string
}

// Open loads [bpf.Walk] or, where the kernel can't, [bpf.Iter]. What the
// kernel can do is found out by loading, never by its version. The error says
// in one sentence why neither can be had ([bpf.ErrNoBTF], [bpf.ErrNoCapability],
// [bpf.ErrRefused], [bpf.ErrPIDNamespace]); the caller can then fall back to
// [github.com/kvmeter/kvmeter/collectors/procfs].
func Open(log *zap.Logger, opts Options) (collectors.UsageReader, error) {
	var walkErr error
	switch opts.Origin {
	case "", bpf.OriginWalk, bpf.OriginIter:
	default:
		return nil, fmt.Errorf("no BPF reader is called %q (walk and iter are)", opts.Origin)
	}
	if opts.Origin != bpf.OriginIter {
		w, err := bpf.LoadWalk()
		if err == nil {
			return w, nil
		}
		if opts.Origin == bpf.OriginWalk || !worthIter(err) {
			return nil, err
		}
		walkErr = err
	}
	it, err := bpf.LoadIter()
	if err != nil {
		return nil, errors.Join(walkErr, err)
	}
	if walkErr != nil {
		log.Info("reading processes by the BPF iterator, which visits every thread of the host",
			zap.NamedError("reason", walkErr))
	}
	return it, nil
}

// worthIter says whether the iterator may load where the walk failed with err.
func worthIter(err error) bool {
	for _, common := range []error{bpf.ErrNoBTF, bpf.ErrNoCapability, bpf.ErrRefused, bpf.ErrPIDNamespace} {
		if errors.Is(err, common) {
			return false
		}
	}
	return true
}
