// Package notifier sends samples and events to RabbitMQ as Ceilometer does: as
// notifications of oslo.messaging, or, until Liberty, as RPC casts.
//
//	notifier://[user:password@host[:port]/[vhost]]?topic=metering&per_meter_topic=0&policy=default&max_queue_length=1024&max_retry=100
//	rpc://…?topic=metering&target=record_metering_data&policy=…
//
// Without a host it is the broker that the notifier itself uses. Messages are
// persistent, and taken when the broker has confirmed them, under every policy.
package notifier

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// Event types of the notifications, which are also the topics unless the URL
// names others.
const (
	samplesType = "metering"
	eventsType  = "event"
)

type notifier struct {
	bus         *bus.AMQP
	rpc         bool
	topics      []string // of samples
	eventTopics []string
	perMeter    bool
	target      string // the method of a cast
	name        string // publisher_id

	mu   sync.Mutex
	wire *ceilometer.Writer
}

// New returns the publisher of notifier://.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) { return open(u, d, false) }

// NewRPC returns the publisher of rpc://.
func NewRPC(u *url.URL, d publisher.Deps) (publisher.Publisher, error) { return open(u, d, true) }

// RPCURL returns that of rpc:// for meter://, as it was called, too.
func RPCURL(u *url.URL) (*url.URL, error) {
	to := *u
	to.Scheme = "rpc"
	return &to, nil
}

// Check says what is wrong with a URL of notifier:// or rpc://.
func Check(u *url.URL, d publisher.Deps) error {
	_, _, _, err := parse(u, d, false)
	return err
}

func open(u *url.URL, d publisher.Deps, rpc bool) (publisher.Publisher, error) {
	n, cfg, foreign, err := parse(u, d, rpc)
	if err != nil {
		return nil, err
	}
	n.bus, err = bus.NewForeignAMQP(cfg, "kvmeter "+u.Scheme+"://", d.Log, foreign.Declare)
	if err != nil {
		return nil, err
	}
	return n, nil
}

// parse returns the publisher of a URL without its connection, the broker that is
// meant, and what is to be declared there.
func parse(u *url.URL, d publisher.Deps, rpc bool) (*notifier, bus.Config, bus.Foreign, error) {
	o := publisher.NewOptions(u)
	topics := o.All("topic")
	n := &notifier{
		rpc: rpc, topics: topics, eventTopics: topics, perMeter: o.Bool("per_meter_topic", false),
		target: o.Text("target", "record_metering_data"), name: "telemetry.publisher." + d.Name, wire: ceilometer.NewWriter(d.TelemetrySecret, ""),
	}
	if len(topics) == 0 {
		n.topics, n.eventTopics = []string{samplesType}, []string{eventsType}
	}
	publisher.PolicyOf(o) // the notifier's spool keeps to it
	cfg := d.AMQP
	switch driver := o.Text("driver", "rabbit"); {
	case u.Host == "":
	case driver != "rabbit" && driver != "amqp" && driver != "kombu":
		return nil, cfg, bus.Foreign{}, fmt.Errorf("option driver: %q is not supported; rabbit is", driver)
	default:
		scheme := "amqp"
		if o.Bool("ssl", false) {
			scheme = "amqps"
		}
		cfg = cfg.At((&url.URL{Scheme: scheme, User: u.User, Host: u.Host, Path: u.Path}).String())
	}
	durable, autoDelete := o.Bool("amqp_durable_queues", false), o.Bool("amqp_auto_delete", false)
	if err := o.Done(d.Log); err != nil {
		return nil, cfg, bus.Foreign{}, err
	}
	var queues []string
	for _, topic := range append(append([]string{}, n.topics...), n.eventTopics...) {
		queues = append(queues, n.queue(topic))
	}
	return n, cfg, bus.Foreign{Exchange: ceilometer.Exchange, Queues: queues, Durable: durable, AutoDelete: autoDelete}, nil
}

// queue returns the queue of a topic, which is also its routing key. Samples
// and events are notifications of the priority "sample".
func (n *notifier) queue(topic string) string {
	if n.rpc {
		return topic
	}
	return topic + ".sample"
}

// Publish sends a message for each part and topic.
func (n *notifier) Publish(ctx context.Context, parts []publisher.Part) error {
	var ms []bus.Message
	for i := range parts {
		ms = append(ms, n.samples(parts[i].Batch)...)
	}
	if len(ms) == 0 {
		return nil
	}
	return n.bus.Publish(ctx, ms...)
}

func (n *notifier) samples(b *sample.Batch) (ms []bus.Message) {
	if b.Len() == 0 {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	payload := []byte{'['}
	var meters []string
	perMeter := map[string][]byte{}
	for s := range b.Samples() {
		if len(payload) > 1 {
			payload = append(payload, ", "...)
		}
		start := len(payload)
		payload = n.wire.Sample(payload, &s)
		if !n.perMeter {
			continue
		}
		own, ok := perMeter[s.Name]
		if ok {
			own = append(own, ", "...)
		} else {
			meters = append(meters, s.Name)
			own = []byte{'['}
		}
		perMeter[s.Name] = append(own, payload[start:]...)
	}
	slices.Sort(meters)
	for _, topic := range n.topics {
		ms = append(ms, n.message(topic, samplesType, append(payload, ']')))
		for _, m := range meters {
			ms = append(ms, n.message(topic, samplesType+"."+m, append(perMeter[m], ']')))
		}
	}
	return ms
}

// PublishEvents sends a message for each topic.
func (n *notifier) PublishEvents(ctx context.Context, events []sample.Event) error {
	if len(events) == 0 {
		return nil
	}
	n.mu.Lock()
	payload := []byte{'['}
	for i := range events {
		if i > 0 {
			payload = append(payload, ", "...)
		}
		payload = n.wire.Event(payload, &events[i])
	}
	n.mu.Unlock()
	payload = append(payload, ']')
	var ms []bus.Message
	for _, topic := range n.eventTopics {
		ms = append(ms, n.message(topic, eventsType, payload))
	}
	return n.bus.Publish(ctx, ms...)
}

// message wraps a payload as oslo.messaging does.
func (n *notifier) message(topic, eventType string, payload []byte) bus.Message {
	o := ceilometer.Notification{Publisher: n.name, EventType: eventType, Priority: "SAMPLE", Time: time.Now()}
	_, _ = rand.Read(o.Unique[:]) // never fails: crypto/rand ends the program instead
	m := bus.Message{
		Exchange: ceilometer.Exchange, RoutingKey: n.queue(topic), ID: o.UniqueID(),
		ContentType: ceilometer.ContentType, ContentEncoding: ceilometer.ContentEncoding, Time: o.Time,
	}
	if !n.rpc {
		m.Body = o.Append(nil, payload)
		return m
	}
	cast := sample.AppendText([]byte(`{"method": `), n.target)
	cast = append(append(append(cast, `, "args": {"data": `...), payload...), `}, "version": "1.0", "_unique_id": `...)
	m.Body = ceilometer.Envelope(nil, append(sample.AppendText(cast, m.ID), '}'))
	return m
}

// Close ends the connection.
func (n *notifier) Close() error {
	n.bus.Close()
	return nil
}
