//go:build lab

package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/kvmeter/kvmeter/bus"
)

// settleDeadLetters has messages rejected, and kept, retried and dropped.
func settleDeadLetters(t *testing.T, url string) {
	b, _ := open(t, at(url))
	ch := empty(t, url)
	for i := range 3 {
		if err := b.Publish(t.Context(), bus.Message{RoutingKey: "samples.0", ID: fmt.Sprint("id", i), ContentType: "x", KeyID: "node", HMAC: "00", Time: time.Unix(1_800_000_000, 0), Body: []byte{byte(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := ch.Publish("kvmeter", "samples.0", true, false, amqp.Publishing{Body: []byte("nameless"), Headers: amqp.Table{"x": "y"}}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- b.Consume(ctx, queue, 10, func(_ context.Context, ds []*bus.Delivery) error {
			for _, d := range ds {
				d.Reject(errors.New("why " + d.ID))
			}
			return nil
		})
	}()
	dead := func(fates map[string]bus.Fate) (names []string) {
		t.Helper()
		if err := b.DeadLetters(t.Context(), func(d *bus.DeadLetter) (bus.Fate, bool) {
			names = append(names, d.Name)
			if d.Queue != queue || d.RoutingKey != "samples.0" && d.RoutingKey != queue || d.Reason != "why "+d.ID || d.Time.IsZero() && d.ID != "" {
				t.Errorf("dead letter %+v", d)
			}
			return fates[d.Name], true
		}); err != nil {
			t.Fatal(err)
		}
		return names
	}
	var all []string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline) && len(all) < 4; {
		all = dead(nil)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	// What a consumer leaves that dies between moving a message and acking it.
	for range 3 {
		if err := ch.Publish("kvmeter.dlx", "samples.0", true, false, amqp.Publishing{MessageId: "id1", Timestamp: time.Unix(1_800_000_000, 0), Body: []byte{1}, Headers: amqp.Table{
			"kvmeter-reason": "why id1", "kvmeter-queue": queue, "kvmeter-routing-key": "samples.0", "kvmeter-key-id": "node", "kvmeter-hmac": "00",
		}}); err != nil {
			t.Fatal(err)
		}
	}
	if len(all) != 4 || !slices.Equal(all[:3], []string{"id0", "id1", "id2"}) || len(all[3]) != 12 {
		t.Fatalf("dead letters %q", all)
	}
	sorted := slices.Sorted(slices.Values(all))
	// Looking at them many times costs none of them.
	for range 25 {
		got := dead(nil)
		if slices.Sort(got); !slices.Equal(got, sorted) {
			t.Fatalf("dead letters %q, want %q", got, sorted)
		}
	}
	eventually(t, "the copies of one are gone", func() bool {
		q, err := ch.QueueDeclarePassive(bus.DeadLetterQueue, true, false, false, false, nil)
		return err == nil && q.Messages == 4
	})
	dead(map[string]bus.Fate{"id0": bus.Drop, "id1": bus.Retry, all[3]: bus.Retry})
	if got := dead(nil); !slices.Equal(got, []string{"id2"}) {
		t.Errorf("dead letters %q, want the one that was kept", got)
	}
	// One that is refused again is no copy of what it was before.
	ctx, stop = context.WithCancel(t.Context())
	go func() {
		ended <- b.Consume(ctx, queue, 10, func(_ context.Context, ds []*bus.Delivery) error {
			for _, d := range ds {
				if d.ID == "id1" {
					d.Reject(errors.New("why id1"))
				}
			}
			return nil
		})
	}()
	eventually(t, "it is a dead letter again", func() bool { return slices.Contains(dead(nil), "id1") })
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	dead(map[string]bus.Fate{"id1": bus.Retry})
	back := make(chan bus.Message, 2)
	consume(t, b, queue, 10, func(_ context.Context, ds []*bus.Delivery) error {
		for _, d := range ds {
			back <- d.Message
			d.Ack()
		}
		return nil
	})
	for range 2 {
		select {
		case m := <-back:
			if m.ID == "id1" && (m.KeyID != "node" || m.HMAC != "00" || m.RoutingKey != queue) || m.ID != "id1" && string(m.Body) != "nameless" {
				t.Errorf("retried %+v", m)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a message that was retried does not come")
		}
	}
}
