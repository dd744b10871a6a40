// Package kafka sends samples and events to Kafka, each as a JSON document in
// the form of Ceilometer's bus, signed.
//
//	kafka://host[:9092][,host…]?topic=ceilometer&policy=default&max_queue_length=1024&max_retry=100
//
// They are keyed by resource, events by their type, so that what belongs together
// stays in order, and taken once all replicas in sync have them.
package kafka

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

type kafka struct {
	client *kgo.Client
	topic  string

	mu  sync.Mutex
	bus *ceilometer.Writer
}

// New returns the publisher of a URL. It connects when it has something to send.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	o := publisher.NewOptions(u)
	publisher.PolicyOf(o) // the notifier's spool keeps to it
	topic := o.Text("topic", "ceilometer")
	if err := o.Done(d.Log); err != nil {
		return nil, err
	}
	if u.Host == "" {
		return nil, errors.New("it needs a host, as in kafka://host:9092?topic=ceilometer")
	}
	var seeds []string
	for host := range strings.SplitSeq(u.Host, ",") {
		if !strings.Contains(host, ":") {
			host += ":9092"
		}
		seeds = append(seeds, host)
	}
	client, err := kgo.NewClient(kgo.SeedBrokers(seeds...), kgo.ClientID("kvmeter"), kgo.RequiredAcks(kgo.AllISRAcks()))
	if err != nil {
		return nil, err
	}
	return &kafka{client: client, topic: topic, bus: ceilometer.NewWriter(d.TelemetrySecret, "")}, nil
}

// Publish sends the samples of all parts.
func (k *kafka) Publish(ctx context.Context, parts []publisher.Part) error {
	var records []*kgo.Record
	k.mu.Lock()
	for i := range parts {
		for s := range parts[i].Batch.Samples() {
			records = append(records, &kgo.Record{Topic: k.topic, Key: []byte(s.Resource), Value: k.bus.Sample(nil, &s)})
		}
	}
	k.mu.Unlock()
	return k.send(ctx, records)
}

// PublishEvents sends events.
func (k *kafka) PublishEvents(ctx context.Context, events []sample.Event) error {
	var records []*kgo.Record
	k.mu.Lock()
	for i := range events {
		records = append(records, &kgo.Record{Topic: k.topic, Key: []byte(events[i].Type), Value: k.bus.Event(nil, &events[i])})
	}
	k.mu.Unlock()
	return k.send(ctx, records)
}

func (k *kafka) send(ctx context.Context, records []*kgo.Record) error {
	if err := k.client.ProduceSync(ctx, records...).FirstErr(); err != nil {
		return fmt.Errorf("produce to %s: %w", k.topic, err)
	}
	return nil
}

// Close ends the connections.
func (k *kafka) Close() error {
	k.client.Close()
	return nil
}
