// Package meters turns notifications into samples, by meter definitions and by
// what Ceilometer has in code: polled samples, HTTP requests, Ironic's sensors.
package meters

import (
	_ "embed"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/notifier/pattern"
	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/sample"
)

// Options are the settings that change what definitions give.
type Options struct {
	// Source is the source of samples.
	Source string
	// ReservedNamespaces are the prefixes of the users' metadata that are kept,
	// without the prefix; ReservedKeys are names of others that are; both are
	// cut to ReservedLength characters.
	ReservedNamespaces []string
	ReservedKeys       []string
	ReservedLength     int
	// StrictContext leaves user and project null where a definition does not name
	// them, as Ceilometer does since Pike; else they are the sender's.
	StrictContext bool
	// LegacyUnits writes MB and GB in the shipped definitions, as Ceilometer did
	// until 2023.
	LegacyUnits bool
	// Secret is the telemetry_secret that polled samples are signed with; empty: any
	// signature is good. RefuseUnsigned leaves out those that are not; else they are
	// counted.
	Secret         string
	RefuseUnsigned bool
	// Existence adds the shipped definitions of meters that are always 1.
	Existence bool
}

// DefaultOptions returns what holds where nothing is said.
func DefaultOptions() Options {
	return Options{Source: "openstack", ReservedNamespaces: []string{"metering."}, ReservedLength: 256}
}

// File is a file of definitions.
type File struct {
	Name string
	Data []byte
}

//go:embed shipped.yaml
var shipped []byte

//go:embed existence.yaml
var existence []byte

// Shipped returns the definitions that kvmeter brings.
func Shipped(opt Options) []File {
	files := []File{{"shipped meters.yaml", shipped}}
	if opt.Existence {
		files = append(files, File{"shipped existence.yaml", existence})
	}
	if opt.LegacyUnits {
		files[0].Data = []byte(strings.NewReplacer("unit: MiB", "unit: MB", "unit: GiB", "unit: GB").Replace(string(shipped)))
	}
	return files
}

// Set are the definitions of some files, compiled. It is safe for concurrent use.
type Set struct {
	opt      Options
	meters   []*meter // in the order in which they are tried
	index    definition.Index
	rows     int // number of different rows and metadata among them
	metadata int
	findings []definition.Finding
}

// Findings returns what there is to say about the files. A definition with an
// error was left out.
func (s *Set) Findings() []definition.Finding { return s.findings }

// meter is a definition.
type meter struct {
	where    string // file and line
	text     string // its name, as it is written
	events   []string
	patterns []definition.Pattern

	name, kind, unit attribute
	volume           *definition.Field
	row              *row
	lookup           map[string]bool // nil: one sample a notification
}

// attribute is a path, or the text of it where that leads nowhere.
type attribute struct {
	field   *definition.Field
	literal value.Value
}

// row is what the samples of several definitions may have in common.
type row struct {
	number                        int
	resource, user, project, when *definition.Field // nil: not defined
	metadata                      *metadata
}

type metadata struct {
	number int
	fields []named
	user   *definition.Field // nil: none
}

type named struct {
	key   string
	field *definition.Field
}

// Load compiles definitions. Those with errors are left out, and the findings say
// why. The error is about a file that is no YAML or holds no definitions, or about
// what Ceilometer does not start with: event types and metadata that can't be read.
func Load(files []File, opt Options) (*Set, error) {
	l := &loader{set: &Set{opt: opt}, names: map[string]string{}, rows: map[string]*row{}, metadata: map[string]*metadata{}}
	for _, f := range files {
		if err := l.file(f); err != nil {
			return l.set, err
		}
	}
	s := l.set
	if err := definition.Errors(l.fatal); err != nil {
		return s, err
	}
	s.rows, s.metadata = len(l.rows), len(l.metadata)
	for i, m := range s.meters {
		for _, p := range m.patterns {
			s.index.Add(i, p)
		}
	}
	return s, nil
}

type loader struct {
	set      *Set
	r        *definition.Reader
	names    map[string]string // of the definitions so far, and where they are
	rows     map[string]*row
	metadata map[string]*metadata
	start    int                  // findings before the definition at hand
	fatal    []definition.Finding // about what Ceilometer does not start with
}

func (l *loader) file(f File) error {
	l.r = &definition.Reader{File: f.Name}
	doc, err := l.r.Document(f.Data)
	if err != nil {
		return err
	}
	if doc.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: meter definitions are a list under the key metric", f.Name, doc.Line)
	}
	var list *yaml.Node
	for _, p := range l.r.Pairs(doc) {
		if p.Key.Value == "metric" {
			list = p.Value
		} else {
			l.r.Warn(p.Key, "unknown key %q is ignored; definitions are a list under the key metric", p.Key.Value)
		}
	}
	if list == nil || list.Kind != yaml.SequenceNode {
		return fmt.Errorf("%s:%d: meter definitions are a list under the key metric", f.Name, doc.Line)
	}
	for i := len(list.Content) - 1; i >= 0; i-- { // the last one of a name counts
		l.definition(definition.Resolve(list.Content[i]))
	}
	l.set.findings = append(l.set.findings, l.r.Findings...)
	return nil
}

// definition adds what n defines, unless it has an error.
func (l *loader) definition(n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		l.r.Fail(n, "a definition is a mapping of keys to values")
		return
	}
	keys := map[string]*yaml.Node{}
	for _, p := range l.r.Pairs(n) {
		switch p.Key.Value {
		case "name", "event_type", "type", "unit", "volume", "resource_id", "user_id", "project_id", "timestamp", "metadata", "user_metadata", "lookup":
			keys[p.Key.Value] = p.Value
		default:
			l.r.Warn(p.Key, "unknown key %q of a definition is ignored", p.Key.Value)
		}
	}
	for _, key := range []string{"user_id", "project_id", "timestamp", "user_metadata"} {
		if keys[key] != nil && empty(keys[key]) {
			l.r.Warn(keys[key], "%s is empty and ignored", key)
			delete(keys, key)
		}
	}
	var missing []string
	for _, key := range []string{"name", "type", "event_type", "unit", "volume", "resource_id"} {
		if keys[key] == nil || empty(keys[key]) {
			missing = append(missing, key)
		}
	}
	if missing != nil {
		l.r.Fail(n, "required and missing or empty: %s", strings.Join(missing, ", "))
		return
	}
	name := keys["name"].Value
	if first, twice := l.names[name]; twice {
		l.r.Warn(n, "%s: is defined at %s, which counts (in a file the last definition of a name, among files the first); this one is skipped: join the event types in one definition", name, first)
		return
	}
	l.start = len(l.r.Findings)
	m := l.meter(name, n, keys)
	if l.r.FailedSince(l.start) {
		return
	}
	l.names[name] = m.where
	l.set.meters = append(l.set.meters, m)
}

// empty reports whether Python takes a node's value for false.
func empty(n *yaml.Node) bool {
	if n.Kind == yaml.ScalarNode {
		v := definition.Scalar(n)
		return !v.Truthy()
	}
	return len(n.Content) == 0
}

func (l *loader) meter(name string, n *yaml.Node, keys map[string]*yaml.Node) *meter {
	m := &meter{where: fmt.Sprintf("%s:%d", l.r.File, n.Line), text: name}
	what := func(key string) string { return name + ": " + key }
	if keys["lookup"] != nil && !empty(keys["lookup"]) {
		m.lookup = map[string]bool{}
		for _, attribute := range l.r.Texts(keys["lookup"], what("lookup")) {
			switch attribute {
			case "name", "type", "unit", "volume", "timestamp", "user_id", "project_id", "resource_id":
			case "metadata", "message":
				l.r.Warn(keys["lookup"], "%s: there is one %s only, so that a notification with several names gives no sample", what("lookup"), attribute)
			default:
				l.r.Warn(keys["lookup"], "%s: there is no attribute %q to look up", what("lookup"), attribute)
			}
			m.lookup[attribute] = true
		}
	}
	before := len(l.r.Findings)
	m.events = l.r.Texts(keys["event_type"], what("event_type"))
	for _, event := range m.events {
		re, err := pattern.Compile(event)
		if err != nil && strings.HasPrefix(event, "*") {
			l.r.Warn(keys["event_type"], "%s: %q is a shell glob, as until Pike; it is taken for the regular expression .%s", what("event_type"), event, event)
			event = "." + event
			re, err = pattern.Compile(event)
		}
		if err != nil {
			l.r.Fail(keys["event_type"], "%s: %v", what("event_type"), err)
			continue
		}
		m.patterns = append(m.patterns, definition.Pattern{Prefix: pattern.Prefix(event), Match: re.Match})
	}
	l.refuse(before)
	if kind := keys["type"]; !m.lookup["type"] && kind.Value != string(sample.Gauge) && kind.Value != string(sample.Delta) && kind.Value != string(sample.Cumulative) {
		l.r.Fail(kind, "%s: %q is none of gauge, delta and cumulative", what("type"), kind.Value)
	}
	m.name = l.attribute(keys["name"], what("name"))
	m.kind = l.attribute(keys["type"], what("type"))
	m.unit = l.attribute(keys["unit"], what("unit"))
	if unit := keys["unit"].Value; strings.ContainsAny(unit, `'"`) {
		l.r.Warn(keys["unit"], "%s: the quotes stay in the unit; write one without characters that need them", what("unit"))
	}
	m.volume = l.field(keys, "volume", name)
	m.row = l.rowOf(name, keys)
	if m.lookup == nil {
		return m
	}
	for key, f := range map[string]*definition.Field{
		"volume": m.volume, "resource_id": m.row.resource, "user_id": m.row.user, "project_id": m.row.project, "timestamp": m.row.when,
		"name": m.name.field, "unit": m.unit.field, "type": m.kind.field,
	} {
		if f != nil && !f.Multiple() {
			l.r.Warn(keys[key], "%s: this fails on each notification: %v", what(key), definition.ErrOneValue)
		}
	}
	return m
}

// attribute compiles a name, type or unit, which may be a literal.
func (l *loader) attribute(n *yaml.Node, what string) attribute {
	before := len(l.r.Findings)
	a := attribute{field: l.r.Field(n, what), literal: value.Of(n.Value)}
	for i := before; i < len(l.r.Findings); i++ {
		if f := &l.r.Findings[i]; f.Error {
			f.Text += "; a text is read as a path, too, so write one without special characters: percent, B_per_s"
		}
	}
	switch n.Value {
	case "ctxt", "publisher_id", "event_type", "payload", "metadata":
		l.r.Warn(n, "%s: %q is not this text but what the message has under this key; choose another word, or write $.%s to say so", what, n.Value, n.Value)
	}
	return a
}

func (l *loader) field(keys map[string]*yaml.Node, key, name string) *definition.Field {
	if keys[key] == nil {
		return nil
	}
	return l.r.Field(keys[key], name+": "+key)
}

// rowOf returns the row that a definition describes. Definitions whose rows are
// written alike share one, so that it is made once a notification.
func (l *loader) rowOf(name string, keys map[string]*yaml.Node) *row {
	var key strings.Builder
	for _, k := range []string{"resource_id", "user_id", "project_id", "timestamp", "metadata", "user_metadata"} {
		if !canonical(&key, keys[k]) {
			l.r.Fail(keys[k], "%s: %s: more aliases within each other than can be followed", name, k)
			return &row{metadata: &metadata{}}
		}
	}
	if r := l.rows[key.String()]; r != nil {
		return r
	}
	r := &row{
		number:   len(l.rows),
		resource: l.field(keys, "resource_id", name), user: l.field(keys, "user_id", name),
		project: l.field(keys, "project_id", name), when: l.field(keys, "timestamp", name),
		metadata: l.metadataOf(name, keys),
	}
	l.rows[key.String()] = r
	return r
}

// refuse takes the errors among the findings, but for the first so many, for ones
// about the whole file.
func (l *loader) refuse(before int) { l.fatal = append(l.fatal, l.r.Findings[before:]...) }

func (l *loader) metadataOf(name string, keys map[string]*yaml.Node) *metadata {
	var key strings.Builder
	canonical(&key, keys["metadata"])
	canonical(&key, keys["user_metadata"])
	if m := l.metadata[key.String()]; m != nil {
		return m
	}
	m := &metadata{number: len(l.metadata), user: l.field(keys, "user_metadata", name)}
	l.metadata[key.String()] = m
	n := keys["metadata"]
	if n == nil || n.Tag == "!!str" && n.Value == "" || n.Kind != yaml.ScalarNode && len(n.Content) == 0 {
		return m
	}
	if n.Kind != yaml.MappingNode {
		before, attributes := len(l.r.Findings), !l.r.FailedSince(l.start) // of which one with an error costs the definition only
		l.r.Fail(n, "%s: metadata: it is a mapping of keys to paths; leave the key out to have the whole payload", name)
		if attributes {
			l.refuse(before)
		}
		return m
	}
	for _, p := range l.r.Pairs(n) {
		m.fields = append(m.fields, named{p.Key.Value, l.r.Field(p.Value, name+": metadata "+p.Key.Value)})
	}
	return m
}

// maxCanonical bounds what [canonical] writes: aliases within each other can
// stand for more than fits anywhere.
const maxCanonical = 1 << 16

// canonical appends a text that is the same for nodes that say the same, and
// reports whether it is complete.
func canonical(b *strings.Builder, n *yaml.Node) bool {
	if n == nil {
		b.WriteString("-;")
		return true
	}
	n = definition.Resolve(n)
	fmt.Fprintf(b, "%d%s%q[", n.Kind, n.Tag, n.Value)
	for _, c := range n.Content {
		if b.Len() > maxCanonical || !canonical(b, c) {
			return false
		}
	}
	b.WriteByte(']')
	return true
}
