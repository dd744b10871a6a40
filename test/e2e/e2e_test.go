//go:build lab

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestWholePath is the promise of the project in one test: what a guest does
// is what the API says it did, exactly, whatever dies on the way.
func TestWholePath(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := lab.Start(t, lab.Options{})
	check(t, l.StartLibvirt(ctx))
	rabbit, err := l.RabbitMQ(ctx)
	check(t, err)
	guest, err := l.StartGuest(ctx, lab.GuestSpec{Name: "web1", Project: "shop"})
	check(t, err)

	c := startCloud(t, ctx, l, rabbit)
	c.waitForGuest(guest)

	check(t, guest.Pause(ctx))
	first := c.settled(guest)
	cpuFirst := c.cpuOfPausedGuest(guest)
	check(t, guest.Resume(ctx))

	kills := []func(){
		func() { c.agent.kill9(); c.agent.start() },
		func() { c.notifier.kill9(); c.notifier.start() },
		func() { c.central.kill9(); c.central.start() },
		func() { check(t, rabbit.Kill9(ctx)); check(t, rabbit.Start(ctx)) },
	}
	rand.Shuffle(len(kills), func(i, j int) { kills[i], kills[j] = kills[j], kills[i] })
	work := []func() error{
		func() error { return command(ctx, guest, "write 65536 512") },
		func() error { return command(ctx, guest, "read 4096 1000") },
		func() error { return errors.Join(command(ctx, guest, "flush"), command(ctx, guest, "udp 2000 100")) },
		func() error { return errors.Join(guest.SendUDP(ctx, 2000, 58), command(ctx, guest, "cpusec 5")) },
	}
	for i, do := range work {
		done := make(chan error, 1)
		go func() { done <- do() }()
		kills[i]()
		check(t, <-done)
		c.settled(guest) // all of them work again
	}

	check(t, guest.Pause(ctx))
	last := c.settled(guest)
	cpuLast := c.cpuOfPausedGuest(guest)

	for meter, want := range map[string]uint64{
		"disk.device.write.requests": 512,
		"disk.device.write.bytes":    512 * 65536,
		"disk.device.read.requests":  1000,
		"disk.device.read.bytes":     1000 * 4096,
		"disk.device.flush.requests": 1,
		"network.outgoing.packets":   2000,
		"network.outgoing.bytes":     2000 * 142,
		"network.incoming.packets":   2000,
		"network.incoming.bytes":     2000 * 100,
	} {
		if got := last[meter] - first[meter]; got != want {
			t.Errorf("%s grew by %d, the guest did %d", meter, got, want)
		}
	}
	// The guest's five seconds are less of the host's where others compete for
	// its CPUs; what must be equal was compared with the kernel above.
	if got := time.Duration(cpuLast - cpuFirst); got < time.Second {
		t.Errorf("cpu.process grew by %s only", got)
	}
	var classes uint64
	for _, m := range []string{"cpu", "cpu.emulator", "cpu.iothread", "cpu.worker", "cpu.vhost", "cpu.exited"} {
		classes += last[m]
	}
	if classes != last["cpu.process"] {
		t.Errorf("the classes add up to %d ns, the process used %d ns", classes, last["cpu.process"])
	}

	c.agent.end()
	c.compareWithWitness()
	c.compareTools(guest)
}

func command(ctx context.Context, g *lab.Guest, cmd string) error {
	_, err := g.Exec(ctx, cmd)
	return err
}

// waitForGuest returns once the API has samples of the guest by every collector.
func (c *cloud) waitForGuest(g *lab.Guest) {
	c.t.Helper()
	c.eventually("samples of "+g.Name, func() error {
		v := c.newest(g, 0)
		for _, m := range []string{"cpu", "cpu.process", "network.incoming.bytes", "disk.device.read.bytes"} {
			if _, ok := v[m]; !ok {
				return fmt.Errorf("no sample of %s, only %v", m, v)
			}
		}
		return nil
	})
}

// settled returns the volumes that the API has of the paused guest, from polls
// that began after now.
func (c *cloud) settled(g *lab.Guest) map[string]uint64 {
	c.t.Helper()
	since := time.Now()
	var v map[string]uint64
	c.eventually("settled samples", func() error {
		v = c.newest(g, since.UnixMicro())
		for _, m := range []string{"cpu", "cpu.process", "network.incoming.bytes", "network.outgoing.packets", "disk.device.read.bytes", "disk.device.flush.requests"} {
			if _, ok := v[m]; !ok {
				return fmt.Errorf("%s has no sample since the guest was paused", m)
			}
		}
		return nil
	})
	return v
}

// cpuOfPausedGuest checks cpu.process of the guest's stopped process against
// the kernel's clock of it, which it must equal to the nanosecond, and libvirt's
// cpu.time, and returns it.
func (c *cloud) cpuOfPausedGuest(g *lab.Guest) uint64 {
	c.t.Helper()
	before, err := bpf.ProcessCPUClock(g.PID())
	check(c.t, err)
	libvirt := c.libvirtCPU(g)
	after, err := bpf.ProcessCPUClock(g.PID())
	check(c.t, err)
	if r := c.libvirtResolution; libvirt+r < before || libvirt > after+r {
		c.t.Errorf("libvirt's cpu.time %d is not between the process's clock before (%d) and after (%d), to %d ns", libvirt, before, after, r)
	}

	// A poll that met a running thread adds the slice it is in, which is some
	// µs off. If that was ahead, the counter holds until the process has caught
	// up, so a difference must vanish once it has run a little more.
	const tries = 5
	for try := 1; ; try++ {
		got, want := c.cpuOfStoppedProcess(g)
		if got == want {
			return got
		}
		c.t.Logf("cpu.process of the stopped process is %d, the kernel's clock says %d", got, want)
		if got < want || try == tries {
			c.t.Fatalf("cpu.process of the stopped process is %d ns off the kernel's clock", int64(got-want))
		}
		time.Sleep(2 * time.Second)
	}
}

// cpuOfStoppedProcess returns cpu.process of a poll while the guest's process
// is stopped, and the kernel's clock of the process.
func (c *cloud) cpuOfStoppedProcess(g *lab.Guest) (got, want uint64) {
	c.t.Helper()
	resume := stop(c.t, g.PID())
	defer resume()
	want, err := bpf.ProcessCPUClock(g.PID())
	check(c.t, err)
	since := time.Now().UnixMicro()
	c.eventually("cpu.process of the stopped process", func() error {
		var ok bool
		if got, ok = c.newest(g, since)["cpu.process"]; !ok {
			return errors.New("no sample yet")
		}
		return nil
	})
	return got, want
}

// newest returns the guest's newest volumes by meter, none older than since
// (µs); disks and NICs are the first ones.
func (c *cloud) newest(g *lab.Guest, since int64) map[string]uint64 {
	c.t.Helper()
	v := map[string]uint64{}
	from := time.UnixMicro(since).UTC().Format("2006-01-02T15:04:05.000000")
	resources := []string{g.UUID, g.UUID + "-vda", fmt.Sprintf("%s-%s-%s", g.Name, g.UUID, g.NICs()[0].Tap)}
	for _, r := range resources {
		var samples []apiSample
		if err := c.get("/v2/samples?limit=100&q.field=resource_id&q.value="+r+"&q.field=timestamp&q.value="+from+"&q.op=eq&q.op=gt", &samples); err != nil {
			continue
		}
		for _, s := range samples { // newest first
			if _, ok := v[s.Meter]; ok {
				continue
			}
			n, err := strconv.ParseUint(strings.TrimSuffix(s.Volume.String(), ".0"), 10, 64)
			if err == nil {
				v[s.Meter] = n
			}
		}
	}
	return v
}

// compareTools checks that the command line says what the API does.
func (c *cloud) compareTools(g *lab.Guest) {
	c.t.Helper()
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{"meter-list", "-q", "resource=" + g.UUID}, []string{"| Name", "| cpu ", "| cumulative", "| ns "}},
		{[]string{"resource-list"}, []string{"| Resource ID", g.UUID, g.UUID + "-vda"}},
		{[]string{"resource-show", g.UUID}, []string{"| Property", "web1"}},
		{[]string{"statistics", "-m", "cpu", "-q", "resource=" + g.UUID}, []string{"| Period", "| Max", "| Count"}},
		{[]string{"sample-list", "-m", "cpu.process", "-l", "3", "-f", "csv"}, []string{"Resource ID,Name,Type,Volume,Unit,Timestamp", g.UUID + ",cpu.process,cumulative,"}},
	} {
		out := c.tool(tc.args...)
		for _, w := range tc.want {
			if !strings.Contains(out, w) {
				c.t.Errorf("kvmeter %s lacks %q:\n%s", strings.Join(tc.args, " "), w, out)
			}
		}
	}
}

// TestDryRun collects once, without broker or configuration.
func TestDryRun(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	check(t, l.StartLibvirt(ctx))
	g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn"})
	check(t, err)
	conf := filepath.Join(t.TempDir(), "agent.yaml")
	check(t, os.WriteFile(conf, fmt.Appendf(nil, "libvirt: [%s]\n", l.ReadOnlySocket()), 0o600))
	for _, format := range []string{"table", "json"} {
		out := output(t, binary(t, "kvmeter-agent"), "--dry-run", "-f", format, "--config", conf)
		for _, want := range []string{g.UUID, "cpu.process", "network.incoming.bytes", "disk.device.read.requests"} {
			if !strings.Contains(out, want) {
				t.Errorf("--dry-run -f %s lacks %q:\n%s", format, want, out)
			}
		}
	}
}
