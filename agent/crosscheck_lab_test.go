//go:build lab

package agent

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// checkNow has a domain checked, and returns its comparisons by meter.
func checkNow(t *testing.T, a *Agent, g *lab.Guest) map[string]client.Comparison {
	t.Helper()
	time.Sleep(freshCheck) // else the last one stands
	s, err := (client.Client{Path: a.cfg.Socket}).Crosscheck(t.Context(), g.UUID, true)
	must(t, err)
	byMeter := map[string]client.Comparison{}
	for _, c := range s.Domains[0].Comparisons {
		byMeter[c.Meter] = c
	}
	return byMeter
}

func TestLabCrosscheck(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	linux, err := l.StartGuest(ctx, lab.GuestSpec{VCPUs: 2, Disks: []lab.Disk{{}, {Format: "qcow2"}, {Cache: "writeback"}}})
	must(t, err)
	kvm, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn", VCPUs: 2})
	must(t, err)
	r := newRecorder(t)
	core, logs := observer.New(zapcore.WarnLevel)
	a := startAgent(t, l, r, func(cfg *Config, deps *Deps) {
		cfg.CrosscheckInterval = 0
		// libvirt's ticks differ from the kernel's ns as soon as a thread has run.
		cfg.CrosscheckTolerance = map[string]Tolerance{"cpu.process": {}}
		deps.Log = zap.New(zapcore.NewTee(deps.Log.Core(), core))
		k, err := bpf.LoadKVM()
		must(t, err)
		deps.KVM = k
		deps.Hooks, _ = all.Hooks(deps.Log, false)
		t.Cleanup(func() {
			must(t, k.Close())
			for _, h := range deps.Hooks {
				if err := h.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	})
	r.await(sample.CPU, linux.UUID, time.Time{})
	r.await(sample.CPU, kvm.UUID, time.Time{})

	t.Run("both sides agree while the guests work", func(t *testing.T) {
		done := make(chan error, 1)
		go func() {
			_, err := linux.Exec(ctx, "cpusec 2")
			for _, command := range []string{"udp 20000 100", "write 4096 1000", "read 4096 1000"} {
				if err == nil {
					_, err = linux.Exec(ctx, command)
				}
			}
			if err == nil {
				err = linux.SendUDP(ctx, 20000, 200)
			}
			done <- err
		}()
		most := map[string]int64{}
		compared := map[string]int{}
		for working := true; working; {
			select {
			case err := <-done:
				must(t, err)
				working = false
			default:
			}
			for _, g := range []*lab.Guest{linux, kvm} {
				for meter, c := range checkNow(t, a, g) {
					switch {
					case strings.HasPrefix(meter, "disk."): // below
					case g == linux && meter == "kvm.exits":
						if c.Why != "the domain does not run under KVM" {
							t.Errorf("%s of %s: %s, %s", meter, g.Name, c.Verdict, c.Why)
						}
					case strings.Contains(c.Why, "does not answer within") || strings.Contains(c.Why, "busy"):
						// The guests work harder than this machine can; that is said, and the next check counts.
					case c.Figures == nil:
						t.Errorf("%s of %s: %s, %s", meter, g.Name, c.Verdict, c.Why)
					case c.Verdict != "agrees" && meter != "cpu.process":
						t.Errorf("%s of %s: %s: %+v", meter, g.Name, c.Verdict, *c.Figures)
					default:
						compared[g.Name]++
						if d := c.Figures.Difference; size(d) > size(most[meter]) {
							most[meter] = d
						}
					}
				}
			}
		}
		t.Logf("greatest differences: %v in comparisons: %v", most, compared)
		if compared[linux.Name] < 7 || compared[kvm.Name] < 8 {
			t.Errorf("comparisons: %v, want at least one check of each guest", compared)
		}
		last := checkNow(t, a, linux)
		for meter, least := range map[string]uint64{
			"network.outgoing.packets": 20000, "network.outgoing.bytes": 20000 * 142,
			"network.incoming.packets": 20000, "network.incoming.bytes": 20000 * 242, "cpu": 5e8, "cpu.process": 5e8,
		} {
			if f := last[meter].Figures; f == nil || f.Theirs < least || f.Ours < least {
				t.Errorf("%s: %+v, want at least %d on both sides", meter, f, least)
			}
		}
	})

	t.Run("what reaches the host's disk is what the guest asked for, and no other image is compared", func(t *testing.T) {
		if h := a.hooks.find("disk"); h == nil || !h.on {
			t.Skip("the disk hook cannot be attached on this kernel")
		}
		disks := func(device string) map[string]client.Comparison {
			time.Sleep(freshCheck)
			s, err := (client.Client{Path: a.cfg.Socket}).Crosscheck(ctx, linux.UUID, true)
			must(t, err)
			byMeter := map[string]client.Comparison{}
			for _, c := range s.Domains[0].Comparisons {
				if c.Device == device {
					byMeter[c.Meter] = c
				}
			}
			return byMeter
		}
		disks("vda")
		for _, command := range []string{"write 4096 3000 vda", "read 65536 500 vda", "write 4096 10 vdb", "write 4096 10 vdc"} {
			if out, err := linux.Exec(ctx, command); err != nil {
				t.Fatalf("%s: %v %s", command, err, out)
			}
		}
		for meter, c := range disks("vda") {
			least := map[string]uint64{
				"disk.host.device.read.requests": 500, "disk.host.device.read.bytes": 500 * 65536,
				"disk.host.device.write.requests": 3000, "disk.host.device.write.bytes": 3000 * 4096,
			}[meter]
			if c.Figures == nil || c.Verdict != "agrees" || c.Figures.Theirs < least || c.Figures.Since == nil {
				t.Errorf("%s: %s, %s %+v, want at least %d", meter, c.Verdict, c.Why, c.Figures, least)
				continue
			}
			t.Logf("%s: kvmeter %d, libvirt %d", meter, c.Figures.Ours, c.Figures.Theirs)
		}
		for device, why := range map[string]string{"vdb": "qcow2", "vdc": "page cache"} {
			for meter, c := range disks(device) {
				if c.Verdict != "not comparable" || !strings.Contains(c.Why, why) {
					t.Errorf("%s of %s: %s, %s", meter, device, c.Verdict, c.Why)
				}
			}
		}
	})

	t.Run("what is beyond the tolerance is told once", func(t *testing.T) {
		for range 20 {
			c := checkNow(t, a, kvm)["cpu.process"]
			if c.Verdict == "differs" {
				break
			}
		}
		if n := logs.FilterMessageSnippet("libvirt counts otherwise").FilterField(zap.String("domain", kvm.UUID)).Len(); n < 1 {
			t.Errorf("%d warnings, want one", n)
		}
		if v := value(t, a.metrics.differs.WithLabelValues("cpu.process")); v < 1 {
			t.Errorf("%v domains differ by the metric", v)
		}
		if s := r.await(sample.CheckCPUProcess.Verdict, kvm.UUID, time.Time{}); s.Volume.Bits > sample.Differs {
			t.Errorf("verdict %s", s.Volume)
		}
	})

	t.Run("a QEMU that hangs costs its own check", func(t *testing.T) {
		must(t, syscall.Kill(kvm.PID(), syscall.SIGSTOP))
		defer func() { must(t, syscall.Kill(kvm.PID(), syscall.SIGCONT)) }()
		for range 3 {
			start := time.Now()
			for meter, c := range checkNow(t, a, kvm) {
				if c.Verdict != "not comparable" {
					t.Errorf("%s of a QEMU that hangs: %+v", meter, c)
				}
			}
			if took := time.Since(start); took > a.cfg.LibvirtTimeout+2*freshCheck {
				t.Errorf("the check took %s", took)
			}
			if c := checkNow(t, a, linux)["cpu"]; c.Verdict != "agrees" {
				t.Errorf("cpu of the other: %+v", c)
			}
			r.await(sample.CPU, kvm.UUID, time.Now())
		}
	})

	t.Run("and is checked again when it goes on", func(t *testing.T) {
		for i := 0; ; i++ {
			c := checkNow(t, a, kvm)["cpu"]
			if c.Verdict == "agrees" {
				break
			}
			if i == 10 {
				t.Fatalf("cpu: %+v", c)
			}
		}
	})

	t.Run("a libvirtd that is gone costs the checks", func(t *testing.T) {
		must(t, l.KillLibvirt(ctx))
		for meter, c := range checkNow(t, a, linux) {
			if c.Verdict != "not comparable" {
				t.Errorf("%s without libvirt: %+v", meter, c)
			}
		}
		r.await(sample.CPU, linux.UUID, time.Now())
	})
}
