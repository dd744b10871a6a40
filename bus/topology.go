package bus

import (
	"fmt"
	"hash/fnv"

	amqp "github.com/rabbitmq/amqp091-go"
)

// The topology. RabbitMQ refuses a declaration that differs from what exists,
// so these names and arguments do not change; docs/architecture.md says why
// each is as it is.
const (
	Exchange           = "kvmeter"     // topic, durable
	DeadLetterExchange = "kvmeter.dlx" // topic, durable
	DeadLetterQueue    = "kvmeter.dead"
	EventsQueue        = "kvmeter.events"
	EventsKey          = "events" // routing key of what EventsQueue takes
)

// SamplesQueue returns the queue from agents to notifiers of partition n.
func SamplesQueue(n int) string { return fmt.Sprintf("kvmeter.samples.%d", n) }

// StoreQueue returns the queue from notifiers to central of partition n.
func StoreQueue(n int) string { return fmt.Sprintf("kvmeter.store.%d", n) }

// SamplesKey returns the routing key of a node's batches from agent to
// notifier, of the given number of partitions.
func SamplesKey(node string, partitions int) string {
	return fmt.Sprintf("samples.%d", partition(node, partitions))
}

// StoreKey returns the routing key of a node's batches from notifier to
// central, of the given number of partitions.
func StoreKey(node string, partitions int) string {
	return fmt.Sprintf("store.%d", partition(node, partitions))
}

// partition is FNV-1a of the node's name modulo the partitions: part of the
// contract, since a node's batches must keep their queue.
func partition(node string, partitions int) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(node)) // hash.Hash never returns an error
	return h.Sum32() % uint32(max(1, partitions))
}

// deliveryLimit is how often RabbitMQ may hand out a message before it moves it
// to the dead-letter queue.
const deliveryLimit = 1000

// binding is a queue and the routing key that leads to it from an exchange.
type binding struct {
	queue, exchange, key string
	args                 amqp.Table
}

// bindings returns the queues of the given number of partitions.
func bindings(partitions int) []binding {
	// Each of these could be set by policy as well (RabbitMQ 3.10,
	// rabbit_quorum_queue:ra_machine_config). They are arguments because losing
	// nothing must not depend on a policy that somebody remembers to set: for
	// dead-lettering the argument beats the policy. At-least-once works only
	// beside reject-publish (and the feature flag stream_queue, which every
	// cluster made by 3.9 or newer has): where a policy sets another overflow, it
	// beats the argument and RabbitMQ falls back to at-most-once, with a line in
	// its log. How long a queue may grow is the operator's to say, by policy; a
	// full queue then refuses messages and their publishers wait.
	//
	// The delivery limit is the one number among them. RabbitMQ 4 gives up on a
	// message after 20 deliveries unless told otherwise, and each connection
	// that is lost with the message unacked counts; 1,000 is two weeks of an
	// outage (see holdFor) and still ends a crash loop. A policy can lower it.
	quorum := func(singleActive bool) amqp.Table {
		args := amqp.Table{
			"x-queue-type":           "quorum",
			"x-dead-letter-exchange": DeadLetterExchange,
			"x-dead-letter-strategy": "at-least-once",
			"x-overflow":             "reject-publish",
			"x-delivery-limit":       int32(deliveryLimit),
		}
		if singleActive {
			args["x-single-active-consumer"] = true
		}
		return args
	}
	bs := []binding{
		// What nobody could take stays until an operator has looked at it. Where
		// a policy bounds its length the oldest go first, so that a full
		// dead-letter queue never stops the queues before it.
		{DeadLetterQueue, DeadLetterExchange, "#", amqp.Table{"x-queue-type": "quorum"}},
		{EventsQueue, Exchange, EventsKey, quorum(false)},
	}
	for n := range max(1, partitions) {
		bs = append(
			bs,
			binding{SamplesQueue(n), Exchange, fmt.Sprintf("samples.%d", n), quorum(true)},
			binding{StoreQueue(n), Exchange, fmt.Sprintf("store.%d", n), quorum(true)},
		)
	}
	return bs
}

// declare makes what is missing of the topology.
func declare(ch *amqp.Channel, partitions int) error {
	for _, name := range []string{Exchange, DeadLetterExchange} {
		if err := ch.ExchangeDeclare(name, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
			return fmt.Errorf("declare exchange %s: %w", name, err)
		}
	}
	for _, b := range bindings(partitions) {
		if _, err := ch.QueueDeclare(b.queue, true, false, false, false, b.args); err != nil {
			return fmt.Errorf("declare queue %s: %w", b.queue, err)
		}
		if err := ch.QueueBind(b.queue, b.key, b.exchange, false, nil); err != nil {
			return fmt.Errorf("bind queue %s: %w", b.queue, err)
		}
	}
	return nil
}
