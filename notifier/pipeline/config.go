// Package pipeline reads pipeline.yaml and passes batches through what it says.
package pipeline

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/url"
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

// Config is a pipeline.yaml that was found good.
type Config struct {
	Pipelines []Pipeline // each source with each of its sinks, in order
	Targets   []Target   // what the pipelines publish to, each URL once
}

// Pipeline is a source with one of its sinks.
type Pipeline struct {
	Name    string // "source:sink"
	Meters  *sample.Matcher
	Targets []int // indexes into Config.Targets
}

// Target is a publisher's URL.
type Target struct {
	URL   *url.URL
	Name  string // the URL as it is written, without a password
	Where string // "pipeline.yaml:12", for errors
}

// Load reads a pipeline.yaml; file is its name, for errors. An error names the
// file and the line of everything that is wrong.
func Load(file string, data []byte) (*Config, error) {
	r := &reader{file: file}
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
	cfg := r.config(doc.Content[0])
	if len(r.errs) > 0 {
		return nil, errors.Join(r.errs...)
	}
	return cfg, nil
}

// reader walks the nodes of the file and keeps what is wrong with them.
type reader struct {
	file string
	errs []error
}

// syntax turns "yaml: line 3: …" into "pipeline.yaml:3: …".
func (r *reader) syntax(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if strings.Contains(text, "alphabetic or numeric character") {
		text += ` (a pattern that begins with * or ! needs quotes: "*")`
	}
	if at, ok := strings.CutPrefix(text, "line "); ok {
		return fmt.Errorf("%s:%s", r.file, at)
	}
	return fmt.Errorf("%s: %s", r.file, text)
}

func (r *reader) where(n *yaml.Node) string { return fmt.Sprintf("%s:%d", r.file, n.Line) }

func (r *reader) fail(n *yaml.Node, format string, args ...any) {
	r.errs = append(r.errs, fmt.Errorf("%s: %w", r.where(n), fmt.Errorf(format, args...)))
}

// fields calls the function that a mapping's key has in known with its value.
func (r *reader) fields(n *yaml.Node, what string, known map[string]func(*yaml.Node)) {
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
			r.fail(key, "%q is not read here; how often meters are polled is said in polling.yaml", key.Value)
		case !ok:
			r.fail(key, "unknown key %q in %s", key.Value, what)
		case first > 0:
			r.fail(key, "%q is set twice in %s, first on line %d", key.Value, what, first)
		default:
			seen[key.Value] = key.Line
			read(n.Content[i+1])
		}
	}
}

// list calls each with the elements of a list.
func (r *reader) list(n *yaml.Node, what string, each func(*yaml.Node)) {
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
func (r *reader) text(n *yaml.Node, what string) string {
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
	name    string
	node    *yaml.Node
	targets []int
}

func (r *reader) config(root *yaml.Node) *Config {
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
				if first := sinks[s.name]; first != nil && s.name != "" {
					r.fail(n, "sink %q is defined twice, first on line %d", s.name, first.node.Line)
				}
				sinks[s.name] = s
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
				cfg.Pipelines = append(cfg.Pipelines, Pipeline{s.name + ":" + to.name, s.match, to.targets})
			}
		}
	}
	if len(cfg.Pipelines) == 0 && len(r.errs) == 0 {
		r.fail(root, "no source leads to a sink")
	}
	return cfg
}

func (r *reader) source(n *yaml.Node) source {
	s := source{node: n}
	var meters []string
	metersAt := n
	r.fields(n, "a source", map[string]func(*yaml.Node){
		"name": func(n *yaml.Node) { s.name = r.text(n, "the name of a source") },
		"meters": func(n *yaml.Node) {
			metersAt = n
			r.list(n, "meters", func(n *yaml.Node) { meters = append(meters, r.text(n, "a meter")) })
		},
		"sinks": func(n *yaml.Node) {
			r.list(n, "sinks", func(n *yaml.Node) {
				if r.text(n, "a sink") != "" {
					s.sinks = append(s.sinks, n)
				}
			})
		},
	})
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
	if s.match, err = sample.NewMatcher(meters); err != nil {
		r.fail(metersAt, "source %q: meters: %w", s.name, err)
	}
	return s
}

func (r *reader) sink(n *yaml.Node, cfg *Config) *sink {
	s := &sink{node: n}
	listed := map[string]bool{}
	r.fields(n, "a sink", map[string]func(*yaml.Node){
		"name": func(n *yaml.Node) { s.name = r.text(n, "the name of a sink") },
		"transformers": func(n *yaml.Node) {
			n = resolve(n)
			if n.Tag == "!!null" {
				return
			}
			r.list(n, "transformers", func(e *yaml.Node) {
				r.fail(e, "transformers are not supported; leave the list empty and compute from the stored samples")
			})
		},
		"publishers": func(n *yaml.Node) {
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
					s.targets = append(s.targets, i)
				}
			})
		},
	})
	if len(r.errs) > 0 {
		return s
	}
	if s.name == "" {
		r.fail(n, "a sink without a name")
	}
	if len(s.targets) == 0 {
		r.fail(n, "sink %q has no publishers", s.name)
	}
	return s
}

// target returns the index of a publisher's URL, which sinks share, or -1.
func (r *reader) target(n *yaml.Node, text string, cfg *Config) int {
	if !strings.Contains(text, "://") {
		text += "://"
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" {
		// The error itself may quote a password.
		r.fail(n, "a publisher is no URL of the form scheme://host/path?option=value")
		return -1
	}
	for i, t := range cfg.Targets {
		if t.URL.String() == u.String() {
			return i
		}
	}
	if u.User != nil {
		text = u.Redacted()
	}
	cfg.Targets = append(cfg.Targets, Target{u, text, r.where(n)})
	return len(cfg.Targets) - 1
}
