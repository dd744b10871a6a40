//go:build lab

package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// Procedures of libvirt's remote protocol that list domains.
const (
	listAllDomains = 273
	allDomainStats = 344
)

func TestLabLibvirtIsAskedLittle(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	var guests []*lab.Guest
	for range 2 {
		g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "pulse"})
		must(t, err)
		guests = append(guests, g)
	}
	p := l.Proxy(t)
	r := newRecorder(t)
	var named []string
	for _, m := range sample.Catalogue {
		if !m.QEMU && m.Check == nil {
			named = append(named, m.Name)
		}
	}
	polling := filepath.Join(t.TempDir(), "polling.yaml")
	must(t, os.WriteFile(polling, []byte("sources: [{name: all, interval: 200ms, meters: ["+strings.Join(named, ", ")+"]}]"), 0o644))
	began := time.Now()
	startAgent(t, l, r, func(cfg *Config, _ *Deps) {
		cfg.Libvirt, cfg.Polling, cfg.CrosscheckInterval, cfg.QEMUInterval = Sockets{p.Socket}, polling, 0, time.Hour
	})
	polls := func(n int) {
		t.Helper()
		for range n {
			at := time.Now()
			for _, g := range guests {
				r.await(sample.CPU, g.UUID, at)
				r.await(sample.PowerState, g.UUID, at)
				r.await(sample.MemoryResident, g.UUID, at)
			}
		}
	}
	polls(2)
	if n := len(p.Calls()); n == 0 {
		t.Fatal("the calls of the start were not seen")
	}

	t.Run("no call in steady state", func(t *testing.T) {
		polls(10)
		calls := p.Calls()
		minutes := int(time.Since(began) / syncMinute)
		for _, list := range []uint32{listAllDomains, allDomainStats} { // once a minute, in case an event was lost
			if calls[list] > minutes {
				t.Errorf("domains were listed %d times in %s", calls[list], time.Since(began))
			}
			delete(calls, list)
		}
		if len(calls) != 0 {
			t.Errorf("calls by procedure: %v", calls)
		}
	})

	t.Run("a change is known by its event", func(t *testing.T) {
		must(t, guests[0].Pause(ctx))
		awaitThat(t, r, sample.PowerState, guests[0], func(s sample.Sample) bool {
			return s.Volume.Bits == 3 && strings.Contains(string(s.Metadata), `"status":"paused"`)
		})
		must(t, guests[0].Resume(ctx))
	})

	t.Run("a domain that is switched off keeps the sizes of its flavor", func(t *testing.T) {
		must(t, guests[1].PowerOff(ctx))
		awaitThat(t, r, sample.DiskRootSize, guests[1], func(s sample.Sample) bool {
			return strings.Contains(string(s.Metadata), `"state":"shutdown"`)
		})
	})
}

// awaitThat waits for a sample that is as it should be.
func awaitThat(t *testing.T, r *recorder, m *sample.Meter, g *lab.Guest, good func(sample.Sample) bool) {
	t.Helper()
	at := time.Now()
	for deadline := at.Add(30 * time.Second); ; {
		s := r.await(m, g.UUID, at)
		if good(s.Sample) {
			return
		}
		if at = time.UnixMicro(s.Time); at.After(deadline) {
			t.Fatalf("30 s later it is %+v, %s", s.Sample, s.Metadata)
		}
	}
}

// syncMinute is how often libvirt's domains are listed.
const syncMinute = time.Minute

func TestLabLibvirtThatAnswersLate(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM})
	must(t, err)
	p := l.Proxy(t)
	r := newRecorder(t)
	startAgent(t, l, r, func(cfg *Config, _ *Deps) {
		cfg.Libvirt, cfg.LibvirtTimeout, cfg.CrosscheckInterval = Sockets{p.Socket}, time.Second, 0
	})
	old := r.await(sample.DiskReadBytes, g.UUID+"-hda", time.Time{})
	p.Hold(8 * time.Second) // as 40 s are to the usual timeout
	r.awaitGap("*", "libvirt does not answer")
	for range 5 {
		s := r.await(sample.CPU, g.UUID, time.Now())
		if s.Project != old.Project || s.Project == "" {
			t.Errorf("project %q, was %q", s.Project, old.Project)
		}
	}
	p.Hold(0)
	again := r.await(sample.DiskReadBytes, g.UUID+"-hda", time.Now())
	if again.Incarnation != old.Incarnation {
		t.Error("the disk has another incarnation")
	}
}

// TestLabLibvirtThatHangsUp ends the connections in the midst of an answer, again and
// again: what libvirt knows comes back, and all else goes on.
func TestLabLibvirtThatHangsUp(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM})
	must(t, err)
	p := l.Proxy(t)
	r := newRecorder(t)
	startAgent(t, l, r, func(cfg *Config, _ *Deps) { cfg.Libvirt, cfg.CrosscheckInterval = Sockets{p.Socket}, 0 })
	old := r.await(sample.DiskReadBytes, g.UUID+"-hda", time.Time{})
	for range 3 {
		cut := time.Now()
		p.Cut(true)
		must(t, g.Pause(ctx)) // libvirt tells of it
		must(t, g.Resume(ctx))
		r.awaitGapAfter("*", "libvirt", cut)
		if s := r.await(sample.CPU, g.UUID, time.Now()); s.Project != old.Project || s.Project == "" {
			t.Errorf("project %q, was %q", s.Project, old.Project)
		}
		p.Cut(false)
		if again := r.await(sample.DiskReadBytes, g.UUID+"-hda", time.Now()); again.Incarnation != old.Incarnation {
			t.Error("the disk has another incarnation")
		}
	}
}
