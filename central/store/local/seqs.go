package local

import (
	"encoding/binary"
	"slices"
)

// seqSet is a set of sequence numbers as intervals, ascending and with room
// between them. It stays small since a node counts its batches one by one.
type seqSet []seqRange

type seqRange struct{ from, to uint64 } // both in the set

// find returns the position of the first interval that ends at v or later.
func (s seqSet) find(v uint64) int {
	i, _ := slices.BinarySearchFunc(s, v, func(r seqRange, v uint64) int {
		if r.to < v {
			return -1
		}
		return 1
	})
	return i
}

func (s seqSet) has(v uint64) bool {
	i := s.find(v)
	return i < len(s) && s[i].from <= v
}

// add returns the set with v, which may share memory with s.
func (s seqSet) add(v uint64) seqSet {
	i := s.find(v)
	if i < len(s) && s[i].from <= v {
		return s
	}
	before := i > 0 && s[i-1].to+1 == v
	after := i < len(s) && s[i].from == v+1
	switch {
	case before && after:
		s[i-1].to = s[i].to
		return slices.Delete(s, i, i+1)
	case before:
		s[i-1].to = v
	case after:
		s[i].from = v
	default:
		return slices.Insert(s, i, seqRange{v, v})
	}
	return s
}

func (s seqSet) append(dst []byte) []byte {
	dst = binary.AppendUvarint(append(dst, recordVersion), uint64(len(s)))
	last := uint64(0)
	for _, r := range s {
		dst = binary.AppendUvarint(dst, r.from-last)
		dst = binary.AppendUvarint(dst, r.to-r.from)
		last = r.to
	}
	return dst
}

func decodeSeqSet(src []byte) (seqSet, error) {
	r := reader{src: src}
	r.version()
	var s seqSet
	last := uint64(0)
	for n := r.length(uint64(len(r.src))); n > 0 && r.err == nil; n-- {
		gap := r.uvarint()
		from := last + gap
		to := from + r.uvarint()
		if from < last || to < from || len(s) > 0 && gap < 2 {
			r.fail()
		}
		s = append(s, seqRange{from, to})
		last = to
	}
	return s, r.done("sequence numbers")
}
