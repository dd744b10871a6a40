//go:build lab

package notifier_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

const twoPipelines = `
sources:
- {name: whole, meters: ["*"], sinks: [k]}
- {name: part, meters: ["network.*"], sinks: [k]}
sinks: [{name: k, publishers: ["store://"]}]`

func TestMain(m *testing.M) {
	if os.Getenv("NOTIFIER_TEST_CHILD") != "" {
		runNotifier()
		return
	}
	goleak.VerifyTestMain(m)
}

// mortal is a bus that dies, with its process, right after it has published for
// the nth time: when the store's queue has the batches and nothing is acked yet.
type mortal struct {
	bus.Publisher
	mu   sync.Mutex
	left int
}

func (m *mortal) Publish(ctx context.Context, ms ...bus.Message) error {
	err := m.Publisher.Publish(ctx, ms...)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left--; m.left == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	return err
}

// runNotifier is the notifier as a process of its own.
func runNotifier() {
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline, cfg.Prefetch = "notifier-1", os.Getenv("PIPELINE"), 5
	b, err := bus.NewAMQP(bus.Config{URL: os.Getenv("URL")}, "notifier", zap.NewExample())
	if err != nil {
		panic(err)
	}
	lives, _ := strconv.Atoi(os.Getenv("PUBLISHES"))
	cfg.EventPipeline = os.Getenv("EVENTS")
	cfg.Notifications.Enabled, cfg.Notifications.Exchanges, cfg.Notifications.Prefetch = cfg.EventPipeline != "", []string{"nova"}, cfg.Prefetch
	n, err := notifier.New(cfg, notifier.Deps{
		Log: zap.NewExample(), Consumer: b, Publisher: &mortal{Publisher: b, left: lives}, Keys: keys, Publishers: all.Publishers,
		Subscribers: []bus.Subscriber{b},
	})
	if err != nil {
		panic(err)
	}
	panic(n.Run(context.Background()))
}

func TestANotifierKilledBetweenPublishAndAckCostsOnlyDuplicates(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	pipeline := write(t, twoPipelines)

	// The store's end: it remembers every message by its id.
	var mu sync.Mutex
	got := map[string][]bus.Message{}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- b.Consume(ctx, bus.StoreQueue(0), 100, func(_ context.Context, ds []*bus.Delivery) error {
			mu.Lock()
			defer mu.Unlock()
			for _, d := range ds {
				got[d.ID] = append(got[d.ID], d.Message)
				d.Ack()
			}
			return nil
		})
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()

	const batches = 200
	want := map[string]bool{}
	var ms []bus.Message
	for seq := range uint64(batches) {
		in := batch(seq)
		ms = append(ms, sealed(t, in))
		want[in.ID.String()], want[sample.DeriveBatchID(in.ID, "part:k").String()] = true, true
	}
	if err := b.Publish(t.Context(), ms...); err != nil {
		t.Fatal(err)
	}
	deaths := 0
	for lives := 1; ; lives++ {
		if deaths == 6 {
			lives = 0 // the last one stays alive
		}
		if child(t, lives, "URL="+broker.URL(), "PIPELINE="+pipeline); lives == 0 {
			break
		}
		deaths++
	}
	deadline := time.Now().Add(60 * time.Second)
	for {
		mu.Lock()
		n := len(got)
		mu.Unlock()
		if n >= len(want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d messages reached the store", n, len(want))
		}
		time.Sleep(10 * time.Millisecond)
	}
	mu.Lock()
	defer mu.Unlock()
	duplicates := 0
	for id, ms := range got {
		if !want[id] {
			t.Errorf("message %s was never sent", id)
		}
		for _, m := range ms[1:] {
			duplicates++
			if !bytes.Equal(m.Body, ms[0].Body) || m.HMAC != ms[0].HMAC || m.RoutingKey != ms[0].RoutingKey {
				t.Errorf("message %s came twice and differs", id)
			}
		}
		open(t, ms[0])
	}
	t.Logf("%d batches, killed %d times: %d messages, and %d of them again", batches, deaths, len(got), duplicates)
	if duplicates == 0 {
		t.Error("no duplicates: it was not killed between publish and ack")
	}
}

// TestEventsOfABatchThatIsDeliveredAgainAreTheSame kills notifiers that have
// published a batch and not acked it.
func TestEventsOfABatchThatIsDeliveredAgainAreTheSame(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	in := hardware()
	if err := b.Publish(t.Context(), sealed(t, in)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "events")
	events := write(t, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+file+"?json']}]")
	for _, lives := range []int{1, 1, 1, 1, 1, 0} { // a kill may come before the events are written, but not each
		child(t, lives, "URL="+broker.URL(), "PIPELINE=", "EVENTS="+events)
	}
	got := map[string]int{}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		clear(got)
		for line := range bytes.Lines(data) {
			var e struct {
				ID string `json:"message_id"`
			}
			if json.Unmarshal(line, &e) == nil { // a kill may leave a part of a line
				got[e.ID]++
			}
		}
		if len(got) == 3 && got[in.ID.Sample(0).String()] > 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("events by id %v after 30 s, want three ids, delivered again", got)
		}
	}
	for i := range 3 {
		if id := in.ID.Sample(i).String(); got[id] == 0 {
			t.Errorf("events by id %v, want one with %s", got, id)
		}
	}
}

// child starts a notifier as a process of its own. It dies after it has published
// so many times, for which child waits; 0: it lives until the test ends.
func child(t *testing.T, lives int, env ...string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), "NOTIFIER_TEST_CHILD=1", fmt.Sprint("PUBLISHES=", lives)), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if lives == 0 {
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		return
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the notifier ended with %v\n%s", err, &out)
	}
}

// BenchmarkPassThrough is a notifier between two queues of a real broker, with
// batches of 1,000 samples.
func BenchmarkPassThrough(b *testing.B) {
	l, err := lab.New(b.TempDir(), lab.Options{Log: zap.NewNop()})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	broker, err := l.RabbitMQ(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	amqp, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, "bench", zap.NewNop())
	if err != nil {
		b.Fatal(err)
	}
	defer amqp.Close()
	passThrough(b, amqp, amqp)
}
