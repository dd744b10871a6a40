// Package remotewrite sends samples to Prometheus, or to what else takes its
// remote write protocol (version 0.1.0), each with its own time.
//
//	remotewrite://host:9090/api/v1/write?ssl=false&<the options of http://>
package remotewrite

import (
	"context"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/klauspost/compress/s2"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

type receiver struct{ web *publisher.Web }

var header = http.Header{
	"Content-Type": {"application/x-protobuf"}, "Content-Encoding": {"snappy"},
	"X-Prometheus-Remote-Write-Version": {"0.1.0"}, "User-Agent": {"kvmeter"},
}

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

// Publish sends the samples of each part in one request.
func (r *receiver) Publish(ctx context.Context, parts []publisher.Part) error {
	for i := range parts {
		body := request(slices.Collect(parts[i].Batch.Samples()))
		if len(body) == 0 {
			continue
		}
		if _, err := r.web.Post(ctx, "", header, s2.EncodeSnappy(nil, body)); err != nil {
			return publisher.Refuse(i, err)
		}
	}
	return nil
}

// Fields of prometheus.WriteRequest and what is in it (prompb/remote.proto and
// types.proto).
const (
	fieldTimeseries = 1 // of WriteRequest
	fieldLabels     = 1 // of TimeSeries
	fieldSamples    = 2
	fieldName       = 1 // of Label
	fieldValue      = 2
	fieldNumber     = 1 // of Sample: double
	fieldTime       = 2 // of Sample: int64, ms
)

// request returns a WriteRequest. The samples of one series stand together, in
// the order of their times; times have milliseconds there, and of several samples
// in one the last counts.
func request(samples []sample.Sample) []byte {
	slices.SortStableFunc(samples, func(a, b sample.Sample) int { return int(min(max(a.Time-b.Time, -1), 1)) })
	var order []string
	series := map[string]*points{} // by labels, as they are on the wire
	for i := range samples {
		s := &samples[i]
		labels := string(appendLabels(nil, s))
		p := series[labels]
		if p == nil {
			p = &points{}
			series[labels] = p
			order = append(order, labels)
		}
		if ms := s.Time / 1000; len(p.wire) > 0 && ms == p.ms {
			p.wire = p.wire[:p.last]
		}
		p.ms, p.last = s.Time/1000, len(p.wire)
		var point []byte
		point = protowire.AppendTag(point, fieldNumber, protowire.Fixed64Type)
		point = protowire.AppendFixed64(point, math.Float64bits(s.Volume.Float64()))
		point = protowire.AppendTag(point, fieldTime, protowire.VarintType)
		point = protowire.AppendVarint(point, uint64(s.Time/1000))
		p.wire = protowire.AppendBytes(protowire.AppendTag(p.wire, fieldSamples, protowire.BytesType), point)
	}
	var out []byte
	for _, labels := range order {
		out = protowire.AppendTag(out, fieldTimeseries, protowire.BytesType)
		out = protowire.AppendBytes(out, append([]byte(labels), series[labels].wire...))
	}
	return out
}

// points are the samples of one series, as they are on the wire.
type points struct {
	wire []byte
	last int   // where the last begins
	ms   int64 // its time
}

// appendLabels appends the labels of a sample, sorted by name.
func appendLabels(dst []byte, s *sample.Sample) []byte {
	label := func(name, value string) {
		if value == "" {
			return
		}
		var l []byte
		l = protowire.AppendTag(l, fieldName, protowire.BytesType)
		l = protowire.AppendString(l, name)
		l = protowire.AppendTag(l, fieldValue, protowire.BytesType)
		l = protowire.AppendString(l, strings.ToValidUTF8(value, "?"))
		dst = protowire.AppendTag(dst, fieldLabels, protowire.BytesType)
		dst = protowire.AppendBytes(dst, l)
	}
	label("__name__", publisher.MetricName(s.Name))
	label("project_id", s.Project)
	label("resource_id", s.Resource)
	label("user_id", s.User)
	return dst
}

// Close closes the connections.
func (r *receiver) Close() error {
	r.web.Close()
	return nil
}
