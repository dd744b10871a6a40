package conversion

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/notifier/events"
	"github.com/kvmeter/kvmeter/notifier/meters"
	"github.com/kvmeter/kvmeter/notifier/notification"
	"github.com/kvmeter/kvmeter/notifier/slab"
	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/sample"
)

// Converter converts notifications one by one. It is not safe for concurrent
// use.
type Converter struct {
	d       *Definitions
	decoder notification.Decoder
	meters  *meters.Converter
	events  *events.Converter
	name    []byte // what the id of a batch is made of
	out     Result
}

// NewConverter returns a converter by the given definitions.
func NewConverter(d *Definitions) *Converter {
	c := &Converter{d: d, meters: meters.NewConverter(d.meters), out: Result{made: new(made)}}
	if d.events != nil {
		c.events = events.NewConverter(d.events)
	}
	return c
}

// Result is what a notification gives. It is good until the converter's next,
// but for the event.
type Result struct {
	Samples  []meters.Sample
	Event    *sample.Event
	Errors   []error  // what could not be converted
	Warnings []string // what was left out as Ceilometer does, and why
	Unsigned int      // polled samples whose signature is not right

	id      sample.BatchID
	cells   []cell // what Batch works with
	columns []int  // the last row of each
	made    *made
}

// made is the memory of batches.
type made struct {
	batches slab.Slab[sample.Batch]
	meters  slab.Slab[sample.MeterRef]
	columns slab.Slab[sample.Column]
	rows    slab.Slab[sample.Row]
	foreign slab.Slab[sample.Foreign]
	values  slab.Slab[uint64]
	ids     slab.Slab[string]
	bytes   slab.Slab[byte] // of bitmaps and texts
}

// Convert reads and converts a message. The error is about one that is no
// notification.
func (c *Converter) Convert(body []byte) (*Result, error) {
	n, err := c.decoder.Decode(body)
	if err != nil {
		return nil, err
	}
	return c.convert(n), nil
}

// ConvertValue converts a message that was parsed already.
func (c *Converter) ConvertValue(v *value.Value) (*Result, error) {
	n, err := c.decoder.Read(v)
	if err != nil {
		return nil, err
	}
	return c.convert(n), nil
}

func (c *Converter) convert(n *notification.Notification) *Result {
	r := &c.out
	*r = Result{Samples: r.Samples[:0], Errors: r.Errors[:0], Warnings: r.Warnings[:0], cells: r.cells, columns: r.columns, made: r.made}
	if c.d.make {
		made := c.meters.Convert(n)
		for i := range made.Samples {
			s := &made.Samples[i]
			switch err := s.Check(); {
			case err == nil:
				r.Samples = append(r.Samples, *s)
			case meters.Dropped(err):
				r.Warnings = append(r.Warnings, fmt.Sprintf("%s of %s: %v", s.Name.Str(), text(s.Resource), err))
			default:
				r.Errors = append(r.Errors, fmt.Errorf("%s of %s: %w", s.Name.Str(), text(s.Resource), err))
			}
		}
		r.Errors = append(r.Errors, made.Errors...)
		r.Warnings = append(r.Warnings, made.Warnings...)
		r.Unsigned = made.Unsigned
	}
	if c.events != nil {
		event, err := c.events.Convert(n)
		r.Event = event
		if err != nil && !c.said(err) {
			r.Errors = append(r.Errors, err)
		}
	}
	if len(r.Samples) > 0 {
		r.id = c.identity(n, r.Samples)
	}
	return r
}

// said reports whether an error is among the others already.
func (c *Converter) said(err error) bool {
	for _, e := range c.out.Errors {
		if e.Error() == err.Error() {
			return true
		}
	}
	return false
}

// Explain returns why definitions gave nothing of the notification that was
// converted last.
func (c *Converter) Explain() []string {
	n := c.decoder.Last()
	var why []string
	if c.d.make {
		why = append(why, c.meters.Why(n)...)
	}
	if c.events != nil {
		why = append(why, c.events.Why(n)...)
	}
	return append(why, c.out.Warnings...)
}

// identity returns the id of the batch that a notification gives: the same
// whenever it is delivered.
func (c *Converter) identity(n *notification.Notification, samples []meters.Sample) sample.BatchID {
	name := c.name[:0]
	put := func(s string) {
		name = append(binary.BigEndian.AppendUint32(name, uint32(len(s))), s...)
	}
	if samples[0].ID != nil { // polled samples bring their own
		for i := range samples {
			put(samples[i].ID.Str())
		}
	} else {
		put(n.ID)
		put(n.EventType)
		put(n.Publisher)
		if at := n.Timestamp(); at != nil {
			put(at.Text)
		}
		if n.ID == "" {
			name = n.Payload().AppendJSON(name)
		}
	}
	c.name = name
	sum := sha256.Sum256(name)
	return sample.NamedBatchID(samples[0].Time, sum[:])
}

func text(v *value.Value) string {
	if v == nil || v.Kind == value.Null {
		return ""
	}
	return v.Str()
}

// sampleID returns the id of the nth sample.
func (r *Result) sampleID(n int) string {
	if s := &r.Samples[n]; s.ID != nil {
		return s.ID.Str()
	}
	return r.id.Sample(n).String()
}

// Batch returns the samples as a batch of the given node, and how many are not
// in it because their volume is no finite number; nil where none is.
func (r *Result) Batch(node string) (b *sample.Batch, refused int) {
	n := len(r.Samples)
	if n == 0 {
		return nil, 0
	}
	made := r.made
	b = made.batches.New()
	b.ID, b.Node, b.Meters, b.Columns, b.Rows = r.id, node, made.meters.Take(min(n, 8))[:0], made.columns.Take(min(n, 8))[:0], made.rows.Take(1)[:0]
	cells, columns := r.cells[:0], r.columns[:0]
	var row *meters.Row
	for i := range r.Samples {
		s := &r.Samples[i]
		v, ok := s.Volume.Number()
		if !ok {
			refused++
			continue
		}
		if len(b.Rows) == 0 {
			b.Base = s.Time.UnixMicro()
		}
		ref := sample.MeterRef{Name: s.Name.Str(), Kind: sample.Kind(text(s.Kind)), Unit: text(s.Unit)}
		column := columnOf(b, ref, v.Tag)
		if column == len(columns) {
			columns = append(columns, -1)
		}
		// Samples with the same row follow each other; a meter that is there twice
		// needs a row of its own.
		if s.Row != row || columns[column] == len(b.Rows)-1 {
			row = s.Row
			b.Rows = append(b.Rows, sample.Row{
				Resource: text(s.Resource), Offset: s.Time.UnixMicro() - b.Base, Source: s.Source,
				Project: text(s.Project), User: text(s.User), Metadata: s.Metadata, Foreign: made.foreignOf(s.Row),
			})
		}
		columns[column] = len(b.Rows) - 1
		cells = append(cells, cell{column, len(b.Rows) - 1, i, v.Bits})
	}
	if len(cells) == 0 {
		return nil, refused
	}
	r.cells, r.columns = cells, columns
	slices.SortStableFunc(cells, func(a, b cell) int { return cmp.Compare(a.column, b.column) })
	size := (len(b.Rows) + 7) / 8
	bitmaps, values := made.bytes.Take(size*len(columns)), made.values.Take(len(cells))
	b.IDs = r.sampleIDs(cells)
	for i := 0; i < len(cells); {
		c := &b.Columns[cells[i].column]
		c.Bitmap, bitmaps = bitmaps[:size:size], bitmaps[size:]
		from := i
		for ; i < len(cells) && cells[i].column == cells[from].column; i++ {
			c.Bitmap[cells[i].row/8] |= 1 << (cells[i].row % 8)
			values[i] = cells[i].bits
		}
		c.Values = values[from:i:i]
	}
	return b, refused
}

// foreignOf returns what a row has beside the fields of kvmeter's own samples: its
// time as Ceilometer prints it, among others.
func (m *made) foreignOf(r *meters.Row) *sample.Foreign {
	f := sample.Foreign{UserName: text(r.UserName), ProjectName: text(r.ProjectName), Timestamp: stamp(&m.bytes, r)}
	if r.Monotonic != nil && r.Monotonic.Kind != value.Null {
		if at, err := r.Monotonic.Float64(); err == nil && !math.IsNaN(at) && !math.IsInf(at, 0) {
			f.Monotonic, f.HasMonotonic = at, true
		}
	}
	var plain [32]byte
	if r.Stamp != "" && r.Stamp == string(sample.AppendTime(plain[:0], r.Time.UnixMicro())) {
		f.Timestamp = ""
	}
	if f == (sample.Foreign{}) {
		return nil
	}
	kept := m.foreign.New()
	*kept = f
	return kept
}

// stamp returns a row's time as it was polled, or as Ceilometer prints that of a
// notification.
func stamp(bytes *slab.Slab[byte], r *meters.Row) string {
	if r.Stamp != "" {
		return r.Stamp
	}
	var text [40]byte
	return slab.Text(bytes, value.AppendISO(text[:0], r.Time))
}

// cell is a sample in a batch.
type cell struct {
	column, row int
	sample      int // index
	bits        uint64
}

// columnOf returns the index of a meter's column, which it adds if need be.
func columnOf(b *sample.Batch, ref sample.MeterRef, tag sample.Tag) int {
	meter := -1
	for i := range b.Columns {
		if b.Meters[b.Columns[i].Meter] == ref {
			if meter = b.Columns[i].Meter; b.Columns[i].Tag == tag {
				return i
			}
		}
	}
	if meter < 0 {
		meter = len(b.Meters)
		b.Meters = append(b.Meters, ref)
	}
	b.Columns = append(b.Columns, sample.Column{Meter: meter, Tag: tag})
	return len(b.Columns) - 1
}

// sampleIDs returns the ids of samples.
func (r *Result) sampleIDs(cells []cell) []string {
	ids := r.made.ids.Take(len(cells))
	var text [36]byte // of a UUID
	for i := range cells {
		if s := &r.Samples[cells[i].sample]; s.ID != nil {
			ids[i] = s.ID.Str()
			continue
		}
		ids[i] = slab.Text(&r.made.bytes, r.id.Sample(cells[i].sample).Append(text[:0]))
	}
	return ids
}

// AppendLine appends what a notification gives as one JSON object: samples as
// Ceilometer has them on its bus, the event or null, and the errors; explain is
// left out where it is nil.
func (r *Result) AppendLine(dst []byte, explain []string) []byte {
	dst = append(dst, `{"samples": [`...)
	for i := range r.Samples {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = r.appendSample(dst, i)
	}
	dst = append(dst, `], "event": `...)
	if r.Event == nil {
		dst = append(dst, "null"...)
	} else {
		dst = r.Event.AppendJSON(dst)
	}
	texts := make([]string, len(r.Errors))
	for i, err := range r.Errors {
		texts[i] = err.Error()
	}
	dst = appendTexts(append(dst, `, "errors": `...), texts)
	if explain != nil {
		dst = appendTexts(append(dst, `, "explain": `...), explain)
	}
	return append(dst, '}')
}

func appendTexts(dst []byte, texts []string) []byte {
	dst = append(dst, '[')
	for i, t := range texts {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = sample.AppendText(dst, strings.ReplaceAll(t, "\n", "; "))
	}
	return append(dst, ']')
}

func (r *Result) appendSample(dst []byte, n int) []byte {
	s := &r.Samples[n]
	field := func(key string, v *value.Value) {
		dst = append(append(append(dst, '"'), key...), `": `...)
		if v == nil {
			dst = append(dst, "null"...)
		} else {
			dst = v.AppendJSON(dst)
		}
		dst = append(dst, ", "...)
	}
	source, id, at := value.Of(s.Source), value.Of(r.sampleID(n)), value.Of(stamp(&r.made.bytes, s.Row))
	dst = append(dst, '{')
	field("source", &source)
	field("counter_name", s.Name)
	field("counter_type", s.Kind)
	field("counter_unit", s.Unit)
	field("counter_volume", s.Volume)
	field("user_id", s.User)
	field("user_name", s.UserName)
	field("project_id", s.Project)
	field("project_name", s.ProjectName)
	field("resource_id", s.Resource)
	field("timestamp", &at)
	dst = append(dst, `"resource_metadata": `...)
	if len(s.Metadata) == 0 {
		dst = append(dst, "{}"...)
	}
	dst = append(append(dst, s.Metadata...), ", "...)
	field("message_id", &id)
	dst = append(dst, `"monotonic_time": `...)
	if s.Monotonic == nil {
		return append(dst, "null}"...)
	}
	return append(s.Monotonic.AppendJSON(dst), '}')
}
