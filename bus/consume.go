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
	in := l.wire.divert()
	defer in.close()
	err := a.ask(l, queue, func() (err error) {
		if err = l.ch.Qos(prefetch, 0, false); err == nil {
			// What the library returns stays empty.
			_, err = l.ch.Consume(queue, "", false, false, false, false, nil)
		}
		return err
	})
	if err != nil {
		return err
	}
	quiet.over("RabbitMQ answers again")
	l.wire.gather.Store(int64(gather))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	src := &amqpSource{a: a, ch: l.ch, queue: queue, inbox: in, prefetch: prefetch, gather: gather}
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
	a        *AMQP
	ch       *amqp.Channel
	queue    string
	prefetch int
	gather   time.Duration

	inbox *inbox
	taken []*incoming // from it; those before next were handed out
	next  int
}

func (s *amqpSource) wait(ctx context.Context) *Delivery {
	for {
		if d := s.poll(); d != nil {
			return d
		}
		select {
		case <-s.inbox.some:
		case <-ctx.Done():
			return nil
		}
		if s.gather > 0 {
			s.await(ctx)
		}
	}
}

// await waits for as many deliveries as the broker hands out, and not for long.
func (s *amqpSource) await(ctx context.Context) {
	patience := time.NewTimer(s.gather)
	defer patience.Stop()
	for s.inbox.len() < s.prefetch {
		select {
		case <-s.inbox.some:
		case <-patience.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (s *amqpSource) poll() *Delivery {
	if s.next == len(s.taken) {
		clear(s.taken)
		s.taken, s.next = s.inbox.take(s.taken[:0]), 0
		if len(s.taken) == 0 {
			return nil
		}
	}
	s.next++
	return &s.taken[s.next-1].Delivery
}

// farewell is how long what was decided may still take when its consumer is to end.
const farewell = 2 * time.Second

// outlast returns a context that ends a while after ctx does.
func outlast(ctx context.Context, while time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(while, cancel) })
	return longer, func() {
		stop()
		cancel()
	}
}

// settle copies the rejected messages to the dead-letter queue, waits until
// they are confirmed there, and acks all that are decided: with one frame as
// far as no undecided one lies between.
func (s *amqpSource) settle(ctx context.Context, ds []*Delivery) error {
	var dead []*outgoing
	for _, d := range ds {
		if d.verdict == rejected {
			dead = append(dead, deadLetter(s.queue, d.from.(*incoming), d.reason))
		}
	}
	if len(dead) > 0 {
		ctx, cancel := outlast(ctx, farewell)
		defer cancel()
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
		if err := s.ch.Ack(ds[n-1].from.(*incoming).tag, true); err != nil {
			return fmt.Errorf("ack: %w", err)
		}
	}
	for _, d := range ds[n:] {
		if d.verdict != undecided {
			if err := s.ch.Ack(d.from.(*incoming).tag, false); err != nil {
				return fmt.Errorf("ack: %w", err)
			}
		}
	}
	return nil
}
