package events

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/notifier/notification"
	"github.com/kvmeter/kvmeter/notifier/slab"
	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/sample"
)

// maxText is how many characters of a text a trait keeps.
const maxText = 255

// Converter applies a set of definitions. It is not safe for concurrent use.
type Converter struct {
	set      *Set
	cache    definition.Cache[*event]
	warnings []string
	traits   []sample.Trait // of an event that is being made

	madeEvents slab.Slab[sample.Event]
	madeTraits slab.Slab[sample.Trait]
}

// NewConverter returns a converter for a set.
func NewConverter(set *Set) *Converter { return &Converter{set: set} }

// Convert returns the event that a notification gives, or nil. A trait that
// cannot be converted is left out: an error says which and why, and the event
// is there all the same.
func (c *Converter) Convert(n *notification.Notification) (*sample.Event, error) {
	c.warnings = c.warnings[:0]
	if n.Priority != "" && n.Priority != "info" && n.Priority != "error" {
		return nil, nil
	}
	d := c.cache.Get(n.EventType, c.last)
	if d == nil {
		return nil, nil
	}
	if n.ID == "" {
		return nil, fmt.Errorf("%w: it has no message_id", notification.ErrMalformed)
	}
	when, err := n.Time()
	if err != nil {
		return nil, err
	}
	e := c.madeEvents.New()
	e.ID, e.Type, e.Generated = n.ID, n.EventType, when.UnixMicro()
	traits := c.traits[:0]
	var errs []error
	for i := range d.traits {
		t, ok, err := c.trait(&d.traits[i], n)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: trait %s: %w", d.where, d.traits[i].name, err))
		case ok:
			traits = append(traits, t)
		}
	}
	e.Traits = c.madeTraits.Take(len(traits))
	copy(e.Traits, traits)
	c.traits = traits
	if slices.Contains(c.set.opt.StoreRaw, n.Priority) {
		e.Raw = n.Message.AppendJSON(nil)
	}
	return e, errors.Join(errs...)
}

// last returns the last definition that matches an event type, or nil.
func (c *Converter) last(eventType string) *event {
	found := c.set.index.Find(eventType)
	if len(found) == 0 {
		return nil
	}
	return c.set.definitions[found[len(found)-1]]
}

// trait returns a trait; ok is false where the notification has no value for it.
func (c *Converter) trait(d *trait, n *notification.Notification) (t sample.Trait, ok bool, err error) {
	v, err := d.field.First(&n.Message, (*definition.Warnings)(&c.warnings))
	if err != nil || v == nil {
		return t, false, err
	}
	t = sample.Trait{Name: d.name, Type: d.kind}
	if d.kind == sample.TextTrait {
		t.Text = value.Cut(v.Str(), maxText)
		return t, true, nil
	}
	if v.Kind == value.Text && v.Text == "" {
		return t, false, nil
	}
	switch d.kind {
	case sample.IntTrait:
		i, err := v.Integer()
		if err != nil {
			return t, false, err
		}
		if t.Int, err = strconv.ParseInt(i.Text, 10, 64); err != nil {
			return t, false, fmt.Errorf("%.40s does not fit in 64 bits", i.Text)
		}
	case sample.FloatTrait:
		if t.Float, err = v.Float64(); err != nil {
			return t, false, err
		}
		if math.IsNaN(t.Float) || math.IsInf(t.Float, 0) {
			return t, false, sample.ErrNotFinite
		}
	case sample.DatetimeTrait:
		if v.Kind != value.Text {
			return t, false, fmt.Errorf("%v is no time", v.Kind)
		}
		at, err := value.ParseTime(v.Text)
		if err != nil {
			return t, false, err
		}
		t.Int = at.UnixMicro()
	}
	return t, true, nil
}

// Why returns what decided about the event of the last notification.
func (c *Converter) Why(n *notification.Notification) []string {
	if n.Priority != "" && n.Priority != "info" && n.Priority != "error" {
		return []string{fmt.Sprintf("priority %s: events are made of info and error", n.Priority)}
	}
	d := c.cache.Get(n.EventType, c.last)
	if d == nil {
		return []string{fmt.Sprintf("no event definition matches event type %s, and such notifications are dropped", n.EventType)}
	}
	types := slices.Clone(d.include)
	for _, x := range d.exclude {
		types = append(types, "!"+x)
	}
	why := []string{fmt.Sprintf("%s: the event is made by this definition, the last that matches: %s", d.where, strings.Join(types, " "))}
	return append(why, c.warnings...)
}
