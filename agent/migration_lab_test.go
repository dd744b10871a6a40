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
	disk, nic := g.UUID+"-vda", g.Name+"-"+g.UUID+"-"+g.NICs()[0].Tap
	counters := []struct {
		meter    *sample.Meter
		resource string
		guest    func(guestCounts) uint64
	}{
		{sample.DiskReadRequests, disk, func(c guestCounts) uint64 { return c.reads }},
		{sample.DiskReadBytes, disk, func(c guestCounts) uint64 { return c.readBytes }},
		{sample.DiskWriteRequests, disk, func(c guestCounts) uint64 { return c.writes }},
		{sample.DiskWriteBytes, disk, func(c guestCounts) uint64 { return c.writeBytes }},
		{sample.NetInPackets, nic, func(c guestCounts) uint64 { return c.in }},
		{sample.NetInBytes, nic, func(c guestCounts) uint64 { return c.inBytes }},
		{sample.NetOutPackets, nic, func(c guestCounts) uint64 { return c.out }},
		{sample.NetOutBytes, nic, func(c guestCounts) uint64 { return c.outBytes }},
	}
	// quiet returns what the guest and the hosts have counted when both know all.
	quiet := func(host int) (guest guestCounts, ours []uint64) {
		guest = settled(t, g)
		at := time.Now()
		for _, c := range counters {
			hosts[host].await(c.meter, c.resource, at)
			ours = append(ours, sumOf(c.meter, c.resource, hosts...))
		}
		return guest, ours
	}
	guest0, ours0 := quiet(0)
	ended := uint64(0) // by the clocks of the processes that the guest has left
	for n, to := range []int{1, 0} {
		from := 1 - to
		for _, command := range []string{"write 65536 100", "read 4096 300", "udp 500 100", "cpusec 0.5"} {
			_, err := g.Exec(ctx, command)
			must(t, err)
		}
		must(t, g.SendUDP(ctx, 400, 200))
		_, err := g.Exec(ctx, "bg mix 20 400 400 12")
		must(t, err)
		last := hosts[from].await(sample.CPUProcess, g.UUID, time.Now())
		clock := lastClock(g.PID())
		began := time.Now()
		must(t, g.Migrate(ctx, labs[to]))
		t.Logf("migrated within %s", time.Since(began))
		at := time.Now()
		first := hosts[to].await(sample.CPUProcess, g.UUID, at)
		if first.Incarnation == last.Incarnation {
			t.Errorf("both hosts have incarnation %s", first.Incarnation)
		}
		if first.Project != last.Project || first.Project == "" {
			t.Errorf("its project is %q, was %q", first.Project, last.Project)
		}
		ended += clock()
		must(t, g.SendUDP(ctx, 300, 200))
		guest, ours := quiet(to)
		for i, c := range counters {
			got, want := ours[i]-ours0[i], c.guest(guest)-c.guest(guest0)
			switch c.meter { // QEMU tells the switches where the guest is now
			case sample.NetOutPackets:
				want += uint64(n+1) * announcements
			case sample.NetOutBytes:
				want += uint64(n+1) * announcements * 60
			}
			t.Logf("%s: %d of %d", c.meter.Name, got, want)
			if got != want {
				t.Errorf("migration %d: %s of %s is %d, the guest counted %d", n+1, c.meter.Name, c.resource, got, want)
			}
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
	for _, h := range hosts {
		for _, gap := range h.gaps {
			if (gap.Resource == disk || gap.Resource == nic || gap.Resource == g.UUID) && strings.Contains(gap.Reason, "not counted") {
				t.Errorf("gap: %+v", gap)
			}
		}
	}
	for _, s := range hosts[1].all {
		if strings.Contains(s.Resource, stays.UUID) {
			t.Fatalf("the other host meters a guest that never was there: %+v", s)
		}
	}
}

// announcements are the frames (RARP) that QEMU sends for each NIC of a guest that
// has come to a host.
const announcements = 5

// exitCPU is more than a QEMU uses after its clock was read last, most of it to
// free its memory.
const exitCPU = 300e6
