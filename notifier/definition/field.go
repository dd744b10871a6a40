package definition

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/jsonpath"
	"github.com/kvmeter/kvmeter/notifier/value"
)

// Field is where a value comes from: a constant, or a path and perhaps a
// plugin.
type Field struct {
	constant *value.Value
	path     *jsonpath.Path
	plugin   plugin
}

// Warnings collects what a conversion found odd; nil collects nothing.
type Warnings []string

func (w *Warnings) add(format string, args ...any) {
	if w != nil {
		*w = append(*w, fmt.Sprintf(format, args...))
	}
}

// Field compiles the value of an attribute; what names it in errors. It returns
// nil after a failure.
func (r *Reader) Field(n *yaml.Node, what string) *Field {
	n = Resolve(n)
	f := &Field{}
	fields := n
	if n.Kind == yaml.MappingNode {
		fields = nil
		for _, p := range r.Pairs(n) {
			switch p.Key.Value {
			case "fields":
				fields = p.Value
			case "plugin":
				if f.plugin = r.plugin(p.Value, what); f.plugin == nil {
					return nil
				}
			case "type":
			default:
				r.Warn(p.Key, "%s: unknown key %q is ignored; there are fields, plugin and, of traits, type", what, p.Key.Value)
			}
		}
		if fields == nil {
			r.Fail(n, "%s: fields are missing; name the path: fields: $.payload.…", what)
			return nil
		}
	}
	if fields.Kind == yaml.SequenceNode && len(fields.Content) == 1 {
		fields = Resolve(fields.Content[0])
	}
	switch fields.Kind {
	case yaml.ScalarNode:
		return r.path(f, fields, what)
	case yaml.SequenceNode:
		var paths []string
		for _, item := range fields.Content {
			paths = append(paths, "("+Resolve(item).Value+")")
		}
		if len(paths) == 0 {
			r.Fail(fields, "%s: the list of paths is empty", what)
			return nil
		}
		return r.compile(f, fields, strings.Join(paths, "|"), what)
	}
	r.Fail(fields, "%s: it is neither a path nor a list of paths", what)
	return nil
}

func (r *Reader) path(f *Field, n *yaml.Node, what string) *Field {
	switch v := Scalar(n); v.Kind {
	case value.Int, value.Bool:
		f.constant = &v
		return f
	case value.Null:
		r.Fail(n, "%s is empty; name a path: $.payload.…", what)
		return nil
	case value.Float:
		r.Fail(n, "%s: %s is no whole number; a constant must be one, so compute from a path, as in $.payload.x * %s", what, n.Value, n.Value)
		return nil
	}
	return r.compile(f, n, n.Value, what)
}

func (r *Reader) compile(f *Field, n *yaml.Node, text, what string) *Field {
	path, err := jsonpath.Compile(text)
	if err != nil {
		r.Fail(n, "%s: %v", what, err)
		return nil
	}
	for _, quirk := range jsonpath.Quirks(text) {
		r.Warn(n, "%s: path %q: %s", what, text, quirk)
	}
	f.path = path
	return f
}

// Multiple reports whether the field can give more than one value.
func (f *Field) Multiple() bool {
	_, ok := f.plugin.(*split)
	return f.plugin == nil || ok
}

// First returns the first value that is not null, or nil.
func (f *Field) First(message *value.Value, w *Warnings) (*value.Value, error) {
	if f.plugin == nil {
		if f.constant != nil {
			return f.constant, nil
		}
		return f.path.First(message)
	}
	vs, err := f.computed(message, false, w)
	if err != nil || len(vs) == 0 {
		return nil, err
	}
	return vs[0], nil
}

// ErrOneValue is what [Field.All] returns where there can be one value only.
var ErrOneValue = errors.New("this plugin gives one value, but lookup makes several samples; only split can be used here")

// All returns all values, null among them.
func (f *Field) All(message *value.Value, w *Warnings) ([]*value.Value, error) {
	if !f.Multiple() {
		return nil, ErrOneValue
	}
	if f.plugin != nil {
		return f.computed(message, true, w)
	}
	if f.constant != nil {
		return []*value.Value{f.constant}, nil
	}
	ms, err := f.path.All(message, false)
	vs := make([]*value.Value, len(ms))
	for i := range ms {
		vs[i] = ms[i].Value
	}
	return vs, err
}

// computed returns the plugin's values that are not null.
func (f *Field) computed(message *value.Value, nulls bool, w *Warnings) ([]*value.Value, error) {
	if f.constant != nil {
		return nil, errors.New("a plugin on a constant")
	}
	_, places := f.plugin.(*bitfield)
	ms, err := f.path.All(message, places)
	if err != nil {
		return nil, err
	}
	if !nulls {
		ms = slices.DeleteFunc(ms, func(m jsonpath.Match) bool { return m.Kind == value.Null })
	}
	vs, err := f.plugin.values(ms, w)
	out := vs[:0]
	for _, v := range vs {
		if v != nil && v.Kind != value.Null {
			out = append(out, v)
		}
	}
	return out, err
}
