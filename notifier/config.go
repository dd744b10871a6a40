package notifier

import (
	"fmt"
	"os"
	"time"

	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// Config is the notifier's part of notifier.yaml.
type Config struct {
	// Name is the notifier's node name and the id of its key, with which it signs
	// batches of which its pipelines pass only a part. Default: the host's name.
	Name string `yaml:"name"`
	// Pipeline is the file that says what goes where. Where there is none,
	// everything goes to the store.
	Pipeline string `yaml:"pipeline"`
	// EventPipeline is the file that says what goes where of the events that
	// notifications give and that samples of some meters are. Where there is none,
	// all go to the store, if the notifier has a key to sign them with. Empty: no
	// events are made.
	EventPipeline string `yaml:"event_pipeline"`
	// Partitions is the number of queues; the program sets it from the bus's
	// configuration.
	Partitions int `yaml:"-"`
	// Prefetch is how many batches a queue may hand out before the first is
	// acked: it bounds what the notifier holds in memory.
	Prefetch int `yaml:"prefetch"`
	// MaxSeries is how many series each stage of a pipeline with memory
	// (rate_of_change, delta, aggregator, arithmetic) remembers, about 200 bytes
	// each; the ones not seen for longest are forgotten.
	MaxSeries int `yaml:"max_series"`
	// SeriesAge is for how long they remember a series, an aggregate or a sample
	// that waits for others at least; after twice as long it is forgotten or let go.
	// 0s: for ever.
	SeriesAge time.Duration `yaml:"series_age"`
	// State is the folder that keeps what they remember over a restart of this
	// notifier, unless stage_partitions is set. Empty: nothing is kept.
	State string `yaml:"state"`
	// StagePartitions is for several notifiers: the number of queues over which
	// those samples are spread, by resource, that pass transformers with memory. Each
	// queue is one notifier's at a time, and what its transformers remember is kept in
	// RabbitMQ, so that another one can go on. The same for all notifiers. 0: there is
	// one notifier, which keeps it all itself.
	StagePartitions int `yaml:"stage_partitions"`
	// Spool is the folder in which waits what a publisher cannot take at once, so
	// that it holds up no other. Empty: there is none, and one publisher that is away
	// holds up everything.
	Spool string `yaml:"spool"`
	// SpoolBytes is how much may wait for one publisher; beyond it the oldest is
	// dropped and counted.
	SpoolBytes int64 `yaml:"spool_bytes"`
	// TelemetrySecretFile is a file with the secret that signs what is published
	// in Ceilometer's own forms, and samples of polling agents, its option
	// telemetry_secret: with it they are refused if they are signed otherwise. Empty:
	// the one that Ceilometer has unless it is told another, which everybody knows.
	TelemetrySecretFile string `yaml:"telemetry_secret_file"`
	// Secret is that secret itself, for programs that read it elsewhere.
	Secret string `yaml:"-"`
	// Dispatchers are URLs of publishers, as in pipeline.yaml, that stand there for
	// notifier:// and rpc:// without a host: where Ceilometer's collector sent what it
	// got that way. None: those are what they say.
	Dispatchers []string `yaml:"dispatchers"`
	// EventDispatchers are the same for event_pipeline.yaml.
	EventDispatchers []string `yaml:"event_dispatchers"`
	// AllowUnsigned takes batches, and samples of polling agents, that are not signed.
	AllowUnsigned bool `yaml:"allow_unsigned"`
	// Relays are the names whose keys may sign batches of samples of other nodes:
	// the other notifiers, where they share out stages, and centrals that take samples
	// by POST. Each other key speaks for its own node only.
	Relays []string `yaml:"relays"`
	// Notifications says what is taken of what OpenStack services send.
	Notifications Notifications `yaml:"notifications"`
}

// Notifications is the notifier's part about OpenStack's services. The names of
// settings that ceilometer.conf has are those that they have there.
type Notifications struct {
	// Enabled takes notifications, and the samples of Ceilometer's polling agents.
	Enabled bool `yaml:"enabled"`
	// URLs are the brokers that the services use, as amqp.url is written or as
	// rabbit://user:password@host:5672,user:password@host2:5672/vhost; empty:
	// amqp.url.
	URLs []string `yaml:"messaging_urls"`
	// Exchanges are those that the services publish to.
	Exchanges []string `yaml:"notification_control_exchanges"`
	// Topics are the services' [oslo_messaging_notifications] topics.
	Topics []string `yaml:"topics"`
	// TakeOver empties the queues that Ceilometer's notification agent reads,
	// TOPIC.PRIORITY, instead of copies of them: only where it is to be replaced.
	TakeOver bool `yaml:"take_over"`
	// DurableQueues is amqp_durable_queues of the services.
	DurableQueues bool `yaml:"amqp_durable_queues"`
	// AutoDelete is amqp_auto_delete of the services.
	AutoDelete bool `yaml:"amqp_auto_delete"`
	// Prefetch is how many notifications a queue may hand out before the first is
	// acked: they are handled at once, and the more there are the less each costs.
	Prefetch int `yaml:"prefetch"`
	// MeterDefinitions are files of meter definitions, or folders of which all
	// *.yaml are read; "shipped" stands for those that kvmeter brings. Of
	// definitions with the same name the first file's counts.
	MeterDefinitions []string `yaml:"meter_definitions"`
	// EventDefinitions is the file of event definitions; empty: those that
	// kvmeter brings.
	EventDefinitions string `yaml:"event_definitions"`
	// Settings change what definitions give, each as group.option=value of
	// ceilometer.conf, such as event.store_raw=info; docs/ceilometer.md lists
	// them.
	Settings []string `yaml:"settings"`
}

// DefaultConfig returns the configuration of one notifier behind RabbitMQ.
func DefaultConfig() Config {
	host, err := os.Hostname()
	if err != nil {
		host = "notifier"
	}
	return Config{
		Name: host, Pipeline: "/etc/kvmeter/pipeline.yaml", EventPipeline: "/etc/kvmeter/event_pipeline.yaml", Partitions: 1, Prefetch: 200, MaxSeries: 1_000_000, SeriesAge: 48 * time.Hour, SpoolBytes: 1 << 30, Relays: []string{},
		Notifications: Notifications{
			Exchanges: []string{
				"nova", "glance", "neutron", "cinder", "heat", "keystone", "trove", "zaqar", "swift", "ceilometer", "magnum", "dns",
				"ironic", "aodh",
			},
			Topics: []string{"notifications"}, Prefetch: 1000, MeterDefinitions: []string{"shipped"},
		},
	}
}

// TelemetrySecret returns the secret of Ceilometer's own forms.
func (c *Config) TelemetrySecret() (string, error) {
	switch {
	case c.TelemetrySecretFile != "":
	case c.Secret != "":
		return c.Secret, nil
	default:
		return ceilometer.DefaultSecret, nil
	}
	secret, err := sample.ReadSecret(c.TelemetrySecretFile, 0)
	if err != nil {
		return "", fmt.Errorf("telemetry_secret_file: %w", err)
	}
	return string(secret), nil
}
