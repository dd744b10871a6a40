package pipeline

import (
	"time"

	"github.com/kvmeter/kvmeter/notifier/pattern"
	"github.com/kvmeter/kvmeter/notifier/pipeline/python"
	"github.com/kvmeter/kvmeter/sample"
)

// conversion is what several stages do to a sample: other names, scaling, a
// maximum.
type conversion struct {
	name, unit mapping
	kind       sample.Kind  // empty: as it is
	onlyUnit   string       // of the samples that are converted, if hasOnlyUnit
	hasOnly    bool         // whether others are left as they are
	scale      *python.Expr // nil: see factor
	factor     python.Number
	hasFactor  bool
	max        python.Number
	hasMax     bool

	known map[sample.MeterRef]sample.MeterRef // what each meter becomes
	scope sampleScope
}

// mapping is what a name becomes.
type mapping struct {
	from *pattern.Regexp // nil: there is none
	to   string          // the template of what replaces it
	text string          // what it becomes without from; empty: what it is
}

func (m *mapping) apply(s string) string {
	if m.from != nil {
		if s, err := m.from.Replace(s, m.to); err == nil && s != "" {
			return s
		}
	}
	if m.text != "" {
		return m.text
	}
	return s
}

// rename gives the item its new name, kind and unit.
func (c *conversion) rename(it *Item) {
	from := sample.MeterRef{Name: it.Name, Kind: it.Kind, Unit: it.Unit}
	to, ok := c.known[from]
	if !ok {
		if c.known == nil || len(c.known) >= maxNames {
			c.known = map[sample.MeterRef]sample.MeterRef{}
		}
		to = sample.MeterRef{Name: c.name.apply(it.Name), Kind: it.Kind, Unit: c.unit.apply(it.Unit)}
		if c.kind != "" {
			to.Kind = c.kind
		}
		c.known[from] = to
	}
	it.Name, it.Kind, it.Unit = to.Name, to.Kind, to.Unit
}

// scaled returns the sample's volume after scaling.
func (c *conversion) scaled(s *sample.Sample) (python.Number, error) {
	switch {
	case c.scale != nil:
		c.scope.s = s
		return c.scale.EvalNumber(&c.scope)
	case c.hasFactor:
		return python.Mul(python.FromVolume(s.Volume), c.factor)
	}
	return python.FromVolume(s.Volume), nil
}

// convert makes a new sample of the item, with its scaled volume times growth.
func (c *conversion) convert(it *Item, growth python.Number) error {
	n, err := c.scaled(&it.Sample)
	if err == nil {
		n, err = python.Mul(n, growth)
	}
	if err != nil {
		return err
	}
	if c.hasMax {
		if order, ok := python.Compare(c.max, n); ok && order < 0 {
			n = c.max
		}
	}
	if it.Volume, err = n.Volume(); err != nil {
		return err
	}
	c.rename(it)
	it.renew()
	return nil
}

// sampleScope gives an expression the fields of a sample.
type sampleScope struct{ s *sample.Sample }

// Name implements [python.Scope].
func (c *sampleScope) Name(name string) python.Value { return fieldOf(c.s, name) }

// Reference implements [python.Scope]; there are none.
func (c *sampleScope) Reference(string) python.Value { return python.Empty }

// fieldOf returns a field of a sample, as Ceilometer names it.
func fieldOf(s *sample.Sample, name string) python.Value {
	optional := func(text string) python.Value {
		if text == "" {
			return python.None
		}
		return python.Text(text)
	}
	switch name {
	case "volume":
		return python.Of(python.FromVolume(s.Volume))
	case "resource_metadata":
		return python.JSON(s.Metadata)
	case "name":
		return python.Text(s.Name)
	case "type":
		return python.Text(string(s.Kind))
	case "unit":
		return python.Text(s.Unit)
	case "user_id":
		return optional(s.User)
	case "project_id":
		return optional(s.Project)
	case "resource_id":
		return python.Text(s.Resource)
	case "source":
		return python.Text(s.Source)
	case "id":
		return python.Text(s.ID.String())
	case "timestamp":
		if s.Foreign != nil && s.Foreign.Timestamp != "" {
			return python.Text(s.Foreign.Timestamp)
		}
		return python.Text(string(sample.AppendTime(nil, s.Time)))
	case "user_name", "project_name", "monotonic_time":
		return foreignField(s.Foreign, name)
	}
	return python.Empty
}

func foreignField(f *sample.Foreign, name string) python.Value {
	switch {
	case f != nil && name == "user_name" && f.UserName != "":
		return python.Text(f.UserName)
	case f != nil && name == "project_name" && f.ProjectName != "":
		return python.Text(f.ProjectName)
	case f != nil && name == "monotonic_time" && f.HasMonotonic:
		return python.Of(python.Float(f.Monotonic))
	}
	return python.None
}

// unitConversion is the stage unit_conversion: other names and a scaled volume.
// It has no state.
type unitConversion struct{ conversion }

var one = python.Int(1)

func (u *unitConversion) process(it *Item) (bool, error) {
	if u.hasOnly && it.Unit != u.onlyUnit {
		return true, nil
	}
	return true, u.convert(it, one)
}

func (u *unitConversion) begin(time.Time, time.Time) {}

func (u *unitConversion) flush(func(*Item), func(error)) {}
