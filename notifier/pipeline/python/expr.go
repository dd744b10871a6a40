// Package python evaluates the arithmetic that pipeline.yaml and ceilometer's
// other files hold as Python expressions, with Python's numbers: ints of any
// size, floats, true division. It has no functions, no loops and no side effects.
package python

import (
	"errors"
	"fmt"
)

// Expr is a compiled expression. It is safe for concurrent use.
type Expr struct {
	root node
	// References are the names of the $(name) in the expression, each once, in
	// the order of their first use.
	References []string
}

// Scope gives the names of an expression their values. What it does not know
// is an empty namespace, which is false, as in Ceilometer.
type Scope interface {
	// Name returns the value of a name.
	Name(name string) Value
	// Reference returns the namespace of $(name).
	Reference(name string) Value
}

// Eval returns the expression's value.
func (e *Expr) Eval(s Scope) (Value, error) { return e.root.eval(s) }

// EvalNumber returns the expression's value, which must be a number or a
// boolean.
func (e *Expr) EvalNumber(s Scope) (Number, error) {
	v, err := e.root.eval(s)
	if err != nil {
		return Number{}, err
	}
	return v.number()
}

type node interface {
	eval(Scope) (Value, error)
}

type (
	literal   struct{ v Value }
	name      string
	reference string
	attribute struct {
		of   node
		name string
	}
	index struct{ of, at node }
	unary struct {
		op string
		x  node
	}
	binary struct {
		op   string
		x, y node
	}
	comparison struct {
		x    node
		ops  []string
		rest []node
	}
	logical struct {
		and  bool
		x, y node
	}
	conditional struct{ cond, yes, no node }
)

func (n *literal) eval(Scope) (Value, error) { return n.v, nil }

func (n name) eval(s Scope) (Value, error) { return s.Name(string(n)), nil }

func (n reference) eval(s Scope) (Value, error) { return s.Reference(string(n)), nil }

func (n *attribute) eval(s Scope) (Value, error) {
	of, err := n.of.eval(s)
	if err != nil {
		return Value{}, err
	}
	return of.attribute(n.name)
}

func (n *index) eval(s Scope) (Value, error) {
	of, err := n.of.eval(s)
	if err != nil {
		return Value{}, err
	}
	at, err := n.at.eval(s)
	if err != nil {
		return Value{}, err
	}
	return of.index(at)
}

func (n *unary) eval(s Scope) (Value, error) {
	v, err := n.x.eval(s)
	if err != nil {
		return Value{}, err
	}
	if n.op == "not" {
		return Bool(!v.Truth()), nil
	}
	x, err := v.number()
	switch {
	case err != nil:
		return Value{}, fmt.Errorf("unary %s: %w", n.op, err)
	case n.op == "-":
		return Of(x.Neg()), nil
	case n.op == "~":
		if x.float {
			return Value{}, errors.New("~ of a float")
		}
		x, err = Sub(Int(-1), x)
		return Of(x), err
	}
	return Of(x), nil
}

func (n *binary) eval(s Scope) (Value, error) {
	v, err := n.x.eval(s)
	if err != nil {
		return Value{}, err
	}
	w, err := n.y.eval(s)
	if err != nil {
		return Value{}, err
	}
	if n.op == "+" && v.kind == text && w.kind == text {
		return Text(v.text + w.text), nil
	}
	x, err := v.number()
	if err == nil {
		var y Number
		if y, err = w.number(); err == nil {
			if x, err = arithmetic(n.op, x, y); err == nil {
				return Of(x), nil
			}
		}
	}
	return Value{}, fmt.Errorf("%s: %w", n.op, err)
}

func arithmetic(op string, x, y Number) (Number, error) {
	switch op {
	case "+":
		return Add(x, y)
	case "-":
		return Sub(x, y)
	case "*":
		return Mul(x, y)
	case "/":
		return Div(x, y)
	case "//":
		d, _, err := floorDivMod(x, y)
		return d, err
	case "%":
		_, m, err := floorDivMod(x, y)
		return m, err
	case "**":
		return pow(x, y)
	}
	return bitwise(op, x, y)
}

func bitwise(op string, x, y Number) (Number, error) {
	if x.float || y.float {
		return Number{}, errors.New("it takes ints, not floats")
	}
	a, b := x.int(), y.int()
	r := newBig()
	switch op {
	case "&":
		r.And(a, b)
	case "|":
		r.Or(a, b)
	case "^":
		r.Xor(a, b)
	default: // << and >>
		switch {
		case b.Sign() < 0:
			return Number{}, errors.New("a negative shift")
		case op == ">>" && (!b.IsInt64() || b.Int64() > maxBits):
			r.Rsh(a, maxBits+1)
		case op == ">>":
			r.Rsh(a, uint(b.Int64()))
		case !b.IsInt64() || b.Int64() > maxBits:
			return Number{}, ErrTooLarge
		default:
			r.Lsh(a, uint(b.Int64()))
		}
	}
	return fromBig(r)
}

func (n *comparison) eval(s Scope) (Value, error) {
	left, err := n.x.eval(s)
	if err != nil {
		return Value{}, err
	}
	for i, op := range n.ops {
		right, err := n.rest[i].eval(s)
		if err != nil {
			return Value{}, err
		}
		ok, err := compare(op, left, right)
		if err != nil {
			return Value{}, fmt.Errorf("%s: %w", op, err)
		}
		if !ok {
			return Bool(false), nil
		}
		left = right
	}
	return Bool(true), nil
}

func (n *logical) eval(s Scope) (Value, error) {
	v, err := n.x.eval(s)
	if err != nil || v.Truth() != n.and {
		return v, err
	}
	return n.y.eval(s)
}

func (n *conditional) eval(s Scope) (Value, error) {
	c, err := n.cond.eval(s)
	if err != nil {
		return Value{}, err
	}
	if c.Truth() {
		return n.yes.eval(s)
	}
	return n.no.eval(s)
}
