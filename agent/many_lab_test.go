//go:build lab

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// domainsEnv is how many domains TestLabManyDomains has.
const domainsEnv = "KVMETER_LAB_DOMAINS"

// startMany starts KVM guests, some at once.
func startMany(t *testing.T, l *lab.Lab, n int) []*lab.Guest {
	t.Helper()
	guests := make([]*lab.Guest, n)
	var group errgroup.Group
	group.SetLimit(4)
	for i := range guests {
		group.Go(func() (err error) {
			guests[i], err = l.StartGuest(t.Context(), lab.GuestSpec{Kind: lab.KVM})
			return err
		})
	}
	must(t, group.Wait())
	return guests
}

// lateness follows how late the machine itself wakes who sleeps.
func lateness(t *testing.T) (worst func() time.Duration) {
	var most atomic.Int64
	go func() {
		for t.Context().Err() == nil {
			at := time.Now()
			time.Sleep(10 * time.Millisecond)
			late := int64(time.Since(at) - 10*time.Millisecond)
			most.Store(max(most.Load(), late))
		}
	}()
	return func() time.Duration { return time.Duration(most.Load()) }
}

// TestLabManyDomains has many domains of which one hangs while libvirtd is ended and
// started again, and killed and started again. What needs no QEMU comes in time
// from all of them, what needs it comes from all others or is a gap.
func TestLabManyDomains(t *testing.T) {
	const interval = 4 * time.Second
	count := 20
	if s := os.Getenv(domainsEnv); s != "" {
		n, err := strconv.Atoi(s)
		must(t, err)
		count = n
	}
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	guests := startMany(t, l, count)
	stuck := guests[0]

	kernel := []*sample.Meter{sample.CPU, sample.CPUProcess, sample.CPUWait, sample.DiskHostReadBytes, sample.MemoryResident, sample.PowerState, sample.NetInBytes}
	disk := []*sample.Meter{sample.DiskReadBytes, sample.DiskWriteRequests}
	var names []string
	for _, m := range slices.Concat(kernel, disk) {
		names = append(names, m.Name)
	}
	polling := filepath.Join(t.TempDir(), "polling.yaml")
	must(t, os.WriteFile(polling, fmt.Appendf(nil, "sources: [{name: all, interval: %s, meters: [%s]}]", interval, strings.Join(names, ", ")), 0o644))
	r := newRecorder(t)
	startAgent(t, l, r, func(cfg *Config, _ *Deps) {
		cfg.Polling, cfg.CrosscheckInterval, cfg.LibvirtTimeout = polling, 0, DefaultConfig().LibvirtTimeout
	})
	for _, g := range guests {
		r.await(sample.CPU, g.UUID, time.Time{})
		r.await(sample.DiskReadBytes, g.UUID+"-hda", time.Time{})
	}
	machine := lateness(t)
	from := time.Now()
	intervals := func(n int) { time.Sleep(time.Duration(n) * interval) }
	intervals(1)
	must(t, syscall.Kill(stuck.PID(), syscall.SIGSTOP))
	defer func() { must(t, syscall.Kill(stuck.PID(), syscall.SIGCONT)) }()
	intervals(1)
	must(t, l.StopLibvirt(ctx))
	must(t, l.StartLibvirt(ctx))
	intervals(2)
	must(t, l.KillLibvirt(ctx))
	must(t, l.StartLibvirt(ctx))
	intervals(2)
	to := time.Now()
	for _, g := range guests { // the last ones
		r.await(sample.CPU, g.UUID, to)
	}

	allowed := interval*12/10 + machine()
	r.mu.Lock()
	defer r.mu.Unlock()
	times := map[string][]time.Time{} // by resource and meter
	for _, s := range r.all {
		times[s.Resource+" "+s.Name] = append(times[s.Resource+" "+s.Name], time.UnixMicro(s.Time))
	}
	// longest is how long there was no sample of the meter, gaps aside where they
	// may be.
	longest := func(m *sample.Meter, resource string, gaps bool) time.Duration {
		all := slices.Clone(times[resource+" "+m.Name])
		if gaps {
			for _, g := range r.gaps {
				if g.Resource == resource || g.Resource == "*" && g.Meter == m.Name {
					all = append(all, time.UnixMicro(g.From), time.UnixMicro(g.To))
				}
			}
		}
		all = slices.DeleteFunc(append(all, from, to), func(at time.Time) bool { return at.Before(from) || at.After(to) })
		slices.SortFunc(all, time.Time.Compare)
		var most time.Duration
		for i := range all[1:] {
			most = max(most, all[i+1].Sub(all[i]))
		}
		return most
	}
	var worst, worstDisk time.Duration
	for _, g := range guests {
		for _, m := range kernel {
			resource := g.UUID
			if m == sample.NetInBytes {
				resource = g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap
			}
			most := longest(m, resource, false)
			if worst = max(worst, most); most > allowed {
				t.Errorf("no %s of %s for %s", m.Name, resource, most)
			}
		}
		for _, m := range disk {
			if g == stuck { // its gap is recorded as long as it lasts, once a minute
				continue
			}
			most := longest(m, g.UUID+"-hda", true)
			if worstDisk = max(worstDisk, most); most > allowed {
				t.Errorf("neither %s of %s nor a gap for %s", m.Name, g.UUID, most)
			}
		}
	}
	if !slices.ContainsFunc(r.gaps, func(g sample.Gap) bool { return g.Resource == stuck.UUID+"-hda" }) {
		t.Error("nothing says that the disk of the domain that hangs is not metered")
	}
	t.Logf("%d domains: at most %.2f intervals of %s between two samples, %.2f of disks; the machine was at most %s late",
		count, worst.Seconds()/interval.Seconds(), interval, worstDisk.Seconds()/interval.Seconds(), machine())
}
