//go:build lab

package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// restartEnv makes TestBeAnAgent an agent that prints its samples to its file
// descriptor 3. Its value is the counters file.
const restartEnv = "KVMETER_AGENT_COUNTERS"

// TestBeAnAgent is that agent.
func TestBeAnAgent(t *testing.T) {
	if counters := os.Getenv(restartEnv); counters != "" {
		must(t, beAgent(counters))
	}
}

// printer prints each sample of a counter in a batch, and a line at its end.
type printer struct {
	decoder *sample.Decoder
	file    *os.File
}

func (p printer) Publish(_ context.Context, messages ...bus.Message) error {
	out := bufio.NewWriter(p.file)
	for _, m := range messages {
		b, err := p.decoder.Decode(m.Body)
		if err != nil {
			return err
		}
		for s := range b.Samples() {
			if s.Kind == sample.Cumulative { // gauges may shrink
				fmt.Fprintln(out, s.Resource, s.Name, s.Volume)
			}
		}
		fmt.Fprintln(out, "end", "of", 0)
	}
	return out.Flush()
}

// beAgent meters the processes of a herd until SIGTERM.
func beAgent(counters string) error {
	decoder, err := sample.NewDecoder()
	if err != nil {
		return err
	}
	cfg := DefaultConfig()
	cfg.Node, cfg.Interval, cfg.Spread, cfg.Libvirt = "restart", minInterval, false, nil
	cfg.Socket, cfg.Counters, cfg.IPMI.Device, cfg.Spool.Path = "", counters, "", ""
	readers, _ := all.Usage(zap.NewNop(), false)
	a, err := New(cfg, Deps{Log: zap.NewNop(), Publisher: printer{decoder, os.NewFile(3, "samples")}, Usage: readers})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return a.Run(ctx)
}

// TestRestartsUnderLoad restarts the agent 20 times, by SIGKILL and SIGTERM in
// turn, while vCPUs work and threads come and go. No counter goes back, in each
// sample the classes add up to the process, and in the end the process has what
// the kernel's clock of it says, to the nanosecond.
func TestRestartsUnderLoad(t *testing.T) {
	pids := lab.StartHerd(t, lab.HerdSpec{
		Count: 3, Busy: 3, Work: 2 * time.Millisecond, Rest: 3 * time.Millisecond,
		Threads: []string{"CPU 0/KVM", "CPU 1/KVM", "~worker", "~CPU 2/KVM", "IO iothread1"},
	})
	counters := filepath.Join(t.TempDir(), "counters")
	last := map[string]uint64{} // by resource and meter
	process := map[string]uint64{}
	samples := 0
	// batch takes the samples of one poll.
	batch := func(lines *bufio.Scanner) bool {
		now := map[string]map[string]uint64{}
		for lines.Scan() {
			var resource, meter string
			var value uint64
			text := lines.Text()
			if _, err := fmt.Sscan(text, &resource, &meter, &value); err != nil {
				if !lines.Scan() {
					return false // it was killed in the middle of the line
				}
				t.Fatalf("it says %q", text)
			}
			if resource == "end" {
				for resource, meters := range now {
					sum := uint64(0)
					for _, m := range []string{"cpu", "cpu.emulator", "cpu.iothread", "cpu.worker", "cpu.vhost", "cpu.exited"} {
						sum += meters[m]
					}
					if total, ok := meters["cpu.process"]; ok && total != sum {
						t.Errorf("%s: the classes are %d, the process %d: %v", resource, sum, total, meters)
					}
				}
				return true
			}
			if now[resource] == nil {
				now[resource] = map[string]uint64{}
			}
			now[resource][meter] = value
			if key := resource + " " + meter; value < last[key] {
				t.Errorf("%s went back from %d to %d", key, last[key], value)
			} else {
				last[key] = value
			}
			if meter == "cpu.process" {
				process[resource] = value
			}
			samples++
		}
		return false
	}
	start := func() (*exec.Cmd, *bufio.Scanner) {
		out, in, err := os.Pipe()
		must(t, err)
		t.Cleanup(func() { out.Close() })
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestBeAnAgent$")
		cmd.Env = append(os.Environ(), restartEnv+"="+counters)
		cmd.Stderr, cmd.ExtraFiles = os.Stderr, []*os.File{in}
		must(t, cmd.Start())
		must(t, in.Close())
		return cmd, bufio.NewScanner(out)
	}
	for n := range 20 {
		cmd, lines := start()
		for range 2 + n%3 {
			if !batch(lines) {
				t.Fatal("the agent ended by itself")
			}
		}
		time.Sleep(rand.N(minInterval))
		by := syscall.SIGKILL
		if n%2 == 1 {
			by = syscall.SIGTERM
		}
		must(t, cmd.Process.Signal(by))
		for batch(lines) {
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); by == syscall.SIGTERM && err != nil || err != nil && !errors.As(err, &exit) {
			t.Errorf("ended by %v: %v", by, err)
		}
		if t.Failed() {
			return
		}
	}
	for _, pid := range pids {
		must(t, syscall.Kill(pid, syscall.SIGSTOP))
	}
	for _, pid := range pids {
		awaitStopped(t, pid)
	}
	cmd, lines := start()
	for range 2 {
		batch(lines)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	for i, pid := range pids {
		clock, err := bpf.ProcessCPUClock(pid)
		must(t, err)
		uuid := fmt.Sprintf("6e7d0000-0000-4000-8000-%012x", i)
		if process[uuid] != clock {
			t.Errorf("process %d: published %d ns, its CPU clock says %d", i, process[uuid], clock)
		}
		var rows []string
		for key := range last {
			if strings.HasPrefix(key, uuid+"-vcpu") && strings.HasSuffix(key, "vcpu.run") {
				rows = append(rows, key)
			}
		}
		if len(rows) < 3 {
			t.Errorf("process %d has rows of vCPUs %v only", i, rows)
		}
	}
	t.Logf("%d samples of %d series", samples, len(last))
}

// awaitStopped waits until no thread of a process runs any more: each stops when
// it next gets a CPU.
func awaitStopped(t *testing.T, pid int) {
	t.Helper()
	running := func() bool {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		must(t, err)
		for _, f := range files {
			// After the name, which may hold anything, in parentheses.
			text, err := os.ReadFile(f)
			if _, state, ok := strings.Cut(string(text), ") "); err == nil && ok && !strings.HasPrefix(state, "T") {
				return true
			}
		}
		return false
	}
	for deadline := time.Now().Add(30 * time.Second); running(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not stop", pid)
		}
	}
}
