package all

import (
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/disk"
	"github.com/kvmeter/kvmeter/collectors/exits"
	"github.com/kvmeter/kvmeter/collectors/runqueue"
	"github.com/kvmeter/kvmeter/collectors/tcx"
	"github.com/kvmeter/kvmeter/sample"
)

// hooks opens each hook. deep is for those that can count more.
var hooks = []struct {
	name   string
	origin sample.Origin
	open   func(log *zap.Logger, deep bool) (collectors.Hook, error)
}{
	{"disk", sample.Iomap, func(log *zap.Logger, _ bool) (collectors.Hook, error) { return disk.Open(log) }},
	{"tcx", sample.TCX, func(log *zap.Logger, deep bool) (collectors.Hook, error) {
		return tcx.Open(log, tcx.Options{Sizes: deep})
	}},
	{"runqueue", sample.RunQueue, func(*zap.Logger, bool) (collectors.Hook, error) { return runqueue.Open() }},
	{"exits", sample.Exits, func(*zap.Logger, bool) (collectors.Hook, error) { return exits.Open() }},
}

// Missing is a hook that could not be opened.
type Missing struct {
	Name   string
	Origin sample.Origin
	Err    error
}

// Meters lists what only the hook counts.
func (m *Missing) Meters() []string {
	var names []string
	for _, c := range sample.Catalogue {
		if len(c.Origins) == 1 && c.Origins[0] == m.Origin {
			names = append(names, c.Name)
		}
	}
	return names
}

// Hooks opens the hooks that the kernel takes, detached; deep has them count
// what costs more too.
func Hooks(log *zap.Logger, deep bool) (open []collectors.Hook, missing []Missing) {
	for _, h := range hooks {
		hook, err := h.open(log, deep)
		if err != nil {
			missing = append(missing, Missing{h.name, h.origin, err})
			continue
		}
		open = append(open, hook)
	}
	return open, missing
}
