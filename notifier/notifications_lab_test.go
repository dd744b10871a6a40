//go:build lab

package notifier_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestNotificationsOfARealBroker publishes as Nova does, to an exchange and a
// queue that it made, beside a Ceilometer that reads that queue: nothing is taken
// from there, and each notification is stored or a dead letter.
func TestNotificationsOfARealBroker(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	conn, nova := services091(t, broker.URL())

	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline, cfg.EventPipeline, cfg.Notifications.Enabled = "notifier-1", "", "", true
	cfg.Notifications.Exchanges = []string{"nova", "glance"}
	n, err := notifier.New(cfg, notifier.Deps{
		Log: zap.NewNop(), Consumer: b, Publisher: b, Keys: keys, Publishers: all.Publishers, Subscribers: []bus.Subscriber{b},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := n.Run(ctx); err != nil {
			t.Error(err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	defer func() { cancel(); running.Wait() }()

	var mu sync.Mutex
	stored, dead := map[string]int{}, map[string]int{}
	count := func(queue string, into func(*bus.Delivery)) {
		running.Go(func() {
			err := b.Consume(ctx, queue, 100, func(_ context.Context, ds []*bus.Delivery) error {
				mu.Lock()
				defer mu.Unlock()
				for _, d := range ds {
					into(d)
					d.Ack()
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	count(bus.StoreQueue(0), func(d *bus.Delivery) { stored[d.ID]++ })
	count(bus.DeadLetterQueue, func(d *bus.Delivery) { dead[string(d.Body)]++ })

	waitForQueue(t, conn, "kvmeter.notifications.info")
	const many, every = 500, 100
	body := string(captured(t, "compute.instance.exists.json"))
	for i := range many {
		text := strings.Replace(body, "10f3b7d3-21fa-417b-b4f9-18240f05b888", messageID(i), 1)
		if i%every == every-1 {
			text = fmt.Sprintf("{%d", i)
		}
		publish091(t, nova, "nova", "notifications.info", text)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		mu.Lock()
		done := len(stored) >= many-many/every && len(dead) >= many/every
		mu.Unlock()
		if done {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d stored and %d dead letters of %d", len(stored), len(dead), many)
		}
		time.Sleep(10 * time.Millisecond)
	}
	mu.Lock()
	defer mu.Unlock()
	for id, n := range stored {
		if n != 1 {
			t.Errorf("%s stored %d times", id, n)
		}
	}
	for text, n := range dead {
		if n != 1 {
			t.Errorf("%s is %d dead letters", text, n)
		}
	}
	if len(stored) != many-many/every || len(dead) != many/every {
		t.Errorf("%d stored and %d dead letters of %d", len(stored), len(dead), many)
	}
	q, err := nova.QueueDeclarePassive("notifications.info", false, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if q.Messages != many {
		t.Errorf("Ceilometer's queue has %d messages left, want %d", q.Messages, many)
	}
}

// TestANotifierKilledAmongNotificationsLosesNone kills it right after it has
// published and before anything is acked. Every good notification's samples reach
// the store's queue under one id, however often, its event is in the file, and
// every bad one is a dead letter.
func TestANotifierKilledAmongNotificationsLosesNone(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	conn, nova := services091(t, broker.URL())
	events := filepath.Join(t.TempDir(), "events")
	env := []string{
		"URL=" + broker.URL(), "PIPELINE=" + write(t, twoPipelines),
		"EVENTS=" + write(t, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+events+"?json']}]"),
	}
	declare(t, b, broker.URL(), "kvmeter.notifications.info")
	const many, every = 300, 100
	body := string(captured(t, "compute.instance.exists.json"))
	for i := range many {
		text := strings.Replace(body, "10f3b7d3-21fa-417b-b4f9-18240f05b888", messageID(i), 1)
		if i%every == every-1 {
			text = fmt.Sprintf("{%d", i)
		}
		publish091(t, nova, "nova", "notifications.info", text)
	}
	for lives := 1; lives <= 5; lives++ {
		child(t, lives, env...)
	}
	child(t, 0, env...)
	stored, dead := map[string]int{}, map[string]int{}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	drain := func(queue string, want int, key func(*bus.Delivery) string, into map[string]int) {
		ctx, cancel := context.WithCancel(ctx)
		err := b.Consume(ctx, queue, 100, func(_ context.Context, ds []*bus.Delivery) error {
			for _, d := range ds {
				into[key(d)]++
				d.Ack()
			}
			if len(into) >= want {
				cancel()
			}
			return nil
		})
		cancel()
		if err != nil {
			t.Error(err)
		}
	}
	const good = many - many/every
	drain(bus.StoreQueue(0), good, func(d *bus.Delivery) string { return d.ID }, stored)
	drain(bus.DeadLetterQueue, many/every, func(d *bus.Delivery) string { return string(d.Body) }, dead)
	if len(stored) != good || len(dead) != many/every {
		t.Errorf("%d stored and %d dead letters, want %d and %d", len(stored), len(dead), good, many/every)
	}
	text, err := os.ReadFile(events)
	if err != nil {
		t.Fatal(err)
	}
	for i := range many {
		if got := strings.Contains(string(text), messageID(i)); got == (i%every == every-1) {
			t.Errorf("event %d is in the file: %v", i, got)
		}
	}
	waitForQueue(t, conn, "kvmeter.notifications.info")
}

func messageID(i int) string { return fmt.Sprintf("10f3b7d3-21fa-417b-b4f9-%012d", i) }

// declare makes a queue of notifications, as a notifier that ends at once.
func declare(t *testing.T, b *bus.AMQP, url, queue string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := bus.Subscription{Queue: queue, Exchanges: []string{"nova"}, Keys: []string{strings.TrimPrefix(queue, "kvmeter.")}}
	ended := make(chan error, 1)
	go func() {
		ended <- b.Subscribe(ctx, s, 1, func(context.Context, []*bus.Delivery) error { return nil })
	}()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	waitForQueue(t, conn, queue)
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// TestTakingOverEmptiesCeilometersQueue takes what waits in the queue that Nova
// made, and makes those that are missing.
func TestTakingOverEmptiesCeilometersQueue(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	conn, nova := services091(t, broker.URL())
	for i := range 10 {
		publish091(t, nova, "nova", "notifications.info", fmt.Sprint(i))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	got := 0
	err = b.Subscribe(ctx, bus.Subscription{
		Queue: "notifications.info", Exchanges: []string{"nova", "glance"}, Keys: []string{"notifications.info"}, Theirs: true,
	}, 100, func(_ context.Context, ds []*bus.Delivery) error {
		for _, d := range ds {
			got++
			d.Ack()
		}
		if got == 10 {
			publish091(t, nova, "glance", "notifications.info", "from the exchange that was missing")
		}
		if got == 11 {
			cancel()
		}
		return nil
	})
	if err != nil || got != 11 {
		t.Errorf("%d messages, %v", got, err)
	}
	if n := queued(t, conn, "notifications.info"); n != 0 {
		t.Errorf("%d messages are left", n)
	}
}

// services091 makes what Nova makes.
func services091(t testing.TB, url string) (*amqp.Connection, *amqp.Channel) {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.ExchangeDeclare("nova", "topic", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := ch.QueueDeclare("notifications.info", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := ch.QueueBind("notifications.info", "notifications.info", "nova", false, nil); err != nil {
		t.Fatal(err)
	}
	return conn, ch
}

func publish091(t testing.TB, ch *amqp.Channel, exchange, key, body string) {
	t.Helper()
	err := ch.PublishWithContext(context.Background(), exchange, key, false, false, amqp.Publishing{
		ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: 2, Body: []byte(body),
	})
	if err != nil {
		t.Fatal(err)
	}
}

// waitForQueue waits until a queue has a consumer.
func waitForQueue(t testing.TB, conn *amqp.Connection, name string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		ch, err := conn.Channel() // a queue that is missing closes it
		if err != nil {
			t.Fatal(err)
		}
		if q, err := ch.QueueDeclarePassive(name, true, false, false, false, nil); err == nil {
			_ = ch.Close()
			if q.Consumers > 0 {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("nobody consumes %s", name)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// BenchmarkNotifications takes notifications of Nova, as they were captured, from
// a real broker, converts them by what kvmeter brings and writes samples and
// events to files. It tells the CPU time of the notifier's process a notification.
func BenchmarkNotifications(b *testing.B) {
	l, err := lab.New(b.TempDir(), lab.Options{Log: zap.NewNop()})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	broker, err := l.RabbitMQ(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	client, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, "bench", zap.NewNop())
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	dir := b.TempDir()
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Notifications.Enabled, cfg.Notifications.Exchanges = "notifier-1", true, []string{"nova"}
	cfg.Pipeline = write(b, "sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+dir+"/samples?json']}]")
	cfg.EventPipeline = write(b, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+dir+"/events?json']}]")
	run := func() (stop func()) {
		n, err := notifier.New(cfg, notifier.Deps{
			Log: zap.NewNop(), Consumer: client, Publisher: client, Keys: keys, Publishers: all.Publishers, Subscribers: []bus.Subscriber{client},
		})
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { _ = n.Run(ctx) })
		return func() { cancel(); running.Wait(); _ = n.Close() }
	}
	conn, nova := services091(b, broker.URL())
	stop := run() // makes the queues
	waitForQueue(b, conn, "kvmeter.notifications.info")
	stop()
	var bodies []string
	for _, name := range []string{"create.end", "exists", "update"} {
		bodies = append(bodies, string(captured(b, "compute.instance."+name+".json")))
	}
	const many = 15_000
	for b.Loop() {
		b.StopTimer()
		for i := range many {
			publish091(b, nova, "nova", "notifications.info", bodies[i%len(bodies)])
		}
		for queued(b, conn, "kvmeter.notifications.info") < many {
			time.Sleep(50 * time.Millisecond)
		}
		before := cpu(b)
		b.StartTimer()
		stop := run()
		for queued(b, conn, "kvmeter.notifications.info") > 0 {
			time.Sleep(50 * time.Millisecond)
		}
		stop()
		b.ReportMetric(float64((cpu(b)-before).Microseconds())/many, "cpu-µs/notification")
	}
}

// queued returns how many messages a queue of ours has that are not acked.
func queued(t testing.TB, conn *amqp.Connection, name string) int {
	t.Helper()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ch.Close() }()
	q, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return q.Messages
}
