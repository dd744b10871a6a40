//go:build lab

package notifier

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestMessagesAreCeilometers reads from a real broker what a Ceilometer
// collector or notification agent would read.
func TestMessagesAreCeilometers(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := amqp.Dial(broker.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	// Somebody has made one of the queues already, and otherwise.
	if _, err := ch.QueueDeclare("metering.sample", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	own, _ := strings.CutPrefix(broker.URL(), "amqp://")
	deps := publisher.Deps{
		Log: zap.NewNop(), Name: "node1", TelemetrySecret: "secret", AMQP: bus.Config{URL: broker.URL()},
	}
	publish := func(text string, f func(publisher.Publisher) error) {
		t.Helper()
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		open := New
		if u.Scheme == "rpc" {
			open = NewRPC
		}
		p, err := open(u, deps)
		if err != nil {
			t.Fatal(err)
		}
		if err := f(p); err != nil {
			t.Error(err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r", Source: "openstack", User: "u", Metadata: []byte(`{"a":["é"]}`)})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<64-1))
	b.Add(sample.MeterRef{Name: "memory", Kind: sample.Gauge, Unit: "MB"}, sample.Libvirt, sample.Float(1))
	batch := b.Build()
	batch.ID = sample.NewBatchID(time.UnixMilli(1))
	samples := func(p publisher.Publisher) error {
		return p.Publish(t.Context(), []publisher.Part{{From: batch, Batch: batch}})
	}
	events := func(p publisher.Publisher) error {
		return p.(publisher.EventPublisher).PublishEvents(t.Context(), []sample.Event{{ID: "m", Type: "compute.x", Traits: []sample.Trait{{Name: "t", Type: sample.TextTrait, Text: "v"}}}})
	}
	publish("notifier://", samples)
	publish("notifier://"+own+"?per_meter_topic=1&topic=a&topic=b&policy=queue", samples)
	publish("notifier://", events)
	publish("rpc://", samples)

	get := func(queue string) (amqp.Delivery, map[string]json.RawMessage) {
		t.Helper()
		d, ok, err := ch.Get(queue, true)
		if err != nil || !ok {
			t.Fatalf("no message in %s, %v", queue, err)
		}
		if d.ContentType != "application/json" || d.ContentEncoding != "utf-8" || d.DeliveryMode != 2 || d.Exchange != "ceilometer" || d.RoutingKey != queue || len(d.Headers) > 0 {
			t.Errorf("properties %+v", d)
		}
		var envelope map[string]string
		if err := json.Unmarshal(d.Body, &envelope); err != nil || envelope["oslo.version"] != "2.0" || len(envelope) != 2 {
			t.Fatalf("envelope %s, %v", d.Body, err)
		}
		var inner map[string]json.RawMessage
		if err := json.Unmarshal([]byte(envelope["oslo.message"]), &inner); err != nil {
			t.Fatalf("message %s, %v", envelope["oslo.message"], err)
		}
		return d, inner
	}
	want := []string{
		`{"source": "openstack", "counter_name": "cpu", "counter_type": "cumulative", "counter_unit": "ns", "counter_volume": 18446744073709551615, "user_id": "u", "user_name": null, "project_id": null, "project_name": null, "resource_id": "r", "timestamp": "1970-01-01T00:00:00", "resource_metadata": {"a": ["\u00e9"]}, "message_id": "` + batch.SampleID(0).String() + `", "monotonic_time": null, "message_signature": "`,
		`{"source": "openstack", "counter_name": "memory", "counter_type": "gauge", "counter_unit": "MB", "counter_volume": 1.0, "user_id": "u", "user_name": null, "project_id": null, "project_name": null, "resource_id": "r", "timestamp": "1970-01-01T00:00:00", "resource_metadata": {"a": ["\u00e9"]}, "message_id": "` + batch.SampleID(1).String() + `", "monotonic_time": null, "message_signature": "`,
	}
	check := func(payload json.RawMessage, want ...string) {
		t.Helper()
		var got []json.RawMessage
		if err := json.Unmarshal(payload, &got); err != nil || len(got) != len(want) {
			t.Fatalf("payload %s, %v", payload, err)
		}
		for i, s := range got {
			if signature := ceilometer.Signature(s, "secret"); string(s) != want[i]+signature+`"}` {
				t.Errorf("got  %s\nwant %s%s", s, want[i], signature)
			}
		}
	}
	keys := func(m map[string]json.RawMessage) (all []string) {
		for _, k := range []string{"message_id", "publisher_id", "event_type", "priority", "payload", "timestamp", "_unique_id", "method", "args", "version"} {
			if _, ok := m[k]; ok {
				all = append(all, k)
			}
		}
		if len(all) != len(m) {
			t.Errorf("keys %v of %v", all, m)
		}
		return all
	}
	notification := []string{"message_id", "publisher_id", "event_type", "priority", "payload", "timestamp", "_unique_id"}
	_, m := get("metering.sample")
	if diff := cmp.Diff(notification, keys(m)); diff != "" || string(m["publisher_id"]) != `"telemetry.publisher.node1"` || string(m["event_type"]) != `"metering"` || string(m["priority"]) != `"SAMPLE"` {
		t.Errorf("got %s %s %s, keys %s", m["publisher_id"], m["event_type"], m["priority"], diff)
	}
	check(m["payload"], want...)
	for _, topic := range []string{"a", "b"} {
		for _, part := range []struct {
			event string
			want  []string
		}{{"metering", want}, {"metering.cpu", want[:1]}, {"metering.memory", want[1:]}} {
			_, m := get(topic + ".sample")
			if string(m["event_type"]) != `"`+part.event+`"` {
				t.Errorf("event type %s, want %s", m["event_type"], part.event)
			}
			check(m["payload"], part.want...)
		}
	}
	_, m = get("event.sample")
	check(m["payload"], `{"message_id": "m", "event_type": "compute.x", "generated": "1970-01-01T00:00:00", "traits": [["t", 1, "v"]], "raw": {}, "message_signature": "`)
	_, m = get("metering")
	if diff := cmp.Diff([]string{"_unique_id", "method", "args", "version"}, keys(m)); diff != "" || string(m["method"]) != `"record_metering_data"` || string(m["version"]) != `"1.0"` {
		t.Errorf("cast %s, keys %s", m["method"], diff)
	}
	var args struct{ Data json.RawMessage }
	if err := json.Unmarshal(m["args"], &args); err != nil {
		t.Fatal(err)
	}
	check(args.Data, want...)
}
