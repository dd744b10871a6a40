package api

import (
	"errors"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
)

// aggregate is a selected function, with the field that cardinality counts.
type aggregate struct{ function, param string }

// groupFields are the plain names that statistics can be grouped by.
var groupFields = map[string]store.Field{
	"user_id": store.FieldUser, "project_id": store.FieldProject,
	"resource_id": store.FieldResource, "source": store.FieldSource,
}

// maxPeriod bounds the length of a bucket: 8000 years, in seconds.
const maxPeriod = 8000 * 365 * 24 * 3600

// Bounds of an answer: a year of minutes has fewer rows.
const (
	maxRows   = 600_000
	maxGroups = 32 // fields to group by
)

func (s *server) statistics(r *request, out *output) error {
	p, err := readParams(r.Request, "q", "groupby", "period", "aggregate")
	if err != nil {
		return err
	}
	q, err := readQuery(r, p, sampleFields)
	if err != nil {
		return err
	}
	q.set(store.FieldMeter, r.names[0])
	ask := store.StatisticsQuery{Filter: q.filter()}
	if ask.Period, err = p.integer("period", 0); err != nil {
		return err
	}
	if ask.Period < 0 {
		return badRequest("Period must be positive.")
	}
	if ask.Period > maxPeriod {
		return badRequest("Invalid period %d: it is at most %d seconds", ask.Period, int64(maxPeriod))
	}
	if q.lower != nil {
		start := q.lower.at - q.offset
		ask.Start = &start
	}
	groups, err := readGroups(p.plain["groupby"])
	if err != nil {
		return err
	}
	for _, name := range groups {
		ask.GroupBy = append(ask.GroupBy, groupOf(name))
	}
	selected, err := readAggregates(p.objects["aggregate"])
	if err != nil {
		return err
	}
	ask.MaxRows = maxRows
	for _, a := range selected {
		if a.function == "cardinality" {
			ask.Cardinality = append(ask.Cardinality, groupFields[a.param])
		}
	}
	ask.NoSquares = !slices.ContainsFunc(selected, func(a aggregate) bool { return a.function == "stddev" })
	rows, err := s.store.Statistics(r.Context(), ask)
	if errors.Is(err, store.ErrTooManyRows) {
		return badRequest("The statistics have more than %d rows: ask for longer periods, fewer groups or less time.", maxRows)
	}
	if err != nil {
		return err
	}
	extras, err := s.extras(r.Context(), &ask, selected, rows)
	if err != nil {
		return err
	}
	rendering := statistics{query: q, period: ask.Period, groups: groups, selected: selected}
	list := listOf(out, math.MaxInt)
	for i := range rows {
		if extras != nil {
			rendering.extra = &extras[i]
		}
		if _, err := list.add(func(b []byte) []byte { return rendering.append(b, &rows[i]) }); err != nil {
			return err
		}
	}
	list.end()
	return nil
}

func readGroups(asked []string) ([]string, error) {
	var groups, bad []string
	for _, name := range asked {
		if _, ok := groupFields[name]; !ok && metadataKey(name) == "" {
			bad = append(bad, pythonRepr(name))
		} else if !slices.Contains(groups, name) {
			groups = append(groups, name)
		}
	}
	if len(groups) > maxGroups {
		return nil, badRequest("%d fields to group by, at most %d are taken.", len(groups), maxGroups)
	}
	if bad != nil {
		slices.Sort(bad)
		return nil, unknownArgument(clip("{"+strings.Join(slices.Compact(bad), ", ")+"}"), "Invalid groupby fields")
	}
	return groups, nil
}

func groupOf(name string) store.Group {
	if f, ok := groupFields[name]; ok {
		return store.Group{Field: f}
	}
	return store.Group{Field: store.FieldMetadata, Key: metadataKey(name)}
}

// metadataKey returns the path that a field such as metadata.flavor.name
// names, or nothing.
func metadataKey(field string) string {
	if key, ok := strings.CutPrefix(field, "resource_metadata."); ok {
		return key
	}
	if key, ok := strings.CutPrefix(field, "metadata."); ok {
		return key
	}
	return ""
}

func readAggregates(asked []object) ([]aggregate, error) {
	var selected []aggregate
	for _, o := range asked {
		function, ok := o["func"]
		if !ok {
			return nil, invalidInput("aggregate.func", "None", "Mandatory field missing.")
		}
		a := aggregate{function, o["param"]}
		switch a.function {
		case "max", "min", "sum", "avg", "count", "stddev", "last", "rate", "p50", "p95", "p99":
			if a.param != "" {
				return nil, badRequest("Bad aggregate: %s.%s", a.function, a.param)
			}
		case "cardinality":
			if _, ok := groupFields[a.param]; !ok {
				return nil, badRequest("Bad aggregate: %s.%s", a.function, a.param)
			}
		default:
			return nil, badRequest("Invalid aggregation function: %s", a.function)
		}
		if !slices.Contains(selected, a) {
			selected = append(selected, a)
		}
	}
	return selected, nil
}

// statistics prints rows.
type statistics struct {
	query    *query
	period   int64 // seconds
	groups   []string
	selected []aggregate
	extra    *extra // of the row
}

func (s *statistics) append(dst []byte, row *store.Statistics) []byte {
	dst = append(dst, '{')
	dst = s.appendGroup(field(dst, "groupby"), row)
	dst = appendString(field(dst, "unit"), row.Unit)
	if s.selected == nil {
		for _, f := range []string{"min", "max", "avg", "sum", "count"} {
			dst = appendAggregate(field(dst, f), f, row)
		}
	} else {
		dst = s.appendSelected(dst, row)
	}
	dst = s.appendDuration(dst, row)
	dst = appendInt(field(dst, "period"), s.period)
	start, end := row.First, row.Last
	if s.period > 0 {
		length := s.period * time.Second.Microseconds()
		start = row.Start + row.Bucket*length
		end = start + length
	}
	dst = appendQuotedTime(field(dst, "period_start"), start)
	dst = appendQuotedTime(field(dst, "period_end"), end)
	return append(dst, '}')
}

func (s *statistics) appendGroup(dst []byte, row *store.Statistics) []byte {
	if len(s.groups) == 0 {
		return append(dst, "null"...)
	}
	dst = append(dst, '{')
	for i, name := range s.groups {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = append(appendString(dst, name), ": "...)
		if v := row.Group[i]; v == nil {
			dst = append(dst, "null"...)
		} else {
			dst = appendString(dst, *v)
		}
	}
	return append(dst, '}')
}

// appendSelected prints the selected aggregates: the standard ones beside the
// others, and all of them as floats in "aggregate".
func (s *statistics) appendSelected(dst []byte, row *store.Statistics) []byte {
	for _, a := range s.selected {
		if a.function != "stddev" && a.function != "cardinality" && !isExtra(a) {
			dst = appendAggregate(field(dst, a.function), a.function, row)
		}
	}
	dst = append(field(dst, "aggregate"), '{')
	counted := 0
	for _, a := range s.selected {
		switch {
		case isExtra(a):
			if v, ok := s.extra.value(a.function); ok {
				dst = appendFloat(field(dst, a.function), v)
			}
		case a.function == "cardinality":
			dst = appendFloat(field(dst, "cardinality/"+a.param), float64(row.Cardinality[counted]))
			counted++
		case a.function == "stddev":
			dst = appendFloat(field(dst, a.function), math.Sqrt(row.SumSquares/float64(row.Count)))
		case a.function == "count":
			dst = appendFloat(field(dst, a.function), float64(row.Count))
		default:
			dst = appendAggregate(field(dst, a.function), a.function, row)
		}
	}
	return append(dst, '}')
}

func appendAggregate(dst []byte, function string, row *store.Statistics) []byte {
	switch function {
	case "min":
		return row.Min.AppendAPI(dst)
	case "max":
		return row.Max.AppendAPI(dst)
	case "avg":
		return appendFloat(dst, row.Sum/float64(row.Count))
	case "sum":
		return appendFloat(dst, row.Sum)
	}
	return appendInt(dst, row.Count)
}

// appendDuration prints from when to when there were samples, within the
// bounds that the query itself names, without search_offset.
func (s *statistics) appendDuration(dst []byte, row *store.Statistics) []byte {
	start, end := row.First, row.Last
	if b := s.query.lower; b != nil {
		start = max(start, b.at)
	}
	if b := s.query.upper; b != nil {
		end = min(end, b.at)
	}
	if start > end {
		return append(dst, `, "duration": null, "duration_start": null, "duration_end": null`...)
	}
	dst = appendFloat(field(dst, "duration"), float64(end-start)/1e6)
	dst = appendQuotedTime(field(dst, "duration_start"), start)
	return appendQuotedTime(field(dst, "duration_end"), end)
}
