package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Policy says who may do what, in the language of oslo.policy. It is immutable;
// its zero value has the rules that kvmeter brings.
type Policy struct{ rules map[string]check }

// check is a condition on an identity.
type check struct {
	op          checkOp
	subs        []check
	kind, value string // of a comparison: what is compared with what
}

type checkOp uint8

const (
	always checkOp = iota
	never
	allOf
	anyOf
	not
	compare
)

// The rules that hold where a policy file says nothing. Everything else is open
// to whoever is authenticated, within their project; writing samples is not,
// because a bill is made of them.
const (
	adminRule     = "role:admin"
	createSamples = "role:admin or role:service"
)

var shippedRules = map[string]check{
	"context_is_admin":         mustParse(adminRule),
	"segregation":              mustParse("rule:context_is_admin"),
	"telemetry:create_samples": mustParse(createSamples),
	"telemetry:ingest":         mustParse(createSamples),
	"telemetry:get_gaps":       mustParse("rule:segregation"),
}

func mustParse(rule string) check {
	c, err := parseRule(rule)
	if err != nil {
		panic(err) // of a constant
	}
	return c
}

// ParsePolicy reads a policy file, YAML or JSON: an object of rules.
func ParsePolicy(data []byte) (*Policy, error) {
	var file map[string]any
	if strings.HasPrefix(strings.TrimSpace(string(data)), "{") {
		// JSON may be indented by tabs, YAML not.
		if err := json.Unmarshal(data, &file); err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
	} else if err := yaml.Unmarshal(data, &file); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p := &Policy{rules: map[string]check{}}
	for name, rule := range file {
		c, err := parseAny(rule)
		if err != nil {
			return nil, fmt.Errorf("policy: rule %q: %w", name, err)
		}
		p.rules[name] = c
	}
	visited := map[string]bool{}
	for _, name := range slices.Concat(slices.Sorted(maps.Keys(p.rules)), slices.Sorted(maps.Keys(shippedRules))) {
		if p.circular(name, visited) {
			return nil, fmt.Errorf("policy: rule %q refers to itself", name)
		}
	}
	return p, nil
}

// circular reports whether evaluating a rule may not end. visited has the rules
// that were looked at: true while one refers to another.
func (p *Policy) circular(name string, visited map[string]bool) bool {
	if open, ok := visited[name]; ok {
		return open
	}
	visited[name] = true
	c, _ := p.lookup(name)
	if p.refers(&c, visited) {
		return true
	}
	visited[name] = false
	return false
}

func (p *Policy) refers(c *check, visited map[string]bool) bool {
	if c.op == compare && c.kind == "rule" {
		return p.circular(c.value, visited)
	}
	for i := range c.subs {
		if p.refers(&c.subs[i], visited) {
			return true
		}
	}
	return false
}

// parseAny reads a rule in either of its forms: text, or a list of which one
// element must hold, each of them a list of checks that all must.
func parseAny(rule any) (check, error) {
	switch rule := rule.(type) {
	case nil:
		return check{}, nil
	case string:
		return parseRule(rule)
	case []any:
		if len(rule) == 0 {
			return check{}, nil
		}
		either := check{op: anyOf}
		for _, element := range rule {
			all := check{op: allOf}
			parts, ok := element.([]any)
			if !ok {
				parts = []any{element}
			}
			for _, part := range parts {
				text, ok := part.(string)
				if !ok {
					return check{}, errors.New("a list of lists of checks was expected")
				}
				c, err := parseCheck(text)
				if err != nil {
					return check{}, err
				}
				all.subs = append(all.subs, c)
			}
			either.subs = append(either.subs, all)
		}
		return either, nil
	}
	return check{}, errors.New("a rule is text, such as \"role:admin or project_id:p1\"")
}

// parseRule reads the text of a rule.
func parseRule(rule string) (check, error) {
	p := ruleParser{words: ruleWords(rule)}
	if len(p.words) == 0 {
		return check{}, nil
	}
	c, err := p.or(0)
	if err == nil && len(p.words) > 0 {
		err = fmt.Errorf("%q was not expected", p.words[0])
	}
	return c, err
}

// ruleWords splits a rule into its words; the parentheses around an expression
// are words of their own, those of %(name)s are not.
func ruleWords(rule string) []string {
	var words []string
	for _, w := range strings.Fields(rule) {
		for strings.HasPrefix(w, "(") {
			words, w = append(words, "("), w[1:]
		}
		closing := 0
		for strings.HasSuffix(w, ")") {
			w, closing = w[:len(w)-1], closing+1
		}
		if w != "" {
			words = append(words, w)
		}
		for range closing {
			words = append(words, ")")
		}
	}
	return words
}

type ruleParser struct{ words []string }

func (p *ruleParser) eat(word string) bool {
	if len(p.words) == 0 || !strings.EqualFold(p.words[0], word) {
		return false
	}
	p.words = p.words[1:]
	return true
}

func (p *ruleParser) or(depth int) (check, error) { return p.list("or", p.and, anyOf, depth) }

func (p *ruleParser) and(depth int) (check, error) { return p.list("and", p.one, allOf, depth) }

func (p *ruleParser) list(word string, operand func(int) (check, error), op checkOp, depth int) (check, error) {
	all := check{op: op}
	for {
		c, err := operand(depth)
		if err != nil {
			return c, err
		}
		if all.subs = append(all.subs, c); !p.eat(word) {
			return all, nil
		}
	}
}

func (p *ruleParser) one(depth int) (check, error) {
	switch {
	case depth > maxNesting:
		return check{}, errors.New("it nests too deep")
	case p.eat("not"):
		c, err := p.one(depth + 1)
		return check{op: not, subs: []check{c}}, err
	case p.eat("("):
		c, err := p.or(depth + 1)
		if err == nil && !p.eat(")") {
			err = errors.New("a parenthesis is not closed")
		}
		return c, err
	case len(p.words) == 0:
		return check{}, errors.New("it ends too early")
	}
	word := p.words[0]
	p.words = p.words[1:]
	return parseCheck(word)
}

func parseCheck(word string) (check, error) {
	switch word {
	case "", "@":
		return check{}, nil
	case "!":
		return check{op: never}, nil
	}
	kind, value, ok := strings.Cut(word, ":")
	if !ok {
		return check{}, fmt.Errorf("%q is no check: it is of the form role:admin", word)
	}
	if kind == "role" {
		value = strings.ToLower(value)
	}
	return check{op: compare, kind: kind, value: value}, nil
}

// eval decides about an identity.
func (p *Policy) eval(c *check, id *Identity) bool {
	switch c.op {
	case always:
		return true
	case not:
		return !p.eval(&c.subs[0], id)
	case allOf, anyOf:
		for i := range c.subs {
			if p.eval(&c.subs[i], id) == (c.op == anyOf) {
				return c.op == anyOf
			}
		}
		return c.op == allOf
	case compare:
		return p.compare(c, id)
	}
	return false
}

// compare compares an attribute of the identity, or a quoted constant, with a
// value. What stands for an attribute of the target is never equal: requests of
// this API have none.
func (p *Policy) compare(c *check, id *Identity) bool {
	switch c.kind {
	case "rule":
		return p.holds(c.value, id)
	case "role":
		return slices.Contains(id.Roles, c.value)
	}
	if c.value == "" || strings.Contains(c.value, "%(") {
		return false
	}
	switch c.kind {
	case "user_id":
		return c.value == id.User
	case "project_id":
		return c.value == id.Project
	}
	constant, quoted := strings.CutPrefix(c.kind, "'")
	return quoted && strings.TrimSuffix(constant, "'") == c.value
}

// lookup returns a rule. One that nobody wrote is the rule named default, else
// the one that kvmeter brings.
func (p *Policy) lookup(name string) (c check, ok bool) {
	if c, ok = p.rules[name]; ok {
		return c, true
	}
	shipped, known := shippedRules[name]
	if c, ok = p.rules["default"]; !ok {
		return shipped, known
	}
	if name == "context_is_admin" {
		// Who closes everything by default does not close out the admins.
		c = check{op: anyOf, subs: []check{shipped, c}}
	}
	return c, true
}

// holds evaluates a rule. An unknown one denies.
func (p *Policy) holds(name string, id *Identity) bool {
	c, ok := p.lookup(name)
	return ok && p.eval(&c, id)
}

func (p *Policy) wrote(name string) bool {
	_, ok := p.rules[name]
	return ok
}

// allows reports whether the identity may do what the rule telemetry:NAME is
// about.
func (p *Policy) allows(name string, id *Identity) bool {
	name = "telemetry:" + name
	if _, shipped := shippedRules[name]; !p.wrote(name) && !p.wrote("default") && (!shipped || id.Trusted) {
		return true
	}
	return p.holds(name, id)
}

// seesAll reports whether the identity sees every project.
func (p *Policy) seesAll(id *Identity) bool {
	if id.Trusted {
		return true
	}
	if p.wrote("segregation") {
		return p.holds("segregation", id)
	}
	return p.holds("context_is_admin", id)
}
