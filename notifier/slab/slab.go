// Package slab hands out memory in pieces of larger allocations, where one for each
// piece would cost more than what it is used for.
package slab

import "unsafe"

// chunk is how much is allocated at once, in bytes.
const chunk = 8 << 10

// Slab hands out values, none of them twice. The collector frees a chunk when
// nothing refers to any of it, so a slab is for what lives about as long as what
// it hands out next. It is not safe for concurrent use.
type Slab[T any] struct{ free []T }

// Take returns n zero values.
func (s *Slab[T]) Take(n int) []T {
	if n > len(s.free) {
		var zero T
		size := chunk / max(1, int(unsafe.Sizeof(zero)))
		if n > size/4 {
			return make([]T, n)
		}
		s.free = make([]T, size)
	}
	out := s.free[:n:n]
	s.free = s.free[n:]
	return out
}

// New returns a zero value.
func (s *Slab[T]) New() *T { return &s.Take(1)[0] }

// Text returns a copy of b.
func Text(s *Slab[byte], b []byte) string {
	out := s.Take(len(b))
	copy(out, b)
	return unsafe.String(unsafe.SliceData(out), len(out))
}
