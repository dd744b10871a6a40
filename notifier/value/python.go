package value

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/kvmeter/kvmeter/sample"
)

// ErrType is wrapped by the errors of operations that Python refuses for the
// kinds of their operands.
var ErrType = errors.New("these kinds don't go together")

// ErrNumber is wrapped by the errors about texts and floats that are no number
// of the wanted kind.
var ErrNumber = errors.New("not a number")

// Float64 returns the value as Python's float() does.
func (v *Value) Float64() (float64, error) {
	switch v.Kind {
	case Bool:
		if v.True {
			return 1, nil
		}
		return 0, nil
	case Int:
		f, err := strconv.ParseFloat(v.Text, 64)
		if err != nil {
			return 0, fmt.Errorf("%w: the integer %.20s… is too large for a float", ErrNumber, v.Text)
		}
		return f, nil
	case Float:
		f, _ := strconv.ParseFloat(v.Text, 64) // the parser has made sure of it
		return f, nil
	case Text:
		return textFloat(v.Text)
	}
	return 0, fmt.Errorf("%w: float() of %v", ErrType, v.Kind)
}

// textFloat reads a float as Python does: blanks around it and single
// underscores between digits are allowed, hexadecimal digits are not.
func textFloat(s string) (float64, error) {
	text, ok := withoutUnderscores(strings.TrimFunc(s, unicode.IsSpace))
	switch strings.ToLower(text) {
	case "nan", "+nan", "-nan":
		return math.NaN(), nil
	case "inf", "+inf", "-inf", "infinity", "+infinity", "-infinity":
	default:
		ok = ok && !strings.ContainsFunc(text, func(r rune) bool { return !strings.ContainsRune("0123456789+-.eE", r) })
	}
	if ok {
		f, err := strconv.ParseFloat(text, 64)
		if err == nil || errors.Is(err, strconv.ErrRange) {
			return f, nil
		}
	}
	return 0, fmt.Errorf("%w: %.40q", ErrNumber, s)
}

func withoutUnderscores(s string) (string, bool) {
	if !strings.Contains(s, "_") {
		return s, true
	}
	digit := func(i int) bool { return i >= 0 && i < len(s) && s[i]-'0' <= 9 }
	for i := range len(s) {
		if s[i] == '_' && (!digit(i-1) || !digit(i+1)) {
			return s, false
		}
	}
	return strings.ReplaceAll(s, "_", ""), true
}

// Integer returns the value as Python's int() does: an Int.
func (v *Value) Integer() (Value, error) {
	switch v.Kind {
	case Bool:
		if v.True {
			return Value{Kind: Int, Text: "1"}, nil
		}
		return Value{Kind: Int, Text: "0"}, nil
	case Int:
		return Value{Kind: Int, Text: v.Text}, nil
	case Float:
		f, _ := v.Float64()
		if math.IsNaN(f) || math.IsInf(f, 0) {
			return Value{}, fmt.Errorf("%w: int() of %s", ErrNumber, v.Text)
		}
		i, _ := big.NewFloat(f).Int(nil)
		return ofBig(i), nil
	case Text:
		text, ok := withoutUnderscores(strings.TrimFunc(v.Text, unicode.IsSpace))
		if len(text) > maxDigits {
			return Value{}, fmt.Errorf("%w: an integer of %d digits", ErrNumber, len(text))
		}
		if i, valid := new(big.Int).SetString(text, 10); ok && valid {
			return ofBig(i), nil
		}
		return Value{}, fmt.Errorf("%w: %.40q is no integer", ErrNumber, v.Text)
	}
	return Value{}, fmt.Errorf("%w: int() of %v", ErrType, v.Kind)
}

// OfInt returns an Int.
func OfInt(i int64) Value { return Value{Kind: Int, Text: strconv.FormatInt(i, 10)} }

// OfFloat returns a Float.
func OfFloat(f float64) Value { return ofFloat(f) }

func ofBig(i *big.Int) Value { return Value{Kind: Int, Text: i.String()} }

func ofFloat(f float64) Value {
	switch {
	case math.IsNaN(f):
		return Value{Kind: Float, Text: "NaN"}
	case math.IsInf(f, 1):
		return Value{Kind: Float, Text: "Infinity"}
	case math.IsInf(f, -1):
		return Value{Kind: Float, Text: "-Infinity"}
	}
	return Value{Kind: Float, Text: string(sample.AppendFloat(nil, f))}
}

// Number returns the exact number that goes into a sample; ok is false for what
// is no finite number of 64 bits. Integers beyond them become floats.
func (v *Value) Number() (n sample.Volume, ok bool) {
	w := v
	if v.Kind == Text {
		i, err := v.Integer()
		if err == nil {
			w = &i
		}
	}
	switch w.Kind {
	case Null, List, Object:
		return n, false
	case Bool:
		if v.True {
			return sample.Uint(1), true
		}
		return sample.Uint(0), true
	case Int:
		if u, err := strconv.ParseUint(w.Text, 10, 64); err == nil {
			return sample.Uint(u), true
		}
		if i, err := strconv.ParseInt(w.Text, 10, 64); err == nil {
			return sample.Int(i), true
		}
	}
	f, err := w.Float64()
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return n, false
	}
	return sample.Float(f), true
}

// Str returns what Python's str() makes of the value.
func (v *Value) Str() string {
	if v.Kind == Text || v.Kind == Int {
		return v.Text
	}
	return string(v.appendRepr(nil))
}

func (v *Value) appendRepr(dst []byte) []byte {
	switch v.Kind {
	case Null:
		return append(dst, "None"...)
	case Bool:
		if v.True {
			return append(dst, "True"...)
		}
		return append(dst, "False"...)
	case Int:
		return append(dst, v.Text...)
	case Float:
		f, _ := v.Float64()
		switch {
		case math.IsNaN(f):
			return append(dst, "nan"...)
		case math.IsInf(f, 1):
			return append(dst, "inf"...)
		case math.IsInf(f, -1):
			return append(dst, "-inf"...)
		}
		return sample.AppendFloat(dst, f)
	case Text:
		return sample.AppendRepr(dst, v.Text)
	}
	brackets := "[]"
	if v.Kind == Object {
		brackets = "{}"
	}
	dst = append(dst, brackets[0])
	for i := range v.Items {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		if v.Kind == Object {
			dst = append(sample.AppendRepr(dst, v.Items[i].Key), ": "...)
		}
		dst = v.Items[i].appendRepr(dst)
	}
	return append(dst, brackets[1])
}

// number reports whether Python computes with the value as with a number.
func (v *Value) number() bool { return v.Kind == Bool || v.Kind == Int || v.Kind == Float }

func (v *Value) big() *big.Int {
	w, _ := v.Integer()
	i, _ := new(big.Int).SetString(w.Text, 10)
	return i
}

// maxRepeated bounds what a text or list may become when it is multiplied.
const maxRepeated = 1 << 16

// Operate returns a op b, for op one of + - *, as Python computes it.
func Operate(op byte, a, b *Value) (Value, error) {
	refused := fmt.Errorf("%w: %v %c %v", ErrType, a.Kind, op, b.Kind)
	if a.number() && b.number() {
		if a.Kind == Float || b.Kind == Float {
			return operateFloats(op, a, b)
		}
		x, y := a.big(), b.big()
		if x.BitLen()+y.BitLen() > 4*maxDigits {
			return Value{}, fmt.Errorf("%w: the result has too many digits", ErrNumber)
		}
		switch op {
		case '+':
			return ofBig(x.Add(x, y)), nil
		case '-':
			return ofBig(x.Sub(x, y)), nil
		}
		return ofBig(x.Mul(x, y)), nil
	}
	switch {
	case op == '+' && a.Kind == Text && b.Kind == Text:
		if len(a.Text)+len(b.Text) > maxRepeated {
			return Value{}, fmt.Errorf("%w: the result is longer than %d bytes", ErrNumber, maxRepeated)
		}
		return Of(a.Text + b.Text), nil
	case op == '+' && a.Kind == List && b.Kind == List:
		return Value{Kind: List, Items: append(append([]Value(nil), a.Items...), b.Items...)}, nil
	case op == '*' && (a.Kind == Text || a.Kind == List):
		return repeat(a, b, refused)
	case op == '*' && (b.Kind == Text || b.Kind == List):
		return repeat(b, a, refused)
	}
	return Value{}, refused
}

func operateFloats(op byte, a, b *Value) (Value, error) {
	x, err := a.Float64()
	if err != nil {
		return Value{}, err
	}
	y, err := b.Float64()
	if err != nil {
		return Value{}, err
	}
	switch op {
	case '+':
		return ofFloat(x + y), nil
	case '-':
		return ofFloat(x - y), nil
	}
	return ofFloat(x * y), nil
}

func repeat(what, times *Value, refused error) (Value, error) {
	if times.Kind != Int && times.Kind != Bool {
		return Value{}, refused
	}
	size := max(1, len(what.Text)+len(what.Items))
	n := 0
	if count := times.big(); count.Sign() > 0 {
		if !count.IsInt64() || count.Int64() > int64(maxRepeated/size) {
			return Value{}, fmt.Errorf("%w: the result is longer than %d", ErrNumber, maxRepeated)
		}
		n = int(count.Int64())
	}
	if what.Kind == Text {
		return Of(strings.Repeat(what.Text, n)), nil
	}
	out := Value{Kind: List}
	for range n {
		out.Items = append(out.Items, what.Items...)
	}
	return out, nil
}

// Equal reports whether Python's == holds.
func Equal(a, b *Value) bool {
	if a.number() && b.number() {
		c, ordered := compareNumbers(a, b)
		return ordered && c == 0
	}
	if a.Kind != b.Kind {
		return false
	}
	switch a.Kind {
	case Text:
		return a.Text == b.Text
	case List:
		if len(a.Items) != len(b.Items) {
			return false
		}
		for i := range a.Items {
			if !Equal(&a.Items[i], &b.Items[i]) {
				return false
			}
		}
	case Object:
		if len(a.Items) != len(b.Items) {
			return false
		}
		for i := range a.Items {
			if other := b.Field(a.Items[i].Key); other == nil || !Equal(&a.Items[i], other) {
				return false
			}
		}
	}
	return true
}

// Compare returns how Python orders two values, or an error where it does not.
// ordered is false where one is NaN.
func Compare(a, b *Value) (c int, ordered bool, err error) {
	switch {
	case a.number() && b.number():
		c, ordered = compareNumbers(a, b)
		return c, ordered, nil
	case a.Kind == Text && b.Kind == Text:
		return strings.Compare(a.Text, b.Text), true, nil // UTF-8 sorts by code point
	case a.Kind == List && b.Kind == List:
		for i := range min(len(a.Items), len(b.Items)) {
			if !Equal(&a.Items[i], &b.Items[i]) {
				return Compare(&a.Items[i], &b.Items[i])
			}
		}
		return cmp.Compare(len(a.Items), len(b.Items)), true, nil
	}
	return 0, false, fmt.Errorf("%w: comparing %v with %v", ErrType, a.Kind, b.Kind)
}

func compareNumbers(a, b *Value) (c int, ordered bool) {
	if a.Kind != Float && b.Kind != Float {
		if len(a.Text) < 18 && len(b.Text) < 18 && a.Kind == Int && b.Kind == Int {
			x, _ := strconv.ParseInt(a.Text, 10, 64)
			y, _ := strconv.ParseInt(b.Text, 10, 64)
			return cmp.Compare(x, y), true
		}
		return a.big().Cmp(b.big()), true
	}
	exact := func(v *Value) *big.Float {
		if v.Kind == Float {
			f, _ := v.Float64()
			if math.IsNaN(f) {
				return nil
			}
			return big.NewFloat(f)
		}
		i := v.big()
		return new(big.Float).SetPrec(uint(max(64, i.BitLen()))).SetInt(i)
	}
	x, y := exact(a), exact(b)
	if x == nil || y == nil {
		return 0, false
	}
	return x.Cmp(y), true
}

// Cut returns the first n characters of s.
func Cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for i := range s {
		if n == 0 {
			return s[:i]
		}
		n--
	}
	return s
}

// Len returns what Python's len() says; ok is false for what has no length.
func (v *Value) Len() (n int, ok bool) {
	switch v.Kind {
	case Text:
		return utf8.RuneCountInString(v.Text), true
	case List, Object:
		return len(v.Items), true
	}
	return 0, false
}
