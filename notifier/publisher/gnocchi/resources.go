package gnocchi

import (
	"encoding/json"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/sample"
)

// Resources is a gnocchi_resources.yaml.
type Resources struct {
	policy   string            // of metrics that name none
	policies []json.RawMessage // archive policies to create
	types    []*resourceType
	metrics  map[string]*resourceType // by metric, its last type
}

// resourceType is an entry of resources.
type resourceType struct {
	name       string
	policy     string            // deprecated: of all its metrics
	metrics    map[string]string // policy by metric; empty: none of its own
	attributes []attribute

	create, remove, update *sample.Matcher // of event types; nil: none
	traits                 []trait
	associated             []associated
}

// attribute is where an attribute of a resource comes from.
type attribute struct {
	name  string
	field *definition.Field
}

// trait is which trait of an event an attribute is.
type trait struct{ attribute, trait string }

// associated are resources that end with another one.
type associated struct{ name, query string }

// Load reads a gnocchi_resources.yaml. Entries that are wrong are left out, and
// found; the error is about the YAML.
func Load(file string, data []byte) (*Resources, []definition.Finding, error) {
	r := &definition.Reader{File: file}
	root, err := r.Document(data)
	if err != nil {
		return nil, nil, err
	}
	out := &Resources{policy: "ceilometer-low", metrics: map[string]*resourceType{}}
	if root == nil || root.Kind != yaml.MappingNode {
		return nil, nil, fmt.Errorf("%s: it is no mapping with the key resources", file)
	}
	for _, p := range r.Pairs(root) {
		switch v := definition.Resolve(p.Value); p.Key.Value {
		case "archive_policy_default":
			out.policy = v.Value
		case "archive_policies":
			out.policies = policies(r, v)
		case "resources":
			if v.Kind != yaml.SequenceNode {
				r.Fail(v, "resources is no list")
				continue
			}
			for _, n := range v.Content {
				if t := readType(r, definition.Resolve(n)); t != nil {
					out.types = append(out.types, t)
				}
			}
		default:
			r.Warn(p.Key, "unknown key %q; it is ignored", p.Key.Value)
		}
	}
	for _, t := range out.types {
		for m := range t.metrics {
			if first := out.metrics[m]; first != nil && first != t {
				r.Warn(root, "metric %s is one of %s and of %s; it belongs to the last", m, first.name, t.name)
			}
			out.metrics[m] = t
		}
	}
	return out, r.Findings, nil
}

func policies(r *definition.Reader, n *yaml.Node) (all []json.RawMessage) {
	var list []map[string]any
	if err := n.Decode(&list); err != nil {
		r.Fail(n, "archive_policies is no list of mappings")
		return nil
	}
	for _, p := range list {
		body, err := json.Marshal(p)
		if err != nil || p["name"] == nil {
			r.Fail(n, "an archive policy without a name, or one that is no JSON")
			continue
		}
		all = append(all, body)
	}
	return all
}

// readType returns nil where the entry cannot be used.
func readType(r *definition.Reader, n *yaml.Node) *resourceType {
	before := len(r.Findings)
	t := &resourceType{metrics: map[string]string{}}
	if n.Kind != yaml.MappingNode {
		r.Fail(n, "a resource is no mapping")
		return nil
	}
	events, hasMetrics := false, false
	matcher := func(key string, v *yaml.Node) *sample.Matcher {
		events = true
		m, err := sample.NewMatcher(r.Texts(v, key))
		if err != nil {
			r.Fail(v, "%s: %v", key, err)
		}
		return m
	}
	for _, p := range r.Pairs(n) {
		v := definition.Resolve(p.Value)
		switch key := p.Key.Value; key {
		case "resource_type":
			t.name = v.Value
		case "metrics":
			hasMetrics = true
			readMetrics(r, v, t)
		case "archive_policy":
			r.Warn(v, "archive_policy of a resource is deprecated; name archive_policy_name at the metrics")
			t.policy = v.Value
		case "attributes":
			for _, a := range r.Pairs(v) {
				if f := r.Field(a.Value, a.Key.Value); f != nil {
					t.attributes = append(t.attributes, attribute{a.Key.Value, f})
				}
			}
		case "event_create":
			t.create = matcher(key, v)
		case "event_delete":
			t.remove = matcher(key, v)
		case "event_update":
			t.update = matcher(key, v)
		case "event_attributes":
			for _, a := range r.Pairs(v) {
				t.traits = append(t.traits, trait{a.Key.Value, definition.Resolve(a.Value).Value})
			}
		case "event_associated_resources":
			for _, a := range r.Pairs(v) {
				query := definition.Resolve(a.Value)
				if strings.Count(query.Value, "%s") != 1 || !json.Valid([]byte(strings.Replace(query.Value, "%s", "x", 1))) {
					r.Fail(query, `the query of %s is no JSON with one %%s for the id, as in '{"=": {"instance_id": "%%s"}}'`, a.Key.Value)
				}
				t.associated = append(t.associated, associated{a.Key.Value, query.Value})
			}
		default:
			r.Warn(p.Key, "unknown key %q; it is ignored", key)
		}
	}
	hasID := false
	for _, tr := range t.traits {
		hasID = hasID || tr.attribute == "id"
	}
	switch {
	case t.name == "":
		r.Fail(n, "a resource without resource_type")
	case !hasMetrics:
		r.Fail(n, "resource %s has no metrics; an empty mapping is right where it has none", t.name)
	case events && !hasID:
		r.Fail(n, "resource %s has events, so its event_attributes must say which trait is the id", t.name)
	}
	for _, f := range r.Findings[before:] {
		if f.Error {
			return nil
		}
	}
	return t
}

func readMetrics(r *definition.Reader, n *yaml.Node, t *resourceType) {
	switch {
	case n.Kind == yaml.SequenceNode:
		for _, name := range r.Texts(n, "metrics") {
			t.metrics[name] = ""
		}
	case n.Kind == yaml.MappingNode:
		for _, p := range r.Pairs(n) {
			var m struct {
				Policy string `yaml:"archive_policy_name"`
			}
			if err := definition.Resolve(p.Value).Decode(&m); err != nil {
				r.Fail(p.Value, "metric %s is neither empty nor {archive_policy_name: …}", p.Key.Value)
			}
			t.metrics[p.Key.Value] = m.Policy
		}
	case n.Tag != "!!null":
		r.Fail(n, "metrics is neither a mapping nor a list")
	}
}

// policyOf returns the archive policy of a metric. What the URL says goes
// before the metric's own.
func (r *Resources) policyOf(t *resourceType, metric, ofURL string) string {
	for _, p := range []string{t.policy, ofURL, t.metrics[metric]} {
		if p != "" {
			return p
		}
	}
	return r.policy
}
