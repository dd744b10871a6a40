// Package pattern holds regular expressions as Python knows them: with
// look-ahead and back-references, matched at the start of a text and not
// anchored at its end.
package pattern

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dlclark/regexp2"
)

// MaxText is how long a text may be that is matched, in bytes. Look-ahead needs
// backtracking, which can take time exponential in it.
const MaxText = 4096

// ErrTooLong is returned for a text that is longer than [MaxText].
var ErrTooLong = errors.New("the text is too long for a regular expression")

// Regexp is a compiled expression. It is safe for concurrent use.
type Regexp struct {
	start *regexp2.Regexp // anchored at the start
	all   *regexp2.Regexp
}

// backReference is one to a named group in Python's words.
var backReference = regexp.MustCompile(`\(\?P=(\w+)\)`)

// Compile compiles an expression.
func Compile(expr string) (*Regexp, error) {
	expr = backReference.ReplaceAllString(expr, `\k<$1>`)
	all, err := regexp2.Compile(expr, regexp2.RE2)
	if err != nil {
		return nil, fmt.Errorf("regular expression %q: %w", expr, err)
	}
	start, err := regexp2.Compile(`\A(?:`+expr+`)`, regexp2.RE2)
	if err != nil {
		return nil, fmt.Errorf("regular expression %q: %w", expr, err)
	}
	return &Regexp{start, all}, nil
}

// Match reports whether text begins with what the expression describes.
func (r *Regexp) Match(text string) bool {
	if len(text) > MaxText {
		return false
	}
	ok, err := r.start.MatchString(text)
	return ok && err == nil
}

// Replace replaces all matches by template, in which \1 and \g<name> stand for
// groups.
func (r *Regexp) Replace(text, template string) (string, error) {
	if len(text) > MaxText {
		return "", ErrTooLong
	}
	return r.all.ReplaceFunc(text, func(m regexp2.Match) string {
		return expand(template, func(group string) (string, bool) {
			var g *regexp2.Group
			if n, err := strconv.Atoi(group); err == nil {
				g = m.GroupByNumber(n)
			} else {
				g = m.GroupByName(group)
			}
			if g == nil {
				return "", false
			}
			return g.String(), true
		})
	}, -1, -1)
}

// CheckTemplate returns an error where a template of [Regexp.Replace] names a group
// that the expression has not.
func (r *Regexp) CheckTemplate(template string) error {
	numbers, missing := r.all.GetGroupNumbers(), ""
	expand(template, func(group string) (string, bool) {
		n, err := strconv.Atoi(group)
		if err != nil {
			n = r.all.GroupNumberFromName(group)
		}
		if !slices.Contains(numbers, n) {
			missing = group
		}
		return "", true
	})
	if missing != "" {
		return fmt.Errorf("there is no group %s in the expression, which has %d", missing, len(numbers)-1)
	}
	return nil
}

// expand replaces the groups in a template.
func expand(template string, group func(string) (string, bool)) string {
	var b strings.Builder
	for i := 0; i < len(template); i++ {
		if template[i] != '\\' || i+1 == len(template) {
			b.WriteByte(template[i])
			continue
		}
		i++
		c := template[i]
		name, end := "", i
		switch {
		case c-'0' <= 9:
			for end+1 < len(template) && end < i+1 && template[end+1]-'0' <= 9 {
				end++
			}
			name = template[i : end+1]
		case c == 'g' && i+1 < len(template) && template[i+1] == '<':
			if close := strings.IndexByte(template[i:], '>'); close > 0 {
				name, end = template[i+2:i+close], i+close
			}
		}
		if text, ok := group(name); name != "" && ok {
			b.WriteString(text)
			i = end
			continue
		}
		switch c {
		case 'n':
			c = '\n'
		case 't':
			c = '\t'
		}
		b.WriteByte(c)
	}
	return b.String()
}

// Prefix returns the literal text with which everything begins that the
// expression matches.
func Prefix(expr string) string {
	depth := 0
	for i := 0; i < len(expr); i++ { // alternatives at the top have no common start
		switch expr[i] {
		case '\\':
			i++
		case '(', '[':
			depth++
		case ')', ']':
			depth--
		case '|':
			if depth <= 0 {
				return ""
			}
		}
	}
	var b []byte
	for i := 0; i < len(expr); i++ {
		c := expr[i]
		switch {
		case strings.IndexByte(`.^$[](){}|`, c) >= 0:
			return string(b)
		case strings.IndexByte(`*?+`, c) >= 0:
			if c != '+' && len(b) > 0 {
				b = b[:len(b)-1]
			}
			return string(b)
		case c == '\\':
			if i+1 == len(expr) || strings.IndexByte(`.-_/\*+?()[]{}|^$`, expr[i+1]) < 0 {
				return string(b)
			}
			i++
			c = expr[i]
		case c >= 0x80:
			return string(b) // a quantifier would take all of its bytes
		}
		if i+1 < len(expr) && expr[i+1] == '{' {
			return string(b)
		}
		b = append(b, c)
	}
	return string(b)
}
