package api_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
)

// The requests that python-ceilometerclient sends, as it builds them: all
// attributes of every term, sorted by attribute, and slashes at the end of some
// paths.
func TestRequestsOfCeilometersClient(t *testing.T) {
	s := eventStore(t)
	busSamples(t, s, meterLines)
	h := api.New(s, api.Options{Policy: originalPolicy(t)})
	const query = "q.field=resource_id&q.field=timestamp&q.op=eq&q.op=gt&q.type=&q.type=&q.value=r1&q.value=2012-07-02"
	for request, want := range map[string]string{
		"GET /v2/meters":                         `"name": "m.mine"`,
		"GET /v2/meters?limit=1&unique=True":     `"resource_id": null`,
		"GET /v2/meters/m.test?" + query:         `"counter_volume": 3.0`,
		"GET /v2/samples?" + query + "&limit=1":  `"id": "m2"`,
		"GET /v2/samples/m2":                     `"volume": 3.0`,
		"GET /v2/resources?" + query:             `"resource_id": "r1"`,
		"GET /v2/resources?meter_links=0":        `"rel": "self"`,
		"GET /v2/resources/r1":                   `"rel": "m.test.new"`,
		"GET /v2/event_types/":                   `"Foo"`,
		"GET /v2/event_types/Foo/traits":         `"name": "trait_A"`,
		"GET /v2/event_types/Foo/traits/trait_A": `"value": "my_Foo_text"`,
		"GET /v2/events/100":                     `"event_type": "Bar"`,
		"GET /v2/capabilities":                   `"statistics:groupby": true`,
		"GET /v2/events?q.field=trait_B&q.op=ge&q.type=integer&q.value=101&limit=5":                                                      `"message_id": "200"`,
		"GET /v2/meters/m.test/statistics?" + query + "&period=3600&groupby=project_id&aggregate.func=avg&aggregate.param=":              `"aggregate": {"avg": 3.0}`,
		"GET /v2/meters/m.test/statistics?aggregate.func=cardinality&aggregate.func=stddev&aggregate.param=resource_id&aggregate.param=": `"cardinality/resource_id": 2.0`,
		`POST /v2/query/samples {"filter": "{\"=\":{\"meter\":\"m.mine\"}}", "orderby": "[{\"timestamp\":\"desc\"}]", "limit": 1}`:       `"id": "m6"`,
		`POST /v2/query/samples {}`: `"id": "m7"`,
		`POST /v2/meters/m.new?direct=True [{"counter_name": "m.new", "counter_type": "gauge", "counter_unit": "u", "counter_volume": "48", "resource_id": "r", "resource_metadata": {}}]`: `"counter_volume": 48.0`,
	} {
		method, rest, _ := strings.Cut(request, " ")
		path, body, _ := strings.Cut(rest, " ")
		headers := map[string]string{
			"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "python-ceilometerclient",
			"X-Roles": "admin", "X-Project-Id": "p1", "X-User-Id": "u1",
		}
		w := ask(h, method, path, headers, body)
		if got := w.Body.String(); w.Code/100 != 2 || !strings.Contains(got, want) {
			t.Errorf("%s: got %d %s, want %s", request, w.Code, got, want)
		}
	}
	w := ask(h, http.MethodGet, "/v2/alarms", nil, "")
	if got := fault(t, w); w.Code != http.StatusNotFound || got != "The resource could not be found." {
		t.Errorf("alarms: got %d %s", w.Code, got)
	}
}
