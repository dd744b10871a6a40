package python

import (
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// maxDepth bounds how deep an expression may nest.
const maxDepth = 100

// Parse compiles an expression. References are allowed as $(name).
func Parse(source string) (*Expr, error) {
	p := &parser{source: source}
	if err := p.scan(); err != nil {
		return nil, err
	}
	e := &Expr{}
	p.expr = e
	root, err := p.ternary()
	if err == nil && p.at < len(p.tokens) {
		err = p.unexpected()
	}
	if err != nil {
		return nil, err
	}
	e.root = root
	return e, nil
}

type token struct {
	kind byte // n: number, s: text, w: word, $: reference, o: operator
	text string
	at   int
}

type parser struct {
	source string
	tokens []token
	at     int
	depth  int
	expr   *Expr
}

var (
	tokenNumber = regexp.MustCompile(`^(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|(?:[0-9][0-9_]*)?\.?[0-9_]*(?:[eE][+-]?[0-9]+)?)`)
	tokenWord   = regexp.MustCompile(`^[\pL_][\pL\pN_]*`)
	tokenRef    = regexp.MustCompile(`^\$\(([\pL\pN_.\-:]+)\)`)
	operators   = []string{"**", "//", "<<", ">>", "<=", ">=", "==", "!=", "+", "-", "*", "/", "%", "(", ")", "[", "]", ".", ",", "<", ">", "&", "|", "^", "~"}
)

func (p *parser) fail(at int, format string, args ...any) error {
	return fmt.Errorf("%s, at character %d of %q", fmt.Sprintf(format, args...), at+1, p.source)
}

func (p *parser) scan() error {
	s := p.source
	for i := 0; i < len(s); {
		rest := s[i:]
		switch c := rest[0]; {
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
			i++
			continue
		case c >= '0' && c <= '9' || c == '.' && len(rest) > 1 && rest[1] >= '0' && rest[1] <= '9':
			n := tokenNumber.FindString(rest)
			p.tokens = append(p.tokens, token{'n', n, i})
			i += len(n)
			continue
		case c == '"' || c == '\'':
			end := strings.IndexByte(rest[1:], c)
			if end < 0 {
				return p.fail(i, "text without its closing quote")
			}
			inner := rest[1 : end+1]
			if strings.Contains(inner, `\`) {
				return p.fail(i, "text with a backslash")
			}
			p.tokens = append(p.tokens, token{'s', inner, i})
			i += end + 2
			continue
		case c == '$':
			m := tokenRef.FindStringSubmatch(rest)
			if m == nil {
				return p.fail(i, "$ without the name of a meter: write $(name)")
			}
			p.tokens = append(p.tokens, token{'$', m[1], i})
			i += len(m[0])
			continue
		}
		if w := tokenWord.FindString(rest); w != "" {
			p.tokens = append(p.tokens, token{'w', w, i})
			i += len(w)
			continue
		}
		k := slices.IndexFunc(operators, func(op string) bool { return strings.HasPrefix(rest, op) })
		if k < 0 {
			return p.fail(i, "%q is not understood", rest[:1])
		}
		p.tokens = append(p.tokens, token{'o', operators[k], i})
		i += len(operators[k])
	}
	return nil
}

func (p *parser) peek(texts ...string) string {
	if p.at >= len(p.tokens) {
		return ""
	}
	t := p.tokens[p.at]
	if (t.kind == 'o' || t.kind == 'w') && slices.Contains(texts, t.text) {
		return t.text
	}
	return ""
}

func (p *parser) take(texts ...string) string {
	t := p.peek(texts...)
	if t != "" {
		p.at++
	}
	return t
}

func (p *parser) unexpected() error {
	if p.at >= len(p.tokens) {
		return p.fail(len(p.source), "the expression ends too early")
	}
	t := p.tokens[p.at]
	if t.text == "(" {
		return p.fail(t.at, "a function call; expressions have operators only")
	}
	return p.fail(t.at, "%q does not belong here", t.text)
}

func (p *parser) ternary() (node, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, p.fail(0, "the expression nests too deep")
	}
	defer func() { p.depth-- }()
	yes, err := p.or()
	if err != nil || p.take("if") == "" {
		return yes, err
	}
	cond, err := p.or()
	if err != nil {
		return nil, err
	}
	if p.take("else") == "" {
		return nil, p.unexpected()
	}
	no, err := p.ternary()
	return &conditional{cond, yes, no}, err
}

func (p *parser) or() (node, error) {
	x, err := p.and()
	for err == nil && p.take("or") != "" {
		var y node
		y, err = p.and()
		x = &logical{false, x, y}
	}
	return x, err
}

func (p *parser) and() (node, error) {
	x, err := p.not()
	for err == nil && p.take("and") != "" {
		var y node
		y, err = p.not()
		x = &logical{true, x, y}
	}
	return x, err
}

func (p *parser) not() (node, error) {
	if p.take("not") == "" {
		return p.comparison()
	}
	if p.depth++; p.depth > maxDepth {
		return nil, p.fail(0, "the expression nests too deep")
	}
	defer func() { p.depth-- }()
	x, err := p.not()
	return &unary{"not", x}, err
}

func (p *parser) comparison() (node, error) {
	x, err := p.level(0)
	if err != nil {
		return nil, err
	}
	c := &comparison{x: x}
	for {
		op := p.take("<", "<=", ">", ">=", "==", "!=", "in", "is", "not")
		switch {
		case op == "" && len(c.ops) == 0:
			return x, nil
		case op == "":
			return c, nil
		case op == "not":
			if p.take("in") == "" {
				return nil, p.unexpected()
			}
			op = "not in"
		case op == "is" && p.take("not") != "":
			op = "is not"
		}
		y, err := p.level(0)
		if err != nil {
			return nil, err
		}
		c.ops, c.rest = append(c.ops, op), append(c.rest, y)
	}
}

// levels are the binary operators that are grouped from the left, the weakest
// first.
var levels = [][]string{{"|"}, {"^"}, {"&"}, {"<<", ">>"}, {"+", "-"}, {"*", "/", "//", "%"}}

func (p *parser) level(n int) (node, error) {
	if n == len(levels) {
		return p.factor()
	}
	x, err := p.level(n + 1)
	for err == nil {
		op := p.take(levels[n]...)
		if op == "" {
			break
		}
		var y node
		y, err = p.level(n + 1)
		x = &binary{op, x, y}
	}
	return x, err
}

func (p *parser) factor() (node, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, p.fail(0, "the expression nests too deep")
	}
	defer func() { p.depth-- }()
	if op := p.take("-", "+", "~"); op != "" {
		x, err := p.factor()
		return fold(&unary{op, x}), err
	}
	x, err := p.primary()
	if err != nil || p.take("**") == "" {
		return x, err
	}
	y, err := p.factor() // binds to the right, and a sign may follow
	return fold(&binary{"**", x, y}), err
}

// fold evaluates what consists of constants, so that 10**9 is computed once.
func fold(n node) node {
	constant := func(n node) bool { _, ok := n.(*literal); return ok }
	switch n := n.(type) {
	case *unary:
		if !constant(n.x) {
			return n
		}
	case *binary:
		if !constant(n.x) || !constant(n.y) {
			return n
		}
	}
	if v, err := n.eval(nil); err == nil {
		return &literal{v}
	}
	return n // it fails whenever it is evaluated
}

func (p *parser) primary() (node, error) {
	x, err := p.atom()
	for err == nil {
		switch p.peek(".", "[") {
		case ".":
			p.at++
			if p.at >= len(p.tokens) || p.tokens[p.at].kind != 'w' {
				return nil, p.unexpected()
			}
			x = &attribute{x, p.tokens[p.at].text}
			p.at++
		case "[":
			p.at++
			var at node
			if at, err = p.ternary(); err != nil {
				return nil, err
			}
			if p.take("]") == "" {
				return nil, p.unexpected()
			}
			x = &index{x, at}
		default:
			return x, nil
		}
	}
	return x, err
}

// keywords cannot be names.
var keywords = []string{
	"and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del", "elif", "else", "except",
	"finally", "for", "from", "global", "if", "import", "in", "is", "lambda", "nonlocal", "not", "or", "pass", "raise",
	"return", "try", "while", "with", "yield",
}

func (p *parser) atom() (node, error) {
	if p.at >= len(p.tokens) {
		return nil, p.unexpected()
	}
	t := p.tokens[p.at]
	p.at++
	switch {
	case t.kind == 'n':
		n, ok := parseLiteral(t.text)
		if !ok {
			return nil, p.fail(t.at, "%q is no number", t.text)
		}
		return &literal{Of(n)}, nil
	case t.kind == 's':
		return &literal{Text(t.text)}, nil
	case t.kind == '$':
		if !slices.Contains(p.expr.References, t.text) {
			p.expr.References = append(p.expr.References, t.text)
		}
		if p.peek(".") == "." {
			return reference(t.text), nil
		}
		return &attribute{reference(t.text), "volume"}, nil
	case t.text == "(" && t.kind == 'o':
		x, err := p.ternary()
		if err == nil && p.take(")") == "" {
			err = p.unexpected()
		}
		return x, err
	case t.kind == 'w' && t.text == "True":
		return &literal{Bool(true)}, nil
	case t.kind == 'w' && t.text == "False":
		return &literal{Bool(false)}, nil
	case t.kind == 'w' && t.text == "None":
		return &literal{None}, nil
	case t.kind == 'w' && !slices.Contains(keywords, t.text):
		return name(t.text), nil
	}
	p.at--
	return nil, p.unexpected()
}

// parseLiteral reads a Python number.
func parseLiteral(s string) (Number, bool) {
	if strings.HasPrefix(s, "_") || strings.HasSuffix(s, "_") || strings.Contains(s, "__") {
		return Number{}, false
	}
	plain := strings.ReplaceAll(s, "_", "")
	if len(plain) > 1 && plain[0] == '0' && strings.ContainsAny(plain[1:2], "xXoObB") {
		b, ok := new(big.Int).SetString(plain, 0)
		if !ok {
			return Number{}, false
		}
		n, err := fromBig(b)
		return n, err == nil
	}
	if strings.ContainsAny(plain, ".eE") {
		f, err := strconv.ParseFloat(plain, 64)
		return Float(f), err == nil
	}
	if strings.Trim(plain, "0") != "" && plain[0] == '0' {
		return Number{}, false // Python refuses 007
	}
	n, err := parseNumber(plain)
	return n, err == nil
}
