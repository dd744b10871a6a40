package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/test/lab"
)

// accuracy holds what contenders deliver against what guests did.
type accuracy struct {
	lives int
	life  time.Duration
	hang  time.Duration
}

func defaultAccuracy() *accuracy {
	return &accuracy{lives: 5, life: 3 * time.Second, hang: 40 * time.Second}
}

func (a *accuracy) flags(c *cobra.Command) {
	c.Flags().IntVar(&a.lives, "lives", a.lives, "guests that live shortly, one after the other")
	c.Flags().DurationVar(&a.life, "life", a.life, "how long each lives")
	c.Flags().DurationVar(&a.hang, "hang", a.hang, "how long a guest's monitor hangs")
}

const accuracyInterval = 10 * time.Second

// What the Linux guest does in each turn.
const (
	wroteBytes = 64 << 10 * 200
	readBytes  = 4 << 10 * 300
	sentBytes  = 400 * (42 + 900)
)

// told says where a contender tells something of a guest: with what its series
// begin and end, in the tally's words, and the unit.
type told struct {
	series func(g *lab.Guest) string
	unit   float64 // of the value, in ns or B
}

// guestSeries are those of the contenders that are compared, by what is compared.
var guestSeries = map[string]map[string]told{
	"kvmeter standard": {
		"cpu":   {func(g *lab.Guest) string { return "cpu.process " + g.UUID }, 1},
		"wrote": {func(g *lab.Guest) string { return "disk.host.device.write.bytes " + g.UUID + "-vda" }, 1},
		"read":  {func(g *lab.Guest) string { return "disk.host.device.read.bytes " + g.UUID + "-vda" }, 1},
		"sent": {func(g *lab.Guest) string {
			return "network.outgoing.bytes " + g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap
		}, 1},
	},
	"Ceilometer": {
		"cpu":   {func(g *lab.Guest) string { return "cpu " + g.UUID }, 1},
		"wrote": {func(g *lab.Guest) string { return "disk.device.write.bytes " + g.UUID + "-vda" }, 1},
		"read":  {func(g *lab.Guest) string { return "disk.device.read.bytes " + g.UUID + "-vda" }, 1},
		"sent": {func(g *lab.Guest) string {
			return "network.outgoing.bytes " + g.Name + "-" + g.UUID + "-" + g.NICs()[0].Tap
		}, 1},
	},
	"libvirt exporter": {
		"cpu":   {func(g *lab.Guest) string { return "libvirt_domain_info_cpu_time_seconds_total{domain=\"" + g.Name }, 1e9},
		"wrote": {func(g *lab.Guest) string { return "libvirt_domain_block_stats_write_bytes_total{domain=\"" + g.Name }, 1},
		"read":  {func(g *lab.Guest) string { return "libvirt_domain_block_stats_read_bytes_total{domain=\"" + g.Name }, 1},
		"sent": {func(g *lab.Guest) string {
			return "libvirt_domain_interface_stats_transmit_bytes_total{domain=\"" + g.Name
		}, 1},
	},
	"collectd virt": {
		"cpu":   {func(g *lab.Guest) string { return g.Name + " virt virt_cpu_total" }, 1},
		"wrote": {func(g *lab.Guest) string { return g.Name + " virt disk_octets vda 1" }, 1},
		"read":  {func(g *lab.Guest) string { return g.Name + " virt disk_octets vda 0" }, 1},
		"sent":  {func(g *lab.Guest) string { return g.Name + " virt if_octets " + g.NICs()[0].Tap + " 1" }, 1},
	},
}

// find returns the newest value of what is told of a guest.
func (t *tally) find(what told, g *lab.Guest) (float64, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, v := range t.totals {
		if strings.HasPrefix(name, what.series(g)) {
			return v * what.unit, true
		}
	}
	return 0, false
}

// guestsTold counts the guests of which something came since the last reset.
func (t *tally) guestsTold(guests []*lab.Guest, since time.Time) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, g := range guests {
		for name, a := range t.last {
			if a.came.After(since) && (strings.Contains(name, g.UUID) || strings.Contains(name, g.Name)) {
				n++
				break
			}
		}
	}
	return n
}

// run holds each contender against the truth in turn.
func (a *accuracy) run(ctx context.Context, f *facts) (records []record, err error) {
	f.KVM, f.Linux = 5, 1
	f.Versions = versions("ceilometer-polling", "prometheus-libvirt-exporter", "collectd-core", "libvirt-daemon", "qemu-system-x86")
	b, err := newBench(ctx, f.KVM, f.Linux)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	for _, c := range contenders {
		if guestSeries[c.name] == nil {
			continue
		}
		got, err := a.turn(ctx, b, c)
		if ctx.Err() != nil {
			return nil, err
		}
		if err != nil { // which is a figure, too
			say("%s: %v", c.name, err)
			got = []record{{c.name, accuracyInterval, 1, 0, "failed", 1}}
		}
		records = append(records, got...)
		for _, r := range got {
			say("%-20s %-24s %.6g", r.who, r.what, r.value)
		}
	}
	return records, nil
}

func (a *accuracy) turn(ctx context.Context, b *bench, c contender) (records []record, err error) {
	note := func(what string, v float64) {
		records = append(records, record{c.name, accuracyInterval, 1, 0, what, v})
	}
	linux := b.guests[len(b.guests)-1]
	where := guestSeries[c.name]
	t, err := b.begin(ctx, c, accuracyInterval)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.end()) }()
	// What nothing was read of or written to yet may not be told at all.
	for _, command := range []string{"write 65536 1", "read 4096 1", "udp 1 900"} {
		if _, err := linux.Exec(ctx, command); err != nil {
			return nil, err
		}
	}
	if err := t.wait(ctx, 2*accuracyInterval); err != nil {
		return nil, err
	}
	// A guest's work, all of it between two cycles that are told.
	before := map[string]float64{}
	for _, what := range []string{"wrote", "read", "sent"} {
		begun := time.Now()
		for {
			v, ok := t.tally.find(where[what], linux)
			if before[what] = v; ok {
				break
			}
			if time.Since(begun) > patience {
				return nil, fmt.Errorf("nothing of %q came in %s", where[what].series(linux), patience)
			}
			if err := t.wait(ctx, accuracyInterval/10); err != nil {
				return nil, err
			}
		}
	}
	for _, command := range []string{"write 65536 200", "read 4096 300", "udp 400 900"} {
		if _, err := linux.Exec(ctx, command); err != nil {
			return nil, err
		}
	}
	var short []*lab.Guest
	truth := 0.0
	for range a.lives {
		g, used, err := a.live(ctx, b, t)
		if err != nil {
			return nil, err
		}
		short, truth = append(short, g), truth+used
	}
	if err := t.wait(ctx, accuracyInterval+accuracyInterval/2); err != nil {
		return nil, err
	}
	for what, done := range map[string]float64{"wrote": wroteBytes, "read": readBytes, "sent": sentBytes} {
		after, _ := t.tally.find(where[what], linux)
		note(what+"_truth", done)
		note(what+"_told", after-before[what])
	}
	told, found := 0.0, 0
	for _, g := range short {
		if v, ok := t.tally.find(where["cpu"], g); ok {
			told += v
			found++
		}
	}
	note("short_guests", float64(len(short)))
	note("short_guests_told", float64(found))
	note("short_cpu_truth", truth/1e9)
	note("short_cpu_told", told/1e9)

	stuck, others := b.guests[0], b.guests[1:]
	if err := syscall.Kill(stuck.PID(), syscall.SIGSTOP); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, syscall.Kill(stuck.PID(), syscall.SIGCONT)) }()
	told, due := 0.0, 0.0
	for hung := time.Duration(0); hung < a.hang; hung += accuracyInterval {
		since := time.Now()
		if err := t.wait(ctx, accuracyInterval); err != nil {
			return nil, err
		}
		told += float64(t.tally.guestsTold(others, since))
		due += float64(len(others))
	}
	note("hung_others_due", due)
	note("hung_others_told", told)
	return records, nil
}

// live has a guest burn its CPU for a while and kills it; it uses nothing after its
// use, in ns, was read.
func (a *accuracy) live(ctx context.Context, b *bench, t *turn) (g *lab.Guest, used float64, err error) {
	if g, err = b.lab.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn"}); err != nil {
		return nil, 0, err
	}
	pid := g.PID()
	if err := t.wait(ctx, a.life); err != nil {
		return nil, 0, err
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return nil, 0, err
	}
	if err := t.wait(ctx, 100*time.Millisecond); err != nil { // its threads stop
		return nil, 0, err
	}
	ns, err := bpf.ProcessCPUClock(pid)
	return g, float64(ns), errors.Join(err, g.Kill9(ctx), g.Destroy(ctx))
}

const accuracyText = `## Accuracy

Each contender every %.0f s, beside %d idle KVM guests and a Linux guest. While it runs, the Linux guest writes, reads and sends so much,
exactly; then %d guests live some seconds each, one after the other, burning their CPU, and are killed. The truth of their use is their
processes' CPU clock, read after they were stopped and before the kill; Ceilometer tells that of vCPUs alone, which is nearly all. Then
the monitor of one idle guest hangs (its QEMU is stopped), and what is counted is of how many of the other guests anything came in each
interval.

`

func reportAccuracy(dir string, records []record, f *facts, text *strings.Builder) error {
	one := func(who, what string) float64 { return sum(series(records, who, accuracyInterval, what)) }
	lives := 0.0
	for who := range guestSeries {
		lives = max(lives, one(who, "short_guests"))
	}
	fmt.Fprintf(text, accuracyText, accuracyInterval.Seconds(), f.KVM, int(lives))
	about(f, text)
	fmt.Fprintln(text, "| | written: told of done | read | sent | short lives told | their CPU: told of used | guests told, of those due, while another hangs |")
	fmt.Fprintln(text, "|---|---|---|---|---|---|---|")
	for _, c := range contenders {
		if len(series(records, c.name, accuracyInterval, "failed")) > 0 {
			fmt.Fprintf(text, "| %s | did not run |\n", c.name)
		}
		if guestSeries[c.name] == nil || len(series(records, c.name, accuracyInterval, "short_guests")) == 0 {
			continue
		}
		bytes := func(what string) string {
			return fmt.Sprintf("%s of %s B", figure(one(c.name, what+"_told")), figure(one(c.name, what+"_truth")))
		}
		used, told := one(c.name, "short_cpu_truth"), one(c.name, "short_cpu_told")
		fmt.Fprintf(text, "| %s | %s | %s | %s | %.0f of %.0f | %.3f of %.3f s (%.1f %%) | %.0f of %.0f |\n", c.name, bytes("wrote"), bytes("read"), bytes("sent"),
			one(c.name, "short_guests_told"), one(c.name, "short_guests"), told, used, 100*told/used, one(c.name, "hung_others_told"), one(c.name, "hung_others_due"))
	}
	fmt.Fprintln(text)
	return nil
}
