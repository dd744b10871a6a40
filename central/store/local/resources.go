package local

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// Meters implements [store.Store]. It answers from memory.
func (s *Store) Meters(ctx context.Context, f store.Filter) (_ []store.Meter, err error) {
	p, err := store.Compile(f)
	if err != nil {
		return nil, err
	}
	if err := p.CheckMeters(); err != nil {
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
	if pl.empty() {
		return nil, nil
	}
	type found struct {
		meter    *meter
		resource *resource
		newest   newest
	}
	var all []found
	s.mu.RLock()
	v.dimensions = s.catalogue.dimensions() // what is newest may be newer than the view
	pl.candidates(func(r *resource) {
		series := v.newestSeries(r)
		for i, m := range r.meters {
			if i < len(series) && series[i].has {
				all = append(all, found{m, r, series[i]})
			}
		}
	})
	s.mu.RUnlock()
	var out []store.Meter
	for _, n := range all {
		if selects, _ := pl.series(n.meter, n.newest.holder, n.newest.meta).Const(); selects {
			h := n.newest.holder
			out = append(out, store.Meter{MeterRef: n.meter.MeterRef, Resource: n.resource.id, Source: h.source, Project: h.project, User: h.user})
		}
	}
	store.SortMeters(out)
	return out, nil
}

// newestSeries returns the newest sample of each of the resource's meters, by
// position. The caller holds the store's lock.
func (v *view) newestSeries(r *resource) []newest {
	out := make([]newest, len(r.meters))
	copy(out, r.flushed.series)
	type rank struct {
		seq   uint64
		index int
	}
	ranks := make([]rank, len(out))
	v.lockedRows(r, func(ref rowRef) {
		row := ref.info()
		c, next := 0, 0
		for at, to := ref.span(ref.row); at < to; at++ {
			index := int(ref.indexes[at])
			for c+1 < len(ref.columns) && ref.columns[c+1].index <= index {
				c++
			}
			i := next // rows name a resource's meters in the order they were first seen in
			if m := ref.columns[c].meter; i >= len(r.meters) || r.meters[i] != m {
				i = slices.Index(r.meters, m)
			}
			next = i + 1
			n, k := &out[i], rank{ref.seq, index}
			if n.has && n.last == row.time && (ranks[i].seq > k.seq || ranks[i].seq == k.seq && ranks[i].index > k.index) {
				continue
			}
			if !n.has || row.time >= n.last {
				ranks[i] = k
			}
			n.add(row.time, row.holder, row.meta)
		}
	})
	return out
}

// lockedRows calls each with the rows of a resource that are in the heads. The
// caller holds the store's lock.
func (v *view) lockedRows(r *resource, each func(rowRef)) {
	for _, h := range v.heads {
		for _, ref := range h.rows[r] {
			if ref.seq <= v.upTo {
				each(ref)
			}
		}
	}
}

// newestRow returns the newest sample of a resource. The caller holds the
// store's lock.
func (v *view) newestRow(r *resource) newest {
	out := r.flushed.newest
	var best rowRef
	v.lockedRows(r, func(ref rowRef) {
		row := ref.info()
		if out.has && (row.time < out.last || best.headBatch != nil && ref.sameTime(best) && ref.lastIndex() < best.lastIndex()) {
			return
		}
		best = ref
		out.add(row.time, row.holder, row.meta)
	})
	return out
}

// Resources implements [store.Store].
func (s *Store) Resources(ctx context.Context, f store.Filter) (_ []store.Resource, err error) {
	p, err := store.Compile(f)
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
	if pl.empty() {
		return nil, nil
	}
	var found map[*resource]*lifetime
	switch {
	case pl.predicate.Uses(store.FieldMeter, store.FieldKind, store.FieldUnit, store.FieldVolume, store.FieldID):
		found, err = pl.bySamples()
	case p.Uses(store.FieldTime, store.FieldRecorded, store.FieldMetadata):
		found, err = pl.byRows()
	default:
		found = pl.byHolders()
	}
	if err != nil {
		return nil, err
	}
	var out []store.Resource
	s.mu.RLock()
	for r, l := range found {
		n := v.newestRow(r)
		if !n.has { // expired meanwhile
			continue
		}
		res := store.Resource{
			ID: r.id, Source: n.holder.source, Project: n.holder.project, User: n.holder.user,
			Metadata: s.catalogue.metas[n.meta], First: l.first, Last: l.last,
		}
		series := r.flushed.series
		if len(series) < len(r.meters) || slices.ContainsFunc(series, func(n newest) bool { return !n.has }) {
			series = v.newestSeries(r) // some meters may be in the heads only
		}
		for i := range series {
			if series[i].has {
				res.Meters = append(res.Meters, r.meters[i].Name)
			}
		}
		out = append(out, res)
	}
	s.mu.RUnlock()
	for i := range out {
		slices.Sort(out[i].Meters)
		out[i].Meters = slices.Compact(out[i].Meters)
	}
	slices.SortFunc(out, func(a, b store.Resource) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// byHolders selects by what is in memory: the filter is about holders only.
func (pl *plan) byHolders() map[*resource]*lifetime {
	found := map[*resource]*lifetime{}
	pl.s.mu.RLock()
	defer pl.s.mu.RUnlock()
	pl.candidates(func(r *resource) {
		var l lifetime
		selects := make([]bool, len(r.holders))
		for i, h := range r.holders {
			selects[i], _ = pl.predicate.Fix(holderDecides(h)).Const()
			if selects[i] && i < len(r.flushed.holders) && r.flushed.holders[i].has {
				l.add(r.flushed.holders[i].first)
				l.add(r.flushed.holders[i].last)
			}
		}
		pl.lockedRows(r, func(ref rowRef) {
			if row := ref.info(); selects[row.holder.pos] {
				l.add(row.time)
			}
		})
		if l.has {
			found[r] = &l
		}
	})
	return found
}

// bySamples selects by looking at samples. A chunk that cannot make a
// resource's oldest match older or its newest one newer is not read.
func (pl *plan) bySamples() (map[*resource]*lifetime, error) {
	found := map[*resource]*lifetime{}
	if pl.id != nil {
		return found, pl.byID(func(s store.Sample) bool {
			pl.s.mu.RLock()
			defer pl.s.mu.RUnlock()
			pl.found(found, pl.s.catalogue.byResource[s.Resource]).add(s.Time)
			return true
		})
	}
	skip := func(t *target, first, last int64) bool {
		l := found[t.resource]
		return l != nil && l.first <= first && l.last >= last
	}
	err := pl.each(pl.targets(false), skip, func(t *target, p *point) error {
		pl.found(found, t.resource).add(p.time)
		return nil
	})
	return found, err
}

func (pl *plan) found(in map[*resource]*lifetime, r *resource) *lifetime {
	l := in[r]
	if l == nil {
		l = &lifetime{}
		in[r] = l
	}
	return l
}

// byRows selects by what the rows say: times, owners and metadata. It reads a
// resource's hours from both ends until it has a match.
func (pl *plan) byRows() (map[*resource]*lifetime, error) {
	type candidate struct {
		*resource
		flushed newest
	}
	var candidates []candidate
	pl.s.mu.RLock()
	pl.candidates(func(r *resource) { candidates = append(candidates, candidate{r, r.flushed.newest}) })
	pl.s.mu.RUnlock()
	slices.SortFunc(candidates, func(a, b candidate) int { return cmp.Compare(a.no, b.no) })
	absent := func(c candidate, d hour) bool {
		return !c.flushed.has || c.flushed.first > d.end() || c.flushed.last < d.start()
	}
	found := map[*resource]*lifetime{}
	hours := pl.hoursOf(pl.from, pl.to)
	// Oldest first for those without a match, then newest first.
	for _, d := range hours {
		for i, c := range candidates {
			if i%256 == 0 && pl.ctx.Err() != nil {
				return nil, pl.ctx.Err()
			}
			if l := found[c.resource]; l != nil && l.first < d.start() || absent(c, d) {
				continue
			}
			if err := pl.rowsOf(d, c.resource, found); err != nil {
				return nil, err
			}
		}
	}
	for _, d := range slices.Backward(hours) {
		for _, c := range candidates {
			if l := found[c.resource]; l == nil || hourOf(l.last) >= d || absent(c, d) {
				continue
			}
			if err := pl.rowsOf(d, c.resource, found); err != nil {
				return nil, err
			}
		}
	}
	for _, c := range candidates {
		var err error
		pl.headRows(c.resource, func(ref rowRef) bool {
			row := ref.info()
			if row.time < pl.from || row.time > pl.to {
				return true
			}
			var ok bool
			ok, err = pl.rowMatches(row.time, row.holder, row.meta, func() (int64, error) { return ref.recorded, nil })
			if ok {
				pl.found(found, c.resource).add(row.time)
			}
			return err == nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// rowsOf looks at a resource's rows of an hour.
func (pl *plan) rowsOf(d hour, r *resource, found map[*resource]*lifetime) error {
	prefix := rowsPrefix(nil, d, r.no)
	var t rows
	for ok := pl.parts.SeekGE(prefix); ok && strings.HasPrefix(string(pl.parts.Key()), string(prefix)); ok = pl.parts.Next() {
		value, err := pl.parts.ValueAndErr()
		if err != nil {
			return err
		}
		if err := t.decode(value); err != nil {
			return err
		}
		for i := range t.times {
			at := int64(t.times[i])
			if at < pl.from || at > pl.to {
				continue
			}
			if t.holders[i] >= uint64(len(pl.holders)) || t.metas[i] >= uint64(len(pl.metas)) {
				return errCorrupt
			}
			ok, err := pl.rowMatches(at, pl.holders[t.holders[i]], uint32(t.metas[i]), func() (int64, error) {
				info, err := pl.batch(&point{time: at, seq: t.seqs[i], node: uint32(t.nodes[i])})
				if err != nil {
					return 0, err
				}
				return info.recorded, nil
			})
			if err != nil {
				return err
			}
			if ok {
				pl.found(found, r).add(at)
			}
		}
	}
	return pl.parts.Error()
}

// rowMatches reports whether the samples of a row match.
func (pl *plan) rowMatches(t int64, h *holder, meta uint32, recorded func() (int64, error)) (bool, error) {
	p := pl.series(noMeter, h, meta)
	selects, constant := p.Const()
	if constant {
		return selects, nil
	}
	var s store.Sample
	s.Time = t
	if p.Uses(store.FieldRecorded) {
		var err error
		if s.Recorded, err = recorded(); err != nil {
			return false, err
		}
	}
	return p.Match(&s, nil), nil
}

// noMeter stands for all where the filter is not about meters.
var noMeter = &meter{no: 1<<32 - 1}

// Gaps implements [store.Store].
func (s *Store) Gaps(ctx context.Context, from, to int64) ([]sample.Gap, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var all []gap
	s.mu.RLock()
	heads := []*head{s.active}
	if s.frozen != nil {
		heads = append(heads, s.frozen)
	}
	for _, h := range heads {
		for _, g := range h.gaps {
			if g.From <= to && g.To >= from {
				all = append(all, g)
			}
		}
	}
	s.mu.RUnlock()
	// A flush that ends in between leaves gaps in both places, and several
	// pipelines may pass the same gap on.
	saved, err := s.catalogue.gaps(from, to)
	if err != nil {
		return nil, err
	}
	all = append(all, saved...)
	slices.SortFunc(all, func(a, b gap) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.seq, b.seq), cmp.Compare(a.n, b.n))
	})
	var out []sample.Gap
	seen := map[sample.Gap]bool{}
	for i := range all {
		if g := all[i].Gap; !seen[g] {
			seen[g] = true
			out = append(out, g)
		}
	}
	return out, nil
}
