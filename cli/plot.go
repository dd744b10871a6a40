package cli

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/guptarohit/asciigraph"
	"github.com/mattn/go-runewidth"

	"github.com/kvmeter/kvmeter/central/client"
)

// point is a value at a time.
type point struct {
	at    time.Time
	value float64
}

// line is what is drawn of a meter and resource, or of a group.
type line struct {
	name   string
	points []point // in the order of time
}

const (
	maxLines   = 8 // more could not be told apart
	plotHeight = 16
	plotWidth  = 80 // where there is no terminal
)

var lineColours = []asciigraph.AnsiColor{
	asciigraph.Cyan, asciigraph.Yellow, asciigraph.Green, asciigraph.Magenta,
	asciigraph.Red, asciigraph.Blue, asciigraph.White, asciigraph.Orange,
}

// timeLayouts are the API's.
var timeLayouts = []string{"2006-01-02T15:04:05.999999", time.RFC3339Nano}

func parseTime(text string) (time.Time, error) {
	var err error
	for _, layout := range timeLayouts {
		var t time.Time
		if t, err = time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("the API gives a time that is none: %w", err)
}

func float(n json.Number) float64 {
	f, err := n.Float64()
	if err != nil {
		return math.NaN()
	}
	return f
}

// plotSamples draws samples, newest first as they come: a line for each meter
// and resource. Of what only grows it draws the rate.
func plotSamples(samples []client.Sample) *table {
	lines := map[string]*line{}
	var order []string
	kinds, units := map[string]string{}, map[string]bool{}
	for i := range slices.Backward(samples) {
		s := &samples[i]
		at, err := parseTime(s.Time)
		if err != nil {
			continue
		}
		name := s.Meter + " " + known(s.Resource).text
		if lines[name] == nil {
			lines[name] = &line{name: name}
			order = append(order, name)
		}
		lines[name].points = append(lines[name].points, point{at, float(s.Volume)})
		kinds[name] = s.Type
		unit := s.Unit
		if s.Type == "cumulative" {
			unit += "/s"
		}
		units[unit] = true
	}
	all := make([]line, 0, len(lines))
	for _, name := range order {
		l := *lines[name]
		if kinds[name] == "cumulative" {
			l.points = rates(l.points)
		}
		all = append(all, l)
	}
	return plotTable(all, units)
}

// rates are the differences of what grows, per second. Where it shrank it started
// anew, and its rate is not known.
func rates(points []point) []point {
	var out []point
	for i := 1; i < len(points); i++ {
		a, b := points[i-1], points[i]
		if seconds := b.at.Sub(a.at).Seconds(); seconds > 0 && b.value >= a.value {
			out = append(out, point{b.at, (b.value - a.value) / seconds})
		}
	}
	return out
}

// plotStatistics draws the first of the aggregates, or the average, of each
// period: a line for each group.
func plotStatistics(meter string, rows []client.Statistics, aggregates []client.Aggregate) *table {
	what, value := "avg", func(s *client.Statistics) json.Number { return s.Avg }
	if len(aggregates) > 0 {
		what = aggregateKey(aggregates[0])
		value = func(s *client.Statistics) json.Number { return s.Aggregate[what] }
	}
	lines := map[string]*line{}
	units := map[string]bool{}
	for i := range rows {
		s := &rows[i]
		at, err := parseTime(s.PeriodStart)
		if err != nil {
			continue
		}
		name := what + " of " + meter
		if len(s.Group) > 0 {
			name += " " + group(s.Group).text
		}
		if lines[name] == nil {
			lines[name] = &line{name: name}
		}
		lines[name].points = append(lines[name].points, point{at, float(value(s))})
		units[s.Unit] = true
	}
	var all []line
	for _, l := range lines {
		all = append(all, *l)
	}
	slices.SortFunc(all, func(a, b line) int { return cmp.Compare(a.name, b.name) })
	return plotTable(all, units)
}

// plotTable is a chart, and in the other formats its points.
func plotTable(lines []line, units map[string]bool) *table {
	t := newTable("Name", "Timestamp", "Value")
	for _, l := range lines {
		for _, p := range l.points {
			t.add(text(l.name), text(p.at.Format(timeLayouts[0])), jsonCell(fmt.Sprint(p.value), p.value))
		}
	}
	t.chart = func(width int, colour bool) string { return chart(lines, units, cmp.Or(width, plotWidth), colour) }
	return t
}

// chart draws lines over time.
func chart(lines []line, units map[string]bool, width int, colour bool) string {
	lines = slices.DeleteFunc(slices.Clone(lines), func(l line) bool { return len(l.points) == 0 })
	if len(lines) == 0 {
		return "There is nothing to draw: a line takes two points in time.\n"
	}
	left := len(lines) - maxLines
	lines = lines[:min(len(lines), maxLines)]
	begin, end := lines[0].points[0].at, lines[0].points[0].at
	for _, l := range lines {
		begin = earlier(begin, l.points[0].at)
		end = later(end, l.points[len(l.points)-1].at)
	}
	if begin.Equal(end) {
		return "There is nothing to draw: a line takes two points in time.\n"
	}
	columns := max(20, width-12) // beside the axis
	data := make([][]float64, len(lines))
	legends := make([]string, len(lines))
	low, high := math.Inf(1), math.Inf(-1)
	for i, l := range lines {
		data[i] = spread(l.points, begin, end, columns)
		legends[i] = runewidth.Truncate(printable(l.name), max(8, width-6), "…")
		for _, v := range data[i] {
			if !math.IsNaN(v) {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	if low >= 0 && low < high/2 {
		low = 0 // heights are then in proportion
	}
	if low == high {
		high++
	}
	layout := "15:04:05"
	switch span := end.Sub(begin); {
	case span > 72*time.Hour:
		layout = "2006-01-02"
	case span > 12*time.Hour:
		layout = "01-02 15:04"
	case span > 30*time.Minute:
		layout = "15:04"
	}
	options := []asciigraph.Option{
		asciigraph.Height(plotHeight), asciigraph.LowerBound(low), asciigraph.UpperBound(high),
		asciigraph.YAxisValueFormatter(func(v float64) string { return fmt.Sprintf("%9s", short(v)) }),
		asciigraph.XAxisRange(float64(begin.UnixMicro()), float64(end.UnixMicro())),
		asciigraph.XAxisTickCount(max(2, columns/(len(layout)+8))),
		asciigraph.XAxisValueFormatter(func(v float64) string { return time.UnixMicro(int64(v)).UTC().Format(layout) }),
	}
	if colour {
		options = append(options, asciigraph.SeriesColors(lineColours...))
	} else if len(lines) > 1 {
		// Without colours lines are told apart by what they are drawn with.
		var sets []asciigraph.CharSet
		for i := range lines {
			sets = append(sets, asciigraph.CreateCharSet(string(rune('a'+i))))
			legends[i] = string(rune('a'+i)) + ": " + legends[i]
		}
		options = append(options, asciigraph.SeriesChars(sets...))
	}
	var names []string
	for u := range units {
		names = append(names, u)
	}
	slices.Sort(names)
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s to %s UTC\n", printable(strings.Join(names, ", ")), begin.Format("2006-01-02 15:04:05"), end.Format("2006-01-02 15:04:05"))
	b.WriteString(asciigraph.PlotMany(data, options...))
	b.WriteByte('\n')
	for i, name := range legends {
		if colour {
			name = lineColours[i].String() + "■ " + asciigraph.Default.String() + name
		}
		b.WriteString(name + "\n")
	}
	if left > 0 {
		fmt.Fprintf(&b, "and %d more: choose with -q\n", left)
	}
	return b.String()
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// spread puts points into columns of equal time: the mean of those in a column,
// and between columns that have some a straight line.
func spread(points []point, begin, end time.Time, columns int) []float64 {
	sums, counts := make([]float64, columns), make([]float64, columns)
	for _, p := range points {
		c := int(float64(p.at.Sub(begin)) / float64(end.Sub(begin)) * float64(columns-1))
		sums[c] += p.value
		counts[c]++
	}
	values := make([]float64, columns)
	last := -1
	for c := range values {
		if counts[c] == 0 {
			values[c] = math.NaN()
			continue
		}
		values[c] = sums[c] / counts[c]
		for between := last + 1; last >= 0 && between < c; between++ {
			values[between] = values[last] + (values[c]-values[last])*float64(between-last)/float64(c-last)
		}
		last = c
	}
	return values
}

// short prints a number in at most eight characters.
func short(v float64) string {
	for _, unit := range []struct {
		from float64
		name string
	}{{1e15, "P"}, {1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if math.Abs(v) >= unit.from {
			return fmt.Sprintf("%.4g %s", v/unit.from, unit.name)
		}
	}
	return fmt.Sprintf("%.4g", v)
}
