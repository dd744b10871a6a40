//go:build lab

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
	l := lab.Start(b, lab.Options{Log: zap.NewNop()})
	check(b, l.StartLibvirt(ctx))
	rabbit, err := l.RabbitMQ(ctx)
	check(b, err)
	var qemus []int
	for range domains {
		g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "idle"})
		check(b, err)
		qemus = append(qemus, g.PID())
	}
	libvirtd, err := l.LibvirtPID()
	check(b, err)
	start := agents(b, rabbit.URL(), "["+l.ReadOnlySocket()+"]")
	for b.Loop() {
		time.Sleep(5 * time.Second) // guests settle
		idleLibvirtd, idleQEMU := measure(b, domains, libvirtd), measure(b, domains, qemus...)
		time.Sleep(window)
		baseLibvirtd, baseQEMU := idleLibvirtd(), idleQEMU()

		pid, stop := start("standard")
		time.Sleep(10 * time.Second) // start is not a poll
		ours, theirs, guests := measure(b, domains, pid), measure(b, domains, libvirtd), measure(b, domains, qemus...)
		time.Sleep(window)
		us := ours()
		b.ReportMetric(us, "agent-µs/domain-poll")
		b.ReportMetric(theirs()-baseLibvirtd, "libvirtd-µs/domain-poll")
		b.ReportMetric(guests()-baseQEMU, "qemu-µs/domain-poll")
		b.ReportMetric(us*domains/float64(interval.Microseconds())*100, "agent-%core")
		b.ReportMetric(rss(b, pid), "agent-peak-MB")
		stop()
	}
	b.ReportMetric(0, "ns/op") // the time it took says nothing
}

// BenchmarkCostAgentOf500 runs kvmeter-agent beside 500 processes of 10 threads
// that look like QEMU's, 50 of them busy, at 1 Hz and reports its CPU time and the
// most memory that it had, in each profile. libvirt is off: it knows none of them.
func BenchmarkCostAgentOf500(b *testing.B) {
	l := lab.Start(b, lab.Options{Log: zap.NewNop()})
	rabbit, err := l.RabbitMQ(b.Context())
	check(b, err)
	lab.StartHerd(b, lab.HerdSpec{Count: herd, Threads: lab.QEMUThreads, Busy: 50, Work: 20 * time.Microsecond, Rest: time.Second})
	start := agents(b, rabbit.URL(), "off")
	for _, profile := range []string{"lean", "standard", "deep"} {
		b.Run(profile, func(b *testing.B) {
			for b.Loop() {
				pid, stop := start(profile)
				time.Sleep(10 * time.Second) // start is not a poll
				used := measure(b, herd, pid)
				time.Sleep(window)
				us := used()
				b.ReportMetric(us, "agent-µs/domain-poll")
				b.ReportMetric(us*herd/float64(interval.Microseconds())*100, "agent-%core")
				b.ReportMetric(rss(b, pid), "agent-peak-MB")
				stop()
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// agents builds kvmeter-agent and returns what starts it, as nobody, in a profile.
// libvirt is the setting of that name.
func agents(b *testing.B, broker, libvirt string) (start func(profile string) (pid int, stop func())) {
	b.Helper()
	dir := b.TempDir()
	check(b, os.Chmod(filepath.Dir(dir), 0o755))
	check(b, os.Chmod(dir, 0o755))
	program := filepath.Join(dir, "kvmeter-agent")
	build := exec.Command("go", "build", "-o", program, "github.com/kvmeter/kvmeter/cmd/kvmeter-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	declare(b, broker)
	conf := filepath.Join(dir, "agent.yaml")
	return func(profile string) (pid int, stop func()) {
		check(b, os.WriteFile(conf, fmt.Appendf(nil, "interval: %s\nprofile: %s\nlibvirt: %s\nsocket: \"\"\ncounters: \"\"\npins: \"\"\nipmi: {device: \"\"}\nspool: {path: \"\"}\namqp: {url: %q}\n",
			interval, profile, libvirt, broker), 0o644))
		cmd := exec.Command(program, "--config", conf, "--log-level", "error")
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
			AmbientCaps: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN},
		}
		check(b, cmd.Start())
		return cmd.Process.Pid, func() {
			check(b, cmd.Process.Signal(syscall.SIGTERM))
			check(b, cmd.Wait())
		}
	}
}

// window is how long is measured.
const window = polls * interval

// measure returns what tells the CPU time that processes took since, in µs a
// domain and poll of a window.
func measure(b *testing.B, domains int, pids ...int) func() float64 {
	used := func() (ns uint64) {
		b.Helper()
		for _, pid := range pids {
			v, err := bpf.ProcessCPUClock(pid)
			check(b, err)
			ns += v
		}
		return ns
	}
	before := used()
	return func() float64 { return float64(used()-before) / 1e3 / float64(domains) / polls }
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
