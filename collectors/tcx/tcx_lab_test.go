//go:build lab

package tcx

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/test/tap"
)

func open(t testing.TB, opts Options) *Hook {
	t.Helper()
	h, err := Open(zap.NewNop(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// counts returns what was counted by ID and name.
func counts(t testing.TB, h *Hook) map[uint32]map[string]uint64 {
	t.Helper()
	all := map[uint32]map[string]uint64{}
	last := uint32(0)
	err := h.Read(t.Context(), func(id uint32, series int, count uint64) {
		if id != last && all[id] != nil {
			t.Errorf("NIC %d is emitted twice", id)
		}
		if last = id; all[id] == nil {
			all[id] = map[string]uint64{}
		}
		all[id][h.Series()[series].Name] = count
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func send(t testing.TB, tp *tap.Tap, frames, size int) {
	t.Helper()
	for range frames {
		if _, err := tp.Queues[0].Write(tap.Frame(size)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNICsOfDomainsAreFollowed(t *testing.T) {
	tap.Namespace(t)
	h := open(t, Options{Sizes: true})
	if err := h.Attach(); err != nil {
		t.Fatal(err)
	}
	a, b := tap.Add(t, "vnet0", tap.Options{}), tap.Add(t, "vnet1", tap.Options{})
	one := collectors.Target{ID: 1, NICs: []collectors.TargetNIC{{ID: 11, Index: a.Index}, {ID: 12, Index: b.Index}}}
	lost := collectors.Target{ID: 2, NICs: []collectors.TargetNIC{{ID: 21, Index: b.Index + 1}}}
	if err := h.Follow([]collectors.Target{lost, one}); !errors.Is(err, bpf.ErrNoInterface) {
		t.Errorf("got %v, want %v", err, bpf.ErrNoInterface)
	}
	h.settle(t)
	send(t, a, 3, 100)
	send(t, b, 5, 1000)
	got := counts(t, h)
	if len(got) != 2 || got[11]["network.outgoing.packets"] != 3 || got[12]["network.outgoing.segments"] != 5 ||
		got[11]["network.outgoing.size.bucket.6"] != 3 || got[12]["network.outgoing.size.bucket.9"] != 5 {
		t.Errorf("got %v, want 3 packets of 100 and 5 of 1000 bytes", got)
	}
	if _, err := h.tcx.Reasons(); err == nil && got[11]["network.drops.unhandled_proto"] != 3 {
		t.Errorf("got %v, want 3 drops, since nobody handles such frames", got[11])
	}
	if s := h.Stats(); s.Entries != 3 || s.MaxEntries != 2048 || s.Misses != 0 || s.Dropped != 0 {
		t.Errorf("got %+v", s)
	}

	// One is unplugged, and made anew for another domain.
	b.Remove()
	b = tap.Add(t, "vnet1", tap.Options{})
	one.NICs = one.NICs[:1]
	two := collectors.Target{ID: 3, NICs: []collectors.TargetNIC{{ID: 31, Index: b.Index}}}
	if err := h.Follow([]collectors.Target{one, two}); err != nil {
		t.Error(err)
	}
	h.settle(t)
	send(t, a, 1, 100)
	send(t, b, 7, 100)
	got = counts(t, h)
	if len(got) != 2 || got[11]["network.outgoing.packets"] != 4 || got[31]["network.outgoing.packets"] != 7 || got[31]["network.outgoing.size.bucket.9"] != 0 {
		t.Errorf("got %v, want 4 packets of the first and 7 of the new one", got)
	}
}

// settle waits until all NICs are attached to.
func (h *Hook) settle(t testing.TB) {
	t.Helper()
	if err := h.tcx.Wait(time.Minute); err != nil && !errors.Is(err, bpf.ErrNoInterface) {
		t.Fatal(err)
	}
}

func TestReadAllocatesNothing(t *testing.T) {
	if n := testing.AllocsPerRun(100, reader(t, 20)); n != 0 {
		t.Errorf("got %v allocations a read, want 0", n)
	}
}

// reader returns a function that reads a hook with n NICs.
func reader(t testing.TB, n int) func() {
	tap.Namespace(t)
	h := open(t, Options{Sizes: true})
	if err := h.Attach(); err != nil {
		t.Fatal(err)
	}
	var target collectors.Target
	var taps []*tap.Tap
	for i := range n {
		taps = append(taps, tap.Add(t, fmt.Sprintf("vnet%d", i), tap.Options{}))
		target.NICs = append(target.NICs, collectors.TargetNIC{ID: uint32(i + 1), Index: taps[i].Index})
	}
	if err := h.Follow([]collectors.Target{target}); err != nil {
		t.Fatal(err)
	}
	h.settle(t)
	for _, tp := range taps {
		send(t, tp, 10, 100)
	}
	var sum uint64
	emit := func(_ uint32, _ int, count uint64) { sum += count }
	return func() {
		if err := h.Read(t.Context(), emit); err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkCostRead100NICs(b *testing.B) {
	read := reader(b, 100)
	b.ReportAllocs()
	for b.Loop() {
		read()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/NIC")
}
