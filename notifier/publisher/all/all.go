// Package all lists the notifier's publishers.
package all

import (
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/direct"
	"github.com/kvmeter/kvmeter/notifier/publisher/file"
	"github.com/kvmeter/kvmeter/notifier/publisher/gnocchi"
	"github.com/kvmeter/kvmeter/notifier/publisher/http"
	"github.com/kvmeter/kvmeter/notifier/publisher/kafka"
	"github.com/kvmeter/kvmeter/notifier/publisher/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/opentelemetryhttp"
	"github.com/kvmeter/kvmeter/notifier/publisher/prometheus"
	"github.com/kvmeter/kvmeter/notifier/publisher/remotewrite"
	"github.com/kvmeter/kvmeter/notifier/publisher/store"
	"github.com/kvmeter/kvmeter/notifier/publisher/tcp"
	"github.com/kvmeter/kvmeter/notifier/publisher/test"
	"github.com/kvmeter/kvmeter/notifier/publisher/udp"
	"github.com/kvmeter/kvmeter/notifier/publisher/zaqar"
)

// Publishers are the schemes that pipeline.yaml may name.
var Publishers = []publisher.Scheme{
	{Name: "database", Alias: direct.URL},
	{Name: "direct", Alias: direct.URL},
	{Name: "file", New: file.New, Events: true},
	{Name: "gnocchi", New: gnocchi.New, Events: true},
	{Name: "http", New: http.New, Events: true, Lazy: true},
	{Name: "https", New: http.New, Events: true, Lazy: true},
	{Name: "kafka", New: kafka.New, Events: true, Lazy: true},
	{Name: "notifier", New: notifier.New, Events: true},
	{Name: "opentelemetryhttp", New: opentelemetryhttp.New, Lazy: true},
	{Name: "prometheus", New: prometheus.New, Lazy: true},
	{Name: "remotewrite", New: remotewrite.New, Lazy: true},
	{Name: "rpc", New: notifier.NewRPC},
	{Name: "store", New: store.New, Events: true, Signs: true, Durable: true},
	{Name: "tcp", New: tcp.New, Lazy: true},
	{Name: "test", New: test.New, Events: true, Lazy: true},
	{Name: "udp", New: udp.New, Lazy: true},
	{Name: "zaqar", New: zaqar.New, Events: true},
}
