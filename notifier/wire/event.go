package wire

import "github.com/kvmeter/kvmeter/sample"

// Event appends an event as a line of a file has it: its traits are objects of
// name, dtype and value.
func Event(dst []byte, style *Style, e *sample.Event) []byte {
	w := Writer{Style: style}
	w.parser.Strict = true
	key := func(first, name string) {
		dst = append(dst, first...)
		dst = append(w.quote(dst, name), ": "...)
	}
	text := func(first, name, value string) {
		key(first, name)
		dst = w.quote(dst, value)
	}
	text("{", "message_id", e.ID)
	text(", ", "event_type", e.Type)
	text(", ", "generated", string(sample.AppendTime(nil, e.Generated)))
	key(", ", "traits")
	dst = append(dst, '[')
	for i := range e.Traits {
		t := &e.Traits[i]
		if i > 0 {
			dst = append(dst, ", "...)
		}
		text("{", "name", t.Name)
		key(", ", "dtype")
		dst = append(dst, '0'+byte(t.Type))
		key(", ", "value")
		switch t.Type {
		case sample.TextTrait:
			dst = w.quote(dst, t.Text)
		case sample.DatetimeTrait:
			dst = w.quote(dst, string(sample.AppendTime(nil, t.Int)))
		default: // a number is the same in both styles
			dst = t.AppendValue(dst)
		}
		dst = append(dst, '}')
	}
	dst = append(dst, ']')
	key(", ", "raw")
	if len(e.Raw) == 0 {
		dst = append(dst, "{}"...)
	} else {
		dst = w.Value(dst, e.Raw)
	}
	return append(dst, '}')
}
