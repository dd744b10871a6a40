package api_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

// recorded is a request that was sent to the original service after the
// samples of testdata/samples.json were stored in it, and its answer.
type recorded struct {
	Request struct {
		Method, Path string
		Body         json.RawMessage
		Headers      map[string]string
	}
	Response struct {
		Status int
		Body   any
	}
}

func readCases(t *testing.T) []recorded {
	t.Helper()
	f, err := os.Open("testdata/cases.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var cases []recorded
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var c recorded
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			t.Fatal(err)
		}
		cases = append(cases, c)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return cases
}

// wireSample is a sample as the original has it on its bus.
type wireSample struct {
	Name     string          `json:"counter_name"`
	Kind     sample.Kind     `json:"counter_type"`
	Unit     string          `json:"counter_unit"`
	Volume   float64         `json:"counter_volume"`
	User     string          `json:"user_id"`
	Project  string          `json:"project_id"`
	Resource string          `json:"resource_id"`
	Time     string          `json:"timestamp"`
	Source   string          `json:"source"`
	ID       string          `json:"message_id"`
	Metadata json.RawMessage `json:"resource_metadata"`
}

var recordedAt = time.Date(2026, 1, 1, 12, 0, 0, 130802000, time.UTC)

// add stores samples one after the other.
func add(t testing.TB, s store.Store, samples ...sample.Sample) {
	t.Helper()
	for i, smp := range samples {
		b := sample.NewBuilder()
		b.Row(sample.Row{
			Resource: smp.Resource, Source: smp.Source, Project: smp.Project, User: smp.User,
			Metadata: smp.Metadata, Incarnation: smp.Incarnation,
		})
		b.Add(sample.MeterRef{Name: smp.Name, Kind: smp.Kind, Unit: smp.Unit}, smp.Origin, smp.Volume)
		batch := b.Build()
		batch.ID = sample.NewBatchID(recordedAt.Add(time.Duration(i) * time.Millisecond))
		batch.Base = smp.Time
		batch.IDs = []string{smp.ID.String()}
		stored, err := s.Append(context.Background(), []store.Received{{Batch: batch}})
		if err != nil || stored[0] != (store.Stored{}) {
			t.Fatalf("append sample %d: %v, %v", i, stored, err)
		}
	}
}

// recordedStore holds the samples of testdata/samples.json.
func recordedStore(t testing.TB) store.Store {
	t.Helper()
	data, err := os.ReadFile("testdata/samples.json")
	if err != nil {
		t.Fatal(err)
	}
	var wire []wireSample
	if err := json.Unmarshal(data, &wire); err != nil {
		t.Fatal(err)
	}
	s := memory.New(func() time.Time { return recordedAt })
	for _, w := range wire {
		at, err := time.Parse("2006-01-02T15:04:05", w.Time)
		if err != nil {
			t.Fatal(err)
		}
		var metadata bytes.Buffer
		if err := json.Compact(&metadata, w.Metadata); err != nil {
			t.Fatal(err)
		}
		add(t, s, sample.Sample{
			ID: sample.ParseID(w.ID), Name: w.Name, Kind: w.Kind, Unit: w.Unit, Volume: sample.Float(w.Volume),
			Resource: w.Resource, Source: w.Source, Project: w.Project, User: w.User,
			Time: at.UnixMicro(), Metadata: metadata.Bytes(),
		})
	}
	return s
}

// originalPolicy lets everybody send samples of their project, as the original's
// does.
func originalPolicy(t testing.TB) *api.Policy {
	t.Helper()
	p, err := api.ParsePolicy([]byte(`{"telemetry:create_samples": ""}`))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Answers of the original that are different here on purpose, by request.
var deviations = map[string]struct {
	why    string
	status int
	text   string
}{
	"GET /v2":             {"errors below the handlers are error objects too", http.StatusNotFound, "The resource could not be found."},
	"GET /v2/event_types": {"errors below the handlers are error objects too", http.StatusUnauthorized, "Not Authorized to access project p1"},
	"PUT /v2/meters":      {"errors below the handlers are error objects too", http.StatusMethodNotAllowed, "The method PUT is not allowed for this resource."},
}

func TestAnswersAreThoseOfTheOriginal(t *testing.T) {
	handler := api.New(recordedStore(t), api.Options{Policy: originalPolicy(t), Publish: func(context.Context, *sample.Batch) error { return nil }})
	for i, c := range readCases(t) {
		t.Run(fmt.Sprintf("%d %s %s", i, c.Request.Method, c.Request.Path), func(t *testing.T) {
			got := ask(handler, c.Request.Method, c.Request.Path, c.Request.Headers, string(c.Request.Body))
			if d, ok := deviations[c.Request.Method+" "+c.Request.Path]; ok {
				c.Response.Status, c.Response.Body = d.status, errorObject(d.text)
			}
			if got.Code != c.Response.Status {
				t.Fatalf("got status %d, want %d: %s", got.Code, c.Response.Status, got.Body)
			}
			var body any
			if err := json.Unmarshal(got.Body.Bytes(), &body); err != nil {
				t.Fatalf("%v: %s", err, got.Body)
			}
			cutTies(&c, body)
			shortenFaults(body, c.Response.Body)
			if diff := different("", normal(body), normal(c.Response.Body)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// cutTies leaves the times of samples only where a limit cuts through samples of
// one time: the original takes the last stored of them, which is a deviation.
func cutTies(c *recorded, body any) {
	if string(c.Request.Body) != `{"limit": 5}` {
		return
	}
	for _, answer := range []any{body, c.Response.Body} {
		list, _ := answer.([]any)
		for i, v := range list {
			m, _ := v.(map[string]any)
			list[i] = m["timestamp"]
		}
	}
}

// shortenFaults leaves of faults what is said before a validator quotes its
// schema, and before it lists the names of fields in no order.
func shortenFaults(bodies ...any) {
	for _, body := range bodies {
		m, _ := body.(map[string]any)
		if e, ok := m["error_message"].(map[string]any); ok {
			text, _ := e["faultstring"].(string)
			text, _, _ = strings.Cut(text, "\n")
			text, _, _ = strings.Cut(text, "any of the regexes")
			e["faultstring"] = text
		}
	}
}

func ask(h http.Handler, method, path string, headers map[string]string, body string) *httptest.ResponseRecorder {
	var r *http.Request
	if body == "" || body == "null" {
		r = httptest.NewRequest(method, "http://api.example"+path, nil)
	} else {
		r = httptest.NewRequest(method, "http://api.example"+path, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
	}
	for k, v := range headers {
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func errorObject(text string) any {
	return map[string]any{"error_message": map[string]any{"faultcode": "Client", "faultstring": text, "debuginfo": nil}}
}

// normal drops what two answers may differ in: when samples were stored, and
// the order where the original has none. Samples of the same time come in the
// order they were stored (a test of its own); the original's as its database likes.
func normal(body any) any {
	list, ok := body.([]any)
	if !ok || len(list) == 0 {
		return body
	}
	key := func(v any, names ...string) (text string) {
		m, _ := v.(map[string]any)
		for _, n := range names {
			text += fmt.Sprintf("%v\x00", m[n])
		}
		return text
	}
	sortBy := func(names ...string) {
		slices.SortFunc(list, func(a, b any) int { return strings.Compare(key(a, names...), key(b, names...)) })
	}
	for _, v := range list {
		if m, ok := v.(map[string]any); ok {
			if _, stored := m["recorded_at"]; !stored && m["message_id"] != nil { // the answer to samples that were sent
				delete(m, "message_id")
				delete(m, "timestamp")
			}
			delete(m, "recorded_at")
		}
	}
	first, _ := list[0].(map[string]any)
	switch {
	case first["first_sample_timestamp"] != nil:
		sortBy("resource_id")
	case first["timestamp"] != nil:
		sortBy("timestamp", "id", "message_id")
	case first["groupby"] != nil && first["period"] == 0.0:
		sortBy("groupby")
	}
	return list
}

// different returns where two JSON values differ. Floats that are sums of many
// may differ in their last digits: their order of addition is the engine's.
func different(path string, got, want any) string {
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok || len(g) != len(w) {
			return fmt.Sprintf("%s: got %v, want %v", path, got, want)
		}
		for k := range w {
			if _, ok := g[k]; !ok {
				return fmt.Sprintf("%s: got no %q, want %v", path, k, w[k])
			}
			if d := different(path+"."+k, g[k], w[k]); d != "" {
				return d
			}
		}
		return ""
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(w) {
			return fmt.Sprintf("%s: got %v, want %v", path, got, want)
		}
		for i := range w {
			if d := different(fmt.Sprintf("%s[%d]", path, i), g[i], w[i]); d != "" {
				return d
			}
		}
		return ""
	case float64:
		if g, ok := got.(float64); ok && math.Abs(g-w) <= 1e-12*math.Abs(w) {
			return ""
		}
	default:
		if reflect.DeepEqual(got, want) {
			return ""
		}
	}
	return fmt.Sprintf("%s: got %v, want %v", path, got, want)
}
