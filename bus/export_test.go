package bus

import "time"

// ConfirmWithin sets how long a broker may confirm nothing, before the bus is used.
func (a *AMQP) ConfirmWithin(d time.Duration) { a.confirmWithin = d }
