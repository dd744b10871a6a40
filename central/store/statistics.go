package store

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Check returns an error for a query that no engine can answer.
func (q *StatisticsQuery) Check() error {
	if q.Period < 0 || q.Period > math.MaxInt64/1_000_000 {
		return fmt.Errorf("statistics: period of %d s is out of range", q.Period)
	}
	for _, g := range q.GroupBy {
		if !named(g.Field) && g.Field != FieldMetadata {
			return fmt.Errorf("statistics: cannot group by %q", g.Field)
		}
	}
	for _, f := range q.Cardinality {
		if !named(f) {
			return fmt.Errorf("statistics: cannot count the values of %q", f)
		}
	}
	return nil
}

// named reports whether the field is a name that a resource or meter has.
func named(f Field) bool {
	switch f {
	case FieldMeter, FieldKind, FieldUnit, FieldResource, FieldProject, FieldUser, FieldSource:
		return true
	}
	return false
}

// Bucket returns the number of the bucket that holds time t, where bucket 0
// begins at start.
func (q *StatisticsQuery) Bucket(t, start int64) int64 {
	if q.Period == 0 {
		return 0
	}
	length := q.Period * 1_000_000
	k := (t - start) / length
	if (t-start)%length < 0 {
		k--
	}
	return k
}

// GroupOf returns the values of the fields by which a sample is grouped, nil where
// one is unknown; ok is false for a sample that lacks a metadata key.
func GroupOf(s *Sample, by []Group) (group []*string, ok bool) {
	for _, g := range by {
		if g.Field == FieldMetadata {
			v, ok := NewDocument(s.Metadata).Lookup(g.Key)
			if !ok {
				return nil, false
			}
			group = append(group, Text(v))
			continue
		}
		text, _ := s.Text(g.Field)
		if text == "" {
			group = append(group, nil)
			continue
		}
		group = append(group, &text)
	}
	return group, true
}

// RowKey returns a text that tells rows of statistics apart.
func RowKey(bucket int64, group []*string, unit string) string {
	b := binary.LittleEndian.AppendUint64(nil, uint64(bucket))
	for _, g := range group {
		if g == nil {
			b = append(b, '-')
		} else {
			b = append(append(b, '+'), *g...)
		}
		b = append(b, 0)
	}
	return string(append(b, unit...))
}

// SortStatistics puts rows into the order that [Store.Statistics] promises.
func SortStatistics(rows []Statistics) {
	slices.SortFunc(rows, func(a, b Statistics) int {
		return cmp.Or(
			cmp.Compare(a.Bucket, b.Bucket),
			slices.CompareFunc(a.Group, b.Group, compareText),
			strings.Compare(a.Unit, b.Unit),
		)
	})
}

// compareText orders texts, unknown ones first.
func compareText(a, b *string) int {
	switch {
	case a == nil && b == nil:
		return 0
	case a == nil:
		return -1
	case b == nil:
		return 1
	}
	return strings.Compare(*a, *b)
}

// CheckMeters returns an error for a filter that [Store.Meters] does not take.
func (p *Predicate) CheckMeters() error {
	if p.Uses(FieldTime, FieldRecorded, FieldVolume, FieldID) {
		return fmt.Errorf("filter: meters are not selected by time, volume or id")
	}
	return nil
}
