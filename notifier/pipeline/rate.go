package pipeline

import (
	"time"

	"github.com/kvmeter/kvmeter/notifier/pipeline/python"
	"github.com/kvmeter/kvmeter/sample"
)

// series is what delta and rate_of_change tell apart, as Ceilometer does.
type series struct{ name, resource string }

// point is the last sample of a series.
type point struct {
	volume       sample.Volume
	time         int64
	monotonic    float64
	hasMonotonic bool
	incarnation  sample.Incarnation
}

func pointOf(it *Item) point {
	p := point{volume: it.Volume, time: it.Time, incarnation: it.Incarnation}
	if it.Foreign != nil {
		p.monotonic, p.hasMonotonic = it.Foreign.Monotonic, it.Foreign.HasMonotonic
	}
	return p
}

// since returns the seconds that passed from q to p.
func (p *point) since(q *point, monotonic bool) float64 {
	if monotonic && p.hasMonotonic && q.hasMonotonic {
		return p.monotonic - q.monotonic
	}
	return float64(p.time-q.time) / 1e6
}

// change is the growth of a series' volume. A counter whose holder is a new
// one began at zero.
func (p *point) change(q *point, kind sample.Kind) (python.Number, error) {
	if kind == sample.Cumulative && p.incarnation != q.incarnation {
		return python.FromVolume(p.volume), nil
	}
	return python.Sub(python.FromVolume(p.volume), python.FromVolume(q.volume))
}

// seriesMemory is the state of delta and rate_of_change: the last point of each
// series.
type seriesMemory struct{ last *memory[series, point] }

func (s *seriesMemory) begin(now, _ time.Time)         { s.last.begin(now) }
func (s *seriesMemory) flush(func(*Item), func(error)) {}
func (s *seriesMemory) track()                         { s.last.tracked, s.last.changed = true, nil }
func (s *seriesMemory) changes(w *writer)              { s.last.write(w, writePoint) }
func (s *seriesMemory) all(op func(func(*writer)))     { s.last.all(op, writePoint) }
func (s *seriesMemory) load(r *reader)                 { s.last.load(r, readPoint) }

func writePoint(w *writer, s series, p point) {
	w.string(s.name)
	w.string(s.resource)
	w.volume(p.volume)
	w.int(p.time)
	w.fixed(uint64(p.incarnation))
	w.bool(p.hasMonotonic)
	if p.hasMonotonic {
		w.float(p.monotonic)
	}
}

func readPoint(r *reader) (s series, p point) {
	s.name, s.resource = r.string(), r.string()
	p.volume, p.time, p.incarnation = r.volume(), r.int(), sample.Incarnation(r.fixed())
	if p.hasMonotonic = r.bool(); p.hasMonotonic {
		p.monotonic = r.float()
	}
	return s, p
}

// delta is the stage of that name: the change since the series' last sample.
// The first sample of a series gives nothing, and neither does one that is older
// than the last.
type delta struct {
	conversion
	growthOnly bool
	seriesMemory
}

func (d *delta) process(it *Item) (bool, error) {
	key, now := series{it.Name, it.Resource}, pointOf(it)
	last, ok := d.last.get(key)
	switch {
	case !ok:
		d.last.set(key, now)
		return false, errFirst
	case now.since(&last, false) < 0:
		return false, errLate
	}
	d.last.set(key, now)
	change, err := now.change(&last, it.Kind)
	if err != nil {
		return false, err
	}
	if order, _ := python.Compare(change, python.Number{}); d.growthOnly && order < 0 {
		return false, errShrank
	}
	if it.Volume, err = change.Volume(); err != nil {
		return false, err
	}
	unit := it.Unit
	d.rename(it)
	it.Kind, it.Unit = sample.Delta, unit
	it.renew()
	return true, nil
}

// rate is the stage rate_of_change: the change a second since the series' last
// sample, scaled. A cumulative meter that went down was reset, so its volume is
// the growth at least.
type rate struct {
	conversion
	seriesMemory
}

func (r *rate) process(it *Item) (bool, error) {
	key, now := series{it.Name, it.Resource}, pointOf(it)
	last, ok := r.last.get(key)
	if !ok {
		r.last.set(key, now)
		return false, errFirst
	}
	seconds := now.since(&last, true)
	if seconds < 0 {
		return false, errLate
	}
	r.last.set(key, now)
	change, err := now.change(&last, it.Kind)
	if order, _ := python.Compare(change, python.Number{}); err == nil && order < 0 && it.Kind == sample.Cumulative {
		change = python.FromVolume(it.Volume)
	}
	perSecond := python.Float(0)
	if err == nil && seconds != 0 {
		if change, err = python.Mul(python.Float(1), change); err == nil {
			perSecond, err = python.Div(change, python.Float(seconds))
		}
	}
	if err == nil {
		err = r.convert(it, perSecond)
	}
	return err == nil, err
}
