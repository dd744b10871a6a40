package bus

import (
	"fmt"
	"hash/fnv"
)

// The topology. RabbitMQ refuses a declaration that differs from what exists,
// so these names and arguments do not change; docs/architecture.md says why
// each is as it is.
const (
	Exchange           = "kvmeter"     // topic, durable
	DeadLetterExchange = "kvmeter.dlx" // topic, durable
	DeadLetterQueue    = "kvmeter.dead"
	EventsQueue        = "kvmeter.events"
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
