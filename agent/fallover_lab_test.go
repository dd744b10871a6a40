//go:build lab

package agent

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

var errBroken = errors.New("broken by the test")

// breakable is a real reader that can be made to fail.
type breakable struct {
	collectors.UsageReader
	broken *atomic.Bool
}

func (b breakable) Read(ctx context.Context, procs []bpf.Proc, out []bpf.Usage) error {
	if b.broken.Load() {
		return errBroken
	}
	return b.UsageReader.Read(ctx, procs, out)
}

type breakableLinks struct {
	LinkReader
	broken *atomic.Bool
}

func (b breakableLinks) Read(ctx context.Context, links []rtnl.Link) ([]rtnl.Link, error) {
	if b.broken.Load() {
		return nil, errBroken
	}
	return b.LinkReader.Read(ctx, links)
}

func TestLabFallover(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	linux, err := l.StartGuest(ctx, lab.GuestSpec{})
	must(t, err)
	kvm, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn"})
	must(t, err)
	r := newRecorder(t) // fails the test where a counter goes back
	var walk, others, links atomic.Bool
	startAgent(t, l, r, func(cfg *Config, deps *Deps) {
		cfg.CrosscheckInterval, cfg.FalloverInterval = 0, 500*time.Millisecond
		for i := range deps.Usage {
			broken := &others
			if i == 0 {
				broken = &walk
			}
			deps.Usage[i] = breakable{deps.Usage[i], broken}
		}
		deps.Links = breakableLinks{deps.Links, &links}
	})
	// counted waits until an origin counts a meter.
	counted := func(m *sample.Meter, resource string, by func(sample.Origin) bool) sample.Sample {
		t.Helper()
		for at := time.Now(); ; {
			s := r.await(m, resource, at)
			if by(s.Origin) {
				return s.Sample
			}
			if at = time.UnixMicro(s.Time); time.Since(at) > time.Minute {
				t.Fatalf("%s still counts %s", s.Origin, m.Name)
			}
		}
	}
	is := func(o sample.Origin) func(sample.Origin) bool {
		return func(got sample.Origin) bool { return got == o }
	}
	first := r.await(sample.CPUProcess, kvm.UUID, time.Time{})
	if first.Origin == sample.Libvirt {
		t.Fatal("libvirt counts although the agent can")
	}

	t.Run("the next reader of processes takes over", func(t *testing.T) {
		walk.Store(true)
		s := counted(sample.CPUProcess, kvm.UUID, func(o sample.Origin) bool { return o != first.Origin })
		if s.Origin == sample.Libvirt {
			t.Error("libvirt counts although there are readers left")
		}
	})

	t.Run("libvirt takes over where no reader is left", func(t *testing.T) {
		others.Store(true)
		counted(sample.CPUProcess, kvm.UUID, is(sample.Libvirt)) // the first may be held at the last value
		s := counted(sample.CPUProcess, kvm.UUID, is(sample.Libvirt))
		clock, err := bpf.ProcessCPUClock(kvm.PID())
		must(t, err)
		if got := s.Volume.Bits; got > clock || clock-got > 2*1e9 {
			t.Errorf("libvirt counted %d ns, the clock says %d some time later", got, clock)
		}
		r.awaitGap(kvm.UUID, errBroken.Error()) // of cpu, which libvirt cannot count
	})

	t.Run("and asks no QEMU", func(t *testing.T) {
		must(t, syscall.Kill(kvm.PID(), syscall.SIGSTOP))
		defer func() { must(t, syscall.Kill(kvm.PID(), syscall.SIGCONT)) }()
		for range 4 {
			counted(sample.CPUProcess, kvm.UUID, is(sample.Libvirt))
			counted(sample.CPUProcess, linux.UUID, is(sample.Libvirt))
		}
	})

	t.Run("the first one returns, and goes on from there", func(t *testing.T) {
		walk.Store(false)
		others.Store(false)
		a := counted(sample.CPUProcess, kvm.UUID, is(first.Origin))
		b := counted(sample.CPUProcess, kvm.UUID, is(first.Origin))
		if a.Volume.Bits >= b.Volume.Bits {
			t.Errorf("cpu.process of a busy guest is %s and then %s", a.Volume, b.Volume)
		}
	})

	t.Run("network by libvirt is the network by netlink", func(t *testing.T) {
		nic := linux.Name + "-" + linux.UUID + "-" + linux.NICs()[0].Tap
		in0, out0 := counted(sample.NetInBytes, nic, is(sample.RTNL)), counted(sample.NetOutPackets, nic, is(sample.RTNL))
		links.Store(true)
		_, err := linux.Exec(ctx, "udp 2000 100")
		must(t, err)
		must(t, linux.SendUDP(ctx, 3000, 200))
		counted(sample.NetInBytes, nic, is(sample.Libvirt)) // it may have been read before
		in1, out1 := counted(sample.NetInBytes, nic, is(sample.Libvirt)), counted(sample.NetOutPackets, nic, is(sample.Libvirt))
		links.Store(false)
		in2, out2 := counted(sample.NetInBytes, nic, is(sample.RTNL)), counted(sample.NetOutPackets, nic, is(sample.RTNL))
		if got := in1.Volume.Bits - in0.Volume.Bits; got != 3000*242 || in2.Volume != in1.Volume {
			t.Errorf("network.incoming.bytes grew by %d, want %d, and is %s again, was %s", got, 3000*242, in2.Volume, in1.Volume)
		}
		if got := out1.Volume.Bits - out0.Volume.Bits; got != 2000 || out2.Volume != out1.Volume {
			t.Errorf("network.outgoing.packets grew by %d, want 2000, and is %s again, was %s", got, out2.Volume, out1.Volume)
		}
		if in1.Incarnation != in0.Incarnation || in1.Resource != in0.Resource {
			t.Error("libvirt's samples are of another series")
		}
	})
}
