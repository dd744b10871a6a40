package meters

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/notifier/notification"
	"github.com/kvmeter/kvmeter/notifier/slab"
	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/sample"
)

// Sample is what a definition makes of a notification. A nil value is null.
type Sample struct {
	*Row
	Name, Kind, Unit, Volume *value.Value
	ID                       *value.Value // nil: it has none yet
}

// Row is what samples have in common.
type Row struct {
	Resource, User, Project *value.Value
	UserName, ProjectName   *value.Value
	Monotonic               *value.Value // the sender's clock, in seconds
	Time                    time.Time
	Stamp                   string // the time as it was polled; empty: Time says it
	Source                  string
	Metadata                []byte // a JSON object
}

// Check returns an error unless the volume is a number, or a text that is one.
// A sample without a volume is [ErrNoVolume].
func (s *Sample) Check() error {
	switch {
	case s.Volume == nil || s.Volume.Kind == value.Null:
		return ErrNoVolume
	case s.Volume.Kind == value.List || s.Volume.Kind == value.Object:
		return fmt.Errorf("the volume is %v", s.Volume.Kind)
	case s.Volume.Kind == value.Float:
		if f, _ := s.Volume.Float64(); math.IsNaN(f) || math.IsInf(f, 0) {
			return fmt.Errorf("the volume is %w", sample.ErrNotFinite)
		}
	case s.Volume.Kind == value.Text:
		if _, err := s.Volume.Float64(); err != nil {
			return fmt.Errorf("%w: volume %.40q", ErrText, s.Volume.Text)
		}
	}
	return nil
}

// What [Sample.Check] returns for samples that Ceilometer drops as well.
var (
	ErrNoVolume = errors.New("the sample has no volume")
	ErrText     = errors.New("a text that is not a number")
)

// Dropped reports whether an error of [Sample.Check] is one for which Ceilometer
// drops the sample as well, and goes on.
func Dropped(err error) bool { return errors.Is(err, ErrNoVolume) || errors.Is(err, ErrText) }

// Result is what a notification gives. It is good until the converter's next.
type Result struct {
	Samples  []Sample
	Errors   []error  // each has cost its definition's samples
	Warnings []string // what a plugin or lookup found odd
	Unsigned int      // polled samples whose signature is not right
}

// Converter applies a set of definitions. It is not safe for concurrent use.
type Converter struct {
	set   *Set
	cache definition.Cache[[]*meter]
	out   Result

	n        *notification.Notification
	turn     uint64 // counts notifications, to know what is of this one
	rows     []madeRow
	metadata []madeMetadata
	keys     []string  // of the metadata that are being made
	verifier *verifier // nil: any signature is good

	text      []byte // of metadata that are being made
	madeRows  slab.Slab[Row]
	madeTexts slab.Slab[byte]
}

type madeRow struct {
	turn uint64
	row  *Row
	err  error
}

type madeMetadata struct {
	turn uint64
	json []byte
	err  error
}

// NewConverter returns a converter for a set.
func NewConverter(set *Set) *Converter {
	c := &Converter{set: set, rows: make([]madeRow, set.rows), metadata: make([]madeMetadata, set.metadata+1)}
	if set.opt.Secret != "" {
		c.verifier = newVerifier(set.opt.Secret)
	}
	return c
}

// Convert returns what a notification gives.
func (c *Converter) Convert(n *notification.Notification) *Result {
	c.n = n
	c.turn++
	c.out = Result{Samples: c.out.Samples[:0], Errors: c.out.Errors[:0], Warnings: c.out.Warnings[:0]}
	if n.Priority != "" && n.Priority != "info" && n.Priority != "sample" {
		return &c.out
	}
	for _, m := range c.cache.Get(n.EventType, c.matching) {
		mark := len(c.out.Samples)
		if err := c.apply(m); err != nil {
			c.out.Samples = c.out.Samples[:mark]
			if !errors.Is(err, errSaid) {
				c.out.Errors = append(c.out.Errors, fmt.Errorf("%s: %s: %w", m.where, m.text, err))
			}
		}
	}
	c.builtin()
	return &c.out
}

func (c *Converter) matching(eventType string) []*meter {
	var ms []*meter
	for _, i := range c.set.index.Find(eventType) {
		ms = append(ms, c.set.meters[i])
	}
	return ms
}

// errSaid stands for an error of the whole notification that was added to the
// result before.
var errSaid = errors.New("said already")

func (c *Converter) apply(m *meter) error {
	if m.lookup != nil {
		return c.several(m)
	}
	r, err := c.row(m.row)
	if err != nil {
		return err
	}
	s := Sample{Row: r}
	if s.Name, err = c.attribute(&m.name); err != nil {
		return fmt.Errorf("name: %w", err)
	}
	if s.Kind, err = c.attribute(&m.kind); err != nil {
		return fmt.Errorf("type: %w", err)
	}
	if s.Unit, err = c.attribute(&m.unit); err != nil {
		return fmt.Errorf("unit: %w", err)
	}
	if s.Volume, err = m.volume.First(&c.n.Message, c.warnings()); err != nil {
		return fmt.Errorf("volume: %w", err)
	}
	c.out.Samples = append(c.out.Samples, s)
	return nil
}

func (c *Converter) warnings() *definition.Warnings {
	return (*definition.Warnings)(&c.out.Warnings)
}

func (c *Converter) attribute(a *attribute) (*value.Value, error) {
	v, err := a.field.First(&c.n.Message, c.warnings())
	if v == nil && err == nil {
		v = &a.literal
	}
	return v, err
}

// row makes a row once a notification.
func (c *Converter) row(spec *row) (*Row, error) {
	made := &c.rows[spec.number]
	if made.turn != c.turn {
		made.turn = c.turn
		made.row, made.err = c.makeRow(spec)
	}
	return made.row, made.err
}

func (c *Converter) makeRow(spec *row) (*Row, error) {
	r := c.madeRows.New()
	r.Source = c.set.opt.Source
	first := func(dst **value.Value, f *definition.Field, what string) error {
		if f == nil {
			return nil
		}
		v, err := f.First(&c.n.Message, c.warnings())
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if v != nil {
			*dst = v
		}
		return nil
	}
	r.User, r.Project = c.sender()
	var when *value.Value
	err := errors.Join(first(&r.Resource, spec.resource, "resource_id"), first(&r.User, spec.user, "user_id"),
		first(&r.Project, spec.project, "project_id"), first(&when, spec.when, "timestamp"))
	if err != nil {
		return nil, err
	}
	if r.Time, err = c.time(when); err != nil {
		return nil, err
	}
	r.Metadata, err = c.meta(spec.metadata)
	return r, err
}

// sender returns the user and the project that a notification's context names.
func (c *Converter) sender() (user, project *value.Value) {
	if c.set.opt.StrictContext {
		return nil, nil
	}
	first := func(keys ...string) *value.Value {
		for _, key := range keys {
			if v := c.n.Context(key); v != nil && v.Kind != value.Null {
				return v
			}
		}
		return nil
	}
	return first("user_id", "user"), first("project_id", "tenant_id", "tenant")
}

// time returns what a definition's timestamp says, or else the notification's.
func (c *Converter) time(when *value.Value) (time.Time, error) {
	if when == nil || !when.Truthy() {
		t, err := c.n.Time()
		if err != nil {
			if len(c.out.Errors) == 0 || !errors.Is(c.out.Errors[0], notification.ErrMalformed) {
				c.out.Errors = append([]error{err}, c.out.Errors...)
			}
			return t, errSaid
		}
		return t, nil
	}
	if when.Kind != value.Text {
		return time.Time{}, fmt.Errorf("timestamp: it is %v", when.Kind)
	}
	t, err := value.ParseTime(when.Text)
	if err != nil {
		return t, fmt.Errorf("timestamp: %w", err)
	}
	return t, nil
}

// meta makes metadata once a notification.
func (c *Converter) meta(spec *metadata) ([]byte, error) {
	made := &c.metadata[spec.number]
	if made.turn != c.turn {
		made.turn = c.turn
		made.json, made.err = c.makeMetadata(spec)
	}
	return made.json, made.err
}

func (c *Converter) makeMetadata(spec *metadata) ([]byte, error) {
	dst := append(c.text[:0], '{')
	c.keys = c.keys[:0]
	for i := range spec.fields {
		f := &spec.fields[i]
		v, err := f.field.First(&c.n.Message, c.warnings())
		if err != nil {
			return nil, fmt.Errorf("metadata %s: %w", f.key, err)
		}
		if v != nil && v.Truthy() {
			dst = v.AppendJSON(member(dst, f.key))
			c.keys = append(c.keys, f.key)
		}
	}
	if spec.user != nil {
		v, err := spec.user.First(&c.n.Message, c.warnings())
		if err == nil && v != nil && v.Truthy() {
			if dst, err = c.userMetadata(dst, v); err != nil {
				return nil, err
			}
		}
		if err != nil {
			return nil, fmt.Errorf("user_metadata: %w", err)
		}
	}
	if len(dst) == 1 {
		return c.payload()
	}
	c.text = append(dst, '}')
	return c.copied(), nil
}

// copied returns a copy of the text that was made.
func (c *Converter) copied() []byte {
	out := c.madeTexts.Take(len(c.text))
	copy(out, c.text)
	return out
}

// member appends a key to an object that is being written.
func member(dst []byte, key string) []byte {
	if dst[len(dst)-1] != '{' {
		dst = append(dst, ',')
	}
	return append(sample.AppendText(dst, key), ':')
}

// payload returns the payload with the event type and the publisher beside it:
// what metadata are where a definition gives none.
func (c *Converter) payload() ([]byte, error) {
	made := &c.metadata[c.set.metadata]
	if made.turn != c.turn {
		made.turn = c.turn
		made.json = withOrigin(c.n.Payload(), c.n.Message.Field("event_type"), c.n.Message.Field("publisher_id"))
	}
	return made.json, nil
}

// withOrigin returns an object with two more members.
func withOrigin(object, eventType, publisher *value.Value, more ...value.Value) []byte {
	dst := append(make([]byte, 0, 1024), '{')
	put := func(key string) *value.Value {
		switch key {
		case "event_type":
			return eventType
		case "host":
			return publisher
		}
		for i := range more {
			if more[i].Key == key {
				return &more[i]
			}
		}
		return nil
	}
	if object.Kind == value.Object {
		for i := range object.Items {
			if item := &object.Items[i]; put(item.Key) == nil {
				dst = item.AppendJSON(member(dst, item.Key))
			}
		}
	}
	for i := range more {
		dst = more[i].AppendJSON(member(dst, more[i].Key))
	}
	dst = eventType.AppendJSON(member(dst, "event_type"))
	return append(publisher.AppendJSON(member(dst, "host")), '}')
}

// userMetadata appends those of the users' own metadata that are reserved for
// metering, but for those that are there under the same name already.
func (c *Converter) userMetadata(dst []byte, from *value.Value) ([]byte, error) {
	if from.Kind != value.Object {
		return nil, fmt.Errorf("it is %v, not an object", from.Kind)
	}
	type entry struct {
		key string
		v   *value.Value
	}
	var kept []entry
	keep := func(key string, v *value.Value) {
		key = strings.ReplaceAll(key, ".", "_")
		if slices.Contains(c.keys, key) {
			return
		}
		for i := range kept {
			if kept[i].key == key {
				kept[i].v = v
				return
			}
		}
		kept = append(kept, entry{key, v})
	}
	for _, prefix := range c.set.opt.ReservedNamespaces {
		for i := range from.Items {
			if key, ok := strings.CutPrefix(from.Items[i].Key, prefix); ok {
				keep(key, &from.Items[i])
			}
		}
	}
	for _, key := range c.set.opt.ReservedKeys {
		if v := from.Field(key); v != nil {
			keep(key, v)
		}
	}
	if kept == nil {
		return dst, nil
	}
	dst = append(member(dst, "user_metadata"), '{')
	for _, e := range kept {
		dst = member(dst, e.key)
		if e.v.Kind == value.Text {
			dst = sample.AppendText(dst, value.Cut(e.v.Text, c.set.opt.ReservedLength))
		} else {
			dst = e.v.AppendJSON(dst)
		}
	}
	return append(dst, '}'), nil
}

// several makes a sample for each name that is found.
func (c *Converter) several(m *meter) error {
	w := c.warnings()
	meta, err := c.meta(m.row.metadata)
	if err != nil {
		return err
	}
	names, err := m.name.field.All(&c.n.Message, w)
	if err != nil {
		return fmt.Errorf("name: %w", err)
	}
	user, project := c.sender()
	columns := [...]struct {
		key    string
		field  *definition.Field
		values []*value.Value // at first what holds where nothing is found
	}{
		{"name", nil, names},
		{"type", m.kind.field, []*value.Value{&m.kind.literal}},
		{"volume", m.volume, []*value.Value{nil}},
		{"unit", m.unit.field, []*value.Value{&m.unit.literal}},
		{"timestamp", m.row.when, []*value.Value{nil}},
		{"user_id", m.row.user, []*value.Value{user}},
		{"project_id", m.row.project, []*value.Value{project}},
		{"resource_id", m.row.resource, []*value.Value{nil}},
	}
	for i := range columns {
		col := &columns[i]
		if col.field != nil {
			vs, err := col.field.All(&c.n.Message, w)
			if err != nil {
				return fmt.Errorf("%s: %w", col.key, err)
			}
			if m.lookup[col.key] || len(vs) > 0 {
				col.values = vs
			}
		}
	}
	if len(names) == 0 {
		return nil
	}
	for _, one := range []string{"message", "metadata"} { // of which there is one
		if m.lookup[one] && len(names) > 1 {
			c.out.Warnings = append(c.out.Warnings, fmt.Sprintf("%s: %s: %d names but 1 %s, which is looked up: no sample", m.where, m.text, len(names), one))
			return nil
		}
	}
	for i := range columns {
		col := &columns[i]
		if n := len(col.values); n != len(names) && (n != 1 || m.lookup[col.key]) {
			c.out.Warnings = append(c.out.Warnings, fmt.Sprintf("%s: %s: %d names but %d values of %s: no sample", m.where, m.text, len(names), n, col.key))
			return nil
		}
	}
	for i := range names {
		at := func(column int) *value.Value {
			vs := columns[column].values
			if len(vs) == 1 {
				return vs[0]
			}
			return vs[i]
		}
		when, err := c.time(at(4))
		if err != nil {
			return err
		}
		c.out.Samples = append(c.out.Samples, Sample{
			Name: at(0), Kind: at(1), Volume: at(2), Unit: at(3),
			Row: &Row{User: at(5), Project: at(6), Resource: at(7), Time: when, Source: c.set.opt.Source, Metadata: meta},
		})
	}
	return nil
}
