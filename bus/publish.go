package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample/failpoint"
)

// window is how many messages may wait for their confirms. More gain nothing:
// a quorum queue on one node takes 370 messages/s one at a time and 11,300
// messages/s 100 at a time.
const window = 100

// confirmWithin is how long a node may take nothing of what it is sent, before
// another is tried: one that has lost its cluster keeps its connections, and
// leaves messages unconfirmed or refuses them.
const confirmWithin = time.Minute

const (
	headerKeyID  = "kvmeter-key-id"
	headerHMAC   = "kvmeter-hmac"
	headerReason = "kvmeter-reason"      // of dead letters: why
	headerQueue  = "kvmeter-queue"       // of dead letters: the queue they were in
	headerKey    = "kvmeter-routing-key" // of dead letters: what they were sent with
	// headerRetries is of messages that were dead letters: how often they were retried.
	headerRetries = "kvmeter-retries"
)

// What may become of an outgoing message, beside being confirmed.
var (
	errLost   = errors.New("connection lost before the confirm")
	errNacked = errors.New("the queue is full, or its disk is, or it has lost the majority of its nodes")
)

// outgoing is a message on its way to the broker.
type outgoing struct {
	exchange, key string
	msg           amqp.Publishing
	lane          *lane
	returned      bool
	done          chan error // holds one
}

// lane is the way to a queue.
type lane struct {
	in   chan *outgoing // taken by its connection, while there is one
	full *complaint     // about a queue that takes nothing
}

// Publish implements [Publisher].
func (a *AMQP) Publish(ctx context.Context, ms ...Message) error {
	out := make([]*outgoing, len(ms))
	for i := range ms {
		m := &ms[i]
		if err := m.check(); err != nil {
			return fmt.Errorf("publish %s: %w", m.ID, err)
		}
		p := amqp.Publishing{
			ContentType: m.ContentType, ContentEncoding: m.ContentEncoding,
			DeliveryMode: amqp.Persistent, MessageId: m.ID, Timestamp: m.Time, Body: m.Body,
		}
		if m.HMAC != "" {
			p.Headers = amqp.Table{headerKeyID: m.KeyID, headerHMAC: m.HMAC}
		}
		out[i] = &outgoing{exchange: cmp.Or(m.Exchange, Exchange), key: m.RoutingKey, msg: p, done: make(chan error, 1)}
	}
	return a.publish(ctx, out)
}

// askAgain is the longest pause before a queue that takes nothing is asked again. It
// is short, since it adds up along the way, and with one message.
const askAgain = 2 * time.Second

// publish sends messages until all are confirmed.
func (a *AMQP) publish(ctx context.Context, out []*outgoing) error {
	if err := insist(ctx, out, backoff{min: a.retry.min, max: askAgain}, a.send); err != nil {
		return err
	}
	for _, p := range out {
		p.lane.full.over("RabbitMQ takes messages again")
	}
	return nil
}

// insist sends messages until none comes back: after a pause one of those that did,
// and when it is taken, all.
func insist(ctx context.Context, out []*outgoing, retry backoff, send func(context.Context, []*outgoing) (again []*outgoing, err error)) error {
	for n := len(out); n > 0; {
		again, err := send(ctx, out[:n])
		if err != nil {
			return err
		}
		if len(again) < n {
			retry.reset()
		}
		out = append(again, out[n:]...)
		if n = len(out); len(again) > 0 {
			n = 1
			retry.wait(ctx) // once ctx has ended, send says so
		}
	}
	return nil
}

// lane returns the way to the queue of a message, whose connection it begins.
func (a *AMQP) lane(p *outgoing) *lane {
	queue := a.taker(p)
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.lanes[queue]
	if w == nil {
		w = &lane{in: make(chan *outgoing), full: newComplaint(a.log.With(zap.String("queue", queue)))}
		a.lanes[queue] = w
		a.running.Go(func() { a.publishing(w) })
	}
	return w
}

// send sends each message once and returns those that were not confirmed.
func (a *AMQP) send(ctx context.Context, out []*outgoing) (again []*outgoing, err error) {
	sent := 0
	for _, p := range out {
		p.lane = a.lane(p)
		select {
		case p.lane.in <- p:
			sent++
			continue
		case <-ctx.Done():
			err = a.unconfirmed(ctx)
		case <-a.ctx.Done():
			err = fmt.Errorf("publish: %w", amqp.ErrClosed)
		}
		return nil, err
	}
	for _, p := range out[:sent] {
		select {
		case result := <-p.done:
			switch {
			case result == nil:
			case errors.Is(result, errLost), errors.Is(result, errNacked):
				if errors.Is(result, errNacked) {
					p.lane.full.say("RabbitMQ refuses messages; they are sent again", result)
				}
				again = append(again, p)
			default:
				err = errors.Join(err, fmt.Errorf("publish %s to %q: %w", p.msg.MessageId, p.key, result))
			}
		case <-ctx.Done():
			return nil, a.unconfirmed(ctx)
		}
	}
	return again, err
}

func (a *AMQP) unconfirmed(ctx context.Context) error {
	return fmt.Errorf("publish: not confirmed by RabbitMQ at %s: %w", a.addr, ctx.Err())
}

// publishing keeps a publishing connection until the bus is closed.
func (a *AMQP) publishing(w *lane) {
	retry := a.retry
	for {
		l := a.connect(a.ctx, &retry)
		if l == nil {
			return
		}
		confirmed, err := a.publishOver(l, w)
		l.close()
		if a.ctx.Err() != nil {
			return
		}
		l.node.fail()
		a.trouble.say("connection to RabbitMQ lost; reconnecting", err)
		if confirmed {
			retry.reset()
		}
		retry.wait(a.ctx)
	}
}

// publishOver sends what comes in over one connection until that is lost, and
// reports whether anything was confirmed. All is done by this goroutine: the
// channels that the library feeds hold a window's worth, so that its reader
// never waits for us, even while a broker short of memory keeps us writing.
func (a *AMQP) publishOver(l *link, w *lane) (confirmed bool, err error) {
	confirms := l.ch.NotifyPublish(make(chan amqp.Confirmation, window))
	returns := l.ch.NotifyReturn(make(chan amqp.Return, window))
	blocks := l.conn.NotifyBlocked(make(chan amqp.Blocking, window))
	lost := l.ch.NotifyClose(make(chan *amqp.Error, 1))
	if err := l.ch.Confirm(false); err != nil {
		return false, a.explain(l.node, err)
	}
	pending := map[uint64]*outgoing{} // by the number of their confirm
	var sent, next uint64 = 0, 1      // next confirm; the library hands them out in order
	blocked := false
	told := false
	var since time.Time // when what was sent since the last confirm was first sent; zero: nothing was
	look := time.NewTicker(min(a.answerWithin, a.confirmWithin) / 4)
	defer look.Stop()
	settle := func(c amqp.Confirmation) {
		// A message that no queue takes is returned, then confirmed.
		for len(returns) > 0 {
			r := <-returns
			for _, p := range pending {
				if p.exchange == r.Exchange && p.key == r.RoutingKey && p.msg.MessageId == r.MessageId {
					p.returned = true
				}
			}
		}
		// The library drops a confirm rather than wait for long.
		for ; next < c.DeliveryTag && next <= sent; next++ {
			pending[next].done <- errLost
			delete(pending, next)
		}
		p := pending[c.DeliveryTag]
		if p == nil {
			return // the broker confirms what was never sent
		}
		delete(pending, c.DeliveryTag)
		next++
		switch {
		case p.returned:
			p.done <- ErrUnroutable
		case !c.Ack:
			p.done <- errNacked
		default:
			confirmed = true
			failpoint.At(failpoint.PublishConfirmed)
			p.done <- nil
		}
	}
	defer func() {
		for c := range confirms { // closed by the library
			settle(c)
		}
		for _, p := range pending {
			p.done <- errLost
		}
	}()
	defer l.close()
	defer context.AfterFunc(a.ctx, l.close)() // also ends a write that is stuck
	for {
		in := w.in
		if blocked || len(pending) >= window {
			in = nil
		}
		select {
		case p := <-in:
			if since.IsZero() {
				since, told = time.Now(), false
			}
			p.returned = false
			sent++
			pending[sent] = p
			if err := l.ch.PublishWithContext(a.ctx, p.exchange, p.key, true, false, p.msg); err != nil {
				return confirmed, err
			}
			failpoint.At(failpoint.PublishSent)
		case c, ok := <-confirms:
			if !ok {
				return confirmed, lostBy(lost)
			}
			settle(c)
			if c.Ack && len(pending) == 0 {
				since = time.Time{}
			} else if c.Ack {
				since, told = time.Now(), false
			}
		case b := <-blocks:
			if blocked = b.Active; blocked {
				w.full.say("RabbitMQ takes no messages for now; waiting", errors.New(b.Reason))
			} else {
				w.full.over("RabbitMQ takes messages again")
				since = time.Time{}
			}
		case <-look.C:
			quiet := time.Since(since)
			if since.IsZero() || blocked {
				quiet = 0
			}
			if p := pending[next]; p != nil && quiet > a.answerWithin && !told {
				told = true
				w.full.say("what was sent is not confirmed; waiting", a.silence(l.node, a.taker(p)))
			}
			if quiet > a.confirmWithin {
				return confirmed, fmt.Errorf("RabbitMQ at %s has taken no message for %s: is the queue full, or has it lost the other nodes of its cluster?",
					l.node.addr, a.confirmWithin)
			}
		case <-a.ctx.Done():
			return confirmed, a.ctx.Err()
		}
	}
}

// lostBy returns why a channel ended.
func lostBy(lost chan *amqp.Error) error {
	select {
	case e := <-lost:
		if e != nil {
			return e
		}
	default:
	}
	return amqp.ErrClosed
}

// deadLetter is the copy of a delivery that goes to the dead-letter queue:
// dead-lettering by the broker could not say why.
func deadLetter(queue string, d *incoming, reason error) *outgoing {
	var p amqp.Publishing
	readProperties(&p, d.properties, names{}) // as was done when they came
	headers := amqp.Table{}
	for k, v := range p.Headers {
		// All headers must fit in one frame, with room for ours.
		if s := v.(string); len(headers) < 20 && len(k)+len(s) < 1024 {
			headers[k] = s
		}
	}
	why := strings.ToValidUTF8(reason.Error(), "?")
	headers[headerReason], headers[headerQueue], headers[headerKey] = why[:min(len(why), 1024)], queue, d.RoutingKey
	p.Headers, p.DeliveryMode, p.Body = headers, amqp.Persistent, d.Body
	return &outgoing{exchange: DeadLetterExchange, key: d.RoutingKey, msg: p, done: make(chan error, 1)}
}
