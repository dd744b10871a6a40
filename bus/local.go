package bus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
)

// localDepth is how many messages a queue of [Local] holds before publishers
// wait, and deadKept how many refused messages it remembers.
const (
	localDepth = 100
	deadKept   = 100
)

// Local is the bus inside one process: the queues and routing keys of
// RabbitMQ's topology, bounded, in memory. Since memory survives nothing, a
// message counts as confirmed when its consumer has acked or rejected it:
// whoever passes messages on acks when they are taken further along, so that
// what Publish has confirmed is as safe as the end of the path makes it.
type Local struct {
	log    *zap.Logger
	retry  backoff
	queues map[string]*localQueue // by name
	routes map[string]*localQueue // by routing key

	mu    sync.Mutex
	dead  []Dead
	count uint64
}

// Dead is a message that was rejected.
type Dead struct {
	Message
	Queue  string // that it came from
	Reason string
	At     time.Time
}

type localQueue struct {
	name     string
	waiting  chan *localMessage
	consumer chan struct{}   // holds a token while somebody consumes
	returned []*localMessage // by the consumer before; guarded by consumer
}

type localMessage struct {
	Message
	redelivered bool
	done        chan struct{}
}

// NewLocal returns a bus with the queues of the given number of partitions.
func NewLocal(partitions int, log *zap.Logger) *Local {
	l := &Local{
		log: log, retry: backoff{min: 100 * time.Millisecond, max: 10 * time.Second},
		queues: map[string]*localQueue{}, routes: map[string]*localQueue{},
	}
	for _, b := range bindings(partitions, 0) {
		if b.exchange == Exchange {
			q := &localQueue{name: b.queue, waiting: make(chan *localMessage, localDepth), consumer: make(chan struct{}, 1)}
			l.queues[b.queue], l.routes[b.key] = q, q
		}
	}
	return l
}

// Publish implements [Publisher].
func (l *Local) Publish(ctx context.Context, ms ...Message) error {
	for i := range ms {
		if err := ms[i].check(); err != nil {
			return fmt.Errorf("publish %s: %w", ms[i].ID, err)
		}
		if l.routes[ms[i].RoutingKey] == nil {
			return fmt.Errorf("publish %s to %q: %w", ms[i].ID, ms[i].RoutingKey, ErrUnroutable)
		}
	}
	sent := make([]*localMessage, len(ms))
	for i := range ms {
		sent[i] = &localMessage{Message: ms[i], done: make(chan struct{})}
		select {
		case l.routes[ms[i].RoutingKey].waiting <- sent[i]:
		case <-ctx.Done():
			return fmt.Errorf("publish %s: the queue is full: %w", ms[i].ID, ctx.Err())
		}
	}
	for _, m := range sent {
		select {
		case <-m.done:
		case <-ctx.Done():
			return fmt.Errorf("publish %s: not taken yet: %w", m.ID, ctx.Err())
		}
	}
	return nil
}

// Consume implements [Consumer]. A second consumer of a queue waits until the
// first has ended.
func (l *Local) Consume(ctx context.Context, queue string, prefetch int, handle Handler) error {
	q := l.queues[queue]
	if q == nil {
		return fmt.Errorf("consume %s: no such queue", queue)
	}
	for {
		select {
		case q.consumer <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		log := l.log.With(zap.String("queue", queue))
		held, err := pump(ctx, log, &localSource{l, q}, prefetch, l.retry, holdFor, handle)
		returned := make([]*localMessage, len(held), len(held)+len(q.returned))
		for i, d := range held {
			returned[i] = d.from.(*localMessage)
			returned[i].redelivered = true
		}
		q.returned = append(returned, q.returned...)
		<-q.consumer
		if err == nil || !errors.Is(err, errHeld) {
			return nil
		}
	}
}

// Dead returns the newest messages that were rejected, oldest first, and how
// many there have been in all.
func (l *Local) Dead() ([]Dead, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Dead(nil), l.dead...), l.count
}

func (l *Local) bury(q *localQueue, d *Delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	if len(l.dead) == deadKept {
		l.dead = append(l.dead[:0], l.dead[1:]...)
	}
	l.dead = append(l.dead, Dead{d.Message, q.name, d.reason.Error(), time.Now()})
}

type localSource struct {
	l *Local
	q *localQueue
}

func (s *localSource) wait(ctx context.Context) *Delivery {
	if d := s.poll(); d != nil {
		return d
	}
	select {
	case m := <-s.q.waiting:
		return m.delivery()
	case <-ctx.Done():
		return nil
	}
}

func (s *localSource) poll() *Delivery {
	if r := s.q.returned; len(r) > 0 {
		s.q.returned = r[1:]
		return r[0].delivery()
	}
	select {
	case m := <-s.q.waiting:
		return m.delivery()
	default:
		return nil
	}
}

func (m *localMessage) delivery() *Delivery {
	return &Delivery{Message: m.Message, Redelivered: m.redelivered, from: m}
}

func (s *localSource) settle(_ context.Context, ds []*Delivery) error {
	for _, d := range ds {
		switch d.verdict {
		case rejected:
			s.l.bury(s.q, d)
			close(d.from.(*localMessage).done)
		case acked:
			close(d.from.(*localMessage).done)
		}
	}
	return nil
}
