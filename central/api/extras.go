package api

import (
	"context"
	"slices"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// percentiles are the aggregates that are one.
var percentiles = map[string]int{"p50": 50, "p95": 95, "p99": 99}

// isExtra reports whether an aggregate is one that only kvmeter has. Extras are made of
// raw samples, of which rollups do not tell.
func isExtra(a aggregate) bool {
	return a.function == "last" || a.function == "rate" || percentiles[a.function] != 0
}

// maxExtras bounds the samples of a request for such aggregates.
const maxExtras = 1_000_000

// extra is what the samples of a row of statistics come to, the newest first.
type extra struct {
	last   sample.Volume
	at     int64     // of last
	values []float64 // nil: they are not asked for
	series map[seriesKey]*growth
}

// seriesKey tells the series of a meter and unit apart.
type seriesKey struct {
	kind                            sample.Kind
	resource, source, project, user string
}

// growth is by how much a series grew from its oldest sample so far to its newest.
type growth struct {
	newest, oldest int64
	volume         sample.Volume // of the oldest
	incarnation    sample.Incarnation
	total          float64
}

// extras returns the extra aggregates of rows, by position.
func (s *server) extras(ctx context.Context, ask *store.StatisticsQuery, selected []aggregate, rows []store.Statistics) ([]extra, error) {
	if !slices.ContainsFunc(selected, isExtra) || len(rows) == 0 {
		return nil, nil
	}
	spread := slices.ContainsFunc(selected, func(a aggregate) bool { return percentiles[a.function] != 0 })
	all := make([]extra, len(rows))
	byRow := make(map[string]*extra, len(rows))
	for i := range rows {
		byRow[store.RowKey(rows[i].Bucket, rows[i].Group, rows[i].Unit)] = &all[i]
	}
	n := 0
	err := s.eachSample(ctx, ask.Filter, func(smp *store.Sample) (bool, error) {
		if n++; n > maxExtras {
			return false, badRequest("More than %d samples match, too many for last, rate and percentiles: ask for less time.", maxExtras)
		}
		group, ok := store.GroupOf(smp, ask.GroupBy)
		if !ok {
			return true, nil
		}
		// A sample that came after the rows were made may be of none of them.
		if e := byRow[store.RowKey(ask.Bucket(smp.Time, rows[0].Start), group, smp.Unit)]; e != nil {
			e.add(smp, spread)
		}
		return true, nil
	})
	return all, err
}

// add takes a sample that is no newer than those before it.
func (e *extra) add(s *store.Sample, spread bool) {
	if e.series == nil {
		e.series, e.at = map[seriesKey]*growth{}, s.Time
	}
	if s.Time == e.at {
		e.last = s.Volume // of equal times the one stored last
	}
	if spread {
		e.values = append(e.values, s.Volume.Float64())
	}
	key := seriesKey{s.Kind, s.Resource, s.Source, s.Project, s.User}
	g := e.series[key]
	if g == nil {
		e.series[key] = &growth{newest: s.Time, oldest: s.Time, volume: s.Volume, incarnation: s.Incarnation}
		return
	}
	if s.Time == g.oldest {
		return // which of them came first says nothing of how it grew
	}
	switch {
	case s.Kind == sample.Delta, s.Kind == sample.Cumulative && (s.Incarnation != g.incarnation || store.Compare(g.volume, s.Volume) < 0):
		g.total += g.volume.Float64() // all of it is new
	default:
		g.total += minus(g.volume, s.Volume)
	}
	g.oldest, g.volume, g.incarnation = s.Time, s.Volume, s.Incarnation
}

// minus returns a-b, which counters beyond float64's integers keep exact.
func minus(a, b sample.Volume) float64 {
	if a.Tag == sample.U64 && b.Tag == sample.U64 && a.Bits >= b.Bits {
		return float64(a.Bits - b.Bits)
	}
	return a.Float64() - b.Float64()
}

// value returns an aggregate. ok is false for the rate of what has no two samples.
func (e *extra) value(function string) (v float64, ok bool) {
	switch function {
	case "last":
		return e.last.Float64(), e.series != nil
	case "rate":
		for _, g := range e.series {
			if g.newest > g.oldest {
				ok = true
				v += g.total / (float64(g.newest-g.oldest) / 1e6)
			}
		}
		return v, ok
	}
	if len(e.values) == 0 {
		return 0, false
	}
	slices.Sort(e.values)
	at := percentiles[function] * (len(e.values) - 1) // in hundredths
	below, above := e.values[at/100], e.values[(at+99)/100]
	return below + (above-below)*float64(at%100)/100, true
}
