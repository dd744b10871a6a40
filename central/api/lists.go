package api

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"sort"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// version is the original's document, word for word: that XML is refused is said
// where it is asked for.
func (s *server) version(r *request, out *output) error {
	out.kind = "application/json" // the one answer to which the original adds no charset
	out.buf = append(out.buf, `{"versions": {"values": [{"id": "v2", "status": "stable", "updated": "2013-02-13T00:00:00Z", "links": [{"href": `...)
	out.buf = appendString(out.buf, s.root(r.Request)+"/v2")
	out.buf = append(out.buf, `, "rel": "self"}, {"href": "http://docs.openstack.org/", "rel": "describedby", "type": "text/html"}], `...)
	out.buf = append(out.buf, `"media-types": [{"base": "application/json", "type": "application/vnd.openstack.telemetry-v2+json"}, `...)
	out.buf = append(out.buf, `{"base": "application/xml", "type": "application/vnd.openstack.telemetry-v2+xml"}]}]}}`...)
	return nil
}

func (s *server) healthcheck(_ *request, out *output) error {
	out.kind = "text/plain; charset=UTF-8"
	out.buf = append(out.buf, "OK"...)
	return nil
}

// capabilities says what this API can do, in the original's keys.
func (s *server) capabilities(r *request, out *output) error {
	if _, err := readParams(r.Request); err != nil {
		return err
	}
	out.buf = append(out.buf, `{"api": {"meters:query:simple": true, "meters:query:metadata": true, `+
		`"resources:query:simple": true, "resources:query:metadata": true, `+
		`"samples:query:simple": true, "samples:query:metadata": true, "samples:query:complex": true, `+
		`"statistics:groupby": true, "statistics:query:simple": true, "statistics:query:metadata": true, `+
		`"statistics:aggregation:standard": true, "statistics:aggregation:selectable:max": true, `+
		`"statistics:aggregation:selectable:min": true, "statistics:aggregation:selectable:sum": true, `+
		`"statistics:aggregation:selectable:avg": true, "statistics:aggregation:selectable:count": true, `+
		`"statistics:aggregation:selectable:stddev": true, "statistics:aggregation:selectable:cardinality": true, `+
		`"events:query:simple": true, "alarms:query:simple": false, "alarms:query:complex": false, `+
		`"alarms:history:query:simple": false, "alarms:history:query:complex": false}, `+
		`"storage": {"storage:production_ready": true}, "event_storage": {"storage:production_ready": true}, `+
		`"alarm_storage": {"storage:production_ready": false}}`...)
	return nil
}

// readQuery reads the simple query of a request and limits it to what the
// identity sees.
func readQuery(r *request, p *params, known fields) (*query, error) {
	q, err := parseQuery(p.objects["q"], known)
	if err != nil {
		return nil, err
	}
	return q, r.caller.restrict(q)
}

// readMetadata says how metadata is to be printed.
func readMetadata(p *params) (*metadata, error) {
	value, given, err := p.one("metadata")
	if err != nil {
		return nil, err
	}
	if given && value != "raw" {
		return nil, invalidInput("metadata", value, "It can be raw.")
	}
	return &metadata{raw: given}, nil
}

func (s *server) meters(r *request, out *output) error {
	p, err := readParams(r.Request, "q", "limit", "unique")
	if err != nil {
		return err
	}
	limit, err := s.limit(p)
	if err != nil {
		return err
	}
	unique, err := p.flag("unique")
	if err != nil {
		return err
	}
	q, err := readQuery(r, p, meterFields)
	if err != nil {
		return err
	}
	meters, err := s.store.Meters(r.Context(), q.filter())
	if err != nil {
		return err
	}
	list := listOf(out, limit)
	seen := map[sample.MeterRef]bool{}
	for i := range meters {
		m := &meters[i]
		if unique {
			if seen[m.MeterRef] {
				continue
			}
			seen[m.MeterRef] = true
			m = nil
		}
		more, err := list.add(func(b []byte) []byte { return appendMeter(b, meters[i].MeterRef, m) })
		if err != nil {
			return err
		}
		if !more {
			break
		}
	}
	list.end()
	return nil
}

// list prints a JSON array of at most limit entries.
type list struct {
	out   *output
	limit int
	n     int
}

func listOf(out *output, limit int) *list {
	out.buf = append(out.buf, '[')
	return &list{out: out, limit: limit}
}

// add prints one entry and reports whether there is room for more.
func (l *list) add(entry func([]byte) []byte) (bool, error) {
	if l.n > 0 {
		l.out.buf = append(l.out.buf, ", "...)
	}
	l.n++
	l.out.buf = entry(l.out.buf)
	return l.n < l.limit, l.out.spill()
}

func (l *list) end() { l.out.buf = append(l.out.buf, ']') }

func (s *server) samples(r *request, out *output) error {
	return s.sampleList(r, out, &newNames, func(*query) {})
}

func (s *server) oldSamples(r *request, out *output) error {
	return s.sampleList(r, out, &oldNames, func(q *query) { q.set(store.FieldMeter, r.names[0]) })
}

func (s *server) sampleList(r *request, out *output, n *names, also func(*query)) error {
	p, err := readParams(r.Request, "q", "limit", "marker", "metadata", "extra")
	if err != nil {
		return err
	}
	limit, err := s.limit(p)
	if err != nil {
		return err
	}
	m, err := readMetadata(p)
	if err != nil {
		return err
	}
	extra, err := p.flag("extra")
	if err != nil {
		return err
	}
	q, err := readQuery(r, p, sampleFields)
	if err != nil {
		return err
	}
	also(q)
	page, err := s.afterSample(r, p)
	if err != nil {
		return err
	}
	list := listOf(out, limit)
	err = s.eachSample(r.Context(), page.filter(q.filter()), func(smp *store.Sample) (bool, error) {
		if page.before(smp.ID.String(), smp.Time < page.at) {
			return true, nil
		}
		return list.add(func(b []byte) []byte { return appendSample(b, smp, n, m, extra) })
	})
	if err != nil {
		return err
	}
	list.end()
	return nil
}

// eachSample calls each with the samples that match, newest first, until it
// returns false.
func (s *server) eachSample(ctx context.Context, f store.Filter, each func(*store.Sample) (bool, error)) error {
	var sent error
	err := s.store.Samples(ctx, f, func(smp store.Sample) bool {
		var more bool
		more, sent = each(&smp)
		return more && sent == nil
	})
	return errors.Join(err, sent)
}

func (s *server) sample(r *request, out *output) error {
	p, err := readParams(r.Request, "metadata", "extra")
	if err != nil {
		return err
	}
	m, err := readMetadata(p)
	if err != nil {
		return err
	}
	extra, err := p.flag("extra")
	if err != nil {
		return err
	}
	// First, so that who sees nothing learns nothing.
	project, limited, err := r.caller.scope()
	if err != nil {
		return err
	}
	found, err := s.store.Sample(r.Context(), sample.ParseID(r.names[0]))
	if errors.Is(err, store.ErrNotFound) || err == nil && limited && found.Project != project {
		return notFound("Sample", r.names[0])
	}
	if err != nil {
		return err
	}
	out.buf = appendSample(out.buf, &found, &newNames, m, extra)
	return nil
}

func notFound(what, name string) error {
	return &fault{status: http.StatusNotFound, text: what + " " + name + " Not Found"}
}

func (s *server) resources(r *request, out *output) error {
	p, err := readParams(r.Request, "q", "limit", "marker", "meter_links", "metadata")
	if err != nil {
		return err
	}
	limit, err := s.limit(p)
	if err != nil {
		return err
	}
	links, err := p.integer("meter_links", 1)
	if err != nil {
		return err
	}
	m, err := readMetadata(p)
	if err != nil {
		return err
	}
	q, err := readQuery(r, p, resourceFields)
	if err != nil {
		return err
	}
	resources, err := s.store.Resources(r.Context(), q.filter())
	if err != nil {
		return err
	}
	marker, _, err := p.one("marker")
	if err != nil {
		return err
	}
	if marker != "" {
		resources = resources[sort.Search(len(resources), func(i int) bool { return resources[i].ID > marker }):]
	}
	resources = resources[:min(limit, len(resources))]
	if err := s.veil(r, resources); err != nil {
		return err
	}
	base := s.root(r.Request)
	list := listOf(out, limit)
	for i := range resources {
		if _, err := list.add(func(b []byte) []byte { return appendResource(b, &resources[i], m, base, links != 0) }); err != nil {
			return err
		}
	}
	list.end()
	return nil
}

func (s *server) resource(r *request, out *output) error {
	p, err := readParams(r.Request, "metadata")
	if err != nil {
		return err
	}
	m, err := readMetadata(p)
	if err != nil {
		return err
	}
	q, err := readQuery(r, p, resourceFields)
	if err != nil {
		return err
	}
	q.set(store.FieldResource, r.names[0])
	resources, err := s.store.Resources(r.Context(), q.filter())
	if err != nil {
		return err
	}
	if len(resources) == 0 {
		return notFound("Resource", r.names[0])
	}
	if err := s.veil(r, resources); err != nil {
		return err
	}
	out.buf = appendResource(out.buf, &resources[0], m, s.root(r.Request), true)
	return nil
}

// veil takes from resources what other projects have made of them: what the
// newest sample says where that is not the caller's, and the names of meters of
// which the newest sample is not.
func (s *server) veil(r *request, resources []store.Resource) error {
	project, limited, err := r.caller.scope()
	if err != nil || !limited || len(resources) == 0 {
		return err
	}
	ids := make([]any, len(resources))
	for i := range resources {
		ids[i] = resources[i].ID
	}
	own, err := s.store.Meters(r.Context(), store.And(store.Where(store.FieldProject, store.Eq, project), store.Where(store.FieldResource, store.In, ids)))
	if err != nil {
		return err
	}
	names := map[string][]string{}
	for i := range own { // sorted by name
		names[own[i].Resource] = append(names[own[i].Resource], own[i].Name)
	}
	for i := range resources {
		res := &resources[i]
		res.Meters = slices.Compact(names[res.ID])
		if res.Project != project {
			res.Project, res.User, res.Source, res.Metadata = project, "", "", nil
		}
	}
	return nil
}

func appendResource(dst []byte, r *store.Resource, m *metadata, root string, meterLinks bool) []byte {
	dst = append(dst, '{')
	dst = appendString(field(dst, "resource_id"), r.ID)
	dst = appendKnown(field(dst, "project_id"), r.Project)
	dst = appendKnown(field(dst, "user_id"), r.User)
	dst = appendKnown(field(dst, "source"), r.Source)
	dst = appendQuotedTime(field(dst, "first_sample_timestamp"), r.First)
	dst = appendQuotedTime(field(dst, "last_sample_timestamp"), r.Last)
	dst = m.append(field(dst, "metadata"), r.Metadata)
	dst = append(field(dst, "links"), '[')
	dst = appendLink(dst, root+"/v2/resources/"+url.PathEscape(r.ID), "self")
	if meterLinks {
		for _, meter := range r.Meters {
			dst = append(dst, ", "...)
			dst = appendLink(dst, root+"/v2/meters/"+url.PathEscape(meter)+"?q.field=resource_id&q.value="+url.QueryEscape(r.ID), meter)
		}
	}
	return append(dst, "]}"...)
}

func appendLink(dst []byte, href, rel string) []byte {
	dst = appendString(append(dst, `{"href": `...), href)
	dst = appendString(append(dst, `, "rel": `...), rel)
	return append(dst, '}')
}

// gaps lists what is known to be missing, newest first. It names nodes and
// their troubles, so it is for those who see every project.
func (s *server) gaps(r *request, out *output) error {
	p, err := readParams(r.Request, "start", "end", "limit")
	if err != nil {
		return err
	}
	limit, err := s.limit(p)
	if err != nil {
		return err
	}
	from, err := p.time("start", minTime)
	if err != nil {
		return err
	}
	to, err := p.time("end", maxTime)
	if err != nil {
		return err
	}
	gaps, err := s.store.Gaps(r.Context(), from, to)
	if err != nil {
		return err
	}
	list := listOf(out, limit)
	for i := len(gaps) - 1; i >= 0; i-- {
		more, err := list.add(func(b []byte) []byte { return appendGap(b, &gaps[i]) })
		if err != nil {
			return err
		}
		if !more {
			break
		}
	}
	list.end()
	return nil
}

// The years 1 and 9999, in µs since the Unix epoch.
const (
	minTime = -62135596800 * 1e6
	maxTime = 253402300799 * 1e6
)

// time returns a parameter that is a time, in µs since the Unix epoch.
func (p *params) time(name string, otherwise int64) (int64, error) {
	value, given, err := p.one(name)
	if err != nil || !given {
		return otherwise, err
	}
	at, err := parseTime(value)
	if err != nil {
		return 0, invalidInput(name, value, "invalid timestamp format")
	}
	return at, nil
}

func appendGap(dst []byte, g *sample.Gap) []byte {
	dst = append(dst, '{')
	dst = appendString(field(dst, "meter"), g.Meter)
	dst = appendString(field(dst, "resource_id"), g.Resource)
	dst = appendString(field(dst, "node"), g.Node)
	dst = appendQuotedTime(field(dst, "from"), g.From)
	dst = appendQuotedTime(field(dst, "to"), g.To)
	dst = appendString(field(dst, "reason"), g.Reason)
	return append(dst, '}')
}
