package agent

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/sample"
)

// pollSource is a source of polling.yaml.
type pollSource struct {
	name     string
	line     int
	interval time.Duration
	meters   *sample.Matcher
	patterns []string
}

// plan is a set of meters that are polled together.
type plan struct {
	interval time.Duration
	qemu     bool // the meters that make QEMU work, which are read apart
	meters   []*sample.Meter
}

// loadPolling returns the sources of the file at path, or for an empty path
// one that polls everything.
func loadPolling(path string, interval time.Duration) ([]pollSource, error) {
	if path == "" {
		all, err := sample.NewMatcher([]string{"*"})
		return []pollSource{{name: "all", interval: interval, meters: all, patterns: []string{"*"}}}, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read polling file: %w", err)
	}
	sources, err := parsePolling(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return sources, nil
}

// parsePolling reads polling.yaml. Its errors name the line.
func parsePolling(data []byte) ([]pollSource, error) {
	var doc struct {
		Sources yaml.Node `yaml:"sources"`
	}
	var root yaml.Node
	if err := yaml.Unmarshal(data, &root); err != nil {
		text := strings.TrimPrefix(err.Error(), "yaml: ")
		if strings.Contains(text, "alphabetic or numeric character") {
			text += ` (a pattern that begins with * or ! needs quotes: "*")`
		}
		return nil, errors.New(text)
	}
	if len(root.Content) == 0 || root.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("line 1: the file must have the key sources, a list")
	}
	for i := 0; i < len(root.Content[0].Content); i += 2 {
		if key := root.Content[0].Content[i]; key.Value != "sources" {
			return nil, fmt.Errorf("line %d: unknown key %q; only sources is known here", key.Line, key.Value)
		}
	}
	if err := root.Decode(&doc); err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if doc.Sources.Kind != yaml.SequenceNode || len(doc.Sources.Content) == 0 {
		return nil, fmt.Errorf("line %d: sources must be a list of at least one source", max(1, doc.Sources.Line))
	}
	var sources []pollSource
	for _, n := range doc.Sources.Content {
		s, err := parseSource(n)
		if err != nil {
			return nil, err
		}
		for _, other := range sources {
			if other.name == s.name {
				return nil, fmt.Errorf("line %d: source %q exists already, in line %d; give each its own name", s.line, s.name, other.line)
			}
		}
		sources = append(sources, s)
	}
	return sources, nil
}

func parseSource(n *yaml.Node) (pollSource, error) {
	s := pollSource{line: n.Line}
	if n.Kind != yaml.MappingNode {
		return s, fmt.Errorf("line %d: a source must have name, interval and meters", n.Line)
	}
	seen := map[string]bool{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if value.Kind == yaml.AliasNode {
			value = value.Alias
		}
		if seen[key.Value] {
			return s, fmt.Errorf("line %d: the source has the key %s twice", key.Line, key.Value)
		}
		seen[key.Value] = true
		var err error
		switch key.Value {
		case "name":
			err = value.Decode(&s.name)
		case "interval":
			s.interval, err = parseInterval(value)
		case "meters":
			if err = decodeList(value, &s.patterns); err == nil {
				s.meters, err = sample.NewMatcher(s.patterns)
			}
		case "discovery":
			var list []string
			if err = decodeList(value, &list); err == nil && !slices.Equal(list, []string{"local_instances"}) {
				err = errors.New("the agent discovers the domains of its own host only; remove the key")
			}
		case "resources":
			err = errors.New("the agent polls the domains of its own host, not a list of resources; remove the key")
		default:
			return s, fmt.Errorf("line %d: unknown key %q of a source; name, interval and meters are known", key.Line, key.Value)
		}
		if err != nil {
			return s, fmt.Errorf("line %d: %s: %s", value.Line, key.Value, strings.TrimPrefix(err.Error(), "yaml: "))
		}
	}
	switch {
	case s.name == "":
		return s, fmt.Errorf("line %d: the source has no name", n.Line)
	case s.interval == 0:
		return s, fmt.Errorf("line %d: source %q has no interval", n.Line, s.name)
	case s.meters == nil:
		return s, fmt.Errorf("line %d: source %q has no meters", n.Line, s.name)
	}
	return s, nil
}

func decodeList(n *yaml.Node, list *[]string) error {
	if n.Kind != yaml.SequenceNode {
		return errors.New("must be a list")
	}
	return n.Decode(list)
}

// maxInterval keeps an interval in seconds within a time.Duration.
const maxInterval = 366 * 24 * time.Hour

// parseInterval reads seconds, or a duration such as 500ms.
func parseInterval(n *yaml.Node) (time.Duration, error) {
	d, err := time.ParseDuration(n.Value)
	if s, notNumber := strconv.Atoi(n.Value); notNumber == nil {
		d, err = time.Duration(min(max(s, -1), int(maxInterval/time.Second)+1))*time.Second, nil
	}
	if err != nil || n.Kind != yaml.ScalarNode {
		return 0, fmt.Errorf("%q is neither a number of seconds nor a duration such as 500ms", n.Value)
	}
	if d < minInterval || d > maxInterval {
		return 0, fmt.Errorf("%q is not between %s and %s", n.Value, minInterval, maxInterval)
	}
	return d, nil
}

// makePlans says which meters are polled together: one plan for each interval,
// and another for those that make QEMU work. A meter that several sources name
// at the same interval is polled once. The notes say what an operator would
// not expect.
func makePlans(sources []pollSource, qemuInterval time.Duration) (plans []plan, notes []string) {
	type key struct {
		interval time.Duration
		qemu     bool
	}
	byKey := map[key]*plan{}
	slowed := false
	for _, s := range sources {
		for _, m := range sample.Catalogue {
			if !s.meters.Match(m.Name) {
				continue
			}
			k := key{s.interval, m.QEMU}
			if m.QEMU && !s.meters.Named(m.Name) && s.interval < qemuInterval {
				k.interval = qemuInterval
				slowed = true
			}
			p := byKey[k]
			if p == nil {
				p = &plan{interval: k.interval, qemu: k.qemu}
				byKey[k] = p
			}
			if !slices.Contains(p.meters, m) {
				p.meters = append(p.meters, m)
			}
		}
		for _, name := range s.patterns {
			if s.meters.Named(name) && !slices.ContainsFunc(sample.Catalogue, func(m *sample.Meter) bool { return m.Name == name }) {
				notes = append(notes, fmt.Sprintf("source %q asks for the meter %s, which this agent does not have", s.name, name))
			}
		}
	}
	if slowed {
		notes = append(notes, fmt.Sprintf("meters that make every QEMU work (disk.device.*, check.*) are polled every %s where a wildcard asks for them; name them in polling.yaml for another interval", qemuInterval))
	}
	for _, p := range byKey {
		plans = append(plans, *p)
	}
	slices.SortFunc(plans, func(a, b plan) int {
		if a.qemu != b.qemu {
			if b.qemu {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.interval, b.interval)
	})
	return plans, notes
}
