package api

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// appendString appends s as a JSON string.
func appendString(dst []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			quoted, err := json.Marshal(s)
			if err != nil { // a string always marshals
				return append(dst, `""`...)
			}
			return append(dst, quoted...)
		}
	}
	dst = append(dst, '"')
	dst = append(dst, s...)
	return append(dst, '"')
}

// appendKnown appends s, or null where it is empty: not known.
func appendKnown(dst []byte, s string) []byte {
	if s == "" {
		return append(dst, "null"...)
	}
	return appendString(dst, s)
}

// appendQuotedTime appends a time as the API prints it.
func appendQuotedTime(dst []byte, us int64) []byte {
	return append(sample.AppendTime(append(dst, '"'), us), '"')
}

// field starts a member of an object.
func field(dst []byte, name string) []byte {
	if dst[len(dst)-1] != '{' {
		dst = append(dst, ", "...)
	}
	dst = append(dst, '"')
	dst = append(dst, name...)
	return append(dst, `": `...)
}

// metadata prints metadata, and remembers what it printed: the samples of a
// resource share theirs.
type metadata struct {
	raw  bool // as it was sent, not flattened
	seen map[string][]byte
}

// maxSeen bounds what a request remembers.
const maxSeen = 1024

func (m *metadata) append(dst, doc []byte) []byte {
	if len(doc) == 0 {
		return append(dst, "{}"...)
	}
	if text, ok := m.seen[string(doc)]; ok {
		return append(dst, text...)
	}
	start := len(dst)
	if m.raw {
		dst = appendRaw(dst, doc)
	} else {
		dst = appendFlat(dst, doc)
	}
	if m.seen == nil || len(m.seen) >= maxSeen {
		m.seen = map[string][]byte{}
	}
	m.seen[string(doc)] = append([]byte(nil), dst[start:]...)
	return dst
}

// appendRaw prints a JSON object as it was sent, and no object as an empty one:
// nobody has read it so far.
func appendRaw(dst, doc []byte) []byte {
	if object := bytes.TrimLeft(doc, " \t\r\n"); !bytes.HasPrefix(object, []byte("{")) || !json.Valid(object) {
		return append(dst, "{}"...)
	}
	return append(dst, doc...)
}

// appendFlat prints a JSON object flat: {"a":{"b":{"c":1}}} has the key a.b:c
// and the value "1".
func appendFlat(dst, doc []byte) []byte {
	dst = append(dst, '{')
	var object map[string]any
	if err := decodeJSON(doc, &object); err == nil {
		dst = appendLevel(dst, "", object)
	}
	return append(dst, '}')
}

func appendLevel(dst []byte, prefix string, object map[string]any) []byte {
	for _, k := range sortedKeys(object) {
		switch v := object[k].(type) {
		case map[string]any:
			dst = appendLevel(dst, prefix+k+".", v)
		default:
			if dst[len(dst)-1] != '{' {
				dst = append(dst, ", "...)
			}
			dst = append(appendString(dst, flatKey(prefix+k)), ": "...)
			dst = appendString(dst, pythonText(v))
		}
	}
	return dst
}

// flatKey turns every dot but the first into a colon.
func flatKey(path string) string {
	if head, tail, ok := strings.Cut(path, "."); ok {
		return head + "." + strings.ReplaceAll(tail, ".", ":")
	}
	return path
}

// names are how the two forms of a sample call the same things.
type names struct{ id, meter, kind, unit, volume, metadata string }

var (
	newNames = names{"id", "meter", "type", "unit", "volume", "metadata"}
	oldNames = names{"message_id", "counter_name", "counter_type", "counter_unit", "counter_volume", "resource_metadata"}
)

// appendSample prints a sample. extra adds what only kvmeter knows.
func appendSample(dst []byte, s *store.Sample, n *names, m *metadata, extra bool) []byte {
	dst = append(dst, '{')
	dst = appendString(field(dst, n.id), s.ID.String())
	dst = appendString(field(dst, n.meter), s.Name)
	dst = appendString(field(dst, n.kind), string(s.Kind))
	dst = appendString(field(dst, n.unit), s.Unit)
	dst = s.Volume.AppendAPI(field(dst, n.volume))
	dst = appendKnown(field(dst, "user_id"), s.User)
	dst = appendKnown(field(dst, "project_id"), s.Project)
	dst = appendKnown(field(dst, "resource_id"), s.Resource)
	dst = appendKnown(field(dst, "source"), s.Source)
	dst = appendQuotedTime(field(dst, "timestamp"), s.Time)
	dst = appendQuotedTime(field(dst, "recorded_at"), s.Recorded)
	dst = m.append(field(dst, n.metadata), s.Metadata)
	if extra {
		dst = appendKnown(field(dst, "origin"), string(s.Origin))
		incarnation := ""
		if s.Incarnation != 0 {
			incarnation = s.Incarnation.String()
		}
		dst = appendKnown(field(dst, "incarnation"), incarnation)
	}
	return append(dst, '}')
}

// appendMeter prints a meter; of a meter of all resources only its name, kind
// and unit are known.
func appendMeter(dst []byte, ref sample.MeterRef, of *store.Meter) []byte {
	dst = append(dst, '{')
	dst = appendString(field(dst, "name"), ref.Name)
	dst = appendString(field(dst, "type"), string(ref.Kind))
	dst = appendString(field(dst, "unit"), ref.Unit)
	resource := "None"
	if of == nil {
		of = &store.Meter{}
	} else {
		resource = of.Resource
	}
	dst = appendKnown(field(dst, "resource_id"), of.Resource)
	dst = appendKnown(field(dst, "project_id"), of.Project)
	dst = appendKnown(field(dst, "user_id"), of.User)
	dst = appendKnown(field(dst, "source"), of.Source)
	dst = append(field(dst, "meter_id"), '"')
	dst = base64.StdEncoding.AppendEncode(dst, []byte(resource+"+"+ref.Name))
	return append(dst, `"}`...)
}

func appendFloat(dst []byte, f float64) []byte { return sample.AppendFloat(dst, f) }

func appendInt(dst []byte, n int64) []byte { return strconv.AppendInt(dst, n, 10) }
