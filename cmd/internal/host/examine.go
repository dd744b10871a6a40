package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// Part is something that an agent reads its host by.
type Part struct {
	Name  string   `json:"part"`
	State string   `json:"state"`           // ok, worse (something else stands in), missing, or wrong
	By    string   `json:"by,omitempty"`    // who does it
	Why   string   `json:"why,omitempty"`   // it is not ok, and what to do
	Costs []string `json:"costs,omitempty"` // names and patterns of meters that are missing for it, as in polling.yaml
}

// The states of a part.
const (
	ok      = "ok"
	worse   = "worse"
	missing = "missing"
	wrong   = "wrong"
)

// Examine says what this host offers an agent of the configuration, for this
// user. It loads what the agent would load, attaches nothing and leaves nothing.
func Examine(ctx context.Context, log *zap.Logger, cfg agent.Config, withoutBPF bool) []Part {
	x := examination{have: map[sample.Origin]bool{}}
	x.kernel()
	x.capabilities()
	x.usage(log, withoutBPF)
	if !withoutBPF {
		x.hooks(log)
		x.life()
		x.kvm()
	}
	x.links()
	x.hardware(ctx, cfg)
	x.libvirt(ctx, cfg)
	for i := range x.parts {
		if p := &x.parts[i]; p.State == missing {
			p.Costs = x.costs(p.origins)
		}
	}
	parts := make([]Part, len(x.parts))
	for i := range x.parts {
		parts[i] = x.parts[i].Part
	}
	return parts
}

// Configuration is the part about the agent's configuration: what it would refuse to
// start for, if anything, and what else is odd.
func Configuration(file string, err error, notes []string) Part {
	p := Part{Name: "configuration", State: ok, By: file}
	switch {
	case err != nil:
		p.State, p.Why = wrong, fmt.Sprintf("the agent would not start: %v", err)
	case len(notes) > 0:
		p.State, p.Why = worse, strings.Join(notes, "\n  ")
	}
	return p
}

type examination struct {
	parts []examined
	have  map[sample.Origin]bool
}

type examined struct {
	Part
	origins []sample.Origin
}

func (x *examination) add(name, by string, err error, origins ...sample.Origin) {
	e := examined{Part{Name: name, State: ok, By: by}, origins}
	if err != nil {
		e.State, e.Why = missing, err.Error()
	}
	for _, o := range origins {
		x.have[o] = x.have[o] || err == nil
	}
	x.parts = append(x.parts, e)
}

func (x *examination) kernel() {
	var name unix.Utsname
	release := "unknown"
	if err := unix.Uname(&name); err == nil {
		release = unix.ByteSliceToString(name.Release[:])
	}
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	if err != nil {
		err = errors.New("the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF), so that no BPF program can be loaded")
	}
	x.add("kernel", "Linux "+release, err)
}

// capabilities that are of use to the agent.
var capabilities = []struct {
	bit  int
	name string
}{
	{unix.CAP_BPF, "CAP_BPF"},
	{unix.CAP_PERFMON, "CAP_PERFMON"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"},
}

func (x *examination) capabilities() {
	var have []string
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	for _, c := range capabilities {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) != 0 {
			have = append(have, c.name)
		}
	}
	x.add("capabilities", cmp.Or(strings.Join(have, " "), "none of use"), err)
}

func (x *examination) usage(log *zap.Logger, withoutBPF bool) {
	readers, notes := all.Usage(log, withoutBPF)
	defer func() { _ = all.Close(readers) }()
	origin := sample.Origin(readers[0].Origin())
	x.add("processes", string(origin), nil, origin)
	if len(notes) > 0 {
		p := &x.parts[len(x.parts)-1]
		p.State, p.Why = worse, strings.Join(notes, "; ")
	}
}

func (x *examination) hooks(log *zap.Logger) {
	open, none := all.Hooks(log, false)
	for _, h := range open {
		x.add("hook "+h.Name(), string(h.Origin()), h.Close(), h.Origin())
	}
	for _, h := range none {
		x.add("hook "+h.Name, "", h.Err, h.Origin)
	}
}

// life are the hooks without which what domains use after their last sample is
// missing.
func (x *examination) life() {
	err, by := bpf.CheckLife(), string(sample.Free)
	if err != nil {
		by, err = "", fmt.Errorf("domains are not accounted at their end, and what they use after their last sample is a gap: %w", err)
	}
	x.add("hooks life", by, err, sample.Free)
}

func (x *examination) kvm() {
	by := ""
	programs, err := all.KVM(false)
	if err == nil {
		by, err = string(sample.KVM), programs.Close()
	}
	x.add("KVM", by, err, sample.KVM)
}

func (x *examination) links() {
	links, err := rtnl.Open()
	if err == nil {
		err = links.Close()
	}
	x.add("network", "netlink", err, sample.RTNL)
}

func (x *examination) hardware(ctx context.Context, cfg agent.Config) {
	if cfg.IPMI.Device == "" {
		x.add("BMC", "", errors.New("it is switched off"), sample.IPMI)
		return
	}
	by := ""
	device, err := bmc.Open(cfg.IPMI.Device)
	if err == nil {
		var d bmc.Device
		d, err = bmc.New(device).DeviceID(ctx, bmc.Addr{})
		by = fmt.Sprintf("IPMI %s, firmware %s", d.IPMI, d.Firmware)
		err = errors.Join(err, device.Close())
	}
	x.add("BMC", by, err, sample.IPMI)
}

func (x *examination) libvirt(ctx context.Context, cfg agent.Config) {
	if len(cfg.Libvirt) == 0 {
		x.add("libvirt", "", errors.New("it is switched off"), sample.Libvirt)
		return
	}
	by, err := libvirt.Probe(ctx, libvirt.Options{Sockets: cfg.Libvirt, Timeout: cfg.LibvirtTimeout})
	if err != nil {
		err = fmt.Errorf("%w; domains have no project, user or display name either", err)
	}
	x.add("libvirt", by, err, sample.Libvirt)
}

// costs lists the meters that one of the origins counts and nobody here does.
func (x *examination) costs(origins []sample.Origin) []string {
	var names []string
	for _, m := range sample.Catalogue {
		counts := func(o sample.Origin) bool { return x.have[o] }
		if slices.ContainsFunc(m.Origins, counts) || !slices.ContainsFunc(m.Origins, func(o sample.Origin) bool { return slices.Contains(origins, o) }) {
			continue
		}
		names = append(names, m.Name)
	}
	return fold(names)
}

// fold has patterns stand for the meters that begin alike, where there are several and
// none is left out.
func fold(names []string) (folded []string) {
	for _, name := range names {
		short := name
		for i := range name {
			if name[i] == '.' && short == name {
				alike, missing := 0, 0
				for _, m := range sample.Catalogue {
					if strings.HasPrefix(m.Name, name[:i+1]) {
						alike++
						if slices.Contains(names, m.Name) {
							missing++
						}
					}
				}
				if alike > 1 && alike == missing {
					short = name[:i+1] + "*"
				}
			}
		}
		if !slices.Contains(folded, short) {
			folded = append(folded, short)
		}
	}
	return folded
}
