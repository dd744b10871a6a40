package agent

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// Tolerance is how far two counts of the same thing may be apart: the absolute
// part and the relative one together.
type Tolerance struct {
	// Absolute is in the unit of the meter, for each of the counters that the
	// figure is the sum of.
	Absolute uint64 `yaml:"absolute"`
	// Relative is in parts of the greater figure: 0.01 is 1 %.
	Relative float64 `yaml:"relative"`
}

// tick is how far libvirt tells CPU time too low at most: user and system time
// are each cut to 10 ms, and lack what a running thread has used since the
// kernel's last tick, up to 10 ms.
const tick = 30e6

// defaultTolerances hold where the configuration says nothing. Other meters
// must agree exactly: both sides read the same counter of the kernel.
var defaultTolerances = map[*sample.Check]Tolerance{
	sample.CheckCPU:        {Absolute: tick},
	sample.CheckCPUProcess: {Absolute: tick},
	// A hook may miss events, requests may be under way, and QEMU joins requests
	// that the guest queues one after the other.
	sample.CheckDiskReads:      {Absolute: 32, Relative: 0.03},
	sample.CheckDiskReadBytes:  {Absolute: 2 << 20, Relative: 0.03},
	sample.CheckDiskWrites:     {Absolute: 32, Relative: 0.03},
	sample.CheckDiskWriteBytes: {Absolute: 2 << 20, Relative: 0.03},
}

// of returns the tolerance of a figure that is the sum of so many counters.
func (t Tolerance) of(greater uint64, counters int) uint64 {
	v := float64(t.Absolute)*float64(max(1, counters)) + t.Relative*float64(greater)
	if v >= math.MaxUint64 {
		return math.MaxUint64
	}
	return uint64(v)
}

// tolerances returns the tolerance of each comparison.
func tolerances(set map[string]Tolerance) (map[*sample.Check]Tolerance, error) {
	all := map[*sample.Check]Tolerance{}
	used := map[string]bool{}
	for _, c := range sample.Checks {
		all[c] = defaultTolerances[c]
		patterns, err := patternsFor(set, c.Of.Name)
		if err != nil {
			return nil, fmt.Errorf("crosscheck_tolerance: %w", err)
		}
		for _, p := range patterns {
			used[p] = true
		}
		if len(patterns) > 0 {
			all[c] = set[patterns[0]]
		}
	}
	for p, t := range set {
		switch {
		case !used[p]:
			return nil, fmt.Errorf("crosscheck_tolerance: %q matches no meter that is compared with libvirt; those are %s", p, strings.Join(checkedNames(), ", "))
		case math.IsNaN(t.Relative) || t.Relative < 0 || t.Relative > 1:
			return nil, fmt.Errorf("crosscheck_tolerance: %q has the relative tolerance %v; it is a part, from 0 to 1", p, t.Relative)
		}
	}
	return all, nil
}

func checkedNames() (names []string) {
	for _, c := range sample.Checks {
		names = append(names, c.Of.Name)
	}
	return names
}

// patternsFor returns the keys that match the name of a meter, the one that
// holds first: the name itself, else the longest pattern.
func patternsFor[T any](set map[string]T, name string) ([]string, error) {
	var all []string
	for p := range set {
		if strings.HasPrefix(p, "!") {
			return nil, fmt.Errorf("%q: a pattern cannot exclude here; name what it is for", p)
		}
		m, err := sample.NewMatcher([]string{p})
		if err != nil {
			return nil, err
		}
		if m.Match(name) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b string) int {
		switch {
		case a == name:
			return -1
		case b == name:
			return 1
		}
		return cmp.Or(cmp.Compare(len(b), len(a)), strings.Compare(a, b))
	})
	return all, nil
}
