package api

import (
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// The original service is written in Python, and its answers and queries show
// it: metadata values are printed as Python prints them, and an untyped value
// of a query is read as a Python literal.

// pythonText prints a decoded JSON value as Python's str does.
func pythonText(v any) string {
	if s, ok := v.(string); ok {
		return s
	}
	return string(appendRepr(nil, v))
}

func pythonRepr(s string) string { return string(sample.AppendRepr(nil, s)) }

// appendRepr prints a decoded JSON value as Python's repr does, objects sorted
// by key.
func appendRepr(dst []byte, v any) []byte {
	switch v := v.(type) {
	case nil:
		return append(dst, "None"...)
	case bool:
		if v {
			return append(dst, "True"...)
		}
		return append(dst, "False"...)
	case json.Number:
		return appendNumber(dst, v)
	case string:
		return sample.AppendRepr(dst, v)
	case []any:
		dst = append(dst, '[')
		for i, e := range v {
			if i > 0 {
				dst = append(dst, ", "...)
			}
			dst = appendRepr(dst, e)
		}
		return append(dst, ']')
	case map[string]any:
		dst = append(dst, '{')
		for i, k := range sortedKeys(v) {
			if i > 0 {
				dst = append(dst, ", "...)
			}
			dst = append(sample.AppendRepr(dst, k), ": "...)
			dst = appendRepr(dst, v[k])
		}
		return append(dst, '}')
	}
	return fmt.Append(dst, v)
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// appendNumber prints integers as they are and everything else as a float.
func appendNumber(dst []byte, n json.Number) []byte {
	s := n.String()
	if !strings.ContainsAny(s, ".eE") {
		if s == "-0" {
			s = "0"
		}
		return append(dst, s...)
	}
	f, err := n.Float64()
	switch {
	case err == nil:
		return sample.AppendFloat(dst, f)
	case math.IsInf(f, 1):
		return append(dst, "inf"...)
	case math.IsInf(f, -1):
		return append(dst, "-inf"...)
	}
	return append(dst, s...)
}

// pythonLiteral reads text as Python's literal_eval does: numbers, True,
// False, None, quoted strings, lists, tuples and dicts. Text that is no literal
// stays a string. Numbers come back as json.Number, tuples as lists.
func pythonLiteral(text string) any {
	p := literal{rest: strings.TrimLeft(text, " \t")}
	v, ok := p.value(0)
	if p.blank(); !ok || p.rest != "" {
		return text
	}
	return v
}

// literal is a parser of Python literals.
type literal struct{ rest string }

// maxNesting bounds how deep a literal may nest.
const maxNesting = 32

func (p *literal) blank() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

func (p *literal) eat(token string) bool {
	rest, ok := strings.CutPrefix(p.rest, token)
	if ok {
		p.rest = rest
	}
	return ok
}

var (
	literalInt   = regexp.MustCompile(`^[+-]?(?:0+|[1-9][0-9]*)`)
	literalFloat = regexp.MustCompile(`^[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?`)
	literalWord  = regexp.MustCompile(`^[A-Za-z_][A-Za-z_0-9]*`)
)

func (p *literal) value(depth int) (v any, ok bool) {
	if p.rest == "" || depth > maxNesting {
		return nil, false
	}
	switch c := p.rest[0]; c {
	case '[':
		p.rest = p.rest[1:]
		list, _, ok := p.list("]", depth)
		return list, ok
	case '(':
		p.rest = p.rest[1:]
		list, comma, ok := p.list(")", depth)
		if ok && len(list) == 1 && !comma {
			return list[0], true
		}
		return list, ok
	case '{':
		p.rest = p.rest[1:]
		return p.dict(depth)
	case '\'', '"':
		return p.quoted(c)
	}
	if word := literalWord.FindString(p.rest); word != "" {
		p.rest = p.rest[len(word):]
		switch word {
		case "True":
			return true, true
		case "False":
			return false, true
		case "None":
			return nil, true
		}
		return nil, false
	}
	return p.number()
}

func (p *literal) number() (any, bool) {
	float := literalFloat.FindString(p.rest)
	if float == "" {
		return nil, false
	}
	p.rest = p.rest[len(float):]
	if literalInt.FindString(float) == float {
		sign, digits := "", strings.TrimLeft(float, "+-")
		if float[0] == '-' {
			sign = "-"
		}
		if digits = strings.TrimLeft(digits, "0"); digits == "" {
			return json.Number("0"), true
		}
		n := json.Number(sign + digits)
		_, err := n.Float64() // metadata has no larger ones
		return n, err == nil
	}
	if !strings.ContainsAny(float, ".eE") {
		return nil, false // Python refuses 007
	}
	f, err := strconv.ParseFloat(float, 64)
	if err != nil {
		return nil, false
	}
	return json.Number(sample.AppendFloat(nil, f)), true
}

func (p *literal) list(end string, depth int) (list []any, comma, ok bool) {
	list = []any{}
	for {
		p.blank()
		if p.eat(end) {
			return list, comma, true
		}
		if len(list) > 0 && !comma {
			return nil, false, false
		}
		v, ok := p.value(depth + 1)
		if !ok {
			return nil, false, false
		}
		list = append(list, v)
		p.blank()
		comma = p.eat(",")
	}
}

func (p *literal) dict(depth int) (any, bool) {
	dict := map[string]any{}
	for comma := true; ; {
		p.blank()
		if p.eat("}") {
			return dict, true
		}
		if !comma || p.rest == "" {
			return nil, false
		}
		key, ok := p.value(depth + 1)
		name, isText := key.(string)
		if p.blank(); !ok || !isText || !p.eat(":") {
			return nil, false
		}
		p.blank()
		if dict[name], ok = p.value(depth + 1); !ok {
			return nil, false
		}
		p.blank()
		comma = p.eat(",")
	}
}

func (p *literal) quoted(quote byte) (any, bool) {
	var b strings.Builder
	s := p.rest[1:]
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case quote:
			p.rest = s[i+1:]
			return b.String(), true
		case '\n':
			return nil, false
		case '\\':
			if i+1 < len(s) && (s[i+1] == '\'' || s[i+1] == '"') {
				i++
				b.WriteByte(s[i])
				continue
			}
			r, _, tail, err := strconv.UnquoteChar(s[i:], 0)
			if err != nil {
				return nil, false
			}
			b.WriteRune(r)
			i = len(s) - len(tail) - 1
		default:
			b.WriteByte(c)
		}
	}
	return nil, false
}
