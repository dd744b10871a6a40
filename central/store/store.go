// Package store is what central keeps: samples, the resources and meters they
// speak of, and gaps. Engines live in folders of their own; each passes the
// suite in storetest.
package store

import (
	"context"
	"errors"

	"github.com/kvmeter/kvmeter/sample"
)

// Errors that callers decide by.
var (
	ErrNotFound = errors.New("not found")
	// ErrDiskFull is returned by Append when the disk is below the floor of
	// free space. What was stored stays readable.
	ErrDiskFull = errors.New("store is short of disk space")
	// ErrTooManyRows is returned by Statistics for a query with more rows than it
	// allows.
	ErrTooManyRows = errors.New("more rows than the query allows")
)

// Received is a batch as it came from the bus.
type Received struct {
	Body  []byte        // encoded, as received
	Batch *sample.Batch // Body, decoded
}

// Stored says what Append did with one batch.
type Stored struct {
	Duplicate bool  // it was stored before; nothing changed
	Refused   error // it can never be stored; it costs no other batch
}

// Store keeps samples and events. All methods are safe for concurrent use.
// Times are µs since the Unix epoch, UTC.
type Store interface {
	Events

	// Append stores the batches and returns when they are synced: they
	// survive the death of the process and of the machine. A reader sees a
	// batch wholly or not at all, and sees it once Append has returned. A batch
	// is one by (node, epoch, seq), or by its id where it has explicit ids;
	// storing it again changes nothing. A sample is one by (series, time, id):
	// one that comes in two batches counts once, and with the first. After an
	// error none, some or all of them may be stored; appending all of them
	// again is right. Append keeps neither bodies nor batches, but after an error
	// it may read them for a while yet.
	Append(ctx context.Context, batches []Received) ([]Stored, error)

	// Samples calls yield for the samples that match, newest first, those of
	// equal time in the order they were stored, until yield returns false.
	Samples(ctx context.Context, f Filter, yield func(Sample) bool) error
	// Sample returns a sample with the given id, or ErrNotFound.
	Sample(ctx context.Context, id sample.ID) (Sample, error)

	// Meters returns one entry for each meter (name, kind, unit) of each
	// resource, with the owner that its newest sample has (of several at that
	// time the one stored last); sorted by name, resource, kind, unit. The filter
	// is applied to that newest sample; it must not name a time, a volume or an id.
	Meters(ctx context.Context, f Filter) ([]Meter, error)
	// Resources returns the resources that have a sample that matches; sorted
	// by id.
	Resources(ctx context.Context, f Filter) ([]Resource, error)

	// Statistics returns the aggregates of the samples that match. It costs in
	// proportion to those samples, not to the periods of the query. Samples
	// that lack the metadata key of a group are left out. Sorted by bucket,
	// group (unknown first) and unit.
	Statistics(ctx context.Context, q StatisticsQuery) ([]Statistics, error)

	// Usage calls yield for what was used of each resource, sorted by resource,
	// meter, kind, unit, project, source and split, until yield returns false.
	Usage(ctx context.Context, q UsageQuery, yield func(Usage) bool) error

	// Gaps returns the gaps that overlap the given time, both ends included,
	// oldest first.
	// Their Node is always set; gaps with equal fields are one.
	Gaps(ctx context.Context, from, to int64) ([]sample.Gap, error)

	// Close writes what is in memory and ends the engine.
	Close() error
}

// Sample is a stored sample.
type Sample struct {
	sample.Sample
	Recorded int64 // when its batch was stored
}

// Meter is a meter of a resource.
type Meter struct {
	sample.MeterRef
	Resource, Source, Project, User string // of the newest sample
}

// Resource is what samples were taken of.
type Resource struct {
	ID                    string
	Source, Project, User string   // of the newest sample
	Metadata              []byte   // of the newest sample; a JSON object, or empty
	First, Last           int64    // times of the oldest and newest sample that match
	Meters                []string // names of all its meters, sorted
}

// Field is what a condition is about.
type Field string

// The fields. FieldMetadata's condition names the path in Key.
const (
	FieldMeter    Field = "meter"
	FieldKind     Field = "type"
	FieldUnit     Field = "unit"
	FieldResource Field = "resource_id"
	FieldProject  Field = "project_id"
	FieldUser     Field = "user_id"
	FieldSource   Field = "source"
	FieldTime     Field = "timestamp"
	FieldRecorded Field = "recorded_at"
	FieldVolume   Field = "volume"
	FieldID       Field = "message_id"
	FieldMetadata Field = "metadata"
)

// Op compares a field with a value.
type Op string

// The operators.
const (
	Eq Op = "eq"
	Ne Op = "ne"
	Lt Op = "lt"
	Le Op = "le"
	Gt Op = "gt"
	Ge Op = "ge"
	// In holds where the field equals one of the values of a list.
	In Op = "in"
	// Match holds where a regular expression (RE2) matches somewhere in the field
	// as the API prints it; of metadata, where that is a text.
	Match Op = "match"
)

// Filter selects samples. The zero Filter selects all. Engines find the terms
// that every match must satisfy and read no more than they must.
type Filter struct {
	// Exactly one of these is set, or none.
	And, Or []Filter
	Not     *Filter
	Cond    *Cond
}

// Cond is a comparison. A missing value (a project that is not known, a key
// that the metadata lacks) is unknown: neither the comparison nor its negation
// selects the sample. Metadata of different types is never equal and has no
// order; numbers are compared by value.
type Cond struct {
	Field Field
	Key   string // path in the metadata: "flavor.vcpus", "tags[0]"
	Op    Op
	// Value is a string for names and ids, nil for "is not known" (Eq only),
	// int64 µs for times, sample.Volume for volumes. Metadata compares by type:
	// string, float64 or json.Number, bool, nil (JSON null), or for lists and
	// objects what encoding/json makes of them. In takes a []any of such values
	// (nil among them only for metadata), Match the string that is its pattern.
	Value any

	compiled *compiled // of In and Match; set by [Compile]
}

// And returns the filter that selects what all of fs select.
func And(fs ...Filter) Filter { return Filter{And: fs} }

// Where returns the filter of one comparison.
func Where(field Field, op Op, value any) Filter {
	return Filter{Cond: &Cond{Field: field, Op: op, Value: value}}
}

// StatisticsQuery asks for aggregates.
type StatisticsQuery struct {
	Filter  Filter
	GroupBy []Group
	// Period is the length of a bucket in seconds; 0: one bucket. Bucket k is
	// [Start+k*Period, Start+(k+1)*Period).
	Period int64
	// Start of the first bucket; nil: the time of the first sample that matches.
	Start *int64
	// NoSquares says that SumSquares is not wanted, which then is 0: it makes
	// more of the counters' rollups do.
	NoSquares bool
	// Cardinality asks for the number of distinct values of these fields.
	Cardinality []Field
	// MaxRows bounds the rows of the answer, and with them what the query holds
	// in memory; 0: no bound. Beyond it there is ErrTooManyRows.
	MaxRows int
}

// Group is a field to group by; Key is the metadata path of FieldMetadata.
type Group struct {
	Field Field
	Key   string
}

// Statistics are the aggregates of one bucket, group and unit.
type Statistics struct {
	Group       []*string // the values of GroupBy as by [Text]; nil where unknown
	Unit        string
	Count       int64
	Min, Max    sample.Volume // exact
	Sum         float64
	SumSquares  float64 // of the distances to the mean, for the standard deviation; NaN where only rollups without it are left
	First, Last int64   // times of the bucket's first and last sample
	Bucket      int64   // k; 0 without a period
	Start       int64   // of bucket 0, or First without a period
	Cardinality []int64 // in the order asked for
}
