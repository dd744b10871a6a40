package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
)

// wire is a bus under test.
type wire interface {
	bus.Publisher
	bus.Consumer
}

// dead is what a dead letter must tell.
type dead struct{ ID, Body, Queue, Reason string }

func TestLocalConforms(t *testing.T) {
	conform(t, func(t *testing.T) (wire, func() []dead) {
		l := bus.NewLocal(2, zap.NewNop())
		return l, func() (ds []dead) {
			list, _ := l.Dead()
			for _, d := range list {
				ds = append(ds, dead{d.ID, string(d.Body), d.Queue, d.Reason})
			}
			return ds
		}
	})
}

// recorder is a handler that remembers what it got.
type recorder struct {
	mu   sync.Mutex
	got  []string // ids, with "+" where redelivered
	most int      // deliveries in one call
	more chan struct{}
	do   func(call int, ds []*bus.Delivery) error // nil: ack all
	call int
}

func newRecorder(do func(int, []*bus.Delivery) error) *recorder {
	return &recorder{more: make(chan struct{}, 1), do: do}
}

func (r *recorder) handle(_ context.Context, ds []*bus.Delivery) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range ds {
		id := d.ID
		if d.Redelivered {
			id += "+"
		}
		r.got = append(r.got, id)
	}
	r.most = max(r.most, len(ds))
	defer func() {
		r.call++
		select {
		case r.more <- struct{}{}:
		default:
		}
	}()
	if r.do != nil {
		return r.do(r.call, ds)
	}
	for _, d := range ds {
		d.Ack()
	}
	return nil
}

// await waits until the recorder has got what is wanted.
func (r *recorder) await(t *testing.T, want ...string) {
	t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		r.mu.Lock()
		got := slices.Clone(r.got)
		r.mu.Unlock()
		if len(got) >= len(want) {
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("deliveries (-want +got):\n%s", diff)
			}
			return
		}
		select {
		case <-r.more:
		case <-deadline:
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

// consume runs a consumer until the returned function is called.
func consume(t *testing.T, w wire, queue string, prefetch int, handle bus.Handler) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Consume(ctx, queue, prefetch, handle) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("Consume returned %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// publish publishes and returns what to wait for.
func publish(t *testing.T, w wire, ms ...bus.Message) (wait func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	result := make(chan error, 1)
	go func() { result <- w.Publish(ctx, ms...) }()
	var once sync.Once
	wait = func() {
		once.Do(func() {
			if err := <-result; err != nil {
				t.Errorf("Publish returned %v", err)
			}
			cancel()
		})
	}
	t.Cleanup(wait)
	return wait
}

func message(id string) bus.Message {
	return bus.Message{
		RoutingKey: "samples.0", ID: id, ContentType: "text/plain", ContentEncoding: "utf-8",
		KeyID: "node-" + id, HMAC: "abc", Time: time.Unix(1_800_000_000, 0).UTC(), Body: []byte("body of " + id),
	}
}

func messages(n int) (ms []bus.Message, ids []string) {
	for i := range n {
		ids = append(ids, fmt.Sprintf("m%03d", i))
		ms = append(ms, message(ids[i]))
	}
	return ms, ids
}

// conform is what every bus must do. open returns an empty one, and what
// lists its dead letters.
func conform(t *testing.T, open func(t *testing.T) (wire, func() []dead)) {
	const queue = "kvmeter.samples.0" // of partition 0
	bad := errors.New("can't be read: \"x\"")

	t.Run("a message arrives with all that it carries", func(t *testing.T) {
		w, _ := open(t)
		want := message("a")
		got := make(chan bus.Message, 1)
		consume(t, w, queue, 10, func(_ context.Context, ds []*bus.Delivery) error {
			got <- ds[0].Message
			ds[0].Ack()
			return nil
		})
		publish(t, w, want)()
		m := <-got
		m.Time = m.Time.UTC()
		if diff := cmp.Diff(want, m); diff != "" {
			t.Errorf("message (-want +got):\n%s", diff)
		}
	})

	t.Run("messages arrive in order, and no more than prefetch at once", func(t *testing.T) {
		w, _ := open(t)
		ms, ids := messages(500)
		r := newRecorder(nil)
		wait := publish(t, w, ms...)
		consume(t, w, queue, 7, r.handle)
		wait()
		r.await(t, ids...)
		if r.most > 7 {
			t.Errorf("handler got %d deliveries at once, want at most 7", r.most)
		}
	})

	t.Run("each routing key leads to its queue", func(t *testing.T) {
		w, _ := open(t)
		for i, q := range []string{"kvmeter.samples.1", "kvmeter.store.0", "kvmeter.store.1", "kvmeter.events"} {
			m := message(fmt.Sprint(i))
			m.RoutingKey = []string{"samples.1", "store.0", "store.1", "events"}[i]
			r := newRecorder(nil)
			stop := consume(t, w, q, 10, r.handle)
			publish(t, w, m)()
			r.await(t, m.ID)
			stop()
		}
	})

	t.Run("what a handler fails to take is handed to it again, with its state", func(t *testing.T) {
		w, _ := open(t)
		ms, ids := messages(3)
		var states []any
		r := newRecorder(func(call int, ds []*bus.Delivery) error {
			for _, d := range ds {
				states = append(states, d.State)
				d.State = fmt.Sprint(call, d.ID)
			}
			if call < 2 {
				return errors.New("no disk")
			}
			for _, d := range ds {
				d.Ack()
			}
			return nil
		})
		consume(t, w, queue, 1, r.handle)
		publish(t, w, ms...)()
		r.await(t, ids[0], ids[0]+"+", ids[0]+"+", ids[1], ids[2])
		if diff := cmp.Diff([]any{nil, "0m000", "1m000", nil, nil}, states); diff != "" {
			t.Errorf("states (-want +got):\n%s", diff)
		}
	})

	t.Run("what was acked beside a failure does not come again", func(t *testing.T) {
		w, _ := open(t)
		ms, ids := messages(3)
		var mu sync.Mutex
		count := map[string]int{}
		r := newRecorder(func(_ int, ds []*bus.Delivery) error {
			mu.Lock()
			defer mu.Unlock()
			for _, d := range ds {
				if count[d.ID]++; d.ID != ids[1] || count[d.ID] == 3 {
					d.Ack()
				}
			}
			return nil
		})
		consume(t, w, queue, 10, r.handle)
		publish(t, w, ms...)()
		deadline := time.Now().Add(30 * time.Second)
		for {
			mu.Lock()
			done := count[ids[1]] == 3 && count[ids[2]] > 0
			got := fmt.Sprint(count)
			mu.Unlock()
			if done {
				if want := fmt.Sprint(map[string]int{ids[0]: 1, ids[1]: 3, ids[2]: 1}); got != want {
					t.Errorf("deliveries %s, want %s", got, want)
				}
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("deliveries %s", got)
			}
			time.Sleep(10 * time.Millisecond)
		}
	})

	t.Run("a rejected message is a dead letter with its reason, and costs no other", func(t *testing.T) {
		w, letters := open(t)
		ms, ids := messages(5)
		var taken []string
		r := newRecorder(func(_ int, ds []*bus.Delivery) error {
			for _, d := range ds {
				if d.ID == ids[2] {
					d.Reject(bad)
					continue
				}
				taken = append(taken, d.ID)
				d.Ack()
			}
			return nil
		})
		stop := consume(t, w, queue, 10, r.handle)
		publish(t, w, ms...)()
		r.await(t, ids...)
		stop()
		if diff := cmp.Diff([]string{ids[0], ids[1], ids[3], ids[4]}, taken); diff != "" {
			t.Errorf("taken (-want +got):\n%s", diff)
		}
		want := []dead{{ids[2], "body of " + ids[2], queue, bad.Error()}}
		if diff := cmp.Diff(want, letters()); diff != "" {
			t.Errorf("dead letters (-want +got):\n%s", diff)
		}
	})

	t.Run("what one consumer leaves undecided is delivered again, first, to the next", func(t *testing.T) {
		w, _ := open(t)
		ms, ids := messages(4)
		wait := publish(t, w, ms...)
		first := newRecorder(func(int, []*bus.Delivery) error { return errors.New("not now") })
		stop := consume(t, w, queue, 2, first.handle)
		for len(first.more) == 0 {
			time.Sleep(time.Millisecond)
		}
		stop()
		var got []string
		second := newRecorder(func(_ int, ds []*bus.Delivery) error {
			for _, d := range ds {
				got = append(got, d.ID)
				if len(got) == 1 && !d.Redelivered {
					t.Errorf("%s is not marked as delivered again", d.ID)
				}
				d.Ack()
			}
			return nil
		})
		stop = consume(t, w, queue, 10, second.handle)
		wait()
		for n, deadline := 0, time.After(60*time.Second); n < len(ids); {
			select {
			case <-second.more:
			case <-deadline:
				t.Fatalf("%d deliveries, want %d", n, len(ids))
			}
			second.mu.Lock()
			n = len(second.got)
			second.mu.Unlock()
		}
		stop()
		if diff := cmp.Diff(ids, got); diff != "" {
			t.Errorf("deliveries (-want +got):\n%s", diff)
		}
	})

	t.Run("a second consumer waits until the first has ended", func(t *testing.T) {
		w, _ := open(t)
		first, second := newRecorder(nil), newRecorder(nil)
		stop := consume(t, w, queue, 10, first.handle)
		publish(t, w, message("a"))()
		first.await(t, "a")
		consume(t, w, queue, 10, second.handle)
		publish(t, w, message("b"))()
		first.await(t, "a", "b")
		stop()
		publish(t, w, message("c"))()
		second.await(t, "c")
	})

	t.Run("a routing key that leads nowhere is an error, and the next message still passes", func(t *testing.T) {
		w, _ := open(t)
		r := newRecorder(nil)
		consume(t, w, queue, 10, r.handle)
		m := message("a")
		m.RoutingKey = "samples.99"
		if err := w.Publish(t.Context(), m); !errors.Is(err, bus.ErrUnroutable) {
			t.Errorf("Publish returned %v, want %v", err, bus.ErrUnroutable)
		}
		publish(t, w, message("b"))()
		r.await(t, "b")
	})

	t.Run("what AMQP can't carry is refused", func(t *testing.T) {
		w, _ := open(t)
		long, large := message("a"), message("b")
		long.ContentType = strings.Repeat("x", 256)
		large.Body = make([]byte, bus.MaxBody+1)
		for _, m := range []bus.Message{long, large} {
			if err := w.Publish(t.Context(), m); err == nil {
				t.Errorf("Publish of %s returned no error", m.ID)
			}
		}
	})
}
