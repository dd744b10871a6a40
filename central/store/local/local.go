// Package local is the embedded storage engine: samples as encoded chunks in
// Pebble, what they have in common in a SQLite catalogue. It needs no service
// and no cgo, and one process at a time has it open.
//
// Append writes the batch as it was received and waits for the disk; the batch
// then waits in memory, in the head, where queries find it, until a flush in
// the background turns a full head into chunks. One Pebble batch writes the
// chunks and deletes the received batches, so that a crash leaves either.
package local

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/failpoint"
)

// formatVersion is the format of the store as a whole. A store of a newer
// format is refused.
const formatVersion = 2

// Options say how a store behaves. The zero Options are good.
type Options struct {
	Log      *zap.Logger           // nil: silent
	Registry prometheus.Registerer // of the store's own metrics; nil: none

	// Retention is how long samples are kept, in whole days of their own time;
	// 0: 30 days, negative: for ever.
	Retention time.Duration
	// RollupRetention is the same for rollups; 0: 400 days.
	RollupRetention time.Duration
	// TimeToLive keeps some series for another time: the first that fits.
	TimeToLive []TTL
	// EventRetention is the same for events; 0: 400 days.
	EventRetention time.Duration
	// FlushEvery and HeadBytes bound what is in memory, and so what a start
	// after a crash reads again; 0: 10 minutes, 64 MiB. At most two heads of
	// that size are in memory.
	FlushEvery time.Duration
	HeadBytes  int64
	// MinFree is the floor of free disk in bytes: below it Append returns
	// [store.ErrDiskFull]; 0: 1 GiB, or 5 % of a disk of less than 20 GiB.
	MinFree uint64
	// CacheBytes bounds the cache of blocks read from disk; 0: 64 MiB.
	CacheBytes int64

	Clock func() time.Time // nil: time.Now

	fs      vfs.FS // of Pebble; nil: the disk
	lenient bool   // records that cannot be read are left out where Open can do without
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Retention == 0 {
		o.Retention = 30 * 24 * time.Hour
	}
	if o.RollupRetention == 0 {
		o.RollupRetention = 400 * 24 * time.Hour
	}
	if o.EventRetention == 0 {
		o.EventRetention = 400 * 24 * time.Hour
	}
	if o.FlushEvery == 0 {
		o.FlushEvery = 10 * time.Minute
	}
	if o.HeadBytes == 0 {
		o.HeadBytes = 64 << 20
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = 64 << 20
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.fs == nil {
		o.fs = vfs.Default
	}
	return o
}

// Store implements [store.Store].
type Store struct {
	options   Options
	log       *zap.Logger
	metrics   *metrics
	disk      *disk
	said      sync.Map // paths of damaged files
	lock      *pebble.Lock
	db        *pebble.DB
	catalogue *catalogue

	requests  chan *request
	kick      chan chan error // asks the flusher to flush all
	frozenUp  chan struct{}   // tells the flusher that there is a frozen head
	flushedUp chan struct{}   // tells the roller that there was a flush
	stop      chan struct{}
	wg        sync.WaitGroup
	closing   sync.Once
	closed    error

	// Of the committer (and Open before it runs).
	decoder *sample.Decoder
	next    uint64 // sequence number of the next batch
	epochs  map[epoch]seqSet
	eventNo uint64   // of the next event
	counts  []uint32 // scratch, by row
	sums    []uint64

	idsSince atomic.Int64 // ms: ids of batches of before are forgotten

	mu         sync.RWMutex
	active     *head
	frozen     *head         // being flushed; nil: none
	thawed     chan struct{} // closed when frozen becomes nil, or could not be flushed
	flushErr   error         // of the last flush
	published  uint64        // newest batch that readers may see
	failed     error         // set once Pebble cannot write any more
	failing    chan struct{} // closed when failed is set
	shut       bool          // no more queries
	readers    sync.WaitGroup
	hours      []hour // that have chunks, ascending
	pending    map[hour]pendingHour
	rolled     []day        // that have rollups, ascending
	daysRolled map[day]bool // of which there are rollups of the whole day
	eventDays  []day        // that have events, ascending
	types      eventTypes

	writing           sync.Mutex // held by who flushes, expires or commits what is rolled up
	rolling           sync.Mutex // held by who rolls up
	collecting        sync.Mutex // held by who takes from the catalogue, or copies it
	eventWriting      sync.Mutex // held by who commits or expires events
	generation        uint32     // of the last flush
	flushedGeneration uint32     // the same, for who holds mu
}

var _ store.Store = (*Store)(nil)

type epoch struct {
	node  string
	epoch uint64
}

// Open opens the store in a folder, which it makes if it is not there.
func Open(dir string, options Options) (*Store, error) {
	o := options.withDefaults()
	s := &Store{
		options: o, log: o.Log, requests: make(chan *request, 64), kick: make(chan chan error), frozenUp: make(chan struct{}, 1),
		stop: make(chan struct{}), failing: make(chan struct{}), active: newHead(), epochs: map[epoch]seqSet{}, types: eventTypes{}, pending: map[hour]pendingHour{}, daysRolled: map[day]bool{}, flushedUp: make(chan struct{}, 1),
	}
	s.disk = newDisk(o.fs, dir, o.MinFree, o.Log, s.fail)
	s.metrics = newMetrics(s)
	if err := s.contain(func() error { return s.open(dir) }, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), s.release())
	}
	if err := s.metrics.register(o.Registry); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), s.release())
	}
	s.wg.Go(s.commitLoop)
	s.wg.Go(s.flushLoop)
	s.wg.Go(s.rollLoop)
	return s, nil
}

func (s *Store) open(dir string) error {
	var err error
	if s.decoder, err = sample.NewDecoder(); err != nil {
		return err
	}
	samples := filepath.Join(dir, "samples")
	if err := s.disk.makeFolder(dir); err != nil {
		return err
	}
	if err := s.disk.makeFolder(samples); err != nil {
		return err
	}
	if s.lock, err = pebble.LockDirectory(samples, s.disk); err != nil {
		return fmt.Errorf("another kvmeter uses this store; stop it or choose another folder (%w)", err)
	}
	// Where its Open returns an error Pebble panics if it is reading its tables'
	// statistics by then: it must not see one.
	s.disk.run()
	if s.db, err = pebble.Open(samples, s.pebbleOptions()); err != nil {
		return fmt.Errorf("open samples: %w", err)
	}
	flushed, err := s.loadState()
	if err != nil {
		return err
	}
	if s.catalogue, err = openCatalogue(filepath.Join(dir, "catalogue.db")); err != nil {
		return err
	}
	if err := s.load(); err != nil {
		return err
	}
	if err := s.replay(flushed); err != nil {
		return err
	}
	s.disk.wait()
	return nil
}

// release closes what is open. A Pebble that hangs in a write is left as it is.
func (s *Store) release() error {
	var errs []error
	if s.db != nil {
		errs = append(errs, s.contain(s.db.Close, s.disk.stalled()))
	}
	if s.catalogue != nil {
		errs = append(errs, s.catalogue.close())
	}
	if s.lock != nil && s.failure() == nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// Close flushes and closes the store. Appends that are waiting fail; queries
// that run are waited for, a full disk is not.
func (s *Store) Close() error {
	s.closing.Do(func() {
		s.metrics.unregister()
		close(s.stop)
		err := s.contain(func() error {
			s.wg.Wait()
			s.mu.Lock()
			s.shut = true
			s.mu.Unlock()
			s.readers.Wait()
			if err := s.flushAll(); err != nil {
				// Nothing is lost: the next start reads the batches again.
				s.log.Warn("store closed without a flush", zap.Error(err))
			}
			return nil
		}, s.disk.stalled())
		if err != nil {
			s.closed = fmt.Errorf("close store: %w", errors.Join(err, s.catalogue.close()))
			return
		}
		s.closed = s.release()
	})
	return s.closed
}

// Flush writes what is in memory as chunks.
func (s *Store) Flush(ctx context.Context) error {
	done := make(chan error, 1)
	select {
	case s.kick <- done:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stop:
		return errClosed
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errClosed = errors.New("store is closed")

func newerFormat(found, known int) error {
	return fmt.Errorf("it was written by a newer kvmeter (format %d; this program knows up to %d): run that version, or choose another folder", found, known)
}

func (s *Store) failure() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.failed
}

func (s *Store) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = fmt.Errorf("store cannot write any more, restart it: %w", err)
		close(s.failing)
		s.log.Error("store failed; what is stored stays readable until the restart", zap.Error(err))
	}
	return s.failed
}

// commit applies a Pebble batch and waits until it is synced. The batch is
// closed then; one that fails is left to the garbage collector, since Pebble
// may still hang in it.
func (s *Store) commit(b *pebble.Batch) error {
	failpoint.At(failpoint.StoreCommit)
	if err := s.guard(func() error { return s.db.Apply(b, pebble.Sync) }); err != nil {
		return err
	}
	failpoint.At(failpoint.StoreCommitted)
	return b.Close()
}

// guard runs a write of Pebble, which cannot go on after an error of its log:
// from then on the store only reads.
func (s *Store) guard(write func() error) error {
	if err := s.contain(write, nil); err != nil {
		return s.fail(err)
	}
	return nil
}

// contain runs something that may panic, end its goroutine ([pebbleLog.Fatalf])
// or hang because the store has failed, or the disk is full and stalled says
// that this is not to be waited for.
func (s *Store) contain(do func() error, stalled <-chan struct{}) error {
	if err := s.failure(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		err := errors.New("the database gave up")
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("%v", p)
			}
			ended <- err
		}()
		err = do()
	}()
	select {
	case err := <-ended:
		if failed := s.failure(); err != nil && failed != nil {
			return failed // says why
		}
		return err
	case <-s.failing:
		return s.failure()
	case <-stalled:
		return s.disk.full()
	}
}

// pebbleLog passes Pebble's log on.
type pebbleLog struct {
	*zap.SugaredLogger
	fail func(error) error
}

// Infof logs for debugging: Pebble says much.
func (l pebbleLog) Infof(format string, args ...any) { l.Debugf(format, args...) }

// Fatalf ends the goroutine, since Pebble expects not to go on, and the
// store's writing; not the process, which does more than store.
func (l pebbleLog) Fatalf(format string, args ...any) {
	_ = l.fail(fmt.Errorf(format, args...))
	runtime.Goexit()
}

// damaged says that a file of the samples' database is damaged, once: what is in
// it cannot be read, which costs neither the rest nor what is yet to be stored.
func (s *Store) damaged(info pebble.DataCorruptionInfo) {
	if _, said := s.said.LoadOrStore(info.Path, true); !said {
		s.log.Error("a file of the store is damaged; what it holds cannot be read: restore a backup",
			zap.String("file", info.Path), zap.Error(info.Details))
	}
}

// pebbleOptions are those of the samples' database. Blocks are large since
// most reads are of neighbours, and compressed well only where data rests.
func (s *Store) pebbleOptions() *pebble.Options {
	o := &pebble.Options{
		FS: s.disk, Lock: s.lock, Logger: pebbleLog{s.log.Named("pebble").Sugar(), s.fail},
		EventListener:               &pebble.EventListener{DataCorruption: s.damaged},
		FormatMajorVersion:          pebble.FormatValueSeparation,
		CacheSize:                   s.options.CacheBytes,
		MemTableSize:                32 << 20,
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       1000, // a slow disk delays compactions, not samples
		LBaseMaxBytes:               64 << 20,
	}
	for i := range o.Levels {
		o.Levels[i] = pebble.LevelOptions{BlockSize: 32 << 10, IndexBlockSize: 64 << 10}
	}
	o.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionBalanced })
	return o
}
