package central

import (
	"context"
	"sync"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
)

// Poster hands samples that were sent to the API to the notifiers, which pass
// them through their pipelines as they do an agent's. It is safe for concurrent
// use.
type Poster struct {
	publisher  bus.Publisher
	node       string // the sender of the batches
	partitions int
	keys       bus.Keys

	mu  sync.Mutex
	enc *sample.Encoder
}

// NewPoster returns a poster that signs as a node with its key; where there is none
// batches are unsigned.
func NewPoster(p bus.Publisher, node string, partitions int, keys bus.Keys) (*Poster, error) {
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	return &Poster{publisher: p, node: node, partitions: partitions, keys: keys, enc: enc}, nil
}

// Post publishes a batch, which must have explicit ids, and returns when the bus
// has it safe. While the bus is away it waits, until ctx ends.
func (p *Poster) Post(ctx context.Context, b *sample.Batch) error {
	b.Node = p.node
	p.mu.Lock()
	body, err := p.enc.Encode(nil, b)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	return p.publisher.Publish(ctx, bus.Seal(bus.SamplesKey(p.node, p.partitions), b, body, p.keys.Secret(p.node)))
}
