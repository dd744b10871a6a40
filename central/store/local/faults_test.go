package local

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/kvmeter/kvmeter/central/store"
)

// faultyDisk lets a random write, sync, rename or the like fail: one, or some
// with those that follow.
type faultyDisk struct {
	mu    sync.Mutex
	left  int // operations until the first that fails
	fails int // of those that follow; negative: all
	err   error
	first *errorfs.Op // that failed
}

// newFaultyDisk fails one of the first so many operations.
func newFaultyDisk(r *rand.Rand, within int) *faultyDisk {
	d := &faultyDisk{left: r.IntN(within), err: syscall.EIO}
	switch r.IntN(4) {
	case 0:
		d.fails = -1
	case 1:
		d.fails = r.IntN(4)
	case 2:
		d.fails, d.err = r.IntN(2), syscall.ENOSPC
	}
	return d
}

func (d *faultyDisk) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.left > 0:
		d.left--
		return nil
	case d.first == nil:
		d.first = &op
	case d.fails == 0:
		return nil
	default:
		d.fails--
	}
	return d.err
}

func (d *faultyDisk) String() string { return "faulty disk" }

// failed returns the kind of the first operation that failed, if one did.
func (d *faultyDisk) failed() (errorfs.OpKind, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.first == nil {
		return 0, false
	}
	return d.first.Kind, true
}

// Each point is a store whose disk fails at one of its operations, for once, for
// a while or for good; then the power is cut, with all, some or none of what was
// not synced on the disk. Every fourth start fails in the same way.
func TestRandomFailuresOfTheDiskLoseNothingAcknowledged(t *testing.T) {
	want := atLeast(t, "KVMETER_CRASH_FAULTS", 60)
	kinds := map[errorfs.OpKind]int{}
	points := 0
	var slowest time.Duration
	seed := uint64(atLeast(t, "KVMETER_CRASH_SEED", 1))
	for ; points < want && !t.Failed(); seed++ {
		op, failed, opened := faultPoint(t, seed)
		slowest = max(slowest, opened)
		if failed {
			kinds[op]++
			points++
		}
	}
	t.Logf("%d points, up to seed %d, by errorfs.OpKind that failed: %v; the slowest start took %s", points, seed-1, kinds, slowest.Round(time.Millisecond))
	if len(kinds) < 3 {
		t.Errorf("only these failed: %v; the test is blind", kinds)
	}
}

// faultPoint returns which operation failed, if one did, and how long the start took.
func faultPoint(t *testing.T, seed uint64) (op errorfs.OpKind, failed bool, opened time.Duration) {
	r := rand.New(rand.NewPCG(seed, 9))
	dir, err := os.MkdirTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	fs := vfs.NewCrashableMem()
	faulty := newFaultyDisk(r, 150)
	defer func() {
		if t.Failed() {
			t.Logf("seed %d: first failed %+v: %v", seed, faulty.first, faulty.err)
		}
	}()
	acked := map[uint64]bool{}
	s, err := Open(dir, Options{MinFree: 1, Retention: -1, fs: errorfs.Wrap(fs, faulty)})
	if err == nil {
		for seq := uint64(1); seq <= 10; seq++ {
			if _, err := s.Append(context.Background(), []store.Received{received(t, crashBatch(seq))}); err == nil {
				acked[seq] = true
			} else if !errors.Is(err, store.ErrDiskFull) && !strings.Contains(err.Error(), "store cannot write any more") {
				t.Errorf("append: got %v", err)
			}
			switch r.IntN(6) { // these may fail: that is the point
			case 0:
				_ = s.Flush(context.Background())
			case 1:
				_ = s.Roll(context.Background())
			case 2:
				if s.failure() == nil && s.disk.check() == nil {
					_ = s.contain(s.db.Flush, s.disk.stalled())
				}
			}
		}
		found := whole(t, s)
		for seq := range acked {
			if !found[seq] {
				t.Errorf("batch %d cannot be read", seq)
			}
		}
		_ = s.Close() // says that it failed
	}
	cut := func() *vfs.MemFS {
		return fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50 * r.IntN(3), RNG: r})
	}
	if r.IntN(4) == 0 {
		again := newFaultyDisk(r, 30)
		fs = cut()
		if s, err := Open(dir, Options{MinFree: 1, Retention: -1, fs: errorfs.Wrap(fs, again)}); err == nil {
			_ = s.Close()
		}
	}
	began := time.Now()
	s, err = Open(dir, Options{MinFree: 1, Retention: -1, fs: cut()})
	opened = time.Since(began)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	checkOnce(t, s, acked)
	closeStore(t, s)
	op, failed = faulty.failed()
	return op, failed, opened
}
