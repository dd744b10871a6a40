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
	{Name: "file", New: file.New, Check: file.Check, Events: true},
	{Name: "gnocchi", New: gnocchi.New, Check: gnocchi.Check, Events: true},
	{Name: "http", New: http.New, Events: true},
	{Name: "https", New: http.New, Events: true},
	{Name: "kafka", New: kafka.New, Events: true},
	{Name: "meter", Alias: notifier.RPCURL},
	{Name: "notifier", New: notifier.New, Check: notifier.Check, Events: true},
	{Name: "opentelemetryhttp", New: opentelemetryhttp.New},
	{Name: "panko", Alias: direct.StoreURL},
	{Name: "prometheus", New: prometheus.New},
	{Name: "remotewrite", New: remotewrite.New},
	{Name: "rpc", New: notifier.NewRPC, Check: notifier.Check},
	{Name: "store", New: store.New, Events: true, Signs: true, Durable: true},
	{Name: "tcp", New: tcp.New},
	{Name: "test", New: test.New, Events: true},
	{Name: "udp", New: udp.New},
	{Name: "zaqar", New: zaqar.New, Check: zaqar.Check, Events: true},
}
