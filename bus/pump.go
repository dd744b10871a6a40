package bus

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"
)

// holdFor is how long a consumer keeps trying to have the same messages taken
// before it gives them back, so that another consumer of the queue can have a
// go. It stays well under the 30 minutes after which RabbitMQ closes the channel.
const holdFor = 15 * time.Minute

// errHeld ends a consumer that has held the same messages for too long.
var errHeld = errors.New("its messages could not be taken for long; they are given back")

// errUndecided stands for the error of a handler that returned none and yet
// left deliveries undecided.
var errUndecided = errors.New("not decided")

// source is where deliveries come from and where decisions about them go.
type source interface {
	// wait returns the next delivery, or nil when ctx has ended.
	wait(ctx context.Context) *Delivery
	// poll returns the next delivery if there is one already.
	poll() *Delivery
	// settle carries out the decisions. ds are all deliveries that were taken
	// and not settled, in order; undecided ones are among them. After an error
	// the source is of no more use.
	settle(ctx context.Context, ds []*Delivery) error
}

// pump hands the deliveries of src to handle until ctx ends or settling fails.
// At most prefetch deliveries are held. Those that handle does not decide are
// kept and handed to it again, for as long as hold; none is given back before.
func pump(ctx context.Context, log *zap.Logger, src source, prefetch int, retry backoff, hold time.Duration, handle Handler) (held []*Delivery, err error) {
	complaint := newComplaint(log)
	var since time.Time // when the held ones were first left undecided
	for ctx.Err() == nil {
		if len(held) == 0 {
			d := src.wait(ctx)
			if d == nil {
				return held, nil
			}
			held = append(held, d)
		}
		for len(held) < prefetch {
			d := src.poll()
			if d == nil {
				break
			}
			held = append(held, d)
		}
		failure := handle(ctx, held)
		if err := src.settle(ctx, held); err != nil {
			return held, err
		}
		rest := held[:0]
		for _, d := range held {
			if d.verdict == undecided {
				d.Redelivered = true
				rest = append(rest, d)
			}
		}
		clear(held[len(rest):])
		progress := len(rest) < len(held)
		held = rest
		if len(held) == 0 {
			since = time.Time{}
			retry.reset()
			complaint.over("messages are taken again")
			continue
		}
		if ctx.Err() != nil {
			return held, nil
		}
		if failure == nil {
			failure = errUndecided
		}
		if progress {
			since = time.Time{}
		}
		if since.IsZero() {
			since = time.Now()
		}
		complaint.say("messages can't be taken; they are kept and tried again", failure)
		if time.Since(since) > hold {
			return held, errHeld
		}
		retry.wait(ctx)
	}
	return held, nil
}
