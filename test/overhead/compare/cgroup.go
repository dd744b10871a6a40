package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// cgroup is a control group (v2) of one contender: all of its processes are in it,
// so that none that comes and goes is missed.
type cgroup struct {
	path string
	fd   *os.File
}

// newCgroup makes one, below the root of the host's hierarchy of version 2, which
// may be mounted beside those of version 1. No controller is needed.
func newCgroup(name string) (*cgroup, error) {
	mounts, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	defer func() { _ = mounts.Close() }()
	for lines := bufio.NewScanner(mounts); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if f[2] != "cgroup2" {
			continue
		}
		g := &cgroup{path: filepath.Join(f[1], name)}
		if err := os.Mkdir(g.path, 0o755); err != nil {
			return nil, err
		}
		g.fd, err = os.Open(g.path)
		return g, err
	}
	return nil, errors.New("no control groups of version 2 are mounted")
}

// attr has a command start in the group.
func (g *cgroup) attr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(g.fd.Fd()), Pdeathsig: syscall.SIGKILL}
}

// cpu is the CPU time of all that was ever in the group.
func (g *cgroup) cpu() (time.Duration, error) {
	text, err := os.ReadFile(filepath.Join(g.path, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if us, ok := strings.CutPrefix(line, "usage_usec "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(us), 10, 64)
			return time.Duration(n) * time.Microsecond, err
		}
	}
	return 0, fmt.Errorf("%s: no usage_usec in cpu.stat", g.path)
}

// pids are the processes that are in the group.
func (g *cgroup) pids() ([]int, error) {
	text, err := os.ReadFile(filepath.Join(g.path, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for word := range strings.FieldsSeq(string(text)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// close kills what is left in the group and removes it.
func (g *cgroup) close() error {
	err := errors.Join(os.WriteFile(filepath.Join(g.path, "cgroup.kill"), []byte("1"), 0o644), g.fd.Close())
	for range 500 {
		if e := os.Remove(g.path); e == nil || errors.Is(e, os.ErrNotExist) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.Join(err, fmt.Errorf("control group %s does not get empty", g.path))
}
