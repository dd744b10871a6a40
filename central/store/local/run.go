package local

import (
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// run is what is kept of consecutive samples of a series that have the holder,
// metadata, origin and node in common.
type run struct {
	first, last                int64 // times
	count                      int64
	holder, meta, origin, node uint32
	firstVolume, lastVolume    sample.Volume
	minVolume, maxVolume       sample.Volume
	sum                        store.Exact
	mean, squares              float64     // squares of the distances to the mean
	steps                      store.Exact // of a cumulative meter: what it went up by, as usage counts it
	area                       store.Exact // of a gauge: volume * µs until the last sample
}

// runOf returns the run of one point.
func runOf(p *point) run {
	v := sample.Volume{Bits: p.bits, Tag: p.tag}
	r := run{
		first: p.time, last: p.time, count: 1, holder: p.holder, meta: p.meta, origin: p.origin, node: p.node,
		firstVolume: v, lastVolume: v, minVolume: v, maxVolume: v, mean: v.Float64(),
	}
	r.sum.AddVolume(v)
	return r
}

// continues reports whether a point belongs to the run.
func (r *run) continues(p *point) bool {
	return r.holder == p.holder && r.meta == p.meta && r.origin == p.origin && r.node == p.node
}

// add takes the next point of the run.
func (r *run) add(p *point, kind sample.Kind, known bool) {
	v := sample.Volume{Bits: p.bits, Tag: p.tag}
	switch kind {
	case sample.Cumulative:
		before := r.lastVolume
		if known {
			before = r.maxVolume
		}
		r.steps.Add(step(before, v, known))
	case sample.Gauge:
		r.area.AddProduct(r.lastVolume, p.time-r.last)
	}
	r.last, r.lastVolume = p.time, v
	r.count++
	if store.Compare(v, r.minVolume) < 0 {
		r.minVolume = v
	}
	if store.Compare(v, r.maxVolume) > 0 {
		r.maxVolume = v
	}
	r.sum.AddVolume(v)
	f := v.Float64()
	d := f - r.mean
	r.mean += d / float64(r.count)
	r.squares += d * (f - r.mean)
}

// rise is what a run of a cumulative meter adds to what came before: that ended at a
// volume, and was never above high.
func (r *run) rise(last, high sample.Volume, known bool) store.Exact {
	if known {
		return step(high, r.maxVolume, known)
	}
	e := step(last, r.firstVolume, known)
	e.Add(r.steps)
	return e
}

// step is what a cumulative meter adds: by what exceeds the highest volume before, or
// where its incarnation is not known the one before, below which it started anew.
func step(before, v sample.Volume, known bool) (e store.Exact) {
	switch {
	case store.Compare(v, before) >= 0:
		e.AddVolume(v)
		e.Sub(exact(before))
	case !known:
		e.AddVolume(v)
	}
	return e
}

func exact(v sample.Volume) (e store.Exact) {
	e.AddVolume(v)
	return e
}
