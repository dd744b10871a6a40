package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"testing"

	"go.uber.org/goleak"

	"github.com/kvmeter/kvmeter/central/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answer starts a server that answers everything with one body, and says what
// it was asked.
func answer(t *testing.T, status int, body string) (c *client.Client, asked *http.Request) {
	t.Helper()
	asked = &http.Request{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = *r
		w.WriteHeader(status)
		_, _ = fmt.Fprint(w, body)
	}))
	t.Cleanup(server.Close)
	return &client.Client{Endpoint: server.URL, HTTP: server.Client()}, asked
}

func TestRequestsAreThoseOfTheOriginalClient(t *testing.T) {
	ctx := context.Background()
	query := []client.Term{{Field: "resource", Value: "vm-1"}, {Field: "metadata.x", Op: "eq", Value: "2", Type: "integer"}}
	const q = "q.field=resource&q.field=metadata.x&q.op=eq&q.op=eq&q.type=&q.type=integer&q.value=vm-1&q.value=2"
	for want, ask := range map[string]func(*client.Client) error{
		"/v2/meters": func(c *client.Client) error { _, err := c.Meters(ctx, nil, 0, false); return err },
		"/v2/meters?limit=5&" + q + "&unique=True": func(c *client.Client) error { _, err := c.Meters(ctx, query, 5, true); return err },
		"/v2/samples?" + q:                         func(c *client.Client) error { _, err := c.Samples(ctx, query, 0, false); return err },
		"/v2/meters/a:b.c?extra=true&limit=1":      func(c *client.Client) error { _, err := c.MeterSamples(ctx, "a:b.c", nil, 1, true); return err },
		"/v2/resources?limit=2&meter_links=0":      func(c *client.Client) error { _, err := c.Resources(ctx, nil, 2); return err },
		"/v2/gaps?end=b&limit=3&start=a":           func(c *client.Client) error { _, err := c.Gaps(ctx, "a", "b", 3); return err },
		"/v2/meters/a%252Fb%20c%3F/statistics?" + q: func(c *client.Client) error {
			_, err := c.Statistics(ctx, client.StatisticsQuery{Meter: "a/b c?", Query: query})
			return err
		},
		"/v2/meters/m/statistics?aggregate.func=avg&aggregate.func=cardinality&aggregate.param=&aggregate.param=user_id&groupby=a&groupby=b&period=60": func(c *client.Client) error {
			_, err := c.Statistics(ctx, client.StatisticsQuery{
				Meter: "m", Period: 60, GroupBy: []string{"a", "b"}, Aggregates: []client.Aggregate{{Func: "avg"}, {Func: "cardinality", Param: "user_id"}},
			})
			return err
		},
	} {
		c, asked := answer(t, http.StatusOK, "[]")
		if err := ask(c); err != nil {
			t.Errorf("%s: %v", want, err)
		}
		got := asked.URL.EscapedPath()
		if asked.URL.RawQuery != "" {
			got += "?" + asked.URL.RawQuery
		}
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func TestTokenAndEndpoint(t *testing.T) {
	c, asked := answer(t, http.StatusOK, "[]")
	c.Token = "secret"
	c.Endpoint += "/v2/"
	if _, err := c.Meters(context.Background(), nil, 0, false); err != nil {
		t.Fatal(err)
	}
	if got := asked.Header.Get("X-Auth-Token"); got != "secret" {
		t.Errorf("got token %q", got)
	}
	if asked.URL.Path != "/v2/meters" {
		t.Errorf("got path %s", asked.URL.Path)
	}
}

func TestNumbersKeepTheirDigits(t *testing.T) {
	ctx := context.Background()
	const sample = `{"message_id":"i","counter_name":"cpu","counter_type":"cumulative","counter_unit":"ns","counter_volume":18446744073709551615.0,` +
		`"user_id":null,"project_id":"p","resource_id":"r","source":"s","timestamp":"t","recorded_at":"u","resource_metadata":{"a":"1"},"origin":"walk","incarnation":"0a"}`
	c, _ := answer(t, http.StatusOK, "["+sample+"]")
	got, err := c.MeterSamples(ctx, "cpu", nil, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	text := func(s string) *string { return &s }
	want := []client.Sample{{
		ID: "i", Meter: "cpu", Type: "cumulative", Unit: "ns", Volume: "18446744073709551615.0", Project: text("p"), Resource: text("r"), Source: text("s"),
		Time: "t", Recorded: "u", Metadata: map[string]string{"a": "1"}, Origin: text("walk"), Incarnation: text("0a"),
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	c, _ = answer(t, http.StatusOK, `{"id":"i","volume":1e-07}`)
	if s, err := c.Sample(ctx, "i", false); err != nil || s.Volume != "1e-07" {
		t.Errorf("got %v, %v", s, err)
	}
	c, _ = answer(t, http.StatusOK, `[{"groupby":null,"unit":"ns","max":9223372036854775807.0,"count":3,"aggregate":{"avg":2.50},"duration":null}]`)
	rows, err := c.Statistics(ctx, client.StatisticsQuery{Meter: "cpu"})
	if err != nil || len(rows) != 1 || rows[0].Max != "9223372036854775807.0" || rows[0].Count != "3" || rows[0].Aggregate["avg"] != "2.50" || rows[0].Duration != nil {
		t.Errorf("got %+v, %v", rows, err)
	}
}

func TestErrorsHaveTheAPIsText(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		body   string
		want   string
	}{
		"an object":             {404, `{"error_message": {"faultcode": "Client", "faultstring": "Sample zz Not Found", "debuginfo": null}}`, "Sample zz Not Found (HTTP 404)"},
		"a text":                {405, `{"error_message": "405 Method Not Allowed\n\nThe method PUT is not allowed. \n\n "}`, "405 Method Not Allowed (HTTP 405)"},
		"a page of a proxy":     {502, "<html>Bad Gateway</html>", "502 Bad Gateway (HTTP 502)"},
		"an object of others":   {500, `{"error_message": {"code": 1}}`, "500 Internal Server Error (HTTP 500)"},
		"nothing":               {503, "", "503 Service Unavailable (HTTP 503)"},
		"a text without a line": {503, `{"error_message": " \n "}`, "503 Service Unavailable (HTTP 503)"},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := answer(t, tc.status, tc.body)
			_, err := c.Resource(context.Background(), "x")
			var fault *client.Error
			if !errors.As(err, &fault) || fault.Status != tc.status || err.Error() != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

func TestAnAnswerThatIsCutShortIsAnError(t *testing.T) {
	c, _ := answer(t, http.StatusOK, `[{"name":"cpu"},`)
	if got, err := c.Meters(context.Background(), nil, 0, false); err == nil {
		t.Errorf("got %v and no error", got)
	}
}

func TestACancelledRequestEnds(t *testing.T) {
	c, _ := answer(t, http.StatusOK, "[]")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.Meters(ctx, nil, 0, false); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// FuzzAnswer reads any answer of a server.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{`[{"counter_volume":1.0}]`, `{"error_message":{"faultstring":"x"}}`, `null`, `[null]`, `{`} {
		f.Add(200, s)
		f.Add(400, s)
	}
	f.Fuzz(func(t *testing.T, status int, body string) {
		c := &client.Client{Endpoint: "http://api.example", HTTP: &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			w := httptest.NewRecorder()
			_, _ = w.WriteString(body)
			resp := w.Result()
			resp.StatusCode = status
			return resp, nil
		})}}
		samples, err := c.MeterSamples(context.Background(), "cpu", nil, 0, false)
		if status != http.StatusOK && err == nil {
			t.Errorf("status %d is no error", status)
		}
		for _, s := range samples {
			if s.Volume != "" && !json.Valid([]byte(s.Volume)) {
				t.Errorf("volume %q is no number", s.Volume)
			}
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
