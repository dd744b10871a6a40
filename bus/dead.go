package bus

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// DeadLetter is a message in the dead-letter queue.
type DeadLetter struct {
	Message
	// Name is its message id, or where it has none 12 hexadecimal digits of the
	// SHA-256 of its body. Copies of a message have the same name.
	Name   string
	Queue  string // that it was in; empty: not known
	Reason string // why nobody could take it
}

// Fate is what becomes of a dead letter.
type Fate int

// The fates.
const (
	Keep  Fate = iota // it stays where it is
	Retry             // it goes back to its queue
	Drop              // it is deleted
)

// errStranded is the error for a dead letter of no known queue.
var errStranded = errors.New("it does not say which queue it was in, so it can't be sent there again")

// recount is from how many returns on a dead letter that is kept is put anew:
// RabbitMQ 4 deletes one that has come back 20 times.
const recount = 10

// DeadLetters calls decide with each message that is in the dead-letter queue
// now, oldest first, until it returns false, and carries out what it says. What is
// retried is confirmed by its queue before it leaves this one. Of one that is there
// several times, since who moved it there died before it was acked, the others are
// deleted. It does not wait for a broker that is away.
func (a *AMQP) DeadLetters(ctx context.Context, decide func(*DeadLetter) (fate Fate, more bool)) error {
	l, err := a.dial(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	defer context.AfterFunc(ctx, l.close)()
	var worn []*amqp.Delivery
	seen := map[identity]Fate{} // what is done with those that are like one that was seen
	kept := uint64(0)
	for more := true; more; {
		var d amqp.Delivery
		var ok bool
		if err := a.ask(l, DeadLetterQueue, func() (err error) {
			d, ok, err = l.ch.Get(DeadLetterQueue, false)
			return err
		}); err != nil {
			return a.explain(l.node, err)
		}
		if !ok {
			break
		}
		dead, retries := deadLetterOf(&d), retriesOf(&d)
		fate, again := seen[dead.identity(retries)]
		if !again {
			fate, more = decide(dead)
			seen[dead.identity(retries)] = Drop
		}
		switch fate {
		case Keep:
			kept = d.DeliveryTag
			if returns, _ := d.Headers["x-delivery-count"].(int64); returns >= recount {
				worn = append(worn, &d)
			}
			continue
		case Retry:
			seen[dead.identity(retries+1)] = Keep // it may be back before this is over
			err = a.retryDead(ctx, &d, dead, retries+1)
		}
		if err == nil {
			err = d.Ack(false)
		}
		if err != nil {
			return fmt.Errorf("dead letter %s: %w", dead.Name, err)
		}
	}
	for _, d := range worn {
		again := copyOf(d, func(header string) bool { return header != "x-delivery-count" })
		again.exchange, again.key = DeadLetterExchange, d.RoutingKey
		err := a.publish(ctx, []*outgoing{again})
		if err == nil {
			err = d.Ack(false)
		}
		if err != nil {
			return fmt.Errorf("put dead letter %s anew: %w", d.MessageId, err)
		}
	}
	if kept == 0 {
		return nil
	}
	if err := l.ch.Nack(kept, true, true); err != nil { // those that are kept go back
		return fmt.Errorf("give dead letters back: %w", err)
	}
	return onChannel(l.conn, func(ch *amqp.Channel) error { // the broker has taken that when it answers this
		_, err := ch.QueueDeclarePassive(DeadLetterQueue, true, false, false, false, nil)
		return err
	})
}

// identity is what the copies of a dead letter have in common, and what they have
// not with the same message that was retried and refused again.
type identity [sha256.Size]byte

func (d *DeadLetter) identity(retries int) identity {
	return sha256.Sum256(fmt.Appendf(nil, "%q %q %q %d %s", d.ID, d.Queue, d.RoutingKey, retries, d.Body))
}

// retriesOf returns how often a dead letter was retried.
func retriesOf(d *amqp.Delivery) int {
	text, _ := d.Headers[headerRetries].(string)
	n, _ := strconv.Atoi(text)
	return n
}

// retryDead puts a dead letter into its queue.
func (a *AMQP) retryDead(ctx context.Context, d *amqp.Delivery, dead *DeadLetter, retries int) error {
	if dead.Queue == "" {
		return errStranded
	}
	again := copyOf(d, func(header string) bool {
		return header != headerReason && header != headerQueue && header != headerKey && header != "x-delivery-count" && header != "x-death"
	})
	again.msg.Headers[headerRetries] = strconv.Itoa(retries)
	again.key = dead.Queue // by the default exchange, so that no other queue gets it
	return a.publish(ctx, []*outgoing{again})
}

// copyOf is a message like one that was delivered, with those of its headers that
// keep says.
func copyOf(d *amqp.Delivery, keep func(header string) bool) *outgoing {
	headers := amqp.Table{}
	for k, v := range d.Headers {
		if keep(k) {
			headers[k] = v
		}
	}
	return &outgoing{done: make(chan error, 1), msg: amqp.Publishing{
		Headers: headers, ContentType: d.ContentType, ContentEncoding: d.ContentEncoding, DeliveryMode: amqp.Persistent,
		Priority: d.Priority, CorrelationId: d.CorrelationId, ReplyTo: d.ReplyTo, MessageId: d.MessageId,
		Timestamp: d.Timestamp, Type: d.Type, AppId: d.AppId, Body: d.Body,
	}}
}

// deadLetterOf reads what is known of a dead letter: what [deadLetter] says of it, or
// the broker, where it gave up a message itself.
func deadLetterOf(d *amqp.Delivery) *DeadLetter {
	dead := &DeadLetter{Name: d.MessageId, Message: Message{
		RoutingKey: d.RoutingKey, ID: d.MessageId, ContentType: d.ContentType, ContentEncoding: d.ContentEncoding,
		Time: d.Timestamp, Body: d.Body,
	}}
	dead.KeyID, _ = d.Headers[headerKeyID].(string)
	dead.HMAC, _ = d.Headers[headerHMAC].(string)
	if dead.Name == "" {
		sum := sha256.Sum256(d.Body)
		dead.Name = hex.EncodeToString(sum[:6])
	}
	dead.Queue, _ = d.Headers[headerQueue].(string)
	dead.Reason, _ = d.Headers[headerReason].(string)
	if key, ok := d.Headers[headerKey].(string); ok {
		dead.RoutingKey = key
	}
	deaths, _ := d.Headers["x-death"].([]any)
	if dead.Queue != "" || len(deaths) == 0 {
		return dead
	}
	death, _ := deaths[0].(amqp.Table)
	dead.Queue, _ = death["queue"].(string)
	switch reason, _ := death["reason"].(string); reason {
	case "delivery_limit":
		dead.Reason = "RabbitMQ gave it up: it was delivered too often and never acked"
	case "expired":
		dead.Reason = "RabbitMQ gave it up: it was older than the queue's policy allows"
	case "maxlen":
		dead.Reason = "RabbitMQ gave it up: the queue was full"
	default:
		dead.Reason = "RabbitMQ gave it up: " + reason
	}
	if at, ok := death["time"].(time.Time); ok && dead.Time.IsZero() {
		dead.Time = at
	}
	return dead
}
