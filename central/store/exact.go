package store

import (
	"encoding/binary"
	"errors"
	"math"
	"math/big"
	"math/bits"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// Exact is a sum that nothing rounds: any number of volumes, and of volumes
// multiplied by whole numbers, in any order, give the same Exact. The zero
// Exact is 0.
type Exact struct {
	// The sum is (hi, lo, in two's complement) * 2^-frac, or wide * 2^-frac.
	hi   int64
	lo   uint64
	frac uint16
	wide *big.Int // where 128 bits are too few; never changed
}

// AddVolume adds v, which is finite.
func (e *Exact) AddVolume(v sample.Volume) { e.AddProduct(v, 1) }

// AddProduct adds v * n. v is finite, n greater than math.MinInt64.
func (e *Exact) AddProduct(v sample.Volume, n int64) {
	negative := n < 0
	if negative {
		n = -n
	}
	m, frac := v.Bits, uint16(0)
	switch v.Tag {
	case sample.I64:
		if int64(m) < 0 {
			m, negative = -m, !negative
		}
	case sample.F64:
		var shift uint
		m, frac, shift = mantissa(v.Float64())
		negative = negative != (v.Float64() < 0)
		if shift > 0 {
			wide := new(big.Int).Lsh(new(big.Int).SetUint64(m), shift)
			wide.Mul(wide, big.NewInt(n))
			if negative {
				wide.Neg(wide)
			}
			e.Add(Exact{wide: wide})
			return
		}
	}
	hi, lo := bits.Mul64(m, uint64(n)) // n < 2^63, so that hi is, too
	if negative {
		var borrow uint64
		lo, borrow = bits.Sub64(0, lo, 0)
		hi, _ = bits.Sub64(0, hi, borrow)
	}
	e.Add(Exact{hi: int64(hi), lo: lo, frac: frac})
}

// mantissa takes a float apart: it is m * 2^(shift - frac), one of which is 0.
func mantissa(f float64) (m uint64, frac uint16, shift uint) {
	b := math.Float64bits(f)
	m = b & (1<<52 - 1)
	exp := int(b >> 52 & 0x7ff)
	if exp == 0 {
		exp = 1
	} else {
		m |= 1 << 52
	}
	if m == 0 {
		return 0, 0, 0
	}
	exp -= 1075
	zeros := bits.TrailingZeros64(m)
	m, exp = m>>zeros, exp+zeros
	switch {
	case exp < 0:
		return m, uint16(-exp), 0
	case exp <= bits.LeadingZeros64(m):
		return m << exp, 0, 0
	}
	return m, 0, uint(exp)
}

// Add adds another sum.
func (e *Exact) Add(o Exact) {
	if e.wide == nil && o.wide == nil {
		a, b := *e, o
		if a.align(b.frac) && b.align(a.frac) {
			lo, carry := bits.Add64(a.lo, b.lo, 0)
			hi, _ := bits.Add64(uint64(a.hi), uint64(b.hi), carry)
			if (a.hi < 0) != (b.hi < 0) || (int64(hi) < 0) == (a.hi < 0) {
				*e = Exact{hi: int64(hi), lo: lo, frac: a.frac}
				return
			}
		}
	}
	a, b := e.big(), o.big()
	frac := max(e.frac, o.frac)
	sum := new(big.Int).Lsh(a, uint(frac-e.frac))
	sum.Add(sum, new(big.Int).Lsh(b, uint(frac-o.frac)))
	*e = Exact{wide: sum, frac: frac}
	e.narrow()
}

// Sub subtracts another sum.
func (e *Exact) Sub(o Exact) {
	if o.wide == nil && (o.hi != math.MinInt64 || o.lo != 0) {
		lo, borrow := bits.Sub64(0, o.lo, 0)
		hi, _ := bits.Sub64(0, uint64(o.hi), borrow)
		e.Add(Exact{hi: int64(hi), lo: lo, frac: o.frac})
		return
	}
	e.Add(Exact{wide: new(big.Int).Neg(o.big()), frac: o.frac})
}

// align gives the sum at least frac binary places, if that fits.
func (e *Exact) align(frac uint16) bool {
	if frac <= e.frac {
		return true
	}
	n := uint(frac - e.frac)
	if e.hi == 0 && e.lo == 0 {
		e.frac = frac
		return true
	}
	magnitude := uint64(e.hi ^ e.hi>>63)
	free := uint(bits.LeadingZeros64(magnitude)) // the sign's bit among them
	if magnitude == 0 {
		free = 64 + uint(bits.LeadingZeros64(e.lo^uint64(e.hi>>63)))
	}
	if n >= free {
		return false
	}
	if n >= 64 {
		e.hi, e.lo = int64(e.lo<<(n-64)), 0
	} else {
		e.hi, e.lo = e.hi<<n|int64(e.lo>>(64-n)), e.lo<<n
	}
	e.frac = frac
	return true
}

func (e *Exact) big() *big.Int {
	if e.wide != nil {
		return e.wide
	}
	n := new(big.Int).Lsh(big.NewInt(e.hi), 64)
	return n.Add(n, new(big.Int).SetUint64(e.lo))
}

// narrow goes back to 128 bits where they do.
func (e *Exact) narrow() {
	if zeros := min(e.wide.TrailingZeroBits(), uint(e.frac)); zeros > 0 {
		e.wide = new(big.Int).Rsh(e.wide, zeros)
		e.frac -= uint16(zeros)
	}
	if e.wide.Sign() == 0 {
		e.frac = 0
	}
	if e.wide.BitLen() > 126 {
		return
	}
	lo := new(big.Int).And(e.wide, new(big.Int).SetUint64(math.MaxUint64)).Uint64()
	hi := new(big.Int).Rsh(e.wide, 64).Int64()
	e.hi, e.lo, e.wide = hi, lo, nil
}

// shorten takes the binary places away that are zero.
func (e *Exact) shorten() {
	if e.wide != nil || e.frac == 0 {
		return
	}
	if e.hi == 0 && e.lo == 0 {
		e.frac = 0
		return
	}
	zeros := uint(bits.TrailingZeros64(e.lo))
	if e.lo == 0 {
		zeros = 64 + uint(bits.TrailingZeros64(uint64(e.hi)))
	}
	zeros = min(zeros, uint(e.frac))
	e.frac -= uint16(zeros)
	if zeros >= 64 {
		e.hi, e.lo = e.hi>>63, uint64(e.hi>>(zeros-64))
		return
	}
	e.hi, e.lo = e.hi>>zeros, e.lo>>zeros|uint64(e.hi)<<(64-zeros)
}

// Sign returns -1, 0 or 1.
func (e Exact) Sign() int {
	switch {
	case e.wide != nil:
		return e.wide.Sign()
	case e.hi < 0:
		return -1
	case e.hi == 0 && e.lo == 0:
		return 0
	}
	return 1
}

// Equal reports whether two sums are the same number.
func (e Exact) Equal(o Exact) bool {
	e.Sub(o)
	return e.Sign() == 0
}

// Rat returns the sum as a fraction.
func (e Exact) Rat() *big.Rat {
	return new(big.Rat).SetFrac(e.big(), new(big.Int).Lsh(big.NewInt(1), uint(e.frac)))
}

// Float64 returns the nearest float64.
func (e Exact) Float64() float64 {
	if e.wide == nil && e.frac == 0 && e.hi == int64(e.lo)>>63 {
		return float64(int64(e.lo))
	}
	f, _ := e.Rat().Float64()
	return f
}

// String returns all digits of the sum.
func (e Exact) String() string {
	s := e.Rat().FloatString(int(e.frac)) // a number of n binary places has n decimal ones
	if strings.Contains(s, ".") {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	return s
}

// Append appends the sum in a form that [ReadExact] reads.
func (e Exact) Append(dst []byte) []byte {
	e.shorten()
	n := e.big()
	magnitude := n.Bytes()
	dst = binary.AppendUvarint(dst, uint64(e.frac))
	sign := uint64(0)
	if n.Sign() < 0 {
		sign = 1
	}
	dst = binary.AppendUvarint(dst, uint64(len(magnitude))<<1|sign)
	return append(dst, magnitude...)
}

// ReadExact reads a sum and returns what follows it.
func ReadExact(src []byte) (e Exact, rest []byte, err error) {
	corrupt := errors.New("a sum is cut off")
	frac, n := binary.Uvarint(src)
	if n <= 0 || frac > math.MaxUint16 {
		return e, nil, corrupt
	}
	src = src[n:]
	length, n := binary.Uvarint(src)
	if n <= 0 || length>>1 > uint64(len(src)-n) {
		return e, nil, corrupt
	}
	src = src[n:]
	e.wide = new(big.Int).SetBytes(src[:length>>1])
	if length&1 != 0 {
		e.wide = new(big.Int).Neg(e.wide)
	}
	e.frac = uint16(frac)
	e.narrow()
	return e, src[length>>1:], nil
}

// Int64 returns the sum where it is an integer that fits.
func (e Exact) Int64() (int64, bool) {
	e.shorten()
	return int64(e.lo), e.wide == nil && e.frac == 0 && e.hi == int64(e.lo)>>63
}

// ExactInt returns the sum of one integer.
func ExactInt(v int64) Exact { return Exact{hi: v >> 63, lo: uint64(v)} }
