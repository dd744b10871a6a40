// Package all lists the notifier's publishers.
package all

import (
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/file"
	"github.com/kvmeter/kvmeter/notifier/publisher/store"
)

// Publishers are the schemes that pipeline.yaml may name.
var Publishers = []publisher.Scheme{
	{Name: "file", New: file.New},
	{Name: "store", New: store.New, Signs: true},
}
