package meters

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// ErrSignature is returned for a polled sample that is not signed with
// telemetry_secret.
var ErrSignature = errors.New("message_signature does not fit telemetry_secret: the sender has another, or it is forged")

// verifier checks the signatures of polled samples.
type verifier struct {
	mac    hash.Hash
	in     []byte // what is signed
	prefix []byte // names of the objects around, each with a colon
	order  []int  // of the objects around: their members by name
	sum    []byte
}

func newVerifier(secret string) *verifier {
	return &verifier{mac: hmac.New(sha256.New, []byte(secret))}
}

// good reports whether a sample's signature is right.
func (v *verifier) good(s *value.Value) bool {
	given := s.Field("message_signature")
	if given == nil || given.Kind != value.Text {
		return false
	}
	v.in, v.prefix, v.order = v.in[:0], v.prefix[:0], v.order[:0]
	v.members(s)
	v.mac.Reset()
	v.mac.Write(v.in)
	v.sum = v.mac.Sum(v.sum[:0])
	v.in = hex.AppendEncode(v.in[:0], v.sum)
	return len(given.Text) == len(v.in) && hmac.Equal([]byte(given.Text), v.in)
}

// sorted returns where the numbers of an object's members begin in v.order, in the
// order of their names.
func (v *verifier) sorted(o *value.Value) (from int) {
	from = len(v.order)
	for i := range o.Items {
		v.order = append(v.order, i)
	}
	slices.SortFunc(v.order[from:], func(a, b int) int { return strings.Compare(o.Items[a].Key, o.Items[b].Key) })
	return from
}

// members adds the members of an object: each innermost name, with the names
// around it before colons, and each value as Python's str writes it.
func (v *verifier) members(o *value.Value) {
	from := v.sorted(o)
	for i := range o.Items {
		m := &o.Items[v.order[from+i]]
		if m.Kind == value.Object {
			outer := len(v.prefix)
			v.prefix = append(append(v.prefix, m.Key...), ':')
			v.members(m)
			v.prefix = v.prefix[:outer]
			continue
		}
		if len(v.prefix) == 0 && m.Key == "message_signature" {
			continue
		}
		v.in = append(append(v.in, v.prefix...), m.Key...)
		if m.Kind == value.Text {
			v.in = append(v.in, m.Text...)
		} else {
			v.repr(m)
		}
	}
	v.order = v.order[:from]
}

// repr adds Python's repr of a value whose texts were turned to bytes.
func (v *verifier) repr(m *value.Value) {
	switch m.Kind {
	case value.Null:
		v.in = append(v.in, "None"...)
	case value.Bool:
		word := "False"
		if m.True {
			word = "True"
		}
		v.in = append(v.in, word...)
	case value.Text:
		v.in = ceilometer.AppendBytesRepr(v.in, m.Text)
	case value.List:
		v.in = append(v.in, '[')
		for i := range m.Items {
			if i > 0 {
				v.in = append(v.in, ", "...)
			}
			v.repr(&m.Items[i])
		}
		v.in = append(v.in, ']')
	case value.Object:
		from := v.sorted(m)
		v.in = append(v.in, '{')
		for i := range m.Items {
			if i > 0 {
				v.in = append(v.in, ", "...)
			}
			inner := &m.Items[v.order[from+i]]
			v.in = append(ceilometer.AppendBytesRepr(v.in, inner.Key), ": "...)
			v.repr(inner)
		}
		v.order, v.in = v.order[:from], append(v.in, '}')
	default:
		v.in = ceilometer.AppendNumber(v.in, m.Text)
	}
}
