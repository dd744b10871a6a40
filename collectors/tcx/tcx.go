// Package tcx counts packets as they pass the tap devices of domains: what they
// are on a wire, how large, and why the kernel dropped some.
package tcx

import (
	"context"
	"errors"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// Options say what to count beside segments and drops.
type Options struct {
	Sizes bool // histograms of packet sizes
}

// The first series. Sizes of incoming packets follow if they are counted, then
// those of outgoing ones, then drops by reason.
const (
	inPackets = iota
	outPackets
	inSegments
	outSegments
	firstFamily
)

// packetCost is what counting a packet takes, about.
const packetCost = 30 * time.Nanosecond

// settle is how long Follow waits for the kernel to attach to new interfaces.
// It goes on after that.
const settle = 50 * time.Millisecond

// Hook is the [collectors.Hook] tcx. Attach, Follow and Detach need no
// capability on a kernel with TCX (Linux 6.6), else CAP_NET_ADMIN: see [bpf.TCX].
// A NIC is emitted from when the programs are attached to it, some 20 ms after
// it was followed or, among many at once, for each before it.
type Hook struct {
	tcx    *bpf.TCX
	sizes  bool
	series []collectors.Series
	ids    collectors.Followed
	stats  collectors.HookStats

	emit func(id uint32, n *bpf.NICTraffic)
	to   func(id uint32, series int, count uint64) // of the Read in progress
}

// Open loads the programs. The errors are those of [bpf.LoadTCX]. A kernel that
// does not tell why it drops packets costs those meters, which is logged.
func Open(log *zap.Logger, opts Options) (*Hook, error) {
	x, err := bpf.LoadTCX(bpf.TCXOptions{Sizes: opts.Sizes, Drops: true})
	if err != nil {
		return nil, err
	}
	h := &Hook{tcx: x, sizes: opts.Sizes, ids: collectors.Followed{}}
	reasons, err := x.Reasons()
	if err != nil {
		log.Info("reasons of dropped packets are not counted", zap.Error(err))
	}
	h.series = series(opts, reasons)
	h.emit = h.tell
	return h, nil
}

func series(opts Options, reasons []string) []collectors.Series {
	one := func(m *sample.Meter) collectors.Series { return collectors.Series{MeterRef: m.MeterRef, Meter: m} }
	all := []collectors.Series{
		inPackets:   {MeterRef: sample.NetInPackets.MeterRef, Tally: true, Cost: packetCost},
		outPackets:  {MeterRef: sample.NetOutPackets.MeterRef, Tally: true, Cost: packetCost},
		inSegments:  one(sample.NetInSegments),
		outSegments: one(sample.NetOutSegments),
	}
	part := func(m *sample.Meter, name string) {
		all = append(all, collectors.Series{MeterRef: m.Part(name), Meter: m})
	}
	if opts.Sizes {
		for _, m := range []*sample.Meter{sample.NetInSizes, sample.NetOutSizes} {
			for i := range bpf.Sizes {
				part(m, strconv.Itoa(bpf.SizeExponent(i)))
			}
		}
	}
	for _, reason := range reasons {
		part(sample.NetDrops, reason)
	}
	return all
}

// Name returns tcx.
func (h *Hook) Name() string { return "tcx" }

// Origin returns [sample.TCX].
func (h *Hook) Origin() sample.Origin { return sample.TCX }

// Series lists what it counts. Packets are for the comparison with the link's
// statistics only, which are what to publish.
func (h *Hook) Series() []collectors.Series { return h.series }

// NeedsNetAdmin says whether Follow needs CAP_NET_ADMIN.
func (h *Hook) NeedsNetAdmin() bool { return h.tcx.NeedsNetAdmin() }

// Attach makes the programs run.
func (h *Hook) Attach() error { return h.tcx.Attach() }

// Detach stops them.
func (h *Hook) Detach() error { return h.tcx.Detach() }

// Follow counts the NICs of targets, whose interfaces are in the network
// namespace of the thread that opened the hook. An interface that is gone
// already, or that the kernel refuses, is tried again at the next call.
func (h *Hook) Follow(targets []collectors.Target) error {
	// First those that go: one that comes may need their room.
	errs := []error{h.ids.Replace(func(yield func(uint32) bool) {
		for _, t := range targets {
			for _, n := range t.NICs {
				if !yield(n.ID) {
					return
				}
			}
		}
	}, h.tcx.Remove)}
	for _, t := range targets {
		for _, n := range t.NICs {
			errs = append(errs, h.tcx.Add(n.ID, n.Index))
		}
	}
	return errors.Join(append(errs, h.tcx.Wait(settle))...)
}

// Read emits what was counted of each NIC. It does not allocate.
func (h *Hook) Read(ctx context.Context, emit func(id uint32, series int, count uint64)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h.to = emit
	return h.tcx.Read(h.emit)
}

// tell emits what was counted of a NIC.
func (h *Hook) tell(id uint32, n *bpf.NICTraffic) {
	h.to(id, inPackets, n.Incoming.Packets)
	h.to(id, outPackets, n.Outgoing.Packets)
	h.to(id, inSegments, n.Incoming.Segments)
	h.to(id, outSegments, n.Outgoing.Segments)
	at := firstFamily
	if h.sizes {
		h.family(id, at, n.Incoming.Sizes[:])
		h.family(id, at+bpf.Sizes, n.Outgoing.Sizes[:])
		at += 2 * bpf.Sizes
	}
	h.family(id, at, n.Drops)
}

// family emits the members from series at on that are not zero.
func (h *Hook) family(id uint32, at int, counts []uint64) {
	for i, n := range counts {
		if n != 0 {
			h.to(id, at+i, n)
		}
	}
}

// Stats counts what the hook has met.
func (h *Hook) Stats() collectors.HookStats {
	// Where they can't be read any more, the last misses stand.
	if misses, err := h.tcx.Misses(); err == nil {
		h.stats.Misses = misses
	}
	h.stats.Entries, h.stats.MaxEntries = h.tcx.Followed()
	return h.stats
}

// Close detaches and unloads the programs, which takes the kernel some 20 ms
// for each NIC.
func (h *Hook) Close() error { return h.tcx.Close() }
