package file

import (
	"bytes"
	"encoding/json"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kvmeter/kvmeter/sample"
)

// line is a sample on its way to the file.
type line struct {
	sample.Sample
	texts map[*byte][]byte // metadata as they are written, by where those of the batch begin
}

// metadata returns the sample's metadata as render makes them, once a row.
func (l *line) metadata(render func(raw []byte) []byte) []byte {
	if len(l.Metadata) == 0 {
		return []byte("{}")
	}
	text, ok := l.texts[&l.Metadata[0]]
	if !ok {
		text = render(l.Metadata)
		l.texts[&l.Metadata[0]] = text
	}
	return text
}

// appendLine appends the fields in Ceilometer's order. quote appends a string.
func appendLine(dst []byte, l *line, quote func([]byte, string) []byte, null string, metadata []byte) []byte {
	field := func(name string) {
		if dst[len(dst)-1] != '{' {
			dst = append(dst, ", "...)
		}
		dst = append(quote(dst, name), ": "...)
	}
	text := func(name, value string) {
		field(name)
		dst = quote(dst, value)
	}
	optional := func(name, value string) {
		field(name)
		if value == "" {
			dst = append(dst, null...)
			return
		}
		dst = quote(dst, value)
	}
	dst = append(dst, '{')
	text("name", l.Name)
	text("type", string(l.Kind))
	text("unit", l.Unit)
	field("volume")
	dst = l.Volume.Append(dst)
	optional("user_id", l.User)
	optional("project_id", l.Project)
	text("resource_id", l.Resource)
	text("timestamp", timestamp(l.Time))
	field("resource_metadata")
	dst = append(dst, metadata...)
	text("source", l.Source)
	text("id", l.ID.String())
	field("monotonic_time")
	dst = append(dst, null...)
	return append(dst, '}')
}

// timestamp is Python's isoformat of a naive UTC time: no fraction where it is 0.
func timestamp(us int64) string {
	t := time.UnixMicro(us).UTC()
	if t.Nanosecond() == 0 {
		return t.Format("2006-01-02T15:04:05")
	}
	return t.Format("2006-01-02T15:04:05.000000")
}

// appendJSON appends the sample as a JSON object.
func appendJSON(dst []byte, l *line) []byte {
	return appendLine(dst, l, quoteJSON, "null", l.metadata(func(raw []byte) []byte {
		var buf bytes.Buffer
		if json.Compact(&buf, raw) != nil {
			return quoteJSON(nil, string(raw)) // what is no JSON is kept as text
		}
		return buf.Bytes()
	}))
}

const hexDigits = "0123456789abcdef"

// quoteJSON appends a JSON string in ASCII, as Python's json.dumps does.
func quoteJSON(dst []byte, s string) []byte {
	dst = append(dst, '"')
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

// appendPython appends the sample as a Python dict literal.
func appendPython(dst []byte, l *line) []byte {
	return appendLine(dst, l, quotePython, "None", l.metadata(func(raw []byte) []byte {
		literal, err := appendLiteral(nil, raw)
		if err != nil {
			return quotePython(nil, string(raw))
		}
		return literal
	}))
}

// appendLiteral appends a JSON text as Python would print what it reads of it.
func appendLiteral(dst, raw []byte) ([]byte, error) {
	if !json.Valid(raw) {
		return dst, io.ErrUnexpectedEOF
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
		if err == io.EOF {
			return dst, nil
		}
		if err != nil {
			return dst, err
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
			dst = quotePython(dst, v)
		case bool:
			if v {
				dst = append(dst, "True"...)
			} else {
				dst = append(dst, "False"...)
			}
		case json.Number:
			dst = appendNumber(dst, string(v))
		default:
			dst = append(dst, "None"...)
		}
	}
}

func appendNumber(dst []byte, s string) []byte {
	if !strings.ContainsAny(s, ".eE") {
		if s == "-0" {
			s = "0"
		}
		return append(dst, s...)
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil { // too large
		if strings.HasPrefix(s, "-") {
			dst = append(dst, '-')
		}
		return append(dst, "inf"...)
	}
	return sample.AppendFloat(dst, f)
}

// quotePython appends Python's repr of a string.
func quotePython(dst []byte, s string) []byte {
	quote := rune('\'')
	if strings.Contains(s, "'") && !strings.Contains(s, `"`) {
		quote = '"'
	}
	dst = append(dst, byte(quote))
	for _, c := range s {
		switch {
		case c == quote || c == '\\':
			dst = append(dst, '\\', byte(c))
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\r':
			dst = append(dst, `\r`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case unicode.IsPrint(c):
			dst = utf8.AppendRune(dst, c)
		case c < 0x100:
			dst = append(dst, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
		case c < 0x10000:
			dst = append(dst, '\\', 'u', hexDigits[c>>12], hexDigits[c>>8&15], hexDigits[c>>4&15], hexDigits[c&15])
		default:
			dst = append(dst, '\\', 'U')
			for shift := 28; shift >= 0; shift -= 4 {
				dst = append(dst, hexDigits[c>>shift&15])
			}
		}
	}
	return append(dst, byte(quote))
}
