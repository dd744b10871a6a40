package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/test/lab"
)

// patience is how long a contender may take to its first delivery.
const patience = 2 * time.Minute

// nobodyRuns is the empty turn.
const nobodyRuns = "nobody"

// agents is the comparison of the compute agents.
type agents struct {
	kvm, linux     int
	rounds         int
	window, second time.Duration // how long a turn is measured, at 10 s and at 1 s
	only           string
}

func defaultAgents() *agents {
	return &agents{kvm: 20, linux: 4, rounds: 2, window: 30 * time.Second, second: 12 * time.Second}
}

func (a *agents) flags(c *cobra.Command) {
	c.Flags().IntVar(&a.kvm, "vms", a.kvm, "KVM guests, which do nothing of their own accord")
	c.Flags().IntVar(&a.linux, "linux", a.linux, "Linux guests, with a load of CPU, disk and network")
	c.Flags().IntVar(&a.rounds, "rounds", a.rounds, "turns of each contender")
	c.Flags().DurationVar(&a.window, "turn", a.window, "how long a turn is measured at an interval of 10 s; a multiple of that")
	c.Flags().DurationVar(&a.second, "turn-1s", a.second, "how long it is at 1 s; 0: not run")
	c.Flags().StringVar(&a.only, "only", a.only, "contenders by a regular expression")
}

// bench is the host that is metered: a private libvirtd, guests and a broker.
type bench struct {
	lab     *lab.Lab
	rabbit  *lab.Rabbit
	guests  []*lab.Guest // KVM first, then Linux
	gauge   gauge
	dir     string // of the turns
	program string
}

// newBench boots the guests; close ends all.
func newBench(ctx context.Context, kvm, linux int) (b *bench, err error) {
	dir, err := os.MkdirTemp("", "kvmeter-compare-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	b = &bench{dir: dir, program: filepath.Join(dir, "kvmeter-agent")}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.lab, err = lab.New(filepath.Join(dir, "lab"), lab.Options{}); err != nil {
		return b, err
	}
	if err := b.lab.StartLibvirt(ctx); err != nil {
		return b, err
	}
	if b.rabbit, err = b.lab.RabbitMQ(ctx); err != nil {
		return b, err
	}
	if err := build(ctx, ".", b.program, "kvmeter-agent"); err != nil {
		return b, err
	}
	say("booting %d KVM guests and %d Linux guests", kvm, linux)
	b.guests = make([]*lab.Guest, kvm+linux)
	starts, startCtx := errgroup.WithContext(ctx)
	starts.SetLimit(4)
	for i := range b.guests {
		starts.Go(func() (err error) {
			spec := lab.GuestSpec{Kind: lab.KVM, Mode: "idle"}
			if i >= kvm {
				spec = lab.GuestSpec{}
			}
			b.guests[i], err = b.lab.StartGuest(startCtx, spec)
			return err
		})
	}
	if err := starts.Wait(); err != nil {
		return b, err
	}
	for _, g := range b.guests[:kvm] {
		b.gauge.qemus = append(b.gauge.qemus, g.PID())
	}
	if b.gauge.libvirtd, err = b.lab.LibvirtPID(); err != nil {
		return b, err
	}
	b.gauge.broker = b.rabbit.PID()
	return b, declare(b.rabbit.URL())
}

func (b *bench) close() error {
	var err error
	if b.lab != nil {
		err = b.lab.Close()
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

// turn is one run of one contender.
type turn struct {
	*stage
	gauge gauge
	began time.Time
	ended chan error
}

// begin starts a contender and returns when it has delivered something.
func (b *bench) begin(ctx context.Context, c contender, interval time.Duration) (t *turn, err error) {
	dir, err := os.MkdirTemp(b.dir, "turn-")
	if err != nil {
		return nil, err
	}
	if err := os.Chown(dir, nobody, nobody); err != nil {
		return nil, err
	}
	t = &turn{gauge: b.gauge, ended: make(chan error, 1), stage: &stage{
		dir: dir, libvirt: b.lab.Socket(), readOnly: b.lab.ReadOnlySocket(), broker: b.rabbit.URL(), program: b.program,
		interval: interval, tally: newTally(interval),
	}}
	if t.gauge.group, err = newCgroup(filepath.Base(b.dir) + "-" + filepath.Base(dir)); err != nil {
		return nil, err
	}
	if err := c.start(t.stage); err != nil {
		return nil, errors.Join(err, t.end())
	}
	attr := t.gauge.group.attr()
	if own := t.cmd.SysProcAttr; own != nil {
		attr.Credential, attr.AmbientCaps = own.Credential, own.AmbientCaps
	}
	t.cmd.SysProcAttr = attr
	said, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		return nil, errors.Join(err, t.end())
	}
	defer func() { _ = said.Close() }()
	t.cmd.Stdout, t.cmd.Stderr = said, said
	t.began = time.Now()
	if err := t.cmd.Start(); err != nil {
		return nil, errors.Join(err, t.end())
	}
	go func() { t.ended <- t.cmd.Wait() }()
	for t.tally.come() == 0 {
		if err := t.wait(ctx, 20*time.Millisecond); err != nil {
			return nil, errors.Join(err, t.end())
		}
		if time.Since(t.began) > patience {
			return nil, errors.Join(fmt.Errorf("nothing came in %s: %s", patience, t.said()), t.end())
		}
	}
	return t, nil
}

// wait lets some time pass while the contender runs.
func (t *turn) wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-t.ended:
		t.ended <- err
		return fmt.Errorf("it has ended: %w: %s", err, t.said())
	case <-time.After(d):
		return nil
	}
}

func (t *turn) said() string {
	text, _ := os.ReadFile(filepath.Join(t.dir, "output"))
	return string(text)
}

// end stops the contender and all that belongs to it.
func (t *turn) end() error {
	if t.cmd != nil && t.cmd.Process != nil {
		_ = t.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-t.ended:
		case <-time.After(15 * time.Second):
			_ = t.cmd.Process.Kill()
			<-t.ended
		}
	}
	t.gauge.close()
	err := t.gauge.group.close()
	if t.sink != nil {
		err = errors.Join(err, t.sink.Close())
	}
	if t.done != nil {
		err = errors.Join(err, t.done())
	}
	return errors.Join(err, os.RemoveAll(t.dir))
}

// pause lets time pass with nobody running.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// run takes turns.
func (a *agents) run(ctx context.Context, f *facts) (records []record, err error) {
	only, err := regexp.Compile(a.only)
	if err != nil {
		return nil, err
	}
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return nil, fmt.Errorf("have the kernel time BPF programs: %w", err)
	}
	defer func() { err = errors.Join(err, stats.Close()) }()
	b, err := newBench(ctx, a.kvm, a.linux)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	f.KVM, f.Linux = a.kvm, a.linux
	f.Versions = versions("ceilometer-polling", "prometheus-libvirt-exporter", "collectd-core", "libvirt-daemon", "qemu-system-x86", "rabbitmq-server")
	for _, g := range b.guests[a.kvm:] {
		if _, err := g.Exec(ctx, "bg mix 2 20 20 0"); err != nil {
			return nil, err
		}
	}
	if err := pause(ctx, 5*time.Second); err != nil { // guests settle
		return nil, err
	}
	type window struct{ interval, length time.Duration }
	windows := []window{{10 * time.Second, a.window}}
	if a.second > 0 {
		windows = append(windows, window{time.Second, a.second})
	}
	described := map[string]bool{}
	for n := 1; n <= a.rounds; n++ {
		for _, w := range windows {
			for _, c := range append([]contender{{name: nobodyRuns}}, contenders...) {
				if c.start != nil && !only.MatchString(c.name) || c.skip != nil && c.skip(w.interval) {
					continue
				}
				got, err := b.measure(ctx, c, w.interval, int(w.length/w.interval), n, func(s *stage) error {
					if described[c.name] {
						return nil
					}
					described[c.name] = true
					text, err := s.described()
					f.Configs = append(f.Configs, config{c.name, c.about, text})
					return err
				})
				if ctx.Err() != nil {
					return nil, err
				}
				if err != nil { // which is a figure, too
					say("%s at %s: %v", c.name, w.interval, err)
					records = append(records, record{c.name, w.interval, n, 0, "failed", 1})
					continue
				}
				records = append(records, got...)
				tool, came := middle(series(got, c.name, w.interval, "tool_us")), middle(series(got, c.name, w.interval, "samples"))
				say("round %d of %d, every %s: %-26s %8.0f µs a cycle of its own, %5.0f samples", n, a.rounds, w.interval, c.name, tool, came)
			}
		}
	}
	return records, nil
}

// measure runs one turn of so many cycles.
func (b *bench) measure(ctx context.Context, c contender, interval time.Duration, cycles, n int, begun func(*stage) error) (records []record, err error) {
	note := func(cycle int, what string, v float64) {
		records = append(records, record{c.name, interval, n, cycle, what, v})
	}
	t := &turn{gauge: b.gauge, ended: make(chan error, 1), stage: &stage{tally: newTally(interval)}}
	if c.start != nil {
		if t, err = b.begin(ctx, c, interval); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, t.end()) }()
		if err := begun(t.stage); err != nil {
			return nil, err
		}
		note(0, "first_sample_s", time.Since(t.began).Seconds())
		cpu, err := t.gauge.group.cpu()
		if err != nil {
			return nil, err
		}
		note(0, "start_ms", float64(cpu.Microseconds())/1e3)
	}
	// From the middle between two polls on, so that each cycle has one.
	if err := t.wait(ctx, interval+interval/2); err != nil {
		return nil, err
	}
	if t.gauge.group != nil {
		if err := t.gauge.findHooks(); err != nil {
			return nil, err
		}
	}
	if t.gauge.kernel, err = kernelThreads(); err != nil {
		return nil, err
	}
	before, err := t.gauge.read()
	if err != nil {
		return nil, err
	}
	if _, err := t.tally.reset(); err != nil {
		return nil, err
	}
	start := time.Now()
	for cycle := 1; cycle <= cycles; cycle++ {
		if err := t.wait(ctx, time.Until(start.Add(time.Duration(cycle)*interval))); err != nil {
			return nil, err
		}
		now, err := t.gauge.read()
		if err != nil {
			return nil, err
		}
		used := now.minus(before)
		before = now
		came, err := t.tally.reset()
		if err != nil {
			return nil, err
		}
		us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
		note(cycle, "tool_us", us(used.tool))
		note(cycle, "libvirtd_us", us(used.libvirtd))
		note(cycle, "qemu_us", us(used.qemu))
		note(cycle, "broker_us", us(used.broker))
		note(cycle, "hooks_us", us(used.hooks))
		note(cycle, "kernel_us", us(used.kernel))
		if c.start == nil {
			continue
		}
		note(cycle, "messages", float64(came.messages))
		note(cycle, "bytes", float64(came.bytes))
		note(cycle, "samples", float64(came.samples))
		note(cycle, "late", float64(came.late))
		note(cycle, "delay_s", middle(came.delay))
		note(cycle, "age_s", quantile(came.age, 0.99))
	}
	if t.gauge.group != nil {
		rss, pss, err := t.gauge.memory()
		if err != nil {
			return nil, err
		}
		note(0, "rss_mb", float64(rss)/1e6)
		note(0, "pss_mb", float64(pss)/1e6)
	}
	return records, nil
}
