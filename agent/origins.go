package agent

import (
	"fmt"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// billing says who may count what is billed. Bits are indexes of usageMeters,
// vcpuMeters and nicMeters.
type billing struct {
	order        []sample.Origin          // of the readers of processes, best first
	usage        map[sample.Origin]uint32 // what each of them may count
	vcpu         map[sample.Origin]uint32 // the same of a vCPU's meters
	usageLibvirt uint32                   // what libvirt may count
	usageFirst   uint32                   // what libvirt counts before the readers do
	nicRTNL      uint32
	nicLibvirt   uint32
	nicFirst     uint32
}

// readerOrigins are those of one reading that gives all of a process's usage.
var readerOrigins = []sample.Origin{sample.Walk, sample.Iter, sample.CPUClock}

// newBilling checks the setting origins, and fills it with the catalogue's
// order where it says nothing.
func newBilling(set map[string][]sample.Origin) (*billing, error) {
	b := &billing{usage: map[sample.Origin]uint32{}, vcpu: map[sample.Origin]uint32{}}
	var said [][]sample.Origin             // orders that were asked for
	counts := map[string][]sample.Origin{} // who can count what a pattern matches
	for _, m := range sample.Catalogue {
		list := m.Origins
		patterns, err := patternsFor(set, m.Name)
		if err != nil {
			return nil, fmt.Errorf("origins: %w", err)
		}
		for _, p := range patterns {
			counts[p] = append(counts[p], m.Origins...)
		}
		if len(patterns) > 0 {
			// A pattern may match meters of other origins too: those keep them.
			if kept := common(set[patterns[0]], m.Origins); len(kept) > 0 {
				list = kept
				said = append(said, list)
			}
		}
		b.add(m, list)
	}
	for p, list := range set {
		if err := allowed(p, list, counts[p]); err != nil {
			return nil, err
		}
	}
	var err error
	b.order, err = merge(said)
	return b, err
}

// common returns those of a list that are in another.
func common(list, other []sample.Origin) (all []sample.Origin) {
	for _, o := range list {
		if slices.Contains(other, o) {
			all = append(all, o)
		}
	}
	return all
}

// allowed returns an error where the list of a pattern is not one of origins of
// the meters that it matches.
func allowed(pattern string, list, counts []sample.Origin) error {
	var can []sample.Origin
	for _, o := range counts {
		if !slices.Contains(can, o) {
			can = append(can, o)
		}
	}
	switch {
	case len(can) == 0:
		return fmt.Errorf("origins: no meter has the name or pattern %q; docs/meters.md lists them", pattern)
	case len(list) == 0:
		return fmt.Errorf("origins: %q has no origin: it can be billed from %s", pattern, originNames(can))
	}
	for i, o := range list {
		switch {
		case !slices.Contains(can, o):
			return fmt.Errorf("origins: %q cannot be billed from %q, which does not count the same; it can from %s", pattern, o, originNames(can))
		case slices.Contains(list[:i], o):
			return fmt.Errorf("origins: %q has %s twice", pattern, o)
		}
	}
	return nil
}

func originNames(origins []sample.Origin) string {
	texts := make([]string, len(origins))
	for i, o := range origins {
		texts[i] = string(o)
	}
	return strings.Join(texts, ", ")
}

// add notes who may count a meter.
func (b *billing) add(m *sample.Meter, list []sample.Origin) {
	usage, nic := bit(usageMeters[:], m), bit(nicMeters[:], m)
	for _, o := range list {
		switch o {
		case sample.Libvirt:
			b.usageLibvirt |= usage
			b.nicLibvirt |= nic
		case sample.RTNL:
			b.nicRTNL |= nic
		default:
			b.usage[o] |= usage
			b.vcpu[o] |= bit(vcpuMeters[:], m)
		}
	}
	if list[0] == sample.Libvirt {
		b.usageFirst |= usage
		b.nicFirst |= nic
	}
}

// merge returns an order of the readers that agrees with all lists: one reading
// gives all of a process's meters. Without a list it is the best.
func merge(lists [][]sample.Origin) ([]sample.Origin, error) {
	for _, p := range [][3]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		order := []sample.Origin{readerOrigins[p[0]], readerOrigins[p[1]], readerOrigins[p[2]]}
		if !slices.ContainsFunc(lists, func(l []sample.Origin) bool { return !follows(l, order) }) {
			return order, nil
		}
	}
	return nil, fmt.Errorf("origins: the lists have %s in different orders; one reading gives cpu, cpu.* and disk.host.*, so let all have the same order, or leave some out", originNames(readerOrigins))
}

// follows reports whether what the list has of order comes in that order.
func follows(list, order []sample.Origin) bool {
	at := -1
	for _, o := range list {
		i := slices.Index(order, o)
		if i >= 0 && i < at {
			return false
		}
		at = max(at, i)
	}
	return true
}

// sort returns the readers in the order in which they are asked: those that may
// count nothing last, since what they say is at least seen in kvmeter top.
func (b *billing) sort(readers []collectors.UsageReader) []collectors.UsageReader {
	place := func(r collectors.UsageReader) int {
		o := sample.Origin(r.Origin())
		if b.usage[o] == 0 {
			return len(b.order)
		}
		return slices.Index(b.order, o)
	}
	readers = slices.Clone(readers)
	slices.SortStableFunc(readers, func(x, y collectors.UsageReader) int { return place(x) - place(y) })
	return readers
}
