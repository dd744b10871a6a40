//go:build lab

package agent

import (
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// onHost makes an agent one of the lab's host, which sees none of another's
// processes and network.
func onHost(t *testing.T, l *lab.Lab, node string) func(*Config, *Deps) {
	return func(cfg *Config, deps *Deps) {
		pid, err := l.LibvirtPID()
		must(t, err)
		namespace := func(pid int) string {
			ns, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
			return ns
		}
		host := namespace(pid)
		cfg.Node, deps.ours = node, func(pid int) bool { return namespace(pid) == host }
		var links *rtnl.Conn
		must(t, l.Inside(func() (err error) {
			links, err = rtnl.Open()
			return err
		}))
		deps.Links = links
		life, err := bpf.OpenLife(bpf.LifeOptions{})
		must(t, err)
		deps.Life = life
		t.Cleanup(func() {
			must(t, links.Close())
			must(t, life.Close())
		})
	}
}

// sumOf is what all incarnations of a resource have counted.
func sumOf(m *sample.Meter, resource string, hosts ...*recorder) (sum uint64) {
	most := map[sample.Incarnation]uint64{}
	for _, r := range hosts {
		r.mu.Lock()
		for _, s := range r.all {
			if s.Name == m.Name && s.Resource == resource {
				most[s.Incarnation] = max(most[s.Incarnation], s.Volume.Bits)
			}
		}
		r.mu.Unlock()
	}
	for v := range maps.Values(most) {
		sum += v
	}
	return sum
}

// guestCounts is what a Linux guest itself has counted of its disk and its NIC.
type guestCounts struct{ reads, readBytes, writes, writeBytes, in, inBytes, out, outBytes uint64 }

func countsOf(t *testing.T, g *lab.Guest) (c guestCounts) {
	t.Helper()
	out, err := g.Exec(t.Context(), "stat")
	must(t, err)
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		var skip uint64
		var name string
		switch {
		case strings.Contains(line, " vda "):
			_, err = fmt.Sscan(line, &skip, &skip, &name, &c.reads, &skip, &c.readBytes, &skip, &c.writes, &skip, &c.writeBytes)
			c.readBytes, c.writeBytes = 512*c.readBytes, 512*c.writeBytes
		case strings.HasPrefix(line, "eth0:"):
			_, err = fmt.Sscan(strings.Replace(line, ":", ": ", 1), &name, &c.inBytes, &c.in, &skip, &skip, &skip, &skip, &skip, &skip, &c.outBytes, &c.out)
		}
		must(t, err)
	}
	return c
}

// settled returns the guest's counts once nothing in it goes on.
func settled(t *testing.T, g *lab.Guest) guestCounts {
	t.Helper()
	last := countsOf(t, g)
	for range 60 {
		time.Sleep(3 * time.Second) // it may work in bursts, one a second
		now := countsOf(t, g)
		if now == last {
			return now
		}
		last = now
	}
	t.Fatal("the guest goes on and on")
	return last
}

// lastClock follows the CPU clock of a process until its end, and returns what it
// said last.
func lastClock(pid int) func() uint64 {
	last := make(chan uint64, 1)
	go func() {
		var ns uint64
		for {
			now, err := bpf.ProcessCPUClock(pid)
			if err != nil {
				last <- ns
				return
			}
			ns = now
			time.Sleep(time.Millisecond)
		}
	}()
	return func() uint64 { return <-last }
}

// ledger compares what agents count of a Linux guest with what the guest counts
// itself.
type ledger struct {
	t         *testing.T
	g         *lab.Guest
	hosts     []*recorder
	disk, nic string
	busy      bool        // the guest does something by itself
	guest     guestCounts // when it was balanced last
	ours      []uint64
}

var ledgerMeters = []struct {
	meter *sample.Meter
	nic   bool
	guest func(guestCounts) uint64
}{
	{sample.DiskReadRequests, false, func(c guestCounts) uint64 { return c.reads }},
	{sample.DiskReadBytes, false, func(c guestCounts) uint64 { return c.readBytes }},
	{sample.DiskWriteRequests, false, func(c guestCounts) uint64 { return c.writes }},
	{sample.DiskWriteBytes, false, func(c guestCounts) uint64 { return c.writeBytes }},
	{sample.NetInPackets, true, func(c guestCounts) uint64 { return c.in }},
	{sample.NetInBytes, true, func(c guestCounts) uint64 { return c.inBytes }},
	{sample.NetOutPackets, true, func(c guestCounts) uint64 { return c.out }},
	{sample.NetOutBytes, true, func(c guestCounts) uint64 { return c.outBytes }},
}

func newLedger(t *testing.T, g *lab.Guest, hosts ...*recorder) *ledger {
	l := &ledger{t: t, g: g, hosts: hosts, disk: g.UUID + "-vda", nic: g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap}
	l.guest, l.ours = l.read(0)
	return l
}

// read returns what the guest has counted, and what the agents have once the one
// of the host where the guest is knows all of that.
func (l *ledger) read(host int) (guest guestCounts, ours []uint64) {
	l.t.Helper()
	if guest = countsOf(l.t, l.g); l.busy {
		guest, l.busy = settled(l.t, l.g), false
	}
	at := time.Now()
	for _, m := range ledgerMeters {
		resource := l.disk
		if m.nic {
			resource = l.nic
		}
		l.hosts[host].await(m.meter, resource, at)
		ours = append(ours, sumOf(m.meter, resource, l.hosts...))
	}
	return guest, ours
}

// gap returns a gap that was recorded of the resource when its domain ended.
func (l *ledger) gap(resource string) *sample.Gap {
	for _, h := range l.hosts {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, g := range h.gaps {
			if g.Resource == resource && strings.Contains(g.Reason, "not counted") {
				return &g
			}
		}
	}
	return nil
}

// balance reports whether what was counted since the last time is the same on
// both sides. The agents may have less only where they have recorded a gap.
// announced is how often QEMU told the switches meanwhile where the guest is.
func (l *ledger) balance(host, announced int) (exact bool) {
	l.t.Helper()
	guest, ours := l.read(host)
	exact = true
	for i, m := range ledgerMeters {
		got, want := ours[i]-l.ours[i], m.guest(guest)-m.guest(l.guest)
		resource := l.disk
		if m.nic {
			resource = l.nic
		}
		switch m.meter {
		case sample.NetOutPackets:
			want += uint64(announced) * announcements
		case sample.NetOutBytes:
			want += uint64(announced) * announcements * 60
		}
		if got == want {
			continue
		}
		exact = false
		if gap := l.gap(resource); got > want || gap == nil {
			l.t.Errorf("%s of %s grew by %d, the guest counted %d", m.meter.Name, resource, got, want)
		} else {
			l.t.Logf("%s of %s grew by %d of %d; there is a gap: %+v", m.meter.Name, resource, got, want, gap)
		}
	}
	l.guest, l.ours = guest, ours
	return exact
}

// work has the guest do something of all kinds, and then go on for some seconds.
func (l *ledger) work() {
	l.t.Helper()
	for _, command := range []string{"write 65536 100", "read 4096 300", "udp 500 100", "cpusec 0.5"} {
		_, err := l.g.Exec(l.t.Context(), command)
		must(l.t, err)
	}
	must(l.t, l.g.SendUDP(l.t.Context(), 400, 200))
	_, err := l.g.Exec(l.t.Context(), "bg mix 20 400 400 8")
	must(l.t, err)
	l.busy = true
}

// TestLabMigration has a guest migrate between two hosts, and back, while it
// works. What both agents count adds up to what the guest has done by its own
// account.
func TestLabMigration(t *testing.T) {
	ctx := t.Context()
	labs := []*lab.Lab{lab.Start(t, lab.Options{Apart: true}), lab.Start(t, lab.Options{Apart: true})}
	hosts := []*recorder{newRecorder(t), newRecorder(t)}
	for i, l := range labs {
		must(t, l.StartLibvirt(ctx))
		startAgent(t, l, hosts[i], onHost(t, l, []string{"one", "other"}[i]), func(cfg *Config, _ *Deps) { cfg.CrosscheckInterval = 0 })
	}
	stays, err := labs[0].StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM})
	must(t, err)
	g, err := labs[0].StartGuest(ctx, lab.GuestSpec{})
	must(t, err)
	l := newLedger(t, g, hosts...)
	ended := uint64(0) // by the clocks of the processes that the guest has left
	exact := 0
	for n := 0; n < 2 || n < 6 && exact == 0; n++ { // libvirt may be too slow to say that the guest goes
		from, to := n%2, (n+1)%2
		l.work()
		last := hosts[from].await(sample.CPUProcess, g.UUID, time.Now())
		clock := lastClock(g.PID())
		began := time.Now()
		must(t, g.Migrate(ctx, labs[to]))
		t.Logf("migrated within %s", time.Since(began))
		first := hosts[to].await(sample.CPUProcess, g.UUID, time.Now())
		if first.Incarnation == last.Incarnation {
			t.Errorf("both hosts have incarnation %s", first.Incarnation)
		}
		if first.Project != last.Project || first.Project == "" {
			t.Errorf("its project is %q, was %q", first.Project, last.Project)
		}
		ended += clock()
		must(t, g.SendUDP(ctx, 300, 200))
		if l.balance(to, 1) {
			exact++
		}
		before, err := bpf.ProcessCPUClock(g.PID())
		must(t, err)
		hosts[to].await(sample.CPUProcess, g.UUID, time.Now())
		got := sumOf(sample.CPUProcess, g.UUID, hosts...)
		after, err := bpf.ProcessCPUClock(g.PID())
		must(t, err)
		if least, most := ended+before, ended+after+uint64(n+1)*exitCPU; got < least || got > most {
			t.Errorf("migration %d: cpu.process is %d ns, the clocks of the processes say %d to %d", n+1, got, least, most)
		}
	}
	if exact == 0 {
		t.Error("at no migration was all counted")
	}
	for _, resource := range []string{l.nic, g.UUID} {
		if gap := l.gap(resource); gap != nil {
			t.Errorf("gap: %+v", gap)
		}
	}
	hosts[1].mu.Lock()
	defer hosts[1].mu.Unlock()
	for _, s := range hosts[1].all {
		if strings.Contains(s.Resource, stays.UUID) {
			t.Fatalf("the other host meters a guest that never was there: %+v", s)
		}
	}
}

// announcements are the frames (RARP, of 60 bytes) that QEMU sends for each NIC of
// a guest that has come to a host.
const announcements = 5

// exitCPU is more than a QEMU uses after its clock was read last, most of it to
// free its memory.
const exitCPU = 300e6
