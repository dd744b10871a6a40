package bpf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ProgramCost is what a loaded program cost while it was measured.
type ProgramCost struct {
	ID     ebpf.ProgramID
	Name   string
	Runs   uint64
	Time   time.Duration // of all runs together, reading the clock twice a run included
	Misses uint64        // runs that the kernel skipped since it was loaded
}

// MeasureCost has the kernel time the programs that the process pid holds for as
// long as d, or until ctx ends. It takes CAP_SYS_ADMIN, and the right to look
// into the process where that is not its own. Each run of any BPF program of the
// host costs some 20 to 40 ns more meanwhile.
func MeasureCost(ctx context.Context, pid int, d time.Duration) ([]ProgramCost, error) {
	ids, err := programsOf(pid)
	if err != nil {
		return nil, err
	}
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return nil, fmt.Errorf("have the kernel time BPF programs (CAP_SYS_ADMIN is needed): %w", err)
	}
	defer func() { _ = stats.Close() }()
	costs := make([]ProgramCost, 0, len(ids))
	programs := make([]*ebpf.Program, 0, len(ids))
	defer func() {
		for _, p := range programs {
			_ = p.Close()
		}
	}()
	for _, id := range ids {
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // it was unloaded meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("open program %d: %w", id, err)
		}
		programs = append(programs, p)
		c, err := costOf(p)
		if err != nil {
			return nil, err
		}
		c.ID = id
		costs = append(costs, c)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	for i, p := range programs {
		now, err := costOf(p)
		if err != nil {
			return nil, err
		}
		c := &costs[i]
		c.Runs, c.Time, c.Misses = now.Runs-c.Runs, now.Time-c.Time, now.Misses
	}
	return costs, nil
}

func costOf(p *ebpf.Program) (c ProgramCost, err error) {
	info, err := p.Info()
	if err != nil {
		return c, fmt.Errorf("describe a program: %w", err)
	}
	s, err := p.Stats()
	if err != nil {
		return c, fmt.Errorf("read the statistics of program %s: %w", info.Name, err)
	}
	return ProgramCost{Name: info.Name, Runs: s.RunCount, Time: s.Runtime, Misses: s.RecursionMisses}, nil
}

// programsOf returns the programs and those of the links that a process has open.
func programsOf(pid int) ([]ebpf.ProgramID, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fdinfo")
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("look for the programs of process %d: %w", pid, err)
	}
	var ids []ebpf.ProgramID
	for _, fd := range fds {
		info, err := os.ReadFile(filepath.Join(dir, fd.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for the programs of process %d: %w", pid, err)
		}
		for line := range bytes.Lines(info) {
			value, ok := bytes.CutPrefix(line, []byte("prog_id:"))
			if !ok {
				continue
			}
			id, err := strconv.ParseUint(strings.TrimSpace(string(value)), 10, 32)
			if err == nil && !slices.Contains(ids, ebpf.ProgramID(id)) {
				ids = append(ids, ebpf.ProgramID(id))
			}
		}
	}
	slices.Sort(ids)
	return ids, nil
}
