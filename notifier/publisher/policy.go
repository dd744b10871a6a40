package publisher

// Policy says what becomes of what a publisher cannot deliver.
type Policy struct {
	// Drop: it is dropped at once.
	Drop bool
	// MaxQueue is how many messages wait at most, beyond which the oldest are
	// dropped; 0: as many as the spool holds.
	MaxQueue int
}

// PolicyOf takes the options policy (default, drop or queue), max_queue_length
// (1024, of queue; 0: no bound of its own) and max_retry, which has no effect: under the default policy
// everything waits for as long as the spool has room.
func PolicyOf(o *Options) Policy {
	policy, most := o.One("policy", "default", "drop", "queue"), o.Int("max_queue_length", 1024)
	o.Int("max_retry", 100)
	switch policy {
	case "drop":
		return Policy{Drop: true}
	case "queue":
		return Policy{MaxQueue: most}
	}
	return Policy{}
}
