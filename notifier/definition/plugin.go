package definition

import (
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/jsonpath"
	"github.com/kvmeter/kvmeter/notifier/value"
)

// plugin computes values from those that a path has found.
type plugin interface {
	values(ms []jsonpath.Match, w *Warnings) ([]*value.Value, error)
}

// plugin reads the value of the key plugin: a name, or name and parameters.
func (r *Reader) plugin(n *yaml.Node, what string) plugin {
	name := n
	parameters := map[string]*yaml.Node{}
	if n.Kind == yaml.MappingNode {
		name = nil
		for _, p := range r.Pairs(n) {
			switch p.Key.Value {
			case "name":
				name = p.Value
			case "parameters":
				if p.Value.Kind != yaml.MappingNode {
					if p.Value.Tag != "!!null" {
						r.Fail(p.Value, "%s: the parameters of a plugin are keys with values", what)
						return nil
					}
					continue
				}
				for _, q := range r.Pairs(p.Value) {
					parameters[q.Key.Value] = q.Value
				}
			default:
				r.Warn(p.Key, "%s: unknown key %q is ignored; a plugin has name and parameters", what, p.Key.Value)
			}
		}
	}
	if name == nil || name.Kind != yaml.ScalarNode {
		r.Fail(n, "%s: the plugin has no name; write plugin: {name: …, parameters: {…}}", what)
		return nil
	}
	before := len(r.Findings)
	var p plugin
	switch name.Value {
	case "split":
		p = r.split(n, what, parameters)
	case "bitfield":
		p = r.bitfield(n, what, parameters)
	case "timedelta":
		p = timedelta{}
	case "map":
		p = r.mapping(n, what, parameters)
	default:
		r.Fail(name, "%s: there is no plugin %q; there are split, bitfield, timedelta and map", what, name.Value)
		return nil
	}
	for key, v := range parameters {
		r.Warn(v, "%s: plugin %s has no parameter %q; it is ignored", what, name.Value, key)
	}
	if r.FailedSince(before) {
		return nil
	}
	return p
}

// take returns a parameter and removes it from those that are left.
func take(parameters map[string]*yaml.Node, key string) *yaml.Node {
	n := parameters[key]
	delete(parameters, key)
	if n != nil && n.Tag == "!!null" {
		return nil
	}
	return n
}

func (r *Reader) integer(parameters map[string]*yaml.Node, what, key string, otherwise int) int {
	n := take(parameters, key)
	if n == nil {
		return otherwise
	}
	i, ok := integer(n)
	if !ok {
		r.Fail(n, "%s: %s is no whole number", what, key)
	}
	return i
}

type split struct {
	separator     string
	segment, most int // most splits; negative: no bound
}

func (r *Reader) split(n *yaml.Node, what string, parameters map[string]*yaml.Node) plugin {
	s := &split{separator: "."}
	if sep := take(parameters, "separator"); sep != nil {
		s.separator = sep.Value
	}
	if s.separator == "" {
		r.Fail(n, "%s: the separator of split is empty", what)
	}
	s.segment = r.integer(parameters, what, "segment", 0)
	s.most = r.integer(parameters, what, "max_split", -1)
	return s
}

func (s *split) values(ms []jsonpath.Match, _ *Warnings) ([]*value.Value, error) {
	out := make([]*value.Value, len(ms))
	for i, m := range ms {
		text, at := m.Str(), s.segment
		if at < 0 { // from the last
			splits := strings.Count(text, s.separator)
			if s.most >= 0 {
				splits = min(splits, s.most)
			}
			at += splits + 1
		}
		if at < 0 {
			continue
		}
		if piece, ok := value.Piece(text, s.separator, at, s.most); ok {
			v := value.Of(piece)
			out[i] = &v
		}
	}
	return out, nil
}

type bitfield struct {
	initial int
	flags   []flag
}

type flag struct {
	path  string
	bit   int
	value *value.Value // nil: whatever is there
}

// maxBit bounds the integers that a bitfield can become.
const maxBit = 62

func (r *Reader) bitfield(n *yaml.Node, what string, parameters map[string]*yaml.Node) plugin {
	b := &bitfield{initial: r.integer(parameters, what, "initial_bitfield", 0)}
	flags := take(parameters, "flags")
	if flags == nil {
		return b
	}
	if flags.Kind != yaml.SequenceNode {
		r.Fail(flags, "%s: the flags of bitfield are a list of {path, bit, value}", what)
		return nil
	}
	for _, item := range flags.Content {
		item = Resolve(item)
		if item.Kind != yaml.MappingNode {
			r.Fail(item, "%s: a flag of bitfield is {path: payload.x, bit: 0}", what)
			continue
		}
		f := flag{bit: -1}
		for _, p := range r.Pairs(item) {
			switch p.Key.Value {
			case "path":
				f.path = p.Value.Value
			case "bit":
				f.bit = -1
				if bit, err := strconv.Atoi(p.Value.Value); err == nil {
					f.bit = bit
				}
			case "value":
				v := Scalar(p.Value)
				f.value = &v
			default:
				r.Warn(p.Key, "%s: unknown key %q of a flag is ignored; there are path, bit and value", what, p.Key.Value)
			}
		}
		if f.path == "" || f.bit < 0 || f.bit > maxBit {
			r.Warn(item, "%s: a flag of bitfield needs a path and a bit from 0 to %d; it is ignored", what, maxBit)
			continue
		}
		if strings.HasPrefix(f.path, "$") {
			r.Warn(item, "%s: the path of a flag is written without $: %s", what, strings.TrimPrefix(f.path, "$."))
		}
		b.flags = append(b.flags, f)
	}
	return b
}

func (b *bitfield) values(ms []jsonpath.Match, _ *Warnings) ([]*value.Value, error) {
	found := map[string]*value.Value{}
	for i := range ms {
		found[ms[i].Where()] = ms[i].Value
	}
	bits := int64(b.initial)
	for _, f := range b.flags {
		v := found[f.path]
		if v != nil && (f.value == nil || value.Equal(v, f.value)) {
			bits |= 1 << f.bit
		}
	}
	v := value.OfInt(bits)
	return []*value.Value{&v}, nil
}

type timedelta struct{}

// values returns the seconds between two times, as a float.
func (timedelta) values(ms []jsonpath.Match, w *Warnings) ([]*value.Value, error) {
	if len(ms) != 2 {
		w.add("timedelta: there are %d times, not two", len(ms))
		return nil, nil
	}
	var at [2]time.Time
	for i, m := range ms {
		var err error
		if m.Kind != value.Text {
			w.add("timedelta: %.60s is %v, not a time", m.Str(), m.Kind)
			return nil, nil
		}
		if at[i], err = value.ParseTime(m.Text); err != nil {
			w.add("timedelta: %v", err)
			return nil, nil
		}
	}
	micros := at[1].UnixMicro() - at[0].UnixMicro()
	v := value.OfFloat(float64(max(micros, -micros)) / 1e6)
	return []*value.Value{&v}, nil
}

type mapping struct {
	texts     map[string]*value.Value
	others    []entry
	otherwise *value.Value
	fold      bool
}

type entry struct{ key, value value.Value }

func (r *Reader) mapping(n *yaml.Node, what string, parameters map[string]*yaml.Node) plugin {
	m := &mapping{texts: map[string]*value.Value{}}
	if d := take(parameters, "default"); d != nil {
		v := Scalar(d)
		m.otherwise = &v
	}
	if c := take(parameters, "case_sensitive"); c != nil {
		v := Scalar(c)
		if v.Kind != value.Bool {
			r.Fail(c, "%s: case_sensitive is true or false", what)
		}
		m.fold = !v.True
	}
	values := take(parameters, "values")
	if values == nil || values.Kind != yaml.MappingNode {
		r.Fail(n, "%s: the plugin map needs the parameter values: {from: to, …}", what)
		return nil
	}
	for _, p := range r.Pairs(values) {
		if p.Value.Kind != yaml.ScalarNode {
			r.Fail(p.Value, "%s: what %q is mapped to is no text or number", what, p.Key.Value)
			continue
		}
		to := Scalar(p.Value)
		key := Scalar(p.Key)
		if key.Kind != value.Text {
			m.others = append(m.others, entry{key, to})
			continue
		}
		m.texts[m.folded(key.Text)] = &to
	}
	return m
}

func (m *mapping) folded(s string) string {
	if m.fold {
		return strings.ToLower(s)
	}
	return s
}

func (m *mapping) values(ms []jsonpath.Match, w *Warnings) ([]*value.Value, error) {
	out := make([]*value.Value, len(ms))
	for i, from := range ms {
		if from.Kind == value.Text {
			out[i] = m.texts[m.folded(from.Text)]
		} else {
			for e := range m.others {
				if value.Equal(&m.others[e].key, from.Value) {
					out[i] = &m.others[e].value
				}
			}
		}
		if out[i] == nil {
			w.add("map: there is no value for %.60q", from.Str())
			out[i] = m.otherwise
		}
	}
	return out, nil
}
