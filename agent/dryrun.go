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
	cfg.IPMI.State = "" // what the daemon has told of the event log stays told
	cfg.Socket, cfg.Counters, cfg.Spool.Path, cfg.Spread = "", "", "", false
	deps.Life = nil // what ends is for an agent that goes on
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
		switch t := newTask(p, a.hooks); {
		case t.qemu:
			a.pollQEMU(ctx, t)
		case t.bmc:
			a.pollBMC(ctx, t)
		default:
			a.poll(ctx, t)
		}
	}
	if a.guest != nil {
		a.pollLibvirt(ctx)
	}
	if err := a.hardware.close(); err != nil {
		return nil, nil, nil, err
	}
	if a.guest != nil && cfg.CrosscheckInterval > 0 {
		for _, d := range a.defined() {
			if a.checked(d).IsZero() { // else it came with what QEMU was asked for
				a.check(ctx, d)
			}
		}
	}
	dec, err := sample.NewDecoder()
	if err != nil {
		return nil, nil, nil, err
	}
	for _, m := range a.deliver.Take() {
		b, err := dec.Decode(m.Body)
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
