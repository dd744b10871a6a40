package main

import (
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

	"github.com/kvmeter/kvmeter/bpf"
)

// costs are CPU times since whenever, by who spent them.
type costs struct {
	tool, libvirtd, qemu, broker, hooks, kernel time.Duration
}

func (c costs) minus(d costs) costs {
	return costs{c.tool - d.tool, c.libvirtd - d.libvirtd, c.qemu - d.qemu, c.broker - d.broker, c.hooks - d.hooks, c.kernel - d.kernel}
}

// gauge reads from the outside what a contender costs.
type gauge struct {
	group            *cgroup // nil: nobody runs
	libvirtd, broker int
	qemus            []int // of the KVM guests, which do nothing of their own accord
	hooks            []*ebpf.Program
	kernel           []int // kernel threads
}

func (g *gauge) read() (c costs, err error) {
	if g.group != nil {
		if c.tool, err = g.group.cpu(); err != nil {
			return c, err
		}
	}
	for _, p := range g.hooks {
		stats, err := p.Stats()
		if err != nil {
			return c, err
		}
		c.hooks += stats.Runtime
	}
	for _, part := range []struct {
		used *time.Duration
		pids []int
	}{{&c.libvirtd, []int{g.libvirtd}}, {&c.broker, []int{g.broker}}, {&c.qemu, g.qemus}} {
		for _, pid := range part.pids {
			ns, err := bpf.ProcessCPUClock(pid)
			if err != nil {
				return c, err
			}
			*part.used += time.Duration(ns)
		}
	}
	for _, pid := range g.kernel {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a worker that has ended
		}
		f := strings.Fields(string(text))
		if err != nil || len(f) != 3 {
			return c, fmt.Errorf("schedstat of kernel thread %d: %q %w", pid, text, err)
		}
		ns, err := strconv.ParseInt(f[0], 10, 64)
		if err != nil {
			return c, err
		}
		c.kernel += time.Duration(ns)
	}
	return c, nil
}

// findHooks finds the BPF programs that the contender has loaded and the kernel
// runs for others. What it runs itself, as the walk, is in its own CPU time.
func (g *gauge) findHooks() error {
	pids, err := g.group.pids()
	if err != nil {
		return err
	}
	seen := map[ebpf.ProgramID]bool{}
	for _, pid := range pids {
		infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
		if err != nil {
			return err
		}
		for _, path := range infos {
			text, _ := os.ReadFile(path) // it may have been closed
			for line := range strings.Lines(string(text)) {
				word, ok := strings.CutPrefix(line, "prog_id:")
				if !ok {
					continue
				}
				n, err := strconv.Atoi(strings.TrimSpace(word))
				if err != nil {
					return err
				}
				seen[ebpf.ProgramID(n)] = true
			}
		}
	}
	for id := range seen {
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			return err
		}
		if p.Type() == ebpf.Syscall {
			_ = p.Close()
			continue
		}
		g.hooks = append(g.hooks, p)
	}
	return nil
}

func (g *gauge) close() {
	for _, p := range g.hooks {
		_ = p.Close()
	}
}

// memory is what the contender's processes have in RAM: RSS, and PSS, which counts
// what they share once.
func (g *gauge) memory() (rss, pss int64, err error) {
	pids, err := g.group.pids()
	if err != nil {
		return 0, 0, err
	}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, 0, err
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			for name, sum := range map[string]*int64{"Rss:": &rss, "Pss:": &pss} {
				if f[0] == name {
					kb, err := strconv.ParseInt(f[1], 10, 64)
					if err != nil {
						return 0, 0, err
					}
					*sum += kb << 10
				}
			}
		}
	}
	return rss, pss, nil
}

// kernelThreads are the children of kthreadd.
func kernelThreads() ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil && len(f) > 1 && f[1] == "2" {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// load is the machine's 1-minute load average.
func load() float64 {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	v, _ := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
	return v
}

// quantile is the value that q of all values are at most; 0 of none.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	v := slices.Sorted(slices.Values(values))
	at := q * float64(len(v)-1)
	low := int(at)
	if low+1 == len(v) {
		return v[low]
	}
	return v[low] + (at-float64(low))*(v[low+1]-v[low])
}

func middle(values []float64) float64 { return quantile(values, 0.5) }
