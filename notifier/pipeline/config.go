// Package pipeline reads pipeline.yaml and passes batches through what it says.
package pipeline

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/sample"
)

// Default is the pipeline.yaml of those who have none: everything goes to the
// store.
const Default = `sources:
  - name: meter_source
    meters: ["*"]
    sinks: [meter_sink]
sinks:
  - name: meter_sink
    publishers: ["store://"]
`

// DefaultEvents is the event_pipeline.yaml of those who have none: every event
// goes to the store.
const DefaultEvents = `sources:
  - name: event_source
    events: ["*"]
    sinks: [event_sink]
sinks:
  - name: event_sink
    publishers: ["store://"]
`

// Config is a pipeline.yaml or event_pipeline.yaml that was found good.
type Config struct {
	Pipelines []Pipeline // each source with each of its sinks, in order
	Sinks     []Sink     // in the order of the file
	Targets   []Target   // what the pipelines publish to, each URL once
	findings  []definition.Finding
}

// Warnings say what is odd or has no effect, with file and line.
func (c *Config) Warnings() []error { return texts(c.findings, false) }

// texts returns the findings that are errors, or those that are not.
func texts(findings []definition.Finding, errs bool) (all []error) {
	for i := range findings {
		if findings[i].Error == errs {
			all = append(all, errors.New(findings[i].String()))
		}
	}
	return all
}

// Findings returns what there is to say about a file that [Load] has read, or
// refused with an error, and the publishers that it names; ok is false where it
// could not be read at all.
func Findings(c *Config, err error) (findings []definition.Finding, targets []Target, ok bool) {
	if wrong := (*wrongError)(nil); errors.As(err, &wrong) {
		c, err = wrong.Config, nil
	}
	if err != nil {
		return nil, nil, false
	}
	return c.findings, c.Targets, true
}

// Pipeline is a source with one of its sinks.
type Pipeline struct {
	Name  string // "source:sink", or one name where both are equal; of events "event:source:sink"
	Match *sample.Matcher
	Sink  int // index into Config.Sinks
}

// Sink is what samples pass on their way to publishers.
type Sink struct {
	Name    string
	Stages  []StageSpec // none: samples stay as they are
	Targets []int       // indexes into Config.Targets
}

// Target is a publisher's URL.
type Target struct {
	URL   *url.URL
	Name  string // the URL as it is written, without a password
	Where string // "pipeline.yaml:12", for errors
}

// Load reads a pipeline.yaml; file is its name, for errors. An error names the
// file and the line of everything that is wrong.
func Load(file string, data []byte) (*Config, error) { return load(file, data, "meters") }

// LoadEvents reads an event_pipeline.yaml.
func LoadEvents(file string, data []byte) (*Config, error) { return load(file, data, "events") }

// HasEvents reports whether a file is an event_pipeline.yaml: one that lists
// events rather than meters.
func HasEvents(data []byte) bool {
	var root yaml.Node
	if yaml.Unmarshal(data, &root) != nil || len(root.Content) == 0 {
		return false
	}
	doc := definition.Resolve(root.Content[0])
	lists := []*yaml.Node{doc}
	for i := 0; doc.Kind == yaml.MappingNode && i < len(doc.Content); i += 2 {
		if doc.Content[i].Value == "sources" {
			lists = []*yaml.Node{definition.Resolve(doc.Content[i+1])}
		}
	}
	events := false
	for _, list := range lists {
		if list.Kind != yaml.SequenceNode {
			continue
		}
		for _, e := range list.Content {
			e = definition.Resolve(e)
			for i := 0; e.Kind == yaml.MappingNode && i < len(e.Content); i += 2 {
				switch e.Content[i].Value {
				case "events":
					events = true
				case "meters", "counters":
					return false
				}
			}
		}
	}
	return events
}

func load(file string, data []byte, what string) (*Config, error) {
	r := &fileReader{Reader: definition.Reader{File: file}, what: what}
	root, err := r.Document(data)
	if err != nil {
		return nil, err
	}
	var cfg *Config
	if root.Kind == yaml.SequenceNode {
		cfg = r.flat(root)
	} else {
		cfg = r.config(root)
	}
	cfg.findings = r.Findings
	slices.SortStableFunc(cfg.findings, func(a, b definition.Finding) int {
		return cmp.Or(a.Line-b.Line, strings.Compare(a.Text, b.Text))
	})
	if r.FailedSince(0) {
		return nil, &wrongError{cfg}
	}
	return cfg, nil
}

// wrongError is what is wrong with a file that can be read.
type wrongError struct{ *Config }

// Error implements error: a line each, and after them what is odd besides.
func (e *wrongError) Error() string {
	return errors.Join(append(texts(e.findings, true), e.Warnings()...)...).Error()
}

// fileReader reads the nodes of the file and keeps what there is to say about them.
type fileReader struct {
	definition.Reader
	what string // what sources list: meters or events
}

func (r *fileReader) where(n *yaml.Node) string { return fmt.Sprintf("%s:%d", r.File, n.Line) }

// fields calls the function that a mapping's key has in known with its value, and
// returns the keys that are there; nil where n is no mapping. The name comes first.
func (r *fileReader) fields(n *yaml.Node, what string, known map[string]func(*yaml.Node)) map[string]bool {
	n = definition.Resolve(n)
	if n.Kind != yaml.MappingNode {
		r.Fail(n, "%s is no mapping of keys to values", what)
		return nil
	}
	given := map[string]bool{}
	pairs := r.Pairs(n)
	if i := slices.IndexFunc(pairs, func(p definition.Pair) bool { return p.Key.Value == "name" }); i > 0 {
		pairs[0], pairs[i] = pairs[i], pairs[0]
	}
	for _, p := range pairs {
		key := p.Key.Value
		if key == "counters" && r.what == "meters" { // until Juno
			key = "meters"
		}
		read, ok := known[key]
		switch {
		case ok:
			given[key] = true
			read(p.Value)
		case key == "interval" || key == "resources" || key == "discovery":
			r.Warn(p.Key, "%q has no effect here; what is polled, and how often, is said in polling.yaml", key)
		default:
			r.Warn(p.Key, "unknown key %q in %s; it is ignored", key, what)
		}
	}
	return given
}

// list calls each with the elements of a list, and reports whether it is one.
func (r *fileReader) list(n *yaml.Node, what string, each func(*yaml.Node)) bool {
	n = definition.Resolve(n)
	if n.Kind != yaml.SequenceNode {
		r.Fail(n, "%s is no list", what)
		return false
	}
	for _, e := range n.Content {
		each(definition.Resolve(e))
	}
	return true
}

// text returns a scalar.
func (r *fileReader) text(n *yaml.Node, what string) string {
	n = definition.Resolve(n)
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "" {
		r.Fail(n, "%s is no text", what)
		return ""
	}
	return n.Value
}

type source struct {
	name  string
	match *sample.Matcher
	sinks []*yaml.Node
}

type sink struct {
	Sink
	node  *yaml.Node
	index int // in Config.Sinks
}

func (r *fileReader) config(root *yaml.Node) *Config {
	cfg := &Config{}
	var sources []source
	sinks := map[string]*sink{}
	given := r.fields(root, "the file", map[string]func(*yaml.Node){
		"sources": func(n *yaml.Node) {
			names := map[string]int{}
			r.list(n, "sources", func(n *yaml.Node) {
				s := r.source(n)
				if first := names[s.name]; first > 0 && s.name != "" {
					r.Fail(n, "source %q is defined twice, first on line %d", s.name, first)
				}
				names[s.name] = n.Line
				sources = append(sources, s)
			})
		},
		"sinks": func(n *yaml.Node) {
			r.list(n, "sinks", func(n *yaml.Node) {
				s := r.sink(n, cfg)
				if first := sinks[s.Name]; first != nil && s.Name != "" {
					r.Fail(n, "sink %q is defined twice, first on line %d", s.Name, first.node.Line)
				}
				sinks[s.Name] = s
				s.index = len(cfg.Sinks)
				cfg.Sinks = append(cfg.Sinks, s.Sink)
			})
		},
	})
	if given == nil {
		return cfg
	}
	for _, name := range []string{"sources", "sinks"} {
		if !given[name] {
			r.Fail(root, "%s are missing", name)
		}
	}
	if len(given) == 2 {
		r.connect(root, cfg, sources, sinks)
	}
	return cfg
}

// connect makes a pipeline of each source with each of its sinks.
func (r *fileReader) connect(root *yaml.Node, cfg *Config, sources []source, sinks map[string]*sink) {
	names := map[string]bool{}
	for _, s := range sources {
		used := map[string]bool{}
		for _, n := range s.sinks {
			to := sinks[n.Value]
			if to == nil {
				r.Fail(n, "source %q: sink %q is not defined", s.name, n.Value)
				continue
			}
			if used[n.Value] {
				r.Fail(n, "source %q: sink %q is listed twice", s.name, n.Value)
				continue
			}
			used[n.Value] = true
			name := r.pipelineName(s.name, to.Name)
			if names[name] && s.name != "" {
				r.Fail(n, "two pipelines are called %q; rename a source or a sink", name)
			}
			names[name] = true
			cfg.Pipelines = append(cfg.Pipelines, Pipeline{name, s.match, to.index})
		}
	}
	if r.FailedSince(0) {
		return
	}
	for _, s := range sinks {
		if !slices.ContainsFunc(cfg.Pipelines, func(p Pipeline) bool { return p.Sink == s.index }) {
			r.Warn(s.node, "no source leads to sink %q", s.Name)
		}
	}
	if len(cfg.Pipelines) == 0 {
		r.Fail(root, "no source leads to a sink")
	}
}

func (r *fileReader) pipelineName(source, sink string) string {
	name := source + ":" + sink
	if source == sink {
		name = source
	}
	if r.what == "events" {
		return "event:" + name
	}
	return name
}

// flat reads the older form: a list of pipelines, each a source and its sink in
// one.
func (r *fileReader) flat(root *yaml.Node) *Config {
	cfg := &Config{}
	names := map[string]int{}
	for _, n := range root.Content {
		n = definition.Resolve(n)
		var src source
		to := &sink{node: n}
		fields := r.sinkFields(to, cfg)
		r.sourceFields(&src, fields, "pipeline")
		fields["name"] = func(n *yaml.Node) { src.name = r.text(n, "the name of a pipeline"); to.Name = src.name }
		given := r.fields(n, "a pipeline", fields)
		r.require(n, given, "pipeline", src.name, "name", r.what, "publishers")
		if first := names[src.name]; first > 0 && src.name != "" {
			r.Fail(n, "pipeline %q is defined twice, first on line %d", src.name, first)
		}
		names[src.name] = n.Line
		cfg.Pipelines = append(cfg.Pipelines, Pipeline{r.pipelineName(src.name, src.name), src.match, len(cfg.Sinks)})
		cfg.Sinks = append(cfg.Sinks, to.Sink)
	}
	if len(root.Content) == 0 {
		r.Fail(root, "it lists no pipeline")
	}
	return cfg
}

// require says which keys of what was read are missing.
func (r *fileReader) require(n *yaml.Node, given map[string]bool, what, name string, keys ...string) {
	for _, key := range keys {
		switch {
		case given == nil || given[key]:
		case key == "name":
			r.Fail(n, "a %s without a name", what)
		default:
			r.Fail(n, "%s %q has no %s", what, name, key)
		}
	}
}

func (r *fileReader) source(n *yaml.Node) source {
	var s source
	fields := map[string]func(*yaml.Node){
		"sinks": func(n *yaml.Node) {
			r.names(n, "source", s.name, "sinks", func(n *yaml.Node) { s.sinks = append(s.sinks, n) })
		},
	}
	r.sourceFields(&s, fields, "source")
	given := r.fields(n, "a source", fields)
	r.require(n, given, "source", s.name, "name", r.what, "sinks")
	return s
}

// sourceFields adds what reads the name of a source and what it lists.
func (r *fileReader) sourceFields(s *source, fields map[string]func(*yaml.Node), what string) {
	fields["name"] = func(n *yaml.Node) { s.name = r.text(n, "the name of a "+what) }
	fields[r.what] = func(n *yaml.Node) {
		patterns := []string{"*"}
		if n.Kind != yaml.ScalarNode || n.Value != "*" { // which Ceilometer takes for a list of characters
			patterns = nil
			r.names(n, what, s.name, r.what, func(n *yaml.Node) { patterns = append(patterns, n.Value) })
		}
		if patterns == nil {
			return
		}
		var err error
		if s.match, err = sample.NewMatcher(patterns); err != nil {
			r.Fail(n, "%s %q: %s: %v", what, s.name, r.what, err)
		}
	}
}

// names calls each with the elements of a list of texts, which must have one.
func (r *fileReader) names(n *yaml.Node, what, name, key string, each func(*yaml.Node)) {
	n = definition.Resolve(n)
	if r.list(n, key, func(n *yaml.Node) {
		if r.text(n, "an element of "+key) != "" {
			each(n)
		}
	}) && len(n.Content) == 0 {
		r.Fail(n, "%s %q has no %s", what, name, key)
	}
}

func (r *fileReader) sink(n *yaml.Node, cfg *Config) *sink {
	s := &sink{node: n}
	fields := r.sinkFields(s, cfg)
	fields["name"] = func(n *yaml.Node) { s.Name = r.text(n, "the name of a sink") }
	given := r.fields(n, "a sink", fields)
	r.require(n, given, "sink", s.Name, "name", "publishers")
	return s
}

// sinkFields reads what a sink has but for its name.
func (r *fileReader) sinkFields(s *sink, cfg *Config) map[string]func(*yaml.Node) {
	return map[string]func(*yaml.Node){
		"transformers": func(n *yaml.Node) {
			s.Stages = r.transformers(n)
			if r.what == "events" && len(s.Stages) > 0 {
				r.Fail(n, "events have no transformers")
			}
		},
		"publishers": func(n *yaml.Node) {
			r.names(n, "sink", s.Name, "publishers", func(n *yaml.Node) {
				i := r.target(n, cfg)
				if slices.Contains(s.Targets, i) {
					r.Warn(n, "this publisher is listed twice in the sink; it gets everything once")
				} else if i >= 0 {
					s.Targets = append(s.Targets, i)
				}
			})
		},
	}
}

// target returns the index of a publisher's URL, which sinks share, or -1.
func (r *fileReader) target(n *yaml.Node, cfg *Config) int {
	text := n.Value
	u, err := ParseURL(text)
	if err != nil {
		r.Fail(n, "%v", err)
		return -1
	}
	for i, t := range cfg.Targets {
		if t.URL.String() == u.String() {
			return i
		}
	}
	if !strings.Contains(text, "://") {
		text += "://"
	}
	if u.User != nil {
		text = u.Redacted()
	}
	cfg.Targets = append(cfg.Targets, Target{u, text, r.where(n)})
	return len(cfg.Targets) - 1
}

// Dispatch puts other publishers in the place of notifier:// and rpc:// without a
// host, by which samples and events went to Ceilometer's collector. None leaves
// them.
func (c *Config) Dispatch(urls []string) error {
	if len(urls) == 0 {
		return nil
	}
	var stand []int // what stands for them
	for _, text := range urls {
		u, err := ParseURL(text)
		if err != nil {
			return err
		}
		at := slices.IndexFunc(c.Targets, func(t Target) bool { return t.URL.String() == u.String() })
		if at < 0 {
			at = len(c.Targets)
			c.Targets = append(c.Targets, Target{u, u.Redacted(), "dispatchers"})
		}
		stand = append(stand, at)
	}
	used := make([]bool, len(c.Targets))
	for i := range c.Sinks {
		var targets []int
		for _, t := range c.Sinks[i].Targets {
			add := []int{t}
			if u := c.Targets[t].URL; u.Host == "" && slices.Contains([]string{"notifier", "rpc", "meter"}, u.Scheme) {
				add = stand
			}
			for _, a := range add {
				if !slices.Contains(targets, a) {
					targets = append(targets, a)
				}
				used[a] = true
			}
		}
		c.Sinks[i].Targets = targets
	}
	number := make([]int, len(c.Targets)) // new number of each that is used
	kept := c.Targets[:0]
	for t, target := range c.Targets {
		if number[t] = len(kept); used[t] {
			kept = append(kept, target)
		}
	}
	c.Targets = kept
	for i := range c.Sinks {
		for k, t := range c.Sinks[i].Targets {
			c.Sinks[i].Targets[k] = number[t]
		}
	}
	return nil
}

// ParseURL reads a publisher's URL; one that is a scheme only may go without
// "://". The error quotes nothing of it, since it may hold a password.
func ParseURL(text string) (*url.URL, error) {
	if !strings.Contains(text, "://") {
		text += "://"
	}
	if scheme, rest, _ := strings.Cut(text, "://"); scheme == "meter_publisher" { // another name of rpc, which is no scheme to net/url
		text = "rpc://" + rest
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" {
		return nil, errors.New("a publisher is no URL of the form scheme://host/path?option=value")
	}
	return u, nil
}

// Describe returns a text for each pipeline that tells whether it is the same in
// another configuration.
func (c *Config) Describe() map[string]string {
	all := map[string]string{}
	for i := range c.Pipelines {
		p := &c.Pipelines[i]
		text := []string{p.Match.String()}
		sink := &c.Sinks[p.Sink]
		for _, s := range sink.Stages {
			text = append(text, s.text)
		}
		for _, t := range sink.Targets {
			text = append(text, c.Targets[t].URL.String())
		}
		all[p.Name] = strings.Join(text, "\n")
	}
	return all
}
