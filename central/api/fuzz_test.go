package api_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store/memory"
)

// FuzzRequest sends any path, query and body: the answer is always JSON, and
// never the server's trouble.
func FuzzRequest(f *testing.F) {
	f.Add("/v2/samples", "q.field=metadata.x&q.value=[1,2]&q.type=&q.op=eq&limit=5", "")
	f.Add("/v2/samples", "q[1].field=timestamp&q[1].op=ge&q[1].value=2026-01-01&q[0].field=search_offset&q[0].value=-5", "")
	f.Add("/v2/meters/cpu/statistics", "period=600&groupby=metadata.flavor.vcpus&aggregate.func=stddev&aggregate.param=", "")
	f.Add("/v2/meters/cpu/statistics", "period=252288000000&q.field=timestamp&q.op=ge&q.value=9999-12-31", "")
	f.Add("/v2/resources/a%252Fb", "", "")
	f.Add("/v2/resources", "meter_links=0&metadata=raw", `{"q":[{"field":"resource","value":"vm-1"}],"limit":3}`)
	f.Add("/v2/gaps", "start=0001-01-01&end=9999-12-31", "")
	f.Add("/v2/meters", "unique=True&q.field=user&q.value=None", `{"q":[{"field":"source","value":null}]}`)
	f.Add("/v2/events", "q.field=t&q.op=ne&q.value=5&q.type=integer&q.field=start_timestamp&q.op=ge&q.value=2026-01-01", "")
	f.Add("/v2/event_types/a%2Fb/traits/c", "", "")
	h := api.New(recordedStore(f), api.Options{})
	f.Fuzz(func(t *testing.T, path, query, body string) {
		u, err := url.Parse("http://api.example/" + strings.TrimPrefix(path, "/"))
		if err != nil {
			return
		}
		u.RawQuery = query
		r := &http.Request{Method: http.MethodGet, URL: u, Host: "api.example", Header: http.Header{"Content-Type": {"application/json"}}, Body: http.NoBody}
		if body != "" {
			r.Body = http.MaxBytesReader(nil, readCloser{strings.NewReader(body)}, 1<<21)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code >= http.StatusInternalServerError || !json.Valid(w.Body.Bytes()) && u.Path != "/healthcheck" {
			t.Errorf("%s with %q: got %d %s", u, body, w.Code, w.Body)
		}
	})
}

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }

// FuzzComplexQuery sends any filter and order: the answer is a list or a
// refusal, never the server's trouble, and a member sees their project only.
func FuzzComplexQuery(f *testing.F) {
	f.Add(`{"and": [{"=": {"meter": "cpu"}}, {"not": {"in": {"volume": [1, "2", 3.5]}}}]}`, `[{"volume": "asc"}, {"timestamp": "desc"}]`)
	f.Add(`{"or": [{"=~": {"metadata.display_name": "^web(1|2)$"}}, {"<=": {"timestamp": "2026-01-01T09:00:00+02:00"}}]}`, `[]`)
	f.Add(`{"!=": {"project": "p1"}}`, `[{"resource_metadata": "DESC"}]`)
	f.Add(`{"In": {"metadata.tags[0]": ["a", 1e3]}}`, ``)
	f.Add(`{"=": {"volume": 1e999}}`, `[{"metadata.x": "asc"}]`)
	h := api.New(recordedStore(f), api.Options{})
	f.Fuzz(func(t *testing.T, filter, orderby string) {
		query := map[string]string{}
		if filter != "" {
			query["filter"] = filter
		}
		if orderby != "" {
			query["orderby"] = orderby
		}
		body, err := json.Marshal(query)
		if err != nil {
			t.Fatal(err)
		}
		w := ask(h, http.MethodPost, "/v2/query/samples", map[string]string{"X-Roles": "member", "X-Project-Id": "p1"}, string(body))
		switch w.Code {
		case http.StatusOK:
			var list []struct {
				Project string `json:"project_id"`
			}
			if err := json.Unmarshal(w.Body.Bytes(), &list); err != nil {
				t.Fatal(err)
			}
			for _, s := range list {
				if s.Project != "p1" {
					t.Errorf("%s shows a sample of project %q", body, s.Project)
				}
			}
		case http.StatusBadRequest, http.StatusUnauthorized:
			fault(t, w)
		default:
			t.Errorf("%s: got %d %s", body, w.Code, w.Body)
		}
	})
}

// FuzzSamplesSent sends any body: what is taken is listed as it was answered,
// what is refused leaves nothing.
func FuzzSamplesSent(f *testing.F) {
	f.Add([]byte("[" + one(f, nil) + "]"))
	f.Add([]byte("[" + one(f, map[string]any{"timestamp": "0001-01-01T00:00:00+14:00", "counter_volume": "-1e-300"}) + "," + one(f, map[string]any{"resource_metadata": map[string]any{"a.b": "x", "a": "y"}}) + "]"))
	f.Add([]byte(`[{"counter_name": "apples", "counter_type": "gauge", "counter_unit": "\ud800", "counter_volume": 18446744073709551616, "resource_id": ""}]`))
	f.Add([]byte(`{"a": [1, {"b": null}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) > 1<<16 {
			return
		}
		s := memory.New(time.Now)
		h := api.New(s, api.Options{})
		w := ask(h, http.MethodPost, "/v2/meters/apples?direct=1", nil, string(body))
		_, stored := get(h, "/v2/meters/apples?limit=1000000")
		if w.Code != http.StatusCreated {
			if fault(t, w); w.Code != http.StatusBadRequest || stored != "[]" {
				t.Errorf("%q: got %d %s, and %s is stored", body, w.Code, w.Body, stored)
			}
			return
		}
		sent, got := ids(t, w.Body.String()), ids(t, stored)
		slices.Sort(sent)
		slices.Sort(got)
		if !slices.Equal(sent, got) {
			t.Errorf("%q: sent %q, stored %q", body, sent, got)
		}
	})
}

// FuzzPolicy reads any text as a policy: it decides or is refused.
func FuzzPolicy(f *testing.F) {
	f.Add(`{"context_is_admin": "role:admin and not (role:x or project_id:p)", "default": "!"}`)
	f.Add("telemetry:get_samples: [[\"role:a\", \"rule:b\"], \"@\"]\nb: \"\"")
	f.Add(`{"a": "rule:b", "b": "rule:a"}`)
	s := memory.New(time.Now)
	f.Fuzz(func(t *testing.T, text string) {
		p, err := api.ParsePolicy([]byte(text))
		if err != nil {
			return
		}
		w := ask(api.New(s, api.Options{Policy: p}), http.MethodGet, "/v2/samples", map[string]string{"X-Roles": "a", "X-Project-Id": "p"}, "")
		if w.Code != http.StatusOK && w.Code != http.StatusForbidden {
			t.Errorf("%q: got %d %s", text, w.Code, w.Body)
		}
	})
}
