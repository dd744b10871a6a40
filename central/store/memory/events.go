package memory

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// AppendEvents implements [store.Events].
func (s *Store) AppendEvents(ctx context.Context, events []sample.Event) ([]store.Stored, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]store.Stored, len(events))
	for i, e := range events {
		if err := store.CheckEvent(&e); err != nil {
			out[i].Refused = err
			continue
		}
		if slices.ContainsFunc(s.events, func(old sample.Event) bool { return old.ID == e.ID }) {
			out[i].Duplicate = true
			continue
		}
		e.Traits, e.Raw = slices.Clone(e.Traits), slices.Clone(e.Raw)
		s.events = append(s.events, e)
	}
	return out, nil
}

// Events implements [store.Events].
func (s *Store) Events(ctx context.Context, q store.EventQuery, yield func(sample.Event) bool) error {
	if err := q.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.RLock()
	var found []sample.Event
	for i := range s.events {
		if q.Match(&s.events[i]) {
			found = append(found, s.events[i])
		}
	}
	s.mu.RUnlock()
	slices.SortStableFunc(found, func(a, b sample.Event) int { return cmp.Compare(a.Generated, b.Generated) })
	for i := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !yield(found[i]) {
			break
		}
	}
	return nil
}

// Event implements [store.Events].
func (s *Store) Event(ctx context.Context, id string) (sample.Event, error) {
	var found []sample.Event
	if id != "" {
		if err := s.Events(ctx, store.EventQuery{ID: id}, func(e sample.Event) bool {
			found = append(found, e)
			return true
		}); err != nil {
			return sample.Event{}, err
		}
	}
	if len(found) == 0 {
		return sample.Event{}, store.ErrNotFound
	}
	return found[0], nil
}

// EventTypes implements [store.Events].
func (s *Store) EventTypes(ctx context.Context) ([]string, error) {
	var out []string
	err := s.Events(ctx, store.EventQuery{}, func(e sample.Event) bool {
		out = append(out, e.Type)
		return true
	})
	slices.SortFunc(out, strings.Compare)
	return slices.Compact(out), err
}

// TraitDescriptions implements [store.Events].
func (s *Store) TraitDescriptions(ctx context.Context, eventType string) ([]store.TraitDescription, error) {
	var out []store.TraitDescription
	err := s.ofType(ctx, eventType, func(e sample.Event) bool {
		for i := range e.Traits {
			if d := (store.TraitDescription{Name: e.Traits[i].Name, Type: e.Traits[i].Type}); !slices.Contains(out, d) {
				out = append(out, d)
			}
		}
		return true
	})
	store.SortTraitDescriptions(out)
	return out, err
}

// Traits implements [store.Events].
func (s *Store) Traits(ctx context.Context, eventType, name string, yield func(sample.Trait) bool) error {
	return s.ofType(ctx, eventType, func(e sample.Event) bool {
		for i := range e.Traits {
			if e.Traits[i].Name == name && !yield(e.Traits[i]) {
				return false
			}
		}
		return true
	})
}

// ofType calls yield for the events of one type; of the empty one there are none.
func (s *Store) ofType(ctx context.Context, eventType string, yield func(sample.Event) bool) error {
	if eventType == "" {
		return ctx.Err()
	}
	return s.Events(ctx, store.EventQuery{Type: eventType}, yield)
}
