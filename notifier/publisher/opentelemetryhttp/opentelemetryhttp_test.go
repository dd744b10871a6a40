package opentelemetryhttp

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metricsv1 "go.opentelemetry.io/proto/otlp/metrics/v1"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// TestRequestsAreOTLP reads what is posted with OpenTelemetry's own schema,
// which takes no unknown field.
func TestRequestsAreOTLP(t *testing.T) {
	var bodies []string
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.URL.Path != "/v1/metrics" || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %v, %v", r.URL, r.Header, err)
		}
		bodies = append(bodies, string(body))
	}))
	defer s.Close()
	u, err := url.Parse("opentelemetryhttp://" + s.Listener.Addr().String() + "/v1/metrics")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r/1", User: "u", Offset: 1})
	b.Add(sample.MeterRef{Name: "cpu.time", Kind: sample.Cumulative, Unit: "ns"}, sample.Walk, sample.Uint(1<<63-1))
	b.Add(sample.MeterRef{Name: "g-x", Kind: sample.Gauge, Unit: "B"}, sample.Walk, sample.Float(1.5))
	b.Row(sample.Row{Resource: "r2", Project: "p", Offset: 2})
	b.Add(sample.MeterRef{Name: "cpu.time", Kind: sample.Cumulative, Unit: "ns"}, sample.Walk, sample.Uint(1<<64-1))
	b.Add(sample.MeterRef{Name: "d", Kind: sample.Delta, Unit: "B"}, sample.Walk, sample.Int(-2))
	batch := b.Build()
	batch.ID, batch.Base = sample.NewBatchID(time.Now()), 1_767_225_600_000_000
	if err := p.Publish(t.Context(), []publisher.Part{{Batch: batch}, {Batch: &sample.Batch{}}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	const want = `{"resource_metrics": [{"scope_metrics": [{"scope": {"name": "ceilometer", "version": "v1"}, "metrics": [
	 {"name": "cpu_time", "description": "cpu.time unit:ns", "unit": "ns", "sum": {"aggregation_temporality": "AGGREGATION_TEMPORALITY_CUMULATIVE", "is_monotonic": true, "data_points": [
	  {"attributes": [{"key": "resource_id", "value": {"string_value": "r/1"}}, {"key": "user_id", "value": {"string_value": "u"}}], "time_unix_nano": 1767225600000001000, "as_int": 9223372036854775807},
	  {"attributes": [{"key": "resource_id", "value": {"string_value": "r2"}}, {"key": "project_id", "value": {"string_value": "p"}}], "time_unix_nano": 1767225600000002000, "as_double": 18446744073709551615}]}},
	 {"name": "g-x", "description": "g-x unit:B", "unit": "B", "gauge": {"data_points": [
	  {"attributes": [{"key": "resource_id", "value": {"string_value": "r/1"}}, {"key": "user_id", "value": {"string_value": "u"}}], "time_unix_nano": 1767225600000001000, "as_double": 1.5}]}},
	 {"name": "d", "description": "d unit:B", "unit": "B", "sum": {"aggregation_temporality": "AGGREGATION_TEMPORALITY_DELTA", "data_points": [
	  {"attributes": [{"key": "resource_id", "value": {"string_value": "r2"}}, {"key": "project_id", "value": {"string_value": "p"}}], "time_unix_nano": 1767225600000002000, "as_int": -2}]}}]}]}]}`
	var wanted, got metricsv1.MetricsData
	if err := protojson.Unmarshal([]byte(want), &wanted); err != nil {
		t.Fatal(err)
	}
	if len(bodies) != 1 {
		t.Fatalf("%d requests", len(bodies))
	}
	if err := protojson.Unmarshal([]byte(bodies[0]), &got); err != nil {
		t.Fatalf("%v: %s", err, bodies[0])
	}
	if diff := cmp.Diff(&wanted, &got, protocmp.Transform()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
