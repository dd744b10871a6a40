package local

import (
	"context"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/storetest"
)

func testEngine(options Options) storetest.Engine {
	return storetest.Engine{
		Open: func(t testing.TB, dir string, clock func() time.Time) store.Store {
			o := options
			o.Clock, o.MinFree, o.Retention = clock, 1, -1
			s, err := Open(dir, o)
			if err != nil {
				t.Fatal(err)
			}
			return s
		},
		Settle: func(t testing.TB, s store.Store) {
			if err := s.(*Store).Flush(context.Background()); err != nil {
				t.Errorf("flush: %v", err)
			}
		},
		Durable: true,
	}
}

func TestStore(t *testing.T) { storetest.Run(t, testEngine(Options{})) }

// With a tiny head every few batches are flushed on their own.
func TestStoreThatFlushesAllTheTime(t *testing.T) {
	storetest.Run(t, testEngine(Options{HeadBytes: 3000}))
}

var _ = zaptest.NewLogger
var _ = vfs.NewMem
