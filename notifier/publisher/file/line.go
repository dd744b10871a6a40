package file

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// style is how text and constants are written.
type style struct {
	quote         func(dst []byte, s string) []byte
	null, yes, no string
}

var (
	asJSON   = &style{quoteJSON, "null", "true", "false"}
	asPython = &style{quotePython, "None", "True", "False"}
)

// writer appends the samples of one batch as lines.
type writer struct {
	*style
	metadata map[*byte][]byte // as they are written, by where those of a row begin
}

// sample appends the fields of s in Ceilometer's order.
func (w *writer) sample(dst []byte, s *sample.Sample) []byte {
	field := func(name string) {
		if dst[len(dst)-1] != '{' {
			dst = append(dst, ", "...)
		}
		dst = append(w.quote(dst, name), ": "...)
	}
	text := func(name, value string) {
		field(name)
		dst = w.quote(dst, value)
	}
	optional := func(name, value string) {
		field(name)
		if value == "" {
			dst = append(dst, w.null...)
			return
		}
		dst = w.quote(dst, value)
	}
	dst = append(dst, '{')
	text("name", s.Name)
	text("type", string(s.Kind))
	text("unit", s.Unit)
	field("volume")
	dst = s.Volume.Append(dst)
	optional("user_id", s.User)
	optional("project_id", s.Project)
	text("resource_id", s.Resource)
	text("timestamp", string(sample.AppendTime(nil, s.Time)))
	field("resource_metadata")
	dst = append(dst, w.object(s.Metadata)...)
	text("source", s.Source)
	text("id", s.ID.String())
	field("monotonic_time")
	dst = append(dst, w.null...)
	return append(dst, '}')
}

// object returns metadata as they are written, made once a row.
func (w *writer) object(raw []byte) []byte {
	if len(raw) == 0 {
		return []byte("{}")
	}
	text, ok := w.metadata[&raw[0]]
	if !ok {
		text = w.value(nil, raw)
		w.metadata[&raw[0]] = text
	}
	return text
}

// value appends a JSON text as Python would write what it reads of it; what is
// no JSON is written as text.
func (w *writer) value(dst, raw []byte) []byte {
	if !json.Valid(raw) {
		return w.quote(dst, string(raw))
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	type level struct {
		object bool
		n      int // keys and values so far
	}
	var stack []level
	for {
		token, err := dec.Token()
		if err != nil { // the end, since it is valid
			return dst
		}
		if token == json.Delim('}') || token == json.Delim(']') {
			dst = append(dst, byte(token.(json.Delim)))
			stack = stack[:len(stack)-1]
			continue
		}
		if len(stack) > 0 {
			top := &stack[len(stack)-1]
			if top.object && top.n%2 == 1 {
				dst = append(dst, ": "...)
			} else if top.n > 0 {
				dst = append(dst, ", "...)
			}
			top.n++
		}
		switch v := token.(type) {
		case json.Delim:
			dst = append(dst, byte(v))
			stack = append(stack, level{object: v == '{'})
		case string:
			dst = w.quote(dst, v)
		case bool:
			word := w.no
			if v {
				word = w.yes
			}
			dst = append(dst, word...)
		case json.Number:
			dst = appendNumber(dst, string(v))
		default:
			dst = append(dst, w.null...)
		}
	}
}

// appendNumber appends an integer as it is, and a float as Python prints it.
func appendNumber(dst []byte, s string) []byte {
	if s == "-0" {
		s = "0"
	}
	if strings.ContainsAny(s, ".eE") {
		if f, err := strconv.ParseFloat(s, 64); err == nil {
			return sample.AppendFloat(dst, f)
		}
	}
	return append(dst, s...)
}

const hexDigits = "0123456789abcdef"

// quoteJSON appends a JSON string in ASCII, as Python's json.dumps does.
func quoteJSON(dst []byte, s string) []byte {
	dst = append(dst, '"')
	if plain(s) {
		return append(append(dst, s...), '"')
	}
	unit := func(u rune) {
		dst = append(dst, '\\', 'u', hexDigits[u>>12&15], hexDigits[u>>8&15], hexDigits[u>>4&15], hexDigits[u&15])
	}
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', byte(c))
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\r':
			dst = append(dst, `\r`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case c == '\b':
			dst = append(dst, `\b`...)
		case c == '\f':
			dst = append(dst, `\f`...)
		case c >= ' ' && c <= '~':
			dst = append(dst, byte(c))
		case c > 0xffff:
			unit(0xd800 + (c-0x10000)>>10)
			unit(0xdc00 + (c-0x10000)&0x3ff)
		default:
			unit(c)
		}
	}
	return append(dst, '"')
}

// plain reports whether s is the same in both styles, but for its quotes.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\'' || c == '\\' {
			return false
		}
	}
	return true
}

// quotePython appends Python's repr of a string.
func quotePython(dst []byte, s string) []byte {
	if plain(s) {
		return append(append(append(dst, '\''), s...), '\'')
	}
	return sample.AppendRepr(dst, s)
}
