package ceilometer

import (
	"encoding/hex"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// What oslo.messaging and Ceilometer have unless they are told otherwise.
const (
	ContentType     = "application/json"
	ContentEncoding = "utf-8"
	// Exchange is Ceilometer's control_exchange.
	Exchange = "ceilometer"
	// DefaultSecret is the telemetry_secret that Ceilometer signs with unless it is
	// told another.
	DefaultSecret = "change this for valid signing"
)

// Notification is what a notification of oslo.messaging says beside its payload.
type Notification struct {
	Publisher, EventType string
	Priority             string // in capitals
	// Unique makes a message that comes twice one: receivers of oslo.messaging drop
	// one that they have just seen.
	Unique [16]byte
	Time   time.Time
}

// UniqueID returns what oslo.messaging knows the message by.
func (n *Notification) UniqueID() string { return hex.EncodeToString(n.Unique[:]) }

// Append appends the message around a payload of JSON.
func (n *Notification) Append(dst, payload []byte) []byte {
	id := n.Unique
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // version 4, RFC 9562 §5.4
	inner := make([]byte, 0, len(payload)+512)
	inner = sample.AppendText(append(inner, `{"message_id": `...), sample.ID{UUID: id}.String())
	inner = sample.AppendText(append(inner, `, "publisher_id": `...), n.Publisher)
	inner = sample.AppendText(append(inner, `, "event_type": `...), n.EventType)
	inner = sample.AppendText(append(inner, `, "priority": `...), n.Priority)
	inner = append(append(inner, `, "payload": `...), payload...)
	at := strings.Replace(string(sample.AppendTime(nil, n.Time.UnixMicro())), "T", " ", 1)
	inner = sample.AppendText(append(inner, `, "timestamp": `...), at)
	inner = append(sample.AppendText(append(inner, `, "_unique_id": `...), n.UniqueID()), '}')
	return Envelope(dst, inner)
}

// Envelope appends oslo.messaging's envelope, version 2.0, of a message of JSON.
func Envelope(dst, inner []byte) []byte {
	dst = sample.AppendText(append(dst, `{"oslo.version": "2.0", "oslo.message": `...), string(inner))
	return append(dst, '}')
}
