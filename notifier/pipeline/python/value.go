package python

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"
)

type kind uint8

const (
	none kind = iota
	boolean
	number
	text
	namespace // of a JSON object, or empty
	list      // of a JSON list
	scope     // of whatever the caller makes of names
)

// Value is what an expression evaluates to: None, a boolean, a number, text, a
// namespace of named values, or a list.
type Value struct {
	kind  kind
	yes   bool
	num   Number
	text  string
	raw   []byte
	names func(string) Value
}

// None is Python's None.
var None = Value{}

// Empty is the value of what has none: a namespace that is false, and so is
// everything in it.
var Empty = Value{kind: namespace}

// Bool returns a boolean.
func Bool(b bool) Value { return Value{kind: boolean, yes: b} }

// Of returns a number.
func Of(n Number) Value { return Value{kind: number, num: n} }

// Text returns a string.
func Text(s string) Value { return Value{kind: text, text: s} }

// Namespace returns a value whose attributes are what names returns.
func Namespace(names func(string) Value) Value { return Value{kind: scope, names: names} }

// JSON returns the value of a JSON text; one that cannot be read is empty.
func JSON(raw []byte) Value {
	raw = skipBlank(raw)
	if len(raw) == 0 {
		return Empty
	}
	switch raw[0] {
	case '{':
		return Value{kind: namespace, raw: raw}
	case '[':
		return Value{kind: list, raw: raw}
	case '"':
		var s string
		if json.Unmarshal(raw, &s) != nil {
			return Empty
		}
		return Text(s)
	case 't':
		return Bool(true)
	case 'f':
		return Bool(false)
	case 'n':
		return None
	}
	n, err := parseNumber(string(raw))
	if err != nil {
		return Empty
	}
	return Of(n)
}

// parseNumber reads a number as Python's json module does.
func parseNumber(s string) (Number, error) {
	if i, err := strconv.ParseInt(s, 10, 64); err == nil {
		return Int(i), nil
	}
	if strings.ContainsAny(s, ".eE") {
		f, err := strconv.ParseFloat(s, 64)
		return Float(f), err
	}
	b, ok := new(big.Int).SetString(s, 10)
	if !ok || b.BitLen() > maxBits {
		return Number{}, fmt.Errorf("%.20q is no number", s)
	}
	return fromBig(b)
}

func newBig() *big.Int { return new(big.Int) }

// Truth returns bool(v).
func (v Value) Truth() bool {
	switch v.kind {
	case boolean:
		return v.yes
	case number:
		return v.num.Truth()
	case text:
		return v.text != ""
	case namespace, list:
		return len(v.raw) > 0 && len(skipBlank(v.raw[1:])) > 1 // more than the closing bracket
	case scope:
		return true
	}
	return false
}

// Number returns a number; booleans are ints.
func (v Value) number() (Number, error) {
	switch v.kind {
	case number:
		return v.num, nil
	case boolean:
		if v.yes {
			return Int(1), nil
		}
		return Int(0), nil
	}
	return Number{}, fmt.Errorf("%s is no number", v.what())
}

// what names the value's kind in errors.
func (v Value) what() string {
	switch v.kind {
	case boolean:
		return "a boolean"
	case number:
		return "a number"
	case text:
		return "text"
	case namespace:
		if len(v.raw) == 0 {
			return "something that is missing"
		}
		return "an object"
	case list:
		return "a list"
	case scope:
		return "a sample"
	}
	return "None"
}

func (v Value) attribute(name string) (Value, error) {
	switch v.kind {
	case scope:
		return v.names(name), nil
	case namespace:
		return JSON(Field(v.raw, name)), nil
	}
	return Value{}, fmt.Errorf("%s has no %q", v.what(), name)
}

func (v Value) index(at Value) (Value, error) {
	if v.kind == scope || v.kind == namespace {
		if at.kind == text {
			return v.attribute(at.text)
		}
		return Empty, nil // it has no other keys
	}
	if v.kind != list || at.kind != number || at.num.float || at.num.big != nil {
		return Value{}, fmt.Errorf("%s cannot be indexed by %s", v.what(), at.what())
	}
	elements := elements(v.raw)
	i := at.num.i
	if i < 0 {
		i += int64(len(elements))
	}
	if i < 0 || i >= int64(len(elements)) {
		return Value{}, errors.New("the index is out of range")
	}
	return JSON(elements[i]), nil
}

// compare applies a comparison operator.
func compare(op string, x, y Value) (bool, error) {
	switch op {
	case "==":
		return equal(x, y), nil
	case "!=":
		return !equal(x, y), nil
	case "is":
		return x.kind == y.kind && equal(x, y), nil
	case "is not":
		return x.kind != y.kind || !equal(x, y), nil
	case "in", "not in":
		ok, err := contains(y, x)
		return ok == (op == "in"), err
	}
	var c int
	if x.kind == text && y.kind == text {
		c = strings.Compare(x.text, y.text)
	} else {
		a, err := x.number()
		if err != nil {
			return false, err
		}
		b, err := y.number()
		if err != nil {
			return false, err
		}
		var ok bool
		if c, ok = Compare(a, b); !ok {
			return false, nil
		}
	}
	switch op {
	case "<":
		return c < 0, nil
	case "<=":
		return c <= 0, nil
	case ">":
		return c > 0, nil
	}
	return c >= 0, nil
}

func equal(x, y Value) bool {
	switch {
	case x.kind == text && y.kind == text:
		return x.text == y.text
	case x.kind == none || y.kind == none:
		return x.kind == y.kind
	}
	a, err := x.number()
	if err != nil {
		return false
	}
	b, err := y.number()
	if err != nil {
		return false
	}
	c, ok := Compare(a, b)
	return ok && c == 0
}

func contains(in, x Value) (bool, error) {
	switch {
	case in.kind == text && x.kind == text:
		return strings.Contains(in.text, x.text), nil
	case in.kind == list:
		for _, e := range elements(in.raw) {
			if equal(JSON(e), x) {
				return true, nil
			}
		}
		return false, nil
	case in.kind == namespace && x.kind == text:
		return Field(in.raw, x.text) != nil, nil
	}
	return false, fmt.Errorf("%s holds nothing", in.what())
}
