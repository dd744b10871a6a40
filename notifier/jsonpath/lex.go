package jsonpath

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// SyntaxError says where a path cannot be read, and why.
type SyntaxError struct {
	Path   string
	Column int // from 1, in bytes
	Reason string
	Hint   string // what to write instead; may be empty
}

func (e *SyntaxError) Error() string {
	text := fmt.Sprintf("path %q, column %d: %s", e.Path, e.Column, e.Reason)
	if e.Hint != "" {
		text += " (" + e.Hint + ")"
	}
	return text
}

type kind uint8

const (
	end      kind = iota
	symbol        // one of . .. [ ] ( ) $ , : | & ? @ + * -
	name          // a field or a quoted text
	number        // an integer
	float         // a number with a point
	boolean       // true or false
	where         // the word
	operator      // of a filter
	order         // / or \ of a sort, with the comma before it
	function      // what stands between back quotes
)

type token struct {
	kind kind
	text string // of a quoted text: without quotes and backslashes
	pos  int
}

// what names a token in an error.
func (t *token) what() string {
	switch t.kind {
	case end:
		return "the path ends too early"
	case order:
		return fmt.Sprintf("%q does not belong here", t.text[len(t.text)-1:])
	case boolean:
		return fmt.Sprintf("%q does not belong here", t.text)
	}
	return fmt.Sprintf("%q does not belong here", t.text)
}

// The words, in the order in which they are tried. A number may begin with a
// minus, so that "a -1" is a path and a number side by side.
var words = []struct {
	kind kind
	re   *regexp.Regexp
}{
	{boolean, regexp.MustCompile(`^(?:true|false)`)},
	{order, regexp.MustCompile(`^,?\s*[/\\]`)},
	{name, regexp.MustCompile(`^@?[a-zA-Z_][a-zA-Z0-9_@\-]*`)},
	{float, regexp.MustCompile(`^-?\d+\.\d+`)},
	{number, regexp.MustCompile(`^-?\d+`)},
	{operator, regexp.MustCompile(`^(?:==?|!=|<=|>=|<|>|~)`)},
	{symbol, regexp.MustCompile(`^(?:\.\.|[.\[\]()$,:|&?@+*\-])`)},
}

// lex splits a path into tokens; the last one is an end.
func lex(path string) ([]token, error) {
	var ts []token
	for pos := 0; pos < len(path); {
		c := path[pos]
		switch c {
		case ' ', '\t', '\n':
			pos++
			continue
		case '\'', '"', '`':
			text, after, err := quoted(path, pos)
			if err != nil {
				return nil, err
			}
			k := name
			if c == '`' {
				k = function
			}
			ts = append(ts, token{k, text, pos})
			pos = after
			continue
		}
		t, ok := word(path, pos)
		if !ok {
			r, _ := utf8.DecodeRuneInString(path[pos:])
			return nil, &SyntaxError{path, pos + 1, fmt.Sprintf("unexpected character %q", r), "quote the name of a field that is no word: 'a.b'"}
		}
		ts = append(ts, t)
		pos += len(t.text)
	}
	for i := range ts {
		if ts[i].kind == name && ts[i].text == "where" && path[ts[i].pos] == 'w' {
			ts[i].kind = where
		}
	}
	return append(ts, token{end, "", len(path)}), nil
}

func word(path string, pos int) (token, bool) {
	for _, w := range words {
		if text := w.re.FindString(path[pos:]); text != "" {
			return token{w.kind, text, pos}, true
		}
	}
	return token{}, false
}

// quoted reads a quoted text; a backslash takes the next character as it is.
func quoted(path string, pos int) (text string, after int, err error) {
	quote := path[pos]
	var b strings.Builder
	for i := pos + 1; i < len(path); i++ {
		switch c := path[i]; c {
		case quote:
			return b.String(), i + 1, nil
		case '\\':
			if i++; i < len(path) {
				b.WriteByte(path[i])
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", 0, &SyntaxError{path, pos + 1, "a quote is not closed", "end the text with " + strconv.Quote(string(quote))}
}
