//go:build lab

// Package overhead measures what kvmeter costs the host it meters.
package overhead

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/test/lab"
)

const (
	domains  = 20
	interval = time.Second
	polls    = 60
)

// BenchmarkAgent runs kvmeter-agent, as nobody and against a real broker,
// beside 20 idle KVM domains at 1 Hz and reports the CPU time that it takes and
// causes: µs a domain and poll of the agent, of libvirtd and of all QEMUs, each
// less what it takes without the agent.
func BenchmarkAgent(b *testing.B) {
	ctx := b.Context()
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	l := lab.Start(b, lab.Options{Log: zap.NewNop()})
	check(l.StartLibvirt(ctx))
	rabbit, err := l.RabbitMQ(ctx)
	check(err)
	var qemus []int
	for range domains {
		g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "idle"})
		check(err)
		qemus = append(qemus, g.PID())
	}
	libvirtd, err := l.LibvirtPID()
	check(err)

	dir := b.TempDir()
	check(os.Chmod(filepath.Dir(dir), 0o755))
	check(os.Chmod(dir, 0o755))
	conf := filepath.Join(dir, "agent.yaml")
	check(os.WriteFile(conf, fmt.Appendf(nil, "interval: %s\nlibvirt: [%s]\nsocket: \"\"\namqp: {url: %q}\n",
		interval, l.ReadOnlySocket(), rabbit.URL()), 0o644))
	program := filepath.Join(dir, "kvmeter-agent")
	build := exec.Command("go", "build", "-o", program, "github.com/kvmeter/kvmeter/cmd/kvmeter-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	declare(b, rabbit.URL())

	cpu := func(pids ...int) (ns uint64) {
		b.Helper()
		for _, pid := range pids {
			v, err := bpf.ProcessCPUClock(pid)
			check(err)
			ns += v
		}
		return ns
	}
	window := polls * interval
	measure := func(pids ...int) func() float64 {
		before := cpu(pids...)
		return func() float64 { return float64(cpu(pids...)-before) / 1e3 / domains / polls }
	}

	for b.Loop() {
		time.Sleep(5 * time.Second) // guests settle
		idleLibvirtd, idleQEMU := measure(libvirtd), measure(qemus...)
		time.Sleep(window)
		baseLibvirtd, baseQEMU := idleLibvirtd(), idleQEMU()

		agent := exec.Command(program, "--config", conf, "--log-level", "error")
		agent.Stderr = os.Stderr
		agent.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
			AmbientCaps: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON},
		}
		check(agent.Start())
		time.Sleep(10 * time.Second) // start is not a poll
		ours, theirs, guests := measure(agent.Process.Pid), measure(libvirtd), measure(qemus...)
		time.Sleep(window)
		us := ours()
		b.ReportMetric(us, "agent-µs/domain-poll")
		b.ReportMetric(theirs()-baseLibvirtd, "libvirtd-µs/domain-poll")
		b.ReportMetric(guests()-baseQEMU, "qemu-µs/domain-poll")
		b.ReportMetric(us*domains/float64(interval.Microseconds())*100, "agent-%core")
		b.ReportMetric(rss(b, agent.Process.Pid), "agent-peak-MB")
		check(agent.Process.Signal(syscall.SIGTERM))
		check(agent.Wait())
	}
	b.ReportMetric(0, "ns/op") // the time it took says nothing
}

// rss returns the most memory that a process has had, in MB.
func rss(b *testing.B, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if kb, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(kb), " kB"))
			if err != nil {
				b.Fatal(err)
			}
			return float64(n) * 1024 / 1e6
		}
	}
	b.Fatal("no VmHWM")
	return 0
}
