// Package exporter serves an agent's newest samples to Prometheus, by the names
// and labels of the exporter that is built into Ceilometer's polling agent.
package exporter

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// Exporter keeps the newest sample of each meter and resource. It is safe for
// concurrent use.
type Exporter struct {
	clock func() time.Time
	help  map[string]string // by meter

	mu       sync.Mutex
	families map[string]*family // by meter
	pruned   time.Time
	decoded  metadata // of raw
	raw      []byte
}

// family is a meter's series, by resource.
type family struct {
	kind   sample.Kind
	series map[string]*series
}

// series is the newest sample of a meter and resource.
type series struct {
	volume   sample.Volume
	labels   string
	metadata []byte // of which labels were made
	row      owner
	at       time.Time
	every    time.Duration // between the last two; 0: there was one
}

// owner is what labels are made of beside meter, resource and metadata.
type owner struct{ unit, project, user string }

// How long a sample is shown that no other follows: so many times the time between
// the two before it, or first if there was one only.
const (
	staleAfter = 3
	staleLeast = time.Minute
	staleFirst = 15 * time.Minute // meters that make QEMU work are polled every five minutes
	pruneEvery = time.Minute
)

// New returns an exporter without samples. clock is time.Now where it is nil.
func New(clock func() time.Time) *Exporter {
	if clock == nil {
		clock = time.Now
	}
	e := &Exporter{clock: clock, help: map[string]string{}, families: map[string]*family{}}
	for _, m := range sample.Catalogue {
		e.help[m.Name] = m.Help
	}
	return e
}

// Observe takes the samples of a batch. What it keeps of the batch are its rows'
// metadata, which must not change.
func (e *Exporter) Observe(b *sample.Batch) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.clock()
	for s := range b.Samples() {
		f := e.families[s.Name]
		if f == nil {
			f = &family{series: map[string]*series{}}
			e.families[s.Name] = f
		}
		f.kind = s.Kind
		one := f.series[s.Resource]
		if one == nil {
			one = &series{}
			f.series[s.Resource] = one
		} else {
			one.every = now.Sub(one.at)
		}
		one.volume, one.at = s.Volume, now
		if row := (owner{s.Unit, s.Project, s.User}); one.labels == "" || one.row != row || !same(one.metadata, s.Metadata) {
			one.row, one.metadata = row, s.Metadata
			one.labels = e.labels(&s)
		}
	}
	if now.Sub(e.pruned) >= pruneEvery {
		e.prune(now)
	}
}

// same compares metadata; those of a domain are mostly the same memory.
func same(a, b []byte) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || bytes.Equal(a, b))
}

// prune forgets samples that are stale.
func (e *Exporter) prune(now time.Time) {
	e.pruned = now
	for name, f := range e.families {
		maps.DeleteFunc(f.series, func(_ string, s *series) bool {
			limit := staleFirst
			if s.every > 0 {
				limit = max(staleLeast, staleAfter*s.every)
			}
			return now.Sub(s.at) > limit
		})
		if len(f.series) == 0 {
			delete(e.families, name)
		}
	}
}

// metadata are those that labels are made of.
type metadata struct {
	Host        text `json:"host"`
	DisplayName text `json:"display_name"`
	Name        text `json:"name"`
	User        struct {
		ServerGroup text `json:"server_group"`
	} `json:"user_metadata"`
	Flavor struct {
		ID   text `json:"id"`
		Name text `json:"name"`
	} `json:"flavor"`
}

// text is a JSON text; a value of another kind is none.
type text string

// UnmarshalJSON implements json.Unmarshaler.
func (t *text) UnmarshalJSON(raw []byte) error {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		*t = text(s)
	}
	return nil
}

// labels returns the labels of a sample as they are written, in Ceilometer's order.
func (e *Exporter) labels(s *sample.Sample) string {
	if !same(e.raw, s.Metadata) || e.raw == nil {
		e.raw, e.decoded = s.Metadata, metadata{}
		_ = json.Unmarshal(s.Metadata, &e.decoded) // what can't be read has no label
	}
	dst := []byte{'{'}
	add := func(name, value string) {
		if value != "" {
			if len(dst) > 1 {
				dst = append(dst, ',')
			}
			dst = append(append(dst, name...), `="`...)
			dst = append(appendEscaped(dst, value), '"')
		}
	}
	parts := strings.Split(s.Name, ".")
	plugin, kind := s.Resource, parts[0]
	if len(parts) > 1 {
		kind = parts[1]
	}
	if len(parts) > 2 {
		plugin = parts[2]
	}
	add(identifier(parts[0]), plugin)
	add("publisher", "ceilometer")
	add("type", kind)
	add("counter", s.Name)
	names := sample.Foreign{}
	if s.Foreign != nil {
		names = *s.Foreign
	}
	add("project", s.Project)
	add("project_name", names.ProjectName)
	add("user", s.User)
	add("user_name", names.UserName)
	add("unit", s.Unit)
	add("resource", s.Resource)
	if len(s.Metadata) > 0 {
		m := &e.decoded
		add("vm_instance", string(m.Host))
		name := string(m.DisplayName)
		if name != "" && m.Name != "" {
			name += ":"
		}
		add("resource_name", name+string(m.Name))
		group := string(m.User.ServerGroup)
		if group == "" {
			group = "none"
		}
		add("server_group", group)
		add("flavor_id", string(m.Flavor.ID))
		add("flavor_name", string(m.Flavor.Name))
	}
	return string(append(dst, '}'))
}

// identifier returns a name in the letters that Prometheus takes.
func identifier(name string) string {
	return strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' {
			return c
		}
		return '_'
	}, name)
}

// appendEscaped appends the value of a label.
func appendEscaped(dst []byte, s string) []byte {
	for _, c := range []byte(strings.ToValidUTF8(s, "\ufffd")) {
		switch c {
		case '\\', '"':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, `\n`...)
		default:
			dst = append(dst, c)
		}
	}
	return dst
}

// Append appends the samples in Prometheus' text format, by meter and resource.
func (e *Exporter) Append(dst []byte) []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.prune(e.clock())
	for _, meter := range slices.Sorted(maps.Keys(e.families)) {
		f := e.families[meter]
		name := "ceilometer_" + identifier(meter)
		kind := "gauge"
		if f.kind == sample.Cumulative {
			kind = "counter"
		}
		if help := e.help[meter]; help != "" {
			dst = append(dst, "# HELP "+name+" "+strings.NewReplacer(`\`, `\\`, "\n", `\n`).Replace(help)+"\n"...)
		}
		dst = append(dst, "# TYPE "+name+" "+kind+"\n"...)
		for _, resource := range slices.Sorted(maps.Keys(f.series)) {
			s := f.series[resource]
			dst = append(append(append(dst, name...), s.labels...), ' ')
			dst = append(s.volume.Append(dst), '\n')
		}
	}
	return dst
}

// ServeHTTP implements http.Handler.
func (e *Exporter) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = io.Copy(w, bytes.NewReader(e.Append(nil))) // who went away wants none
}
