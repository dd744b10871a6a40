package sample

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Matcher decides by name, as the lists of meters in polling.yaml and
// pipeline.yaml do: shell globs (* ? [..]) on the whole name, case-sensitive,
// and "!" before a pattern excludes what it matches. The zero Matcher matches
// nothing.
type Matcher struct {
	patterns         []string
	exclude, include []*regexp.Regexp
	named            map[string]bool // included by a pattern without wildcards
	all              bool            // every name is selected
}

// NewMatcher compiles patterns. As in Ceilometer, the list must not be empty,
// and names may be excluded from a wildcard but not from a list of names.
func NewMatcher(patterns []string) (*Matcher, error) {
	if len(patterns) == 0 {
		return nil, errors.New("the list of names is empty")
	}
	m := &Matcher{patterns: patterns, named: map[string]bool{}}
	var plain, negative string
	var star bool
	for _, p := range patterns {
		not := strings.HasPrefix(p, "!")
		re, err := globRegexp(strings.TrimPrefix(p, "!"))
		if err != nil {
			return nil, fmt.Errorf("pattern %q: %w", p, err)
		}
		if not {
			negative = p
			m.exclude = append(m.exclude, re)
			continue
		}
		m.include = append(m.include, re)
		if !strings.HasPrefix(p, "*") {
			plain = p
		}
		if !strings.ContainsAny(p, "*?[") {
			m.named[p] = true
		}
		star = star || p == "*"
	}
	switch {
	case plain != "" && negative != "":
		return nil, fmt.Errorf("both included (%q) and excluded (%q) names: exclude from a wildcard such as \"*\", or list names only", plain, negative)
	case plain != "" && star:
		return nil, fmt.Errorf("%q beside \"*\", which includes it", plain)
	}
	m.all = len(m.exclude) == 0 && len(m.include) == 1 && m.include[0].String() == `(?s)\A.*\z`
	return m, nil
}

// String returns the patterns that the matcher was made of.
func (m *Matcher) String() string { return strings.Join(m.patterns, ", ") }

// Match reports whether name is selected.
func (m *Matcher) Match(name string) bool {
	if m.all {
		return true
	}
	for _, re := range m.exclude {
		if re.MatchString(name) {
			return false
		}
	}
	for _, re := range m.include {
		if re.MatchString(name) {
			return true
		}
	}
	return len(m.include) == 0 && len(m.exclude) > 0
}

// Named reports whether name is listed as it is, not by a wildcard.
func (m *Matcher) Named(name string) bool { return m.named[name] }

// All reports whether every name is selected.
func (m *Matcher) All() bool { return m.all }

// globRegexp translates a shell glob. As in Python's fnmatch, "*" also matches
// "/" and a "[" without its "]" stands for itself.
func globRegexp(glob string) (*regexp.Regexp, error) {
	var b strings.Builder
	b.WriteString(`(?s)\A`)
	for i := 0; i < len(glob); i++ {
		switch glob[i] {
		case '*':
			b.WriteString(`.*`)
		case '?':
			b.WriteString(`.`)
		case '[':
			end := classEnd(glob, i+1)
			if end < 0 {
				b.WriteString(`\[`)
				continue
			}
			class := strings.NewReplacer(`\`, `\\`, `[`, `\[`, `]`, `\]`).Replace(glob[i+1 : end])
			if strings.HasPrefix(class, "!") {
				class = "^" + class[1:]
			} else if strings.HasPrefix(class, "^") {
				class = `\` + class
			}
			b.WriteString("[" + class + "]")
			i = end
		default:
			b.WriteString(regexp.QuoteMeta(glob[i : i+1]))
		}
	}
	b.WriteString(`\z`)
	return regexp.Compile(b.String())
}

// classEnd returns the index of the "]" that ends a class whose body starts at
// i, or -1. A "]" that comes first belongs to the class.
func classEnd(glob string, i int) int {
	j := i
	if j < len(glob) && glob[j] == '!' {
		j++
	}
	if j < len(glob) && glob[j] == ']' {
		j++
	}
	if k := strings.IndexByte(glob[min(j, len(glob)):], ']'); k >= 0 {
		return j + k
	}
	return -1
}
