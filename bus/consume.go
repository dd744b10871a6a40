package bus

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample/failpoint"
)

// Consume implements [Consumer], over a connection of its own.
func (a *AMQP) Consume(ctx context.Context, queue string, prefetch int, handle Handler) error {
	return a.consume(ctx, queue, prefetch, 0, nil, handle)
}

// consume consumes; prepare makes what is missing, each time it has connected.
// gather is as in [Subscription].
func (a *AMQP) consume(ctx context.Context, queue string, prefetch int, gather time.Duration, prepare func(*amqp.Connection) error, handle Handler) error {
	log := a.log.With(zap.String("queue", queue))
	prefetch = min(max(prefetch, 1), math.MaxUint16) // 0 would be no bound; AMQP has 16 bits for it
	retry := a.retry
	quiet := newComplaint(log) // about the queue
	for {
		l := a.connect(ctx, &retry)
		if l == nil {
			return nil
		}
		began := time.Now()
		var err error
		if prepare != nil {
			err = a.ask(l, queue, func() error { return prepare(l.conn) })
		}
		if err == nil {
			err = a.consumeOver(ctx, l, log, queue, prefetch, gather, quiet, handle)
		}
		l.close()
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > a.retry.max {
			retry.reset()
		}
		l.node.fail()
		if errors.Is(err, ErrSilent) {
			quiet.say("no messages can be had; trying again", err)
		} else {
			a.trouble.say("consuming stopped; reconnecting", fmt.Errorf("queue %s: %w", queue, err))
		}
		retry.wait(ctx)
	}
}

// consumeOver consumes over one connection until that is lost or ctx ends.
func (a *AMQP) consumeOver(ctx context.Context, l *link, log *zap.Logger, queue string, prefetch int, gather time.Duration, quiet *complaint, handle Handler) error {
	lost := l.ch.NotifyClose(make(chan *amqp.Error, 1))
	cancelled := l.ch.NotifyCancel(make(chan string, 1))
	var in <-chan amqp.Delivery
	err := a.ask(l, queue, func() (err error) {
		if err = l.ch.Qos(prefetch, 0, false); err == nil {
			in, err = l.ch.Consume(queue, "", false, false, false, false, nil)
		}
		return err
	})
	if err != nil {
		return err
	}
	quiet.over("RabbitMQ answers again")
	l.calm.gather.Store(int64(gather))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// The library hands out deliveries one by one; here they wait side by side,
	// so that poll finds all that are there.
	src := &amqpSource{a: a, ch: l.ch, queue: queue, in: make(chan amqp.Delivery, prefetch), gather: gather, full: make(chan struct{}, 1)}
	go func() {
		for d := range in {
			src.in <- d
			if len(src.in) >= prefetch-1 { // another one is being waited with
				select {
				case src.full <- struct{}{}:
				default:
				}
			}
		}
	}()
	go func() {
		select {
		case e := <-lost:
			if e == nil {
				e = amqp.ErrClosed
			}
			cancel(e)
		case <-cancelled:
			cancel(errors.New("the broker has ended it: the queue was deleted, or its node is down"))
		case <-ctx.Done():
		}
	}()
	if _, err := pump(ctx, log, src, prefetch, a.retry, holdFor, handle); err != nil {
		return err
	}
	return context.Cause(ctx)
}

type amqpSource struct {
	a     *AMQP
	ch    *amqp.Channel
	queue string
	in    chan amqp.Delivery

	gather time.Duration
	full   chan struct{} // as many wait as are handed out
}

func (s *amqpSource) wait(ctx context.Context) *Delivery {
	select {
	case <-s.full: // it is of what was taken meanwhile
	default:
	}
	select {
	case d := <-s.in:
		if s.gather > 0 && len(s.in) < cap(s.in)-1 {
			patience := time.NewTimer(s.gather)
			select {
			case <-patience.C:
			case <-s.full:
			case <-ctx.Done():
			}
			patience.Stop()
		}
		return delivery(d)
	case <-ctx.Done():
		return nil
	}
}

func (s *amqpSource) poll() *Delivery {
	select {
	case d := <-s.in:
		return delivery(d)
	default:
		return nil
	}
}

func delivery(d amqp.Delivery) *Delivery {
	keyID, _ := d.Headers[headerKeyID].(string)
	hmac, _ := d.Headers[headerHMAC].(string)
	return &Delivery{
		Message: Message{
			RoutingKey: d.RoutingKey, ID: d.MessageId, ContentType: d.ContentType,
			ContentEncoding: d.ContentEncoding, KeyID: keyID, HMAC: hmac, Time: d.Timestamp, Body: d.Body,
		},
		Redelivered: d.Redelivered, from: &d,
	}
}

// settle copies the rejected messages to the dead-letter queue, waits until
// they are confirmed there, and acks all that are decided: with one frame as
// far as no undecided one lies between.
func (s *amqpSource) settle(ctx context.Context, ds []*Delivery) error {
	var dead []*outgoing
	for _, d := range ds {
		if d.verdict == rejected {
			dead = append(dead, deadLetter(s.queue, d.from.(*amqp.Delivery), d.reason))
		}
	}
	if len(dead) > 0 {
		if err := s.a.publish(ctx, dead); err != nil {
			return fmt.Errorf("move to %s: %w", DeadLetterQueue, err)
		}
	}
	failpoint.At(failpoint.AckDue)
	defer failpoint.At(failpoint.AckSent)
	n := 0
	for n < len(ds) && ds[n].verdict != undecided {
		n++
	}
	if n > 0 {
		if err := s.ch.Ack(ds[n-1].from.(*amqp.Delivery).DeliveryTag, true); err != nil {
			return fmt.Errorf("ack: %w", err)
		}
	}
	for _, d := range ds[n:] {
		if d.verdict != undecided {
			if err := s.ch.Ack(d.from.(*amqp.Delivery).DeliveryTag, false); err != nil {
				return fmt.Errorf("ack: %w", err)
			}
		}
	}
	return nil
}
