// Package store publishes to central's queues, from where samples and events
// reach the store.
package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

type store struct {
	bus        bus.Publisher
	name       string // signs what is not passed on as it came
	keys       bus.Keys
	partitions int

	mu  sync.Mutex
	enc *sample.Encoder // guarded by mu
}

// New returns the publisher of store://.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	if u.Host != "" || u.Path != "" || u.RawQuery != "" || u.User != nil {
		return nil, errors.New("store:// takes no host, path or options; which broker it is, the notifier's own configuration says")
	}
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	return &store{bus: d.Bus, name: d.Name, keys: d.Keys, partitions: d.Partitions, enc: enc}, nil
}

// Publish sends whole batches byte for byte, so that the sender's signature
// and sequence number reach the store, and returns when the queue has confirmed
// them all.
func (s *store) Publish(ctx context.Context, parts []publisher.Part) error {
	ms := make([]bus.Message, len(parts))
	for i := range parts {
		p := &parts[i]
		key := bus.StoreKey(p.From.Node, s.partitions)
		if p.Whole() {
			ms[i] = *p.Message
			ms[i].RoutingKey = key
			continue
		}
		body, err := s.encode(p.Batch)
		if err != nil {
			return &publisher.Refusal{Part: i, Err: err}
		}
		ms[i] = bus.Seal(key, p.Batch, body, s.keys.Secret(s.name))
	}
	if err := s.bus.Publish(ctx, ms...); err != nil {
		return fmt.Errorf("store://: %w", err)
	}
	return nil
}

func (s *store) encode(b *sample.Batch) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.enc.Encode(nil, b)
}

// A message has so many events at most, and about so many bytes before it is
// compressed.
const (
	maxEvents     = 500
	maxEventBytes = 1 << 20
)

// PublishEvents sends events to central's queue of events, several in a message,
// and returns when the queue has confirmed them all.
func (s *store) PublishEvents(ctx context.Context, events []sample.Event) error {
	var ms []bus.Message
	for begin := 0; begin < len(events); {
		end, size := begin, 0
		for ; end < len(events) && end-begin < maxEvents; end++ {
			if err := events[end].Check(); err != nil {
				return &publisher.Refusal{Part: end, Err: err}
			}
			if size += sizeOf(&events[end]); size > maxEventBytes && end > begin {
				break
			}
		}
		body, err := s.encodeEvents(events[begin:end])
		if err != nil {
			return &publisher.Refusal{Part: begin, Err: err} // it is one, and too large
		}
		ms = append(ms, bus.SealEvents(s.name, time.UnixMicro(events[begin].Generated), body, s.keys.Secret(s.name)))
		begin = end
	}
	if err := s.bus.Publish(ctx, ms...); err != nil {
		return fmt.Errorf("store://: events: %w", err)
	}
	return nil
}

// sizeOf returns about how many bytes an event has.
func sizeOf(e *sample.Event) int {
	n := len(e.Raw) + 200
	for i := range e.Traits {
		n += len(e.Traits[i].Name) + len(e.Traits[i].Text) + 40
	}
	return n
}

func (s *store) encodeEvents(events []sample.Event) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.enc.EncodeEvents(nil, events)
}

// Close does nothing: the bus is not ours.
func (s *store) Close() error { return nil }
