package api_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// described is the part of an OpenAPI document that the test reads.
type described struct {
	OpenAPI string
	Paths   map[string]map[string]struct {
		OperationID string `json:"operationId"`
		Parameters  []struct {
			Name, In string
			Schema   map[string]any
		}
		RequestBody struct {
			Content map[string]struct{ Schema any }
		}
		Responses map[string]struct {
			Content map[string]struct{ Schema any }
		}
	}
	Components struct{ Schemas map[string]any }
}

// valid returns where a JSON value is not as a schema has it, or nothing. It
// knows the keywords that the document uses and refuses others.
func (d *described) valid(at string, schema any, v any) string {
	s, ok := schema.(map[string]any)
	if !ok {
		return at + ": the schema is no object"
	}
	if ref, ok := s["$ref"].(string); ok {
		return d.valid(at, d.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")], v)
	}
	for key, rule := range s {
		switch key {
		case "description", "required", "properties", "additionalProperties":
		case "type":
			types, ok := rule.([]any)
			if !ok {
				types = []any{rule}
			}
			if !slices.ContainsFunc(types, func(t any) bool { return isOf(t.(string), v) }) {
				return fmt.Sprintf("%s: %v is no %v", at, v, rule)
			}
		case "enum":
			if !slices.Contains(rule.([]any), v) {
				return fmt.Sprintf("%s: %v is none of %v", at, v, rule)
			}
		case "items":
			list, _ := v.([]any)
			for i, e := range list {
				if bad := d.valid(fmt.Sprintf("%s[%d]", at, i), rule, e); bad != "" {
					return bad
				}
			}
		default:
			return at + ": the test does not know the keyword " + key
		}
	}
	object, ok := v.(map[string]any)
	if !ok {
		return ""
	}
	properties, _ := s["properties"].(map[string]any)
	required, _ := s["required"].([]any)
	for _, name := range required {
		if _, ok := object[name.(string)]; !ok {
			return fmt.Sprintf("%s: %v is missing", at, name)
		}
	}
	for name, value := range object {
		rule, known := properties[name]
		if !known {
			switch more := s["additionalProperties"].(type) {
			case bool:
				if !more {
					return at + ": " + name + " is not described"
				}
				continue
			case nil:
				continue
			default:
				rule = more
			}
		}
		if bad := d.valid(at+"."+name, rule, value); bad != "" {
			return bad
		}
	}
	return ""
}

func isOf(kind string, v any) bool {
	switch v := v.(type) {
	case nil:
		return kind == "null"
	case string:
		return kind == "string"
	case bool:
		return kind == "boolean"
	case float64:
		return kind == "number" || kind == "integer" && v == float64(int64(v))
	case []any:
		return kind == "array"
	}
	return kind == "object"
}

// describedRequests are requests whose answers show what the document describes.
var describedRequests = []struct{ method, path, template, body string }{
	{"GET", "/", "/", ""},
	{"GET", "/healthcheck", "/healthcheck", ""},
	{"GET", "/v2/openapi.json", "/v2/openapi.json", ""},
	{"GET", "/v2/capabilities", "/v2/capabilities", ""},
	{"GET", "/v2/meters?unique=1", "/v2/meters", ""},
	{"GET", "/v2/meters?q.field=user&q.op=&q.value=u1&q.type=&limit=5", "/v2/meters", ""},
	{"GET", "/v2/meters/load?metadata=raw", "/v2/meters/{name}", ""},
	{"POST", "/v2/meters/apples?direct=1", "/v2/meters/{name}", `[{"counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": "1", "resource_id": "r", "resource_metadata": {"a": "b", "c": null}}]`},
	{"GET", "/v2/meters/load/statistics", "/v2/meters/{name}/statistics", ""},
	{"GET", "/v2/meters/load/statistics?period=60&groupby=user_id&groupby=metadata.name&aggregate.func=avg&aggregate.func=cardinality&aggregate.param=&aggregate.param=resource_id", "/v2/meters/{name}/statistics", ""},
	{"GET", "/v2/samples?extra=true", "/v2/samples", ""},
	{"GET", "/v2/samples/a", "/v2/samples/{id}", ""},
	{"GET", "/v2/resources?meter_links=1", "/v2/resources", ""},
	{"GET", "/v2/resources/vm-1?metadata=raw", "/v2/resources/{id}", ""},
	{"POST", "/v2/query/samples?extra=1", "/v2/query/samples", `{"filter": "{\"=\": {\"meter\": \"load\"}}", "orderby": "[{\"volume\": \"asc\"}]", "limit": 3}`},
	{"GET", "/v2/events?all_projects=1", "/v2/events", ""},
	{"GET", "/v2/events/e1", "/v2/events/{id}", ""},
	{"GET", "/v2/event_types", "/v2/event_types", ""},
	{"GET", "/v2/event_types/x", "/v2/event_types/{type}", ""},
	{"GET", "/v2/event_types/x/traits", "/v2/event_types/{type}/traits", ""},
	{"GET", "/v2/event_types/x/traits/n", "/v2/event_types/{type}/traits/{name}", ""},
	{"GET", "/v2/gaps?start=2026-01-01", "/v2/gaps", ""},
	{"GET", "/v2/usage?start=2025-01-01&end=2027-01-01&split=name", "/v2/usage", ""},
	{"POST", "/v2/ingest/samples", "/v2/ingest/samples", `[{"name": "x", "type": "gauge", "unit": "u", "volume": 1, "resource_id": "r", "timestamp": "2026-01-01T00:00:00"}]`},
	{"POST", "/v2/ingest/events", "/v2/ingest/events", `[{"message_id": "e2", "event_type": "x", "generated": "2026-01-01T00:00:00", "traits": []}]`},
}

func TestTheDescriptionIsTrue(t *testing.T) {
	first := gauge("a", "vm-1", 0, 1)
	first.Metadata = []byte(`{"name": "web", "flavor": {"vcpus": 2}, "none": null}`)
	first.Origin, first.Incarnation = sample.Walk, 5
	second := gauge("b", "vm-2", second, 2)
	second.User = ""
	s := storeOf(t, first, second)
	b := sample.NewBuilder()
	b.Gap(sample.Gap{Meter: "cpu", Resource: "vm-1", From: at, To: at + 1, Reason: "QEMU is stuck"})
	gap := b.Build()
	gap.ID, gap.Node = sample.NewBatchID(recordedAt), "compute-1"
	if _, err := s.Append(t.Context(), []store.Received{{Batch: gap}}); err != nil {
		t.Fatal(err)
	}
	event := sample.Event{ID: "e1", Type: "x", Traits: []sample.Trait{text("s", "t"), {Name: "n", Type: sample.IntTrait, Int: 7}}, Raw: []byte(`{"a": 1}`)}
	if _, err := s.AppendEvents(t.Context(), []sample.Event{event}); err != nil {
		t.Fatal(err)
	}
	h := api.New(s, api.Options{})
	headers := map[string]string{"X-Roles": "admin", "X-Project-Id": "p1", "X-User-Id": "u1"}
	var d described
	if err := json.Unmarshal(ask(h, http.MethodGet, "/v2/openapi.json", nil, "").Body.Bytes(), &d); err != nil || !strings.HasPrefix(d.OpenAPI, "3.1") {
		t.Fatalf("no description: %v", err)
	}

	t.Run("it has the operations that there are", func(t *testing.T) {
		got := map[string][]string{}
		for path, ops := range d.Paths {
			for method := range ops {
				key := regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, "{}")
				got[key] = append(got[key], strings.ToUpper(method))
			}
		}
		for path := range got {
			slices.Sort(got[path])
		}
		want := api.Operations()
		for _, path := range slices.Sorted(maps.Keys(want)) {
			if !slices.Equal(got[path], want[path]) {
				t.Errorf("%s: described %q, there are %q", path, got[path], want[path])
			}
			delete(got, path)
		}
		for path := range got {
			t.Errorf("%s is described and not there", path)
		}
	})

	asked := map[string]bool{}
	for _, r := range describedRequests {
		asked[r.method+" "+r.template] = true
		op, ok := d.Paths[r.template][strings.ToLower(r.method)]
		if !ok {
			continue // said above
		}
		w := ask(h, r.method, r.path, headers, r.body)
		answer, ok := op.Responses[fmt.Sprint(w.Code)]
		if !ok {
			t.Errorf("%s %s: status %d is not described: %s", r.method, r.path, w.Code, w.Body)
			continue
		}
		kind, _, _ := strings.Cut(w.Header().Get("Content-Type"), ";")
		content, ok := answer.Content[kind]
		if !ok != (w.Body.Len() == 0) {
			t.Errorf("%s %s: content of type %q is not described", r.method, r.path, kind)
		}
		if kind == "application/json" {
			var body any
			if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
				t.Fatal(err)
			}
			if bad := d.valid("", content.Schema, body); bad != "" {
				t.Errorf("%s %s: %s", r.method, r.path, bad)
			}
			if list, ok := body.([]any); ok && len(list) == 0 {
				t.Errorf("%s %s: an empty list shows nothing", r.method, r.path)
			}
		}
		if r.body != "" {
			if bad := d.valid("body", op.RequestBody.Content["application/json"].Schema, decode(t, r.body)); bad != "" {
				t.Errorf("%s %s: %s", r.method, r.path, bad)
			}
		}
		// Arguments that are described are taken, and no others.
		u, err := url.Parse(r.path)
		if err != nil {
			t.Fatal(err)
		}
		known := map[string]bool{}
		for _, p := range op.Parameters {
			known[p.Name] = p.In == "query"
		}
		for name := range u.Query() {
			if !known[name] {
				t.Errorf("%s %s: the argument %s is not described", r.method, r.path, name)
			}
		}
		for _, name := range []string{"q.field", "limit", "marker", "unique", "meter_links", "metadata", "extra", "groupby", "period", "aggregate.func", "direct", "all_projects", "start", "end"} {
			w := ask(h, r.method, u.EscapedPath()+"?"+name+"=1", headers, r.body)
			refused := strings.Contains(w.Body.String(), `Unknown argument: \"`+name+`\"`)
			if r.template != "/" && r.template != "/healthcheck" && refused == known[name] {
				t.Errorf("%s %s: the argument %s is described: %v, taken: %v", r.method, r.template, name, known[name], !refused)
			}
		}
		refusal := ask(h, r.method, u.EscapedPath()+"?nonsense=1", headers, r.body)
		if refusal.Code >= 400 {
			if bad := d.valid("", d.Components.Schemas["Error"], decode(t, refusal.Body.String())); bad != "" {
				t.Errorf("%s %s refused: %s", r.method, r.path, bad)
			}
		}
	}
	for path, ops := range d.Paths {
		for method := range ops {
			if !asked[strings.ToUpper(method)+" "+path] {
				t.Errorf("%s %s is described and not tried here", method, path)
			}
		}
	}
}

func decode(t *testing.T, text string) (v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return v
}
