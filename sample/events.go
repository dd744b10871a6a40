package sample

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// EventsContentType is the content type of encoded events: a JSON list of
// objects as [Event.AppendJSON] writes them, compressed like a batch
// ([ContentEncoding]).
const EventsContentType = "application/vnd.kvmeter.events.v1+json"

// EncodeEvents appends encoded events to dst. It returns an error where one of
// them does not pass [Event.Check], or where they are larger than [MaxDecoded].
func (e *Encoder) EncodeEvents(dst []byte, events []Event) ([]byte, error) {
	raw := append(e.text[:0], '[')
	for i := range events {
		if err := events[i].Check(); err != nil {
			return dst, fmt.Errorf("encode event %q: %w", events[i].ID, err)
		}
		if i > 0 {
			raw = append(raw, ',')
		}
		raw = events[i].AppendJSON(raw)
	}
	raw = append(raw, ']')
	e.text = raw
	if len(raw) > MaxDecoded {
		return dst, fmt.Errorf("encode events: %d bytes, at most %d are read; send fewer", len(raw), MaxDecoded)
	}
	return e.zstd.EncodeAll(raw, dst), nil
}

// DecodeEvents returns the events in body. Its error wraps [ErrMalformedEvent].
// They share no memory with body or the decoder.
func (d *Decoder) DecodeEvents(body []byte) ([]Event, error) {
	raw, err := d.zstd.DecodeAll(body, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: decompress: %w", ErrMalformedEvent, err)
	}
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformedEvent, err)
	}
	if !bytes.HasPrefix(bytes.TrimLeft(raw, " \t\r\n"), []byte("[")) {
		return nil, fmt.Errorf("%w: no list of events", ErrMalformedEvent)
	}
	events := make([]Event, len(list))
	for i := range list {
		if events[i], err = ParseEvent(list[i]); err != nil {
			return nil, fmt.Errorf("event %d: %w", i, err)
		}
		if err := events[i].Check(); err != nil {
			return nil, fmt.Errorf("event %d: %w: %w", i, ErrMalformedEvent, err)
		}
	}
	return events, nil
}
