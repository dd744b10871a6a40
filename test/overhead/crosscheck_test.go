//go:build lab

package overhead

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/test/lab"
)

// nobody takes every batch.
type nobody struct{}

func (nobody) Publish(context.Context, ...bus.Message) error { return nil }

// askedGuests is how many domains are asked for, and askedFor how long.
const (
	askedGuests = 10
	askedFor    = 30 * time.Second
)

// BenchmarkCrosscheck runs an agent that does nothing but compare 10 idle KVM
// domains, of one disk and one NIC each, with libvirt, each once a second, and
// reports the CPU time that a check of a domain takes and causes: µs of the
// agent, of libvirtd and of QEMU, less what the latter two take without it.
func BenchmarkCrosscheck(b *testing.B) {
	benchmarkAsking(b, "check", `sources: [{name: checks, interval: 10, meters: ["check.cpu*", "check.disk.*", "check.network.*"]}]`, time.Second, checks)
}

// BenchmarkQEMUMeters does the same where the agent reads what only QEMU
// knows of them, their disks and memory, each once a second.
func BenchmarkQEMUMeters(b *testing.B) {
	readings := 0.0
	benchmarkAsking(b, "reading", `sources: [{name: qemu, interval: 1, meters: ["disk.device.read.bytes", "disk.device.write.bytes", "disk.device.capacity", "memory.usage"]}]`, 0,
		func(*testing.B, *prometheus.Registry) float64 { // by the clock
			readings += askedGuests * askedFor.Seconds()
			return readings
		})
}

func benchmarkAsking(b *testing.B, what, sources string, crosscheck time.Duration, count func(*testing.B, *prometheus.Registry) float64) {
	const guests, window = askedGuests, askedFor
	ctx := b.Context()
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	l := lab.Start(b, lab.Options{Log: zap.NewNop()})
	check(l.StartLibvirt(ctx))
	var qemus []int
	for range guests {
		g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "idle"})
		check(err)
		qemus = append(qemus, g.PID())
	}
	libvirtd, err := l.LibvirtPID()
	check(err)
	cpu := func(pids ...int) (ns uint64) {
		for _, pid := range pids {
			v, err := bpf.ProcessCPUClock(pid)
			check(err)
			ns += v
		}
		return ns
	}
	log := zap.NewNop()
	readers, _ := all.Usage(log, false)
	hooks, _ := all.Hooks(log, false)
	links, err := rtnl.Open()
	check(err)
	polling := filepath.Join(b.TempDir(), "polling.yaml")
	check(os.WriteFile(polling, []byte(sources), 0o600))
	cfg := agent.DefaultConfig()
	cfg.Polling, cfg.Socket, cfg.Counters, cfg.Spread = polling, "", "", false
	cfg.Libvirt, cfg.CrosscheckInterval = agent.Sockets{l.ReadOnlySocket()}, crosscheck

	for b.Loop() {
		time.Sleep(5 * time.Second) // guests settle
		d0, q0 := cpu(libvirtd), cpu(qemus...)
		time.Sleep(window)
		idleLibvirtd, idleQEMU := cpu(libvirtd)-d0, cpu(qemus...)-q0

		registry := prometheus.NewRegistry()
		a, err := agent.New(cfg, agent.Deps{Log: log, Publisher: nobody{}, Registry: registry, Usage: readers, Hooks: hooks, Links: links})
		check(err)
		ctx, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		time.Sleep(5 * time.Second) // the start is not of it
		n0, a0, d0, q0 := count(b, registry), cpu(os.Getpid()), cpu(libvirtd), cpu(qemus...)
		time.Sleep(window)
		n := count(b, registry) - n0
		per := func(ns uint64) float64 { return float64(ns) / 1e3 / n }
		b.ReportMetric(n, what+"s")
		b.ReportMetric(per(cpu(os.Getpid())-a0), "agent-µs/"+what)
		b.ReportMetric(per(cpu(libvirtd)-d0-idleLibvirtd), "libvirtd-µs/"+what)
		b.ReportMetric(per(cpu(qemus...)-q0-idleQEMU), "qemu-µs/"+what)
		stop()
		check(<-done)
	}
	b.ReportMetric(0, "ns/op") // the time it took says nothing
	check(all.Close(readers))
	for _, h := range hooks {
		check(h.Close())
	}
	check(links.Close())
}

// checks returns how many checks there were.
func checks(b *testing.B, r *prometheus.Registry) (n float64) {
	b.Helper()
	families, err := r.Gather()
	if err != nil {
		b.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "kvmeter_agent_crosscheck_comparisons_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "meter" && l.GetValue() == "cpu.process" {
					n += m.GetCounter().GetValue()
				}
			}
		}
	}
	return n
}
