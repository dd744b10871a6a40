package store

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// Document is metadata that is parsed when it is first asked for. It is not
// safe for concurrent use.
type Document struct {
	raw    []byte
	parsed bool
	value  any
}

// NewDocument returns the document of raw metadata. What is no JSON has no
// keys.
func NewDocument(raw []byte) *Document { return &Document{raw: raw} }

// Lookup returns the value at a path such as "flavor.vcpus" or "tags[0]":
// string, [json.Number], bool, nil, or a list or an object of those. Dots may
// also belong to a key.
func (d *Document) Lookup(path string) (value any, ok bool) {
	if !d.parsed {
		d.parsed = true
		dec := json.NewDecoder(bytes.NewReader(d.raw))
		dec.UseNumber()
		if dec.Decode(&d.value) != nil {
			d.value = nil
		}
	}
	return lookup(d.value, path)
}

func lookup(v any, path string) (any, bool) {
	if path == "" {
		return v, true
	}
	switch v := v.(type) {
	case map[string]any:
		for i := 1; i <= len(path); i++ {
			if i < len(path) && path[i] != '.' && path[i] != '[' {
				continue
			}
			sub, ok := v[path[:i]]
			if !ok {
				continue
			}
			if found, ok := lookup(sub, strings.TrimPrefix(path[i:], ".")); ok {
				return found, true
			}
		}
	case []any:
		end := strings.IndexByte(path, ']')
		if path[0] != '[' || end < 0 {
			return nil, false
		}
		if i, err := strconv.ParseUint(path[1:end], 10, 31); err == nil && int(i) < len(v) {
			return lookup(v[i], strings.TrimPrefix(path[end+1:], "."))
		}
	}
	return nil, false
}

// Text returns a value of the metadata as a text to group by: strings as they
// are, nil for null, anything else as compact JSON.
func Text(value any) *string {
	switch v := value.(type) {
	case nil:
		return nil
	case string:
		return &v
	}
	text, err := json.Marshal(value)
	if err != nil { // not for what Lookup returns
		return nil
	}
	s := string(text)
	return &s
}

// metadataValue brings a value to the types that Lookup returns.
func metadataValue(v any) (any, bool) {
	switch v := v.(type) {
	case nil, string, bool:
		return v, true
	case json.Number:
		_, err := strconv.ParseFloat(string(v), 64)
		return v, err == nil
	}
	text, err := json.Marshal(v)
	if err != nil {
		return v, false
	}
	d := NewDocument(text)
	return d.Lookup("")
}

// equal compares by type; numbers by value, whatever their notation.
func equal(a, b any) bool {
	switch a := a.(type) {
	case json.Number:
		n, ok := b.(json.Number)
		return ok && Compare(number(a), number(n)) == 0
	case []any:
		l, ok := b.([]any)
		if !ok || len(a) != len(l) {
			return false
		}
		for i := range a {
			if !equal(a[i], l[i]) {
				return false
			}
		}
		return true
	case map[string]any:
		m, ok := b.(map[string]any)
		if !ok || len(a) != len(m) {
			return false
		}
		for k, v := range a {
			w, ok := m[k]
			if !ok || !equal(v, w) {
				return false
			}
		}
		return true
	}
	return reflect.DeepEqual(a, b)
}

// number reads a JSON number: exactly where it is an integer of 64 bits.
func number(n json.Number) sample.Volume {
	if i, err := strconv.ParseInt(string(n), 10, 64); err == nil {
		return sample.Int(i)
	}
	if u, err := strconv.ParseUint(string(n), 10, 64); err == nil {
		return sample.Uint(u)
	}
	f, _ := strconv.ParseFloat(string(n), 64) // out of range: an infinity, which orders well
	return sample.Float(f)
}

// Compare orders two volumes by their exact values, whatever their tags:
// negative where a is the smaller, 0 where they are equal.
func Compare(a, b sample.Volume) int {
	switch {
	case a.Tag == sample.F64 && b.Tag == sample.F64:
		x, y := a.Float64(), b.Float64()
		switch {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	case a.Tag == sample.F64:
		return -compareInt(b, a.Float64())
	case b.Tag == sample.F64:
		return compareInt(a, b.Float64())
	}
	an, bn := negative(a), negative(b)
	switch {
	case an && !bn:
		return -1
	case bn && !an:
		return 1
	case a.Bits < b.Bits: // two's complement keeps the order of equal signs
		return -1
	case a.Bits > b.Bits:
		return 1
	}
	return 0
}

func negative(v sample.Volume) bool { return v.Tag == sample.I64 && int64(v.Bits) < 0 }

// compareInt orders an integer and a float64 without rounding either.
func compareInt(v sample.Volume, f float64) int {
	switch {
	case f >= 1<<64:
		return -1
	case f < -(1 << 63):
		return 1
	}
	whole := math.Floor(f)
	i := sample.Int(int64(whole))
	if whole >= 0 {
		i = sample.Uint(uint64(whole))
	}
	if order := Compare(v, i); order != 0 {
		return order
	}
	if f > whole {
		return -1
	}
	return 0
}
