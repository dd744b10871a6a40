// Package gnocchi sends samples as measures to Gnocchi, and keeps its resources
// up to date from samples and events, by a gnocchi_resources.yaml.
//
//	gnocchi://[user[:password]@host[:port]/path]?resources_definition_file=F&archive_policy=NAME&enable_filter_project=true&filter_project=service&filter_domain=Default&ssl=false&timeout=6.05
//
// With a host, Gnocchi is there and takes the user by basic authentication.
// Without one the identity service says where it is and who we are, by the
// variables OS_AUTH_URL, OS_USERNAME, OS_PASSWORD and so on of the environment.
package gnocchi

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// How long attributes that were written are remembered, and of how many
// resources.
const (
	memory     = 10 * time.Minute
	maxWritten = 100_000
)

type gnocchi struct {
	log       *zap.Logger
	resources *Resources
	policy    string // of the URL
	filter    string // name of the project whose samples are left out; empty: none
	domain    string // of that project
	keystone  *publisher.Keystone

	mu       sync.Mutex
	web      *publisher.Web // nil until the identity service said where Gnocchi is
	open     func(endpoint string) (*publisher.Web, error)
	ready    bool // the archive policies are there, and project is known
	project  string
	written  map[string]wrote // by resource type and id
	unknown  map[string]bool  // metrics that were warned of
	messages value.Parser
}

// wrote is what was written of a resource, and when.
type wrote struct {
	attributes string
	at         time.Time
}

// Check says what is wrong with a URL, whatever the environment holds.
func Check(u *url.URL, d publisher.Deps) error {
	_, err := parse(u, d)
	return err
}

// New returns the publisher of a URL. It connects when it has something to send.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	g, err := parse(u, d)
	if err != nil {
		return nil, err
	}
	if g.web != nil {
		return g, nil
	}
	if g.keystone, err = publisher.NewKeystone("metric"); err != nil {
		return nil, fmt.Errorf("%w, or a host, as in gnocchi://admin@host:8041", err)
	}
	return g, nil
}

// parse returns the publisher of a URL, without what only the environment says.
func parse(u *url.URL, d publisher.Deps) (*gnocchi, error) {
	o := publisher.NewOptions(u)
	g := &gnocchi{
		log: d.Log, policy: o.Text("archive_policy", ""), filter: o.Text("filter_project", "service"), domain: o.Text("filter_domain", "Default"),
		written: map[string]wrote{}, unknown: map[string]bool{},
	}
	if !o.Bool("enable_filter_project", true) {
		g.filter = ""
	}
	file := o.Text("resources_definition_file", usual)
	scheme := "http"
	if o.Bool("ssl", false) {
		scheme = "https"
	}
	data, err := definitions(file)
	if err != nil {
		return nil, fmt.Errorf("option resources_definition_file: %w", err)
	}
	var findings []definition.Finding
	if g.resources, findings, err = Load(file, data); err != nil {
		return nil, err
	}
	for i := range findings {
		d.Log.Warn("odd in the resources of gnocchi://", zap.String("finding", findings[i].String()))
	}
	if u.Host != "" {
		g.web, err = publisher.NewWeb(u, scheme, o)
		if err != nil {
			return nil, err
		}
		return g, o.Done(d.Log)
	}
	if _, err := publisher.NewWeb(&url.URL{Host: "known-later"}, scheme, o); err != nil { // the options are right
		return nil, err
	}
	g.open = func(endpoint string) (*publisher.Web, error) {
		to, err := url.Parse(endpoint)
		if err != nil {
			return nil, err
		}
		return publisher.NewWeb(to, to.Scheme, publisher.NewOptions(u))
	}
	return g, nil
}

// usual is the file of resources unless another is named.
const usual = "gnocchi_resources.yaml"

//go:embed shipped.yaml
var shipped []byte

// definitions returns what a file of resources holds. One that is named without a
// folder is in /etc/kvmeter or /etc/ceilometer; if it is in neither, and has the
// usual name, that is what kvmeter brings.
func definitions(file string) ([]byte, error) {
	if filepath.Base(file) != file {
		return os.ReadFile(file)
	}
	var err error
	for _, dir := range []string{"/etc/kvmeter", "/etc/ceilometer"} {
		var data []byte
		if data, err = os.ReadFile(filepath.Join(dir, file)); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return data, err
		}
	}
	if file == usual {
		return shipped, nil
	}
	return nil, err
}

// do sends a request with JSON and reads the answer into answer, unless that is
// nil.
func (g *gnocchi) do(ctx context.Context, method, path string, body, answer any) error {
	return g.send(ctx, method, path, "application/json", body, answer)
}

// send is do with a content type.
func (g *gnocchi) send(ctx context.Context, method, path, contentType string, body, answer any) error {
	var text []byte
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	header := http.Header{"Content-Type": {contentType}, "Accept": {"application/json"}}
	if g.keystone != nil {
		token, endpoint, err := g.keystone.Get(ctx)
		if err != nil {
			return err
		}
		header.Set("X-Auth-Token", token)
		if g.web == nil {
			if g.web, err = g.open(endpoint); err != nil {
				return err
			}
		}
	}
	reply, err := g.web.Do(ctx, method, path, header, text)
	if g.keystone != nil && isStatus(err, http.StatusUnauthorized) {
		g.keystone.Forget()
	}
	if answer != nil && len(reply) > 0 && (err == nil || isStatus(err, http.StatusBadRequest)) {
		if bad := json.Unmarshal(reply, answer); bad != nil && err == nil {
			return bad
		}
	}
	return err
}

func isStatus(err error, status int) bool {
	var s *publisher.StatusError
	return errors.As(err, &s) && s.Status == status
}

// prepare makes archive policies and resource types, and finds the project that is
// left out.
func (g *gnocchi) prepare(ctx context.Context) error {
	if g.ready {
		return nil
	}
	for _, p := range g.resources.policies {
		if err := g.do(ctx, http.MethodPost, "/v1/archive_policy", p, nil); err != nil && !isStatus(err, http.StatusConflict) {
			return fmt.Errorf("make an archive policy: %w", err)
		}
	}
	if err := g.makeTypes(ctx); err != nil {
		return err
	}
	g.project = g.filter
	if g.filter != "" && g.keystone != nil {
		id, err := g.keystone.ProjectID(ctx, g.filter, g.domain)
		if err != nil {
			return fmt.Errorf("find project %s: %w", g.filter, err)
		}
		if id == "" {
			g.log.Warn("the project whose samples gnocchi:// leaves out is not there", zap.String("project", g.filter))
		}
		g.project = id
	}
	g.ready = true
	return nil
}

// Publish sends the measures of each part in one request.
func (g *gnocchi) Publish(ctx context.Context, parts []publisher.Part) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.prepare(ctx); err != nil {
		return err
	}
	for i := range parts {
		if err := g.measures(ctx, slices.Collect(parts[i].Batch.Samples())); err != nil {
			return publisher.Refuse(i, err)
		}
	}
	return nil
}

// resource is what a batch says of one.
type resource struct {
	of         *resourceType
	user       string
	attributes map[string]any
	metrics    map[string]*metric
}

type metric struct {
	Measures []measure `json:"measures"`
	Policy   string    `json:"archive_policy_name"`
	Unit     string    `json:"unit,omitempty"`
}

type measure struct {
	Timestamp string          `json:"timestamp"`
	Value     json.RawMessage `json:"value"`
}

func (g *gnocchi) measures(ctx context.Context, samples []sample.Sample) error {
	resources := map[string]*resource{}
	w := wire.NewWriter(wire.JSON)
	for i := range samples {
		s := &samples[i]
		t := g.resources.metrics[s.Name]
		switch {
		case t == nil:
			if len(g.unknown) < maxWritten && !g.unknown[s.Name] {
				g.unknown[s.Name] = true
				g.log.Warn("no resource type has this metric; gnocchi:// leaves it out", zap.String("metric", s.Name))
			}
			continue
		case g.project != "" && (s.Project == g.project || t.name == "swift_account" && s.Resource == g.project):
			continue
		}
		g.add(resources, t, s, w)
	}
	if len(resources) == 0 {
		return nil
	}
	if err := g.batch(ctx, resources); err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(resources)) {
		if r := resources[id]; len(r.attributes) > 0 {
			if err := g.write(ctx, r.of.name, id, r.attributes); err != nil {
				return err
			}
		}
	}
	return nil
}

// add adds a sample to what its resource has.
func (g *gnocchi) add(resources map[string]*resource, t *resourceType, s *sample.Sample, w *wire.Writer) {
	id := strings.ReplaceAll(s.Resource, "/", "_")
	r := resources[id]
	if r == nil {
		r = &resource{of: t, user: s.User, attributes: map[string]any{}, metrics: map[string]*metric{}}
		resources[id] = r
	}
	if r.of == t {
		maps.Copy(r.attributes, g.attributes(t, s, w)) // of each the last that a sample has
	}
	m := r.metrics[s.Name]
	if m == nil {
		m = &metric{Policy: g.resources.policyOf(t, s.Name, g.policy), Unit: s.Unit}
		r.metrics[s.Name] = m
	}
	m.Measures = append(m.Measures, measure{ceilometer.Timestamp(s), json.RawMessage(s.Volume.Append(nil))})
}

// attributes returns what a sample says of its resource.
func (g *gnocchi) attributes(t *resourceType, s *sample.Sample, w *wire.Writer) map[string]any {
	all := map[string]any{}
	if s.Project != "" {
		all["project_id"] = s.Project
	}
	if len(t.attributes) == 0 {
		return all
	}
	g.messages.Reset()
	message, err := g.messages.Parse(string(w.Sample(nil, s)))
	if err != nil {
		return all
	}
	for _, a := range t.attributes {
		if v, err := a.field.First(&message, nil); err == nil && v != nil {
			all[a.name] = json.RawMessage(v.AppendJSON(nil))
		}
	}
	return all
}

// batch sends measures, makes the resources that Gnocchi does not know, and
// sends again.
func (g *gnocchi) batch(ctx context.Context, resources map[string]*resource) error {
	const path = "/v1/batch/resources/metrics/measures?create_metrics=true"
	body := map[string]map[string]*metric{}
	for id, r := range resources {
		body[id] = r.metrics
	}
	var refusal struct {
		Description struct {
			Cause  string `json:"cause"`
			Detail []struct {
				Original string `json:"original_resource_id"`
			} `json:"detail"`
		} `json:"description"`
	}
	err := g.do(ctx, http.MethodPost, path, body, &refusal)
	if !isStatus(err, http.StatusBadRequest) || refusal.Description.Cause != "Unknown resources" {
		return err
	}
	for _, missing := range refusal.Description.Detail {
		id := missing.Original
		r := resources[id]
		if r == nil {
			return err // of something that was not asked
		}
		create := maps.Clone(r.attributes)
		create["id"] = id
		if r.user != "" {
			create["user_id"] = r.user
		}
		err := g.do(ctx, http.MethodPost, "/v1/resource/"+r.of.name, create, nil)
		var status *publisher.StatusError
		switch {
		case err == nil:
			g.remember(r.of.name, id, r.attributes)
		case isStatus(err, http.StatusConflict):
		case errors.As(err, &status) && status.Permanent():
			g.log.Warn("gnocchi:// cannot make a resource; its measures are left out", zap.String("type", r.of.name), zap.String("id", id), zap.Error(err))
			delete(body, id)
			delete(resources, id)
		default:
			return err
		}
	}
	if len(body) == 0 {
		return nil
	}
	return g.do(ctx, http.MethodPost, path, body, nil)
}

func resourceURL(kind, id string) string { return "/v1/resource/" + kind + "/" + url.PathEscape(id) }

// write writes attributes of a resource unless that was done lately.
func (g *gnocchi) write(ctx context.Context, kind, id string, attributes map[string]any) error {
	text, err := json.Marshal(attributes)
	if err != nil {
		return err
	}
	if w, ok := g.written[kind+" "+id]; ok && w.attributes == string(text) && time.Since(w.at) < memory {
		return nil
	}
	err = g.do(ctx, http.MethodPatch, resourceURL(kind, id), attributes, nil)
	var status *publisher.StatusError
	if errors.As(err, &status) && (status.Permanent() || status.Status == http.StatusNotFound) {
		g.log.Warn("gnocchi:// cannot update a resource", zap.String("type", kind), zap.String("id", id), zap.Error(err))
		err = nil // the measures are there
	}
	if err == nil {
		g.remember(kind, id, attributes)
	}
	return err
}

func (g *gnocchi) remember(kind, id string, attributes map[string]any) {
	text, err := json.Marshal(attributes)
	if err != nil {
		return
	}
	if len(g.written) >= maxWritten {
		clear(g.written)
	}
	g.written[kind+" "+id] = wrote{string(text), time.Now()}
}

// PublishEvents makes, updates and ends the resources that events are about.
func (g *gnocchi) PublishEvents(ctx context.Context, events []sample.Event) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.prepare(ctx); err != nil {
		return err
	}
	for i := range events {
		for _, t := range g.resources.types {
			err := g.event(ctx, t, &events[i])
			var status *publisher.StatusError
			if errors.As(err, &status) && (status.Permanent() || status.Status == http.StatusNotFound) {
				g.log.Info("gnocchi:// can do nothing with an event", zap.String("type", t.name), zap.String("event", events[i].Type), zap.Error(err))
				continue
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *gnocchi) event(ctx context.Context, t *resourceType, e *sample.Event) error {
	match := func(m *sample.Matcher) bool { return m != nil && m.Match(e.Type) }
	create, remove, update := match(t.create), match(t.remove), match(t.update)
	if !create && !remove && !update {
		return nil
	}
	all := map[string]any{}
	for _, tr := range t.traits {
		for i := range e.Traits {
			if e.Traits[i].Name == tr.trait {
				all[tr.attribute] = json.RawMessage(e.Traits[i].AppendValue(nil))
			}
		}
	}
	var id string
	if raw, ok := all["id"].(json.RawMessage); !ok || json.Unmarshal(raw, &id) != nil || id == "" {
		g.log.Warn("an event has no id for gnocchi://", zap.String("type", t.name), zap.String("event", e.Type))
		return nil
	}
	id = strings.ReplaceAll(id, "/", "_")
	switch {
	case create:
		all["id"] = id
		err := g.do(ctx, http.MethodPost, "/v1/resource/"+t.name, all, nil)
		if isStatus(err, http.StatusConflict) {
			err = nil
		}
		return err
	case remove:
		return g.end(ctx, t, id, string(sample.AppendTime(nil, e.Generated))+"+00:00")
	}
	delete(all, "id")
	if len(all) == 0 {
		return nil
	}
	return g.do(ctx, http.MethodPatch, resourceURL(t.name, id), all, nil)
}

// end ends a resource and those that end with it.
func (g *gnocchi) end(ctx context.Context, t *resourceType, id, at string) error {
	ended := map[string]any{"ended_at": at}
	quoted, err := json.Marshal(id)
	if err != nil {
		return err
	}
	for _, a := range t.associated {
		query := json.RawMessage(strings.Replace(a.query, "%s", string(quoted[1:len(quoted)-1]), 1))
		var found []struct {
			ID string `json:"id"`
		}
		if err := g.do(ctx, http.MethodPost, "/v1/search/resource/"+a.name, query, &found); err != nil {
			return err
		}
		for _, f := range found {
			if err := g.do(ctx, http.MethodPatch, resourceURL(a.name, f.ID), ended, nil); err != nil && !isStatus(err, http.StatusNotFound) {
				return err
			}
		}
	}
	return g.do(ctx, http.MethodPatch, resourceURL(t.name, id), ended, nil)
}

// Close closes the connections.
func (g *gnocchi) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.web != nil {
		g.web.Close()
	}
	return nil
}
