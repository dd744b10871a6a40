// Package events turns notifications into events, by event definitions.
package events

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/sample"
)

// Options are the settings that change what definitions give.
type Options struct {
	// DropUnmatched makes no event of what no definition matches; else it has the
	// default traits.
	DropUnmatched bool
	// StoreRaw are the priorities of which the notification is kept whole.
	StoreRaw []string
}

//go:embed shipped.yaml
var shipped []byte

// ShippedName is the name of the definitions that kvmeter brings, in findings.
const ShippedName = "shipped event_definitions.yaml"

// Shipped returns the definitions that kvmeter brings.
func Shipped() []byte { return shipped }

// Set are the definitions of a file, compiled. It is safe for concurrent use.
type Set struct {
	opt         Options
	definitions []*event // the last one that matches counts
	index       definition.Index
	findings    []definition.Finding
}

// Findings returns what there is to say about the file.
func (s *Set) Findings() []definition.Finding { return s.findings }

// event is a definition.
type event struct {
	where            string // file and line
	node             *yaml.Node
	include, exclude []string
	excluded         []*sample.Matcher
	traits           []trait
}

type trait struct {
	name  string
	kind  sample.TraitType
	field *definition.Field
}

// defaults are the traits that every event has, unless it defines them itself.
const defaults = `service: publisher_id
request_id: ctxt.request_id
project_id: [payload.tenant_id, ctxt.project_id]
user_id: [payload.user_id, ctxt.user_id]
tenant_id: [payload.tenant_id, ctxt.project_id]
`

// Load compiles definitions. Where one has an error, Ceilometer would not
// start: the error names all of them, and the findings are there in any case.
func Load(file string, data []byte, opt Options) (*Set, error) {
	s := &Set{opt: opt}
	l := &loader{r: &definition.Reader{File: file}}
	doc, err := l.r.Document(data)
	if err != nil {
		return s, err
	}
	if doc.Kind != yaml.SequenceNode {
		return s, fmt.Errorf("%s:%d: event definitions are a list of {event_type, traits}", file, doc.Line)
	}
	common := &definition.Reader{File: "default traits"}
	n, err := common.Document([]byte(defaults))
	if err != nil {
		return s, err
	}
	l.common = (&loader{r: common}).traits(n)
	catchAll := false
	for _, n := range doc.Content {
		if e := l.event(definition.Resolve(n)); e != nil {
			s.definitions = append(s.definitions, e)
			catchAll = catchAll || len(e.exclude) == 0 && slices.Contains(e.include, "*")
		}
	}
	if !opt.DropUnmatched && !catchAll {
		s.definitions = slices.Insert(s.definitions, 0, &event{where: "default traits", include: []string{"*"}, traits: l.common})
	}
	for i, e := range s.definitions {
		l.register(&s.index, i, e)
	}
	l.shadowed(s.definitions)
	s.findings = l.r.Findings
	return s, definition.Errors(s.findings)
}

type loader struct {
	r      *definition.Reader
	common []trait
}

// event compiles a definition; it returns nil where it can't.
func (l *loader) event(n *yaml.Node) *event {
	if n.Kind != yaml.MappingNode {
		l.r.Fail(n, "a definition is a mapping with event_type and traits")
		return nil
	}
	var types, traits *yaml.Node
	for _, p := range l.r.Pairs(n) {
		switch p.Key.Value {
		case "event_type":
			types = p.Value
		case "traits":
			traits = p.Value
		default:
			l.r.Warn(p.Key, "unknown key %q of a definition is ignored; there are event_type and traits", p.Key.Value)
		}
	}
	if types == nil || traits == nil {
		l.r.Fail(n, "a definition needs event_type and traits; traits: {} keeps the default ones only")
		return nil
	}
	e := &event{where: fmt.Sprintf("%s:%d", l.r.File, n.Line), node: n}
	if types.Kind == yaml.SequenceNode && len(types.Content) == 0 || types.Kind == yaml.ScalarNode && types.Value == "" && types.Tag == "!!str" {
		l.r.Warn(types, "event_type is empty, so this definition matches nothing; \"*\" matches everything")
		return e
	}
	for _, glob := range l.r.Texts(types, "event_type") {
		if not, ok := strings.CutPrefix(glob, "!"); ok {
			e.exclude = append(e.exclude, not)
			continue
		}
		if strings.ContainsAny(glob, "()|+^$") || strings.Contains(glob, `\`) {
			l.r.Warn(types, "%q looks like a regular expression; event types of events are shell globs (* ? [..])", glob)
		}
		e.include = append(e.include, glob)
	}
	if e.include == nil && e.exclude != nil {
		e.include = []string{"*"}
	}
	if traits.Kind == yaml.SequenceNode && len(traits.Content) == 0 {
		e.traits = l.common
		return e
	}
	if traits.Kind != yaml.MappingNode {
		l.r.Fail(traits, "traits: it is a mapping of names to paths; write {} for the default ones only")
		return nil
	}
	e.traits = l.traits(traits)
	return e
}

// traits compiles traits, after the default ones.
func (l *loader) traits(n *yaml.Node) []trait {
	ts := slices.Clone(l.common)
	for _, p := range l.r.Pairs(n) {
		t, ok := l.trait(p.Key.Value, p.Value)
		if !ok {
			continue
		}
		if at := slices.IndexFunc(ts, func(o trait) bool { return o.name == t.name }); at >= 0 {
			ts[at] = t
		} else {
			ts = append(ts, t)
		}
	}
	return ts
}

func (l *loader) trait(name string, n *yaml.Node) (trait, bool) {
	t := trait{name: name, kind: sample.TextTrait}
	if n.Kind == yaml.MappingNode {
		for _, p := range l.r.Pairs(n) {
			if p.Key.Value != "type" {
				continue
			}
			switch strings.ToLower(p.Value.Value) {
			case "text":
			case "int":
				t.kind = sample.IntTrait
			case "float":
				t.kind = sample.FloatTrait
			case "datetime":
				t.kind = sample.DatetimeTrait
			default:
				l.r.Fail(p.Value, "trait %s: invalid type %q; there are text, int, float and datetime", name, p.Value.Value)
				return t, false
			}
		}
	}
	t.field = l.r.Field(n, "trait "+name)
	return t, t.field != nil
}

// register adds a definition to the index.
func (l *loader) register(x *definition.Index, number int, e *event) {
	for _, glob := range e.exclude {
		if m := l.glob(e, glob); m != nil {
			e.excluded = append(e.excluded, m)
		}
	}
	for _, glob := range e.include {
		m := l.glob(e, glob)
		if m == nil {
			continue
		}
		wild := strings.IndexAny(glob, "*?[")
		p := definition.Pattern{Prefix: glob, Exact: wild < 0 && e.excluded == nil}
		if wild >= 0 {
			p.Prefix = glob[:wild]
		}
		p.Match = func(eventType string) bool { return m.Match(eventType) && !e.excludes(eventType) }
		x.Add(number, p)
	}
}

func (e *event) excludes(eventType string) bool {
	return slices.ContainsFunc(e.excluded, func(m *sample.Matcher) bool { return m.Match(eventType) })
}

func (l *loader) glob(e *event, glob string) *sample.Matcher {
	m, err := sample.NewMatcher([]string{glob})
	if err != nil {
		l.r.Fail(e.node, "event_type: %v", err)
	}
	return m
}

// shadowed warns of definitions that another one after them always hides: of a
// literal event type, only the last match is used.
func (l *loader) shadowed(all []*event) {
	for i, e := range all {
		for _, glob := range e.include {
			if strings.ContainsAny(glob, "*?[") {
				continue
			}
			for _, later := range all[i+1:] {
				if hides(later, glob) {
					l.r.Warn(e.node, "event type %s is never taken here: the last definition that matches counts, which is that at %s; move this one after it", glob, later.where)
					break
				}
			}
		}
	}
}

// hides reports whether a definition matches an event type.
func hides(e *event, eventType string) bool {
	for _, glob := range e.include {
		if m, err := sample.NewMatcher([]string{glob}); err == nil && m.Match(eventType) {
			return !e.excludes(eventType)
		}
	}
	return false
}
