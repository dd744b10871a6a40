package store

import (
	"cmp"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// Truth is the outcome of a comparison in three-valued logic.
type Truth int8

// The outcomes, ordered so that And is min and Or is max.
const (
	False Truth = iota
	Unknown
	True
)

func truth(b bool) Truth {
	if b {
		return True
	}
	return False
}

// Predicate is a compiled [Filter]. It is immutable.
type Predicate struct {
	op   predicateOp
	subs []*Predicate
	cond *Cond
	id   sample.ID // of a FieldID condition
}

type predicateOp uint8

const (
	opFalse predicateOp = iota // the first three are the values of Truth
	opUnknown
	opTrue
	opCond
	opAnd
	opOr
	opNot
)

var constants = [3]*Predicate{False: {op: opFalse}, Unknown: {op: opUnknown}, True: {op: opTrue}}

// Compile checks a filter and prepares it for matching.
func Compile(f Filter) (*Predicate, error) {
	p, err := compile(f)
	if err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	return p, nil
}

func compile(f Filter) (*Predicate, error) {
	switch {
	case f.Cond != nil:
		c, err := f.Cond.checked()
		if err != nil {
			return nil, err
		}
		p := &Predicate{op: opCond, cond: c}
		if text, ok := c.Value.(string); ok && c.Field == FieldID {
			p.id = sample.ParseID(text)
		}
		return p, nil
	case f.Not != nil:
		sub, err := compile(*f.Not)
		if err != nil {
			return nil, err
		}
		return combine(opNot, []*Predicate{sub}), nil
	case f.Or != nil:
		return compileList(opOr, f.Or)
	}
	return compileList(opAnd, f.And)
}

func compileList(op predicateOp, fs []Filter) (*Predicate, error) {
	subs := make([]*Predicate, len(fs))
	for i := range fs {
		var err error
		if subs[i], err = compile(fs[i]); err != nil {
			return nil, err
		}
	}
	return combine(op, subs), nil
}

// checked returns the condition with its value in the form that eval expects.
func (c Cond) checked() (*Cond, error) {
	var err error
	switch c.Op {
	case Eq, Ne, Lt, Le, Gt, Ge:
		c.Value, err = c.comparable(c.Value)
	case In:
		c.compiled, err = c.list()
	case Match:
		c.compiled, err = c.pattern()
	default:
		err = fmt.Errorf("%s: unknown operator %q", c.Field, c.Op)
	}
	if err != nil {
		return nil, err
	}
	return &c, nil
}

// comparable returns a value in the form that it is compared in.
func (c *Cond) comparable(value any) (any, error) {
	ok := false
	switch c.Field {
	case FieldMeter, FieldKind, FieldUnit, FieldResource, FieldProject, FieldUser, FieldSource, FieldID:
		_, ok = value.(string)
		ok = ok || value == nil && c.Op == Eq
	case FieldTime, FieldRecorded:
		_, ok = value.(int64)
	case FieldVolume:
		_, ok = value.(sample.Volume)
	case FieldMetadata:
		value, ok = metadataValue(value)
	default:
		return nil, fmt.Errorf("unknown field %q", c.Field)
	}
	if !ok {
		return nil, fmt.Errorf("%s: cannot compare (%s) with a value of type %T", c.Field, c.Op, value)
	}
	return value, nil
}

// compiled is what In and Match need to be quick.
type compiled struct {
	// The values of a list: texts and times by themselves, volumes sorted, and
	// what else metadata can be.
	texts   map[string]struct{}
	times   map[int64]struct{}
	volumes []sample.Volume
	others  []any
	re      *regexp.Regexp
}

// MaxPattern bounds the length of a pattern, in bytes. RE2 matches in a time
// that grows with it and with the text, and no faster.
const MaxPattern = 1000

func (c *Cond) pattern() (*compiled, error) {
	pattern, ok := c.Value.(string)
	if !ok {
		return nil, fmt.Errorf("%s: a pattern is a string, not a %T", c.Field, c.Value)
	}
	if len(pattern) > MaxPattern {
		return nil, fmt.Errorf("%s: a pattern of %d bytes, at most %d are taken", c.Field, len(pattern), MaxPattern)
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.Field, err)
	}
	return &compiled{re: re}, nil
}

func (c *Cond) list() (*compiled, error) {
	values, ok := c.Value.([]any)
	if !ok {
		return nil, fmt.Errorf("%s: cannot look for a %T in a list", c.Field, c.Value)
	}
	l := &compiled{texts: map[string]struct{}{}, times: map[int64]struct{}{}}
	for _, v := range values {
		v, err := c.comparable(v)
		if err != nil {
			return nil, err
		}
		switch v := v.(type) {
		case string:
			l.texts[v] = struct{}{}
		case int64:
			l.times[v] = struct{}{}
		case sample.Volume:
			l.volumes = append(l.volumes, v)
		default:
			l.others = append(l.others, v)
		}
	}
	slices.SortFunc(l.volumes, Compare)
	return l, nil
}

// combine builds And, Or or Not and folds constants.
func combine(op predicateOp, subs []*Predicate) *Predicate {
	if op == opNot {
		if subs[0].op <= opTrue {
			return constants[True-Truth(subs[0].op)]
		}
		return &Predicate{op: op, subs: subs}
	}
	neutral, absorbing := True, False
	if op == opOr {
		neutral, absorbing = False, True
	}
	var rest []*Predicate
	constant := neutral
	for _, s := range subs {
		switch {
		case s.op > opTrue:
			rest = append(rest, s)
		case op == opOr:
			constant = max(constant, Truth(s.op))
		default:
			constant = min(constant, Truth(s.op))
		}
	}
	switch {
	case constant == absorbing || len(rest) == 0:
		return constants[constant]
	case constant == Unknown:
		rest = append(rest, constants[Unknown])
	case len(rest) == 1:
		return rest[0]
	}
	return &Predicate{op: op, subs: rest}
}

// Const reports whether the predicate no longer depends on anything, and then
// whether it selects.
func (p *Predicate) Const() (selects, ok bool) { return p.op == opTrue, p.op <= opTrue }

// Fix returns the predicate with every condition replaced by what decide
// returns for it; decide returns false for conditions that it leaves open.
func (p *Predicate) Fix(decide func(*Cond) (Truth, bool)) *Predicate {
	switch {
	case p.op == opCond:
		if t, ok := decide(p.cond); ok {
			return constants[t]
		}
		return p
	case p.op <= opTrue:
		return p
	}
	subs := make([]*Predicate, len(p.subs))
	for i, s := range p.subs {
		subs[i] = s.Fix(decide)
	}
	return combine(p.op, subs)
}

// May reports whether the predicate may still select something when decide is
// used as by Fix. It allocates nothing.
func (p *Predicate) May(decide func(*Cond) (Truth, bool)) bool {
	return p.outcomes(decide)&(1<<True) != 0
}

// outcomes returns the set of truths that are possible, as bits.
func (p *Predicate) outcomes(decide func(*Cond) (Truth, bool)) uint8 {
	const all = 1<<False | 1<<Unknown | 1<<True
	switch p.op {
	case opCond:
		if t, ok := decide(p.cond); ok {
			return 1 << t
		}
		return all
	case opNot:
		sub := p.subs[0].outcomes(decide)
		return sub&(1<<Unknown) | sub&(1<<False)<<True | sub&(1<<True)>>True
	case opAnd:
		// Each outcome is the least of one of each sub's.
		out := uint8(1 << True)
		for _, s := range p.subs {
			out = least(out, s.outcomes(decide))
		}
		return out
	case opOr:
		out := uint8(1 << False)
		for _, s := range p.subs {
			out = most(out, s.outcomes(decide))
		}
		return out
	}
	return 1 << p.op
}

func least(a, b uint8) (out uint8) {
	for x := False; x <= True; x++ {
		for y := False; y <= True; y++ {
			if a>>x&1 != 0 && b>>y&1 != 0 {
				out |= 1 << min(x, y)
			}
		}
	}
	return out
}

func most(a, b uint8) (out uint8) {
	for x := False; x <= True; x++ {
		for y := False; y <= True; y++ {
			if a>>x&1 != 0 && b>>y&1 != 0 {
				out |= 1 << max(x, y)
			}
		}
	}
	return out
}

// Required yields the conditions that every match satisfies.
func (p *Predicate) Required(yield func(*Cond) bool) { p.required(yield) }

func (p *Predicate) required(yield func(*Cond) bool) bool {
	switch p.op {
	case opCond:
		return yield(p.cond)
	case opAnd:
		for _, s := range p.subs {
			if !s.required(yield) {
				return false
			}
		}
	}
	return true
}

// Uses reports whether the predicate has a condition on one of the fields.
func (p *Predicate) Uses(fields ...Field) bool {
	if p.op == opCond {
		for _, f := range fields {
			if p.cond.Field == f {
				return true
			}
		}
	}
	for _, s := range p.subs {
		if s.Uses(fields...) {
			return true
		}
	}
	return false
}

// Match reports whether the predicate selects s, whose parsed metadata is doc.
func (p *Predicate) Match(s *Sample, doc *Document) bool { return p.eval(s, doc) == True }

func (p *Predicate) eval(s *Sample, doc *Document) Truth {
	switch p.op {
	case opCond:
		return p.evalCond(s, doc)
	case opNot:
		return True - p.subs[0].eval(s, doc)
	case opAnd:
		t := True
		for _, sub := range p.subs {
			if t = min(t, sub.eval(s, doc)); t == False {
				break
			}
		}
		return t
	case opOr:
		t := False
		for _, sub := range p.subs {
			if t = max(t, sub.eval(s, doc)); t == True {
				break
			}
		}
		return t
	}
	return Truth(p.op)
}

func (p *Predicate) evalCond(s *Sample, doc *Document) Truth {
	c := p.cond
	switch c.Field {
	case FieldTime:
		return c.time(s.Time)
	case FieldRecorded:
		return c.time(s.Recorded)
	case FieldVolume:
		return c.volume(s.Volume)
	case FieldMetadata:
		return c.Metadata(doc)
	case FieldID:
		if c.Op == Eq && c.Value != nil {
			return truth(s.ID == p.id)
		}
		return c.Text(s.ID.String())
	}
	text, _ := s.Text(c.Field)
	return c.Text(text)
}

// Text compares a name or id, which is unknown where it is empty.
func (c *Cond) Text(have string) Truth {
	want, text := c.Value.(string)
	switch {
	case !text && c.Op != In:
		return truth(have == "")
	case have == "":
		return Unknown
	case c.Op == In:
		_, ok := c.compiled.texts[have]
		return truth(ok)
	case c.Op == Match:
		return truth(c.compiled.re.MatchString(have))
	}
	return c.Op.holds(strings.Compare(have, want))
}

func (c *Cond) time(have int64) Truth {
	switch c.Op {
	case In:
		_, ok := c.compiled.times[have]
		return truth(ok)
	case Match:
		var text [32]byte
		return truth(c.compiled.re.Match(sample.AppendTime(text[:0], have)))
	}
	return c.Op.holds(cmp.Compare(have, c.Value.(int64)))
}

func (c *Cond) volume(have sample.Volume) Truth {
	switch c.Op {
	case In:
		_, ok := slices.BinarySearchFunc(c.compiled.volumes, have, Compare)
		return truth(ok)
	case Match:
		var text [32]byte
		return truth(c.compiled.re.Match(have.AppendAPI(text[:0])))
	}
	return c.Op.holds(Compare(have, c.Value.(sample.Volume)))
}

// Text returns the value of a field that is a name or an id; ok is false for
// other fields.
func (s *Sample) Text(f Field) (text string, ok bool) {
	switch f {
	case FieldMeter:
		return s.Name, true
	case FieldKind:
		return string(s.Kind), true
	case FieldUnit:
		return s.Unit, true
	case FieldResource:
		return s.Resource, true
	case FieldProject:
		return s.Project, true
	case FieldUser:
		return s.User, true
	case FieldSource:
		return s.Source, true
	case FieldID:
		return s.ID.String(), true
	}
	return "", false
}

// holds says what an ordering means to the operator.
func (o Op) holds(order int) Truth {
	switch o {
	case Eq:
		return truth(order == 0)
	case Ne:
		return truth(order != 0)
	case Lt:
		return truth(order < 0)
	case Le:
		return truth(order <= 0)
	case Gt:
		return truth(order > 0)
	}
	return truth(order >= 0)
}

// Metadata compares what a document has at the condition's key, which is unknown
// where it has nothing there.
func (c *Cond) Metadata(doc *Document) Truth {
	v, ok := doc.Lookup(c.Key)
	if !ok {
		return Unknown
	}
	return c.compareMetadata(v)
}

// compareMetadata compares a value of the document. Values of different types
// are never equal and have no order.
func (c *Cond) compareMetadata(have any) Truth {
	switch c.Op {
	case Eq, Ne:
		return truth(equal(have, c.Value) == (c.Op == Eq))
	case In:
		if text, ok := have.(string); ok {
			_, ok := c.compiled.texts[text]
			return truth(ok)
		}
		return truth(slices.ContainsFunc(c.compiled.others, func(v any) bool { return equal(have, v) }))
	case Match:
		if text, ok := have.(string); ok {
			return truth(c.compiled.re.MatchString(text))
		}
		return Unknown
	}
	switch want := c.Value.(type) {
	case json.Number:
		if n, ok := have.(json.Number); ok {
			return c.Op.holds(Compare(number(n), number(want)))
		}
	case string:
		if s, ok := have.(string); ok {
			return c.Op.holds(strings.Compare(s, want))
		}
	}
	return Unknown
}
