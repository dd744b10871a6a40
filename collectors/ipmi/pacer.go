package ipmi

import (
	"context"
	"time"
)

// pacer keeps the waiting for the BMC within a budget. While the driver waits,
// it may spin (kipmid), and others have to wait for the BMC.
type pacer struct {
	budget  time.Duration // in a second
	balance time.Duration // that may be waited at once
	at      time.Time     // when the balance was
}

// Bounds of the balance.
const (
	// Both as parts of the budget. Some waiting goes by at once, since a pause
	// after each command would cost more than the command.
	burst = 4
	// A command that hangs for long is made up for by 5 s of rest at most.
	debt = 5
)

// Wait implements [bmc.Pacer].
func (p *pacer) Wait(ctx context.Context) error {
	p.refill(time.Now())
	if p.balance > 0 {
		return nil
	}
	t := time.NewTimer(time.Duration(float64(p.budget/burst-p.balance) / p.budget.Seconds()))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func (p *pacer) refill(now time.Time) {
	if p.at.IsZero() {
		p.balance = p.budget / burst
	} else {
		p.balance = min(p.balance+time.Duration(float64(now.Sub(p.at))*p.budget.Seconds()), p.budget/burst)
	}
	p.at = now
}

// affords returns how long may be waited now so that the budget has made up for
// it after d.
func (p *pacer) affords(d time.Duration) time.Duration {
	p.refill(time.Now())
	return min(d, p.balance+time.Duration(float64(d)*p.budget.Seconds()))
}

// Spend implements [bmc.Pacer].
func (p *pacer) Spend(d time.Duration) { p.balance = max(p.balance-d, -debt*p.budget) }
