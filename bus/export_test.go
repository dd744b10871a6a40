package bus

import "time"

// Within sets how long a broker may be silent before that is said, and before the
// connection is given up, before the bus is used.
func (a *AMQP) Within(answer, confirm time.Duration) {
	a.answerWithin, a.confirmWithin = answer, confirm
}
