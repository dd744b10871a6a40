package export

import (
	"bytes"
	"cmp"
	"context"
	"io"
	"math/bits"
	"slices"

	"github.com/parquet-go/parquet-go"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// A row group has about so many bytes of texts, uncompressed: it is held in
// memory, compressed, until it is written.
const groupBytes = 64 << 20

// span is a time from the first µs to before the second.
type span struct{ from, to int64 }

// table is a kind of file.
type table struct {
	name string
	// count returns how many rows the day has.
	count func(ctx context.Context, s Store, day span) (int64, error)
	// write writes the day's file and returns how many rows it has.
	write func(ctx context.Context, s Store, day span, w io.Writer) (int64, error)
}

var tables = [...]table{
	{"samples", countSamples, writeSamples},
	{"gaps", countGaps, writeGaps},
	{"events", countEvents, writeEvents},
}

// sampleRow is a row of samples.
type sampleRow struct {
	Meter     string  `parquet:"meter,dict"`
	Type      string  `parquet:"type,dict"`
	Unit      string  `parquet:"unit,dict"`
	Resource  string  `parquet:"resource_id,dict"`
	Project   *string `parquet:"project_id,optional,dict"`
	User      *string `parquet:"user_id,optional,dict"`
	Source    string  `parquet:"source,dict"`
	Timestamp int64   `parquet:"timestamp,timestamp(microsecond:utc)"`
	Volume    float64 `parquet:"volume"`
	// Exact is the volume in decimal where Volume is only the nearest float64.
	Exact       *string `parquet:"volume_exact,optional"`
	Metadata    *string `parquet:"metadata,optional,dict"`
	ID          string  `parquet:"message_id"`
	Origin      string  `parquet:"origin,dict"`
	Incarnation string  `parquet:"incarnation,dict"`
	Recorded    int64   `parquet:"recorded_at,timestamp(microsecond:utc)"`
}

// rowOf returns the row of a sample. It shares texts with the row of the sample
// before it, if there is one: they are mostly the same.
func rowOf(s, before *store.Sample, last *sampleRow) sampleRow {
	r := sampleRow{
		Meter: s.Name, Type: string(s.Kind), Unit: s.Unit, Resource: s.Resource, Source: s.Source,
		Timestamp: s.Time, Volume: s.Volume.Float64(), ID: s.ID.String(), Origin: string(s.Origin), Recorded: s.Recorded,
	}
	if before != nil && s.Project == before.Project && s.User == before.User && s.Incarnation == before.Incarnation {
		r.Project, r.User, r.Incarnation = last.Project, last.User, last.Incarnation
	} else {
		r.Project, r.User, r.Incarnation = known(s.Project), known(s.User), s.Incarnation.String()
	}
	if before != nil && bytes.Equal(s.Metadata, before.Metadata) {
		r.Metadata = last.Metadata
	} else {
		r.Metadata = known(string(s.Metadata))
	}
	if !isFloat(s.Volume) {
		r.Exact = known(s.Volume.String())
	}
	return r
}

// size returns about how many bytes of texts the row has that differ from row
// to row.
func (r *sampleRow) size() int {
	n := len(r.ID) + 64
	if r.Metadata != nil {
		n += len(*r.Metadata)
	}
	return n
}

// known returns nil of a text that is empty.
func known(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// isFloat tells whether a float64 holds the volume exactly: of an integer, whether
// what is between its first and its last bit fits into 53 bits.
func isFloat(v sample.Volume) bool {
	n := v.Bits
	switch {
	case v.Tag == sample.F64 || n == 0:
		return true
	case v.Tag == sample.I64 && int64(n) < 0:
		n = -n
	}
	return bits.Len64(n)-bits.TrailingZeros64(n) <= 53
}

func during(d span) []store.Filter {
	return []store.Filter{store.Where(store.FieldTime, store.Ge, d.from), store.Where(store.FieldTime, store.Lt, d.to)}
}

// countSamples counts by statistics, which read the rollups of what is merged.
func countSamples(ctx context.Context, s Store, d span) (n int64, err error) {
	all, err := s.Statistics(ctx, store.StatisticsQuery{Filter: store.And(during(d)...), NoSquares: true})
	for i := range all {
		n += all[i].Count
	}
	return n, err
}

func writeSamples(ctx context.Context, s Store, d span, w io.Writer) (int64, error) {
	meters, err := s.Meters(ctx, store.Filter{})
	if err != nil {
		return 0, err
	}
	type series struct{ meter, resource string }
	all := make([]series, 0, len(meters))
	for i := range meters { // sorted by these two
		if one := (series{meters[i].Name, meters[i].Resource}); len(all) == 0 || all[len(all)-1] != one {
			all = append(all, one)
		}
	}
	meters = nil
	out := newWriter[sampleRow](w, "meter", "resource_id", "timestamp")
	var samples []store.Sample
	for _, one := range all {
		samples = samples[:0]
		err := s.Samples(ctx, store.And(append(during(d), store.Where(store.FieldMeter, store.Eq, one.meter), store.Where(store.FieldResource, store.Eq, one.resource))...),
			func(s store.Sample) bool {
				samples = append(samples, s)
				return true
			})
		if err != nil {
			return out.n, err
		}
		slices.SortStableFunc(samples, func(a, b store.Sample) int { return cmp.Compare(a.Time, b.Time) })
		var before *store.Sample
		var row sampleRow
		for i := range samples {
			row = rowOf(&samples[i], before, &row)
			before = &samples[i]
			if err := out.add(row, row.size()); err != nil {
				return out.n, err
			}
		}
		clear(samples)
	}
	return out.n, out.close()
}

// gapRow is a row of gaps, on the day on which the gap begins.
type gapRow struct {
	Meter    string `parquet:"meter,dict"`
	Resource string `parquet:"resource_id,dict"`
	From     int64  `parquet:"from,timestamp(microsecond:utc)"`
	To       int64  `parquet:"to,timestamp(microsecond:utc)"`
	Reason   string `parquet:"reason,dict"`
	Node     string `parquet:"node,dict"`
}

// gaps returns the gaps that begin on the day.
func gaps(ctx context.Context, s Store, d span) ([]sample.Gap, error) {
	all, err := s.Gaps(ctx, d.from, d.to-1)
	return slices.DeleteFunc(all, func(g sample.Gap) bool { return g.From < d.from }), err
}

func countGaps(ctx context.Context, s Store, d span) (int64, error) {
	all, err := gaps(ctx, s, d)
	return int64(len(all)), err
}

func writeGaps(ctx context.Context, s Store, d span, w io.Writer) (int64, error) {
	all, err := gaps(ctx, s, d)
	if err != nil {
		return 0, err
	}
	slices.SortFunc(all, func(a, b sample.Gap) int {
		return cmp.Or(cmp.Compare(a.Meter, b.Meter), cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.From, b.From))
	})
	out := newWriter[gapRow](w, "meter", "resource_id", "from")
	for i := range all {
		g := &all[i]
		row := gapRow{Meter: g.Meter, Resource: g.Resource, From: g.From, To: g.To, Reason: g.Reason, Node: g.Node}
		if err := out.add(row, len(g.Reason)+64); err != nil {
			return out.n, err
		}
	}
	return out.n, out.close()
}

// eventRow is a row of events, on the day on which the event was generated.
type eventRow struct {
	Type      string     `parquet:"event_type,dict"`
	ID        string     `parquet:"message_id"`
	Generated int64      `parquet:"generated,timestamp(microsecond:utc)"`
	Traits    []traitRow `parquet:"traits,list"`
	Raw       *string    `parquet:"raw,optional"`
}

// traitRow is a trait of an event.
type traitRow struct {
	Name  string `parquet:"name,dict"`
	Type  string `parquet:"type,dict"`
	Value string `parquet:"value"`
}

// rowOfEvent returns the row of an event and about how many bytes of texts it has.
func rowOfEvent(e *sample.Event) (eventRow, int) {
	row := eventRow{Type: e.Type, ID: e.ID, Generated: e.Generated, Raw: known(string(e.Raw))}
	size := len(e.ID) + len(e.Raw) + 64
	for i := range e.Traits {
		t := &e.Traits[i]
		row.Traits = append(row.Traits, traitRow{Name: t.Name, Type: t.Type.String(), Value: valueOf(t)})
		size += len(row.Traits[i].Value) + 16
	}
	return row, size
}

// valueOf returns the value of a trait as text.
func valueOf(t *sample.Trait) string {
	switch t.Type {
	case sample.TextTrait:
		return t.Text
	case sample.DatetimeTrait:
		return string(sample.AppendTime(nil, t.Int))
	}
	return string(t.AppendValue(nil))
}

func eventsOf(d span, eventType string) store.EventQuery {
	last := d.to - 1
	return store.EventQuery{Type: eventType, From: &d.from, To: &last}
}

// countEvents reads the day's events: of them there are few beside samples.
func countEvents(ctx context.Context, s Store, d span) (n int64, err error) {
	err = s.Events(ctx, eventsOf(d, ""), func(sample.Event) bool {
		n++
		return true
	})
	return n, err
}

func writeEvents(ctx context.Context, s Store, d span, w io.Writer) (int64, error) {
	types, err := s.EventTypes(ctx)
	if err != nil {
		return 0, err
	}
	out := newWriter[eventRow](w, "event_type", "generated")
	for _, eventType := range types {
		var failed error
		err := s.Events(ctx, eventsOf(d, eventType), func(e sample.Event) bool {
			failed = out.add(rowOfEvent(&e))
			return failed == nil
		})
		if err := cmp.Or(err, failed); err != nil {
			return out.n, err
		}
	}
	return out.n, out.close()
}

// writer writes rows a thousand at a time.
type writer[T any] struct {
	file *parquet.GenericWriter[T]
	rows []T
	n    int64
	size int // of the row group's texts, bytes
}

func newWriter[T any](w io.Writer, sorted ...string) *writer[T] {
	columns := make([]parquet.SortingColumn, len(sorted))
	for i, c := range sorted {
		columns[i] = parquet.Ascending(c)
	}
	return &writer[T]{
		file: parquet.NewGenericWriter[T](w, parquet.Compression(&parquet.Zstd), parquet.SortingWriterConfig(parquet.SortingColumns(columns...))),
		rows: make([]T, 0, 1024),
	}
}

// add adds a row with about so many bytes of texts.
func (w *writer[T]) add(row T, size int) error {
	w.rows = append(w.rows, row)
	w.n++
	w.size += size
	if len(w.rows) < cap(w.rows) && w.size < groupBytes {
		return nil
	}
	return w.flush()
}

func (w *writer[T]) flush() error {
	if _, err := w.file.Write(w.rows); err != nil {
		return err
	}
	clear(w.rows)
	w.rows = w.rows[:0]
	if w.size < groupBytes {
		return nil
	}
	w.size = 0
	return w.file.Flush()
}

func (w *writer[T]) close() error {
	if err := w.flush(); err != nil {
		return err
	}
	return w.file.Close()
}
