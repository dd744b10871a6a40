package notifier

import (
	"os"
)

// Config is the notifier's part of notifier.yaml.
type Config struct {
	// Name is the notifier's node name and the id of its key, with which it signs
	// batches of which its pipelines pass only a part. Default: the host's name.
	Name string `yaml:"name"`
	// Pipeline is the file that says what goes where. Where there is none,
	// everything goes to the store.
	Pipeline string `yaml:"pipeline"`
	// Partitions is the number of queues; the program sets it from the bus's
	// configuration.
	Partitions int `yaml:"-"`
	// Prefetch is how many batches a queue may hand out before the first is
	// acked: it bounds what the notifier holds in memory.
	Prefetch int `yaml:"prefetch"`
	// AllowUnsigned takes batches that are not signed.
	AllowUnsigned bool `yaml:"allow_unsigned"`
}

// DefaultConfig returns the configuration of one notifier behind RabbitMQ.
func DefaultConfig() Config {
	host, err := os.Hostname()
	if err != nil {
		host = "notifier"
	}
	return Config{Name: host, Pipeline: "/etc/kvmeter/pipeline.yaml", Partitions: 1, Prefetch: 200}
}
