package api

import (
	"errors"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// page is where a list goes on: after the entry that marker names.
type page struct {
	marker string // empty: the list begins
	at     int64  // the entry's time
	passed bool   // it was seen, or one beyond it
}

// before reports whether an entry is still one of the pages before; beyond says
// that its time is another than the marker's.
func (p *page) before(id string, beyond bool) bool {
	if p.marker == "" || p.passed {
		return false
	}
	p.passed = beyond || id == p.marker
	return !beyond
}

// filter leaves out samples that are newer than the marker's.
func (p *page) filter(f store.Filter) store.Filter {
	if p.marker == "" {
		return f
	}
	return store.And(store.Where(store.FieldTime, store.Le, p.at), f)
}

// afterSample returns the page after the sample that the argument marker names.
func (s *server) afterSample(r *request, p *params) (*page, error) {
	marker, _, err := p.one("marker")
	if err != nil || marker == "" {
		return &page{}, err
	}
	project, limited, err := r.caller.scope()
	if err != nil {
		return nil, err
	}
	found, err := s.store.Sample(r.Context(), sample.ParseID(marker))
	if errors.Is(err, store.ErrNotFound) || err == nil && limited && found.Project != project {
		err = noMarker(marker)
	}
	return &page{marker: marker, at: found.Time}, err
}

// afterEvent is afterSample of events. Events that the caller does not see mark
// nothing.
func (s *server) afterEvent(r *request, p *params, scope []store.TraitCond) (*page, error) {
	marker, _, err := p.one("marker")
	if err != nil || marker == "" {
		return &page{}, err
	}
	found := &page{marker: marker}
	known := false
	err = s.eachEvent(r.Context(), &store.EventQuery{ID: marker, Traits: scope}, func(e *sample.Event) (bool, error) {
		found.at, known = e.Generated, true
		return false, nil
	})
	if err == nil && !known {
		err = noMarker(marker)
	}
	return found, err
}

func noMarker(marker string) error { return badRequest("Marker %s not found.", clip(marker)) }
