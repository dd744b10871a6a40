package api_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
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
