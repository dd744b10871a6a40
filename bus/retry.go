package bus

import (
	"context"
	"math/rand/v2"
	"time"
)

// backoff spaces attempts: each wait is twice the one before, between min and
// max, and shortened at random by up to a half, so that a thousand clients of a
// broker that restarts do not come back at once.
type backoff struct {
	min, max time.Duration
	next     time.Duration
}

// wait waits and reports whether ctx is still alive.
func (b *backoff) wait(ctx context.Context) bool {
	t := time.NewTimer(b.step())
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (b *backoff) step() time.Duration {
	d := max(b.next, b.min)
	b.next = min(2*d, b.max)
	return d/2 + rand.N(d/2+1)
}

func (b *backoff) reset() { b.next = 0 }
