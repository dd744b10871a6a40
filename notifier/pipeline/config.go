// Package pipeline reads pipeline.yaml and passes batches through what it says.
package pipeline

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

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
	Warnings  []error    // what is odd or has no effect, with file and line
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
	doc := resolve(root.Content[0])
	lists := []*yaml.Node{doc}
	for i := 0; doc.Kind == yaml.MappingNode && i < len(doc.Content); i += 2 {
		if doc.Content[i].Value == "sources" {
			lists = []*yaml.Node{resolve(doc.Content[i+1])}
		}
	}
	events := false
	for _, list := range lists {
		if list.Kind != yaml.SequenceNode {
			continue
		}
		for _, e := range list.Content {
			e = resolve(e)
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
	r := &fileReader{file: file, what: what}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%s: it is empty; it needs sources and sinks", file)
	case err != nil:
		return nil, r.syntax(err)
	}
	if err := dec.Decode(&more); err == nil {
		r.fail(&more, "a second document; one is read")
	} else if !errors.Is(err, io.EOF) {
		return nil, r.syntax(err)
	}
	root := resolve(doc.Content[0])
	var cfg *Config
	if root.Kind == yaml.SequenceNode {
		cfg = r.flat(root)
	} else {
		cfg = r.config(root)
	}
	slices.SortStableFunc(r.warnings, func(a, b warning) int {
		return cmp.Or(a.line-b.line, strings.Compare(a.err.Error(), b.err.Error()))
	})
	for _, w := range r.warnings {
		cfg.Warnings = append(cfg.Warnings, w.err)
	}
	if len(r.errs) > 0 {
		return nil, &Errors{r.errs, cfg.Warnings, cfg.Targets}
	}
	return cfg, nil
}

// Errors are what is wrong with a file that can be read.
type Errors struct {
	Errors   []error
	Warnings []error  // of what is odd besides
	Targets  []Target // that it names all the same
}

// Error implements error: a line each.
func (e *Errors) Error() string {
	return errors.Join(slices.Concat(e.Errors, e.Warnings)...).Error()
}

// Unwrap returns the errors.
func (e *Errors) Unwrap() []error { return e.Errors }

// fileReader walks the nodes of the file and keeps what is wrong with them.
type fileReader struct {
	file     string
	what     string // what sources list: meters or events
	errs     []error
	warnings []warning
}

type warning struct {
	line int
	err  error
}

// syntax turns "yaml: line 3: …" into "pipeline.yaml:3: …".
func (r *fileReader) syntax(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if strings.Contains(text, "alphabetic or numeric character") {
		text += ` (a pattern that begins with * or ! needs quotes: "*")`
	}
	if at, ok := strings.CutPrefix(text, "line "); ok {
		return fmt.Errorf("%s:%s", r.file, at)
	}
	return fmt.Errorf("%s: %s", r.file, text)
}

func (r *fileReader) where(n *yaml.Node) string { return fmt.Sprintf("%s:%d", r.file, n.Line) }

func (r *fileReader) fail(n *yaml.Node, format string, args ...any) {
	r.errs = append(r.errs, fmt.Errorf("%s: %w", r.where(n), fmt.Errorf(format, args...)))
}

func (r *fileReader) warn(n *yaml.Node, format string, args ...any) {
	r.warnings = append(r.warnings, warning{n.Line, fmt.Errorf("%s: %w", r.where(n), fmt.Errorf(format, args...))})
}

// fields calls the function that a mapping's key has in known with its value.
func (r *fileReader) fields(n *yaml.Node, what string, known map[string]func(*yaml.Node)) {
	n = resolve(n)
	if n.Kind != yaml.MappingNode {
		r.fail(n, "%s is no mapping of keys to values", what)
		return
	}
	seen := map[string]int{}
	for i := 0; i < len(n.Content); i += 2 {
		key := n.Content[i]
		read, ok := known[key.Value]
		switch first := seen[key.Value]; {
		case !ok && (key.Value == "interval" || key.Value == "resources" || key.Value == "discovery"):
			r.warn(key, "%q has no effect here; what is polled, and how often, is said in polling.yaml", key.Value)
		case !ok:
			r.warn(key, "unknown key %q in %s; it is ignored", key.Value, what)
		case first > 0:
			r.fail(key, "%q is set twice in %s, first on line %d", key.Value, what, first)
		default:
			seen[key.Value] = key.Line
			read(n.Content[i+1])
		}
	}
}

// list calls each with the elements of a list.
func (r *fileReader) list(n *yaml.Node, what string, each func(*yaml.Node)) {
	n = resolve(n)
	if n.Kind != yaml.SequenceNode {
		r.fail(n, "%s is no list", what)
		return
	}
	for _, e := range n.Content {
		each(resolve(e))
	}
}

// text returns a scalar.
func (r *fileReader) text(n *yaml.Node, what string) string {
	n = resolve(n)
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "" {
		r.fail(n, "%s is no text", what)
		return ""
	}
	return n.Value
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

type source struct {
	name  string
	node  *yaml.Node
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
	sections := map[string]bool{}
	r.fields(root, "the file", map[string]func(*yaml.Node){
		"sources": func(n *yaml.Node) {
			sections["sources"] = true
			names := map[string]int{}
			r.list(n, "sources", func(n *yaml.Node) {
				s := r.source(n)
				if first := names[s.name]; first > 0 && s.name != "" {
					r.fail(n, "source %q is defined twice, first on line %d", s.name, first)
				}
				names[s.name] = n.Line
				sources = append(sources, s)
			})
		},
		"sinks": func(n *yaml.Node) {
			sections["sinks"] = true
			r.list(n, "sinks", func(n *yaml.Node) {
				s := r.sink(n, cfg)
				if first := sinks[s.Name]; first != nil && s.Name != "" {
					r.fail(n, "sink %q is defined twice, first on line %d", s.Name, first.node.Line)
				}
				sinks[s.Name] = s
				s.index = len(cfg.Sinks)
				cfg.Sinks = append(cfg.Sinks, s.Sink)
			})
		},
	})
	if len(r.errs) > 0 {
		return cfg
	}
	for _, name := range []string{"sources", "sinks"} {
		if !sections[name] {
			r.fail(root, "%s are missing", name)
		}
	}
	for _, s := range sources {
		used := map[string]bool{}
		for _, n := range s.sinks {
			to := sinks[n.Value]
			switch {
			case to == nil:
				r.fail(n, "source %q: sink %q is not defined", s.name, n.Value)
			case used[n.Value]:
				r.fail(n, "source %q: sink %q is listed twice", s.name, n.Value)
			default:
				used[n.Value] = true
				cfg.Pipelines = append(cfg.Pipelines, Pipeline{r.pipelineName(s.name, to.Name), s.match, to.index})
			}
		}
	}
	for _, s := range sinks {
		if len(r.errs) == 0 && !slices.ContainsFunc(cfg.Pipelines, func(p Pipeline) bool { return p.Sink == s.index }) {
			r.warn(s.node, "no source leads to sink %q", s.Name)
		}
	}
	if len(cfg.Pipelines) == 0 && len(r.errs) == 0 {
		r.fail(root, "no source leads to a sink")
	}
	names := map[string]bool{}
	for _, p := range cfg.Pipelines {
		if names[p.Name] {
			r.fail(root, "two pipelines are called %q; rename a source or a sink", p.Name)
		}
		names[p.Name] = true
	}
	return cfg
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
		n = resolve(n)
		src, to := source{node: n}, &sink{node: n}
		listsAt, lists := n, []string(nil)
		fields := r.sinkFields(to, cfg)
		fields["name"] = func(n *yaml.Node) { src.name = r.text(n, "the name of a pipeline") }
		list := func(n *yaml.Node) { listsAt, lists = n, r.names(n) }
		fields[r.what] = list
		if r.what == "meters" {
			fields["counters"] = list
		}
		before := len(r.errs)
		r.fields(n, "a pipeline", fields)
		if len(r.errs) > before {
			continue
		}
		to.Name = src.name
		r.checkSink(to)
		if first := names[src.name]; first > 0 {
			r.fail(n, "pipeline %q is defined twice, first on line %d", src.name, first)
		}
		names[src.name] = n.Line
		var err error
		if src.match, err = sample.NewMatcher(lists); err != nil {
			r.fail(listsAt, "pipeline %q: %s: %w", src.name, r.what, err)
		}
		cfg.Pipelines = append(cfg.Pipelines, Pipeline{r.pipelineName(src.name, src.name), src.match, len(cfg.Sinks)})
		cfg.Sinks = append(cfg.Sinks, to.Sink)
	}
	if len(cfg.Pipelines) == 0 && len(r.errs) == 0 {
		r.fail(root, "it lists no pipeline")
	}
	return cfg
}

// names returns a list of names or patterns.
func (r *fileReader) names(n *yaml.Node) (names []string) {
	r.list(n, r.what, func(n *yaml.Node) { names = append(names, r.text(n, "a name")) })
	return names
}

func (r *fileReader) source(n *yaml.Node) source {
	s := source{node: n}
	var names []string
	namesAt := n
	list := func(n *yaml.Node) { namesAt, names = n, r.names(n) }
	fields := map[string]func(*yaml.Node){
		"name": func(n *yaml.Node) { s.name = r.text(n, "the name of a source") },
		r.what: list,
		"sinks": func(n *yaml.Node) {
			r.list(n, "sinks", func(n *yaml.Node) {
				if r.text(n, "a sink") != "" {
					s.sinks = append(s.sinks, n)
				}
			})
		},
	}
	if r.what == "meters" {
		fields["counters"] = list // until Juno
	}
	r.fields(n, "a source", fields)
	if len(r.errs) > 0 {
		return s
	}
	if s.name == "" {
		r.fail(n, "a source without a name")
	}
	if len(s.sinks) == 0 {
		r.fail(n, "source %q has no sinks", s.name)
	}
	var err error
	if s.match, err = sample.NewMatcher(names); err != nil {
		r.fail(namesAt, "source %q: %s: %w", s.name, r.what, err)
	}
	return s
}

func (r *fileReader) sink(n *yaml.Node, cfg *Config) *sink {
	s := &sink{node: n}
	fields := r.sinkFields(s, cfg)
	fields["name"] = func(n *yaml.Node) { s.Name = r.text(n, "the name of a sink") }
	r.fields(n, "a sink", fields)
	if len(r.errs) == 0 {
		r.checkSink(s)
	}
	return s
}

// sinkFields reads what a sink has but for its name.
func (r *fileReader) sinkFields(s *sink, cfg *Config) map[string]func(*yaml.Node) {
	return map[string]func(*yaml.Node){
		"transformers": func(n *yaml.Node) {
			s.Stages = r.transformers(n)
			if r.what == "events" && len(s.Stages) > 0 {
				r.fail(n, "events have no transformers")
			}
		},
		"publishers": func(n *yaml.Node) {
			listed := map[string]bool{}
			r.list(n, "publishers", func(n *yaml.Node) {
				text := r.text(n, "a publisher")
				if text == "" {
					return
				}
				if listed[text] {
					r.fail(n, "this publisher is listed twice in the sink")
				}
				listed[text] = true
				if i := r.target(n, text, cfg); i >= 0 {
					s.Targets = append(s.Targets, i)
				}
			})
		},
	}
}

func (r *fileReader) checkSink(s *sink) {
	if s.Name == "" {
		r.fail(s.node, "a sink without a name")
	}
	if len(s.Targets) == 0 {
		r.fail(s.node, "sink %q has no publishers", s.Name)
	}
}

// target returns the index of a publisher's URL, which sinks share, or -1.
func (r *fileReader) target(n *yaml.Node, text string, cfg *Config) int {
	u, err := ParseURL(text)
	if err != nil {
		r.fail(n, "%w", err)
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
			if u := c.Targets[t].URL; u.Host == "" && slices.Contains([]string{"notifier", "rpc", "meter", "meter_publisher"}, u.Scheme) {
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
