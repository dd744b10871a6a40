package local

import (
	"bytes"
	"fmt"
	"math"
	"slices"

	"github.com/kvmeter/kvmeter/central/store"
)

// pieces is how a query takes a series: as runs of rollups where those do, else
// as points.
type pieces struct {
	*plan
	from, to int64
	// cell numbers what the query tells apart: a run that begins and ends in the
	// same cell is taken as it is. What is outside is not wanted.
	cell func(t int64) int64
	// squares are wanted: runs without them do not do.
	squares bool
	head    func(h hour) []point // points of the heads that belong among the others; nil: none do
	run     func(t *target, r *run) error
	point   func(t *target, p *point) error

	rollup rollup
	points []point
}

// outside is the cell of what is not wanted.
const outside = math.MinInt64

// useRollups reports whether the filter can be decided for runs.
func (pl *plan) useRollups() bool {
	return !pl.predicate.Uses(store.FieldTime, store.FieldRecorded, store.FieldVolume, store.FieldID)
}

// runMatches reports whether the filter, which [plan.useRollups], selects a run.
func (pl *plan) runMatches(m *meter, r *run) bool {
	selects, _ := pl.series(m, pl.holders[r.holder], r.meta).Const()
	return selects
}

// days returns the days from one time to another that may have samples or
// rollups, and hours more of them.
func (v *view) days(from, to int64, more []hour) []day {
	var out []day
	add := func(d day) {
		if len(out) == 0 || out[len(out)-1] != d {
			out = append(out, d)
		}
	}
	for _, h := range v.hoursOf(from, to) {
		add(dayOf(h.start()))
	}
	for _, h := range more {
		add(dayOf(h.start()))
	}
	i, _ := slices.BinarySearch(v.rolled, dayOf(from))
	for ; i < len(v.rolled) && v.rolled[i] <= dayOf(to); i++ {
		add(v.rolled[i])
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// day takes what a series has of a day, oldest first; more are the hours of
// which there are points in the heads.
func (pc *pieces) day(t *target, d day, more []hour) error {
	from, to := max(pc.from, d.start()), min(pc.to, d.end())
	if t.born > to || t.end < from {
		return nil
	}
	if done, err := pc.wholeDay(t, d, more); err != nil || done {
		return err
	}
	base := hourOf(d.start())
	hours := pc.hoursOf(from, to)
	flushed := t.state.has && t.state.first <= to && t.state.last >= from
	// next takes the hours before h that have no rollups.
	i, k := 0, 0
	next := func(h hour) error {
		for {
			at := h
			if i < len(hours) && flushed {
				at = min(at, hours[i])
			}
			if k < len(more) {
				at = min(at, more[k])
			}
			if at == h {
				return nil
			}
			raw := i < len(hours) && hours[i] == at
			if raw {
				i++
			}
			if k < len(more) && more[k] == at {
				k++
			}
			if err := pc.raw(t, at, raw && flushed, at.start(), at.end()); err != nil {
				return err
			}
		}
	}
	for k < len(more) && more[k].end() < from {
		k++
	}
	end := k
	for end < len(more) && more[end].start() <= to {
		end++
	}
	more = more[:end]
	prefix := rollupKey(nil, base, t.meter.no, t.resource.no)
	prefix = prefix[:len(prefix)-1]
	first := append(slices.Clip(prefix), byte(hourOf(from)-base))
	it := pc.rollups
	for ok := it.SeekGE(first); ok && bytes.HasPrefix(it.Key(), prefix); ok = it.Next() {
		if len(it.Key()) != len(prefix)+1 {
			return errCorrupt
		}
		h := base + hour(it.Key()[len(prefix)])
		if h.start() > to {
			break
		}
		if err := next(h); err != nil {
			return err
		}
		raw := i < len(hours) && hours[i] == h
		if raw {
			i++
		}
		raw = raw && t.state.has && t.state.first <= h.end() // else they have expired
		if k < len(more) && more[k] == h {
			k++
		}
		value, err := it.ValueAndErr()
		if err != nil {
			return fmt.Errorf("read rollup: %w", err)
		}
		if err := pc.rolledHour(t, h, value, raw); err != nil {
			return err
		}
	}
	if err := it.Error(); err != nil {
		return fmt.Errorf("read rollup: %w", err)
	}
	return next(math.MaxInt64)
}

// rolledHour takes an hour that has rollups; raw says whether there are chunks.
func (pc *pieces) rolledHour(t *target, h hour, value []byte, raw bool) error {
	if pc.head != nil && len(pc.head(h)) > 0 {
		if raw {
			return pc.raw(t, h, true, h.start(), h.end())
		}
		if err := pc.raw(t, h, false, h.start(), h.end()); err != nil { // late ones, after the others have expired
			return err
		}
	}
	if raw {
		if pending, err := pc.isPending(h, t.resource.no); err != nil {
			return err
		} else if pending {
			return pc.raw(t, h, true, h.start(), h.end())
		}
	}
	if isNone(value) {
		if !raw {
			return nil
		}
		return pc.raw(t, h, true, h.start(), h.end())
	}
	if err := pc.rollup.decodeCoarse(value, h, t.meter.Kind); err != nil {
		return err
	}
	if len(pc.rollup.coarse) > 0 && pc.fit(pc.rollup.coarse) {
		return pc.take(t, pc.rollup.coarse)
	}
	if err := pc.rollup.decodeFine(value, h, t.meter.Kind); err != nil {
		return err
	}
	for runs := pc.rollup.fine; len(runs) > 0; {
		bucket := floorDiv(runs[0].first, fineLength)
		n := 1
		for n < len(runs) && floorDiv(runs[n].first, fineLength) == bucket {
			n++
		}
		var err error
		if !raw || pc.fit(runs[:n]) {
			err = pc.take(t, runs[:n])
		} else {
			err = pc.raw(t, h, true, bucket*fineLength, (bucket+1)*fineLength-1)
		}
		if err != nil {
			return err
		}
		runs = runs[n:]
	}
	return nil
}

// fit reports whether each run is in one cell and has what is wanted.
func (pc *pieces) fit(runs []run) bool {
	for i := range runs {
		r := &runs[i]
		c := pc.cell(r.first)
		if c != pc.cell(r.last) || pc.squares && c != outside && math.IsNaN(r.squares) {
			return false
		}
	}
	return true
}

// take passes runs on, each as a part of the cell in which it begins.
func (pc *pieces) take(t *target, runs []run) error {
	if err := pc.checkRuns(runs); err != nil {
		return err
	}
	for i := range runs {
		if pc.cell(runs[i].first) == outside {
			continue
		}
		if err := pc.run(t, &runs[i]); err != nil {
			return err
		}
	}
	return nil
}

// raw passes the points of an hour on.
func (pc *pieces) raw(t *target, h hour, flushed bool, from, to int64) error {
	from, to = max(from, pc.from), min(to, pc.to)
	pc.points = pc.points[:0]
	if flushed {
		if err := pc.eachChunk(h, t.meter.no, t.resource.no, from, to, func(value []byte, _, _ int64, p part) (err error) {
			pc.points, err = pc.plan.points(pc.points, value, h, t.resource.no, p, from, to)
			return err
		}); err != nil {
			return err
		}
	}
	if pc.head != nil {
		pc.points = append(pc.points, pc.head(h)...)
	}
	byTime(pc.points)
	for i := range pc.points {
		if pc.cell(pc.points[i].time) == outside {
			continue
		}
		if err := pc.point(t, &pc.points[i]); err != nil {
			return err
		}
	}
	return nil
}
