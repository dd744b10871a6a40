// Package memory is a store that keeps everything in plain slices and answers
// every query by looking at every sample. It is the reference that the other
// engines are tested against, and serves tests that need a store; it is
// neither fast nor durable.
package memory

import (
	"cmp"
	"context"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// Store implements [store.Store].
type Store struct {
	clock func() time.Time

	mu      sync.RWMutex
	samples []store.Sample   // in the order they were stored
	nodes   []string         // that measured them
	since   map[string]int64 // µs: nodes are metered since then, as they tell
	gaps    []sample.Gap
	batches map[batchKey]bool
	keys    map[sampleKey]bool
	events  []sample.Event // in the order they were stored
}

var _ store.Store = (*Store)(nil)

// batchKey is what a batch is one by.
type batchKey struct {
	node       string
	epoch, seq uint64
	id         sample.BatchID // only of batches with explicit ids
}

// sampleKey is what a sample is one by.
type sampleKey struct {
	meter                           sample.MeterRef
	resource, source, project, user string
	incarnation                     sample.Incarnation
	time                            int64
	id                              sample.ID
}

// New returns an empty store. clock says when a batch is stored.
func New(clock func() time.Time) *Store {
	return &Store{clock: clock, batches: map[batchKey]bool{}, keys: map[sampleKey]bool{}, since: map[string]int64{}}
}

// Append implements [store.Store].
func (s *Store) Append(ctx context.Context, batches []store.Received) ([]store.Stored, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	recorded := s.clock().UnixMicro()
	out := make([]store.Stored, len(batches))
	for i, r := range batches {
		b := r.Batch
		if err := store.CheckBatch(b); err != nil {
			out[i].Refused = err
			continue
		}
		key := batchKey{node: b.Node, epoch: b.Epoch, seq: b.Seq}
		if b.IDs != nil {
			key = batchKey{id: b.ID}
		}
		if s.batches[key] {
			out[i].Duplicate = true
			continue
		}
		s.batches[key] = true
		if at, told := s.since[b.Host()]; b.Since != 0 && (!told || b.Since < at) {
			s.since[b.Host()] = b.Since
		}
		for sm := range b.Samples() {
			key := sampleKey{
				sample.MeterRef{Name: sm.Name, Kind: sm.Kind, Unit: sm.Unit},
				sm.Resource, sm.Source, sm.Project, sm.User, sm.Incarnation, sm.Time, sm.ID,
			}
			if !s.keys[key] {
				s.keys[key] = true
				sm.Metadata = slices.Clone(sm.Metadata)
				s.samples = append(s.samples, store.Sample{Sample: sm, Recorded: recorded})
				s.nodes = append(s.nodes, b.Host())
			}
		}
		for _, g := range b.Gaps {
			g.Node = cmp.Or(g.Node, b.Host())
			if !slices.Contains(s.gaps, g) {
				s.gaps = append(s.gaps, g)
			}
		}
	}
	return out, nil
}

// matching returns the samples that match, in the order they were stored.
func (s *Store) matching(ctx context.Context, f store.Filter) ([]store.Sample, error) {
	p, err := store.Compile(f)
	if err != nil {
		return nil, err
	}
	s.mu.RLock()
	all := s.samples[:len(s.samples):len(s.samples)]
	s.mu.RUnlock()
	var out []store.Sample
	for i := range all {
		if i%1024 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if p.Match(&all[i], store.NewDocument(all[i].Metadata)) {
			out = append(out, all[i])
		}
	}
	return out, nil
}

// Samples implements [store.Store].
func (s *Store) Samples(ctx context.Context, f store.Filter, yield func(store.Sample) bool) error {
	found, err := s.matching(ctx, f)
	if err != nil {
		return err
	}
	slices.SortStableFunc(found, func(a, b store.Sample) int { return cmp.Compare(b.Time, a.Time) })
	for _, sm := range found {
		if !yield(sm) {
			break
		}
	}
	return nil
}

// Sample implements [store.Store].
func (s *Store) Sample(_ context.Context, id sample.ID) (store.Sample, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, sm := range s.samples {
		if sm.ID == id {
			return sm, nil
		}
	}
	return store.Sample{}, store.ErrNotFound
}

// Meters implements [store.Store].
func (s *Store) Meters(_ context.Context, f store.Filter) ([]store.Meter, error) {
	p, err := store.Compile(f)
	if err != nil {
		return nil, err
	}
	if err := p.CheckMeters(); err != nil {
		return nil, err
	}
	type key struct {
		meter    sample.MeterRef
		resource string
	}
	newest := map[key]store.Sample{}
	s.mu.RLock()
	for _, sm := range s.samples {
		k := key{sample.MeterRef{Name: sm.Name, Kind: sm.Kind, Unit: sm.Unit}, sm.Resource}
		if old, ok := newest[k]; !ok || sm.Time >= old.Time {
			newest[k] = sm
		}
	}
	s.mu.RUnlock()
	var out []store.Meter
	for k, sm := range newest {
		if p.Match(&sm, store.NewDocument(sm.Metadata)) {
			out = append(out, store.Meter{MeterRef: k.meter, Resource: k.resource, Source: sm.Source, Project: sm.Project, User: sm.User})
		}
	}
	store.SortMeters(out)
	return out, nil
}

// Resources implements [store.Store].
func (s *Store) Resources(ctx context.Context, f store.Filter) ([]store.Resource, error) {
	found, err := s.matching(ctx, f)
	if err != nil {
		return nil, err
	}
	all, err := s.matching(ctx, store.Filter{})
	if err != nil {
		return nil, err
	}
	byID := map[string]*store.Resource{}
	for _, sm := range found {
		r := byID[sm.Resource]
		if r == nil {
			r = &store.Resource{ID: sm.Resource, First: sm.Time, Last: sm.Time}
			byID[sm.Resource] = r
		}
		r.First, r.Last = min(r.First, sm.Time), max(r.Last, sm.Time)
	}
	newest := map[string]int64{}
	for _, sm := range all {
		r := byID[sm.Resource]
		if r == nil {
			continue
		}
		if !slices.Contains(r.Meters, sm.Name) {
			r.Meters = append(r.Meters, sm.Name)
		}
		if t, ok := newest[r.ID]; !ok || sm.Time >= t {
			newest[r.ID] = sm.Time
			r.Source, r.Project, r.User, r.Metadata = sm.Source, sm.Project, sm.User, sm.Metadata
		}
	}
	var out []store.Resource
	for _, r := range byID {
		slices.Sort(r.Meters)
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b store.Resource) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// Statistics implements [store.Store].
func (s *Store) Statistics(ctx context.Context, q store.StatisticsQuery) ([]store.Statistics, error) {
	if err := q.Check(); err != nil {
		return nil, err
	}
	found, err := s.matching(ctx, q.Filter)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	start := int64(math.MaxInt64)
	for _, sm := range found {
		start = min(start, sm.Time)
	}
	if q.Start != nil {
		start = *q.Start
	}
	type row struct {
		stats   store.Statistics
		samples []store.Sample
	}
	rows := map[string]*row{}
	for _, sm := range found {
		group, ok := store.GroupOf(&sm, q.GroupBy)
		if !ok {
			continue
		}
		bucket := q.Bucket(sm.Time, start)
		key := store.RowKey(bucket, group, sm.Unit)
		r := rows[key]
		if r == nil {
			r = &row{stats: store.Statistics{Group: group, Unit: sm.Unit, Bucket: bucket, Start: start}}
			if rows[key] = r; q.MaxRows > 0 && len(rows) > q.MaxRows {
				return nil, store.ErrTooManyRows
			}
		}
		r.samples = append(r.samples, sm)
	}
	var out []store.Statistics
	for _, r := range rows {
		aggregate(&r.stats, r.samples, q)
		out = append(out, r.stats)
	}
	store.SortStatistics(out)
	return out, nil
}

func aggregate(a *store.Statistics, samples []store.Sample, q store.StatisticsQuery) {
	a.Count = int64(len(samples))
	a.Min, a.Max, a.First, a.Last = samples[0].Volume, samples[0].Volume, samples[0].Time, samples[0].Time
	volumes := make([]float64, len(samples))
	for i, sm := range samples {
		volumes[i] = sm.Volume.Float64()
		if store.Compare(sm.Volume, a.Min) < 0 {
			a.Min = sm.Volume
		}
		if store.Compare(sm.Volume, a.Max) > 0 {
			a.Max = sm.Volume
		}
		a.First, a.Last = min(a.First, sm.Time), max(a.Last, sm.Time)
	}
	slices.SortFunc(volumes, func(x, y float64) int { return cmp.Compare(math.Abs(x), math.Abs(y)) })
	for _, v := range volumes {
		a.Sum += v
	}
	mean := a.Sum / float64(a.Count)
	for _, v := range volumes {
		if q.NoSquares {
			break
		}
		a.SumSquares += (v - mean) * (v - mean)
	}
	if q.Period == 0 {
		a.Start = a.First
	}
	for _, f := range q.Cardinality {
		distinct := map[string]bool{}
		for _, sm := range samples {
			if text, _ := sm.Text(f); text != "" {
				distinct[text] = true
			}
		}
		a.Cardinality = append(a.Cardinality, int64(len(distinct)))
	}
}

// Gaps implements [store.Store].
func (s *Store) Gaps(_ context.Context, from, to int64) ([]sample.Gap, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []sample.Gap
	for _, g := range s.gaps {
		if g.From <= to && g.To >= from {
			out = append(out, g)
		}
	}
	slices.SortStableFunc(out, func(a, b sample.Gap) int { return cmp.Compare(a.From, b.From) })
	return out, nil
}

// Close implements [store.Store].
func (s *Store) Close() error { return nil }
