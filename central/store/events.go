package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// Events keeps events with their traits. Every [Store] does.
type Events interface {
	// AppendEvents stores the events and returns when they are synced. An event
	// is one by its id: storing it again changes nothing. After an error none,
	// some or all of them may be stored; appending all of them again is right.
	AppendEvents(ctx context.Context, events []sample.Event) ([]Stored, error)

	// Events calls yield for the events that match, oldest first, those of
	// equal time in the order they were stored, until yield returns false.
	// Traits are in the order in which the event had them.
	Events(ctx context.Context, q EventQuery, yield func(sample.Event) bool) error
	// Event returns the event with the given id, or ErrNotFound.
	Event(ctx context.Context, id string) (sample.Event, error)

	// EventTypes returns the types of all events, sorted.
	EventTypes(ctx context.Context) ([]string, error)
	// TraitDescriptions returns the names and types of the traits that events
	// of a type have, sorted by name, then type.
	TraitDescriptions(ctx context.Context, eventType string) ([]TraitDescription, error)
	// Traits calls yield for every trait of that name of the events of a type,
	// in the order of [Events.Events], until yield returns false.
	Traits(ctx context.Context, eventType, name string, yield func(sample.Trait) bool) error
}

// TraitDescription is what is known of a trait without its value.
type TraitDescription struct {
	Name string
	Type sample.TraitType
}

// EventQuery selects events: those that satisfy all of it. The zero EventQuery
// selects all.
type EventQuery struct {
	ID, Type string // empty: any
	From, To *int64 // when it was generated, both included; nil: any
	Traits   []TraitCond
}

// TraitCond compares a trait with a value. An event matches when one of its
// traits of that name and type does: Ne selects those that have the trait with
// another value. Texts are ordered by their bytes.
type TraitCond struct {
	sample.Trait
	Op Op
	// OrAbsent also selects the events without any trait of that name.
	OrAbsent bool
}

// Check returns an error for a query that no engine can answer.
func (q *EventQuery) Check() error {
	for i := range q.Traits {
		c := &q.Traits[i]
		switch c.Op {
		case Eq, Ne, Lt, Le, Gt, Ge:
		default:
			return fmt.Errorf("events: trait %q: unknown operator %q", c.Name, c.Op)
		}
		if c.Type < sample.TextTrait || c.Type > sample.DatetimeTrait {
			return fmt.Errorf("events: trait %q: unknown type %d", c.Name, uint8(c.Type))
		}
	}
	return nil
}

// Match reports whether the event matches.
func (q *EventQuery) Match(e *sample.Event) bool {
	if q.ID != "" && e.ID != q.ID || q.Type != "" && e.Type != q.Type ||
		q.From != nil && e.Generated < *q.From || q.To != nil && e.Generated > *q.To {
		return false
	}
	for i := range q.Traits {
		if !q.Traits[i].match(e.Traits) {
			return false
		}
	}
	return true
}

func (c *TraitCond) match(traits []sample.Trait) bool {
	absent := true
	for i := range traits {
		t := &traits[i]
		if t.Name != c.Name {
			continue
		}
		absent = false
		if t.Type == c.Type && c.holds(CompareTraits(t, &c.Trait)) {
			return true
		}
	}
	return absent && c.OrAbsent
}

func (c *TraitCond) holds(order int) bool {
	switch c.Op {
	case Eq:
		return order == 0
	case Ne:
		return order != 0
	case Lt:
		return order < 0
	case Le:
		return order <= 0
	case Gt:
		return order > 0
	}
	return order >= 0
}

// CompareTraits orders the values of two traits of the same type.
func CompareTraits(a, b *sample.Trait) int {
	switch a.Type {
	case sample.TextTrait:
		return strings.Compare(a.Text, b.Text)
	case sample.FloatTrait:
		return cmp.Compare(a.Float, b.Float)
	}
	return cmp.Compare(a.Int, b.Int)
}

// SortTraitDescriptions puts descriptions into the order that
// [Events.TraitDescriptions] promises.
func SortTraitDescriptions(ds []TraitDescription) {
	slices.SortFunc(ds, func(a, b TraitDescription) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), cmp.Compare(a.Type, b.Type))
	})
}

// maxEventBytes bounds what one event may hold.
const maxEventBytes = 16 << 20

// CheckEvent returns why an event can never be stored, or nil.
func CheckEvent(e *sample.Event) error {
	if err := e.Check(); err != nil {
		return err
	}
	n := len(e.ID) + len(e.Type) + len(e.Raw)
	for i := range e.Traits {
		if e.Traits[i].Name == "" {
			return errors.New("a trait needs a name")
		}
		n += len(e.Traits[i].Name) + len(e.Traits[i].Text) + 16
	}
	if n > maxEventBytes {
		return fmt.Errorf("event %.64q has %d bytes, the most is %d", e.ID, n, maxEventBytes)
	}
	return nil
}
