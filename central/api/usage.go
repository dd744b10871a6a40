package api

import (
	"encoding/csv"
	"errors"
	"math/big"
	"strings"
	"time"

	"github.com/parquet-go/parquet-go"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// usageFields are the names that a query of usage may use.
var usageFields = fields{[]string{"meter", "project", "resource", "source", "user"}, false}

// maxSplits bounds the paths in the metadata that usage is split by.
const maxSplits = 8

// usageRow is what a project used of a meter and resource, as it is printed.
type usageRow struct {
	Project, Resource, Source string
	sample.MeterRef
	Split         []*string
	Quantity      string // exact
	QuantityUnit  string
	Approximation float64 // of Quantity
	Samples       int64
	First, Last   int64 // µs
	Covered       int64 // µs of the period for which it is known
	Origins       []string
	Nodes         []string // for those who see every project
	Gaps          []sample.Gap
}

// usageOf makes a row of what the store tells.
func usageOf(u *store.Usage, all bool) usageRow {
	r := usageRow{
		Project: u.Project, Resource: u.Resource, Source: u.Source, MeterRef: u.MeterRef, Split: u.Split,
		QuantityUnit: u.Unit, Samples: u.Count, First: u.First, Last: u.Last, Covered: u.Covered, Gaps: u.Gaps,
	}
	quantity := u.Quantity.Rat()
	if u.Kind == sample.Gauge {
		// The store has µs.
		quantity.Quo(quantity, big.NewRat(1_000_000, 1))
		r.QuantityUnit += "·s"
	}
	places, _ := quantity.FloatPrec()
	r.Quantity = quantity.FloatString(places)
	r.Approximation, _ = quantity.Float64()
	for _, o := range u.Origins {
		if o != "" { // foreign samples do not say
			r.Origins = append(r.Origins, string(o))
		}
	}
	if all {
		r.Nodes = u.Nodes
		return r
	}
	// Hosts and their troubles are not a tenant's.
	r.Gaps = make([]sample.Gap, len(u.Gaps))
	for i, g := range u.Gaps {
		r.Gaps[i] = sample.Gap{Meter: g.Meter, Resource: g.Resource, From: g.From, To: g.To}
	}
	return r
}

// usageWriter prints rows in one of the formats.
type usageWriter interface {
	write(r *usageRow) error
	close() error
}

// usage streams how much was used in a period.
func (s *server) usage(r *request, out *output) error {
	p, err := readParams(r.Request, "q", "start", "end", "split", "format")
	if err != nil {
		return err
	}
	q, err := readQuery(r, p, usageFields)
	if err != nil {
		return err
	}
	now := s.opts.Clock().UTC()
	ask := store.UsageQuery{Filter: q.filter(), SplitBy: p.plain["split"]}
	if ask.From, err = p.time("start", time.Date(now.Year(), now.Month(), 1, 0, 0, 0, 0, time.UTC).UnixMicro()); err != nil {
		return err
	}
	if ask.To, err = p.time("end", now.UnixMicro()); err != nil {
		return err
	}
	if ask.From >= ask.To {
		return badRequest("The period is empty: start must be before end.")
	}
	if len(ask.SplitBy) > maxSplits {
		return badRequest("Usage is split by at most %d keys.", maxSplits)
	}
	for i, key := range ask.SplitBy {
		ask.SplitBy[i] = strings.TrimPrefix(strings.TrimPrefix(key, "resource_"), "metadata.")
	}
	w, err := newUsageWriter(p, out, ask.SplitBy, r.caller.all)
	if err != nil {
		return err
	}
	var sent error
	err = s.store.Usage(r.Context(), ask, func(u store.Usage) bool {
		row := usageOf(&u, r.caller.all)
		if sent = w.write(&row); sent == nil {
			sent = out.spill()
		}
		return sent == nil
	})
	if err := errors.Join(err, sent); err != nil {
		return err
	}
	return w.close()
}

func newUsageWriter(p *params, out *output, splits []string, all bool) (usageWriter, error) {
	format, _, err := p.one("format")
	if err != nil {
		return nil, err
	}
	switch format {
	case "", "json":
		return &usageJSON{list: listOf(out, int(^uint(0)>>1)), splits: splits, all: all}, nil
	case "csv":
		out.kind = "text/csv; charset=UTF-8"
		w := &usageCSV{csv.NewWriter(out), all}
		header := []string{"project_id", "resource_id", "meter", "type", "unit", "source"}
		for _, key := range splits {
			header = append(header, "metadata."+key)
		}
		header = append(header, "quantity", "quantity_unit", "samples", "first", "last", "covered", "gaps", "origins")
		if all {
			header = append(header, "nodes")
		}
		return w, w.Write(header)
	case "parquet":
		out.kind = "application/vnd.apache.parquet"
		return &usageParquet{w: parquet.NewGenericWriter[parquetUsage](out, parquet.Compression(&parquet.Zstd)), splits: splits}, nil
	}
	return nil, invalidInput("format", format, "It can be json, csv or parquet.")
}

// Write implements [io.Writer] for the formats that write themselves.
func (o *output) Write(b []byte) (int, error) {
	o.buf = append(o.buf, b...)
	return len(b), o.spill()
}

type usageJSON struct {
	list   *list
	splits []string
	all    bool
}

func (w *usageJSON) write(r *usageRow) error {
	_, err := w.list.add(func(dst []byte) []byte {
		dst = append(dst, '{')
		dst = appendKnown(field(dst, "project_id"), r.Project)
		dst = appendString(field(dst, "resource_id"), r.Resource)
		dst = appendString(field(dst, "meter"), r.Name)
		dst = appendString(field(dst, "type"), string(r.Kind))
		dst = appendString(field(dst, "unit"), r.Unit)
		dst = appendKnown(field(dst, "source"), r.Source)
		dst = append(field(dst, "split"), '{')
		for i, key := range w.splits {
			dst = field(dst, key)
			if r.Split[i] == nil {
				dst = append(dst, "null"...)
			} else {
				dst = appendString(dst, *r.Split[i])
			}
		}
		dst = append(field(append(dst, '}'), "quantity"), r.Quantity...)
		dst = appendString(field(dst, "quantity_unit"), r.QuantityUnit)
		dst = appendInt(field(dst, "samples"), r.Samples)
		dst = appendQuotedTime(field(dst, "first"), r.First)
		dst = appendQuotedTime(field(dst, "last"), r.Last)
		dst = appendFloat(field(dst, "covered"), float64(r.Covered)/1e6)
		dst = appendStrings(field(dst, "origins"), r.Origins)
		if w.all {
			dst = appendStrings(field(dst, "nodes"), r.Nodes)
		}
		dst = append(field(dst, "gaps"), '[')
		for i := range r.Gaps {
			if i > 0 {
				dst = append(dst, ", "...)
			}
			if w.all {
				dst = appendGap(dst, &r.Gaps[i])
				continue
			}
			dst = appendQuotedTime(field(append(dst, '{'), "from"), r.Gaps[i].From)
			dst = append(appendQuotedTime(field(dst, "to"), r.Gaps[i].To), '}')
		}
		return append(dst, "]}"...)
	})
	return err
}

func (w *usageJSON) close() error {
	w.list.end()
	return nil
}

func appendStrings(dst []byte, all []string) []byte {
	dst = append(dst, '[')
	for i, s := range all {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = appendString(dst, s)
	}
	return append(dst, ']')
}

type usageCSV struct {
	*csv.Writer
	all bool
}

func (w *usageCSV) write(r *usageRow) error {
	line := []string{r.Project, r.Resource, r.Name, string(r.Kind), r.Unit, r.Source}
	for _, v := range r.Split {
		text := ""
		if v != nil {
			text = *v
		}
		line = append(line, text)
	}
	line = append(line, r.Quantity, r.QuantityUnit, string(appendInt(nil, r.Samples)),
		string(sample.AppendTime(nil, r.First)), string(sample.AppendTime(nil, r.Last)), string(appendFloat(nil, float64(r.Covered)/1e6)),
		string(appendInt(nil, int64(len(r.Gaps)))), strings.Join(r.Origins, " "))
	if w.all {
		line = append(line, strings.Join(r.Nodes, " "))
	}
	for i, text := range line {
		line[i] = defused(text)
	}
	return w.Write(line)
}

// defused keeps a spreadsheet from taking a name, which anybody may have chosen,
// for a formula.
func defused(text string) string {
	if text == "" || !strings.ContainsRune("=+@\t\r", rune(text[0])) {
		return text
	}
	return "'" + text
}

func (w *usageCSV) close() error {
	w.Flush()
	return w.Error()
}

// parquetUsage is a row of a Parquet file.
type parquetUsage struct {
	Project      *string           `parquet:"project_id,optional,dict"`
	Resource     string            `parquet:"resource_id,dict"`
	Meter        string            `parquet:"meter,dict"`
	Kind         string            `parquet:"type,dict"`
	Unit         string            `parquet:"unit,dict"`
	Source       *string           `parquet:"source,optional,dict"`
	Split        map[string]string `parquet:"split"`
	Quantity     string            `parquet:"quantity"` // exact
	QuantityUnit string            `parquet:"quantity_unit,dict"`
	Float        float64           `parquet:"quantity_float"`
	Samples      int64             `parquet:"samples"`
	First        int64             `parquet:"first,timestamp(microsecond)"`
	Last         int64             `parquet:"last,timestamp(microsecond)"`
	Covered      float64           `parquet:"covered"` // seconds
	Gaps         int64             `parquet:"gaps"`
	Origins      []string          `parquet:"origins,list"`
	Nodes        []string          `parquet:"nodes,list"`
}

type usageParquet struct {
	w      *parquet.GenericWriter[parquetUsage]
	splits []string
}

func (w *usageParquet) write(r *usageRow) error {
	row := parquetUsage{
		Project: known(r.Project), Resource: r.Resource, Meter: r.Name, Kind: string(r.Kind), Unit: r.Unit, Source: known(r.Source),
		Split: map[string]string{}, Quantity: r.Quantity, QuantityUnit: r.QuantityUnit, Float: r.Approximation, Samples: r.Samples,
		First: r.First, Last: r.Last, Covered: float64(r.Covered) / 1e6, Gaps: int64(len(r.Gaps)), Origins: r.Origins, Nodes: r.Nodes,
	}
	for i, key := range w.splits {
		if r.Split[i] != nil {
			row.Split[key] = *r.Split[i]
		}
	}
	_, err := w.w.Write([]parquetUsage{row})
	return err
}

func (w *usageParquet) close() error { return w.w.Close() }

// known is a text that may not be known.
func known(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}
