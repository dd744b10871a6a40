package jsonpath

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/notifier/pattern"
	"github.com/kvmeter/kvmeter/notifier/value"
)

// How tightly the operators bind. A bracket and arithmetic take all that stands
// before them; arithmetic also takes all that follows.
const (
	atDescend = iota + 1
	atChild
	atUnion
	atIntersect
	atWhere
	tightest
)

// maxLength bounds a path, and so the depth to which its parts are nested.
const (
	maxLength = 4096
	maxNested = 50
)

type parser struct {
	path   string
	tokens []token
	at     int
	depth  int
	keep   bool // some part asks for its parent
}

func parse(path string) (n node, needsParents bool, err error) {
	if len(path) > maxLength {
		return nil, false, &SyntaxError{path[:20] + "…", maxLength, fmt.Sprintf("it is longer than %d bytes", maxLength), ""}
	}
	tokens, err := lex(path)
	if err != nil {
		return nil, false, err
	}
	p := &parser{path: path, tokens: tokens}
	n, err = p.expr(0)
	if err == nil && p.peek().kind != end {
		err = p.unexpected()
	}
	return n, p.keep, err
}

func (p *parser) peek() *token { return &p.tokens[p.at] }

func (p *parser) is(text string) bool {
	t := p.peek()
	return t.kind == symbol && t.text == text
}

func (p *parser) accept(text string) bool {
	if p.is(text) {
		p.at++
		return true
	}
	return false
}

func (p *parser) expect(text string) error {
	if !p.accept(text) {
		return p.unexpected()
	}
	return nil
}

// unexpected is the error about the next token.
func (p *parser) unexpected() error {
	t := p.peek()
	e := &SyntaxError{p.path, t.pos + 1, t.what(), ""}
	switch {
	case t.kind == order:
		e.Hint = "there is no division: / and \\ only sort, as in list[/field]; multiply by a constant instead, and write a unit without it"
	case t.kind == boolean:
		e.Hint = "quote the name of a field that begins with true or false: '" + t.text + "…'"
	case t.kind == where:
		e.Hint = "quote the name of a field: 'where'"
	case (t.kind == number || t.kind == float) && strings.HasPrefix(t.text, "-"):
		e.Hint = "put blanks around a minus, or it belongs to the number"
	case t.kind == number || t.kind == float:
		e.Hint = "an element of a list is [" + t.text + "]"
	case t.kind == name && (t.text == "or" || t.text == "and"):
		e.Hint = "conditions are joined by & only"
	case t.kind == operator:
		e.Hint = "comparisons belong into a filter: list[?(@.field = value)]"
	case t.kind == symbol && t.text == "?":
		e.Hint = "a filter follows its list without a dot: list[?(@.field = value)]"
	}
	return e
}

// nested guards against paths that are nested too deeply.
func (p *parser) nested() error {
	if p.depth++; p.depth > maxNested {
		return &SyntaxError{p.path, p.peek().pos + 1, fmt.Sprintf("more than %d parts within each other", maxNested), ""}
	}
	return nil
}

func (p *parser) expr(least int) (node, error) {
	if err := p.nested(); err != nil {
		return nil, err
	}
	defer func() { p.depth-- }()
	left, err := p.primary()
	for err == nil {
		level := 0
		var make func(l, r node) node
		switch t := p.peek(); {
		case t.kind == where:
			level, make = atWhere, func(l, r node) node { return &whereNode{l, r} }
		case p.is(".."):
			level, make = atDescend, func(l, r node) node { return &descend{l, r} }
		case p.is("."):
			level, make = atChild, newChild
		case p.is("|"):
			level, make = atUnion, func(l, r node) node { return &union{l, r} }
		case p.is("&"):
			level, make = atIntersect, func(_, _ node) node { return intersect{} }
		case least > 0:
			return left, nil
		case p.accept("["):
			var right node
			if right, err = p.bracket(true); err == nil {
				left = newChild(left, right)
			}
			continue
		case p.is("+") || p.is("-") || p.is("*"):
			left, err = p.arithmetic(operandOf(left)) // what follows a number is of the result
			continue
		default:
			return left, nil
		}
		if level < least {
			return left, nil
		}
		p.at++
		var right node
		if right, err = p.expr(level + 1); err == nil {
			left = make(left, right)
		}
	}
	return nil, err
}

func newChild(left, right node) node {
	c := &child{left: left, right: right, names: chain(left)}
	if _, c.fromRoot = left.(root); c.fromRoot {
		c.names = []string{}
	} else if l, ok := left.(*child); ok {
		c.fromRoot = l.fromRoot
	}
	return c
}

// arithmetic reads an operator and all that follows it.
func (p *parser) arithmetic(left operand) (node, error) {
	op := p.peek().text[0]
	p.at++
	right := p.peek()
	if right.kind == number || right.kind == float {
		after := &p.tokens[p.at+1]
		if after.kind != symbol || strings.IndexByte("+-*", after.text[0]) < 0 || len(after.text) > 1 {
			p.at++
			if left.node == nil && left.number && (left.constant.Kind == value.Float) != (right.kind == float) {
				return nil, &SyntaxError{p.path, right.pos + 1, "a whole number and a fraction", "write both with a decimal point"}
			}
			return &arithmetic{op, left, constant(right)}, nil
		}
	}
	n, err := p.expr(0)
	if err != nil {
		return nil, err
	}
	return &arithmetic{op, left, operandOf(n)}, nil
}

func constant(t *token) operand {
	if t.kind == float {
		f, _ := strconv.ParseFloat(t.text, 64) // as it was lexed; too large becomes infinite, as in Python
		return operand{constant: value.OfFloat(f), number: true}
	}
	v := value.Of(t.text)
	i, err := v.Integer()
	if err != nil { // too many digits
		i = value.OfInt(0)
	}
	return operand{constant: i, number: true}
}

// operandOf takes a single field for a text.
func operandOf(n node) operand {
	if f, ok := n.(*fields); ok && len(f.names) == 1 {
		return operand{constant: value.Of(f.names[0])}
	}
	return operand{node: n}
}

func (p *parser) primary() (node, error) {
	t := p.peek()
	switch t.kind {
	case name:
		return p.fields()
	case function:
		p.at++
		return p.function(t)
	case number, float:
		p.at++
		if p.is("+") || p.is("-") || p.is("*") {
			return p.arithmetic(constant(t))
		}
		if p.peek().kind != end {
			p.at--
			return nil, p.unexpected()
		}
		return nil, &SyntaxError{p.path, t.pos + 1, "a number alone is no path", "a constant volume is a number without quotes"}
	case symbol:
		p.at++
		switch t.text {
		case "$":
			return root{}, nil
		case "@":
			return this{}, nil
		case "*":
			return &fields{names: []string{"*"}, all: true}, nil
		case "(":
			n, err := p.expr(0)
			if err == nil {
				err = p.expect(")")
			}
			return n, err
		case "[":
			return p.bracket(false)
		}
		p.at--
	}
	return nil, p.unexpected()
}

func (p *parser) fields() (node, error) {
	f := &fields{}
	for {
		t := p.peek()
		if t.kind != name {
			return nil, p.unexpected()
		}
		f.names = append(f.names, t.text)
		f.all = f.all || t.text == "*"
		p.at++
		if !p.accept(",") {
			return f, nil
		}
	}
}

// bracket reads what follows "[". Filters and sorts need a path before it.
func (p *parser) bracket(postfix bool) (n node, err error) {
	t := p.peek()
	switch {
	case t.kind == name:
		n, err = p.fields()
	case p.is("*"):
		p.at++
		n = &slice{}
	case t.kind == number && !(p.tokens[p.at+1].kind == symbol && p.tokens[p.at+1].text == ":"):
		p.at++
		n = &index{number: atoi(t.text)}
	case t.kind == number || p.is(":"):
		n, err = p.slice()
	case postfix && p.accept("?"):
		f := &filter{}
		err = p.conditions(f)
		n = f
	case postfix && t.kind == order:
		n, err = p.sorts()
	default:
		err = p.unexpected()
	}
	if err == nil {
		err = p.expect("]")
	}
	return n, err
}

// atoi reads a lexed integer, as near as an int can be.
func atoi(s string) int {
	n, _ := strconv.Atoi(s) // out of range gives the nearest int
	return n
}

func (p *parser) slice() (node, error) {
	s := &slice{}
	bound := func() *int {
		if t := p.peek(); t.kind == number {
			p.at++
			n := atoi(t.text)
			return &n
		}
		return nil
	}
	s.from = bound()
	if err := p.expect(":"); err != nil {
		return nil, err
	}
	s.to = bound()
	return s, nil
}

// conditions reads what follows "[?".
func (p *parser) conditions(f *filter) error {
	if err := p.nested(); err != nil {
		return err
	}
	defer func() { p.depth-- }()
	for {
		if err := p.condition(f); err != nil {
			return err
		}
		if !p.accept("&") {
			return nil
		}
	}
}

func (p *parser) condition(f *filter) error {
	start, depth := p.at, p.depth
	if !p.is("(") {
		return p.comparison(f)
	}
	// A parenthesis may hold a path, or conditions.
	err := p.comparison(f)
	if err == nil {
		return nil
	}
	p.at, p.depth = start+1, depth+10 // few of them, since each is read twice
	if again := p.conditions(f); again != nil {
		return again
	}
	p.depth = depth
	return p.expect(")")
}

func (p *parser) comparison(f *filter) error {
	target, err := p.expr(0)
	if err != nil {
		return err
	}
	c := condition{target: target}
	if t := p.peek(); t.kind == operator {
		p.at++
		if c.op = t.text; c.op == "==" {
			c.op = "="
		}
		v := p.peek()
		switch v.kind {
		case name:
			c.value = value.Of(v.text)
		case number, float:
			c.value = constant(v).constant
		case boolean:
			c.value = value.Value{Kind: value.Bool, True: v.text == "true"}
		default:
			return p.unexpected()
		}
		p.at++
		if c.op == "~" && v.kind == name {
			if c.re, err = pattern.Compile(v.text); err != nil {
				return &SyntaxError{p.path, v.pos + 1, err.Error(), ""}
			}
		}
	}
	f.conditions = append(f.conditions, c)
	return nil
}

func (p *parser) sorts() (node, error) {
	s := &sorter{}
	for p.peek().kind == order {
		down := strings.HasSuffix(p.peek().text, `\`)
		p.at++
		by, err := p.expr(0)
		if err != nil {
			return nil, err
		}
		s.by = append(s.by, sortKey{by, down})
	}
	return s, nil
}

var (
	splitArgs = regexp.MustCompile(`^split\(((?s:.)),\s+(\d+),\s+(\d+|-1)\)`)
	subArgs   = regexp.MustCompile(`^sub\(/(.*)/,\s+(.*)\)`)
)

func (p *parser) function(t *token) (node, error) {
	fail := func(reason, hint string) (node, error) {
		return nil, &SyntaxError{p.path, t.pos + 1, reason, hint}
	}
	switch {
	case t.text == "this":
		return this{}, nil
	case t.text == "parent":
		p.keep = true
		return parent{}, nil
	case t.text == "sorted":
		return &sorter{}, nil
	case t.text == "len":
		return length{}, nil
	case strings.HasPrefix(t.text, "split("):
		args := splitArgs.FindStringSubmatch(t.text)
		if args == nil {
			return fail(fmt.Sprintf("%q is not valid", t.text), "write `split(c, i, n)`: one character, the piece from 0, at most n splits or -1, with a comma and a blank between")
		}
		return &split{args[1], atoi(args[2]), atoi(args[3])}, nil
	case strings.HasPrefix(t.text, "sub("):
		args := subArgs.FindStringSubmatch(t.text)
		if args == nil {
			return fail(fmt.Sprintf("%q is not valid", t.text), "write `sub(/expression/, replacement)`, with a comma and a blank between")
		}
		re, err := pattern.Compile(strings.TrimSpace(args[1]))
		if err != nil {
			return fail(err.Error(), "")
		}
		return &sub{re, strings.TrimSpace(args[2])}, nil
	}
	return fail(fmt.Sprintf("there is no function `%s`", t.text), "there are `this`, `parent`, `sorted`, `len`, `split(c, i, n)` and `sub(/expression/, replacement)`")
}
