// Package notification reads what OpenStack services send by oslo.messaging:
// enveloped (version 2), bare with context keys beside the others, or as
// oslo.messaging hands it to its endpoints.
package notification

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unsafe"

	"github.com/kvmeter/kvmeter/notifier/value"
)

// maxEventType is how long an event type may be, in bytes; the services' are under
// 100.
const maxEventType = 1024

// ErrMalformed is wrapped by the errors of [Decoder.Decode].
var ErrMalformed = errors.New("malformed notification")

// Notification is one message. It is good until its decoder reads the next, but
// for its texts.
type Notification struct {
	// Message is what definitions look into: an object with ctxt, publisher_id,
	// event_type, payload and metadata, and with priority where the message came
	// in this form.
	Message   value.Value
	EventType string
	Priority  string // lower case; empty: none was given
	ID        string // message id; empty: none was given
	Publisher string

	parts [6]value.Value // of Message
	meta  [2]value.Value // of metadata
	ctxt  []value.Value

	timed bool // at and atErr are set
	at    time.Time
	atErr error
}

// The parts of a message, in order.
const (
	context = iota
	publisher
	eventType
	payload
	metadata
	priority
)

// Payload returns the payload.
func (n *Notification) Payload() *value.Value { return &n.parts[payload] }

// Context returns a key of the sender's context, or nil.
func (n *Notification) Context(key string) *value.Value { return n.parts[context].Field(key) }

// Timestamp returns when the message was sent, as it says.
func (n *Notification) Timestamp() *value.Value { return n.parts[metadata].Field("timestamp") }

// Time returns when the message was sent.
func (n *Notification) Time() (time.Time, error) {
	if !n.timed {
		n.at, n.atErr = n.time()
		n.timed = true
	}
	return n.at, n.atErr
}

func (n *Notification) time() (time.Time, error) {
	at := n.Timestamp()
	if at == nil || at.Kind != value.Text {
		return time.Time{}, fmt.Errorf("%w: it has no timestamp", ErrMalformed)
	}
	t, err := value.ParseTime(at.Text)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: timestamp: %w", ErrMalformed, err)
	}
	return t, nil
}

// Decoder reads messages and reuses its memory from one to the next. It is not
// safe for concurrent use.
type Decoder struct {
	parser value.Parser
	n      Notification
}

// Decode reads a message, which must not change any more. What it returns is good
// until the next call, but for its texts.
func (d *Decoder) Decode(body []byte) (*Notification, error) {
	d.parser.Reset()
	d.parser.Inner = "oslo.message"
	v, err := d.parser.Parse(unsafe.String(unsafe.SliceData(body), len(body)))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return d.Read(&v)
}

// Read reads a message from what was parsed already. What it returns is good
// until the next call and as long as v is.
func (d *Decoder) Read(v *value.Value) (*Notification, error) {
	if v.Kind == value.Object && v.Field("oslo.message") != nil {
		inner, err := d.open(v)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		v = inner
	}
	if err := d.n.read(v); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return &d.n, nil
}

// Last returns what was read last.
func (d *Decoder) Last() *Notification { return &d.n }

// open returns what is in an envelope.
func (d *Decoder) open(v *value.Value) (*value.Value, error) {
	if version := v.Field("oslo.version"); version != nil {
		if major, _, _ := strings.Cut(version.Str(), "."); major != "2" && major != "1" {
			return nil, fmt.Errorf("oslo.version %.20q is not 2.0", version.Str())
		}
	}
	message := v.Field("oslo.message")
	if message.Kind != value.Text {
		return message, nil
	}
	inner, err := d.parser.ParseValid(message.Text)
	if err != nil {
		return nil, fmt.Errorf("oslo.message: %w", err)
	}
	return &inner, nil
}

func (n *Notification) read(v *value.Value) error {
	if v.Kind != value.Object {
		return fmt.Errorf("it is %v, not an object", v.Kind)
	}
	n.parts = [6]value.Value{
		{Key: "ctxt", Kind: value.Object},
		{Key: "publisher_id"},
		{Key: "event_type"},
		{Key: "payload"},
		{Key: "metadata", Kind: value.Object},
	}
	n.meta = [2]value.Value{{Key: "message_id"}, {Key: "timestamp"}}
	n.ctxt = n.ctxt[:0]
	n.Priority, n.ID, n.Publisher, n.timed = "", "", "", false
	whole := false
	for i := range v.Items {
		item := &v.Items[i]
		switch item.Key {
		case "ctxt":
			whole = true
			if item.Kind == value.Object {
				n.ctxt = append(n.ctxt, item.Items...)
			}
		case "publisher_id":
			n.parts[publisher] = *item
		case "event_type":
			n.parts[eventType] = *item
		case "payload":
			n.parts[payload] = *item
		case "metadata":
			if item.Kind == value.Object {
				n.about(item.Items)
			}
		case "message_id", "timestamp":
			n.about(v.Items[i : i+1])
		case "priority":
			n.parts[priority] = *item
			n.Priority = strings.ToLower(item.Text)
		default:
			if key, ok := strings.CutPrefix(item.Key, "_context_"); ok {
				member := *item
				member.Key = key
				n.ctxt = append(n.ctxt, member)
			}
		}
	}
	event := &n.parts[eventType]
	switch {
	case event.Kind != value.Text || event.Text == "":
		return errors.New("event_type is missing, or no text")
	case len(event.Text) > maxEventType:
		return fmt.Errorf("event_type of %d bytes, at most %d are read", len(event.Text), maxEventType)
	}
	n.EventType = event.Text
	if n.parts[publisher].Kind == value.Text {
		n.Publisher = n.parts[publisher].Text
	}
	if n.meta[0].Kind != value.Null {
		n.ID = n.meta[0].Str()
	}
	n.parts[context].Items, n.parts[metadata].Items = n.ctxt, n.meta[:]
	parts := n.parts[:priority]
	if whole && n.parts[priority].Key != "" {
		parts = n.parts[:]
	}
	n.Message = value.Value{Kind: value.Object, Items: parts}
	return nil
}

// about takes the message id and the timestamp from items.
func (n *Notification) about(items []value.Value) {
	for _, item := range items {
		switch item.Key {
		case "message_id":
			n.meta[0] = item
		case "timestamp":
			n.meta[1] = item
		}
	}
}
