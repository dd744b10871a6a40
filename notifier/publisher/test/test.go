// Package test keeps the last samples and events in memory, for tests.
//
//	test://
package test

import (
	"context"
	"net/url"
	"sync"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// kept is how many samples and events are kept.
const kept = 1000

// Memory keeps what was published last.
type Memory struct {
	mu      sync.Mutex
	samples []sample.Sample
	events  []sample.Event
}

// New returns the publisher of a URL.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	return &Memory{}, publisher.NewOptions(u).Done(d.Log)
}

// Publish keeps the samples of all parts.
func (m *Memory) Publish(_ context.Context, parts []publisher.Part) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range parts {
		for s := range parts[i].Batch.Samples() {
			if m.samples = append(m.samples, s); len(m.samples) >= 2*kept {
				m.samples = last(m.samples)
			}
		}
	}
	m.samples = last(m.samples)
	return nil
}

// PublishEvents keeps events.
func (m *Memory) PublishEvents(_ context.Context, events []sample.Event) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events = last(append(m.events, events...))
	return nil
}

// last moves those that are kept to the front, over the others.
func last[T any](all []T) []T {
	n := copy(all, all[max(0, len(all)-kept):])
	clear(all[n:])
	return all[:n]
}

// Close does nothing.
func (m *Memory) Close() error { return nil }
