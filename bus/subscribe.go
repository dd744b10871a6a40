package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Subscription says what to receive of what OpenStack services publish to
// exchanges of theirs.
type Subscription struct {
	Queue     string   // that receives it
	Exchanges []string // topic exchanges of the services
	Keys      []string // routing keys
	// Theirs says that the queue is one that the services or Ceilometer made, and
	// that is to be emptied. Else it is ours and receives copies.
	Theirs bool
	// Durable and AutoDelete are amqp_durable_queues and amqp_auto_delete of the
	// services: how exchanges, and queues of theirs, are made where there are none
	// yet.
	Durable, AutoDelete bool
	// Gather is how long others are waited for once there is a message, to be
	// handled with it: what a handler costs once a call is shared by more.
	Gather time.Duration
}

// Subscriber receives what others publish.
type Subscriber interface {
	// Subscribe makes what is missing of a subscription, and consumes from its
	// queue as [Consumer.Consume] does.
	Subscribe(ctx context.Context, s Subscription, prefetch int, handle Handler) error
}

// Subscribe implements [Subscriber].
func (a *AMQP) Subscribe(ctx context.Context, s Subscription, prefetch int, handle Handler) error {
	prepare := s.declare
	if a.cfg.Topology == TopologyCheck {
		prepare = s.check
	}
	return a.consume(ctx, s.Queue, prefetch, s.Gather, prepare, handle)
}

// check makes nothing: that the queue is there is all that consuming needs.
func (s *Subscription) check(conn *amqp.Connection) error {
	return passive(conn, nil, []string{s.Queue})
}

// declare makes what is missing.
func (s *Subscription) declare(conn *amqp.Connection) error {
	for _, name := range s.Exchanges {
		err := onChannel(conn, func(ch *amqp.Channel) error {
			return ch.ExchangeDeclarePassive(name, amqp.ExchangeTopic, s.Durable, s.AutoDelete, false, false, nil)
		})
		if missing(err) {
			err = onChannel(conn, func(ch *amqp.Channel) error {
				return ch.ExchangeDeclare(name, amqp.ExchangeTopic, s.Durable, s.AutoDelete, false, false, nil)
			})
		}
		if err != nil {
			return fmt.Errorf("declare exchange %s: %w", name, err)
		}
	}
	err := onChannel(conn, func(ch *amqp.Channel) error {
		if s.Theirs {
			_, err := ch.QueueDeclarePassive(s.Queue, s.Durable, s.AutoDelete, false, false, nil)
			return err
		}
		_, err := ch.QueueDeclare(s.Queue, true, false, false, false, amqp.Table{
			// A full queue drops its oldest rather than refuse what the services
			// publish: it must never hold them up.
			"x-queue-type":           "quorum",
			"x-dead-letter-exchange": DeadLetterExchange,
			"x-delivery-limit":       int32(deliveryLimit),
		})
		return err
	})
	if s.Theirs && missing(err) {
		err = onChannel(conn, func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclare(s.Queue, s.Durable, s.AutoDelete, false, false, nil)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("declare queue %s: %w", s.Queue, err)
	}
	return onChannel(conn, func(ch *amqp.Channel) error {
		for _, name := range s.Exchanges {
			for _, key := range s.Keys {
				if err := ch.QueueBind(s.Queue, key, name, false, nil); err != nil {
					return fmt.Errorf("bind queue %s to exchange %s: %w", s.Queue, name, err)
				}
			}
		}
		return nil
	})
}

// onChannel runs f on a channel of its own, since a refusal closes it.
func onChannel(conn *amqp.Connection, f func(*amqp.Channel) error) error {
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := f(ch); err != nil {
		_ = ch.Close() // closed already, if the broker refused
		return err
	}
	return ch.Close()
}

// missing reports whether the broker knows no exchange or queue of a name.
func missing(err error) bool {
	var refusal *amqp.Error
	return errors.As(err, &refusal) && refusal.Code == amqp.NotFound
}
