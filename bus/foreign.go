package bus

import (
	"errors"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Foreign is an exchange and queues that services of OpenStack use: each
// queue is bound by its own name.
type Foreign struct {
	Exchange            string // topic
	Queues              []string
	Durable, AutoDelete bool       // amqp_durable_queues, amqp_auto_delete
	Arguments           amqp.Table // of the queues
}

// Declare makes what is missing, so that messages wait for whoever reads them.
// What is there is taken as it is.
func (f *Foreign) Declare(conn *amqp.Connection) error {
	absent := func(passive func(*amqp.Channel) error) (bool, error) {
		ch, err := conn.Channel()
		if err != nil {
			return false, err
		}
		err = passive(ch)
		var refusal *amqp.Error
		if errors.As(err, &refusal) && refusal.Code == amqp.NotFound {
			return true, nil // the broker has closed the channel
		}
		return false, errors.Join(err, ch.Close())
	}
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	no, err := absent(func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(f.Exchange, amqp.ExchangeTopic, f.Durable, f.AutoDelete, false, false, nil)
	})
	if err == nil && no {
		err = ch.ExchangeDeclare(f.Exchange, amqp.ExchangeTopic, f.Durable, f.AutoDelete, false, false, nil)
	}
	for _, q := range f.Queues {
		if err != nil {
			return err
		}
		no, err = absent(func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclarePassive(q, f.Durable, f.AutoDelete, false, false, nil)
			return err
		})
		if err == nil && no {
			_, err = ch.QueueDeclare(q, f.Durable, f.AutoDelete, false, false, f.Arguments)
		}
		if err == nil {
			err = ch.QueueBind(q, q, f.Exchange, false, nil)
		}
	}
	return errors.Join(err, ch.Close())
}
