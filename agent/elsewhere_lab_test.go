//go:build lab

package agent

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/boot"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestLabLibvirtElsewhere meters guests of a libvirt that is not as it is usually
// installed: the agent needs its socket, and finds all else by itself.
func TestLabLibvirtElsewhere(t *testing.T) {
	if inVM() {
		t.Skip(boot.NoLab)
	}
	for name, opts := range map[string]lab.Options{
		"in a container, with PIDs, mounts and paths of images of its own": {Container: true},
		"in a container that has a network of its own, too":                {Container: true, Apart: true},
		"modular": {Daemon: "virtqemud"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(opts.Daemon); opts.Daemon != "" && err != nil {
				t.Skipf("%v: this libvirt is monolithic", err)
			}
			ctx := t.Context()
			l := lab.Start(t, opts)
			must(t, l.StartLibvirt(ctx))
			r := newRecorder(t)
			hooks, missing := all.Hooks(zap.NewNop(), false)
			if len(missing) > 0 {
				t.Fatalf("hooks: %v", missing)
			}
			t.Cleanup(func() { must(t, all.Close(hooks)) })
			startAgent(t, l, r, func(cfg *Config, deps *Deps) { deps.Hooks, cfg.FalloverInterval = hooks, time.Second })
			spec := lab.GuestSpec{}
			if opts.Container {
				spec.Edits = l.Contained()
			}
			g, err := l.StartGuest(ctx, spec)
			must(t, err)

			first := r.await(sample.CPU, g.UUID, time.Time{})
			if first.Project == "" || !strings.Contains(string(first.Metadata), `"display_name"`) {
				t.Errorf("it is not known whose guest it is: %+v", first)
			}
			nic, vda := g.Name+"-"+g.UUID+"-"+g.NICs()[0].Tap, g.UUID+"-vda"
			counters := map[*sample.Meter]struct {
				resource string
				want     uint64
			}{
				sample.NetOutPackets:               {nic, 200},
				sample.NetOutBytes:                 {nic, 200 * 142},
				sample.DiskWriteRequests:           {vda, 64},
				sample.DiskHostDeviceWriteBytes:    {vda, 64 * 65536},
				sample.DiskHostDeviceWriteRequests: {vda, 64},
				sample.NetOutSegments:              {nic, 200},
			}
			if opts.Apart { // no hook is on a tap that the host does not have
				delete(counters, sample.NetOutSegments)
			}
			read := func() map[*sample.Meter]arrived {
				at, all := time.Now(), map[*sample.Meter]arrived{}
				for m, c := range counters {
					all[m] = r.await(m, c.resource, at)
				}
				return all
			}
			if out, err := g.Exec(ctx, "write 4096 1"); err != nil { // hooks tell of what has happened only
				t.Fatalf("%v %s", err, out)
			}
			before := read()
			for _, command := range []string{"write 65536 64", "udp 200 100"} {
				if out, err := g.Exec(ctx, command); err != nil {
					t.Fatalf("%s: %v %s", command, err, out)
				}
			}
			after := read()
			for m, c := range counters {
				if got := after[m].Volume.Bits - before[m].Volume.Bits; got != c.want {
					t.Errorf("%s by %s: %d, want %d", m.Name, after[m].Origin, got, c.want)
				}
			}

			inner, err := bpf.ProcessCPUClock(g.PID())
			must(t, err)
			cpu := r.await(sample.CPUProcess, g.UUID, time.Now())
			outer, err := bpf.ProcessCPUClock(g.PID())
			must(t, err)
			if ours := cpu.Volume.Bits; ours < inner || ours > outer || cpu.Origin == sample.Libvirt {
				t.Errorf("cpu.process is %d ns by %s, the kernel's clock %d and %d", ours, cpu.Origin, inner, outer)
			}
			r.await(sample.MemoryResident, g.UUID, time.Time{})
			must(t, g.PowerOff(ctx))
			awaitThat(t, r, sample.DiskRootSize, g, func(s sample.Sample) bool { return strings.Contains(string(s.Metadata), `"state":"shutdown"`) })
		})
	}
}
