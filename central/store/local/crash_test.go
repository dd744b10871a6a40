package local

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

const crashDir = "KVMETER_TEST_CRASH_DIR"

// crashChild is the process that is killed: it appends for ever and prints the
// seq of each batch that is stored. It reports whether this is that process.
func crashChild() bool {
	dir := os.Getenv(crashDir)
	if dir == "" {
		return false
	}
	s, err := Open(dir, Options{MinFree: 1, HeadBytes: 20000, Retention: -1})
	if err != nil {
		fmt.Println("error", err)
		return true
	}
	enc, err := sample.NewEncoder()
	if err != nil {
		fmt.Println("error", err)
		return true
	}
	var mu sync.Mutex // of enc
	var wg sync.WaitGroup
	for w := range uint64(3) {
		wg.Go(func() {
			for seq := 1 + w; ; seq += 3 {
				b := crashBatch(seq)
				mu.Lock()
				body, err := enc.Encode(nil, b)
				mu.Unlock()
				if err == nil {
					_, err = s.Append(context.Background(), []store.Received{{Body: body, Batch: b}})
				}
				if err != nil {
					fmt.Println("error", err)
					return
				}
				fmt.Println("stored", seq)
			}
		})
	}
	wg.Wait()
	return true
}

// crashBatch is the batch with a seq; every fifth has foreign ids.
func crashBatch(seq uint64) *sample.Batch {
	b := tick("node", seq, start+int64(seq)*1e6)
	b.ID = sample.DeriveBatchID(sample.BatchID{0x01, 0x9b}, fmt.Sprint(seq)) // the same in every process
	if seq%5 == 0 {
		for i := range perTick {
			b.IDs = append(b.IDs, fmt.Sprint("foreign-", seq, "-", i))
		}
	}
	return b
}

// whole fails unless each stored batch is there with all of its samples, and
// returns the batches that are.
func whole(t *testing.T, s *Store) map[uint64]bool {
	t.Helper()
	count := map[uint64]int{}
	for _, sm := range list(t, s, store.Filter{}) {
		count[sm.Volume.Bits]++
	}
	found := map[uint64]bool{}
	for seq, n := range count {
		found[seq] = true
		if n != perTick {
			t.Errorf("batch %d: got %d samples, want %d", seq, n, perTick)
		}
	}
	return found
}

func TestKilledStoreHasEveryAcknowledgedBatchOnce(t *testing.T) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	acked := map[uint64]bool{}
	r := rand.New(rand.NewPCG(1, 0))
	for round := range atLeast(t, "KVMETER_CRASH_KILLS", 4) {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), crashDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines, stop := 0, 50+r.IntN(400)
		for in := bufio.NewScanner(out); in.Scan(); {
			var seq uint64
			if _, err := fmt.Sscanf(in.Text(), "stored %d", &seq); err != nil {
				t.Errorf("child: %s", in.Text())
			}
			acked[seq] = true
			if lines++; lines == stop {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait() // it was killed
		if lines < stop {
			t.Fatalf("round %d: the child ended after %d batches", round, lines)
		}
	}
	s := open(t, dir, Options{Retention: -1})
	defer func() { closeStore(t, s) }()
	checkOnce(t, s, acked)
	closeStore(t, s)
	s = open(t, dir, Options{Retention: -1})
	checkOnce(t, s, acked)
}

// checkOnce looks for the acknowledged batches, appends all again, and looks
// for every batch once.
func checkOnce(t *testing.T, s *Store, acked map[uint64]bool) {
	t.Helper()
	found := whole(t, s)
	last := uint64(0)
	for seq := range acked {
		last = max(last, seq)
		if !found[seq] {
			t.Errorf("batch %d was acknowledged and is lost", seq)
		}
	}
	var again []store.Received
	for seq := uint64(1); seq <= last; seq++ {
		again = append(again, received(t, crashBatch(seq)))
	}
	stored, err := s.Append(context.Background(), again)
	if err != nil {
		t.Fatal(err)
	}
	for i, st := range stored {
		if seq := uint64(i + 1); st.Refused != nil || st.Duplicate != found[seq] {
			t.Errorf("batch %d: got %+v, it was there: %v", seq, st, found[seq])
		}
	}
	if n := len(whole(t, s)); n < int(last) {
		t.Errorf("got %d batches, want %d", n, last)
	}
	if err := s.Roll(context.Background()); err != nil {
		t.Error(err)
	}
	if ps := verify(t, s); len(ps) > 0 {
		t.Errorf("problems: %q", ps)
	}
}

// atLeast is how often a test does something: n times, or as often as a
// variable says.
func atLeast(t *testing.T, variable string, n int) int {
	t.Helper()
	if v := os.Getenv(variable); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// powerCut is what a machine finds when it comes up again.
type powerCut struct {
	op        string
	fs        *vfs.MemFS
	catalogue map[string][]byte
	acked     map[uint64]bool
}

// cutter cuts the power before every write of Pebble: it keeps what would be
// left.
type cutter struct {
	mu    sync.Mutex
	fs    *vfs.MemFS
	dir   string
	rand  *rand.Rand
	acked map[uint64]bool
	store *Store // nil while it opens
	cuts  []powerCut
}

func (c *cutter) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.store != nil {
		// SQLite's own files are copied between its transactions: it is not
		// what is tested here.
		c.store.catalogue.save.Lock()
		defer c.store.catalogue.save.Unlock()
	}
	cut := powerCut{op: fmt.Sprint(op.Kind, " ", filepath.Base(op.Path)), acked: map[uint64]bool{}, catalogue: map[string][]byte{}}
	cut.fs = c.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50 * c.rand.IntN(3), RNG: c.rand})
	for _, name := range []string{"catalogue.db", "catalogue.db-wal"} {
		if data, err := os.ReadFile(filepath.Join(c.dir, name)); err == nil {
			cut.catalogue[name] = data
		}
	}
	for seq := range c.acked {
		cut.acked[seq] = true
	}
	c.cuts = append(c.cuts, cut)
	return nil
}

func (c *cutter) String() string { return "power cut" }

func TestPowerCutAtAnyWriteLosesNothingAcknowledged(t *testing.T) {
	want, points := atLeast(t, "KVMETER_CRASH_POINTS", 100), 0
	var slowest time.Duration
	seed := uint64(atLeast(t, "KVMETER_CRASH_SEED", 2))
	for ; points < want && !t.Failed(); seed++ {
		n, open := powerCuts(t, seed)
		points, slowest = points+n, max(slowest, open)
		if n < 50 {
			t.Fatalf("got %d writes to cut at; the test is blind", n)
		}
	}
	t.Logf("%d writes to cut at, up to seed %d; the slowest start after one took %s", points, seed-1, slowest.Round(time.Millisecond))
}

// powerCuts runs a store, and then starts it from what is left after a cut at
// each of its writes.
func powerCuts(t *testing.T, seed uint64) (points int, slowest time.Duration) {
	dir := t.TempDir()
	c := &cutter{fs: vfs.NewCrashableMem(), dir: dir, rand: rand.New(rand.NewPCG(seed, 0)), acked: map[uint64]bool{}}
	o := Options{MinFree: 1, Retention: -1, EventRetention: -1, fs: errorfs.Wrap(c.fs, c)}
	r := rand.New(rand.NewPCG(seed, 1))
	for seq, round := uint64(1), 0; round < 2; round++ {
		s := open(t, dir, o)
		c.mu.Lock()
		c.store = s
		c.mu.Unlock()
		for range 12 {
			appendTick(t, s, crashBatch(seq))
			c.mu.Lock()
			c.acked[seq] = true
			c.mu.Unlock()
			seq++
			var err error
			switch r.IntN(6) {
			case 0:
				err = s.Flush(context.Background())
			case 1:
				err = s.Roll(context.Background())
			case 2:
				err = s.db.Flush()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		closeStore(t, s)
		c.mu.Lock()
		c.store = nil
		c.mu.Unlock()
	}
	cuts := c.cuts
	for i, cut := range cuts {
		if testing.Short() && i%5 > 0 {
			continue
		}
		for _, name := range []string{"catalogue.db", "catalogue.db-wal", "catalogue.db-shm"} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		for name, data := range cut.catalogue {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		s, err := Open(dir, Options{MinFree: 1, Retention: -1, EventRetention: -1, fs: cut.fs})
		slowest = max(slowest, time.Since(began))
		if err != nil {
			t.Fatalf("seed %d, cut %d at %s: %v", seed, i, cut.op, err)
		}
		checkOnce(t, s, cut.acked)
		closeStore(t, s)
		if t.Failed() {
			t.Fatalf("seed %d, cut %d at %s", seed, i, cut.op)
		}
	}
	return len(cuts), slowest
}

// badDisk fails every write from one on.
type badDisk struct {
	mu    sync.Mutex
	left  int
	err   error
	first string
}

func (d *badDisk) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() != errorfs.OpIsWrite || op.Kind == errorfs.OpRemove {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left--; d.left >= 0 {
		return nil
	}
	if d.first == "" {
		d.first = fmt.Sprint(op.Kind, " ", filepath.Base(op.Path))
	}
	return d.err
}

func (d *badDisk) String() string { return "bad disk" }

// A disk that fails for good costs what is not acknowledged and no more: the
// process lives, and the next one finds the rest.
func TestDiskThatFailsAtAnyWriteLosesNothingAcknowledged(t *testing.T) {
	step := 3
	if testing.Short() {
		step = 17
	}
	failed := 0
	for left := 0; left < atLeast(t, "KVMETER_CRASH_FAILURES", 150); left += step {
		dir := t.TempDir()
		fs := vfs.NewCrashableMem()
		bad := &badDisk{left: left, err: syscall.EIO}
		acked := map[uint64]bool{}
		s, err := Open(dir, Options{MinFree: 1, Retention: -1, fs: errorfs.Wrap(fs, bad)})
		if err == nil {
			for seq := uint64(1); seq <= 12; seq++ {
				if _, err := s.Append(context.Background(), []store.Received{received(t, crashBatch(seq))}); err == nil {
					acked[seq] = true
				} else if !strings.Contains(err.Error(), "store cannot write any more") {
					t.Errorf("after %d writes: got %v", left, err)
				}
				if seq%4 == 0 {
					_ = s.Roll(context.Background()) // may fail: that is the point
				}
			}
			found := whole(t, s)
			for seq := range acked {
				if !found[seq] {
					t.Errorf("after %d writes: batch %d cannot be read", left, seq)
				}
			}
			_ = s.Close() // says that it failed
		}
		if bad.first != "" {
			failed++
		}
		after := fs.CrashClone(vfs.CrashCloneCfg{})
		s, err = Open(dir, Options{MinFree: 1, Retention: -1, fs: after})
		if err != nil {
			t.Fatalf("after %d writes, first failed %s: %v", left, bad.first, err)
		}
		checkOnce(t, s, acked)
		closeStore(t, s)
		if t.Failed() {
			t.Fatalf("after %d writes, first failed %s", left, bad.first)
		}
	}
	if failed == 0 {
		t.Error("no write failed; the test is blind")
	}
}

// fullDisk has no space while full is set.
type fullDisk struct {
	mu     sync.Mutex
	full   bool
	denied int
}

func (d *fullDisk) MaybeError(op errorfs.Op) error {
	if op.Kind != errorfs.OpFileWrite && op.Kind != errorfs.OpCreate {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.full {
		return nil
	}
	d.denied++
	return syscall.ENOSPC
}

func (d *fullDisk) String() string { return "full disk" }

func (d *fullDisk) set(full bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = full
}

func TestFullDiskIsSaidAndWaitedFor(t *testing.T) {
	d := &fullDisk{}
	s := open(t, t.TempDir(), Options{fs: errorfs.Wrap(vfs.NewMem(), d)})
	appendTick(t, s, crashBatch(1))
	d.set(true)
	_, err := s.Append(context.Background(), []store.Received{received(t, crashBatch(2))})
	if !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("got %v, want %v", err, store.ErrDiskFull)
	}
	if _, err := s.Append(context.Background(), []store.Received{received(t, crashBatch(3))}); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("got %v, want %v", err, store.ErrDiskFull)
	}
	if found := whole(t, s); !found[1] {
		t.Error("what was stored cannot be read")
	}
	d.set(false)
	// The write that waited ends; a redelivery finds its batch stored, or stores it.
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err = s.Append(context.Background(), []store.Received{received(t, crashBatch(2))}); err == nil || time.Now().After(deadline) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatalf("the disk has space again: got %v", err)
	}
	checkOnce(t, s, map[uint64]bool{1: true, 2: true})
	closeStore(t, s)
	if d.denied == 0 {
		t.Error("no write found the disk full; the test is blind")
	}
}

func TestFullDiskDoesNotHoldUpClose(t *testing.T) {
	d := &fullDisk{}
	s := open(t, t.TempDir(), Options{fs: errorfs.Wrap(vfs.NewMem(), d)})
	d.set(true)
	if _, err := s.Append(context.Background(), []store.Received{received(t, crashBatch(1))}); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("got %v, want %v", err, store.ErrDiskFull)
	}
	if err := s.Close(); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("close: got %v, want %v", err, store.ErrDiskFull)
	}
}

func TestStoreStopsAtTheFloorOfFreeSpace(t *testing.T) {
	fs := vfs.NewMem()
	set := func(free uint64) {
		fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: free, TotalBytes: 100 << 30})
	}
	set(2 << 30)
	s, err := Open(t.TempDir(), Options{fs: fs})
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	appendTick(t, s, crashBatch(1))
	set(1<<30 - 1)
	s.disk.checked = time.Time{}
	_, err = s.Append(context.Background(), []store.Received{received(t, crashBatch(2))})
	if !errors.Is(err, store.ErrDiskFull) || !strings.Contains(err.Error(), "1023 MiB are free") {
		t.Errorf("got %v", err)
	}
	if found := whole(t, s); !found[1] {
		t.Error("what was stored cannot be read")
	}
	set(1 << 30)
	s.disk.checked = time.Time{}
	appendTick(t, s, crashBatch(2))
}

// limitCatalogue keeps the catalogue from growing, as a full disk does.
func limitCatalogue(t *testing.T, s *Store, pages int) {
	t.Helper()
	s.catalogue.db.SetMaxOpenConns(1) // the limit is the connection's
	s.catalogue.db.SetMaxIdleConns(1)
	if _, err := s.catalogue.db.Exec(fmt.Sprint("PRAGMA max_page_count = ", pages)); err != nil {
		t.Fatal(err)
	}
}

func TestCatalogueThatCannotGrowDelaysTheFlushOnly(t *testing.T) {
	s := open(t, t.TempDir(), Options{HeadBytes: 8000})
	limitCatalogue(t, s, 1) // SQLite takes the present size for it
	acked := map[uint64]bool{}
	var err error
	large := func(seq uint64) *sample.Batch {
		b := crashBatch(seq)
		for i := range b.Rows {
			b.Rows[i].Metadata = fmt.Appendf(nil, `{"seq":%d,"pad":"%04096d"}`, seq, i)
		}
		return b
	}
	for seq := uint64(1); seq < 200; seq++ {
		if _, err = s.Append(context.Background(), []store.Received{received(t, large(seq))}); err != nil {
			break
		}
		acked[seq] = true
	}
	if !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("a head that cannot be flushed: got %v, want %v", err, store.ErrDiskFull)
	}
	if err := s.Flush(context.Background()); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("flush: got %v, want %v", err, store.ErrDiskFull)
	}
	for seq := range acked {
		if !whole(t, s)[seq] {
			t.Errorf("batch %d cannot be read", seq)
		}
	}
	limitCatalogue(t, s, 1<<30)
	if err := s.Flush(context.Background()); err != nil {
		t.Errorf("flush: %v", err)
	}
	checkOnce(t, s, acked)
	closeStore(t, s)
}
