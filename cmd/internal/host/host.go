// Package host opens what an agent reads on its host.
package host

import (
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
)

// Open opens the readers that this host, kernel and user allow, for an agent
// that gets a log and notes of what cannot be read. The function it returns
// closes them.
func Open(log *zap.Logger, withoutBPF bool) (deps agent.Deps, done func() error) {
	deps.Log = log
	deps.Usage, deps.Notes = all.Usage(log, withoutBPF)
	links, err := rtnl.Open()
	if err != nil {
		deps.Notes = append(deps.Notes, fmt.Sprintf("network use is not read: %v", err))
		return deps, func() error { return all.Close(deps.Usage) }
	}
	deps.Links = links
	return deps, func() error { return errors.Join(all.Close(deps.Usage), links.Close()) }
}

// CheckAgent returns what an agent of this configuration would refuse to start
// for, its key and polling.yaml included. It starts nothing and leaves nothing.
func CheckAgent(cfg agent.Config) error {
	cfg.Socket = ""
	_, err := agent.New(cfg, agent.Deps{Log: zap.NewNop(), Usage: []collectors.UsageReader{procfs.New(zap.NewNop())}})
	return err
}
