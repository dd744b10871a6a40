package bus

import (
	"errors"
	"fmt"
	"strings"

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

// StagesQueue returns the queue of what transformers with memory get, from
// notifiers to the one whose partition n is.
func StagesQueue(n int) string { return fmt.Sprintf("kvmeter.stages.%d", n) }

// MemoryQueue returns the queue of what the transformers of partition n remember;
// see [Records].
func MemoryQueue(n int) string { return fmt.Sprintf("kvmeter.memory.%d", n) }

// NotifiersQueue is the queue whose consumers are the notifiers that share
// partitions of stages: nothing is ever sent to it.
const NotifiersQueue = "kvmeter.notifiers"

// StagesKey returns the routing key of samples of a resource on their way to
// transformers with memory, of the given number of partitions.
func StagesKey(resource string, partitions int) string {
	return fmt.Sprintf("stages.%d", Partition(resource, partitions))
}

func memoryKey(n int) string { return fmt.Sprintf("memory.%d", n) }

// SamplesKey returns the routing key of a node's batches from agent to
// notifier, of the given number of partitions.
func SamplesKey(node string, partitions int) string {
	return fmt.Sprintf("samples.%d", Partition(node, partitions))
}

// StoreKey returns the routing key of a node's batches from notifier to
// central, of the given number of partitions.
func StoreKey(node string, partitions int) string {
	return fmt.Sprintf("store.%d", Partition(node, partitions))
}

// Partition is FNV-1a of a node's name or of a resource's id modulo the
// partitions: part of the contract, since what belongs together must keep its
// queue.
func Partition(name string, partitions int) int {
	const offset, prime = 2166136261, 16777619
	h := uint32(offset)
	for i := range len(name) {
		h = (h ^ uint32(name[i])) * prime
	}
	return int(h % uint32(max(1, partitions)))
}

// deliveryLimit is how often RabbitMQ may hand out a message before it moves it
// to the dead-letter queue.
const deliveryLimit = 1000

// binding is a queue and the routing key that leads to it from an exchange.
type binding struct {
	queue, exchange, key string
	args                 amqp.Table
}

// bindings returns the queues of the given number of partitions, and of as many
// of transformers with memory.
func bindings(partitions, stages int) []binding {
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
	if stages > 0 {
		bs = append(bs, binding{NotifiersQueue, Exchange, "notifiers", amqp.Table{"x-queue-type": "quorum"}})
	}
	for n := range stages {
		bs = append(
			bs,
			binding{StagesQueue(n), Exchange, fmt.Sprintf("stages.%d", n), quorum(true)},
			// Records are neither dropped for want of space nor moved to the dead
			// letters: a full queue refuses them, and what they are about waits.
			binding{MemoryQueue(n), Exchange, memoryKey(n), amqp.Table{
				"x-queue-type": "quorum", "x-overflow": "reject-publish", "x-delivery-limit": int32(deliveryLimit),
				"x-single-active-consumer": true,
			}},
		)
	}
	return bs
}

// declare makes what is missing of the topology.
func declare(ch *amqp.Channel, partitions, stages int) error {
	for _, name := range []string{Exchange, DeadLetterExchange} {
		if err := ch.ExchangeDeclare(name, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
			return fmt.Errorf("declare exchange %s: %w", name, err)
		}
	}
	for _, b := range bindings(partitions, stages) {
		if _, err := ch.QueueDeclare(b.queue, true, false, false, false, b.args); err != nil {
			return fmt.Errorf("declare queue %s: %w", b.queue, err)
		}
		if err := ch.QueueBind(b.queue, b.key, b.exchange, false, nil); err != nil {
			return fmt.Errorf("bind queue %s: %w", b.queue, err)
		}
	}
	return nil
}

// ErrTopology is returned where something of the topology is missing that is
// only checked.
var ErrTopology = errors.New("topology: check makes nothing; let a user that may configure make it, such as a central with topology: declare")

// check returns an error that names what is missing of the topology. A passive
// declaration needs no permission, and tells nothing of arguments or bindings:
// a message without a binding is returned when it is sent ([ErrUnroutable]).
func check(conn *amqp.Connection, partitions, stages int) error {
	var queues []string
	for _, b := range bindings(partitions, stages) {
		queues = append(queues, b.queue)
	}
	return passive(conn, []string{Exchange, DeadLetterExchange}, queues)
}

// passive returns an error that names what is missing of exchanges and queues.
func passive(conn *amqp.Connection, exchanges, queues []string) error {
	var gone []string
	look := func(name string, f func(*amqp.Channel) error) error {
		err := onChannel(conn, f)
		if missing(err) {
			gone = append(gone, name)
			return nil
		}
		return err
	}
	for _, name := range exchanges {
		if err := look("exchange "+name, func(ch *amqp.Channel) error {
			return ch.ExchangeDeclarePassive(name, amqp.ExchangeTopic, true, false, false, false, nil)
		}); err != nil {
			return fmt.Errorf("check exchange %s: %w", name, err)
		}
	}
	for _, name := range queues {
		if err := look("queue "+name, func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
			return err
		}); err != nil {
			return fmt.Errorf("check queue %s: %w", name, err)
		}
	}
	if len(gone) > 0 {
		return fmt.Errorf("there is no %s (%w)", strings.Join(gone, ", no "), ErrTopology)
	}
	return nil
}
