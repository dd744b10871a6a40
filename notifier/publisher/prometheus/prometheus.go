// Package prometheus pushes samples to a Prometheus push gateway, in its text
// format, a group of metrics for each resource.
//
//	prometheus://gateway[:port]/metrics/job/JOB[/label/value…]?ssl=false&<the options of http://>
//
// With labels of its own in the path all samples go to that one group. The
// gateway keeps the newest of each metric, so nothing is gained by sending late ones.
package prometheus

import (
	"context"
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

type gateway struct {
	web     *publisher.Web
	grouped bool // by the path
}

var header = http.Header{"Content-Type": {"text/plain; version=0.0.4"}}

// New returns the publisher of a URL.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	o := publisher.NewOptions(u)
	scheme := "http"
	if o.Bool("ssl", false) {
		scheme = "https"
	}
	web, err := publisher.NewWeb(u, scheme, o)
	if err != nil {
		return nil, err
	}
	// /metrics/job/JOB and no more.
	_, labels, _ := strings.Cut(strings.TrimPrefix(u.Path, "/metrics/job/"), "/")
	return &gateway{web, labels != ""}, o.Done(d.Log)
}

// Publish pushes the samples of all parts.
func (g *gateway) Publish(ctx context.Context, parts []publisher.Part) error {
	for i := range parts {
		samples := slices.Collect(parts[i].Batch.Samples())
		if err := g.push(ctx, samples); err != nil {
			return publisher.Refuse(i, err)
		}
	}
	return nil
}

func (g *gateway) push(ctx context.Context, samples []sample.Sample) error {
	if len(samples) == 0 {
		return nil
	}
	if g.grouped {
		_, err := g.web.Post(ctx, "", header, text(samples))
		return err
	}
	var resources []string
	groups := map[string][]sample.Sample{}
	for i := range samples {
		r := samples[i].Resource
		if groups[r] == nil {
			resources = append(resources, r)
		}
		groups[r] = append(groups[r], samples[i])
	}
	for _, r := range resources {
		if _, err := g.web.Post(ctx, "/"+grouping("resource_id", r), header, text(groups[r])); err != nil {
			return err
		}
	}
	return nil
}

// grouping returns a label of the group as a part of the path. The gateway
// cannot tell an escaped slash from one that separates, and refuses an empty part.
func grouping(label, value string) string {
	if value == "" || strings.Contains(value, "/") {
		if value == "" {
			return label + "@base64/="
		}
		return label + "@base64/" + base64.RawURLEncoding.EncodeToString([]byte(value))
	}
	return label + "/" + url.PathEscape(value)
}

// text returns samples in the text format. A family's samples must stand
// together, and the gateway takes no two of the same labels: of those the newest
// counts.
func text(samples []sample.Sample) []byte {
	type line struct {
		labels string
		s      *sample.Sample
	}
	type family struct {
		kind  sample.Kind
		lines []line
	}
	var names []string
	families := map[string]*family{}
	for i := range samples {
		s := &samples[i]
		name := publisher.MetricName(s.Name)
		f := families[name]
		if f == nil {
			f = &family{kind: s.Kind}
			families[name] = f
			names = append(names, name)
		}
		l := line{labels(s), s}
		if k := slices.IndexFunc(f.lines, func(o line) bool { return o.labels == l.labels }); k >= 0 {
			if s.Time >= f.lines[k].s.Time {
				f.lines[k] = l
			}
			continue
		}
		f.lines = append(f.lines, l)
	}
	var b []byte
	for _, name := range names {
		f := families[name]
		switch f.kind {
		case sample.Cumulative:
			b = append(append(append(b, "# TYPE "...), name...), " counter\n"...)
		case sample.Gauge:
			b = append(append(append(b, "# TYPE "...), name...), " gauge\n"...)
		}
		for _, l := range f.lines {
			b = append(append(append(b, name...), l.labels...), ' ')
			b = append(l.s.Volume.Append(b), '\n')
		}
	}
	return b
}

var escaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func labels(s *sample.Sample) string {
	none := func(v string) string {
		if v == "" {
			return "None"
		}
		return escaper.Replace(v)
	}
	return `{resource_id="` + escaper.Replace(s.Resource) + `", user_id="` + none(s.User) + `", project_id="` + none(s.Project) + `"}`
}

// Close closes the connections.
func (g *gateway) Close() error {
	g.web.Close()
	return nil
}
