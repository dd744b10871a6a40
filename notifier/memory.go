package notifier

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/journal"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
)

// When a snapshot takes the place of the one before and of what followed it.
const (
	compactAt      = 4 << 20          // bytes of records that follow it at least
	compactRecords = 20_000           // records that follow it; what RabbitMQ hands out is 65,535 at most
	recordSamples  = 20_000           // samples that a record is about, unless a batch has more
	refreshAfter   = 10 * time.Minute // its age in RabbitMQ, which closes the channel of what is unacked for 30
)

// records is where what transformers remember is recorded.
type records interface {
	// Append adds a record and returns when it is safe.
	Append(ctx context.Context, record []byte) error
	// Replace puts records in the place of all there are.
	Replace(ctx context.Context, records [][]byte) error
	Close() error
}

// memory is what the transformers of sinks remember, and where that is recorded.
// It is safe for concurrent use.
type memory struct {
	keeper *pipeline.Keeper
	m      *metrics

	mu       sync.Mutex
	to       records // nil: nowhere
	pending  [][]byte
	grown    int // bytes since the last snapshot
	appended int // records since then
	snapshot int // bytes of that
	at       time.Time
}

// newKeeper returns a keeper of a setup.
func (n *Notifier) newKeeper(s *setup) (*pipeline.Keeper, error) {
	return pipeline.NewKeeper(s.pipe, pipeline.Bound{Series: s.cfg.MaxSeries, Age: s.cfg.SeriesAge}, n.cfg.Name, func(d pipeline.Drop) {
		n.m.dropped.WithLabelValues(d.Sink, d.Stage, d.Reason).Inc()
	})
}

// openMemory opens the memory of a notifier that keeps all state itself.
func (n *Notifier) openMemory(s *setup) (*memory, error) {
	k, err := n.newKeeper(s)
	if err != nil {
		return nil, err
	}
	m := &memory{keeper: k, m: &n.m}
	if n.cfg.State == "" || n.cfg.StagePartitions > 0 {
		return m, nil
	}
	j, all, torn, err := journal.Open(n.cfg.State)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if torn > 0 {
		n.log.Info("a record of what transformers remember was cut short, and is not used: nothing that follows from it was published", zap.Int64("bytes", torn))
	}
	if err := m.start(context.Background(), n.log, j, all); err != nil {
		return nil, errors.Join(fmt.Errorf("state: %w", err), j.Close())
	}
	return m, nil
}

// start loads the records that there are, and records what follows.
func (m *memory) start(ctx context.Context, log *zap.Logger, to records, all [][]byte) error {
	kept, err := m.keeper.Load(all)
	if err != nil {
		m.m.stateErrors.Inc()
		log.Error("what transformers remembered is damaged; they go on with what could be read, and the first sample of other series gives nothing", zap.Error(err))
	}
	if kept > 0 {
		log.Info("transformers go on with what they remembered", zap.Int("transformers", kept))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.to = to
	m.keeper.Track()
	return m.replace(ctx)
}

// commitMany is commit where there is so much to record that it is worth a record
// of its own.
func (m *memory) commitMany(ctx context.Context) error {
	if m.keeper.Unrecorded() < recordSamples {
		return nil
	}
	return m.commit(ctx)
}

// commit records what was made of batches since it was last recorded.
func (m *memory) commit(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.to == nil {
		return nil
	}
	if record := m.keeper.Changes(); record != nil {
		m.pending = append(m.pending, record)
	}
	for len(m.pending) > 0 {
		if err := m.to.Append(ctx, m.pending[0]); err != nil {
			m.m.stateErrors.Inc()
			return fmt.Errorf("record what transformers remember: %w", err)
		}
		m.m.stateBytes.Add(float64(len(m.pending[0])))
		m.grown += len(m.pending[0])
		m.appended++
		m.pending = m.pending[1:]
	}
	if m.grown > max(compactAt, 2*m.snapshot) || m.appended >= compactRecords {
		return m.replace(ctx)
	}
	return nil
}

// refresh records all there is if the last snapshot is old.
func (m *memory) refresh(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.to == nil || time.Since(m.at) < refreshAfter || len(m.pending) > 0 {
		return nil
	}
	return m.replace(ctx)
}

// replace records all there is, in the place of what was recorded; mu is held.
func (m *memory) replace(ctx context.Context) error {
	began := time.Now()
	all := m.keeper.All()
	m.snapshot = 0
	for _, record := range all {
		m.snapshot += len(record)
	}
	if err := m.to.Replace(ctx, all); err != nil {
		m.m.stateErrors.Inc()
		return fmt.Errorf("record all that transformers remember: %w", err)
	}
	m.grown, m.appended, m.pending, m.at = 0, 0, nil, time.Now()
	m.m.stateBytes.Add(float64(m.snapshot))
	m.m.snapshots.Observe(time.Since(began).Seconds())
	return nil
}

// adopt makes m remember what transformers of old do that it has as well, and
// record it where old did.
func (m *memory) adopt(ctx context.Context, old *memory) (kept int, err error) {
	old.mu.Lock()
	defer old.mu.Unlock()
	if kept, err = m.keeper.Load(old.keeper.All()); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.to = old.to; m.to == nil {
		return kept, nil
	}
	m.keeper.Track()
	if err := m.replace(ctx); err != nil {
		return 0, errors.Join(err, old.replace(ctx)) // it goes on with old
	}
	old.to = nil
	return kept, nil
}

// close closes the place of the records; they stay.
func (m *memory) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.to == nil {
		return nil
	}
	to := m.to
	m.to = nil
	return to.Close()
}
