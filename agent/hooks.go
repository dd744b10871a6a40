package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

// Profiles of the setting of that name: which hooks are attached at start.
var profiles = map[string][]string{
	"lean":     {},
	"standard": {"disk", "tcx"},
	"deep":     {"disk", "tcx", "runqueue", "exits"},
}

// hookNames lists the hooks that there are.
var hookNames = profiles["deep"]

// totals says what the kernel has counted, in all, of what a hook tallies: for
// a domain, or for one of its NICs. ok is false where it could not be read.
var totals = map[string]struct {
	meter  *sample.Meter
	domain func(*domain) (total uint64, ok bool)
	nic    func(*nic) (total uint64, ok bool)
	kvm    bool // KVM's statistics have it, which have an interval of their own
}{
	"disk": {meter: sample.CheckHookDisk, domain: func(d *domain) (uint64, bool) {
		return d.usage.last[iDiskRead] + d.usage.last[iDiskWrite], d.usage.has&(1<<iDiskRead) != 0
	}},
	"exits": {meter: sample.CheckHookExits, kvm: true, domain: func(d *domain) (uint64, bool) {
		return d.kvm.exits, d.kvm.has
	}},
	"runqueue": {meter: sample.CheckHookRunQueue, domain: func(d *domain) (uint64, bool) {
		return d.usage.last[iSwitches], d.usage.has&(1<<iSwitches) != 0
	}},
	"tcx": {meter: sample.CheckHookTCX, nic: func(k *nic) (uint64, bool) {
		// What the tap's queue has no room for was seen before.
		return k.last[iInPackets] + k.last[iInDrops] + k.last[iOutPackets], k.fault == "" && !k.lost
	}},
}

// hooks runs the hooks that could be opened. Like the domains, it is guarded by
// the agent's lock.
type hooks struct {
	log     *zap.Logger
	state   *state.File
	list    []*hook
	targets []collectors.Target
	homes   map[uint32]home // by ID
	ids     uint32          // the last that was given
	stale   bool            // the targets are not those of the domains there are
}

// home is where the counters of a resource are kept.
type home struct {
	process  sample.Incarnation
	resource sample.Incarnation
}

// hook is one of them, and what it counted.
type hook struct {
	collectors.Hook
	series  []collectors.Series
	on, was bool          // attached; was so before
	fault   string        // why nothing is counted
	partial string        // why some of the targets are not followed
	idle    string        // why it was switched off
	shed    bool          // by the brake
	since   int64         // the last reading, µs since the epoch
	reads   uint64        // how often it was read
	events  uint64        // what the tallies have grown by
	spent   time.Duration // about the CPU time of its programs
	counts  map[uint32]*counts
	layout  string // of the series: counters of others mean something else
	run     run
	self    hookMetrics
	emit    func(id uint32, series int, count uint64)
	last    *counts // that emit was called for last; nil: none in this reading
	lastID  uint32
	turns   int  // how often it was switched
	resumed bool // attached since the last reading: what went by unseen is no shortfall
}

// counts is what a hook counted of one resource.
type counts struct {
	block   *state.Block // published, by series
	told    []bool       // by series, whether the hook ever told of it
	base    []uint64     // what earlier runs of the agent had published
	read    uint64       // number of the last reading that had it
	pending uint64       // what the tally has grown by and no shortfall has seen
}

// shortfall compares a hook's tally with the kernel's total of the same.
type shortfall struct {
	total    uint64 // as last read
	known    bool   // total was read
	compared bool
	lack     int64 // what the total has grown by and the tally has not
}

// advance takes over a total, and by how much the tally has grown since the one before.
func (s *shortfall) advance(total, grown uint64) {
	if s.known {
		s.lack += int64(total-s.total) - int64(grown)
		s.compared = true
	}
	s.total, s.known = total, true
}

// newHooks attaches the hooks that the profile and the settings name. One that
// cannot be attached costs its own meters.
func newHooks(log *zap.Logger, m *metrics, kept *state.File, open []collectors.Hook, cfg *Config) *hooks {
	hs := &hooks{log: log, state: kept, stale: true}
	for _, o := range open {
		h := &hook{
			Hook: o, series: o.Series(), counts: map[uint32]*counts{},
			run: m.collector(o.Name()), self: m.hook(o.Name()),
		}
		for _, s := range h.series {
			h.layout += s.Name + "\n"
		}
		h.emit = func(id uint32, series int, count uint64) { hs.take(h, id, series, count) }
		hs.list = append(hs.list, h)
		if cfg.hookOn(h.Name()) {
			if err := hs.turn(h, true); err != nil {
				log.Warn("hook refused", zap.String("hook", h.Name()), zap.Error(err))
			}
		}
	}
	return hs
}

// find returns the hook of that name, or nil.
func (hs *hooks) find(name string) *hook {
	for _, h := range hs.list {
		if h.Name() == name {
			return h
		}
	}
	return nil
}

// turn switches a hook on or off.
func (hs *hooks) turn(h *hook, on bool) (err error) {
	switch {
	case on == h.on:
		return nil
	case on:
		err = h.Attach()
	default:
		err = h.Detach()
	}
	h.fault, h.partial, h.idle = "", "", "switched off"
	if err != nil {
		h.fault = err.Error()
		return err
	}
	h.shed = false
	h.on, h.was, h.resumed = on, h.was || on, on
	h.turns++
	hs.stale = hs.stale || on
	h.self.attached.Set(0)
	if on {
		h.self.attached.Set(1)
	}
	hs.log.Info("hook switched", zap.String("hook", h.Name()), zap.Bool("on", on))
	return nil
}

// trouble says why the hook does not count all that it was meant to.
func (h *hook) trouble() string {
	if h.shed {
		return h.idle
	}
	return cmp.Or(h.fault, h.partial)
}

// tell describes the hook for the local socket.
func (h *hook) tell() client.Hook {
	s := h.Stats()
	return client.Hook{
		Name: h.Name(), On: h.on, Fault: h.trouble(),
		Events: h.events, Misses: s.Misses, Dropped: s.Dropped, Orphans: s.Orphans,
		Entries: s.Entries, MaxEntries: s.MaxEntries,
	}
}

// notes says which hooks that were asked for do not count, and why.
func (hs *hooks) notes() []string {
	var notes []string
	for _, h := range hs.list {
		if why := h.trouble(); why != "" {
			notes = append(notes, fmt.Sprintf("the hook %s does not count all that it should: %s", h.Name(), why))
		}
	}
	return notes
}

// count reports whether a hook counts the meter to the end of what it follows.
func (hs *hooks) count(m *sample.Meter) bool {
	return slices.ContainsFunc(hs.list, func(h *hook) bool {
		return h.on && h.fault == "" && slices.ContainsFunc(h.series, func(s collectors.Series) bool { return s.Meter == m })
	})
}

// id returns an ID that was not given before.
func (hs *hooks) id() uint32 {
	hs.ids++
	return hs.ids
}

// follow tells the hooks which domains there are, if that has changed.
func (hs *hooks) follow(domains []*domain) {
	if !hs.stale || len(hs.list) == 0 {
		return
	}
	hs.stale = false
	hs.targets = hs.targets[:0]
	hs.homes = map[uint32]home{}
	for _, d := range domains {
		if !d.ready || d.replaced {
			continue
		}
		if d.id == 0 {
			d.id = hs.id()
			d.short = make([]shortfall, len(hs.list))
		}
		hs.homes[d.id] = home{d.owner, d.incarnation}
		t := collectors.Target{ID: d.id, Proc: d.proc}
		for i := range d.nics {
			k := &d.nics[i]
			if k.index == 0 || k.macvtap {
				continue
			}
			if k.id == 0 {
				k.id = hs.id()
				k.short = make([]shortfall, len(hs.list))
			}
			hs.homes[k.id] = home{d.owner, k.row.Incarnation}
			t.NICs = append(t.NICs, collectors.TargetNIC{ID: k.id, Index: k.index})
		}
		for i := range d.disks {
			k := &d.disks[i]
			if k.id == 0 {
				k.id = hs.id()
			}
			hs.homes[k.id] = home{d.owner, k.row.Incarnation}
			t.Disks = append(t.Disks, collectors.TargetDisk{ID: k.id, Device: k.device, Sources: k.sources, Direct: k.direct})
		}
		hs.targets = append(hs.targets, t)
	}
	for _, h := range hs.list {
		for id, c := range h.counts {
			if _, ok := hs.homes[id]; !ok {
				c.block.Drop()
				delete(h.counts, id)
			}
		}
		if !h.on {
			continue
		}
		h.partial = ""
		if err := h.Follow(hs.targets); err != nil {
			h.partial = err.Error()
			hs.log.Warn("hook cannot follow all domains", zap.String("hook", h.Name()), zap.Error(err))
		}
	}
}

// fresh says which of the kernel's totals were read just now.
type fresh struct{ usage, links, kvm bool }

// read reads the hooks that are asked for, right after the kernel's totals.
func (hs *hooks) read(ctx context.Context, asked []taskHook, domains []*domain, got fresh, now int64) {
	for n, h := range hs.list {
		if !slices.ContainsFunc(asked, func(t taskHook) bool { return t.hook == h }) || !h.on {
			continue
		}
		start := h.run.begin()
		h.reads++
		h.last = nil
		err := h.Read(ctx, h.emit)
		h.run.done(start, err)
		h.self.count(h.Stats())
		if err != nil {
			h.fault = err.Error()
			continue
		}
		h.fault, h.since = "", now
		for _, c := range h.counts {
			c.block.Commit()
		}
		hs.compare(n, domains, got)
	}
}

// compare holds the tallies of hook n against the kernel's totals.
func (hs *hooks) compare(n int, domains []*domain, got fresh) {
	h := hs.list[n]
	total := totals[h.Name()]
	usage, links := total.domain != nil && got.usage, total.nic != nil && got.links
	if total.kvm {
		usage = got.kvm
	}
	for _, d := range domains {
		if usage && d.id != 0 && d.fault == "" {
			if v, ok := total.domain(d); ok {
				d.short[n].known = d.short[n].known && !h.resumed
				d.short[n].advance(v, h.grown(d))
			}
		}
		for i := range d.nics {
			if k := &d.nics[i]; links && k.id != 0 {
				if v, ok := total.nic(k); ok {
					// A hook may need a while to begin with a NIC.
					k.short[n].known = k.short[n].known && !h.resumed && h.has(k.id)
					k.short[n].advance(v, h.settle(k.id))
				}
			}
		}
	}
	if usage || links {
		h.resumed = false
	}
}

// grown returns what the tally of a domain and its devices has grown by.
func (h *hook) grown(d *domain) uint64 {
	n := h.settle(d.id)
	for i := range d.disks {
		n += h.settle(d.disks[i].id)
	}
	return n
}

// has says whether the last reading had the resource.
func (h *hook) has(id uint32) bool {
	c := h.counts[id]
	return c != nil && c.read == h.reads
}

// settle returns what the tally of a resource has grown by since the last call.
func (h *hook) settle(id uint32) uint64 {
	c := h.counts[id]
	if c == nil {
		return 0
	}
	n := c.pending
	c.pending = 0
	return n
}

// take takes over a counter that the hook has read.
func (hs *hooks) take(h *hook, id uint32, series int, count uint64) {
	c := h.last
	if c == nil || h.lastID != id {
		if c = h.counts[id]; c == nil {
			at, ok := hs.homes[id]
			if !ok {
				return
			}
			key := state.KeyOf("hook", h.Name(), h.layout, at.resource.String())
			c = &counts{block: hs.state.Block(at.process, key, len(h.series)), told: make([]bool, len(h.series))}
			c.base = slices.Clone(c.block.Words)
			h.counts[id] = c
		}
		h.last, h.lastID = c, id
		c.read = h.reads
	}
	c.told[series] = true
	count += c.base[series]
	published := &c.block.Words[series]
	if count <= *published {
		return
	}
	grown := count - *published
	h.spent += time.Duration(grown) * h.series[series].Cost
	if h.series[series].Tally {
		c.pending += grown
		h.events += grown
		h.self.events.Add(float64(grown))
	}
	*published = count
}

// taskHook is what a task asks of a hook.
type taskHook struct {
	*hook
	n      int // among the agent's
	series []int
	check  *sample.Meter // of the shortfall; nil: not asked for
}

// asked returns what the meters ask of the hooks.
func (hs *hooks) asked(meters []*sample.Meter) []taskHook {
	var all []taskHook
	for n, h := range hs.list {
		t := taskHook{hook: h, n: n}
		for i, s := range h.series {
			if s.Meter != nil && slices.Contains(meters, s.Meter) {
				t.series = append(t.series, i)
			}
		}
		if m := totals[h.Name()].meter; m != nil && slices.Contains(meters, m) {
			t.check = m
		}
		if len(t.series) > 0 || t.check != nil {
			all = append(all, t)
		}
	}
	return all
}

// of returns what was counted of the resource in the last reading, or nil.
func (t *taskHook) of(id uint32) *counts {
	if c := t.counts[id]; c != nil && c.read == t.reads && t.on && t.fault == "" {
		return c
	}
	return nil
}

// lacks returns the shortfall to publish, or nil.
func (t *taskHook) lacks(short []shortfall) *shortfall {
	if t.check != nil && t.on && t.fault == "" && short != nil && short[t.n].compared {
		return &short[t.n]
	}
	return nil
}

// hooked returns how many samples the hooks have of a resource at most.
func (t *task) hooked(id uint32, short []shortfall) int {
	n := 0
	for i := range t.hooks {
		if t.hooks[i].of(id) != nil {
			n += len(t.hooks[i].series)
		}
		if t.hooks[i].lacks(short) != nil {
			n++
		}
	}
	return n
}

// emitHooks adds what the hooks counted of a resource to the newest row.
func (t *task) emitHooks(id uint32, short []shortfall) {
	for i := range t.hooks {
		h := &t.hooks[i]
		if c := h.of(id); c != nil {
			for _, s := range h.series {
				m, v := &h.hook.series[s], c.block.Words[s]
				if v != 0 || c.told[s] && m.Meter.Parts == "" {
					t.builder.Add(m.MeterRef, h.Origin(), sample.Uint(v))
				}
			}
		}
		if s := h.lacks(short); s != nil {
			t.builder.Add(h.check.MeterRef, h.Origin(), sample.Int(s.lack))
		}
	}
}

// emitHooked adds a row of what the hooks counted of a resource, if they did.
func (a *Agent) emitHooked(t *task, id uint32, r *sample.Row, base int64) {
	if n := t.hooked(id, nil); n > 0 {
		a.row(t, r, n, base)
		t.emitHooks(id, nil)
	}
}

// missHooks notes which hooks that once counted could not be read.
func (t *task) missHooks(now int64) {
	for i := range t.hooks {
		h := &t.hooks[i]
		why := h.fault
		if !h.on {
			why = h.idle
		}
		if why == "" || !h.was {
			continue
		}
		for n, s := range h.series {
			m := h.hook.series[s].Meter
			if n == 0 || m != h.hook.series[h.series[n-1]].Meter {
				t.gaps.miss(m.Name, "*", t.since(h.since, now), now, "hook "+h.Name()+": "+why)
			}
		}
	}
}
