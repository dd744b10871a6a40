package bmc

import "math"

// Formats of a raw reading (§43.1, byte 21, bits 7:6).
const (
	Unsigned       = 0
	OnesComplement = 1
	TwosComplement = 2
	NotAnalog      = 3
)

// Linearizations (§43.1, byte 24). From NonLinear on, the factors hold for one
// raw reading only and are asked for with it.
const (
	Linear = iota
	Ln
	Log10
	Log2
	E
	Exp10
	Exp2
	Inverse
	Square
	Cube
	SquareRoot
	CubeRoot
	NonLinear = 0x70
)

// Factors turn a raw reading into a value (§36.3).
type Factors struct {
	M, B          int16 // 10 bits, signed
	BExp, RExp    int8  // 4 bits, signed: K1 and K2 in the formula
	Format        byte
	Linearization byte
}

// factorsOf reads a full record's factors (§43.1, bytes 21 to 30).
func factorsOf(r []byte) Factors {
	f := Factors{Format: r[20] >> 6, Linearization: r[23] & 0x7f}
	f.set(r[24:30])
	return f
}

// set takes M to the exponents from six bytes, which are the same in records
// and in the answer to Get Sensor Reading Factors (§35.5).
func (f *Factors) set(b []byte) {
	f.M, f.B = signed10(b[0], b[1]), signed10(b[2], b[3])
	f.RExp, f.BExp = int8(b[5])>>4, int8(b[5]<<4)>>4
}

// signed10 reads a number of 8 low and, in the second byte's top, 2 high bits.
func signed10(low, high byte) int16 { return int16(uint16(high>>6)<<14|uint16(low)<<6) >> 6 }

// Raw returns the raw reading as the number that its format makes it.
func (f *Factors) Raw(raw byte) int64 {
	switch f.Format {
	case OnesComplement:
		if raw&0x80 != 0 {
			return -int64(^raw)
		}
	case TwosComplement:
		return int64(int8(raw))
	}
	return int64(raw)
}

// Convert turns a raw reading into a value: y = L[(M·x + B·10^K1)·10^K2]
// (§36.3). ok is false where there is no such number: of a sensor that is not
// analog, and where the linearization is not defined for it.
func (f *Factors) Convert(raw byte) (value float64, ok bool) {
	if f.Format == NotAnalog {
		return 0, false
	}
	// All of it is decimal, so it is exact until it becomes a float64.
	n, exponent := int64(f.M)*f.Raw(raw), int(f.RExp)
	if f.BExp >= 0 {
		n += int64(f.B) * power10(int(f.BExp))
	} else {
		n = n*power10(-int(f.BExp)) + int64(f.B)
		exponent += int(f.BExp)
	}
	y := float64(n)
	if exponent >= 0 {
		y *= float64(power10(exponent))
	} else {
		y /= float64(power10(-exponent))
	}
	switch f.Linearization {
	case Ln:
		y = math.Log(y)
	case Log10:
		y = math.Log10(y)
	case Log2:
		y = math.Log2(y)
	case E:
		y = math.Exp(y)
	case Exp10:
		y = math.Pow(10, y)
	case Exp2:
		y = math.Exp2(y)
	case Inverse:
		y = 1 / y
	case Square:
		y *= y
	case Cube:
		y *= y * y
	case SquareRoot:
		y = math.Sqrt(y)
	case CubeRoot:
		y = math.Cbrt(y)
	}
	return y, !math.IsNaN(y) && !math.IsInf(y, 0)
}

func power10(n int) int64 {
	p := int64(1)
	for range n {
		p *= 10
	}
	return p
}
