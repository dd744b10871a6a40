//go:build lab

package agent

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestLabDomainsThatComeAndGo starts and destroys domains under libvirt as fast as
// it can, and beside them 20 a second without it, most of which live shorter than
// the interval. Each is accounted to its end, those of libvirt with their owner.
func TestLabDomainsThatComeAndGo(t *testing.T) {
	const interval = 3 * time.Second
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	stays, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "pulse"})
	must(t, err)
	r := newRecorder(t)
	a := startAgent(t, l, r, func(cfg *Config, deps *Deps) {
		cfg.Interval, cfg.Polling, cfg.CrosscheckInterval, cfg.LibvirtTimeout = interval, "", 0, DefaultConfig().LibvirtTimeout
		life, err := bpf.OpenLife(bpf.LifeOptions{})
		must(t, err)
		deps.Life = life
		t.Cleanup(func() { must(t, life.Close()) })
	})
	r.await(sample.CPU, stays.UUID, time.Time{})
	machine := lateness(t)

	const ofLibvirt, others, perSecond = 20, 200, 20
	guests := make([]*lab.Guest, ofLibvirt)
	h := newHost(t)
	began := time.Now()
	var domains, processes errgroup.Group
	domains.SetLimit(3)
	processes.Go(func() error {
		for n := range others {
			id, name, life := guestUUID(n), fmt.Sprint("guest ", n), 50*time.Millisecond+rand.N(400*time.Millisecond)
			processes.Go(func() error { return h.run(id, h.guest(id, name, life)) })
			time.Sleep(time.Second / perSecond)
		}
		return nil
	})
	for n := range guests {
		domains.Go(func() (err error) {
			if guests[n], err = l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn", Name: fmt.Sprint("short ", n)}); err != nil {
				return err
			}
			time.Sleep(rand.N(700 * time.Millisecond))
			return guests[n].Destroy(ctx)
		})
	}
	must(t, domains.Wait())
	t.Logf("%d domains of libvirt within %s", ofLibvirt, time.Since(began))
	must(t, processes.Wait())

	l2 := &lifeAgent{Agent: a, r: r}
	l2.awaitEnds(h)
	h.check(r)
	var finals map[string]map[string]sample.Sample
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		finals = r.finals(t)
		if !slices.ContainsFunc(guests, func(g *lab.Guest) bool { return finals[g.UUID] == nil }) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("not all domains of libvirt are accounted")
		}
	}
	r.mu.Lock()
	unknown := func(g *lab.Guest) bool { // libvirt was too slow to tell before it forgot the domain
		return slices.ContainsFunc(r.gaps, func(gap sample.Gap) bool { return gap.Resource == g.UUID && gap.Reason == endedUnknown })
	}
	told := slices.DeleteFunc(slices.Clone(guests), unknown)
	r.mu.Unlock()
	t.Logf("of %d domains of libvirt, %d are known", len(guests), len(told))
	if len(told) < len(guests)/2 {
		t.Errorf("of %d domains of libvirt, only %d are known", len(guests), len(told))
	}
	for _, g := range told {
		last := finals[g.UUID][sample.CPUProcess.Name]
		if last.Project == "" || !strings.Contains(string(last.Metadata), `"display_name":"`+g.Spec.Name+`"`) || last.Volume.Bits == 0 {
			t.Errorf("at the end of %q: %s ns of project %q, %s", g.Spec.Name, last.Volume, last.Project, last.Metadata)
		}
	}
	again := r.await(sample.CPU, stays.UUID, time.Now())
	t.Logf("the one that stays has %s ns", again.Volume)
	r.mu.Lock()
	defer r.mu.Unlock()
	// A poll that is late may leave out one.
	allowed, most := 2*interval+machine(), time.Duration(0)
	var before arrived
	for _, s := range r.all {
		if s.Name != sample.CPU.Name || s.Resource != stays.UUID {
			continue
		}
		if before.Time != 0 {
			most = max(most, time.Duration(s.Time-before.Time)*time.Microsecond)
		}
		before = s
	}
	t.Logf("the domain that stays was metered every %s at least, the machine was at most %s late", most, machine())
	if most > allowed {
		t.Errorf("the domain that stays was not metered for %s, at most %s are allowed", most, allowed)
	}
	for _, g := range told {
		nic := g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap
		for _, resource := range []string{nic, g.UUID + "-hda"} {
			if !slices.ContainsFunc(r.all, func(s arrived) bool { return s.Resource == resource }) &&
				!slices.ContainsFunc(r.gaps, func(g sample.Gap) bool { return g.Resource == resource }) {
				t.Errorf("there is neither a sample nor a gap of %s", resource)
			}
		}
	}
}
