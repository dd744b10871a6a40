package api_test

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// secret is in everything of p2's that a request cannot name.
const secret = "SECRET"

// twoTenants is a store of p1's and p2's samples, events and gaps. What can be
// named of p2's begins with p2-.
func twoTenants(t *testing.T) store.Store {
	theirs := gauge("p2-sample", "p2-vm", 1, 424242.5)
	theirs.Name, theirs.Project, theirs.User, theirs.Unit = "p2-meter", "p2", secret, secret
	theirs.Metadata = []byte(`{"name": "` + secret + `"}`)
	shared := theirs
	shared.ID, shared.Name, shared.Resource = sample.ParseID("p2-other"), "load", "p2-disk"
	// Resources that had another owner before, and that have one since.
	before, lost, since := theirs, gauge("lost", "vm-2", 0, 1), theirs
	before.ID, before.Resource, before.Time = sample.ParseID("p2-before"), "vm-1", at-second
	since.ID, since.Resource, since.Source = sample.ParseID("p2-since"), "vm-2", secret
	s := storeOf(t, gauge("mine", "vm-1", 0, 1), theirs, shared, before, lost, since)
	b := sample.NewBuilder()
	b.Gap(sample.Gap{Meter: "*", Resource: "p2-vm", From: at, To: at + 1, Reason: secret})
	gap := b.Build()
	gap.ID, gap.Node = sample.NewBatchID(recordedAt), "compute-"+secret
	if _, err := s.Append(t.Context(), []store.Received{{Batch: gap}}); err != nil {
		t.Fatal(err)
	}
	events := []sample.Event{
		{ID: "p2-event", Type: "p2-type", Generated: at, Traits: []sample.Trait{text("p2-trait", secret), text("project_id", "p2"), text("user_id", "u2")}, Raw: []byte(`{"a": "` + secret + `"}`)},
		{ID: "event", Type: "type", Generated: at, Traits: []sample.Trait{text("project_id", "p1"), text("user_id", "u1")}},
	}
	if _, err := s.AppendEvents(t.Context(), events); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestNobodySeesAnotherProject asks every operation that there is, in many ways,
// as every kind of caller that is no admin. No answer has anything of the other
// project, and what is named of it might as well not be there.
func TestNobodySeesAnotherProject(t *testing.T) {
	callers := map[string]api.Identity{
		"a member":                   {User: "u1", Project: "p1", Roles: []string{"member"}},
		"somebody without a role":    {User: "u1", Project: "p1"},
		"a service":                  {User: "u1", Project: "p1", Roles: []string{"service"}},
		"a member of no project":     {User: "u1", Roles: []string{"member"}},
		"a user that is known there": {User: secret, Project: "p1", Roles: []string{"member"}},
		"a project with a like name": {User: "u2", Project: "p", Roles: []string{"member"}},
		"nobody":                     {},
	}
	h := api.New(twoTenants(t), api.Options{Authenticate: func(r *http.Request) (api.Identity, error) { return callers[r.Header.Get("X-Auth-Token")], nil }})
	// Headers by which an identity may be forged, and arguments that reach far.
	forged := map[string]string{"X-Roles": "admin", "X-Project-Id": "p2", "X-User-Id": "u2"}
	arguments := []string{
		"", "all_projects=true", "metadata=raw&extra=true", "unique=true", "limit=1000", "groupby=project_id&groupby=user_id",
		"aggregate.func=cardinality&aggregate.param=user_id", "start=2000-01-01&end=2100-01-01", "start=2000-01-01&end=2100-01-01&format=csv&split=name",
		"q.field=resource_id&q.value=p2-vm", "marker=p2-sample", "marker=p2-vm", "marker=p2-event", "q.field=metadata.name&q.value=x", "q.field=event_type&q.value=p2-type", "q.field=project_id&q.value=p1",
	}
	bodies := []string{
		"", `{}`, `{"filter": "{\"or\": [{\"=\": {\"resource\": \"p2-vm\"}}, {\"!=\": {\"resource\": \"x\"}}]}"}`, `{"filter": "{\"not\": {\"=\": {\"meter\": \"x\"}}}", "orderby": "[{\"user_id\": \"asc\"}]"}`,
		`[{"counter_name": "p2-meter", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1, "resource_id": "p2-vm", "project_id": "p2"}]`,
	}
	names := []string{"p2-meter", "p2-vm", "p2-sample", "p2-event", "p2-type", "p2-trait", "load"}
	asked := 0
	for path, methods := range api.Operations() {
		for _, method := range methods {
			for _, named := range fill(path, names) {
				for _, args := range arguments {
					for _, body := range bodies {
						if (method == http.MethodGet) != (body == "") {
							continue
						}
						for _, who := range slices.Sorted(maps.Keys(callers)) {
							headers := maps.Clone(forged)
							headers["X-Auth-Token"] = who
							url := named + "?" + args
							w := ask(h, method, url, headers, body)
							asked++
							// A refusal repeats what was asked, and only that.
							if strings.Contains(w.Body.String(), secret) || w.Code < 300 && strings.Contains(w.Body.String(), "p2-") && !strings.Contains(url, "p2-") || strings.Contains(w.Body.String(), "424242") {
								t.Fatalf("%s: %s %s %s\ngot %d %s", who, method, url, body, w.Code, w.Body)
							}
							none := func(s string) string { return strings.ReplaceAll(s, "p2-", "no-") }
							if other := ask(h, method, none(url), headers, none(body)); other.Code != w.Code || none(w.Body.String()) != other.Body.String() {
								t.Fatalf("%s: %s %s %s\ngot  %d %s\nbut of what is not there %d %s", who, method, url, body, w.Code, w.Body, other.Code, other.Body)
							}
						}
					}
				}
			}
		}
	}
	if asked < 1000 {
		t.Errorf("asked only %d times", asked)
	}
	// The same requests do find it for who may see it.
	if w := ask(api.New(twoTenants(t), api.Options{}), http.MethodGet, "/v2/samples?limit=1000", map[string]string{"X-Roles": "admin", "X-Project-Id": "p1"}, ""); !strings.Contains(w.Body.String(), secret) {
		t.Errorf("an admin does not see it either: %s", w.Body)
	}
}

// fill puts each of the names into each {} of a path.
func fill(path string, names []string) []string {
	if !strings.Contains(path, "{}") {
		return []string{path}
	}
	var all []string
	for _, name := range names {
		all = append(all, fill(strings.Replace(path, "{}", name, 1), names)...)
	}
	return all
}
