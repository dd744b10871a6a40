//go:build lab

package tier

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/sample"
)

var (
	notifications = flag.Int("notifications", 20_000, "how many are sent, of which every 100th is malformed")
	deaths        = flag.Int("deaths", 3, "how often the notifier is killed among them")
)

// TestEachNotificationIsStoredOnce kills the notifier among notifications of Nova
// and looks what a real store has: the samples and the event of each good one
// once, and of bad ones each is a dead letter.
func TestEachNotificationIsStoredOnce(t *testing.T) {
	r, b := broker(t, 0)
	s, err := local.Open(t.TempDir(), local.Options{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	registry := prometheus.NewRegistry()
	cfg := central.DefaultIngestConfig()
	cfg.Relays = []string{"a"}
	in, err := central.NewIngest(cfg, central.IngestDeps{Log: zap.NewNop(), Consumer: b, Store: s, Keys: keys, Registry: registry})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	defer func() { cancel(); running.Wait() }()
	running.Go(func() {
		if err := in.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	admin, err := amqp.Dial(r.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = admin.Close() }()
	queues, err := admin.Channel()
	if err != nil {
		t.Fatal(err)
	}
	countDead := func() int {
		q, err := queues.QueueDeclarePassive(bus.DeadLetterQueue, true, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		return q.Messages
	}
	dead := map[string]int{}
	listDead := func() int { // as `kvmeter dead-letters` does
		clear(dead)
		if err := b.DeadLetters(ctx, func(d *bus.DeadLetter) (bus.Fate, bool) { dead[string(d.Body)]++; return bus.Keep, true }); err != nil {
			t.Fatal(err)
		}
		return len(dead)
	}
	env := []string{"URL=" + r.URL(), "STAGES=0", "STATE=" + filepath.Join(t.TempDir(), "state")}
	p := start(t, "a", env...)
	defer func() { p.kill(t) }()
	nova := services(t, r.URL())
	body := captured(t)
	const id, instance = "10f3b7d3-21fa-417b-b4f9-18240f05b888", "5e1f0000-0000-4000-8000-00000000abcd"
	many, every := *notifications, 100
	sent := make(chan error, 1)
	began := time.Now()
	go func() {
		for i := range many {
			text := strings.NewReplacer(id, messageID(i), instance, fmt.Sprintf("instance-%d", i)).Replace(body)
			if i%every == every-1 {
				text = fmt.Sprintf("{%d", i)
			}
			err := nova.PublishWithContext(ctx, "nova", "notifications.info", false, false, amqp.Publishing{
				ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: 2, Body: []byte(text),
			})
			if err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	// By how far it has come, the dead letters tell, whatever the machine's speed.
	for death := range *deaths {
		want := (death + 1) * many / every / (*deaths + 1)
		until(t, countDead, func() bool { return countDead() >= want }, "dead letters")
		p.kill(t)
		p = start(t, "a", env...)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	until(t, countDead, func() bool { return countDead() >= many/every }, "dead letters")
	good := many - many/every
	until(t, counter(t, registry, "stored_events_total"), func() bool { return counter(t, registry, "stored_events_total")() >= good }, "events")
	// Those of one notification are in one batch.
	until(t, counter(t, registry, "stored_batches_total"), func() bool { return counter(t, registry, "stored_batches_total")() >= good }, "batches")
	samples, of := 0, map[string]int{}
	err = s.Samples(ctx, store.Filter{}, func(smp store.Sample) bool {
		samples++
		of[smp.Name]++
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range of {
		if n != good {
			t.Errorf("%d samples of %s, want %d", n, name, good)
		}
	}
	if len(of) != 4 { // memory, vcpus and two of disks
		t.Errorf("samples of %v", of)
	}
	seen := map[string]bool{}
	if err := s.Events(ctx, store.EventQuery{}, func(e sample.Event) bool { seen[e.ID] = true; return true }); err != nil {
		t.Fatal(err)
	}
	moved := countDead()
	until(t, countDead, func() bool { return listDead() >= many/every }, "dead letters")
	for i := range many {
		if bad := i%every == every-1; seen[messageID(i)] == bad {
			t.Fatalf("event %d is stored: %v", i, !bad)
		} else if bad {
			if n := dead[fmt.Sprintf("{%d", i)]; n != 1 {
				t.Errorf("bad notification %d is there %d times among the dead letters", i, n)
			}
		}
	}
	if len(dead) != many/every {
		t.Errorf("%d dead letters after %d deaths, want %d", len(dead), *deaths, many/every)
	}
	t.Logf("%d notifications, %d samples and %d events in %.0f s, killed %d times; %d dead letters, of which %d copies were deleted",
		many, samples, len(seen), time.Since(began).Seconds(), *deaths, len(dead), moved-len(dead))
}

// counter returns what reads a counter of central.
func counter(t *testing.T, r *prometheus.Registry, name string) func() int {
	return func() int {
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "kvmeter_central_"+name {
				return int(f.GetMetric()[0].GetCounter().GetValue())
			}
		}
		t.Fatalf("there is no counter %s", name)
		return 0
	}
}

func messageID(i int) string { return fmt.Sprintf("10f3b7d3-21fa-417b-b4f9-%012d", i) }

func captured(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "notifier", "conversion", "testdata", "compute.instance.exists.json"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// services waits until the notifier's queue is bound to Nova's exchange, and
// returns a channel to publish to that.
func services(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		ch, err := conn.Channel() // a queue that is missing closes it
		if err != nil {
			t.Fatal(err)
		}
		if q, err := ch.QueueDeclarePassive("kvmeter.notifications.info", true, false, false, false, nil); err == nil && q.Consumers > 0 {
			return ch
		}
		if time.Now().After(deadline) {
			t.Fatal("the notifier consumes no notifications")
		}
	}
}
