//go:build lab

package agent

import (
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestLabKVM compares KVM's statistics, as they are published, with libvirt's.
func TestLabKVM(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	pulse, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "pulse", VCPUs: 2})
	must(t, err)
	disk, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "disk"})
	must(t, err)
	r := newRecorder(t)
	a := startAgent(t, l, r, func(cfg *Config, deps *Deps) {
		cfg.KVMInterval = minInterval
		k, err := bpf.LoadKVM()
		must(t, err)
		t.Cleanup(func() {
			if err := k.Close(); err != nil {
				t.Error(err)
			}
		})
		deps.KVM = k
	})
	time.Sleep(time.Second)
	for _, g := range []*lab.Guest{pulse, disk} {
		must(t, g.Pause(ctx))
		time.Sleep(100 * time.Millisecond)
		s, err := a.guest.Stats(ctx, g.UUID, collectors.VCPUStatistics)
		must(t, err)
		want := uint64(0)
		for _, v := range s.VCPUs {
			if !v.HasExits {
				t.Fatalf("libvirt tells no exits: %+v", s)
			}
			want += v.Exits
		}
		got := r.await(sample.KVMExits, g.UUID, time.Now())
		t.Logf("%s: %s exits, libvirt %d", g.Name, got.Volume, want)
		if got.Volume != sample.Uint(want) || want == 0 || got.Origin != sample.KVM {
			t.Errorf("%s: got %s by %s, libvirt says %d", g.Name, got.Volume, got.Origin, want)
		}
	}
}
