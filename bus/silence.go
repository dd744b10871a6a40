package bus

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// answerWithin is how long RabbitMQ may neither confirm a message nor answer
// about a queue before that is said: one that has no leader is silent for ever,
// on a connection that is alive.
const answerWithin = 30 * time.Second

// ErrSilent is returned for a queue of which the broker does not answer.
var ErrSilent = errors.New("RabbitMQ does not answer")

func newSilences() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kvmeter_bus_silences_total",
		Help: "Times that RabbitMQ neither confirmed a message for the queue nor answered about it for 30 s.",
	}, []string{"queue"})
}

// Metrics are the bus's own, to be registered.
func (a *AMQP) Metrics() prometheus.Collector { return a.silences }

// ask runs f, which asks about a queue. Where there is no answer it gives up the
// connection, which ends f.
func (a *AMQP) ask(l *link, queue string, f func() error) error {
	timer := time.AfterFunc(a.answerWithin, l.close)
	err := f()
	if !timer.Stop() {
		return a.silence(l.node, queue)
	}
	return err
}

// silence counts that a queue does not answer, and returns what to do about it.
func (a *AMQP) silence(n *node, queue string) error {
	a.silences.WithLabelValues(queue).Inc()
	return fmt.Errorf("%w: nothing has come of queue %s at %s for %s. It may have no leader, or too few of its nodes run: rabbitmq-queues quorum_status --vhost %s %s. "+
		"If all run and none leads: rabbitmqctl eval \"ra:trigger_election({'%s_%s', node()}).\"",
		ErrSilent, queue, n.addr, a.answerWithin, n.uri.Vhost, queue, strings.Replace(n.uri.Vhost, "/", "%2F", 1), queue)
}

// taker names the queue that a message goes to, as far as it is known.
func (a *AMQP) taker(p *outgoing) string {
	if p.exchange == DeadLetterExchange {
		return DeadLetterQueue
	}
	return cmp.Or(a.queues[[2]string{p.exchange, p.key}], p.key)
}
