//go:build lab

package agent

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestLabLibvirts has several libvirts on a host, as in pods, one of which comes and
// goes while the agent runs. Each domain has what its own libvirt tells, and a
// libvirt that hangs or is away costs the other's domains nothing.
func TestLabLibvirts(t *testing.T) {
	ctx := t.Context()
	t.Setenv("TMPDIR", t.TempDir()) // where the labs are
	start := func(opts lab.Options) *lab.Lab {
		l := lab.Start(t, opts)
		must(t, l.StartLibvirt(ctx))
		return l
	}
	stays := start(lab.Options{})
	pid, err := stays.LibvirtPID()
	must(t, err)
	r := newRecorder(t)
	a := startAgent(t, stays, r, func(cfg *Config, _ *Deps) {
		cfg.Libvirt = Sockets{ // of the first both name the same
			fmt.Sprintf("/proc/[0-9]%s/root/run/libvirt/libvirt-sock-ro", fmt.Sprint(pid)[1:]),
			filepath.Join(filepath.Dir(stays.Dir()), "*/run/libvirt-sock-ro"),
		}
	})
	guest := func(l *lab.Lab) *lab.Guest {
		g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM})
		must(t, err)
		first := r.await(sample.CPU, g.UUID, time.Time{})
		if first.Project == "" || !strings.Contains(string(first.Metadata), `"display_name"`) {
			t.Errorf("the first sample does not say whose guest it is: %+v", first)
		}
		return g
	}
	whole := func(g *lab.Guest) {
		t.Helper()
		now := time.Now()
		for m, resource := range map[*sample.Meter]string{
			sample.CPU: g.UUID, sample.CheckCPUProcess.Difference: g.UUID, sample.DiskReadRequests: g.UUID + "-hda",
			sample.NetInPackets: g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap,
		} {
			r.await(m, resource, now)
		}
	}
	one := guest(stays)
	whole(one)

	comes := start(lab.Options{Apart: true})
	other := guest(comes)
	whole(other)
	whole(one)

	hangs, err := comes.LibvirtPID()
	must(t, err)
	must(t, syscall.Kill(hangs, syscall.SIGSTOP))
	now := time.Now()
	r.awaitGapAfter(other.UUID+"-hda", "", now)
	whole(one)
	r.await(sample.CPU, other.UUID, now)
	must(t, syscall.Kill(hangs, syscall.SIGCONT))
	whole(other)

	must(t, comes.KillLibvirt(ctx))
	told := func() bool {
		return slices.ContainsFunc(a.Notes(), func(n string) bool { return strings.HasPrefix(n, "a libvirt does not answer") })
	}
	for deadline := time.Now().Add(20 * time.Second); !told(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nobody says that a libvirt is away: %q", a.Notes())
		}
	}
	whole(one)
	now = time.Now()
	if s := r.await(sample.CPU, other.UUID, now); s.Project == "" {
		t.Error("whose guest it is was forgotten with its libvirt")
	}
	must(t, comes.StartLibvirt(ctx))
	whole(other)
	must(t, other.Destroy(ctx))
	whole(one)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.gaps {
		if strings.Contains(g.Resource, one.UUID) && strings.Contains(g.Reason, "closed") {
			t.Errorf("a gap of the domain whose libvirt was there all the time: %+v", g)
		}
	}
}
