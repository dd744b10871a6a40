package lab

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/test/boot"
)

//go:embed herd/herd.c
var herdSource string

// QEMUThreads are the threads of a QEMU with 4 vCPUs beside its first one.
var QEMUThreads = []string{
	"call_rcu", "IO mon_iothread", "IO iothread1", "CPU 0/KVM", "CPU 1/KVM", "CPU 2/KVM", "CPU 3/KVM", "worker", "vhost-1",
}

// HerdSpec says what processes a herd has.
type HerdSpec struct {
	Count      int
	Threads    []string      // names of each one's threads, beside its first one
	Busy       int           // of them, so many have threads that work: vCPUs, and those that one named ~NAME starts, which exit
	Work, Rest time.Duration // of these threads, in turn
}

// Herd is processes that look like QEMU's to who meters them.
type Herd struct {
	PIDs []int

	cmd   *exec.Cmd
	stdin io.Closer
}

// StartHerd starts a herd and returns its PIDs. It ends with the test.
func StartHerd(t testing.TB, spec HerdSpec) []int {
	t.Helper()
	if os.Getenv(boot.GuestVariable) != "" {
		t.Skip(boot.NoLab)
	}
	h, err := NewHerd(t.TempDir(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h.PIDs
}

// NewHerd starts a herd, with its program in the folder dir. It needs gcc.
func NewHerd(dir string, spec HerdSpec) (*Herd, error) {
	program := filepath.Join(dir, "herd")
	cc := exec.Command("gcc", "-O2", "-Wall", "-Werror", "-static", "-s", "-pthread", "-x", "c", "-o", program, "-")
	cc.Stdin = strings.NewReader(herdSource)
	if out, err := cc.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build a herd: %w\n%s", err, out)
	}
	us := func(d time.Duration) string { return strconv.FormatInt(d.Microseconds(), 10) }
	h := &Herd{cmd: exec.Command(program, strconv.Itoa(spec.Count), strconv.Itoa(spec.Busy), us(spec.Work), us(spec.Rest), strings.Join(spec.Threads, ","))}
	h.cmd.Stderr = os.Stderr
	stdin, err := h.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	h.stdin = stdin
	stdout, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := h.cmd.Start(); err != nil {
		return nil, err
	}
	if h.PIDs, err = readPIDs(stdout); err == nil && len(h.PIDs) != spec.Count {
		err = fmt.Errorf("a herd of %d processes has %d", spec.Count, len(h.PIDs))
	}
	if err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// Close ends the herd.
func (h *Herd) Close() error {
	_ = h.stdin.Close() // at which it ends
	if err := h.cmd.Wait(); err != nil {
		return fmt.Errorf("end a herd: %w", err)
	}
	return nil
}

func readPIDs(r io.Reader) (pids []int, err error) {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		if lines.Text() == "ready" {
			return pids, nil
		}
		pid, err := strconv.Atoi(lines.Text())
		if err != nil {
			return nil, fmt.Errorf("not a PID: %w", err)
		}
		pids = append(pids, pid)
	}
	return nil, errors.New("it ended before it was ready")
}
