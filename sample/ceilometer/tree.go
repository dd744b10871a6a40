package ceilometer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// tree is a JSON value with the keys of its objects in their order.
type tree struct {
	kind byte     // n: null, t, f, 0: number, ": text, [, {
	text string   // of a number or a text
	keys []string // of an object
	list []tree   // elements, or values by the number of their key
}

// maxDepth bounds how deep a value may nest; Python's own readers give up at
// about a thousand.
const maxDepth = 900

// parse reads a JSON value; what is none, or nests too deep, becomes a text. Of
// keys that are there twice the last value counts, in the place of the first, as
// in Python.
func parse(raw []byte) tree {
	if json.Valid(raw) && depth(raw) <= maxDepth {
		dec := json.NewDecoder(bytes.NewReader(raw))
		dec.UseNumber()
		if t, ok := parseNext(dec); ok {
			return t
		}
	}
	return tree{kind: '"', text: valid(string(raw))}
}

// depth returns how deep a valid JSON value nests.
func depth(raw []byte) (most int) {
	level, quoted := 0, false
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == '{' || c == '['):
			level++
			most = max(most, level)
		case !quoted && (c == '}' || c == ']'):
			level--
		}
	}
	return most
}

func parseNext(dec *json.Decoder) (tree, bool) {
	token, err := dec.Token()
	if err != nil {
		return tree{}, false
	}
	switch v := token.(type) {
	case json.Delim:
		t := tree{kind: byte(v)}
		seen := map[string]int{}
		for dec.More() {
			at := len(t.list)
			if v == '{' {
				key, err := dec.Token()
				if err != nil {
					return tree{}, false
				}
				name := key.(string)
				if first, twice := seen[name]; twice {
					at = first
				} else {
					seen[name] = at
					t.keys = append(t.keys, name)
				}
			}
			inner, ok := parseNext(dec)
			if !ok {
				return tree{}, false
			}
			if at == len(t.list) {
				t.list = append(t.list, inner)
			} else {
				t.list[at] = inner
			}
		}
		_, err := dec.Token()
		return t, err == nil
	case string:
		return tree{kind: '"', text: v}, true
	case json.Number:
		return tree{kind: '0', text: string(AppendNumber(nil, string(v)))}, true
	case bool:
		if v {
			return tree{kind: 't'}, true
		}
		return tree{kind: 'f'}, true
	}
	return tree{kind: 'n'}, true
}

// sorted returns the numbers of an object's keys in the order of the keys.
func (t *tree) sorted() []int {
	order := make([]int, len(t.keys))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return strings.Compare(t.keys[a], t.keys[b]) })
	return order
}

// appendSigned appends what the signature covers of a value: each innermost
// name, with the names around it before colons, and each value as Python's str
// writes it.
func (t *tree) appendSigned(dst []byte, name string) []byte {
	if t.kind == '{' {
		for _, i := range t.sorted() {
			dst = t.list[i].appendSigned(dst, name+":"+t.keys[i])
		}
		return dst
	}
	dst = append(dst, name...)
	if t.kind == '"' {
		return append(dst, t.text...)
	}
	return t.appendRepr(dst)
}

// appendRepr appends Python's repr of a value whose texts were turned to bytes.
func (t *tree) appendRepr(dst []byte) []byte {
	switch t.kind {
	case 'n':
		return append(dst, "None"...)
	case 't':
		return append(dst, "True"...)
	case 'f':
		return append(dst, "False"...)
	case '0':
		return append(dst, t.text...)
	case '"':
		return AppendBytesRepr(dst, t.text)
	case '[':
		dst = append(dst, '[')
		for i := range t.list {
			if i > 0 {
				dst = append(dst, ", "...)
			}
			dst = t.list[i].appendRepr(dst)
		}
		return append(dst, ']')
	}
	dst = append(dst, '{')
	for n, i := range t.sorted() {
		if n > 0 {
			dst = append(dst, ", "...)
		}
		dst = append(AppendBytesRepr(dst, t.keys[i]), ": "...)
		dst = t.list[i].appendRepr(dst)
	}
	return append(dst, '}')
}

// AppendBytesRepr appends Python's repr of the UTF-8 of a text.
func AppendBytesRepr(dst []byte, s string) []byte {
	quote := byte('\'')
	if strings.Contains(s, "'") && !strings.Contains(s, `"`) {
		quote = '"'
	}
	dst = append(dst, 'b', quote)
	for i := range len(s) {
		switch c := s[i]; {
		case c == quote || c == '\\':
			dst = append(dst, '\\', c)
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\r':
			dst = append(dst, `\r`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case c < 0x20 || c >= 0x7f:
			dst = append(dst, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
		default:
			dst = append(dst, c)
		}
	}
	return append(dst, quote)
}

const hexDigits = "0123456789abcdef"

// appendJSON appends a value as Python's json.dumps writes it.
func (t *tree) appendJSON(dst []byte) []byte {
	switch t.kind {
	case 'n':
		return append(dst, "null"...)
	case 't':
		return append(dst, "true"...)
	case 'f':
		return append(dst, "false"...)
	case '0':
		return append(dst, t.text...)
	case '"':
		return sample.AppendText(dst, t.text)
	}
	dst = append(dst, t.kind)
	for i := range t.list {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		if t.kind == '{' {
			dst = append(sample.AppendText(dst, t.keys[i]), ": "...)
		}
		dst = t.list[i].appendJSON(dst)
	}
	return append(dst, t.kind+2) // the bracket that closes
}

// AppendNumber appends an integer as it is, and a float as Python prints it.
func AppendNumber(dst []byte, s string) []byte {
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

// appendMsgpack appends a value as msgpack.
func (t *tree) appendMsgpack(dst []byte) []byte {
	switch t.kind {
	case 'n':
		return append(dst, 0xc0)
	case 't':
		return append(dst, 0xc3)
	case 'f':
		return append(dst, 0xc2)
	case '0':
		return appendPackedNumber(dst, t.text)
	case '"':
		return appendPackedText(dst, t.text)
	case '[':
		dst = appendPackedLen(dst, len(t.list), 0x90, 0xdc)
	default:
		dst = appendPackedLen(dst, len(t.list), 0x80, 0xde)
	}
	for i := range t.list {
		if t.kind == '{' {
			dst = appendPackedText(dst, t.keys[i])
		}
		dst = t.list[i].appendMsgpack(dst)
	}
	return dst
}

func appendPackedLen(dst []byte, n int, fix, long byte) []byte {
	switch {
	case n < 16:
		return append(dst, fix|byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(dst, long), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(dst, long+1), uint32(n))
}

func appendPackedText(dst []byte, s string) []byte {
	switch n := len(s); {
	case n < 32:
		dst = append(dst, 0xa0|byte(n))
	case n < 1<<8:
		dst = append(dst, 0xd9, byte(n))
	case n < 1<<16:
		dst = binary.BigEndian.AppendUint16(append(dst, 0xda), uint16(n))
	default:
		dst = binary.BigEndian.AppendUint32(append(dst, 0xdb), uint32(n))
	}
	return append(dst, s...)
}

// appendPackedNumber packs a number as Python would; an int that needs more
// than 64 bits becomes a float.
func appendPackedNumber(dst []byte, text string) []byte {
	if u, err := strconv.ParseUint(text, 10, 64); err == nil {
		return appendPackedUint(dst, u)
	}
	if i, err := strconv.ParseInt(text, 10, 64); err == nil {
		return appendPackedInt(dst, i)
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil {
		f = math.Inf(1)
	}
	return appendPackedFloat(dst, f)
}

func appendPackedFloat(dst []byte, f float64) []byte {
	return binary.BigEndian.AppendUint64(append(dst, 0xcb), math.Float64bits(f))
}

func appendPackedUint(dst []byte, u uint64) []byte {
	switch {
	case u < 1<<7:
		return append(dst, byte(u))
	case u < 1<<8:
		return append(dst, 0xcc, byte(u))
	case u < 1<<16:
		return binary.BigEndian.AppendUint16(append(dst, 0xcd), uint16(u))
	case u < 1<<32:
		return binary.BigEndian.AppendUint32(append(dst, 0xce), uint32(u))
	}
	return binary.BigEndian.AppendUint64(append(dst, 0xcf), u)
}

func appendPackedInt(dst []byte, i int64) []byte {
	switch {
	case i >= 0:
		return appendPackedUint(dst, uint64(i))
	case i >= -1<<5:
		return append(dst, byte(i))
	case i >= -1<<7:
		return append(dst, 0xd0, byte(i))
	case i >= -1<<15:
		return binary.BigEndian.AppendUint16(append(dst, 0xd1), uint16(i))
	case i >= -1<<31:
		return binary.BigEndian.AppendUint32(append(dst, 0xd2), uint32(i))
	}
	return binary.BigEndian.AppendUint64(append(dst, 0xd3), uint64(i))
}

func appendPackedVolume(dst []byte, v sample.Volume) []byte {
	switch v.Tag {
	case sample.I64:
		return appendPackedInt(dst, int64(v.Bits))
	case sample.F64:
		return appendPackedFloat(dst, v.Float64())
	}
	return appendPackedUint(dst, v.Bits)
}
