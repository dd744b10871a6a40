// Package value holds what a notification's JSON text says, as Python reads
// it: integers of any size, NaN, the last of two equal keys. Meter and event
// definitions compute with it as Ceilometer does.
package value

import (
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// Kind is the kind of a value.
type Kind uint8

// The kinds.
const (
	Null Kind = iota
	Bool
	Int
	Float
	Text
	List
	Object
)

// String returns the kind's name in error messages.
func (k Kind) String() string {
	return [...]string{"null", "a boolean", "an integer", "a float", "a text", "a list", "an object"}[k]
}

// Value is a JSON value. What [Parser.Parse] returns is only read.
type Value struct {
	Kind  Kind
	True  bool    // of a Bool
	Text  string  // of a Text; the digits of an Int or Float, as they were written
	Key   string  // of a member of an object
	Items []Value // of a List or Object
}

// Of returns a text.
func Of(s string) Value { return Value{Kind: Text, Text: s} }

// Piece returns the nth piece of a text that is split at a separator, at most so many
// times; most < 0: at each. ok is false where there are fewer pieces.
func Piece(text, separator string, nth, most int) (piece string, ok bool) {
	for ; ; nth-- {
		before, after, found := text, "", false
		if most != 0 {
			before, after, found = strings.Cut(text, separator)
		}
		if nth == 0 {
			return before, true
		}
		if !found {
			return "", false
		}
		text = after
		most--
	}
}

// Field returns the member of an object, or nil.
func (v *Value) Field(name string) *Value {
	if v.Kind != Object {
		return nil
	}
	for i := range v.Items {
		if v.Items[i].Key == name {
			return &v.Items[i]
		}
	}
	return nil
}

// Truthy reports whether Python takes the value for true.
func (v *Value) Truthy() bool {
	switch v.Kind {
	case Null:
		return false
	case Bool:
		return v.True
	case Int, Float:
		f, err := v.Float64()
		return err != nil || f != 0
	case Text:
		return v.Text != ""
	}
	return len(v.Items) > 0
}

// AppendJSON appends the value as JSON. What JSON cannot say (NaN and
// infinities) becomes null.
func (v *Value) AppendJSON(dst []byte) []byte {
	switch v.Kind {
	case Bool:
		if v.True {
			return append(dst, "true"...)
		}
		return append(dst, "false"...)
	case Int:
		return append(dst, v.Text...)
	case Float:
		if notFinite(v.Text) {
			return append(dst, "null"...)
		}
		return append(dst, v.Text...)
	case Text:
		return sample.AppendText(dst, v.Text)
	case List:
		dst = append(dst, '[')
		for i := range v.Items {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = v.Items[i].AppendJSON(dst)
		}
		return append(dst, ']')
	case Object:
		dst = append(dst, '{')
		for i := range v.Items {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(sample.AppendText(dst, v.Items[i].Key), ':')
			dst = v.Items[i].AppendJSON(dst)
		}
		return append(dst, '}')
	}
	return append(dst, "null"...)
}

// notFinite reports whether the text of a float is one of those that only
// Python's JSON has.
func notFinite(text string) bool { return text == "NaN" || strings.HasSuffix(text, "Infinity") }
