// Package ceilometer sends an agent's batches as Ceilometer's polling agents send
// samples, so that its notification agent takes them.
package ceilometer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
	wire "github.com/kvmeter/kvmeter/sample/ceilometer"
)

// Config is the agent's part of the configuration about Ceilometer's wire. The
// keys are named as in ceilometer.conf.
type Config struct {
	// ControlExchange is the exchange that samples are published to.
	ControlExchange string `yaml:"control_exchange"`
	// Topics lists those of [oslo_messaging_notifications]: samples go to the queue
	// TOPIC.sample of each.
	Topics []string `yaml:"topics"`
	// BatchSize is how many samples a message has at most; 0: one each.
	BatchSize int `yaml:"batch_size"`
	// DurableQueues is amqp_durable_queues of the broker's other users: exchange
	// and queues outlive a restart of the broker.
	DurableQueues bool `yaml:"amqp_durable_queues"`
	// AutoDelete is amqp_auto_delete of the broker's other users: exchange and
	// queues end with the last of them.
	AutoDelete bool `yaml:"amqp_auto_delete"`
	// QueueArguments is what queues are declared with where they are not there yet,
	// such as {x-queue-type: quorum}.
	QueueArguments map[string]any `yaml:"queue_arguments"`
	// TelemetrySecretFile is a file with the secret that signs samples,
	// [publisher] telemetry_secret. Empty: what ceilometer_conf says, else the one
	// that Ceilometer has unless it is told another, which everybody knows. It is
	// read again whenever samples are sent.
	TelemetrySecretFile string `yaml:"telemetry_secret_file"`
	// TelemetrySecret is the secret where there is no file. Empty: samples are not
	// signed.
	TelemetrySecret string `yaml:"-"`
}

// DefaultConfig returns Ceilometer's defaults.
func DefaultConfig() Config {
	return Config{
		ControlExchange: wire.Exchange, Topics: []string{"notifications"}, BatchSize: 50,
		QueueArguments: map[string]any{}, TelemetrySecret: wire.DefaultSecret,
	}
}

// Check returns an error that names the first option with an impossible value.
func (c *Config) Check() error {
	switch {
	case c.ControlExchange == "":
		return errors.New("ceilometer.control_exchange is empty: Ceilometer's is ceilometer")
	case len(c.Topics) == 0:
		return errors.New("ceilometer.topics is empty: Ceilometer's is [notifications]")
	case c.BatchSize < 0:
		return fmt.Errorf("ceilometer.batch_size %d: must be at least 0", c.BatchSize)
	}
	if err := amqp.Table(c.QueueArguments).Validate(); err != nil {
		return fmt.Errorf("ceilometer.queue_arguments: %w", err)
	}
	_, err := c.secret()
	return err
}

func (c *Config) secret() (string, error) {
	if c.TelemetrySecretFile == "" {
		return c.TelemetrySecret, nil
	}
	secret, err := sample.ReadSecret(c.TelemetrySecretFile, 1)
	if err != nil {
		return "", fmt.Errorf("ceilometer.telemetry_secret_file: %w", err)
	}
	return string(secret), nil
}

// queues returns the queues of the topics, whose names are also the routing keys.
func (c *Config) queues() []string {
	queues := make([]string, len(c.Topics))
	for i, topic := range c.Topics {
		queues[i] = topic + ".sample"
	}
	return queues
}

// NewBus returns the broker that the samples go to, not connected yet.
func NewBus(cfg Config, amqp bus.Config, log *zap.Logger) (*bus.AMQP, error) {
	foreign := bus.Foreign{
		Exchange: cfg.ControlExchange, Queues: cfg.queues(), Durable: cfg.DurableQueues, AutoDelete: cfg.AutoDelete, Arguments: cfg.QueueArguments,
	}
	return bus.NewForeignAMQP(amqp, "kvmeter-agent", log, foreign.Declare)
}

// broker is what the publisher needs of [bus.AMQP].
type broker interface {
	bus.Publisher
	Ping(ctx context.Context) error
}

// Publisher publishes batches in Ceilometer's form. It implements
// [bus.Publisher]. Gaps have no form there.
type Publisher struct {
	cfg    Config
	log    *zap.Logger
	broker broker
	queues []string

	messages, samples, gaps, lost prometheus.Counter

	mu      sync.Mutex
	decoder *sample.Decoder
	writer  *wire.Writer
	secret  string          // of writer
	trouble string          // about the file of it, which was said
	sent    map[string]bool // messages of the call before that failed, which are taken
}

// New returns a publisher over a bus of [NewBus].
func New(cfg Config, b broker, log *zap.Logger, reg prometheus.Registerer) (*Publisher, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	secret, err := cfg.secret()
	if err != nil {
		return nil, err
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvmeter", Subsystem: "agent", Name: name, Help: help})
	}
	p := &Publisher{
		cfg: cfg, log: log, broker: b, queues: cfg.queues(), writer: wire.NewWriter(secret, ""), secret: secret, sent: map[string]bool{},
		messages: counter("ceilometer_messages_total", "With wire: ceilometer, messages that the broker has taken."),
		samples:  counter("ceilometer_samples_total", "With wire: ceilometer, samples that the broker has taken, once for all topics."),
		gaps:     counter("ceilometer_gaps_unsent_total", "With wire: ceilometer, gaps that were not sent, since Ceilometer has none."),
		lost:     counter("ceilometer_batches_lost_total", "With wire: ceilometer, batches from the spool that could not be read."),
	}
	if p.decoder, err = sample.NewDecoder(); err != nil {
		return nil, err
	}
	for _, c := range []prometheus.Counter{p.messages, p.samples, p.gaps, p.lost} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register self-metrics: %w", err)
		}
	}
	return p, nil
}

// Publish implements [bus.Publisher]. Batches that were taken before another one
// failed are not sent again with it.
func (p *Publisher) Publish(ctx context.Context, ms ...bus.Message) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.renew()
	for i := range ms {
		if p.sent[ms[i].ID] {
			continue
		}
		b, err := p.decoder.Decode(ms[i].Body)
		if err != nil { // it will never be better
			p.log.Error("batch lost: it cannot be read", zap.String("batch", ms[i].ID), zap.Error(err))
			p.lost.Inc()
			continue
		}
		if err := p.publish(ctx, b); err != nil {
			if errors.Is(err, bus.ErrUnroutable) { // somebody has deleted a queue
				err = errors.Join(err, p.broker.Ping(ctx))
			}
			return err
		}
		p.sent[ms[i].ID] = true
		p.gaps.Add(float64(len(b.Gaps)))
	}
	clear(p.sent)
	return nil
}

// renew takes a secret that has changed. While it can't be read the one before signs.
func (p *Publisher) renew() {
	secret, err := p.cfg.secret()
	if err != nil {
		if p.trouble != err.Error() {
			p.trouble = err.Error()
			p.log.Warn("the secret can't be read again; the one read before signs", zap.Error(err))
		}
		return
	}
	p.trouble = ""
	if secret != p.secret {
		p.secret, p.writer = secret, wire.NewWriter(secret, "")
		p.log.Info("the secret of ceilometer.telemetry_secret_file has changed")
	}
}

// Bounds of what is sent together: [sample.MaxDecoded] bounds a message.
const (
	maxMessages = 64
	maxPayload  = 4 << 20
	maxTogether = 16 << 20
)

// publish sends the samples of a batch.
func (p *Publisher) publish(ctx context.Context, b *sample.Batch) error {
	var ms []bus.Message
	var payload []byte
	n, bytes, samples, part := 0, 0, 0, 0
	send := func() error {
		if len(ms) == 0 {
			return nil
		}
		if err := p.broker.Publish(ctx, ms...); err != nil {
			return err
		}
		p.messages.Add(float64(len(ms)))
		p.samples.Add(float64(samples))
		ms, bytes, samples = ms[:0], 0, 0
		return nil
	}
	pack := func() {
		if n == 0 {
			return
		}
		payload = append(payload, "]}"...)
		for i := range p.queues {
			ms = append(ms, p.message(b, part, i, payload))
			bytes += len(ms[len(ms)-1].Body)
		}
		samples += n
		part++
		n = 0
	}
	for s := range b.Samples() {
		if n == 0 {
			payload = append(payload[:0], `{"samples": [`...)
		} else {
			payload = append(payload, ", "...)
		}
		payload = p.writer.Sample(payload, &s)
		if n++; n < p.cfg.BatchSize && len(payload) < maxPayload {
			continue
		}
		pack()
		if len(ms) >= maxMessages || bytes >= maxTogether {
			if err := send(); err != nil {
				return err
			}
		}
	}
	pack()
	return send()
}

// message makes a message of a part of a batch: the same one if it is made again.
func (p *Publisher) message(b *sample.Batch, part, queue int, payload []byte) bus.Message {
	sum := sha256.Sum256(fmt.Appendf(b.ID[:], " %d %s", part, p.queues[queue]))
	n := wire.Notification{
		Publisher: "ceilometer.polling", EventType: "telemetry.polling", Priority: "SAMPLE", Unique: [16]byte(sum[:16]), Time: time.UnixMicro(b.Base),
	}
	return bus.Message{
		Exchange: p.cfg.ControlExchange, RoutingKey: p.queues[queue], ID: n.UniqueID(),
		ContentType: wire.ContentType, ContentEncoding: wire.ContentEncoding, Time: n.Time,
		Body: n.Append(make([]byte, 0, len(payload)*5/4+1024), payload),
	}
}
