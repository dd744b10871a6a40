package local

import (
	"math"
	"slices"

	"github.com/kvmeter/kvmeter/central/store"
)

// plan is what a filter lets a query leave out.
type plan struct {
	*view
	predicate *store.Predicate // without the time bounds that from and to are
	from, to  int64            // times of all matches
	resource  *string          // all matches are of this one; nil: any
	id        *store.Cond      // all matches have this id; nil: any

	byMetadata bool // the filter is about metadata
	fixed      map[fixedKey]*store.Predicate
	last       fixedKey
	lastP      *store.Predicate
}

// fixedKey is what samples have in common that a filter selects alike but for
// their times and volumes. meta is 0 where metadata makes no difference.
type fixedKey struct{ meter, holder, meta uint32 }

// target is a series that may have matches, whatever its holder.
type target struct {
	resource *resource
	meter    *meter
	state    newest // of what is flushed
	last     int64  // no sample is newer
	// No sample ever was older or newer.
	born, end int64
}

func (v *view) plan(p *store.Predicate) *plan {
	pl := &plan{view: v, from: math.MinInt64, to: math.MaxInt64, fixed: map[fixedKey]*store.Predicate{}}
	bounds := map[*store.Cond]bool{}
	p.Required(func(c *store.Cond) bool {
		switch {
		case c.Field == store.FieldTime:
			if t, ok := c.Value.(int64); ok { // not of In and Match
				bounds[c] = pl.bound(c.Op, t)
			}
		case c.Op != store.Eq || c.Value == nil:
		case c.Field == store.FieldResource:
			id := c.Value.(string)
			pl.resource = &id
		case c.Field == store.FieldID:
			pl.id = c
		}
		return true
	})
	pl.predicate = p.Fix(func(c *store.Cond) (store.Truth, bool) { return store.True, bounds[c] })
	pl.byMetadata = pl.predicate.Uses(store.FieldMetadata)
	return pl
}

// bound narrows the times by a condition; it returns false where that does not
// say all that the condition says.
func (pl *plan) bound(op store.Op, t int64) bool {
	switch op {
	case store.Eq:
		pl.from, pl.to = max(pl.from, t), min(pl.to, t)
	case store.Ge:
		pl.from = max(pl.from, t)
	case store.Gt:
		if t == math.MaxInt64 {
			return false
		}
		pl.from = max(pl.from, t+1)
	case store.Le:
		pl.to = min(pl.to, t)
	case store.Lt:
		if t == math.MinInt64 {
			return false
		}
		pl.to = min(pl.to, t-1)
	default:
		return false
	}
	return true
}

// empty reports whether nothing can match.
func (pl *plan) empty() bool {
	selects, constant := pl.predicate.Const()
	return pl.from > pl.to || constant && !selects
}

// meterDecides decides the conditions on a meter.
func meterDecides(m *meter) func(*store.Cond) (store.Truth, bool) {
	return func(c *store.Cond) (store.Truth, bool) {
		switch c.Field {
		case store.FieldMeter:
			return c.Text(m.Name), true
		case store.FieldKind:
			return c.Text(string(m.Kind)), true
		case store.FieldUnit:
			return c.Text(m.Unit), true
		}
		return 0, false
	}
}

// holderDecides decides the conditions on a holder and its resource.
func holderDecides(h *holder) func(*store.Cond) (store.Truth, bool) {
	return func(c *store.Cond) (store.Truth, bool) {
		switch c.Field {
		case store.FieldResource:
			return c.Text(h.resource.id), true
		case store.FieldProject:
			return c.Text(h.project), true
		case store.FieldUser:
			return c.Text(h.user), true
		case store.FieldSource:
			return c.Text(h.source), true
		}
		return 0, false
	}
}

// documentDecides decides the conditions on metadata.
func documentDecides(d *store.Document) func(*store.Cond) (store.Truth, bool) {
	return func(c *store.Cond) (store.Truth, bool) {
		if c.Field != store.FieldMetadata {
			return 0, false
		}
		return c.Metadata(d), true
	}
}

// candidates calls each with the resources that may have matches. The caller
// holds the store's lock.
func (pl *plan) candidates(each func(r *resource)) {
	usesHolder := pl.predicate.Uses(store.FieldResource, store.FieldProject, store.FieldUser, store.FieldSource)
	visit := func(r *resource) {
		if !usesHolder || slices.ContainsFunc(r.holders, func(h *holder) bool { return pl.predicate.May(holderDecides(h)) }) {
			each(r)
		}
	}
	if pl.resource != nil {
		if r := pl.s.catalogue.byResource[*pl.resource]; r != nil && int(r.no) < len(pl.resources) {
			visit(r)
		}
		return
	}
	for _, r := range pl.resources {
		visit(r)
	}
}

// targets returns the series that may have matches, by meter and resource;
// rolled ones are those of which only rollups may be left.
func (pl *plan) targets(rolled bool) []target {
	if pl.empty() {
		return nil
	}
	usesMeter := pl.predicate.Uses(store.FieldMeter, store.FieldKind, store.FieldUnit)
	out := make([]bool, len(pl.meters)) // left out
	for i, m := range pl.meters {
		out[i] = usesMeter && !pl.predicate.May(meterDecides(m))
	}
	var ts []target
	pl.s.mu.RLock()
	defer pl.s.mu.RUnlock()
	pl.candidates(func(r *resource) {
		born := int64(math.MaxInt64)
		for _, h := range r.holders {
			born = min(born, h.born)
		}
		rolled := rolled && r.last >= pl.from && born <= pl.to
		inHead := slices.ContainsFunc(pl.heads, func(h *head) bool { return len(h.rows[r]) > 0 })
		for i, m := range r.meters {
			if int(m.no) >= len(out) || out[m.no] {
				continue
			}
			t := target{resource: r, meter: m, born: born, end: r.last}
			if i < len(r.flushed.series) {
				t.state = r.flushed.series[i]
			}
			switch {
			case inHead:
				t.last = max(r.last, t.state.last) // t.state may be empty: an upper bound nevertheless
			case t.state.has:
				t.last = t.state.last
			case !rolled:
				continue
			}
			if rolled || t.last >= pl.from && (inHead || t.state.first <= pl.to) {
				ts = append(ts, t)
			}
		}
	})
	slices.SortFunc(ts, func(a, b target) int {
		if a.meter != b.meter {
			return int(a.meter.no) - int(b.meter.no)
		}
		return int(a.resource.no) - int(b.resource.no)
	})
	return ts
}

// series returns the predicate for the samples of a series that have the same
// metadata, of which all conditions are decided.
func (pl *plan) series(m *meter, h *holder, meta uint32) *store.Predicate {
	key := fixedKey{meter: m.no, holder: h.no}
	if pl.byMetadata {
		key.meta = meta
	}
	if pl.lastP != nil && key == pl.last {
		return pl.lastP
	}
	p := pl.fixed[key]
	if p == nil {
		if len(pl.fixed) > 1<<16 {
			clear(pl.fixed)
		}
		p = pl.predicate.Fix(meterDecides(m)).Fix(holderDecides(h))
		if _, constant := p.Const(); !constant && pl.byMetadata {
			p = p.Fix(documentDecides(pl.document(meta)))
		}
		pl.fixed[key] = p
	}
	pl.last, pl.lastP = key, p
	return p
}

// matches reports whether a point of the plan's time matches.
func (pl *plan) matches(m *meter, p *point) (bool, error) {
	pred := pl.series(m, pl.holders[p.holder], p.meta)
	if selects, constant := pred.Const(); constant {
		return selects, nil
	}
	if pred.Uses(store.FieldID, store.FieldRecorded) {
		s, err := pl.sample(m, p)
		if err != nil {
			return false, err
		}
		return pred.Match(&s, nil), nil
	}
	var s store.Sample
	s.Time = p.time
	s.Volume.Bits, s.Volume.Tag = p.bits, p.tag
	return pred.Match(&s, nil), nil
}
