package jsonpath

import (
	"errors"
	"fmt"
	"slices"

	"github.com/kvmeter/kvmeter/notifier/pattern"
	"github.com/kvmeter/kvmeter/notifier/value"
)

// match is a place in a message.
type match struct {
	v *value.Value
	// up is the place that it was found in, where that is kept: nil for the
	// root, and for what was computed.
	up    *match
	step  string // from up: the name of a field, "[1]"
	exact bool   // v is at step; else it only has up's or no name
}

// eval is the state of one evaluation.
type eval struct {
	root  *value.Value
	keep  bool // the places that matches were found in
	err   error
	steps int
}

// maxSteps bounds the work of one path on one message: unions and descendants
// within each other multiply.
const maxSteps = 1 << 20

var errSteps = errors.New("the path matches too much of this message")

// down returns what was found in another place.
func (e *eval) down(from match, v *value.Value, step string) match {
	m := match{v: v, step: step, exact: true}
	if e.keep {
		up := from // so that nothing is allocated where places are not kept
		m.up = &up
	}
	return m
}

// place returns the step to an element of a list, where places are kept.
func (e *eval) place(i int) string {
	if !e.keep {
		return ""
	}
	return fmt.Sprintf("[%d]", i)
}

func (e *eval) fail(err error) {
	if e.err == nil {
		e.err = err
	}
}

// node is a part of a path. find appends what it matches below in to out.
type node interface {
	find(e *eval, in match, out []match) []match
}

type (
	root   struct{}
	this   struct{}
	parent struct{}
	fields struct {
		names []string
		all   bool // one of them is *
	}
	child struct {
		left, right node
		names       []string // of the fields that left is, where it is nothing else
		fromRoot    bool
	}
	descend   struct{ left, right node }
	union     struct{ left, right node }
	intersect struct{}
	whereNode struct{ left, right node }
	index     struct{ number int }
	slice     struct{ from, to *int }
	filter    struct{ conditions []condition }
	condition struct {
		target node
		op     string // "": that there is one
		value  value.Value
		re     *pattern.Regexp
	}
	sorter  struct{ by []sortKey } // none: `sorted`
	sortKey struct {
		by   node
		down bool
	}
	length struct{}
	split  struct {
		separator string
		nth, most int
	}
	sub struct {
		re       *pattern.Regexp
		template string
	}
	arithmetic struct {
		op          byte
		left, right operand
	}
	operand struct {
		node     node // nil: the constant
		constant value.Value
		number   bool
	}
)

func (root) find(e *eval, _ match, out []match) []match { return append(out, match{v: e.root}) }

func (this) find(_ *eval, in match, out []match) []match { return append(out, in) }

func (parent) find(e *eval, in match, out []match) []match {
	if in.up == nil {
		e.fail(errors.New("`parent` of what has none"))
		return out
	}
	return append(out, *in.up)
}

func (f *fields) find(e *eval, in match, out []match) []match {
	if f.all {
		if in.v.Kind == value.Object {
			for i := range in.v.Items {
				out = append(out, e.down(in, &in.v.Items[i], in.v.Items[i].Key))
			}
		}
		return out
	}
	for _, name := range f.names {
		if v := in.v.Field(name); v != nil {
			out = append(out, e.down(in, v, name))
		}
	}
	return out
}

// each finds right below everything that left finds.
func each(e *eval, in match, left, right node, out []match) []match {
	var few [8]match
	for _, m := range left.find(e, in, few[:0]) {
		if e.steps++; e.steps > maxSteps {
			e.fail(errSteps)
		}
		if e.err != nil {
			return out
		}
		out = right.find(e, m, out)
	}
	return out
}

func (c *child) find(e *eval, in match, out []match) []match {
	if c.names != nil && !e.keep {
		v := in.v
		if c.fromRoot {
			v = e.root
		}
		for _, name := range c.names {
			if v = v.Field(name); v == nil {
				return out
			}
		}
		return c.right.find(e, match{v: v}, out)
	}
	return each(e, in, c.left, c.right, out)
}

func (d *descend) find(e *eval, in match, out []match) []match {
	return each(e, in, d.left, recursive{d.right}, out)
}

type recursive struct{ node }

func (r recursive) find(e *eval, in match, out []match) []match {
	if e.steps++; e.steps > maxSteps {
		e.fail(errSteps)
	}
	if e.err != nil {
		return out
	}
	out = r.node.find(e, in, out)
	for i := range in.v.Items {
		step := in.v.Items[i].Key
		if in.v.Kind == value.List {
			step = e.place(i)
		}
		out = r.find(e, e.down(in, &in.v.Items[i], step), out)
	}
	return out
}

func (u *union) find(e *eval, in match, out []match) []match {
	return u.right.find(e, in, u.left.find(e, in, out))
}

func (intersect) find(e *eval, _ match, out []match) []match {
	e.fail(errors.New("& between paths is not defined; it joins the conditions of a filter"))
	return out
}

func (w *whereNode) find(e *eval, in match, out []match) []match {
	for _, m := range w.left.find(e, in, nil) {
		if len(w.right.find(e, m, nil)) > 0 {
			out = append(out, m)
		}
	}
	return out
}

func (x *index) find(e *eval, in match, out []match) []match {
	n, ok := in.v.Len()
	if !ok {
		e.fail(fmt.Errorf("[%d] of %v", x.number, in.v.Kind))
		return out
	}
	if n <= x.number {
		return out
	}
	i := x.number
	if i < 0 {
		i += n
	}
	if in.v.Kind == value.Object || i < 0 {
		e.fail(fmt.Errorf("[%d] of %v of length %d", x.number, in.v.Kind, n))
		return out
	}
	var v *value.Value
	if in.v.Kind == value.List {
		v = &in.v.Items[i]
	} else {
		c := value.Of(string([]rune(in.v.Text)[i]))
		v = &c
	}
	return append(out, e.down(in, v, e.place(x.number)))
}

func (s *slice) find(e *eval, in match, out []match) []match {
	items := in.v.Items
	switch in.v.Kind {
	case value.List:
	case value.Null, value.Float:
		e.fail(fmt.Errorf("[*] or a slice of %v", in.v.Kind))
		return out
	default: // an object, integer or text becomes a list of itself
		items = []value.Value{*in.v}
	}
	from, to := 0, len(items)
	clip := func(bound *int, otherwise int) int {
		switch {
		case bound == nil:
			return otherwise
		case *bound < 0:
			return max(0, *bound+len(items))
		}
		return min(*bound, len(items))
	}
	from, to = clip(s.from, from), clip(s.to, to)
	for i := from; i < to; i++ {
		out = append(out, e.down(in, &items[i], e.place(i)))
	}
	return out
}

func (f *filter) find(e *eval, in match, out []match) []match {
	if in.v.Kind != value.List {
		return out
	}
	outer := e.root
	defer func() { e.root = outer }()
	for i := range in.v.Items {
		item := &in.v.Items[i]
		e.root = item
		pass := true
		for c := range f.conditions {
			pass = pass && f.conditions[c].holds(e, item)
		}
		if pass && e.err == nil {
			out = append(out, e.down(in, item, e.place(i)))
		}
	}
	return out
}

// holds reports whether one of the values that the condition is about meets it.
// Null meets none but that there is a value.
func (c *condition) holds(e *eval, item *value.Value) bool {
	var few [4]match
	for _, m := range c.target.find(e, match{v: item}, few[:0]) {
		if c.op == "" {
			return true
		}
		if m.v.Kind == value.Null {
			continue
		}
		if c.compare(e, m.v) {
			return true
		}
	}
	return false
}

func (c *condition) compare(e *eval, v *value.Value) bool {
	if c.value.Kind == value.Int || c.value.Kind == value.Bool {
		i, err := v.Integer()
		if errors.Is(err, value.ErrNumber) {
			return false
		}
		if err != nil {
			e.fail(err)
			return false
		}
		v = &i
	}
	switch c.op {
	case "=":
		return value.Equal(v, &c.value)
	case "!=":
		return !value.Equal(v, &c.value)
	case "~":
		if c.re == nil || v.Kind != value.Text {
			e.fail(fmt.Errorf("%w: ~ between %v and %v", value.ErrType, v.Kind, c.value.Kind))
			return false
		}
		return c.re.Match(v.Text)
	}
	order, ordered, err := value.Compare(v, &c.value)
	if err != nil {
		e.fail(err)
	}
	if !ordered {
		return false
	}
	switch c.op {
	case "<":
		return order < 0
	case "<=":
		return order <= 0
	case ">":
		return order > 0
	}
	return order >= 0
}

func (s *sorter) find(e *eval, in match, out []match) []match {
	sorted := value.Value{Kind: value.List}
	switch {
	case in.v.Kind == value.List:
		sorted.Items = slices.Clone(in.v.Items)
	case in.v.Kind == value.Object && s.by == nil:
		for i := range in.v.Items {
			sorted.Items = append(sorted.Items, value.Of(in.v.Items[i].Key))
		}
	default:
		e.fail(fmt.Errorf("%v can't be sorted", in.v.Kind))
		return out
	}
	outer := e.root
	defer func() { e.root = outer }()
	slices.SortStableFunc(sorted.Items, func(a, b value.Value) int {
		order, err := s.compare(e, &a, &b)
		if err != nil {
			e.fail(err)
		}
		return order
	})
	return append(out, match{v: &sorted})
}

func (s *sorter) compare(e *eval, a, b *value.Value) (int, error) {
	if s.by == nil {
		order, _, err := value.Compare(a, b)
		return order, err
	}
	for _, key := range s.by {
		e.root = a
		as := key.by.find(e, match{v: a}, nil)
		e.root = b
		bs := key.by.find(e, match{v: b}, nil)
		for i := range min(len(as), len(bs)) {
			if value.Equal(as[i].v, bs[i].v) {
				continue
			}
			order, _, err := value.Compare(as[i].v, bs[i].v)
			if key.down {
				order = -order
			}
			return order, err
		}
	}
	return 0, nil
}

func (length) find(_ *eval, in match, out []match) []match {
	if n, ok := in.v.Len(); ok {
		v := value.OfInt(int64(n))
		out = append(out, match{v: &v})
	}
	return out
}

func (s *split) find(_ *eval, in match, out []match) []match {
	if in.v.Kind != value.Text {
		return out
	}
	piece, ok := value.Piece(in.v.Text, s.separator, s.nth, s.most)
	if !ok {
		return out
	}
	v := value.Of(piece)
	return append(out, match{v: &v})
}

func (s *sub) find(e *eval, in match, out []match) []match {
	if in.v.Kind != value.Text {
		e.fail(fmt.Errorf("%w: `sub` of %v", value.ErrType, in.v.Kind))
		return out
	}
	text, err := s.re.Replace(in.v.Text, s.template)
	if err != nil {
		e.fail(err)
		return out
	}
	if text == in.v.Text {
		return out
	}
	v := value.Of(text)
	return append(out, match{v: &v})
}

func (a *arithmetic) find(e *eval, in match, out []match) []match {
	values := func(o *operand) []match {
		if o.node == nil {
			return []match{{v: &o.constant}}
		}
		return o.node.find(e, in, nil)
	}
	left, right := values(&a.left), values(&a.right)
	n := len(left)
	switch {
	case a.left.node == nil:
		n = len(right)
	case a.right.node == nil:
	case len(left) != len(right):
		return out
	}
	start := len(out)
	for i := range n {
		l, r := left[0], right[0]
		if a.left.node != nil {
			l = left[i]
		}
		if a.right.node != nil {
			r = right[i]
		}
		v, err := value.Operate(a.op, l.v, r.v)
		if err != nil {
			return out[:start]
		}
		out = append(out, match{v: &v})
	}
	return out
}
