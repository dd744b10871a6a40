// Package bus carries messages between agents, notifiers and central: over
// RabbitMQ ([AMQP]) or inside one process ([Local]).
package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// Message is what travels on the bus.
type Message struct {
	RoutingKey      string
	ID              string // AMQP message id; the batch id for batches
	ContentType     string
	ContentEncoding string
	KeyID           string // header kvmeter-key-id; empty: not signed
	HMAC            string // header kvmeter-hmac
	Time            time.Time
	Body            []byte
}

// Publisher sends messages.
type Publisher interface {
	// Publish returns nil when every message is confirmed: it survives the
	// death of the broker. After an error any of them may have arrived; sending
	// all of them again is right.
	Publish(ctx context.Context, ms ...Message) error
}

// Delivery is a message that waits for a decision. Exactly one of Ack and
// Reject must be called; neither blocks on the network. A delivery that gets
// neither before its connection ends is delivered again.
type Delivery struct {
	Message
	Redelivered bool
	Ack         func() error
	// Reject moves the message to the dead-letter queue with a reason.
	Reject func(reason error) error
}

// Consumer receives messages.
type Consumer interface {
	// Consume calls handle with the deliveries of a queue, in order, as many as
	// are there and at most prefetch at once, until ctx ends. It reconnects by
	// itself. When handle returns an error nothing more is consumed for a
	// moment, and what handle neither acked nor rejected is delivered again.
	Consume(ctx context.Context, queue string, prefetch int, handle func(context.Context, []Delivery) error) error
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

// ErrWrongNode is returned for a batch that speaks for another node than the
// one whose key signed it.
var ErrWrongNode = errors.New("batch of another node than its key")

// Opener verifies and decodes messages. It is not safe for concurrent use.
type Opener struct {
	Keys          sample.Keys
	AllowUnsigned bool
	Decoder       *sample.Decoder
}

// Open returns the batch that m carries. Nothing is decompressed before the
// signature holds. Whatever error it returns, the message will never be good.
func (o *Opener) Open(m *Message) (*sample.Batch, error) {
	if m.ContentType != sample.ContentType {
		return nil, fmt.Errorf("content type %q is not %q", m.ContentType, sample.ContentType)
	}
	if m.ContentEncoding != sample.ContentEncoding {
		return nil, fmt.Errorf("content encoding %q is not %q", m.ContentEncoding, sample.ContentEncoding)
	}
	signed := m.HMAC != "" || !o.AllowUnsigned
	if signed {
		if err := o.Keys.Verify(m.KeyID, m.HMAC, m.Body); err != nil {
			return nil, err
		}
	}
	b, err := o.Decoder.Decode(m.Body)
	if err != nil {
		return nil, err
	}
	if signed && b.Node != m.KeyID {
		return nil, fmt.Errorf("%w: node %q, key %q", ErrWrongNode, b.Node, m.KeyID)
	}
	if m.ID != b.ID.String() {
		return nil, fmt.Errorf("message id %q is not that of its batch, %s", m.ID, b.ID)
	}
	return b, nil
}
