//go:build lab

package overhead

import (
	"context"
	"testing"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
)

// declare makes the topology and consumes nothing: the agent's cost is the
// same, and the queue holds a minute of batches easily.
func declare(b *testing.B, url string) {
	b.Helper()
	amqp, err := bus.NewAMQP(bus.Config{URL: url, Partitions: 1}, "overhead", zap.NewNop())
	if err != nil {
		b.Fatal(err)
	}
	defer amqp.Close()
	if err := amqp.Ping(context.Background()); err != nil {
		b.Fatal(err)
	}
}
