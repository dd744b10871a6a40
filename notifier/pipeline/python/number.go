package python

import (
	bytewise "encoding/binary" // binary is an expression here
	"errors"
	"math"
	"math/big"

	"github.com/kvmeter/kvmeter/sample"
)

// Number is a Python int or float. The zero Number is the int 0.
type Number struct {
	big   *big.Int // an int beyond int64; nil: see the others
	i     int64    // the int, unless float
	f     float64  // the float, if float
	float bool
}

// What arithmetic refuses.
var (
	ErrZeroDivision = errors.New("division by zero")
	ErrTooLarge     = errors.New("the number is too large")
	ErrNotFinite    = errors.New("the result is no finite number")
)

// maxBits bounds the ints that powers and shifts may give.
const maxBits = 4096

// Int returns v as a number.
func Int(v int64) Number { return Number{i: v} }

// Float returns v as a number.
func Float(v float64) Number { return Number{f: v, float: true} }

// FromVolume returns what Python reads of a volume that was printed as JSON.
func FromVolume(v sample.Volume) Number {
	switch v.Tag {
	case sample.F64:
		return Float(v.Float64())
	case sample.I64:
		return Int(int64(v.Bits))
	}
	if v.Bits > math.MaxInt64 {
		return Number{big: new(big.Int).SetUint64(v.Bits)}
	}
	return Int(int64(v.Bits))
}

// Volume returns the number as a volume. An int that needs more than 64 bits
// becomes the nearest float; NaN and infinities are refused.
func (n Number) Volume() (sample.Volume, error) {
	switch {
	case n.float:
		if math.IsNaN(n.f) || math.IsInf(n.f, 0) {
			return sample.Volume{}, ErrNotFinite
		}
		return sample.Float(n.f), nil
	case n.big != nil:
		if n.big.IsUint64() {
			return sample.Uint(n.big.Uint64()), nil
		}
		f, err := n.Float64()
		return sample.Float(f), err
	case n.i < 0:
		return sample.Int(n.i), nil
	}
	return sample.Uint(uint64(n.i)), nil
}

// Append appends the number in a form of which [ReadNumber] makes the same again.
func (n Number) Append(dst []byte) []byte {
	if n.float {
		return bytewise.BigEndian.AppendUint64(append(dst, 'f'), math.Float64bits(n.f))
	}
	return n.int().Append(append(dst, 'i'), 62)
}

// ReadNumber reads what [Number.Append] has written.
func ReadNumber(b []byte) (Number, error) {
	switch {
	case len(b) == 9 && b[0] == 'f':
		return Float(math.Float64frombits(bytewise.BigEndian.Uint64(b[1:]))), nil
	case len(b) > 1 && len(b) <= maxBits/5 && b[0] == 'i': // a digit of base 62 has more than 5 bits
		if n, ok := new(big.Int).SetString(string(b[1:]), 62); ok {
			return fromBig(n)
		}
	}
	return Number{}, errors.New("no number")
}

// IsFloat reports whether the number is a float.
func (n Number) IsFloat() bool { return n.float }

// Float64 returns float(n).
func (n Number) Float64() (float64, error) {
	switch {
	case n.float:
		return n.f, nil
	case n.big == nil:
		return float64(n.i), nil
	}
	f, _ := new(big.Float).SetInt(n.big).Float64()
	if math.IsInf(f, 0) {
		return 0, ErrTooLarge
	}
	return f, nil
}

// int returns the value of an int.
func (n Number) int() *big.Int {
	if n.big != nil {
		return n.big
	}
	return big.NewInt(n.i)
}

// fromBig returns an int in its shortest form.
func fromBig(b *big.Int) (Number, error) {
	if b.IsInt64() {
		return Int(b.Int64()), nil
	}
	if b.BitLen() > maxBits {
		return Number{}, ErrTooLarge
	}
	return Number{big: b}, nil
}

// Truth returns bool(n).
func (n Number) Truth() bool {
	if n.float {
		return n.f != 0
	}
	return n.big != nil || n.i != 0
}

// floats returns both numbers as floats.
func floats(a, b Number) (x, y float64, err error) {
	if x, err = a.Float64(); err == nil {
		y, err = b.Float64()
	}
	return x, y, err
}

// Neg returns -n.
func (n Number) Neg() Number {
	if n.float {
		return Float(-n.f)
	}
	if n.big == nil && n.i != math.MinInt64 {
		return Int(-n.i)
	}
	m, _ := fromBig(new(big.Int).Neg(n.int())) // as large as before
	return m
}

// Add returns a + b.
func Add(a, b Number) (Number, error) {
	if a.float || b.float {
		x, y, err := floats(a, b)
		return Float(x + y), err
	}
	if a.big == nil && b.big == nil {
		if s := a.i + b.i; (s > a.i) == (b.i > 0) {
			return Int(s), nil
		}
	}
	return fromBig(new(big.Int).Add(a.int(), b.int()))
}

// Sub returns a - b.
func Sub(a, b Number) (Number, error) {
	if a.float || b.float {
		x, y, err := floats(a, b)
		return Float(x - y), err
	}
	if a.big == nil && b.big == nil {
		if d := a.i - b.i; (d < a.i) == (b.i > 0) {
			return Int(d), nil
		}
	}
	return fromBig(new(big.Int).Sub(a.int(), b.int()))
}

// Mul returns a * b.
func Mul(a, b Number) (Number, error) {
	if a.float || b.float {
		x, y, err := floats(a, b)
		return Float(x * y), err
	}
	const half = 1 << 31
	if a.big == nil && b.big == nil && a.i > -half && a.i < half && b.i > -half && b.i < half {
		return Int(a.i * b.i), nil
	}
	return fromBig(new(big.Int).Mul(a.int(), b.int()))
}

// Div returns a / b: of two ints the float that is nearest to the quotient.
func Div(a, b Number) (Number, error) {
	if !b.Truth() {
		return Number{}, ErrZeroDivision
	}
	if a.float || b.float {
		x, y, err := floats(a, b)
		return Float(x / y), err
	}
	const exact = 1 << 53
	if a.big == nil && b.big == nil && a.i > -exact && a.i < exact && b.i > -exact && b.i < exact {
		return Float(float64(a.i) / float64(b.i)), nil
	}
	f, _ := new(big.Rat).SetFrac(a.int(), b.int()).Float64()
	if math.IsInf(f, 0) {
		return Number{}, ErrTooLarge
	}
	return Float(f), nil
}

// floorDivMod returns a // b and a % b, whose sign is that of b.
func floorDivMod(a, b Number) (div, mod Number, err error) {
	if !b.Truth() {
		return div, mod, ErrZeroDivision
	}
	if a.float || b.float {
		x, y, err := floats(a, b)
		m := math.Mod(x, y)
		d := (x - m) / y
		if m != 0 && (y < 0) != (m < 0) {
			m += y
			d--
		} else if m == 0 {
			m = math.Copysign(0, y)
		}
		if d != 0 {
			if f := math.Floor(d); d-f > 0.5 {
				d = f + 1
			} else {
				d = f
			}
		} else {
			d = math.Copysign(0, x/y)
		}
		return Float(d), Float(m), err
	}
	q, r := new(big.Int).QuoRem(a.int(), b.int(), new(big.Int))
	if r.Sign() != 0 && r.Sign() != b.int().Sign() {
		q.Sub(q, big.NewInt(1))
		r.Add(r, b.int())
	}
	if div, err = fromBig(q); err == nil {
		mod, err = fromBig(r)
	}
	return div, mod, err
}

// pow returns a ** b.
func pow(a, b Number) (Number, error) {
	if a.float || b.float || b.int().Sign() < 0 {
		return floatPow(a, b)
	}
	if a.big == nil && a.i >= -1 && a.i <= 1 {
		if a.i == -1 && b.int().Bit(0) == 0 || a.i == 0 && !b.Truth() {
			return Int(1), nil
		}
		if b.Truth() {
			return a, nil
		}
		return Int(1), nil
	}
	if b.big != nil || int64(a.int().BitLen()-1)*b.i > maxBits || b.i > maxBits {
		return Number{}, ErrTooLarge
	}
	return fromBig(new(big.Int).Exp(a.int(), b.int(), nil))
}

func floatPow(a, b Number) (Number, error) {
	x, y, err := floats(a, b)
	if err != nil {
		return Number{}, err
	}
	switch {
	case x == 0 && y < 0:
		return Number{}, ErrZeroDivision
	case x < 0 && !math.IsInf(y, 0) && y != math.Trunc(y):
		return Number{}, errors.New("a fractional power of a negative number")
	}
	r := math.Pow(x, y)
	if exact, ok := integralPow(x, y); ok {
		r = exact
	}
	if math.IsInf(r, 0) && !math.IsInf(x, 0) && !math.IsInf(y, 0) {
		return Number{}, ErrTooLarge
	}
	return Float(r), nil
}

// integralPow returns the float nearest to x ** y for an integral y, as the C
// library does; math.Pow may be off by its last digit.
func integralPow(x, y float64) (float64, bool) {
	if y != math.Trunc(y) || math.Abs(y) > 1100 || x == 0 || math.IsNaN(x) || math.IsInf(x, 0) {
		return 0, false
	}
	const precision = 2048
	r := new(big.Float).SetPrec(precision).SetInt64(1)
	base := new(big.Float).SetPrec(precision).SetFloat64(x)
	for n := int(math.Abs(y)); n > 0; n >>= 1 {
		if n&1 == 1 {
			r.Mul(r, base)
		}
		base.Mul(base, base)
	}
	if y < 0 {
		r.Quo(big.NewFloat(1), r)
	}
	f, _ := r.Float64()
	return f, true
}

// Compare returns whether a is less than, equal to or greater than b as -1, 0
// or 1, exactly; ok is false where one is NaN.
func Compare(a, b Number) (c int, ok bool) {
	if a.float && math.IsNaN(a.f) || b.float && math.IsNaN(b.f) {
		return 0, false
	}
	if !a.float && !b.float && a.big == nil && b.big == nil {
		switch {
		case a.i < b.i:
			return -1, true
		case a.i > b.i:
			return 1, true
		}
		return 0, true
	}
	return a.exact().Cmp(b.exact()), true
}

// exact returns the number without rounding; it is not NaN.
func (n Number) exact() *big.Float {
	if n.float {
		return new(big.Float).SetFloat64(n.f)
	}
	return new(big.Float).SetPrec(uint(max(64, n.int().BitLen()))).SetInt(n.int())
}
