package sample

import (
	"errors"
	"fmt"
	"math"
	"strconv"
)

// Tag says how the bits of a [Volume] are to be read.
type Tag uint8

// The tags, with their numbers on the wire.
const (
	U64 Tag = 0
	I64 Tag = 1
	F64 Tag = 2
)

// ErrNotFinite is returned where a volume is NaN or infinite.
var ErrNotFinite = errors.New("not a finite number")

// Volume is an exact number: an unsigned or signed 64-bit integer, or a
// float64. The zero Volume is the integer 0. Volumes are comparable with ==
// when their tags are equal.
type Volume struct {
	Bits uint64 // two's complement for I64, IEEE 754 for F64
	Tag  Tag
}

// Uint returns v as a volume.
func Uint(v uint64) Volume { return Volume{v, U64} }

// Int returns v as a volume.
func Int(v int64) Volume { return Volume{uint64(v), I64} }

// Float returns v as a volume. The wire and the store refuse NaN and infinities.
func Float(v float64) Volume { return Volume{math.Float64bits(v), F64} }

// Float64 returns the nearest float64, for statistics and the API only.
func (v Volume) Float64() float64 {
	switch v.Tag {
	case I64:
		return float64(int64(v.Bits))
	case F64:
		return math.Float64frombits(v.Bits)
	}
	return float64(v.Bits)
}

// Check returns an error for NaN, infinities and unknown tags.
func (v Volume) Check() error {
	switch v.Tag {
	case U64, I64:
		return nil
	case F64:
		if f := v.Float64(); math.IsNaN(f) || math.IsInf(f, 0) {
			return ErrNotFinite
		}
		return nil
	}
	return fmt.Errorf("volume has unknown number tag %d", v.Tag)
}

// Append appends the volume as a JSON number: integers exactly, floats in the
// shortest form that reads back to the same bits.
func (v Volume) Append(dst []byte) []byte {
	switch v.Tag {
	case I64:
		return strconv.AppendInt(dst, int64(v.Bits), 10)
	case F64:
		return AppendFloat(dst, v.Float64())
	}
	return strconv.AppendUint(dst, v.Bits, 10)
}

// AppendAPI appends the volume as API v2 prints it: integers exactly but with
// a decimal point ("50.0"), since clients read a float there.
func (v Volume) AppendAPI(dst []byte) []byte {
	dst = v.Append(dst)
	if v.Tag != F64 {
		dst = append(dst, '.', '0')
	}
	return dst
}

// String returns the volume as [Volume.Append] prints it.
func (v Volume) String() string { return string(v.Append(nil)) }

// AppendFloat appends f as a JSON number that keeps a decimal point or an
// exponent: "50.0", "1e+20", "1e-07".
func AppendFloat(dst []byte, f float64) []byte {
	format := byte('f')
	if abs := math.Abs(f); abs != 0 && (abs < 1e-4 || abs >= 1e16) {
		format = 'e'
	}
	start := len(dst)
	dst = strconv.AppendFloat(dst, f, format, -1, 64)
	for _, c := range dst[start:] {
		if c == '.' || c == 'e' {
			return dst
		}
	}
	return append(dst, '.', '0')
}
