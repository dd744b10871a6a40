// Package jsonpath reads and evaluates the paths of meter and event
// definitions: the dialect of Ceilometer, with its filters, sorts, functions and
// arithmetic, and its precedences.
//
// A union binds more tightly than a dot, so a.b|c.d is a.(b|c).d. Arithmetic
// takes everything that follows it, so x - y - z is x - (y - z) and x * 2 + y
// is x * (2 + y). There is no division. A single field next to an operator is
// a text.
package jsonpath

import (
	"slices"
	"strings"
	"sync"

	"github.com/kvmeter/kvmeter/notifier/value"
)

// Path is a compiled path. It is safe for concurrent use.
type Path struct {
	text  string
	node  node
	keep  bool
	chain []string // of fields from the root, where the path is nothing else
}

// Match is a value that a path leads to.
type Match struct {
	*value.Value
	place match
}

// Compile reads a path. Its error is a [*SyntaxError].
func Compile(text string) (*Path, error) {
	n, keep, err := parse(text)
	if err != nil {
		return nil, err
	}
	p := &Path{text: text, node: n, keep: keep, chain: chain(n)}
	return p, nil
}

// chain returns the fields of $.a.b.c or a.b.c, or nil where there is more to it.
func chain(n node) []string {
	switch n := n.(type) {
	case *fields:
		if len(n.names) == 1 && !n.all {
			return n.names
		}
	case *child:
		if _, ok := n.left.(root); ok {
			return chain(n.right)
		}
		left, right := chain(n.left), chain(n.right)
		if _, again := n.right.(*child); left != nil && right != nil && !again {
			return append(slices.Clip(left), right...)
		}
	}
	return nil
}

// String returns the path as it was written.
func (p *Path) String() string { return p.text }

// First returns the first value that is not null, or nil.
func (p *Path) First(message *value.Value) (*value.Value, error) {
	if p.chain != nil {
		v := message
		for _, name := range p.chain {
			if v = v.Field(name); v == nil {
				return nil, nil
			}
		}
		if v.Kind == value.Null {
			return nil, nil
		}
		return v, nil
	}
	w := works.Get().(*work)
	defer works.Put(w)
	w.eval = eval{root: message, keep: p.keep}
	ms := p.node.find(&w.eval, match{v: message}, w.found[:0])
	if w.eval.err != nil {
		return nil, w.eval.err
	}
	for i := range ms {
		if ms[i].v.Kind != value.Null {
			return ms[i].v, nil
		}
	}
	return nil, nil
}

// work is the memory of an evaluation of which nothing is kept but a value.
type work struct {
	eval  eval
	found [8]match
}

var works = sync.Pool{New: func() any { return new(work) }}

// All returns all values, null among them; places says whether [Match.Where] will
// be asked.
func (p *Path) All(message *value.Value, places bool) ([]Match, error) {
	ms, err := p.find(message, places || p.keep)
	out := make([]Match, len(ms))
	for i, m := range ms {
		out[i] = Match{m.v, m}
	}
	return out, err
}

func (p *Path) find(message *value.Value, keep bool) ([]match, error) {
	e := eval{root: message, keep: keep}
	ms := p.node.find(&e, match{v: message}, nil)
	if e.err != nil {
		return nil, e.err
	}
	return ms, nil
}

// Where returns the fields and elements that lead to the match, joined by dots,
// as in "payload.list.[0].name".
func (m *Match) Where() string {
	var steps []string
	for at := &m.place; at != nil; at = at.up {
		if at.exact {
			steps = append(steps, at.step)
		}
	}
	var b strings.Builder
	for i := len(steps) - 1; i >= 0; i-- {
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(steps[i])
	}
	if b.Len() == 0 {
		return "$"
	}
	return b.String()
}
