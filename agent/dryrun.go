package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// DryRun reads every meter that the configuration asks for once, and returns
// what would be sent, by resource and in the catalogue's order, and the notes of
// what cannot be collected. It publishes nothing and opens no socket; of deps it
// needs no Publisher.
func DryRun(ctx context.Context, cfg Config, deps Deps) (samples []sample.Sample, gaps []sample.Gap, notes []string, err error) {
	cfg.Socket, cfg.Spread = "", false
	a, err := New(cfg, deps)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	if a.guest != nil {
		background.Go(func() { a.guest.Run(ctx) })
		a.awaitGuest(ctx, 2*cfg.LibvirtTimeout)
	}
	if err := a.settle(ctx); err != nil {
		return nil, nil, nil, err
	}
	a.noted = true // the caller shows them
	for _, p := range a.plans {
		if t := newTask(p); t.qemu {
			a.pollQEMU(ctx, t)
		} else {
			a.poll(ctx, t)
		}
	}
	dec, err := sample.NewDecoder()
	if err != nil {
		return nil, nil, nil, err
	}
	for _, q := range a.deliver.queue {
		b, err := dec.Decode(q.msg.Body)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("read back what would be sent: %w", err)
		}
		for s := range b.Samples() {
			samples = append(samples, s)
		}
		gaps = append(gaps, b.Gaps...)
	}
	order := map[string]int{}
	for i, m := range sample.Catalogue {
		order[m.Name] = i
	}
	slices.SortStableFunc(samples, func(x, y sample.Sample) int {
		return cmp.Or(cmp.Compare(x.Resource, y.Resource), cmp.Compare(order[x.Name], order[y.Name]))
	})
	return samples, gaps, a.Notes(), nil
}

// settle waits until every domain that is there now may be polled.
func (a *Agent) settle(ctx context.Context) error {
	for {
		a.mu.Lock()
		err := a.discover(time.Now())
		ready := true
		for _, d := range a.order {
			ready = ready && d.ready
		}
		a.mu.Unlock()
		if err != nil || ready {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
