package memory

import (
	"cmp"
	"context"
	"maps"
	"slices"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// chain is what usage follows a counter by.
type chain struct {
	meter            sample.MeterRef
	resource, source string
	incarnation      sample.Incarnation
}

type bornKey struct {
	resource, source string
	incarnation      sample.Incarnation
}

// Usage implements [store.Store].
func (s *Store) Usage(ctx context.Context, q store.UsageQuery, yield func(store.Usage) bool) error {
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
	s.mu.RLock()
	defer s.mu.RUnlock()
	chains := map[chain][]int{}
	born := map[bornKey]int64{}
	metered := maps.Clone(s.since)
	for i := range s.samples {
		sm := &s.samples[i]
		k := chain{sample.MeterRef{Name: sm.Name, Kind: sm.Kind, Unit: sm.Unit}, sm.Resource, sm.Source, sm.Incarnation}
		chains[k] = append(chains[k], i)
		b := bornKey{sm.Resource, sm.Source, sm.Incarnation}
		if at, ok := born[b]; !ok || sm.Time < at {
			born[b] = sm.Time
		}
		if at, ok := metered[s.nodes[i]]; !ok || sm.Time < at {
			metered[s.nodes[i]] = sm.Time
		}
	}
	rows := map[string]*store.Usage{}
	for k, of := range chains {
		slices.SortStableFunc(of, func(a, b int) int { return cmp.Compare(s.samples[a].Time, s.samples[b].Time) })
		var high sample.Volume // of a counter of a known incarnation, so far
		for i, at := range of {
			sm := &s.samples[at]
			var quantity store.Exact
			covered, counts := int64(0), sm.Time >= q.From && sm.Time < q.To
			since := max(sm.Time, q.From)
			switch sm.Kind {
			case sample.Cumulative:
				known := sm.Incarnation != 0
				last := high
				if i == 0 || store.Compare(sm.Volume, high) > 0 {
					high = sm.Volume
				}
				if i == 0 {
					b := born[bornKey{sm.Resource, sm.Source, sm.Incarnation}]
					if known && store.FromZero(sm.Time, metered[s.nodes[at]], b) {
						quantity.AddVolume(sm.Volume)
					}
					break
				}
				before := &s.samples[of[i-1]]
				if !known {
					last = before.Volume
				}
				switch {
				case store.Compare(sm.Volume, last) >= 0:
					quantity.AddVolume(sm.Volume)
					quantity.Sub(exact(last))
				case !known:
					quantity.AddVolume(sm.Volume)
				}
				covered = sm.Time - max(before.Time, q.From)
			case sample.Gauge:
				if i+1 < len(of) {
					if next := s.samples[of[i+1]].Time; next-sm.Time <= store.Hold.Microseconds() {
						covered = max(0, min(next, q.To)-since)
					}
				}
				quantity.AddProduct(sm.Volume, covered)
				if sm.Time < q.From && covered == 0 || sm.Time >= q.To {
					continue
				}
			default:
				quantity.AddVolume(sm.Volume)
			}
			if !counts && sm.Kind != sample.Gauge || !p.Match(sm, store.NewDocument(sm.Metadata)) {
				continue
			}
			u := store.Usage{MeterRef: k.meter, Resource: k.resource, Source: k.source, Project: sm.Project}
			for _, path := range q.SplitBy {
				v, _ := store.NewDocument(sm.Metadata).Lookup(path)
				u.Split = append(u.Split, store.Text(v))
			}
			key := store.RowKey(0, append(slices.Clone(u.Split), &u.Name, new(string(u.Kind)), &u.Resource, &u.Source, &u.Project), u.Unit)
			if rows[key] == nil {
				u.First, u.Last = since, since
				rows[key] = &u
			}
			r := rows[key]
			r.First, r.Last = min(r.First, since), max(r.Last, since)
			r.Quantity.Add(quantity)
			r.Covered += covered
			if counts {
				r.Count++
			}
			if !slices.Contains(r.Origins, sm.Origin) {
				r.Origins = append(r.Origins, sm.Origin)
			}
			if node := s.nodes[at]; !slices.Contains(r.Nodes, node) {
				r.Nodes = append(r.Nodes, node)
			}
		}
	}
	var out []store.Usage
	for _, r := range rows {
		slices.Sort(r.Origins)
		slices.Sort(r.Nodes)
		r.Gaps = r.GapsOf(gaps)
		out = append(out, *r)
	}
	store.SortUsage(out)
	for _, u := range out {
		if !yield(u) {
			break
		}
	}
	return nil
}

func exact(v sample.Volume) (e store.Exact) {
	e.AddVolume(v)
	return e
}
