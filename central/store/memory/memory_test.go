package memory_test

import (
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/central/store/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, storetest.Engine{
		Open: func(_ testing.TB, _ string, clock func() time.Time) store.Store { return memory.New(clock) },
	})
}
