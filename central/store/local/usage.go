package local

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// Usage implements [store.Store]. It goes from resource to resource, so that
// its memory does not grow with their number.
func (s *Store) Usage(ctx context.Context, q store.UsageQuery, yield func(store.Usage) bool) (err error) {
	p, err := store.Compile(q.Filter)
	if err != nil {
		return err
	}
	if err := cmp.Or(q.Check(), p.CheckUsage(), ctx.Err()); err != nil {
		return err
	}
	gaps, err := s.Gaps(ctx, q.From, q.To-1)
	if err != nil {
		return err
	}
	v, err := s.view(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	u := &usage{plan: v.plan(p), query: &q, gaps: gaps}
	u.resourceMeters()
	for len(u.targets) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := 1
		for n < len(u.targets) && u.targets[n].resource == u.targets[0].resource {
			n++
		}
		rows, err := u.resource(u.targets[:n])
		if err != nil {
			return err
		}
		for _, r := range rows {
			if !yield(r) {
				return nil
			}
		}
		u.targets = u.targets[n:]
	}
	return nil
}

// usage computes the usage of resources, one after the other.
type usage struct {
	*plan
	query   *store.UsageQuery
	gaps    []sample.Gap
	targets []target // by id of the resource

	rows   map[string]*usageRow
	key    []byte
	pieces pieces
}

// usageRow is a row of the answer with what is still to be named.
type usageRow struct {
	store.Usage
	origins, nodes map[uint32]bool
}

// chain is what one incarnation of a resource's meter has counted so far.
type chain struct {
	source      string
	incarnation sample.Incarnation
	born        int64
	last        *run // nil: none yet
	high        sample.Volume
}

// add takes the next run.
func (c *chain) add(r *run) {
	if c.last == nil || store.Compare(r.maxVolume, c.high) > 0 {
		c.high = r.maxVolume
	}
	c.last = r
}

func (u *usage) resourceMeters() {
	u.targets = u.plan.targets(true)
	slices.SortStableFunc(u.targets, func(a, b target) int { return strings.Compare(a.resource.id, b.resource.id) })
}

func (u *usage) resource(targets []target) ([]store.Usage, error) {
	u.rows = map[string]*usageRow{}
	for i := range targets {
		if err := u.meter(&targets[i]); err != nil {
			return nil, err
		}
	}
	var out []store.Usage
	for _, r := range u.rows {
		for o := range r.origins {
			r.Origins = append(r.Origins, u.origins[o])
		}
		for n := range r.nodes {
			r.Nodes = append(r.Nodes, u.nodes[n])
		}
		slices.Sort(r.Origins)
		slices.Sort(r.Nodes)
		r.Gaps = r.GapsOf(u.gaps)
		out = append(out, r.Usage)
	}
	store.SortUsage(out)
	return out, nil
}

// chains returns the chains of a resource.
func (u *usage) chains(r *resource) []*chain {
	u.s.mu.RLock()
	defer u.s.mu.RUnlock()
	var out []*chain
	for _, h := range r.holders {
		i := slices.IndexFunc(out, func(c *chain) bool { return c.source == h.source && c.incarnation == h.incarnation })
		if i < 0 {
			out = append(out, &chain{source: h.source, incarnation: h.incarnation, born: h.born})
			continue
		}
		out[i].born = min(out[i].born, h.born)
	}
	return out
}

func chainOf(chains []*chain, h *holder) *chain {
	for _, c := range chains {
		if c.source == h.source && c.incarnation == h.incarnation {
			return c
		}
	}
	return nil
}

// meter adds a meter of a resource to the rows.
func (u *usage) meter(t *target) error {
	chains := u.chains(t.resource)
	before, after := u.query.From, u.query.To
	if t.meter.Kind == sample.Gauge {
		before, after = earlier(before, store.Hold.Microseconds()), later(after, store.Hold.Microseconds())
	}
	runs, err := u.runs(t, before, after)
	if err != nil {
		return err
	}
	if t.meter.Kind == sample.Cumulative {
		if err := u.lookBack(t, chains, runs); err != nil {
			return err
		}
	}
	for i := range runs {
		r := &runs[i]
		c := chainOf(chains, u.holders[r.holder])
		switch t.meter.Kind {
		case sample.Cumulative:
			u.cumulative(t.meter, c, r)
		case sample.Gauge:
			u.gauge(t.meter, c, r)
		default:
			if row := u.row(t.meter, r); row != nil {
				row.add(r, r.sum, 0)
			}
		}
		c.add(r)
	}
	return nil
}

// lookBack finds the last run before the period of each chain that has samples
// in it, and the highest volume up to then: of the day of that run and of the one
// before, since a clock that is set back by more than a day is another trouble.
func (u *usage) lookBack(t *target, chains []*chain, runs []run) error {
	open := map[*chain]int64{} // chains with the time from which on their samples matter
	for i := range runs {
		if c := chainOf(chains, u.holders[runs[i].holder]); c.born < u.query.From {
			open[c] = c.born
		}
	}
	if len(open) == 0 {
		return nil
	}
	to := u.query.From
	inHead := u.headPoints(nil, t.resource, t.meter, math.MinInt64, to-1)
	var more []hour
	for i := range inHead {
		more = with(more, hourOf(inHead[i].time))
	}
	for _, d := range slices.Backward(u.days(math.MinInt64, to-1, more)) {
		maps.DeleteFunc(open, func(_ *chain, since int64) bool { return d.end() < since })
		if len(open) == 0 {
			break
		}
		runs, err := u.runs(t, d.start(), min(later(d.end(), 1), to))
		if err != nil {
			return err
		}
		for i := range slices.Backward(runs) {
			c := chainOf(chains, u.holders[runs[i].holder])
			since, ok := open[c]
			switch {
			case !ok:
			case c.last == nil:
				c.add(&runs[i])
				open[c] = max(since, (d - 1).start())
			case store.Compare(runs[i].maxVolume, c.high) > 0:
				c.high = runs[i].maxVolume
			}
		}
	}
	return nil
}

// runs returns the samples of a series from one time to before another, in the
// order of time within each chain.
func (u *usage) runs(t *target, from, to int64) ([]run, error) {
	var out []run
	inHead := u.headPoints(nil, t.resource, t.meter, from, to-1)
	byTime(inHead)
	var hours []hour
	for i := range inHead {
		hours = with(hours, hourOf(inHead[i].time))
	}
	pc := &u.pieces
	pc.plan, pc.from, pc.to = u.plan, from, to-1
	pc.head = func(h hour) []point {
		i, _ := slices.BinarySearchFunc(inHead, h.start(), func(p point, t int64) int { return cmp.Compare(p.time, t) })
		n := i
		for n < len(inHead) && inHead[n].time <= h.end() {
			n++
		}
		return inHead[i:n]
	}
	pc.cell = func(t int64) int64 {
		switch {
		case t < from || t >= to:
			return outside
		case t < u.query.From:
			return -1
		case t < u.query.To:
			return 0
		}
		return 1
	}
	pc.run = func(_ *target, r *run) error {
		out = append(out, *r)
		return nil
	}
	pc.point = func(_ *target, p *point) error {
		out = append(out, runOf(p))
		return nil
	}
	for _, d := range u.days(from, to-1, hours) {
		if err := pc.day(t, d, hours); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (u *usage) cumulative(m *meter, c *chain, r *run) {
	known := c.incarnation != 0
	quantity := r.steps
	covered := r.last - r.first
	switch {
	case c.last != nil:
		covered = r.last - max(c.last.last, u.query.From)
		quantity = r.rise(c.last.lastVolume, c.high, known)
	case known && store.FromZero(r.first, u.metered(r.node), c.born):
		quantity.AddVolume(r.firstVolume)
	}
	if row := u.row(m, r); row != nil {
		row.add(r, quantity, covered)
	}
}

// metered returns when a node was first metered, in µs.
func (u *usage) metered(node uint32) int64 {
	u.s.mu.RLock()
	defer u.s.mu.RUnlock()
	return u.s.catalogue.metered[node]
}

func (u *usage) gauge(m *meter, c *chain, r *run) {
	if b := c.last; b != nil && r.first-b.last <= store.Hold.Microseconds() {
		if held := min(r.first, u.query.To) - max(b.last, u.query.From); held > 0 {
			if row := u.row(m, b); row != nil {
				row.Quantity.AddProduct(b.lastVolume, held)
				row.Covered += held
				if b.first < u.query.From {
					row.seen(b, u.query.From, u.query.From)
				}
			}
		}
	}
	if r.first < u.query.From || r.first >= u.query.To {
		return
	}
	if row := u.row(m, r); row != nil {
		row.add(r, r.area, r.last-r.first)
	}
}

// row returns the row that a run belongs to; nil where the filter leaves it
// out.
func (u *usage) row(m *meter, r *run) *usageRow {
	if !u.runMatches(m, r) {
		return nil
	}
	h := u.holders[r.holder]
	u.key = appendText(appendText(appendSeriesRef(u.key[:0], m.no, 0), h.project), h.source)
	for _, path := range u.query.SplitBy {
		if text := u.split(r.meta, path); text != nil {
			u.key = appendText(append(u.key, 1), *text)
		} else {
			u.key = append(u.key, 0)
		}
	}
	row := u.rows[string(u.key)]
	if row == nil {
		row = &usageRow{
			Usage: store.Usage{
				MeterRef: m.MeterRef, Resource: h.resource.id, Source: h.source, Project: h.project, First: math.MaxInt64, Last: math.MinInt64,
			},
			origins: map[uint32]bool{}, nodes: map[uint32]bool{},
		}
		for _, path := range u.query.SplitBy {
			row.Split = append(row.Split, u.split(r.meta, path))
		}
		u.rows[string(u.key)] = row
	}
	return row
}

func (u *usage) split(meta uint32, path string) *string {
	v, _ := u.document(meta).Lookup(path)
	return store.Text(v)
}

func (r *usageRow) add(of *run, quantity store.Exact, covered int64) {
	r.Quantity.Add(quantity)
	r.Covered += covered
	r.Count += of.count
	r.seen(of, of.first, of.last)
}

func (r *usageRow) seen(of *run, first, last int64) {
	r.First, r.Last = min(r.First, first), max(r.Last, last)
	if !r.origins[of.origin] {
		r.origins[of.origin] = true
	}
	if !r.nodes[of.node] {
		r.nodes[of.node] = true
	}
}

// later returns the time that is a length after t, as far as that goes.
func later(t, length int64) int64 {
	if t > math.MaxInt64-length {
		return math.MaxInt64
	}
	return t + length
}

// earlier returns the time that is a length before t, as far as that goes.
func earlier(t, length int64) int64 {
	if t < math.MinInt64+length {
		return math.MinInt64
	}
	return t - length
}
