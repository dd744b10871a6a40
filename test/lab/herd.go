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

// StartHerd starts processes that look like QEMU's to who meters them, and
// returns their PIDs. They end with the test. It needs gcc.
func StartHerd(t testing.TB, spec HerdSpec) []int {
	t.Helper()
	if os.Getenv(boot.GuestVariable) != "" {
		t.Skip(boot.NoLab)
	}
	program := filepath.Join(t.TempDir(), "herd")
	cc := exec.Command("gcc", "-O2", "-Wall", "-Werror", "-static", "-s", "-pthread", "-x", "c", "-o", program, "-")
	cc.Stdin = strings.NewReader(herdSource)
	if out, err := cc.CombinedOutput(); err != nil {
		t.Fatalf("build a herd: %v\n%s", err, out)
	}
	us := func(d time.Duration) string { return strconv.FormatInt(d.Microseconds(), 10) }
	cmd := exec.Command(program, strconv.Itoa(spec.Count), strconv.Itoa(spec.Busy), us(spec.Work), us(spec.Rest), strings.Join(spec.Threads, ","))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error("end a herd:", err)
		}
	})
	pids, err := readPIDs(stdout)
	if err != nil || len(pids) != spec.Count {
		t.Fatalf("a herd of %d processes has %d, %v", spec.Count, len(pids), err)
	}
	return pids
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
