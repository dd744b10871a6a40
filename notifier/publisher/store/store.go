// Package store publishes to central's queue, from where samples reach the
// store.
package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

type store struct {
	bus        bus.Publisher
	secret     []byte
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
	return &store{bus: d.Bus, secret: d.Secret, partitions: d.Partitions, enc: enc}, nil
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
		ms[i] = bus.Seal(key, p.Batch, body, s.secret)
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

// Close does nothing: the bus is not ours.
func (s *store) Close() error { return nil }
