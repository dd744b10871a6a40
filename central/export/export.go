// Package export writes days that are over as Parquet files for Spark, Trino,
// DuckDB and the like: to a folder or to S3. docs/export.md describes the files.
package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/parquet-go/parquet-go"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

const day = 24 * time.Hour

// What is due is looked for so often, and so much later after a failure.
const (
	every = time.Hour
	again = 5 * time.Minute
)

// Config is the part of central.yaml about the export.
type Config struct {
	// To is the folder, or s3://BUCKET/PREFIX, to which days that are over are
	// written as Parquet. Empty: off.
	To string `yaml:"to"`
	// After is how long after its end, at midnight UTC, a day is written.
	After time.Duration `yaml:"after"`
	// Days is how many of the days that are over are looked after: written where
	// they have no file yet, and written again when late samples came. It must
	// not reach back to what store.retention deletes.
	Days int `yaml:"days"`
	// S3 says how to reach the bucket of to.
	S3 S3 `yaml:"s3"`
}

// S3 says how to reach a bucket.
type S3 struct {
	// Endpoint is the URL of the service.
	Endpoint string `yaml:"endpoint"`
	// Region of the bucket. Empty: the service is asked for it.
	Region string `yaml:"region"`
	// Credentials is the path of a file in the form of ~/.aws/credentials. Empty:
	// the variables AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN.
	Credentials string `yaml:"credentials"`
}

// DefaultConfig returns the configuration of no export.
func DefaultConfig() Config {
	return Config{After: 2 * time.Hour, Days: 7, S3: S3{Endpoint: "https://s3.amazonaws.com"}}
}

// Check returns what is wrong with the settings, in the terms of central.yaml.
// Retention is how long the store keeps samples; 0: for ever.
func (c *Config) Check(retention time.Duration) error {
	if c.To == "" {
		return nil
	}
	switch reach := time.Duration(c.Days)*day + c.After; {
	case c.After < 0:
		return fmt.Errorf("export.after %s: must not be negative", c.After)
	case c.Days < 1:
		return fmt.Errorf("export.days %d: must be at least 1", c.Days)
	case retention > 0 && reach > retention:
		return fmt.Errorf("export.days %d: with export.after %s it reaches back further than store.retention %s; make it smaller", c.Days, c.After, retention)
	}
	_, err := c.target()
	return err
}

// target returns where the files go.
func (c *Config) target() (target, error) {
	if !strings.Contains(c.To, "://") {
		return folder(c.To), nil
	}
	u, err := url.Parse(c.To)
	if err != nil || u.Scheme != "s3" || u.Host == "" || u.Host != u.Hostname() || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("export.to %s: write a path, or s3://BUCKET/PREFIX", c.To)
	}
	if c.S3.Credentials == "" && os.Getenv("AWS_ACCESS_KEY_ID") == "" {
		return nil, errors.New("export.to is a bucket and there are no credentials: name a file of them in export.s3.credentials, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
	}
	if c.S3.Credentials != "" {
		if _, err := os.Stat(c.S3.Credentials); err != nil {
			return nil, fmt.Errorf("export.s3.credentials: %w", err)
		}
	}
	return newBucket(c.S3, u.Host, strings.Trim(u.Path, "/"))
}

// Store is what is read of a [store.Store].
type Store interface {
	// Samples is [store.Store.Samples].
	Samples(ctx context.Context, f store.Filter, yield func(store.Sample) bool) error
	// Meters is [store.Store.Meters].
	Meters(ctx context.Context, f store.Filter) ([]store.Meter, error)
	// Statistics is [store.Store.Statistics].
	Statistics(ctx context.Context, q store.StatisticsQuery) ([]store.Statistics, error)
	// Gaps is [store.Store.Gaps].
	Gaps(ctx context.Context, from, to int64) ([]sample.Gap, error)
	// Events is [store.Events.Events].
	Events(ctx context.Context, q store.EventQuery, yield func(sample.Event) bool) error
	// EventTypes is [store.Events.EventTypes].
	EventTypes(ctx context.Context) ([]string, error)
}

// Deps is what an export works with.
type Deps struct {
	Log      *zap.Logger
	Store    Store
	Clock    func() time.Time
	Registry prometheus.Registerer // nil: no metrics
}

// Exporter writes the days that are over.
type Exporter struct {
	cfg          Config
	deps         Deps
	target       target
	m            metrics
	every, again time.Duration
}

// New returns an exporter that is not running yet.
func New(cfg Config, d Deps) (*Exporter, error) {
	t, err := cfg.target()
	if err != nil {
		return nil, err
	}
	e := &Exporter{cfg: cfg, deps: d, target: t, m: newMetrics(), every: every, again: again}
	if err := e.m.register(d.Registry); err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	return e, nil
}

// Run writes what is due until ctx ends. What fails is logged, counted and tried
// again.
func (e *Exporter) Run(ctx context.Context) {
	for {
		wait := e.every
		if err := e.pass(ctx); err != nil && ctx.Err() == nil {
			wait = e.again
			e.deps.Log.Warn("days were not exported; they will be tried again", zap.String("to", e.cfg.To), zap.Duration("after", wait), zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// pass writes each file that is due. It returns the first failure, and goes on
// to the other files after it.
func (e *Exporter) pass(ctx context.Context) error {
	var first error
	end := e.deps.Clock().Add(-e.cfg.After).UTC().Truncate(day)
	for n := e.cfg.Days; n > 0; n-- {
		from := end.Add(-time.Duration(n) * day)
		for i := range tables {
			err := e.export(ctx, &tables[i], from)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				e.m.failures.Inc()
				if first == nil {
					first = err
				}
			}
		}
	}
	return first
}

// export writes the file of a day unless it has all rows that there are. Rows
// are never changed in the store, so that their number says whether more came.
// A file that has more of them is from before some expired, and stays.
func (e *Exporter) export(ctx context.Context, t *table, from time.Time) error {
	name := fmt.Sprintf("%s/day=%s/part-0.parquet", t.name, from.Format(time.DateOnly))
	have, err := e.rows(ctx, name)
	if err != nil {
		return fmt.Errorf("read %s, which was exported before (if it is damaged, delete it and it is written again): %w", name, err)
	}
	span := span{from.UnixMicro(), from.Add(day).UnixMicro()}
	count, err := t.count(ctx, e.deps.Store, span)
	if err != nil {
		return fmt.Errorf("count the rows of %s: %w", name, err)
	}
	if count <= have {
		return nil
	}
	start := e.deps.Clock()
	var wrote int64
	err = e.target.create(ctx, name, func(w io.Writer) (err error) {
		wrote, err = t.write(ctx, e.deps.Store, span, w)
		if err == nil && wrote < have {
			err = fmt.Errorf("the store has %d rows of the day left and the file has %d", wrote, have)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	e.m.files.Inc()
	e.m.rows.Add(float64(wrote))
	e.deps.Log.Info("exported a day", zap.String("file", name), zap.Int64("rows", wrote), zap.Int64("rows before", have), zap.Duration("took", e.deps.Clock().Sub(start)))
	return nil
}

// rows returns how many rows a file has; 0 of one that is not there.
func (e *Exporter) rows(ctx context.Context, name string) (int64, error) {
	f, err := e.target.open(ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	p, err := parquet.OpenFile(f, f.size, parquet.SkipPageIndex(true), parquet.SkipBloomFilters(true))
	if err != nil {
		return 0, err
	}
	return p.NumRows(), nil
}

type metrics struct{ files, rows, failures prometheus.Counter }

func newMetrics() metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvmeter", Subsystem: "export", Name: name, Help: help})
	}
	return metrics{
		files:    counter("files_total", "Files of days that were exported, those that were written again included."),
		rows:     counter("rows_total", "Rows of those files."),
		failures: counter("failures_total", "Attempts after which the file of a day was not there; the log has the reason."),
	}
}

// register registers the metrics; r may be nil.
func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	return errors.Join(r.Register(m.files), r.Register(m.rows), r.Register(m.failures))
}
