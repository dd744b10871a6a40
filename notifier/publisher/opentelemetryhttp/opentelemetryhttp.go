// Package opentelemetryhttp posts samples as metrics to an OpenTelemetry
// receiver, in OTLP's JSON.
//
//	opentelemetryhttp://host:4318/v1/metrics?ssl=false&<the options of http://>
//
// Cumulative meters are monotonic sums, deltas are sums of delta temporality,
// everything else is a gauge.
package opentelemetryhttp

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

type receiver struct{ web *publisher.Web }

var header = http.Header{"Content-Type": {"application/json"}}

// New returns the publisher of a URL.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	o := publisher.NewOptions(u)
	scheme := "http"
	if o.Bool("ssl", false) {
		scheme = "https"
	}
	web, err := publisher.NewWeb(u, scheme, o)
	if err != nil {
		return nil, err
	}
	return &receiver{web}, o.Done(d.Log)
}

// Publish posts the samples of each part in one request.
func (r *receiver) Publish(ctx context.Context, parts []publisher.Part) error {
	for i := range parts {
		body := request(parts[i].Batch)
		if body == nil {
			continue
		}
		if _, err := r.web.Post(ctx, "", header, body); err != nil {
			return publisher.Refuse(i, err)
		}
	}
	return nil
}

// request returns an ExportMetricsServiceRequest with a metric for each meter,
// in the order in which they come first; nil where there are no samples.
func request(b *sample.Batch) []byte {
	var order []sample.MeterRef
	points := map[sample.MeterRef][]byte{}
	for s := range b.Samples() {
		m := sample.MeterRef{Name: s.Name, Kind: s.Kind, Unit: s.Unit}
		dst, ok := points[m]
		if ok {
			dst = append(dst, ", "...)
		} else {
			order = append(order, m)
		}
		points[m] = point(dst, &s)
	}
	if len(order) == 0 {
		return nil
	}
	out := []byte(`{"resourceMetrics": [{"scopeMetrics": [{"scope": {"name": "ceilometer", "version": "v1"}, "metrics": [`)
	for i, m := range order {
		if i > 0 {
			out = append(out, ", "...)
		}
		out = sample.AppendText(append(out, `{"name": `...), strings.ReplaceAll(m.Name, ".", "_"))
		out = sample.AppendText(append(out, `, "description": `...), m.Name+" unit:"+m.Unit)
		out = sample.AppendText(append(out, `, "unit": `...), m.Unit)
		switch m.Kind {
		case sample.Cumulative:
			out = append(out, `, "sum": {"aggregationTemporality": 2, "isMonotonic": true, "dataPoints": [`...)
		case sample.Delta:
			out = append(out, `, "sum": {"aggregationTemporality": 1, "isMonotonic": false, "dataPoints": [`...)
		default:
			out = append(out, `, "gauge": {"dataPoints": [`...)
		}
		out = append(append(out, points[m]...), `]}}`...)
	}
	return append(out, `]}]}]}`...)
}

// point appends a NumberDataPoint. 64-bit integers are text in protobuf's JSON.
func point(dst []byte, s *sample.Sample) []byte {
	dst = append(dst, `{"attributes": [`...)
	first := true
	attribute := func(name, value string) {
		if value == "" {
			return
		}
		if !first {
			dst = append(dst, ", "...)
		}
		first = false
		dst = append(append(append(dst, `{"key": "`...), name...), `", "value": {"stringValue": `...)
		dst = append(sample.AppendText(dst, value), "}}"...)
	}
	attribute("resource_id", s.Resource)
	attribute("user_id", s.User)
	attribute("project_id", s.Project)
	dst = strconv.AppendInt(append(dst, `], "timeUnixNano": "`...), s.Time*1000, 10)
	if s.Volume.Tag == sample.F64 || s.Volume.Tag == sample.U64 && s.Volume.Bits > 1<<63-1 {
		dst = append(dst, `", "asDouble": `...)
		return append(sample.AppendFloat(dst, s.Volume.Float64()), '}')
	}
	dst = append(dst, `", "asInt": "`...)
	return append(s.Volume.Append(dst), `"}`...)
}

// Close closes the connections.
func (r *receiver) Close() error {
	r.web.Close()
	return nil
}
