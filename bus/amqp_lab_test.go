//go:build lab

package bus_test

import (
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/test/lab"
)

var queues = []string{"kvmeter.samples.0", "kvmeter.samples.1", "kvmeter.store.0", "kvmeter.store.1", "kvmeter.events", "kvmeter.dead"}

func broker(t *testing.T) *lab.Rabbit {
	t.Helper()
	r, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func open(t *testing.T, url string) *bus.AMQP {
	t.Helper()
	cfg := bus.DefaultConfig()
	cfg.URL, cfg.Partitions = url, 2
	b, err := bus.NewAMQP(cfg, t.Name(), zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// admin is a plain channel to the broker, for looking at it.
func admin(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func TestAMQPConforms(t *testing.T) {
	r := broker(t)
	conform(t, func(t *testing.T) (wire, func() []dead) {
		b := open(t, r.URL())
		if err := b.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		ch := admin(t, r.URL())
		for _, q := range queues {
			if _, err := ch.QueuePurge(q, false); err != nil {
				t.Fatal(err)
			}
		}
		return b, func() []dead { return deadLetters(t, ch, 1) }
	})
}

// deadLetters takes at least n messages from the dead-letter queue.
func deadLetters(t *testing.T, ch *amqp.Channel, n int) (ds []dead) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		d, ok, err := ch.Get("kvmeter.dead", true)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			if len(ds) >= n {
				break
			}
			time.Sleep(10 * time.Millisecond)
			continue
		}
		queue, _ := d.Headers["kvmeter-queue"].(string)
		reason, _ := d.Headers["kvmeter-reason"].(string)
		ds = append(ds, dead{d.MessageId, string(d.Body), queue, reason})
	}
	return ds
}
