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

	resources, discovery []string
	notes                []string // what is odd in it
}

// discoveries of Ceilometer, and whether this agent has what they find: the
// domains of its host and the host itself. The others are of the namespace central.
var discoveries = map[string]bool{
	"local_instances": true, "local_node": true,
	"endpoint": false, "tenant": false, "barbican": false, "images": false, "volumes": false, "volume_snapshots": false,
	"volume_backups": false, "volume_pools": false, "volume_services": false, "fip_services": false, "vpn_services": false,
	"ipsec_connections": false, "fw_services": false, "fw_policy": false, "lb_services": false, "dns_zones": false,
	"manila_shares": false, "alarm": false,
}

// domains reports whether the source polls domains, as Ceilometer decides it: it
// polls its static resources and what its discoveries find, and where that is
// nothing what a meter is usually of.
func (s *pollSource) domains() bool {
	others := len(s.resources) > 0
	for _, name := range s.discovery {
		switch name {
		case "local_instances":
			return true
		case "local_node":
			others = true
		}
	}
	return !others
}

// discoveryName cuts the parameter off: name, name:param or name://param.
func discoveryName(text string) string {
	name, _, _ := strings.Cut(text, ":")
	return name
}

// note notes what is odd, and harmless.
func (s *pollSource) note(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// plan is a set of meters that are polled together.
type plan struct {
	interval time.Duration
	qemu     bool // the meters that make QEMU work, which are read apart
	bmc      bool // those of the BMC, likewise
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

// CheckPolling returns what is odd in a polling.yaml, and as an error what is
// wrong in it; both name the line.
func CheckPolling(data []byte) (notes []string, err error) {
	sources, err := parsePolling(data)
	for _, s := range sources {
		notes = append(notes, s.notes...)
	}
	return notes, err
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
	var notes []string
	for i := 0; i < len(root.Content[0].Content); i += 2 {
		if key := root.Content[0].Content[i]; key.Value != "sources" {
			notes = append(notes, fmt.Sprintf("line %d: unknown key %q; only sources is known here", key.Line, key.Value))
		}
	}
	if err := root.Decode(&doc); err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if doc.Sources.Kind != yaml.SequenceNode || len(doc.Sources.Content) == 0 {
		if len(notes) > 0 && doc.Sources.Line == 0 {
			return nil, fmt.Errorf("line 1: the file must have the key sources, a list (%s)", notes[0])
		}
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
				s.note("line %d: source %q exists already, in line %d; both are polled", s.line, s.name, other.line)
				break
			}
		}
		sources = append(sources, s)
	}
	sources[0].notes = append(notes, sources[0].notes...)
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
			err = decodeList(value, &s.discovery)
			for i, text := range s.discovery {
				name := discoveryName(text)
				s.discovery[i] = name
				if here, known := discoveries[name]; !known {
					s.note("line %d: there is no discovery %q; it finds nothing", value.Line, text)
				} else if !here {
					s.note("line %d: the discovery %q is of Ceilometer's namespace central; it finds nothing here", value.Line, text)
				}
			}
		case "resources":
			err = decodeList(value, &s.resources)
		case "group_id_coordination_expression": // each agent polls its own host
		default:
			s.note("line %d: unknown key %q of a source; name, interval, meters, resources and discovery are known", key.Line, key.Value)
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
	case !s.domains():
		s.note("source %q polls its own resources, and no domains: its discovery lacks local_instances", s.name)
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

// parseInterval reads seconds, which may have a fraction, or a duration such as
// 500ms.
func parseInterval(n *yaml.Node) (time.Duration, error) {
	d, err := time.ParseDuration(n.Value)
	if s, notNumber := strconv.ParseFloat(n.Value, 64); notNumber == nil && s == s {
		d, err = time.Duration(min(max(s, -1), maxInterval.Seconds()+1)*float64(time.Second)), nil
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
func makePlans(sources []pollSource, cfg *Config) (plans []plan, notes []string) {
	legacy, _ := cfg.LegacyMeters.matcher() // Config.Check has seen it
	type key struct {
		interval time.Duration
		qemu     bool
	}
	byKey := map[key]*plan{}
	slowed := false
	for _, s := range sources {
		for _, odd := range s.notes {
			notes = append(notes, "polling.yaml: "+odd)
		}
		if !s.domains() {
			continue
		}
		for _, m := range sample.Catalogue {
			if m.Check != nil || m.OfBMC() || !s.meters.Match(m.Name) { // those have a cadence of their own
				continue
			}
			k := key{s.interval, m.QEMU}
			if m.Legacy && !s.meters.Named(m.Name) && (legacy == nil || !legacy.Match(m.Name)) {
				continue
			}
			if m.QEMU && !s.meters.Named(m.Name) && s.interval < cfg.QEMUInterval {
				k.interval = cfg.QEMUInterval
				slowed = true
			}
			if m.Parts != "" && !m.Total && !s.meters.Named(m.Name) {
				k.interval = max(k.interval, cfg.HistogramInterval)
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
		notes = append(notes, fmt.Sprintf("meters that make every QEMU work (disk.device.*, memory.usage and others) are polled every %s where a wildcard asks for them; name them in polling.yaml for another interval", cfg.QEMUInterval))
	}
	for _, p := range byKey {
		plans = append(plans, *p)
	}
	for _, s := range sources {
		if named := namedChecks(s); s.domains() && len(named) > 0 {
			notes = append(notes, fmt.Sprintf("source %q names %s: comparisons with libvirt come every crosscheck_interval, not every %s", s.name, strings.Join(named, ", "), s.interval))
		}
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

// wantedChecks returns the meters of comparisons that a source asks for.
func wantedChecks(sources []pollSource) map[*sample.Meter]bool {
	wanted := map[*sample.Meter]bool{}
	for _, c := range sample.Checks {
		for _, m := range c.Meters() {
			wanted[m] = slices.ContainsFunc(sources, func(s pollSource) bool { return s.domains() && s.meters.Match(m.Name) })
		}
	}
	return wanted
}

// namedChecks returns the meters of comparisons that a source names without a
// wildcard.
func namedChecks(s pollSource) (names []string) {
	for _, c := range sample.Checks {
		for _, m := range c.Meters() {
			if s.meters.Named(m.Name) {
				names = append(names, m.Name)
			}
		}
	}
	return names
}
