package notifier

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

const (
	// balanceEvery is how often a notifier looks whether it owns more than its
	// share.
	balanceEvery = 15 * time.Second
	// restAfter is how long one that has given up a partition leaves it to others.
	restAfter = time.Second
)

// scatterer passes on what is for the owners of partitions.
type scatterer struct {
	mu  sync.Mutex
	enc *sample.Encoder
}

// scatter publishes what is for the owners of partitions, in order.
func (n *Notifier) scatter(ctx context.Context, jobs []*work) error {
	var ms []bus.Message
	n.scatterer.mu.Lock()
	for _, job := range jobs {
		for i := range job.scatter {
			b := job.scatter[i].Batch
			body, err := n.scatterer.enc.Encode(nil, b)
			if err != nil {
				job.lost = fmt.Errorf("pass on to transformers: %w", err)
				job.scatter = nil
				break
			}
			key := bus.StagesKey(b.Rows[0].Resource, n.cfg.StagePartitions)
			ms = append(ms, bus.Seal(key, b, body, n.deps.Keys.Secret(n.cfg.Name)))
		}
	}
	n.scatterer.mu.Unlock()
	if len(ms) == 0 {
		return nil
	}
	if err := n.deps.Publisher.Publish(ctx, ms...); err != nil {
		return fmt.Errorf("pass on to transformers: %w", err)
	}
	for _, job := range jobs {
		job.scatter = nil
	}
	return nil
}

// owners take the partitions of stages that other notifiers do not have.
type owners struct {
	n   *Notifier
	all []*owner
}

func (n *Notifier) owners() (*owners, error) {
	o := &owners{n: n}
	for p := range n.cfg.StagePartitions {
		opener, err := n.newOpener()
		if err != nil {
			return nil, err
		}
		one := &owner{n: n, p: p, log: n.log.With(zap.Int("partition", p))}
		one.w = &worker{n: n, owner: one, open: func(d *bus.Delivery) { one.open(opener, d) }}
		o.all = append(o.all, one)
	}
	return o, nil
}

// run takes partitions until ctx ends.
func (o *owners) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	errs := make([]error, len(o.all))
	// Each notifier asks for them in another order, so that those that start
	// together get about as many each.
	for _, i := range rand.Perm(len(o.all)) {
		running.Go(func() {
			errs[i] = o.all[i].run(ctx)
			cancel()
		})
	}
	running.Go(func() { o.balance(ctx) })
	var counted error
	running.Go(func() { // for others to know how many there are
		counted = o.n.deps.Consumer.Consume(ctx, bus.NotifiersQueue, 1, func(_ context.Context, ds []*bus.Delivery) error {
			for _, d := range ds {
				d.Reject(errors.New("nothing is to be sent to this queue"))
			}
			return nil
		})
		cancel()
	})
	running.Wait()
	return errors.Join(append(errs, counted)...)
}

// balance gives up partitions while this notifier owns more than its share, and
// renews snapshots. RabbitMQ gives a partition to who has waited for it longest. So
// that it is not somebody who has its share already, who then gives it up as well,
// those who have that wait anew whenever something has changed, and so behind those
// who have not; only when all have had the time to do so, what is too much is given
// up.
func (o *owners) balance(ctx context.Context) {
	every := o.n.balanceEvery
	owns, notifiers := 0, 0
	var since time.Time // when these changed last
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(every/2 + rand.N(every)):
		}
		var owned, others []*owner
		for _, one := range o.all {
			if one.refresh(ctx) {
				owned = append(owned, one)
			} else {
				others = append(others, one)
			}
		}
		n, err := o.n.deps.Counter.Consumers(ctx, bus.NotifiersQueue)
		if err != nil {
			o.n.log.Debug("how many notifiers there are is not known", zap.Error(err))
			continue
		}
		share := (len(o.all) + n - 1) / max(1, n)
		switch {
		case len(owned) != owns || n != notifiers:
			owns, notifiers, since = len(owned), n, time.Now()
			if len(owned) >= share {
				for _, one := range others {
					one.giveUp()
				}
			}
		case len(owned) > share && time.Since(since) > 3*every/2:
			rand.Shuffle(len(owned), func(i, j int) { owned[i], owned[j] = owned[j], owned[i] })
			for _, one := range owned[share:] {
				one.log.Info("giving up a partition, for others to have their share", zap.Int("owned", len(owned)), zap.Int("share", share))
				one.giveUp()
			}
		}
	}
}

// owner takes one partition whenever no other notifier has it. What its
// transformers remember is read when the first samples come, and let go when the
// connection over which they come is lost: another one may get them then.
type owner struct {
	n   *Notifier
	p   int
	log *zap.Logger
	w   *worker

	mu     sync.Mutex
	held   *bus.Records
	all    [][]byte // that were held, until memory is made of them
	memory *memory
	over   context.Context // the handler's, of the connection over which samples come
	stop   context.CancelFunc
}

// run consumes until ctx ends.
func (o *owner) run(ctx context.Context) error {
	for ctx.Err() == nil {
		inner, cancel := context.WithCancel(ctx)
		o.mu.Lock()
		o.stop = cancel
		o.mu.Unlock()
		err := o.n.deps.Consumer.Consume(inner, bus.StagesQueue(o.p), max(1, o.n.cfg.Prefetch), o.w.handle)
		cancel()
		o.letGo(nil)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(restAfter):
		}
	}
	return nil
}

// giveUp ends consuming, or waiting for that; another notifier is next.
func (o *owner) giveUp() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stop != nil {
		o.stop()
	}
}

// letGo closes the records, if they are those; nil: whichever they are.
func (o *owner) letGo(those *bus.Records) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.held == nil || those != nil && o.held != those {
		return
	}
	_ = o.held.Close() // it is the broker that forgets the connection
	o.held, o.all, o.memory, o.over = nil, nil, nil, nil
	o.n.m.owned.Dec()
}

// take gets the records, if it has them not yet; ctx is that of the handler.
func (o *owner) take(ctx context.Context) error {
	o.mu.Lock()
	have, over := o.held, o.over
	o.mu.Unlock()
	if have != nil && over == ctx {
		select {
		case <-have.Lost():
			// What was made of the samples at hand may be recorded or not. They come
			// again, over another connection.
			o.giveUp()
			return errors.New("the connection over which transformers record what they remember is lost")
		default:
			return nil
		}
	}
	o.letGo(nil)
	held, all, err := o.n.deps.Memory.Recall(ctx, o.p)
	if err != nil {
		return err
	}
	o.mu.Lock()
	o.held, o.all, o.over = held, all, ctx
	o.mu.Unlock()
	o.n.m.owned.Inc()
	o.n.m.takeovers.Inc()
	context.AfterFunc(ctx, func() { o.letGo(held) }) // the next owner waits for it
	return nil
}

// renew makes the memory of the records, or of the one before a reload.
func (o *owner) renew(ctx context.Context) error {
	o.mu.Lock()
	held, all, old := o.held, o.all, o.memory
	o.mu.Unlock()
	if held == nil {
		return ctx.Err() // it has been let go
	}
	if old != nil && o.w.setup == o.n.setup {
		o.w.memory = old
		return nil
	}
	k, err := o.n.newKeeper(o.n.setup)
	if err != nil {
		return err
	}
	m := &memory{keeper: k, m: &o.n.m}
	if old == nil {
		err = m.start(ctx, o.log, held, all)
	} else {
		_, err = m.adopt(ctx, old)
	}
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.held != held {
		return ctx.Err()
	}
	o.memory, o.all, o.w.memory = m, nil, m
	return nil
}

// refresh reports whether the partition is owned, and renews its snapshot if that
// is old.
func (o *owner) refresh(ctx context.Context) bool {
	o.mu.Lock()
	held, m := o.held, o.memory
	o.mu.Unlock()
	if m != nil {
		if err := m.refresh(ctx); err != nil {
			o.log.Warn("what transformers remember could not be recorded anew", zap.Error(err))
		}
	}
	return held != nil
}

// open verifies a delivery and runs the transformers; a bad one is rejected.
func (o *owner) open(opener *bus.Opener, d *bus.Delivery) {
	b, err := opener.Open(&d.Message)
	if err != nil {
		o.w.refuse(d, err, bus.Reason(err))
		return
	}
	if d.Redelivered {
		o.n.m.redelivered.Inc()
	}
	job := o.w.newWork(b.ID)
	for i, parts := range o.w.memory.keeper.Make(b) {
		for _, part := range parts {
			for _, t := range o.w.setup.pipe.Sinks[i].Targets {
				job.due[t].parts = append(job.due[t].parts, publisher.Part{Message: &d.Message, From: b, Batch: part})
			}
		}
	}
	d.State = job
}
