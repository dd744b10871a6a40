package sample

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"
)

// ErrMalformedEvent is wrapped by every error of [ParseEvent].
var ErrMalformedEvent = errors.New("malformed event")

// TraitType says how the value of a [Trait] is to be read. The numbers are
// Ceilometer's, on the bus and in its databases.
type TraitType uint8

// The trait types.
const (
	TextTrait     TraitType = 1
	IntTrait      TraitType = 2
	FloatTrait    TraitType = 3
	DatetimeTrait TraitType = 4
)

// String returns the type's name in event definitions.
func (t TraitType) String() string {
	switch t {
	case TextTrait:
		return "text"
	case IntTrait:
		return "int"
	case FloatTrait:
		return "float"
	case DatetimeTrait:
		return "datetime"
	}
	return "TraitType(" + strconv.Itoa(int(t)) + ")"
}

// Trait is a named value of an event.
type Trait struct {
	Name  string
	Type  TraitType
	Text  string  // of a text
	Int   int64   // of an int; of a datetime: µs since the Unix epoch, UTC
	Float float64 // of a float, finite
}

// AppendValue appends the trait's value as JSON; a datetime is text there.
func (t *Trait) AppendValue(dst []byte) []byte {
	switch t.Type {
	case IntTrait:
		return strconv.AppendInt(dst, t.Int, 10)
	case FloatTrait:
		return AppendFloat(dst, t.Float)
	case DatetimeTrait:
		return append(AppendTime(append(dst, '"'), t.Int), '"')
	}
	return AppendText(dst, t.Text)
}

// Event is what is kept of a notification, or what a sample of a meter with
// [Meter.Event] tells.
type Event struct {
	ID        string // the notification's message id, or the sample's
	Type      string // the notification's event type, or the meter's
	Generated int64  // µs since the Unix epoch, UTC: when the notification was sent, or the sample's time
	Traits    []Trait
	Raw       []byte // the notification as a JSON object; empty: not kept
}

// EventOf returns the event that a sample from a node is, always the same of the
// same sample. Its traits are resource_id, host (the node) and what the sample's
// metadata has of texts that are not empty, times (as RFC 3339 writes them),
// numbers and booleans, which are text.
func EventOf(s *Sample, node, eventType string) *Event {
	e := &Event{ID: s.ID.String(), Type: eventType, Generated: s.Time}
	var values map[string]any
	dec := json.NewDecoder(bytes.NewReader(s.Metadata))
	dec.UseNumber()
	if dec.Decode(&values) != nil || values == nil {
		values = map[string]any{} // it is no object
	}
	values["resource_id"], values["host"] = s.Resource, node
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if t, ok := traitOf(name, values[name]); ok {
			e.Traits = append(e.Traits, t)
		}
	}
	return e
}

// traitOf makes a trait of a value of JSON, if it is one that a trait can have.
func traitOf(name string, value any) (Trait, bool) {
	switch v := value.(type) {
	case string:
		if at, err := time.Parse(time.RFC3339, v); err == nil && at.UTC().Year() >= 1 && at.UTC().Year() <= 9999 {
			return Trait{Name: name, Type: DatetimeTrait, Int: at.UnixMicro()}, true
		}
		return Trait{Name: name, Type: TextTrait, Text: v}, v != ""
	case bool:
		return Trait{Name: name, Type: TextTrait, Text: strconv.FormatBool(v)}, true
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return Trait{Name: name, Type: IntTrait, Int: n}, true
		}
		f, err := v.Float64() // an error: it is too large for one
		return Trait{Name: name, Type: FloatTrait, Float: f}, err == nil
	}
	return Trait{}, false
}

// AppendJSON appends the event as Ceilometer sends it, but for the signature:
// an object with message_id, event_type, generated, traits (lists of name, type
// and value) and raw, in that order.
func (e *Event) AppendJSON(dst []byte) []byte {
	dst = AppendText(append(dst, `{"message_id": `...), e.ID)
	dst = AppendText(append(dst, `, "event_type": `...), e.Type)
	dst = AppendTime(append(dst, `, "generated": "`...), e.Generated)
	dst = append(dst, `", "traits": [`...)
	for i := range e.Traits {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		t := &e.Traits[i]
		dst = AppendText(append(dst, '['), t.Name)
		dst = strconv.AppendUint(append(dst, ", "...), uint64(t.Type), 10)
		dst = t.AppendValue(append(dst, ", "...))
		dst = append(dst, ']')
	}
	dst = append(dst, `], "raw": `...)
	if len(e.Raw) == 0 {
		return append(dst, "{}}"...)
	}
	return append(append(dst, e.Raw...), '}')
}

// ParseEvent reads what [Event.AppendJSON] and Ceilometer write. Other keys,
// such as the signature, are ignored.
func ParseEvent(data []byte) (Event, error) {
	var in struct {
		ID        string            `json:"message_id"`
		Type      string            `json:"event_type"`
		Generated string            `json:"generated"`
		Traits    []json.RawMessage `json:"traits"`
		Raw       json.RawMessage   `json:"raw"`
	}
	if err := json.Unmarshal(data, &in); err != nil {
		return Event{}, fmt.Errorf("%w: %w", ErrMalformedEvent, err)
	}
	e := Event{ID: in.ID, Type: in.Type}
	if e.ID == "" || e.Type == "" {
		return Event{}, fmt.Errorf("%w: it needs message_id and event_type", ErrMalformedEvent)
	}
	var err error
	if e.Generated, err = parseISO(in.Generated); err != nil {
		return Event{}, fmt.Errorf("%w: generated: %w", ErrMalformedEvent, err)
	}
	if raw := bytes.TrimSpace(in.Raw); len(raw) > 0 && raw[0] == '{' {
		if inner := bytes.TrimSpace(raw[1 : len(raw)-1]); len(inner) > 0 {
			e.Raw = raw
		}
	} else if len(raw) > 0 && string(raw) != "null" {
		return Event{}, fmt.Errorf("%w: raw is no object", ErrMalformedEvent)
	}
	for i, text := range in.Traits {
		t, err := parseTrait(text)
		if err != nil {
			return Event{}, fmt.Errorf("%w: trait %d: %w", ErrMalformedEvent, i, err)
		}
		e.Traits = append(e.Traits, t)
	}
	return e, nil
}

func parseTrait(data []byte) (Trait, error) {
	var in []json.RawMessage
	if err := json.Unmarshal(data, &in); err != nil {
		return Trait{}, err
	}
	if len(in) != 3 {
		return Trait{}, fmt.Errorf("%d elements, not name, type and value", len(in))
	}
	var t Trait
	if err := errors.Join(json.Unmarshal(in[0], &t.Name), json.Unmarshal(in[1], &t.Type)); err != nil {
		return Trait{}, err
	}
	var err error
	switch t.Type {
	case TextTrait:
		err = json.Unmarshal(in[2], &t.Text)
	case IntTrait:
		err = json.Unmarshal(in[2], &t.Int)
	case FloatTrait:
		err = json.Unmarshal(in[2], &t.Float)
	case DatetimeTrait:
		var text string
		if err = json.Unmarshal(in[2], &text); err == nil {
			t.Int, err = parseISO(text)
		}
	default:
		err = fmt.Errorf("unknown type %d: text is 1, int 2, float 3, datetime 4", uint8(t.Type))
	}
	if err == nil && string(bytes.TrimSpace(in[2])) == "null" {
		err = errors.New("its value is null")
	}
	if err != nil {
		return Trait{}, fmt.Errorf("%q: %w", t.Name, err)
	}
	return t, nil
}

// parseISO reads a time as [AppendTime] or anything of Ceilometer writes it.
func parseISO(s string) (int64, error) {
	at, ok := parseForeignTime(s)
	if year := at.UTC().Year(); !ok || year < 1 || year > 9999 {
		return 0, fmt.Errorf("%q is no time of the form 2006-01-02T15:04:05.000000", s)
	}
	return at.UnixMicro(), nil
}

// Check returns an error for an event that cannot be written as JSON or has no id.
func (e *Event) Check() error {
	if e.ID == "" || e.Type == "" {
		return errors.New("an event needs an id and a type")
	}
	for i := range e.Traits {
		t := &e.Traits[i]
		if t.Type < TextTrait || t.Type > DatetimeTrait {
			return fmt.Errorf("trait %q: unknown type %d", t.Name, uint8(t.Type))
		}
		if t.Type == FloatTrait && (math.IsNaN(t.Float) || math.IsInf(t.Float, 0)) {
			return fmt.Errorf("trait %q: %w", t.Name, ErrNotFinite)
		}
	}
	if len(e.Raw) > 0 && (e.Raw[0] != '{' || !json.Valid(e.Raw)) {
		return errors.New("raw is no JSON object")
	}
	return nil
}
