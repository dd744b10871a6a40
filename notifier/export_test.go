package notifier

import "time"

// BalanceEvery sets how often the notifier looks whether it owns more than its
// share, before it runs.
func (n *Notifier) BalanceEvery(d time.Duration) { n.balanceEvery = d }
