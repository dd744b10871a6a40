// Package bus carries messages between agents, notifiers and central: over
// RabbitMQ ([AMQP]) or inside one process ([Local]).
package bus

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// MaxBody is the largest body a message may have, in bytes: RabbitMQ 4 takes no
// larger ones unless told to, and no larger batch would be read.
const MaxBody = sample.MaxDecoded

// ErrUnroutable is returned for a message that no queue is bound for: its
// routing key is wrong, or somebody deleted the queue.
var ErrUnroutable = errors.New("no queue takes messages with this routing key")

// Message is what travels on the bus.
type Message struct {
	Exchange        string // empty: kvmeter's
	RoutingKey      string
	ID              string // AMQP message id; the batch id for batches
	ContentType     string
	ContentEncoding string
	KeyID           string // header kvmeter-key-id; empty: not signed
	HMAC            string // header kvmeter-hmac
	Time            time.Time
	Body            []byte
}

// check returns an error for what AMQP cannot carry: short strings are at most
// 255 bytes long.
func (m *Message) check() error {
	for _, s := range []string{m.RoutingKey, m.ID, m.ContentType, m.ContentEncoding} {
		if len(s) > 255 {
			return fmt.Errorf("%.20q… is %d bytes long, at most 255 fit", s, len(s))
		}
	}
	if len(m.Body) > MaxBody {
		return fmt.Errorf("body of %d bytes, at most %d are carried", len(m.Body), MaxBody)
	}
	return nil
}

// Publisher sends messages. It is safe for concurrent use.
type Publisher interface {
	// Publish returns nil when every message is confirmed: it survives the
	// death of the broker. While the broker is away or full it waits, until ctx
	// ends. After an error any of the messages may have arrived; sending all of
	// them again is right. A body must not change once it was handed over,
	// since it may still be on its way after an error.
	Publish(ctx context.Context, ms ...Message) error
}

// Handler decides about deliveries. It calls Ack or Reject on each; those it
// leaves undecided are handed to it again after a moment, whether or not it
// returns an error. ctx ends when the deliveries can no longer be acked, because
// the connection they came over is lost; they will be delivered anew. A handler
// must not run for longer than some minutes: RabbitMQ closes the channel of a
// message that is held for more than 30.
type Handler func(ctx context.Context, ds []*Delivery) error

// Consumer receives messages.
type Consumer interface {
	// Consume calls handle with the deliveries of a queue, in order, as many as
	// are there and at most prefetch at once, until ctx ends; then it returns
	// nil. It reconnects by itself.
	Consume(ctx context.Context, queue string, prefetch int, handle Handler) error
}

// Delivery is a message that waits for a decision.
type Delivery struct {
	Message
	// Redelivered is true where the message may have been handled before.
	Redelivered bool
	// State is the handler's own: it is kept while the same delivery is handed
	// to it again.
	State any

	verdict verdict
	reason  error
	from    any // what the bus needs to settle it
}

type verdict uint8

const (
	undecided verdict = iota
	acked
	rejected
)

// Ack says that the message is taken and must not be delivered again. It takes
// effect when the handler returns.
func (d *Delivery) Ack() { d.verdict = acked }

// Reject says that the message can never be taken: it is moved to the
// dead-letter queue, with the reason. It takes effect when the handler returns.
func (d *Delivery) Reject(reason error) {
	if reason == nil {
		reason = errors.New("no reason given")
	}
	d.verdict, d.reason = rejected, reason
}

// Verdict returns what was decided: that the message is taken, or why it can never
// be; neither where nothing is.
func (d *Delivery) Verdict() (taken bool, refused error) {
	return d.verdict == acked, d.reason
}

// Seal makes the message that carries an encoded batch. An empty secret leaves
// it unsigned.
func Seal(routingKey string, b *sample.Batch, body, secret []byte) Message {
	m := Message{
		RoutingKey: routingKey, ID: b.ID.String(), ContentType: sample.ContentType,
		ContentEncoding: sample.ContentEncoding, Time: b.ID.Time(), Body: body,
	}
	if len(secret) > 0 {
		m.KeyID, m.HMAC = b.Node, sample.Sign(secret, body)
	}
	return m
}

// SealEvents makes the message that carries encoded events, by the name of who
// signs them. Its id follows from what it carries.
func SealEvents(name string, at time.Time, body, secret []byte) Message {
	sum := sha256.Sum256(body)
	m := Message{
		RoutingKey: EventsKey, ID: sample.NamedBatchID(at, sum[:]).String(), ContentType: sample.EventsContentType,
		ContentEncoding: sample.ContentEncoding, Time: at, Body: body,
	}
	if len(secret) > 0 {
		m.KeyID, m.HMAC = name, sample.Sign(secret, body)
	}
	return m
}

// ErrWrongNode is returned for a batch that speaks for another node than the
// one whose key signed it.
var ErrWrongNode = errors.New("batch of another node than its key")

// Keys are the secrets of all senders. They are safe for concurrent use.
type Keys interface {
	// Verify returns an error unless signature is that of body by a key
	// ([sample.Keys.Verify]).
	Verify(id, signature string, body []byte) error
	// Secret returns the secret that signs for a node, nil: none.
	Secret(id string) []byte
}

// Opener verifies and decodes messages. It is not safe for concurrent use.
type Opener struct {
	Keys Keys
	// Relays are the key ids that may sign batches made of other nodes' samples:
	// with explicit ids, of another host, with gaps of other nodes, and events. A node that could
	// would be able to store samples under the ids of another's, which are then
	// taken for those. Where unsigned batches are allowed everybody may.
	Relays        []string
	AllowUnsigned bool
	Decoder       *sample.Decoder
}

// Open returns the batch that m carries. Nothing is decompressed before the
// signature holds. Whatever error it returns, the message will never be good.
func (o *Opener) Open(m *Message) (*sample.Batch, error) {
	signed, err := o.verify(m, sample.ContentType)
	if err != nil {
		return nil, err
	}
	b, err := o.Decoder.Decode(m.Body)
	if err != nil {
		return nil, err
	}
	if signed && b.Node != m.KeyID {
		return nil, fmt.Errorf("%w: node %q, key %q", ErrWrongNode, b.Node, m.KeyID)
	}
	if !o.AllowUnsigned && !slices.Contains(o.Relays, m.KeyID) {
		if b.IDs != nil {
			return nil, fmt.Errorf("%w: node %q gives samples ids, which only relays may; is it missing in the setting relays?", ErrWrongNode, b.Node)
		}
		if b.Host() != b.Node {
			return nil, fmt.Errorf("%w: node %q sends what node %q measured, which only relays may; is it missing in the setting relays?", ErrWrongNode, b.Node, b.Of)
		}
		for _, g := range b.Gaps {
			if g.Node != "" && g.Node != b.Node {
				return nil, fmt.Errorf("%w: node %q tells of a gap of node %q; is it missing in the setting relays?", ErrWrongNode, b.Node, g.Node)
			}
		}
	}
	if m.ID != b.ID.String() {
		return nil, fmt.Errorf("message id %q is not that of its batch, %s", m.ID, b.ID)
	}
	return b, nil
}

// OpenEvents returns the events that m carries, as Open does a batch.
func (o *Opener) OpenEvents(m *Message) ([]sample.Event, error) {
	if _, err := o.verify(m, sample.EventsContentType); err != nil {
		return nil, err
	}
	if !o.AllowUnsigned && !slices.Contains(o.Relays, m.KeyID) {
		return nil, fmt.Errorf("%w: events of %q, which only relays may send; is it missing in the setting relays?", ErrWrongNode, m.KeyID)
	}
	return o.Decoder.DecodeEvents(m.Body)
}

// verify returns an error unless m is of the type and its signature holds. signed
// is false where there is none and none is needed.
func (o *Opener) verify(m *Message, contentType string) (signed bool, err error) {
	if m.ContentType != contentType {
		return false, fmt.Errorf("content type %q is not %q", m.ContentType, contentType)
	}
	if m.ContentEncoding != sample.ContentEncoding {
		return false, fmt.Errorf("content encoding %q is not %q", m.ContentEncoding, sample.ContentEncoding)
	}
	if signed = m.HMAC != "" || !o.AllowUnsigned; signed {
		err = o.Keys.Verify(m.KeyID, m.HMAC, m.Body)
	}
	return signed, err
}

// Reason returns the word for an error of an [Opener] that metrics count it
// under.
func Reason(err error) string {
	switch {
	case errors.Is(err, sample.ErrUnsigned):
		return "unsigned"
	case errors.Is(err, sample.ErrUnknownKey):
		return "unknown_key"
	case errors.Is(err, sample.ErrBadSignature):
		return "bad_signature"
	case errors.Is(err, ErrWrongNode):
		return "wrong_node"
	case errors.Is(err, sample.ErrMalformed), errors.Is(err, sample.ErrMalformedEvent):
		return "malformed"
	}
	return "other"
}
