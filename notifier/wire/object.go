// Package wire writes samples and events in the form that Ceilometer's objects
// have in files and over HTTP (name, id, …), and reads what commands are given.
// Package sample/ceilometer has the form of its bus.
package wire

import (
	"encoding/binary"
	"strings"
	"unsafe"

	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// Style is how text and constants are written.
type Style struct {
	quote         func(dst []byte, s string) []byte
	null, yes, no string
	keys          [len(fields)]string // of a sample's fields, with what stands before and after them
}

// fields are those of a sample, in Ceilometer's order: since 2023.1 with the names
// of user and project.
var fields = [...]string{
	"name", "type", "unit", "volume", "user_id", "user_name", "project_id", "project_name", "resource_id", "timestamp",
	"resource_metadata", "source", "id", "monotonic_time",
}

// The styles.
var (
	JSON   = newStyle(sample.AppendText, "null", "true", "false")
	Python = newStyle(quotePython, "None", "True", "False")
)

func newStyle(quote func(dst []byte, s string) []byte, null, yes, no string) *Style {
	s := &Style{quote: quote, null: null, yes: yes, no: no}
	for i, name := range fields {
		before := ", "
		if i == 0 {
			before = "{"
		}
		s.keys[i] = before + string(quote(nil, name)) + ": "
	}
	return s
}

// Writer appends samples in the form of Ceilometer's objects (name, id, …). It is
// not safe for concurrent use.
type Writer struct {
	*Style
	metadata map[*byte][]byte // as they are written, by where those of a row begin
	texts    []byte           // what metadata points into
	parser   value.Parser
}

// NewWriter returns a writer for the samples of a batch, and of the next after
// each [Writer.Reset].
func NewWriter(style *Style) *Writer {
	w := &Writer{Style: style, metadata: map[*byte][]byte{}}
	w.parser.Strict = true
	return w
}

// keptTexts bounds the memory that a writer keeps from one batch to the next.
const keptTexts = 1 << 20

// Reset forgets the metadata of the samples so far.
func (w *Writer) Reset() {
	clear(w.metadata)
	if w.texts = w.texts[:0]; cap(w.texts) > keptTexts {
		w.texts = nil
	}
}

// Sample appends the fields of s in Ceilometer's order.
func (w *Writer) Sample(dst []byte, s *sample.Sample) []byte {
	var f sample.Foreign
	if s.Foreign != nil {
		f = *s.Foreign
	}
	dst = w.quote(append(dst, w.keys[0]...), s.Name)
	dst = w.quote(append(dst, w.keys[1]...), string(s.Kind))
	dst = w.quote(append(dst, w.keys[2]...), s.Unit)
	dst = s.Volume.Append(append(dst, w.keys[3]...))
	for i, text := range [...]string{s.User, f.UserName, s.Project, f.ProjectName} {
		if dst = append(dst, w.keys[4+i]...); text == "" {
			dst = append(dst, w.null...)
		} else {
			dst = w.quote(dst, text)
		}
	}
	dst = w.quote(append(dst, w.keys[8]...), s.Resource)
	dst = w.quote(append(dst, w.keys[9]...), ceilometer.Timestamp(s))
	dst = append(append(dst, w.keys[10]...), w.object(s.Metadata)...)
	dst = w.quote(append(dst, w.keys[11]...), s.Source)
	dst = append(dst, w.keys[12]...)
	if s.ID.Text != "" {
		dst = w.quote(dst, s.ID.Text)
	} else {
		quote := w.keys[12][len(", ")] // a UUID needs no other
		dst = append(s.ID.Append(append(dst, quote)), quote)
	}
	if dst = append(dst, w.keys[13]...); f.HasMonotonic {
		dst = sample.AppendFloat(dst, f.Monotonic)
	} else {
		dst = append(dst, w.null...)
	}
	return append(dst, '}')
}

// object returns metadata as they are written, made once a row.
func (w *Writer) object(raw []byte) []byte {
	if len(raw) == 0 {
		return []byte("{}")
	}
	text, ok := w.metadata[&raw[0]]
	if !ok {
		start := len(w.texts)
		w.texts = w.Value(w.texts, raw)
		text = w.texts[start:len(w.texts):len(w.texts)]
		w.metadata[&raw[0]] = text
	}
	return text
}

// Value appends a JSON text as Python would write what it reads of it; what is
// no JSON is written as text.
func (w *Writer) Value(dst, raw []byte) []byte {
	w.parser.Reset()
	v, err := w.parser.Parse(unsafe.String(unsafe.SliceData(raw), len(raw))) // of which nothing is kept
	if err != nil {
		return w.quote(dst, string(raw))
	}
	return w.append(dst, &v)
}

func (w *Writer) append(dst []byte, v *value.Value) []byte {
	switch v.Kind {
	case value.Null:
		return append(dst, w.null...)
	case value.Bool:
		if v.True {
			return append(dst, w.yes...)
		}
		return append(dst, w.no...)
	case value.Int:
		return append(dst, v.Text...)
	case value.Float:
		// One that is too large for Python stays a number that is.
		return ceilometer.AppendNumber(dst, strings.Replace(v.Text, "Infinity", "1e999", 1))
	case value.Text:
		return w.quote(dst, v.Text)
	}
	brackets := "[]"
	if v.Kind == value.Object {
		brackets = "{}"
	}
	dst = append(dst, brackets[0])
	for i := range v.Items {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		if v.Kind == value.Object {
			dst = append(w.quote(dst, v.Items[i].Key), ": "...)
		}
		dst = w.append(dst, &v.Items[i])
	}
	return append(dst, brackets[1])
}

// plain reports whether s is the same in both styles, but for its quotes: no byte
// of it is below ' ', above '~', a quote or a backslash.
func plain(s string) bool {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	for ; len(s) >= 8; s = s[8:] { // eight bytes at a time
		w := binary.LittleEndian.Uint64(unsafe.Slice(unsafe.StringData(s), 8))
		double, single, backslash := w^ones*'"', w^ones*'\'', w^ones*'\\'
		if (w|(w+ones)|(w-ones*' ')|(double-ones)&^double|(single-ones)&^single|(backslash-ones)&^backslash)&highs != 0 {
			return false
		}
	}
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
