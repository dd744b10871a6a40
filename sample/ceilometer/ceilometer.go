// Package ceilometer writes samples and events in the form that they have on
// Ceilometer's bus (counter_name, message_id, …), signed, as JSON or msgpack, and
// the messages of oslo.messaging around them.
package ceilometer

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"unicode/utf8"

	"github.com/kvmeter/kvmeter/sample"
)

// Writer appends samples and events. It is not safe for concurrent use.
type Writer struct {
	mac       hash.Hash // nil: the signature is empty
	publisher string    // publisher_id of samples; empty: they have none
	metadata  map[string]*metadata
	in, sum   []byte // memory for what is signed, and for its MAC
}

// metadata are some rows', in the forms they are needed in.
type metadata struct {
	json, signed []byte
	packed       []byte // nil until it is needed
}

// maxMetadata bounds how many metadata are kept from sample to sample: those of
// all rows of a host with 500 domains.
const maxMetadata = 8192

// NewWriter returns a writer that signs with a secret. Without one signatures are
// empty, which Ceilometer takes for good. publisher is what goes into
// publisher_id, which only the form of tcp:// has; empty: nothing.
func NewWriter(secret, publisher string) *Writer {
	w := &Writer{publisher: publisher, metadata: map[string]*metadata{}}
	if secret != "" {
		w.mac = hmac.New(sha256.New, []byte(secret))
	}
	return w
}

// none are the forms of metadata that a sample lacks.
var none = &metadata{json: []byte("{}"), packed: []byte{0x80}}

// of returns the metadata of a sample.
func (w *Writer) of(s *sample.Sample) *metadata {
	if len(s.Metadata) == 0 {
		return none
	}
	m := w.metadata[string(s.Metadata)]
	if m == nil {
		if len(w.metadata) >= maxMetadata {
			clear(w.metadata)
		}
		t := parse(s.Metadata)
		m = &metadata{json: t.appendJSON(nil), signed: t.appendSigned(nil, "resource_metadata")}
		w.metadata[string(s.Metadata)] = m
	}
	return m
}

// Timestamp returns the sample's time as its sender wrote it.
func Timestamp(s *sample.Sample) string {
	if s.Foreign != nil && s.Foreign.Timestamp != "" {
		return s.Foreign.Timestamp
	}
	return string(sample.AppendTime(nil, s.Time))
}

// valid returns a text with U+FFFD in place of each byte that is not UTF-8, as
// JSON has it.
func valid(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return string([]rune(s))
}

// names returns the names of user and project, and the monotonic time.
func names(s *sample.Sample) (user, project string, monotonic *float64) {
	if f := s.Foreign; f != nil {
		if user, project = f.UserName, f.ProjectName; f.HasMonotonic {
			monotonic = &f.Monotonic
		}
	}
	return user, project, monotonic
}

// sign appends the signature of a sample: of its fields in the order of their
// names.
func (w *Writer) sign(dst []byte, s *sample.Sample, m *metadata) []byte {
	if w.mac == nil {
		return dst
	}
	in := w.in[:0]
	text := func(name, value string) { in = append(append(in, name...), valid(value)...) }
	optional := func(name, value string) {
		if value == "" {
			value = "None"
		}
		text(name, value)
	}
	user, project, monotonic := names(s)
	text("counter_name", s.Name)
	text("counter_type", string(s.Kind))
	text("counter_unit", s.Unit)
	in = s.Volume.Append(append(in, "counter_volume"...))
	if s.ID.Text != "" {
		text("message_id", s.ID.Text)
	} else {
		in = s.ID.Append(append(in, "message_id"...))
	}
	in = append(in, "monotonic_time"...)
	if monotonic != nil {
		in = sample.AppendFloat(in, *monotonic)
	} else {
		in = append(in, "None"...)
	}
	optional("project_id", s.Project)
	optional("project_name", project)
	if w.publisher != "" {
		text("publisher_id", w.publisher)
	}
	text("resource_id", s.Resource)
	in = append(in, m.signed...)
	text("source", s.Source)
	if s.Foreign != nil && s.Foreign.Timestamp != "" {
		text("timestamp", s.Foreign.Timestamp)
	} else {
		in = sample.AppendTime(append(in, "timestamp"...), s.Time)
	}
	optional("user_id", s.User)
	optional("user_name", user)
	w.in = in
	return w.appendMAC(dst)
}

// appendMAC appends the signature of what w.in holds.
func (w *Writer) appendMAC(dst []byte) []byte {
	w.mac.Reset()
	w.mac.Write(w.in)
	w.sum = w.mac.Sum(w.sum[:0])
	return hex.AppendEncode(dst, w.sum)
}

// Sample appends a sample as JSON.
func (w *Writer) Sample(dst []byte, s *sample.Sample) []byte {
	m := w.of(s)
	text := func(key, value string) { dst = sample.AppendText(append(dst, key...), value) }
	optional := func(key, value string) {
		if value == "" {
			dst = append(append(dst, key...), "null"...)
			return
		}
		text(key, value)
	}
	user, project, monotonic := names(s)
	text(`{"source": `, s.Source)
	text(`, "counter_name": `, s.Name)
	text(`, "counter_type": `, string(s.Kind))
	text(`, "counter_unit": `, s.Unit)
	dst = s.Volume.Append(append(dst, `, "counter_volume": `...))
	optional(`, "user_id": `, s.User)
	optional(`, "user_name": `, user)
	optional(`, "project_id": `, s.Project)
	optional(`, "project_name": `, project)
	text(`, "resource_id": `, s.Resource)
	if s.Foreign != nil && s.Foreign.Timestamp != "" {
		text(`, "timestamp": `, s.Foreign.Timestamp)
	} else {
		dst = append(sample.AppendTime(append(dst, `, "timestamp": "`...), s.Time), '"')
	}
	dst = append(append(dst, `, "resource_metadata": `...), m.json...)
	if s.ID.Text != "" {
		text(`, "message_id": `, s.ID.Text)
	} else {
		dst = append(s.ID.Append(append(dst, `, "message_id": "`...)), '"')
	}
	dst = append(dst, `, "monotonic_time": `...)
	if monotonic != nil {
		dst = sample.AppendFloat(dst, *monotonic)
	} else {
		dst = append(dst, "null"...)
	}
	if w.publisher != "" {
		text(`, "publisher_id": `, w.publisher)
	}
	return append(w.sign(append(dst, `, "message_signature": "`...), s, m), `"}`...)
}

// SampleMsgpack appends a sample as msgpack.
func (w *Writer) SampleMsgpack(dst []byte, s *sample.Sample) []byte {
	m := w.of(s)
	if m.packed == nil {
		t := parse(s.Metadata)
		m.packed = t.appendMsgpack(nil)
	}
	text := func(key, value string) { dst = appendPackedText(appendPackedText(dst, key), value) }
	optional := func(key, value string) {
		if value == "" {
			dst = append(appendPackedText(dst, key), 0xc0)
			return
		}
		text(key, value)
	}
	user, project, monotonic := names(s)
	fields := 15
	if w.publisher != "" {
		fields++
	}
	dst = appendPackedLen(dst, fields, 0x80, 0xde)
	text("source", s.Source)
	text("counter_name", s.Name)
	text("counter_type", string(s.Kind))
	text("counter_unit", s.Unit)
	dst = appendPackedVolume(appendPackedText(dst, "counter_volume"), s.Volume)
	optional("user_id", s.User)
	optional("user_name", user)
	optional("project_id", s.Project)
	optional("project_name", project)
	text("resource_id", s.Resource)
	text("timestamp", Timestamp(s))
	dst = append(appendPackedText(dst, "resource_metadata"), m.packed...)
	text("message_id", s.ID.String())
	dst = appendPackedText(dst, "monotonic_time")
	if monotonic != nil {
		dst = appendPackedFloat(dst, *monotonic)
	} else {
		dst = append(dst, 0xc0)
	}
	if w.publisher != "" {
		text("publisher_id", w.publisher)
	}
	dst = appendPackedText(dst, "message_signature")
	if w.mac == nil {
		return appendPackedText(dst, "")
	}
	return w.sign(append(dst, 0xd9, 2*sha256.Size), s, m)
}

// Event appends an event as JSON.
func (w *Writer) Event(dst []byte, e *sample.Event) []byte {
	start := len(dst)
	dst = e.AppendJSON(dst)
	signed := dst[start:]
	dst = append(dst[:len(dst)-1:len(dst)-1], `, "message_signature": "`...)
	if w.mac != nil {
		w.cover(signed)
		dst = w.appendMAC(dst)
	}
	return append(dst, `"}`...)
}

// cover puts what the signature of a JSON message covers into w.in.
func (w *Writer) cover(message []byte) {
	t := parse(message)
	w.in = w.in[:0]
	for _, i := range t.sorted() {
		if t.keys[i] != "message_signature" {
			w.in = t.list[i].appendSigned(w.in, t.keys[i])
		}
	}
}

// Signature returns the signature of a message of the bus, as JSON.
func Signature(message []byte, secret string) string {
	if secret == "" {
		return ""
	}
	w := NewWriter(secret, "")
	w.cover(message)
	return string(w.appendMAC(nil))
}
