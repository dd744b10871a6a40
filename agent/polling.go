package agent

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
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

// note notes what is odd in a line, and harmless.
func (s *pollSource) note(line int, format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf("line %d: ", line)+fmt.Sprintf(format, args...))
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
	sources, wrong := parsePolling(data)
	if len(wrong) > 0 {
		return nil, fmt.Errorf("%s: %s", path, strings.Join(wrong, "; "))
	}
	return sources, nil
}

// CheckPolling returns all that is odd in a polling.yaml, and all for which it would
// be refused; each names the line.
func CheckPolling(data []byte) (odd, wrong []string) {
	sources, wrong := parsePolling(data)
	for _, s := range sources {
		odd = append(odd, s.notes...)
	}
	return odd, wrong
}

// parsePolling reads polling.yaml, and says all that is wrong in it, each with its
// line. Sources that are wrong are there as far as they can be read.
func parsePolling(data []byte) (sources []pollSource, wrong []string) {
	fail := func(line int, text string) { wrong = append(wrong, fmt.Sprintf("line %d: %s", max(1, line), text)) }
	var root yaml.Node
	if err := yaml.Unmarshal(data, &root); err != nil {
		text := strings.TrimPrefix(err.Error(), "yaml: ")
		if strings.Contains(text, "alphabetic or numeric character") {
			text += ` (a pattern that begins with * or ! needs quotes: "*")`
		}
		return nil, []string{text}
	}
	if len(root.Content) == 0 || root.Content[0].Kind != yaml.MappingNode {
		fail(1, "the file must have the key sources, a list")
		return nil, wrong
	}
	var list *yaml.Node
	top := pollSource{}
	for key, value := range pairs(root.Content[0]) {
		if key.Value == "sources" {
			list = value
		} else {
			top.note(key.Line, "unknown key %q; only sources is known here", key.Value)
		}
	}
	switch {
	case list == nil && len(top.notes) > 0:
		fail(1, "the file must have the key sources, a list ("+top.notes[0]+")")
		return nil, wrong
	case list == nil:
		fail(1, "the file must have the key sources, a list")
		return nil, wrong
	case list.Kind != yaml.SequenceNode || len(list.Content) == 0:
		fail(list.Line, "sources must be a list of at least one source")
		return nil, wrong
	}
	for _, n := range list.Content {
		s := parseSource(resolved(n), fail)
		if i := slices.IndexFunc(sources, func(o pollSource) bool { return s.name != "" && o.name == s.name }); i >= 0 {
			s.note(s.line, "source %q exists already, in line %d; both are polled", s.name, sources[i].line)
		}
		sources = append(sources, s)
	}
	sources[0].notes = append(top.notes, sources[0].notes...)
	return sources, wrong
}

// resolved returns the node that an alias stands for.
func resolved(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// pairs returns the keys of a mapping and their values. Those that are merged in with
// << come last, and only where the mapping does not have them itself.
func pairs(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(_, _ *yaml.Node) bool) {
		own, merged := map[string]bool{}, []*yaml.Node{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], resolved(n.Content[i+1])
			switch {
			case key.Tag == "!!merge" && value.Kind == yaml.SequenceNode:
				merged = append(merged, value.Content...)
				continue
			case key.Tag == "!!merge":
				merged = append(merged, value)
				continue
			}
			own[key.Value] = true
			if !yield(key, value) {
				return
			}
		}
		for _, m := range merged {
			m = resolved(m)
			for i := 0; i+1 < len(m.Content) && m.Kind == yaml.MappingNode; i += 2 {
				if key := m.Content[i]; !own[key.Value] {
					own[key.Value] = true
					if !yield(key, resolved(m.Content[i+1])) {
						return
					}
				}
			}
		}
	}
}

// parseSource reads a source as far as it can be read, and fails for all that is
// wrong in it.
func parseSource(n *yaml.Node, fail func(line int, text string)) pollSource {
	s := pollSource{line: n.Line}
	if n.Kind != yaml.MappingNode {
		fail(n.Line, "a source must have name, interval and meters")
		return s
	}
	seen := map[string]bool{}
	for key, value := range pairs(n) {
		if seen[key.Value] {
			fail(key.Line, fmt.Sprintf("the source has the key %s twice: remove one", key.Value))
			continue
		}
		seen[key.Value] = true
		var err error
		switch key.Value {
		case "name":
			if s.name = value.Value; value.Kind != yaml.ScalarNode || s.name == "" || value.Tag == "!!null" {
				err = errors.New("must be text, such as domains")
			}
		case "interval":
			s.interval, err = parseInterval(value)
		case "meters":
			if s.patterns, err = texts(value, "[cpu]"); err == nil {
				s.meters, err = sample.NewMatcher(s.patterns)
			}
			if err == nil {
				s.noteUnmatched(value.Line)
			}
		case "discovery":
			s.discovery, err = texts(value, "[local_instances]")
			for i, text := range s.discovery {
				name := discoveryName(text)
				s.discovery[i] = name
				if here, known := discoveries[name]; !known {
					s.note(value.Line, "there is no discovery %q; it finds nothing", text)
				} else if !here {
					s.note(value.Line, "the discovery %q is of Ceilometer's namespace central; it finds nothing here", text)
				}
			}
		case "resources":
			s.resources, err = texts(value, `["snmp://10.0.0.1"]`)
		case "group_id_coordination_expression": // each agent polls its own host
		default:
			s.note(key.Line, "unknown key %q of a source; name, interval, meters, resources and discovery are known", key.Value)
		}
		if err != nil {
			fail(value.Line, fmt.Sprintf("%s: %v", key.Value, err))
		}
	}
	for _, missing := range []struct{ key, add string }{
		{"name", "a text of its own, such as name: domains"},
		{"interval", "the seconds between two polls, such as interval: 300"},
		{"meters", `a list of names and patterns, such as meters: ["*"]`},
	} {
		if !seen[missing.key] {
			fail(n.Line, fmt.Sprintf("the source %q has no %s: add %s", s.name, missing.key, missing.add))
		}
	}
	if !s.domains() {
		s.note(n.Line, "source %q polls its own resources, and no domains: its discovery lacks local_instances", s.name)
	}
	return s
}

// noteUnmatched notes names and patterns that match no meter.
func (s *pollSource) noteUnmatched(line int) {
	var unmatched []string
	for _, p := range s.patterns {
		one, err := sample.NewMatcher([]string{p})
		if err == nil && !strings.HasPrefix(p, "!") && !slices.ContainsFunc(sample.Catalogue, func(m *sample.Meter) bool { return one.Match(m.Name) }) {
			unmatched = append(unmatched, p)
		}
	}
	if len(unmatched) > 0 {
		s.note(line, "source %q asks for what this agent does not have: %s (kvmeter-agent meters --all lists what it has)", s.name, strings.Join(unmatched, ", "))
	}
}

// texts returns a list of texts; the example is one.
func texts(n *yaml.Node, example string) ([]string, error) {
	var list []string
	if n.Kind != yaml.SequenceNode || n.Decode(&list) != nil {
		return nil, fmt.Errorf("must be a list of texts, such as %s", example)
	}
	return list, nil
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
