// Package host opens what an agent reads on its host.
package host

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
)

// Open opens the readers that this host, kernel and user allow, for an agent
// of that profile that gets a log and notes of what cannot be read. The function
// it returns closes them.
func Open(log *zap.Logger, profile string, withoutBPF bool) (deps agent.Deps, done func() error) {
	deps.Log = log
	deps.Usage, deps.Notes = all.Usage(log, withoutBPF)
	if !withoutBPF {
		var missing []all.Missing
		deps.Hooks, missing = all.Hooks(log, profile == "deep")
		deps.Notes = append(deps.Notes, hookNotes(missing)...)
	}
	kvm, err := all.KVM(withoutBPF)
	if err != nil {
		deps.Notes = append(deps.Notes, fmt.Sprintf("kvm.* cannot be collected: %v", err))
	} else {
		deps.KVM = kvm
	}
	links, err := rtnl.Open()
	if err != nil {
		deps.Notes = append(deps.Notes, fmt.Sprintf("network use is not read: %v", err))
	} else {
		deps.Links = links
	}
	return deps, func() error {
		err := errors.Join(all.Close(deps.Usage), all.Close(deps.Hooks))
		if kvm != nil {
			err = errors.Join(err, kvm.Close())
		}
		if links != nil {
			err = errors.Join(err, links.Close())
		}
		return err
	}
}

// hookNotes says which hooks cannot be used, those for the same cause in one note.
func hookNotes(missing []all.Missing) (notes []string) {
	for len(missing) > 0 {
		first := missing[0]
		var names, meters []string
		missing = slices.DeleteFunc(slices.Clone(missing), func(h all.Missing) bool {
			if h.Name != first.Name && !sameCause(h.Err, first.Err) {
				return false
			}
			names, meters = append(names, h.Name), append(meters, h.Meters()...)
			return true
		})
		hooks := "hook "
		if len(names) > 1 {
			hooks = "hooks "
		}
		notes = append(notes, fmt.Sprintf("the %s%s cannot be used, which costs %s: %v", hooks, strings.Join(names, ", "), strings.Join(meters, ", "), first.Err))
	}
	return notes
}

// sameCause reports whether what keeps all BPF programs from being loaded is
// behind both.
func sameCause(a, b error) bool {
	return slices.ContainsFunc([]error{bpf.ErrNoBTF, bpf.ErrNoCapability, bpf.ErrRefused, bpf.ErrPIDNamespace}, func(cause error) bool {
		return errors.Is(a, cause) && errors.Is(b, cause)
	})
}

// OpenLife opens the hooks that account domains at their end, for an agent of
// the configuration that will run. The function it returns closes them; what is
// pinned stays.
func OpenLife(deps *agent.Deps, cfg agent.Config) (done func() error) {
	life, notes := all.Life(cfg.Pins)
	deps.Notes = append(deps.Notes, notes...)
	if life == nil {
		return func() error { return nil }
	}
	deps.Life = life
	return life.Close
}

// CheckAgent returns what an agent of this configuration would refuse to start
// for, its key and polling.yaml included. It starts nothing and leaves nothing.
func CheckAgent(cfg agent.Config) error {
	cfg.Socket, cfg.Counters = "", ""
	_, err := agent.New(cfg, agent.Deps{Log: zap.NewNop(), Usage: []collectors.UsageReader{procfs.New(zap.NewNop())}})
	return err
}
