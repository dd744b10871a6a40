package gnocchi

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

func TestLoad(t *testing.T) {
	data, err := os.ReadFile("testdata/gnocchi_resources.yaml")
	if err != nil {
		t.Fatal(err)
	}
	r, findings, err := Load("g.yaml", data)
	if err != nil || len(findings) > 0 || len(r.types) != 3 || len(r.policies) != 2 {
		t.Fatalf("got %+v, %v, %v", r, findings, err)
	}
	for metric, want := range map[string]string{"cpu": "instance ceilometer-low-rate", "memory": "instance ceilometer-low", "disk.device.read.bytes": "instance_disk ceilometer-low"} {
		of := r.metrics[metric]
		if got := of.name + " " + r.policyOf(of, metric, ""); got != want {
			t.Errorf("%s: got %s, want %s", metric, got, want)
		}
		if got := r.policyOf(of, metric, "url"); got != "url" {
			t.Errorf("%s: policy %s goes before that of the URL", metric, got)
		}
	}
}

func TestLoadSaysWhatIsWrong(t *testing.T) {
	_, findings, err := Load("g.yaml", []byte(`
archive_policies: 5
owner: me
resources:
- metrics: [a]
- resource_type: no_metrics
- {resource_type: events, metrics: {}, event_delete: x.delete}
- {resource_type: query, metrics: {}, event_delete: x, event_attributes: {id: i}, event_associated_resources: {y: "{"}}
- {resource_type: path, metrics: {}, attributes: {a: "b["}}
- {resource_type: old, metrics: {a: 5}, archive_policy: low, extra: 1}
- text
`))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i := range findings {
		got = append(got, findings[i].String())
	}
	for _, want := range []string{
		"g.yaml:2: archive_policies is no list of mappings",
		`g.yaml:3: unknown key "owner"; it is ignored`,
		"g.yaml:5: a resource without resource_type",
		"g.yaml:6: resource no_metrics has no metrics; an empty mapping is right where it has none",
		"g.yaml:7: resource events has events, so its event_attributes must say which trait is the id",
		`g.yaml:8: the query of y is no JSON with one %s for the id`,
		"g.yaml:9: ",
		"g.yaml:10: metric a is neither empty nor {archive_policy_name: …}",
		"g.yaml:10: archive_policy of a resource is deprecated; name archive_policy_name at the metrics",
		`g.yaml:10: unknown key "extra"; it is ignored`,
		"g.yaml:11: a resource is no mapping",
	} {
		if !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("missing %s in\n%s", want, strings.Join(got, "\n"))
		}
	}
	for file, want := range map[string]string{"- a": "it is no mapping", "a: [": "g.yaml:1:"} {
		if _, _, err := Load("g.yaml", []byte(file)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v", file, err)
		}
	}
}

// TestKeystoneSaysWhereGnocchiIs has an identity service and a Gnocchi that
// knows every resource, and takes back the first token.
func TestKeystoneSaysWhereGnocchiIs(t *testing.T) {
	var log []string
	tokens := 0
	mux := http.NewServeMux()
	s := httptest.NewServer(mux)
	defer s.Close()
	mux.HandleFunc("/v3/", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		log = append(log, r.Method+" "+r.RequestURI)
		switch r.URL.Path {
		case "/v3/auth/tokens":
			if want := `{"auth":{"identity":{"methods":["password"],"password":{"user":{"domain":{"name":"Default"},"name":"kvmeter","password":"secret"}}},"scope":{"project":{"domain":{"name":"Default"},"name":"service"}}}}`; string(body) != want {
				t.Errorf("got %s", body)
			}
			tokens++
			w.Header().Set("X-Subject-Token", "token"+strings.Repeat("+", tokens))
			w.WriteHeader(http.StatusCreated)
			_ = json.NewEncoder(w).Encode(map[string]any{"token": map[string]any{"expires_at": time.Now().Add(time.Hour), "catalog": []any{
				map[string]any{"type": "metric", "endpoints": []any{
					map[string]any{"interface": "admin", "region": "one", "url": "http://wrong"},
					map[string]any{"interface": "public", "region": "one", "url": s.URL + "/metric"},
				}},
			}}})
		case "/v3/domains":
			_, _ = io.WriteString(w, `{"domains": [{"id": "default"}]}`)
		case "/v3/projects":
			_, _ = io.WriteString(w, `{"projects": [{"id": "id-of-service"}]}`)
		}
	})
	mux.HandleFunc("/metric/", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		token := r.Header.Get("X-Auth-Token")
		log = append(log, r.Method+" "+r.RequestURI+" "+token+" "+string(body))
		if token == "token+" && strings.Contains(r.URL.Path, "batch") {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if strings.Contains(r.URL.Path, "archive_policy") {
			w.WriteHeader(http.StatusConflict)
		}
	})
	for name, v := range map[string]string{"OS_AUTH_URL": s.URL, "OS_USERNAME": "kvmeter", "OS_PASSWORD": "secret", "OS_REGION_NAME": "one"} {
		t.Setenv(name, v)
	}
	u, err := url.Parse("gnocchi://?resources_definition_file=" + filepath.Join("testdata", "gnocchi_resources.yaml") + "&archive_policy=high")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r", Project: "id-of-service"})
	b.Add(sample.MeterRef{Name: "memory"}, sample.Walk, sample.Uint(1))
	b.Row(sample.Row{Resource: "q"})
	b.Add(sample.MeterRef{Name: "memory"}, sample.Walk, sample.Uint(2))
	parts := []publisher.Part{{Batch: b.Build()}}
	if err := p.Publish(t.Context(), parts); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("got %v from a token that was taken back", err)
	}
	log = nil
	if err := p.Publish(t.Context(), parts); err != nil {
		t.Error(err)
	}
	want := []string{
		"POST /v3/auth/tokens",
		`POST /metric/v1/batch/resources/metrics/measures?create_metrics=true token++ {"q":{"memory":{"measures":[{"timestamp":"1970-01-01T00:00:00","value":2}],"archive_policy_name":"high"}}}`,
	}
	if diff := cmp.Diff(want, log); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// TestAResourceHasWhatAnySampleSaysOfIt sends two samples of a resource of which
// the last says less.
func TestAResourceHasWhatAnySampleSaysOfIt(t *testing.T) {
	resources, _, err := Load("g.yaml", []byte(`
resources:
- resource_type: instance
  metrics: {cpu: , memory: }
  attributes: {host: resource_metadata.host, display_name: resource_metadata.display_name}
`))
	if err != nil {
		t.Fatal(err)
	}
	g := &gnocchi{resources: resources}
	all := map[string]*resource{}
	for i, metadata := range []string{`{"host": "h", "display_name": "n"}`, `{"host": "i"}`} {
		s := sample.Sample{Name: []string{"cpu", "memory"}[i], Resource: "r", User: []string{"u", "v"}[i], Metadata: []byte(metadata)}
		g.add(all, resources.metrics[s.Name], &s, wire.NewWriter(wire.JSON))
	}
	text, err := json.Marshal(all["r"].attributes)
	if want := `{"display_name":"n","host":"i"}`; err != nil || string(text) != want || all["r"].user != "u" {
		t.Errorf("got %s of user %s, %v; want %s of user u", text, all["r"].user, err, want)
	}
}

func TestNewSaysWhatIsMissing(t *testing.T) {
	t.Setenv("OS_AUTH_URL", "")
	for text, want := range map[string]string{
		"gnocchi://?resources_definition_file=/none":                                     "option resources_definition_file: open /none",
		"gnocchi://?resources_definition_file=testdata/gnocchi_resources.yaml":           "it needs OS_AUTH_URL",
		"gnocchi://h?resources_definition_file=testdata/gnocchi_resources.yaml&ssl=x":    "option ssl",
		"gnocchi://?resources_definition_file=testdata/gnocchi_resources.yaml&timeout=x": "option timeout",
	} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(u, publisher.Deps{Log: zap.NewNop()}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", text, err, want)
		}
	}
}
