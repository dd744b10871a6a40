package local

import (
	"context"
	"errors"
	"math"

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
	for n, d := range pl.days {
		if d.end() < pl.from || d.start() > pl.to {
			continue
		}
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
	for i := range targets {
		if i%256 == 0 && pl.ctx.Err() != nil {
			return pl.ctx.Err()
		}
		t := &targets[i]
		points = pl.headPoints(points[:0], t.resource, t.meter, pl.from, pl.to)
		if err := pass(t); err != nil {
			return err
		}
	}
	return nil
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
	targets := pl.targets()
	a := &aggregator{plan: pl, query: &q, groups: map[string]*group{}, series: map[fixedKey]*group{}}
	switch {
	case q.Start != nil:
		a.start = *q.Start
	case q.Period > 0:
		if a.start, err = pl.first(targets); err != nil {
			return nil, err
		}
	}
	if err := pl.each(targets, nil, a.add); err != nil {
		return nil, err
	}
	return a.rows(), nil
}

// first returns the time of the oldest match. It reads the chunks that begin
// before the oldest match known so far.
func (pl *plan) first(targets []target) (int64, error) {
	first := int64(math.MaxInt64)
	skip := func(_ *target, from, _ int64) bool { return from >= first }
	err := pl.each(targets, skip, func(_ *target, p *point) error {
		first = min(first, p.time)
		return nil
	})
	return first, err
}

// aggregator sorts points into groups and buckets.
type aggregator struct {
	*plan
	query *store.StatisticsQuery
	start int64 // of bucket 0

	groups map[string]*group   // by the texts of the group and the unit
	series map[fixedKey]*group // where metadata makes no difference
	key    []byte
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
	rest     float64 // what Sum has lost to rounding
	distinct []map[string]bool
}

func (a *aggregator) add(t *target, p *point) error {
	g := a.group(t, p)
	if g == nil {
		return nil
	}
	k := a.query.Bucket(p.time, a.start)
	b := g.last
	if b == nil || g.number != k {
		if b = g.buckets[k]; b == nil {
			b = &bucket{}
			b.Group, b.Unit, b.Bucket, b.Start = g.values, g.unit, k, a.start
			b.First, b.Last = p.time, p.time
			g.buckets[k] = b
		}
		g.number, g.last = k, b
	}
	b.add(sample.Volume{Bits: p.bits, Tag: p.tag}, p.time)
	if len(a.query.Cardinality) > 0 {
		a.distinct(b, t, p)
	}
	return nil
}

// add takes a volume: the sum by Neumaier's method, the squares by Welford's,
// so that large counters do not lose their small differences.
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
	sum := b.Sum + f
	if math.Abs(b.Sum) >= math.Abs(f) {
		b.rest += (b.Sum - sum) + f
	} else {
		b.rest += (f - sum) + b.Sum
	}
	b.Sum = sum
	d := f - b.mean
	b.mean += d / float64(b.Count)
	b.SumSquares += d * (f - b.mean)
}

func (a *aggregator) distinct(b *bucket, t *target, p *point) {
	if b.distinct == nil {
		for range a.query.Cardinality {
			b.distinct = append(b.distinct, map[string]bool{})
		}
	}
	for i, f := range a.query.Cardinality {
		if text := a.text(f, t, p); text != "" && !b.distinct[i][text] {
			b.distinct[i][text] = true
		}
	}
}

// text returns the value of a field that is a name.
func (a *aggregator) text(f store.Field, t *target, p *point) string {
	h := a.holders[p.holder]
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

// group returns the group of a point; nil where the metadata lacks a key.
func (a *aggregator) group(t *target, p *point) *group {
	series := fixedKey{t.meter.no, p.holder}
	if g := a.series[series]; g != nil {
		return g
	}
	values := make([]*string, 0, len(a.query.GroupBy))
	byMetadata := false
	a.key = append(a.key[:0], t.meter.Unit...)
	for _, by := range a.query.GroupBy {
		var value *string
		if by.Field == store.FieldMetadata {
			byMetadata = true
			v, ok := a.document(p.meta).Lookup(by.Key)
			if !ok {
				return nil
			}
			value = store.Text(v)
		} else if text := a.text(by.Field, t, p); text != "" {
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
	if !byMetadata {
		a.series[series] = g
	}
	return g
}

func (a *aggregator) rows() []store.Statistics {
	var out []store.Statistics
	for _, g := range a.groups {
		for _, b := range g.buckets {
			b.Sum += b.rest
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
