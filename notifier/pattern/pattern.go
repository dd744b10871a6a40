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
	names map[string]int // numbers of the groups that have a name
}

// Compile compiles an expression.
func Compile(expr string) (*Regexp, error) {
	r := &Regexp{names: map[string]int{}}
	text := r.translate(expr)
	var err error
	if r.all, err = regexp2.Compile(text, regexp2.None); err == nil {
		r.start, err = regexp2.Compile(`\A(?:`+text+`)`, regexp2.None)
	}
	if err != nil {
		return nil, fmt.Errorf("regular expression %q: %w", expr, err)
	}
	return r, nil
}

var (
	named         = regexp.MustCompile(`^\(\?P<(\w+)>`)
	backReference = regexp.MustCompile(`^\(\?P=(\w+)\)`)
)

// translate turns Python's words into those of .NET, which number groups with a
// name last and subtract classes from each other.
func (r *Regexp) translate(expr string) string {
	var b strings.Builder
	groups, class := 0, -1 // where the class began
	for i := 0; i < len(expr); i++ {
		rest := expr[i:]
		switch c := expr[i]; {
		case c == '\\' && len(rest) > 1:
			if i++; expr[i] == 'Z' {
				rest = `\z`
			}
			b.WriteString(rest[:2])
			continue
		case class >= 0:
			if c == ']' && i > class+1 && expr[class+1:i] != "^" {
				class = -1
			} else if c == '[' {
				b.WriteByte('\\')
			}
		case c == '[':
			class = i
		case c == '(' && !strings.HasPrefix(rest, "(?"):
			groups++
		case c == '(':
			if m := named.FindStringSubmatch(rest); m != nil {
				groups++
				r.names[m[1]] = groups
				b.WriteByte('(')
				i += len(m[0]) - 1
				continue
			}
			if m := backReference.FindStringSubmatch(rest); m != nil && r.names[m[1]] > 0 {
				fmt.Fprintf(&b, `(?:\%d)`, r.names[m[1]])
				i += len(m[0]) - 1
				continue
			}
		}
		b.WriteByte(expr[i])
	}
	return b.String()
}

// number returns the number of a group, by which it may be named; -1 where there is
// none.
func (r *Regexp) number(group string) int {
	n, err := strconv.Atoi(group)
	if err != nil {
		n = r.names[group]
	}
	if (n == 0 && group != "0") || !slices.Contains(r.all.GetGroupNumbers(), n) {
		return -1
	}
	return n
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
			n := r.number(group)
			if n < 0 {
				return "", false
			}
			return m.GroupByNumber(n).String(), true
		})
	}, -1, -1)
}

// CheckTemplate returns an error where a template of [Regexp.Replace] names a group
// that the expression has not.
func (r *Regexp) CheckTemplate(template string) error {
	missing := ""
	expand(template, func(group string) (string, bool) {
		if r.number(group) < 0 {
			missing = group
		}
		return "", true
	})
	if missing != "" {
		return fmt.Errorf("there is no group %s in the expression, which has %d", missing, len(r.all.GetGroupNumbers())-1)
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
