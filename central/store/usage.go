package store

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// Hold is how long a gauge's value is taken to last when no other follows:
// between samples further apart nothing is known.
const Hold = time.Hour

// StartWithin is how long after the first sample of an incarnation the first
// sample of one of its meters may come to be counted from zero.
const StartWithin = time.Hour

// SettleWithin is how long after the first sample of a node all that it had before
// has been metered: meters that are polled seldom come minutes after the others.
const SettleWithin = 10 * time.Minute

// UsageQuery asks how much was used.
type UsageQuery struct {
	From, To int64 // µs: [From, To)
	// Filter names meters, resources, owners and metadata; it must not name a
	// time, a volume or an id.
	Filter Filter
	// SplitBy are paths in the metadata: usage is told apart by their values.
	SplitBy []string
}

// Usage is how much of a meter a project used of a resource.
//
// What a sample adds belongs to the owner and the metadata that it has. A
// cumulative meter adds what it exceeds the highest before it, which may be from
// before the period, of the same incarnation: where a node's clock was set back, samples
// of two times lie between each other. The first sample of an
// incarnation adds all of its volume, as that began with zero: if the node was
// metered [SettleWithin] before, by its samples or as it tells ([sample.Batch.Since]), and the sample came within [StartWithin] of the
// incarnation's first. Foreign samples, of which no incarnation is known, add the
// difference to the sample before; those that go back started anew, from zero. A
// delta adds its volume. A gauge adds its volume multiplied by
// the µs of the period until the next sample of the same incarnation, unless
// that is more than [Hold] away.
type Usage struct {
	sample.MeterRef
	Resource, Source, Project string
	Split                     []*string // values of SplitBy as by [Text]; nil where unknown or missing
	// Quantity is in the meter's unit, of a gauge in its unit multiplied by µs.
	// No rounding: the quantities of the parts of a period add up to its own.
	Quantity Exact
	Count    int64 // samples in the period
	// First and Last are the times of the first and the last sample that
	// counted; for one from before the period the beginning of that.
	First, Last int64
	Covered     int64           // µs of the period that the quantity is known for
	Origins     []sample.Origin // of the samples, sorted
	Nodes       []string        // that sent them, sorted
	Gaps        []sample.Gap    // that overlap the period and are about this meter and resource or node
}

// FromZero reports whether a first sample at a time is counted from zero, given when
// the node and the incarnation were first metered. All are µs.
func FromZero(at, node, incarnation int64) bool {
	return incarnation-node >= SettleWithin.Microseconds() && at-incarnation <= StartWithin.Microseconds()
}

// Check returns an error for a query that no engine can answer.
func (q *UsageQuery) Check() error {
	if q.From >= q.To {
		return fmt.Errorf("usage: the period from %d to %d is empty", q.From, q.To)
	}
	return nil
}

// CheckUsage returns an error for a filter that [Store.Usage] does not take.
func (p *Predicate) CheckUsage() error {
	if p.Uses(FieldTime, FieldRecorded, FieldVolume, FieldID) {
		return fmt.Errorf("usage: samples are not selected by time, volume or id")
	}
	return nil
}

// SortUsage puts rows of a resource into the order that [Store.Usage] promises.
func SortUsage(rows []Usage) {
	slices.SortFunc(rows, func(a, b Usage) int {
		return cmp.Or(
			strings.Compare(a.Resource, b.Resource), strings.Compare(a.Name, b.Name), strings.Compare(string(a.Kind), string(b.Kind)),
			strings.Compare(a.Unit, b.Unit), strings.Compare(a.Project, b.Project), strings.Compare(a.Source, b.Source),
			slices.CompareFunc(a.Split, b.Split, compareText),
		)
	})
}

// GapsOf returns the gaps that are about the usage.
func (u *Usage) GapsOf(gaps []sample.Gap) []sample.Gap {
	var out []sample.Gap
	for _, g := range gaps {
		if (g.Meter == "*" || g.Meter == u.Name) && (g.Resource == u.Resource || g.Resource == "*" && slices.Contains(u.Nodes, g.Node)) {
			out = append(out, g)
		}
	}
	return out
}
