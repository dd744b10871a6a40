package local

import (
	"encoding/binary"
	"errors"
	"math"
	"math/bits"
)

// A vector is a list of 64-bit words, of which the reader knows how many there
// are. All arithmetic wraps, so every word comes back as it was. Layout: one
// mode byte, then by mode:
//
//	constant  first
//	linear    first, delta
//	runs      for each run: length, difference to the run before
//	varints   first, the deltas
//	offsets   packed words
//	deltas    first, packed deltas
//	deltas2   first, first delta, packed differences of the deltas
//
// Packed is: the smallest, a byte with the number of low bits that are zero in
// every difference to it, a byte with the width in bits, then those
// differences without the zeros, least significant bit first. Single numbers
// are zigzag varints, lengths plain varints.
const (
	vecConstant = iota
	vecLinear
	vecRuns
	vecVarints
	vecOffsets
	vecDeltas
	vecDeltas2
)

// errCorrupt is wrapped by what the decoders of this package return.
var errCorrupt = errors.New("corrupt record")

// span follows a list of numbers that may become packed.
type span struct {
	min, max int64
	or       uint64 // of the differences to the first
	first    int64
	n        int
}

func (s *span) add(v int64) {
	if s.n == 0 {
		s.min, s.max, s.first = v, v, v
	}
	s.min, s.max = min(s.min, v), max(s.max, v)
	s.or |= uint64(v - s.first)
	s.n++
}

// width returns the common zeros and the width that packing takes.
func (s *span) width() (shift, width int) {
	if s.or == 0 {
		return 0, 0
	}
	shift = bits.TrailingZeros64(s.or)
	return shift, bits.Len64(uint64(s.max-s.min) >> shift)
}

// size returns the bytes that packing takes.
func (s *span) size() int {
	_, w := s.width()
	return varintLen(s.min) + 2 + (s.n*w+7)/8
}

func varintLen(v int64) int   { return uvarintLen(uint64(v<<1) ^ uint64(v>>63)) }
func uvarintLen(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

// appendVector appends the shortest form of v, which is not empty.
func appendVector(dst []byte, v []uint64) []byte {
	var offsets, deltas, deltas2 span
	varints, runs, runSize, runStart, runFrom := 0, 0, 0, 0, uint64(0)
	offsets.add(int64(v[0]))
	for i := 1; i < len(v); i++ {
		d := int64(v[i] - v[i-1])
		offsets.add(int64(v[i]))
		if i > 1 {
			deltas2.add(d - int64(v[i-1]-v[i-2]))
		}
		deltas.add(d)
		varints += varintLen(d)
		if d != 0 {
			runs++
			runSize += uvarintLen(uint64(i-runStart)) + varintLen(int64(v[runStart]-runFrom))
			runStart, runFrom = i, v[runStart]
		}
	}
	runSize += uvarintLen(uint64(len(v)-runStart)) + varintLen(int64(v[runStart]-runFrom))
	first := varintLen(int64(v[0]))
	switch {
	case runs == 0:
		return binary.AppendVarint(append(dst, vecConstant), int64(v[0]))
	case deltas.or == 0:
		dst = binary.AppendVarint(append(dst, vecLinear), int64(v[0]))
		return binary.AppendVarint(dst, int64(v[1]-v[0]))
	}
	mode, size := vecOffsets, offsets.size()
	try := func(m, s int) {
		if s < size {
			mode, size = m, s
		}
	}
	try(vecDeltas, first+deltas.size())
	if len(v) > 2 {
		try(vecDeltas2, first+varintLen(int64(v[1]-v[0]))+deltas2.size())
	}
	try(vecVarints, first+varints)
	try(vecRuns, runSize)
	dst = append(dst, byte(mode))
	switch mode {
	case vecRuns:
		for i, from := 0, uint64(0); i < len(v); {
			j := i + 1
			for j < len(v) && v[j] == v[i] {
				j++
			}
			dst = binary.AppendUvarint(dst, uint64(j-i))
			dst = binary.AppendVarint(dst, int64(v[i]-from))
			from, i = v[i], j
		}
	case vecVarints:
		dst = binary.AppendVarint(dst, int64(v[0]))
		for i := 1; i < len(v); i++ {
			dst = binary.AppendVarint(dst, int64(v[i]-v[i-1]))
		}
	case vecOffsets:
		p := newPacker(dst, &offsets)
		for _, w := range v {
			p.add(w)
		}
		return p.end()
	case vecDeltas:
		p := newPacker(binary.AppendVarint(dst, int64(v[0])), &deltas)
		for i := 1; i < len(v); i++ {
			p.add(v[i] - v[i-1])
		}
		return p.end()
	case vecDeltas2:
		dst = binary.AppendVarint(dst, int64(v[0]))
		p := newPacker(binary.AppendVarint(dst, int64(v[1]-v[0])), &deltas2)
		for i := 2; i < len(v); i++ {
			p.add(v[i] - 2*v[i-1] + v[i-2])
		}
		return p.end()
	}
	return dst
}

// packer writes the differences to the smallest number bit by bit.
type packer struct {
	dst          []byte
	min          uint64
	shift, width int
	acc          uint64
	n            int // bits in acc
}

func newPacker(dst []byte, s *span) *packer {
	p := &packer{min: uint64(s.min)}
	p.shift, p.width = s.width()
	p.dst = append(binary.AppendVarint(dst, s.min), byte(p.shift), byte(p.width))
	return p
}

func (p *packer) add(v uint64) {
	v = (v - p.min) >> p.shift
	p.acc |= v << p.n
	p.n += p.width
	if p.n >= 64 {
		p.dst = binary.LittleEndian.AppendUint64(p.dst, p.acc)
		p.n -= 64
		p.acc = v >> (p.width - p.n) // 0 where the word was full: shifts by 64 give 0
	}
}

func (p *packer) end() []byte {
	for ; p.n > 0; p.n -= 8 {
		p.dst = append(p.dst, byte(p.acc))
		p.acc >>= 8
	}
	return p.dst
}

// reader takes apart what this package wrote. After an error it returns zeros
// and stays at its end.
type reader struct {
	src []byte
	err error
}

func (r *reader) fail() {
	r.err = errCorrupt
	r.src = nil
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.src)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.src = r.src[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.src)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.src = r.src[n:]
	return v
}

func (r *reader) bytes(n uint64) []byte {
	if n > uint64(len(r.src)) {
		r.fail()
		return nil
	}
	b := r.src[:n]
	r.src = r.src[n:]
	return b
}

func (r *reader) byte() byte {
	if len(r.src) == 0 {
		r.fail()
		return 0
	}
	b := r.src[0]
	r.src = r.src[1:]
	return b
}

// number returns a varint that fits 32 bits: a number of the catalogue.
func (r *reader) number() uint32 {
	v := r.uvarint()
	if v > math.MaxUint32 {
		r.fail()
		return 0
	}
	return uint32(v)
}

// vector appends the n words of a vector to out.
func (r *reader) vector(out []uint64, n int) []uint64 {
	if n == 0 {
		return out
	}
	mode := r.byte()
	if r.err != nil {
		return out
	}
	switch mode {
	case vecConstant:
		v := uint64(r.varint())
		for range n {
			out = append(out, v)
		}
	case vecLinear:
		v, d := uint64(r.varint()), uint64(r.varint())
		for range n {
			out = append(out, v)
			v += d
		}
	case vecRuns:
		for v := uint64(0); n > 0 && r.err == nil; {
			length := r.uvarint()
			v += uint64(r.varint())
			if length == 0 || length > uint64(n) {
				r.fail()
				break
			}
			for range length {
				out = append(out, v)
			}
			n -= int(length)
		}
	case vecVarints:
		v := uint64(r.varint())
		out = append(out, v)
		for i := 1; i < n && r.err == nil; i++ {
			v += uint64(r.varint())
			out = append(out, v)
		}
	case vecOffsets:
		return r.packed(out, n)
	case vecDeltas:
		v := uint64(r.varint())
		start := len(out)
		out = r.packed(append(out, v), n-1)
		for i := start + 1; i < len(out); i++ {
			v += out[i]
			out[i] = v
		}
	case vecDeltas2:
		v, d := uint64(r.varint()), uint64(r.varint())
		if n < 2 {
			r.fail()
			break
		}
		start := len(out)
		out = r.packed(append(out, v, v+d), n-2)
		v += d
		for i := start + 2; i < len(out); i++ {
			d += out[i]
			v += d
			out[i] = v
		}
	default:
		r.fail()
	}
	return out
}

func (r *reader) packed(out []uint64, n int) []uint64 {
	low := uint64(r.varint())
	shift, width := r.byte(), int(r.byte())
	if shift > 63 || width > 64 {
		r.fail()
		return out
	}
	src := r.bytes(uint64(n*width+7) / 8)
	if r.err != nil {
		return out
	}
	mask := uint64(1)<<width - 1
	for i := range n {
		pos := i * width
		at, s := pos/8, pos%8
		var w uint64
		if at+8 <= len(src) {
			w = binary.LittleEndian.Uint64(src[at:]) >> s
		} else {
			for k := len(src) - 1; k >= at; k-- {
				w = w<<8 | uint64(src[k])
			}
			w >>= s
		}
		if s+width > 64 {
			w |= uint64(src[at+8]) << (64 - s)
		}
		out = append(out, low+(w&mask)<<shift)
	}
	return out
}
