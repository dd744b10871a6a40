package pipeline

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/notifier/pattern"
	"github.com/kvmeter/kvmeter/notifier/pipeline/python"
	"github.com/kvmeter/kvmeter/sample"
)

// StageSpec is an entry of a sink's transformers that was found good.
type StageSpec struct {
	Name     string // in pipeline.yaml
	stateful bool
	text     string // of its parameters, the same however they are written
	make     func(Bound) stage
}

// kindOfStage is a stage that pipeline.yaml may name.
type kindOfStage struct {
	name     string
	stateful bool
	// read reads the parameters; at is where errors about what is missing point.
	read func(r *fileReader, at *yaml.Node, p map[string]*yaml.Node) func(Bound) stage
}

// transformers reads the list of a sink.
func (r *fileReader) transformers(n *yaml.Node) (specs []StageSpec) {
	n = definition.Resolve(n)
	if n.Tag == "!!null" {
		return nil
	}
	r.list(n, "transformers", func(n *yaml.Node) {
		var name string
		nameAt := n
		params := map[string]*yaml.Node{}
		r.fields(n, "a transformer", map[string]func(*yaml.Node){
			"name":       func(n *yaml.Node) { nameAt, name = n, r.text(n, "the name of a transformer") },
			"parameters": func(n *yaml.Node) { params = r.mapping(n, "parameters") },
		})
		if name == "" {
			r.Fail(nameAt, "a transformer without a name")
			return
		}
		for _, k := range stages {
			if k.name != name {
				continue
			}
			before := len(r.Findings)
			text := textOf(params)
			build := k.read(r, n, params)
			for key, v := range params {
				r.Warn(v, "transformer %s has no parameter %q; it is ignored", name, key)
			}
			if !r.FailedSince(before) {
				specs = append(specs, StageSpec{name, k.stateful, name + " " + text, build})
			}
			return
		}
		r.Fail(nameAt, "there is no transformer %q; there are %s", name, stageNames())
	})
	return specs
}

// textOf returns parameters as text, by their names in order and without their
// places.
func textOf(params map[string]*yaml.Node) string {
	values := map[string]any{}
	for name, n := range params {
		var v any
		if n.Decode(&v) != nil { // the stage will say what is wrong with it
			v = n.Value
		}
		values[name] = v
	}
	return fmt.Sprint(values)
}

func stageNames() string {
	var names []string
	for _, k := range stages {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
}

// mapping returns the values of a mapping by key; null is an empty one.
func (r *fileReader) mapping(n *yaml.Node, what string) map[string]*yaml.Node {
	all := map[string]*yaml.Node{}
	n = definition.Resolve(n)
	if n.Tag == "!!null" {
		return all
	}
	if n.Kind != yaml.MappingNode {
		r.Fail(n, "%s is no mapping of keys to values", what)
		return all
	}
	for _, p := range r.Pairs(n) {
		all[p.Key.Value] = p.Value
	}
	return all
}

// take removes a parameter and returns it; nil where it is missing or null.
func take(p map[string]*yaml.Node, key string) *yaml.Node {
	n := p[key]
	delete(p, key)
	if n != nil && n.Tag == "!!null" {
		return nil
	}
	return n
}

// string takes a text parameter; empty where there is none.
func (r *fileReader) string(p map[string]*yaml.Node, key string) string {
	n := take(p, key)
	if n == nil {
		return ""
	}
	if n.Kind != yaml.ScalarNode {
		r.Fail(n, "%s is no text", key)
		return ""
	}
	return n.Value
}

// number takes a numeric parameter, which may be quoted where text is true.
func (r *fileReader) number(p map[string]*yaml.Node, key string, text bool) (v python.Number, ok bool) {
	n := take(p, key)
	if n == nil {
		return v, false
	}
	var f float64
	var i int64
	value := strings.TrimSpace(n.Value)
	var err error
	switch {
	case n.Tag == "!!int" || text && isInt(value):
		if i, err = strconv.ParseInt(value, 0, 64); err == nil {
			return python.Int(i), true
		}
	case n.Tag == "!!float" || text:
		if f, err = strconv.ParseFloat(value, 64); err == nil && !math.IsNaN(f) && !math.IsInf(f, 0) {
			return python.Float(f), true
		}
	}
	r.Fail(n, "%s is no number", key)
	return v, false
}

// yaml11Float is what YAML 1.1, as Ceilometer reads it, takes for a float.
var yaml11Float = regexp.MustCompile(`^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?)$`)

// isText reports whether a number is text in YAML 1.1, and so an expression, as
// 1e-9 is.
func (r *fileReader) isText(n *yaml.Node) bool {
	if n.Tag != "!!float" || n.Style != 0 || yaml11Float.MatchString(n.Value) || strings.ContainsAny(n.Value, "nN") { // .nan and .inf are none
		return false
	}
	r.Warn(n, "%s without quotes, a point and the exponent's sign is an expression in YAML 1.1, which does not look at the volume; for a factor write it as in 1.0e+3", n.Value)
	return true
}

func isInt(s string) bool {
	_, err := strconv.ParseInt(s, 10, 64)
	return err == nil
}

// size takes a whole number.
func (r *fileReader) size(p map[string]*yaml.Node, key string, unset, null int) int {
	n, given := p[key]
	if !given {
		return unset
	}
	v, ok := r.number(p, key, true)
	if !ok {
		return null
	}
	f, _ := v.Float64()
	if f > 1e9 {
		r.Fail(n, "%s is too large", key)
		return null
	}
	return int(f)
}

// conversion takes source and target.
func (r *fileReader) conversion(p map[string]*yaml.Node) (c conversion) {
	source, target, from, to := map[string]*yaml.Node{}, map[string]*yaml.Node{}, map[string]*yaml.Node{}, map[string]*yaml.Node{}
	if n := take(p, "source"); n != nil {
		source = r.mapping(n, "source")
	}
	if n := take(p, "target"); n != nil {
		target = r.mapping(n, "target")
	}
	if n := take(source, "map_from"); n != nil {
		from = r.mapping(n, "map_from")
	}
	if n := take(target, "map_to"); n != nil {
		to = r.mapping(n, "map_to")
	}
	c.name, c.unit = r.renaming("name", target, from, to), r.renaming("unit", target, from, to)
	if n, ok := source["unit"]; ok && n.Tag != "!!null" {
		c.onlyUnit, c.hasOnly = n.Value, true
	}
	delete(source, "unit")
	c.kind = sample.Kind(r.string(target, "type"))
	if n := target["scale"]; n != nil && n.Kind == yaml.ScalarNode && (n.Tag == "!!str" || r.isText(n)) {
		delete(target, "scale")
		if n.Value != "" {
			c.scale = r.expr(n, n.Value)
		}
		if c.scale != nil && len(c.scale.References) > 0 {
			r.Fail(n, "$(%s) can be used in arithmetic only; the sample's own number is volume", c.scale.References[0])
		}
	} else if v, ok := r.number(target, "scale", false); ok && v.Truth() {
		c.factor, c.hasFactor = v, true
	}
	if v, ok := r.number(target, "max", false); ok && v.Truth() {
		c.max, c.hasMax = v, true
	}
	r.ignored("source", source)
	r.ignored("target", target)
	r.ignored("map_from", from)
	r.ignored("map_to", to)
	return c
}

// ignored warns of the keys that are left.
func (r *fileReader) ignored(what string, p map[string]*yaml.Node) {
	for key, n := range p {
		r.Warn(n, "unknown key %q in %s; it is ignored", key, what)
	}
}

// renaming takes what a name or a unit becomes.
func (r *fileReader) renaming(key string, target, mapFrom, mapTo map[string]*yaml.Node) (m mapping) {
	m.text = r.string(target, key)
	at, toAt := mapFrom[key], mapTo[key]
	from, to := r.string(mapFrom, key), r.string(mapTo, key)
	switch {
	case from == "" && to != "":
		r.Warn(toAt, "map_to has a %s, but map_from has none; it is ignored", key)
		return m
	case to == "" && from != "":
		r.Warn(at, "map_from has a %s, but map_to has none; it is ignored", key)
		return m
	case from == "":
		return m
	}
	re, err := pattern.Compile(from)
	if err != nil {
		r.Fail(at, "%v", err)
		return m
	}
	if err := re.CheckTemplate(to); err != nil {
		r.Fail(toAt, "the replacement %q: %v", to, err)
		return m
	}
	m.from, m.to = re, to
	return m
}

// expr compiles an expression; nil where it is wrong.
func (r *fileReader) expr(n *yaml.Node, text string) *python.Expr {
	e, err := python.Parse(text)
	if err != nil {
		r.Fail(n, "%v", err)
		return nil
	}
	return e
}

func readAccumulator(r *fileReader, _ *yaml.Node, p map[string]*yaml.Node) func(Bound) stage {
	size := r.size(p, "size", 1, 1)
	return func(b Bound) stage { return &accumulator{size: size, bound: b} }
}

func readUnitConversion(r *fileReader, _ *yaml.Node, p map[string]*yaml.Node) func(Bound) stage {
	c := r.conversion(p)
	return func(Bound) stage { return &unitConversion{c} }
}

func readRate(r *fileReader, at *yaml.Node, p map[string]*yaml.Node) func(Bound) stage {
	if n := take(p, "max"); n != nil {
		r.Warn(n, "max belongs into target; here it is ignored")
	}
	c := r.conversion(p)
	switch {
	case c.hasFactor:
		r.Warn(at, "a numeric scale multiplies the rate by the volume, too; write it as text, as in scale: \"%s\"", numberText(c.factor))
	case c.scale == nil:
		c.scale, _ = python.Parse("1")
	}
	return func(b Bound) stage { return &rate{c, seriesMemory{newMemory[series, point](b)}} }
}

func numberText(n python.Number) string {
	v, err := n.Volume()
	if err != nil {
		return "1"
	}
	return v.String()
}

func readDelta(r *fileReader, at *yaml.Node, p map[string]*yaml.Node) func(Bound) stage {
	growth := take(p, "growth_only")
	d := delta{conversion: r.conversion(p)}
	if growth != nil && growth.Decode(&d.growthOnly) != nil {
		r.Fail(growth, "growth_only is neither true nor false")
	}
	if d.scale != nil || d.hasFactor || d.hasMax || d.kind != "" || d.hasOnly {
		r.Warn(at, "delta renames only: scale, max, type and the source's unit are ignored")
	}
	return func(b Bound) stage {
		d := d
		d.seriesMemory = seriesMemory{newMemory[series, point](b)}
		return &d
	}
}

func readAggregator(r *fileReader, _ *yaml.Node, p map[string]*yaml.Node) func(Bound) stage {
	a := aggregator{
		size: r.size(p, "size", 1, 0), user: r.policy(p, "user_id", inKey), project: r.policy(p, "project_id", inKey),
		metadata: r.policy(p, "resource_metadata", last), timestamp: r.policy(p, "timestamp", first),
	}
	if v, ok := r.number(p, "retention_time", true); ok {
		f, _ := v.Float64()
		a.retention = time.Duration(min(f, 1e9) * float64(time.Second))
	}
	if a.size < 0 || a.size == 0 && a.retention == 0 {
		a.size = 1 // a negative one is reached by each batch
	}
	a.conversion = r.conversion(p)
	return func(b Bound) stage {
		a := a
		a.bound, a.index = b, map[aggregateKey]int{}
		return &a
	}
}

// policy takes the name of a policy.
func (r *fileReader) policy(p map[string]*yaml.Node, key string, unset policy) policy {
	n := take(p, key)
	switch {
	case n == nil || n.Value == "":
		return unset
	case n.Value == "first":
		return first
	case n.Value == "last":
		return last
	case n.Value == "drop" && key == "resource_metadata":
		return dropIt
	case key == "timestamp":
		r.Warn(n, "%s is %q, which is neither first nor last; it is taken for first", key, n.Value)
		return first
	}
	r.Warn(n, "%s is %q, which is neither first nor last; it is taken for last", key, n.Value)
	return last
}

func readArithmetic(r *fileReader, at *yaml.Node, p map[string]*yaml.Node) func(Bound) stage {
	target := map[string]*yaml.Node{}
	if n := take(p, "target"); n != nil {
		target = r.mapping(n, "target")
	}
	a := arithmetic{
		name: r.string(target, "name"), unit: r.string(target, "unit"), kind: sample.Kind(r.string(target, "type")),
	}
	n := take(target, "expr")
	if n == nil {
		r.Fail(at, "arithmetic needs target.expr, as in expr: \"$(memory.usage) / $(memory)\"")
		return nil
	}
	a.expr = r.expr(n, n.Value)
	if a.expr != nil && len(a.expr.References) == 0 {
		r.Fail(n, "the expression names no meter: write it as $(name)")
	}
	r.ignored("target", target)
	return func(b Bound) stage {
		a := a
		a.bound, a.waiting = b, map[string]*waiting{}
		return &a
	}
}
