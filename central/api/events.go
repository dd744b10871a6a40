package api

import (
	"context"
	"errors"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// anyone is the rule of operations that every identity may ask for; they decide
// themselves what it sees.
const anyone = "*"

// events lists events, the oldest first.
func (s *server) events(r *request, out *output) error {
	p, err := readParams(r.Request, "q", "limit", "marker", "all_projects")
	if err != nil {
		return err
	}
	scope, err := r.caller.eventScope(p)
	if err != nil {
		return err
	}
	limit, err := s.limit(p)
	if err != nil {
		return err
	}
	q, err := parseEventQuery(p.objects["q"])
	if err != nil {
		return err
	}
	q.Traits = append(q.Traits, scope...)
	page, err := s.afterEvent(r, p, scope)
	if err != nil {
		return err
	}
	if page.marker != "" && (q.From == nil || *q.From < page.at) {
		q.From = &page.at
	}
	list := listOf(out, limit)
	if err := s.eachEvent(r.Context(), q, func(e *sample.Event) (bool, error) {
		if page.before(e.ID, e.Generated > page.at) {
			return true, nil
		}
		return list.add(func(b []byte) []byte { return appendEvent(b, e) })
	}); err != nil {
		return err
	}
	list.end()
	return nil
}

// eachEvent calls each with the events that match, until it returns false.
func (s *server) eachEvent(ctx context.Context, q *store.EventQuery, each func(*sample.Event) (bool, error)) error {
	var sent error
	err := s.store.Events(ctx, *q, func(e sample.Event) bool {
		var more bool
		more, sent = each(&e)
		return more && sent == nil
	})
	return errors.Join(err, sent)
}

func (s *server) event(r *request, out *output) error {
	p, err := readParams(r.Request, "all_projects")
	if err != nil {
		return err
	}
	scope, err := r.caller.eventScope(p)
	if err != nil {
		return err
	}
	found := false
	err = s.eachEvent(r.Context(), &store.EventQuery{ID: r.names[0], Traits: scope}, func(e *sample.Event) (bool, error) {
		found = true
		out.buf = appendEvent(out.buf, e)
		return false, nil
	})
	if err == nil && !found {
		err = notFound("Event", r.names[0])
	}
	return err
}

// eventScope returns the conditions on the events that a caller sees: of those
// who see every project, the events of their own and those of none, or all if
// they ask for all_projects; of all others, their own in their project.
func (c *caller) eventScope(p *params) ([]store.TraitCond, error) {
	all, err := p.flag("all_projects")
	switch {
	case err != nil:
		return nil, err
	case all && c.all:
		return nil, nil
	case all || c.User == "" || c.Project == "":
		return nil, errForbidden
	}
	project := textEqual("project_id", c.Project)
	if c.all {
		project.OrAbsent = true
		return []store.TraitCond{project}, nil
	}
	return []store.TraitCond{project, textEqual("user_id", c.User)}, nil
}

func textEqual(name, value string) store.TraitCond {
	return store.TraitCond{Trait: sample.Trait{Name: name, Type: sample.TextTrait, Text: value}, Op: store.Eq}
}

// parseEventQuery reads the terms of a query of events. Terms on traits must all
// hold; of two on the same other field the last one does.
func parseEventQuery(terms []object) (*store.EventQuery, error) {
	if err := complete(terms); err != nil {
		return nil, err
	}
	q := &store.EventQuery{}
	for _, t := range terms {
		ops := []string{"lt", "le", "eq", "ne", "ge", "gt"}
		if !slices.Contains(ops, op(t)) {
			return nil, badRequest("Operator %s is not supported. The supported operators are: ('lt', 'le', 'eq', 'ne', 'ge', 'gt')", clip(op(t)))
		}
		var err error
		switch field := t["field"]; field {
		case "event_type":
			q.Type = t["value"]
			err = onlyOps(t, "eq")
		case "message_id":
			q.ID = t["value"]
			err = onlyOps(t, "eq")
		case "start_timestamp":
			q.From, err = timeTerm(t, "ge")
		case "end_timestamp":
			q.To, err = timeTerm(t, "le")
		default:
			var c store.TraitCond
			c, err = traitCond(t)
			q.Traits = append(q.Traits, c)
		}
		if err != nil {
			return nil, err
		}
	}
	return q, nil
}

// onlyOps refuses a term with another operator; the message names the first.
func onlyOps(t object, ops ...string) error {
	if slices.Contains(ops, op(t)) {
		return nil
	}
	return badRequest("Operator %s is not supported. Only `%s' operator is available for field %s", op(t), ops[0], t["field"])
}

func timeTerm(t object, want string) (*int64, error) {
	if err := onlyOps(t, want, "eq"); err != nil {
		return nil, err
	}
	at, err := parseTime(t["value"])
	if err != nil {
		return nil, invalidInput(t["field"], t["value"], "invalid timestamp format")
	}
	return &at, nil
}

func traitCond(t object) (store.TraitCond, error) {
	c := store.TraitCond{Trait: sample.Trait{Name: t["field"]}, Op: store.Op(op(t))}
	kind, text := t["type"], strings.TrimSpace(t["value"])
	var err error
	switch kind {
	case "", "string":
		c.Type, c.Text = sample.TextTrait, t["value"]
	case "integer":
		c.Type = sample.IntTrait
		c.Int, err = strconv.ParseInt(text, 10, 64)
	case "float":
		c.Type = sample.FloatTrait
		if c.Float, err = strconv.ParseFloat(text, 64); err == nil {
			err = sample.Float(c.Float).Check()
		}
	case "datetime":
		c.Type = sample.DatetimeTrait
		c.Int, err = parseTime(text)
	default:
		return c, badRequest("The data type %s is not supported. The supported data type list is: ['integer', 'float', 'string', 'datetime']", clip(kind))
	}
	if err != nil {
		err = badRequest("Unable to convert the value %s to the expected data type %s.", clip(t["value"]), kind)
	}
	return c, err
}

// eventTypes lists the types of all events.
func (s *server) eventTypes(r *request, out *output) error {
	if err := r.caller.mustSeeAll(r); err != nil {
		return err
	}
	types, err := s.store.EventTypes(r.Context())
	if err != nil {
		return err
	}
	list := listOf(out, math.MaxInt)
	for _, t := range types {
		if _, err := list.add(func(b []byte) []byte { return appendString(b, t) }); err != nil {
			return err
		}
	}
	list.end()
	return nil
}

// mustSeeAll refuses callers who see only their project, and arguments.
func (c *caller) mustSeeAll(r *request) error {
	project, limited, err := c.scope()
	if err == nil && limited {
		err = notAuthorized(project)
	}
	if err == nil {
		_, err = readParams(r.Request)
	}
	return err
}

// eventType is never found, as in the original.
func (s *server) eventType(r *request, _ *output) error {
	if err := r.caller.mustSeeAll(r); err != nil {
		return err
	}
	return errNoRoute
}

// traitDescriptions lists the traits of an event type: texts, integers, floats,
// times.
func (s *server) traitDescriptions(r *request, out *output) error {
	if err := r.caller.mustSeeAll(r); err != nil {
		return err
	}
	ds, err := s.store.TraitDescriptions(r.Context(), r.names[0])
	if err != nil {
		return err
	}
	slices.SortStableFunc(ds, func(a, b store.TraitDescription) int { return int(a.Type) - int(b.Type) })
	list := listOf(out, math.MaxInt)
	for _, d := range ds {
		if _, err := list.add(func(b []byte) []byte {
			b = appendString(field(append(b, '{'), "type"), traitType(d.Type))
			return append(appendString(field(b, "name"), d.Name), '}')
		}); err != nil {
			return err
		}
	}
	list.end()
	return nil
}

// traits lists the values that a trait has in events of a type.
func (s *server) traits(r *request, out *output) error {
	if err := r.caller.mustSeeAll(r); err != nil {
		return err
	}
	list := listOf(out, math.MaxInt)
	var sent error
	err := s.store.Traits(r.Context(), r.names[0], r.names[1], func(t sample.Trait) bool {
		_, sent = list.add(func(b []byte) []byte { return appendTrait(b, &t) })
		return sent == nil
	})
	if err := errors.Join(err, sent); err != nil {
		return err
	}
	list.end()
	return nil
}

// traitType returns a trait's type as the API has it.
func traitType(t sample.TraitType) string {
	switch t {
	case sample.IntTrait:
		return "integer"
	case sample.FloatTrait:
		return "float"
	case sample.DatetimeTrait:
		return "datetime"
	}
	return "string"
}

// appendEvent prints an event, its traits sorted by name.
func appendEvent(dst []byte, e *sample.Event) []byte {
	dst = append(dst, '{')
	dst = appendString(field(dst, "message_id"), e.ID)
	dst = appendString(field(dst, "event_type"), e.Type)
	dst = appendQuotedTime(field(dst, "generated"), e.Generated)
	dst = append(field(dst, "traits"), '[')
	traits := slices.Clone(e.Traits)
	slices.SortStableFunc(traits, func(a, b sample.Trait) int { return strings.Compare(a.Name, b.Name) })
	for i := range traits {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = appendTrait(dst, &traits[i])
	}
	dst = field(append(dst, ']'), "raw")
	if len(e.Raw) == 0 {
		return append(dst, "{}}"...)
	}
	return append(append(dst, e.Raw...), '}')
}

// appendTrait prints a trait; its value is always text.
func appendTrait(dst []byte, t *sample.Trait) []byte {
	dst = append(dst, '{')
	dst = appendString(field(dst, "name"), t.Name)
	dst = appendString(field(dst, "type"), traitType(t.Type))
	dst = field(dst, "value")
	switch t.Type {
	case sample.TextTrait:
		dst = appendString(dst, t.Text)
	case sample.DatetimeTrait:
		dst = t.AppendValue(dst)
	default:
		dst = append(t.AppendValue(append(dst, '"')), '"')
	}
	return append(dst, '}')
}

// ingestSamples stores the samples that Ceilometer's http:// publisher, or ours,
// posts: a list, or one by itself. A sample that comes again counts once.
func (s *server) ingestSamples(r *request, out *output) error {
	elements, err := readElements(r)
	if err != nil {
		return err
	}
	samples := make([]sample.Sample, len(elements))
	for i, e := range elements {
		if samples[i], err = sample.ParseForeign(e); err != nil {
			return badRequest("Sample %d: %s", i, clip(err.Error()))
		}
		if !r.caller.all && !slices.Contains(r.caller.Roles, "service") && samples[i].Project != r.caller.Project {
			return invalidInput("project_id", samples[i].Project, "can not post samples to other projects")
		}
	}
	if err := Store(r.Context(), s.store, BatchOf(s.opts.Clock(), samples)); err != nil {
		return err
	}
	out.status = http.StatusNoContent
	return nil
}

// ingestEvents stores the events that Ceilometer's http:// publisher, or ours,
// posts. Only those who see every project may say what happened.
func (s *server) ingestEvents(r *request, out *output) error {
	elements, err := readElements(r)
	if err != nil {
		return err
	}
	if !r.caller.all && !slices.Contains(r.caller.Roles, "service") {
		return errForbidden
	}
	events := make([]sample.Event, len(elements))
	for i, e := range elements {
		if events[i], err = sample.ParseEvent(e); err == nil {
			err = store.CheckEvent(&events[i])
		}
		if err != nil {
			return badRequest("Event %d: %s", i, clip(err.Error()))
		}
	}
	if _, err := s.store.AppendEvents(r.Context(), events); err != nil {
		return storeFault(err)
	}
	out.status = http.StatusNoContent
	return nil
}
