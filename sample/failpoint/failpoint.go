// Package failpoint ends a program between two of its writes, so that tests see
// what a kill there leaves behind. Without the build tag failpoints it does nothing
// and costs nothing.
package failpoint

// Points are the names that [At] is called with: what has just happened, or is
// about to.
const (
	SpoolPut         = "spool.put"         // the agent: before batches go to its spool
	SpoolKept        = "spool.kept"        // the agent: they are synced there
	PublishSent      = "publish.sent"      // everybody: a message was handed to the broker
	PublishConfirmed = "publish.confirmed" // everybody: the broker has confirmed it, and nobody knows yet
	AckDue           = "ack.due"           // notifier and central: what was received is taken, but not acked
	AckSent          = "ack.sent"          // notifier and central: it is acked
	StoreCommit      = "store.commit"      // central: before a write of the store
	StoreCommitted   = "store.committed"   // central: after it was synced
)
