package local

import (
	"context"
	"errors"
	"math"
	"slices"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// each calls visit with the points that match, in no order. skip says which
// chunks of a target need not be read, by the times of their oldest and newest
// sample; nil: none.
func (pl *plan) each(targets []target, skip func(t *target, first, last int64) bool, visit func(t *target, p *point) error) error {
	var points []point
	pass := func(t *target) error {
		for i := range points {
			ok, err := pl.matches(t.meter, &points[i])
			if err == nil && ok {
				err = visit(t, &points[i])
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	for n, d := range pl.hoursOf(pl.from, pl.to) {
		for i := range targets {
			t := &targets[i]
			if (i+n)%256 == 0 && pl.ctx.Err() != nil {
				return pl.ctx.Err()
			}
			if !t.state.has || t.state.first > d.end() || t.state.last < d.start() {
				continue
			}
			err := pl.eachChunk(d, t.meter.no, t.resource.no, pl.from, pl.to, func(value []byte, first, last int64, p part) (err error) {
				if skip != nil && skip(t, first, last) {
					return nil
				}
				if points, err = pl.points(points[:0], value, d, t.resource.no, p, pl.from, pl.to); err != nil {
					return err
				}
				return pass(t)
			})
			if err != nil {
				return err
			}
		}
	}
	return pl.inHeads(targets, func(t *target, p *point) error {
		ok, err := pl.matches(t.meter, p)
		if err == nil && ok {
			err = visit(t, p)
		}
		return err
	})
}

// Statistics implements [store.Store].
func (s *Store) Statistics(ctx context.Context, q store.StatisticsQuery) (_ []store.Statistics, err error) {
	if err := q.Check(); err != nil {
		return nil, err
	}
	p, err := store.Compile(q.Filter)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	v, err := s.view(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	pl := v.plan(p)
	targets := pl.targets(pl.useRollups())
	a := &aggregator{plan: pl, query: &q, groups: map[string]*group{}, series: map[fixedKey]*group{}}
	a.byMetadata = slices.ContainsFunc(q.GroupBy, func(g store.Group) bool { return g.Field == store.FieldMetadata })
	switch {
	case q.Start != nil:
		a.start = *q.Start
	case q.Period > 0:
		if a.start, err = pl.first(targets); err != nil {
			return nil, err
		}
	}
	if err := pl.pieces(targets, a.cell, !q.NoSquares, nil, a.addRun, a.addPoint); err != nil {
		return nil, err
	}
	return a.rows(), nil
}

// pieces calls onRun and onPoint with what matches: all of it in runs of one cell
// and in points. It ends where after, which is called after each day, says that
// no more is wanted.
func (pl *plan) pieces(targets []target, cell func(int64) int64, squares bool, after func() bool, onRun func(*target, *run) error, onPoint func(*target, *point) error) error {
	if !pl.useRollups() {
		return pl.each(targets, nil, onPoint)
	}
	pc := &pieces{
		plan: pl, from: pl.from, to: pl.to, squares: squares,
		cell: func(t int64) int64 {
			if t < pl.from || t > pl.to {
				return outside
			}
			return cell(t)
		},
		run: func(t *target, r *run) error {
			if !pl.runMatches(t.meter, r) {
				return nil
			}
			return onRun(t, r)
		},
	}
	pc.point = func(t *target, p *point) error {
		ok, err := pl.matches(t.meter, p)
		if err == nil && ok {
			err = onPoint(t, p)
		}
		return err
	}
	for n, d := range pl.days(pl.from, pl.to, nil) {
		for i := range targets {
			if (i+n)%256 == 0 && pl.ctx.Err() != nil {
				return pl.ctx.Err()
			}
			if err := pc.day(&targets[i], d, nil); err != nil {
				return err
			}
		}
		if after != nil && after() {
			break
		}
	}
	return pl.inHeads(targets, pc.point)
}

// inHeads calls visit with the points of the plan's time that are not flushed.
func (pl *plan) inHeads(targets []target, visit func(t *target, p *point) error) error {
	var points []point
	for i := range targets {
		if i%256 == 0 && pl.ctx.Err() != nil {
			return pl.ctx.Err()
		}
		t := &targets[i]
		points = pl.headPoints(points[:0], t.resource, t.meter, pl.from, pl.to)
		for k := range points {
			if err := visit(t, &points[k]); err != nil {
				return err
			}
		}
	}
	return nil
}

// first returns the time of the oldest match.
func (pl *plan) first(targets []target) (int64, error) {
	first := int64(math.MaxInt64)
	add := func(t int64) { first = min(first, t) }
	found := func() bool { return first < math.MaxInt64 }
	err := pl.pieces(targets, func(int64) int64 { return 0 }, false, found,
		func(_ *target, r *run) error { add(r.first); return nil },
		func(_ *target, p *point) error { add(p.time); return nil })
	return first, err
}

// aggregator sorts points into groups and buckets.
type aggregator struct {
	*plan
	query *store.StatisticsQuery
	start int64 // of bucket 0
	count int   // of buckets

	groups     map[string]*group // by the texts of the group and the unit
	series     map[fixedKey]*group
	byMetadata bool // the groups are
	key        []byte
}

// group holds the buckets of one group and unit.
type group struct {
	values  []*string
	unit    string
	buckets map[int64]*bucket
	number  int64 // of last
	last    *bucket
}

type bucket struct {
	store.Statistics
	mean     float64
	sum      store.Exact
	distinct []map[string]bool
}

// cell tells the buckets apart.
func (a *aggregator) cell(t int64) int64 { return a.query.Bucket(t, a.start) }

func (a *aggregator) addPoint(t *target, p *point) error {
	if b := a.bucket(t, p.holder, p.meta, p.time); b != nil {
		b.add(sample.Volume{Bits: p.bits, Tag: p.tag}, p.time)
	}
	return a.full()
}

func (a *aggregator) addRun(t *target, r *run) error {
	if b := a.bucket(t, r.holder, r.meta, r.first); b != nil {
		b.addRun(r)
	}
	return a.full()
}

// full returns an error when there are more rows than may be.
func (a *aggregator) full() error {
	if a.query.MaxRows > 0 && a.count > a.query.MaxRows {
		return store.ErrTooManyRows
	}
	return nil
}

// bucket returns the bucket of a time in the group of a holder and metadata; nil
// where that lacks a key.
func (a *aggregator) bucket(t *target, holder, meta uint32, at int64) *bucket {
	g := a.group(t, holder, meta)
	if g == nil {
		return nil
	}
	k := a.cell(at)
	b := g.last
	if b == nil || g.number != k {
		if b = g.buckets[k]; b == nil {
			b = &bucket{}
			b.Group, b.Unit, b.Bucket, b.Start = g.values, g.unit, k, a.start
			b.First, b.Last = at, at
			g.buckets[k] = b
			a.count++
		}
		g.number, g.last = k, b
	}
	if len(a.query.Cardinality) > 0 {
		a.distinct(b, t, holder)
	}
	return b
}

// add takes a volume: the sum is exact, the squares are by Welford's method, so
// that large counters do not lose their small differences.
func (b *bucket) add(v sample.Volume, t int64) {
	f := v.Float64()
	b.Count++
	if b.Count == 1 {
		b.Min, b.Max = v, v
	} else {
		if store.Compare(v, b.Min) < 0 {
			b.Min = v
		}
		if store.Compare(v, b.Max) > 0 {
			b.Max = v
		}
	}
	b.First, b.Last = min(b.First, t), max(b.Last, t)
	b.sum.AddVolume(v)
	d := f - b.mean
	b.mean += d / float64(b.Count)
	b.SumSquares += d * (f - b.mean)
}

// addRun takes all volumes of a run.
func (b *bucket) addRun(r *run) {
	if b.Count == 0 {
		b.Min, b.Max = r.minVolume, r.maxVolume
	} else {
		if store.Compare(r.minVolume, b.Min) < 0 {
			b.Min = r.minVolume
		}
		if store.Compare(r.maxVolume, b.Max) > 0 {
			b.Max = r.maxVolume
		}
	}
	b.First, b.Last = min(b.First, r.first), max(b.Last, r.last)
	b.sum.Add(r.sum)
	n, m := float64(b.Count), float64(r.count)
	d := r.mean - b.mean
	b.Count += r.count
	b.mean += d * m / (n + m)
	b.SumSquares += r.squares + d*d*n*m/(n+m)
}

func (a *aggregator) distinct(b *bucket, t *target, holder uint32) {
	if b.distinct == nil {
		for range a.query.Cardinality {
			b.distinct = append(b.distinct, map[string]bool{})
		}
	}
	for i, f := range a.query.Cardinality {
		if text := a.text(f, t, holder); text != "" && !b.distinct[i][text] {
			b.distinct[i][text] = true
		}
	}
}

// text returns the value of a field that is a name.
func (a *aggregator) text(f store.Field, t *target, holder uint32) string {
	h := a.holders[holder]
	switch f {
	case store.FieldMeter:
		return t.meter.Name
	case store.FieldKind:
		return string(t.meter.Kind)
	case store.FieldUnit:
		return t.meter.Unit
	case store.FieldResource:
		return h.resource.id
	case store.FieldProject:
		return h.project
	case store.FieldUser:
		return h.user
	}
	return h.source
}

// group returns the group of a holder and metadata; nil where that lacks a key.
func (a *aggregator) group(t *target, holder, meta uint32) *group {
	series := fixedKey{meter: t.meter.no, holder: holder}
	if a.byMetadata {
		series.meta = meta
	}
	if g, ok := a.series[series]; ok {
		return g
	}
	if len(a.series) > 1<<16 {
		clear(a.series)
	}
	a.series[series] = nil
	values := make([]*string, 0, len(a.query.GroupBy))
	a.key = append(a.key[:0], t.meter.Unit...)
	for _, by := range a.query.GroupBy {
		var value *string
		if by.Field == store.FieldMetadata {
			v, ok := a.document(meta).Lookup(by.Key)
			if !ok {
				return nil
			}
			value = store.Text(v)
		} else if text := a.text(by.Field, t, holder); text != "" {
			value = &text
		}
		if value == nil {
			a.key = append(a.key, 0)
		} else {
			a.key = append(append(a.key, 0, 1), *value...)
		}
		values = append(values, value)
	}
	g := a.groups[string(a.key)]
	if g == nil {
		g = &group{values: values, unit: t.meter.Unit, buckets: map[int64]*bucket{}}
		if len(values) == 0 {
			g.values = nil
		}
		a.groups[string(a.key)] = g
	}
	a.series[series] = g
	return g
}

func (a *aggregator) rows() []store.Statistics {
	var out []store.Statistics
	for _, g := range a.groups {
		for _, b := range g.buckets {
			b.Sum = b.sum.Float64()
			if a.query.NoSquares {
				b.SumSquares = 0
			}
			if a.query.Period == 0 {
				b.Start = b.First
			}
			for _, d := range b.distinct {
				b.Cardinality = append(b.Cardinality, int64(len(d)))
			}
			out = append(out, b.Statistics)
		}
	}
	store.SortStatistics(out)
	return out
}
