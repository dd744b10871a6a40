package kafka

import (
	"context"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

func open(t *testing.T, text string) publisher.Publisher {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop(), TelemetrySecret: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func someSamples() []publisher.Part {
	b := sample.NewBuilder()
	for _, r := range []string{"a", "b"} {
		b.Row(sample.Row{Resource: r, Source: "openstack", Metadata: []byte(`{"x": 1}`)})
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<64-1))
	}
	return []publisher.Part{{Batch: b.Build()}}
}

func TestEachSampleAndEventIsADocument(t *testing.T) {
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(2, "telemetry"))
	if err != nil {
		t.Fatal(err)
	}
	defer cluster.Close()
	p := open(t, "kafka://"+strings.Join(cluster.ListenAddrs(), ",")+"?topic=telemetry&policy=queue")
	if err := p.Publish(t.Context(), someSamples()); err != nil {
		t.Fatal(err)
	}
	if err := p.(publisher.EventPublisher).PublishEvents(t.Context(), []sample.Event{{ID: "m", Type: "e"}}); err != nil {
		t.Fatal(err)
	}
	reader, err := kgo.NewClient(kgo.SeedBrokers(cluster.ListenAddrs()...), kgo.ConsumeTopics("telemetry"))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var got []string
	for len(got) < 3 {
		fetches := reader.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			t.Fatalf("got %v, %v", got, err)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			var m struct {
				Name      string      `json:"counter_name"`
				Volume    json.Number `json:"counter_volume"`
				Resource  string      `json:"resource_id"`
				Type      string      `json:"event_type"`
				Signature string      `json:"message_signature"`
			}
			if err := json.Unmarshal(r.Value, &m); err != nil || m.Signature != ceilometer.Signature(r.Value, "secret") {
				t.Errorf("got %s, %v", r.Value, err)
			}
			got = append(got, strings.TrimSpace(string(r.Key)+" "+m.Name+" "+m.Volume.String()+" "+m.Resource+m.Type))
		})
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"a cpu 18446744073709551615 a", "b cpu 18446744073709551615 b", "e   e"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestABrokerThatIsAwayIsAnErrorInTime(t *testing.T) {
	p := open(t, "kafka://127.0.0.1:1")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if err := p.Publish(ctx, someSamples()); err == nil || time.Since(begin) > 5*time.Second {
		t.Errorf("got %v after %v", err, time.Since(begin))
	}
	u, err := url.Parse("kafka://?topic=x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(u, publisher.Deps{Log: zap.NewNop()}); err == nil || !strings.Contains(err.Error(), "it needs a host") {
		t.Errorf("without a host: %v", err)
	}
}
