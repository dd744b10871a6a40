package libvirt

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors"
)

// Host knows the domains of all libvirts of a host: one in most cases, one for
// each pod or container in some. Each has a client of its own, and one that hangs
// costs nothing of the others'. A domain is known by its UUID, whose libvirt is
// asked for it.
type Host struct {
	log      *zap.Logger
	opts     Options
	patterns []string
	changes  chan struct{}
	pauses   chan Pause
	kick     chan struct{}

	mu      sync.Mutex
	members map[folder]*member
	looked  bool
	owners  map[string]*Client // of the domains that run, by UUID
	resting map[string]*Client // of those that don't
	list    atomic.Pointer[map[string]*collectors.Definition]
	idle    atomic.Pointer[[]*collectors.Definition]
}

// member is one libvirt.
type member struct {
	*Client
	stop func()
	gone time.Time // since when it has no socket and does not answer; zero: it has or does
}

// Times of the search for libvirts.
const (
	lookEvery = time.Minute      // beside when a domain is new or a libvirt lost
	lookLeast = time.Second      // between two searches
	lookAgain = 10 * time.Second // while one is away or there is none
)

// NewHost returns the libvirts whose sockets the options name; [Host.Run] connects
// them.
func NewHost(log *zap.Logger, opts Options) *Host {
	if len(opts.Sockets) == 0 {
		opts.Sockets = DefaultSockets
	}
	h := &Host{
		log: log, opts: opts, patterns: patterns(opts.Sockets),
		changes: make(chan struct{}, 1), kick: make(chan struct{}, 1), pauses: make(chan Pause, maxPauses),
		members: map[folder]*member{}, owners: map[string]*Client{}, resting: map[string]*Client{},
	}
	h.list.Store(&map[string]*collectors.Definition{})
	h.idle.Store(&[]*collectors.Definition{})
	return h
}

// Run looks for libvirts that come and go, and keeps each connected, until ctx ends.
func (h *Host) Run(ctx context.Context) {
	var clients sync.WaitGroup
	defer clients.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-h.kick:
			if wait := lookLeast - time.Since(last); wait > 0 {
				timer.Reset(wait)
				continue
			}
		}
		last = time.Now()
		next := lookEvery
		if h.look(ctx, &clients) {
			next = lookAgain
		}
		timer.Reset(next)
	}
}

// look starts clients of libvirts that are new and ends those of libvirts that are
// no more. It reports whether one is away, or there is none.
func (h *Host) look(ctx context.Context, clients *sync.WaitGroup) (away bool) {
	places := find(h.patterns)
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	there := map[folder]bool{}
	for _, p := range places {
		there[p.folder] = true
		if m := h.members[p.folder]; m != nil {
			m.use(p.sockets)
			continue
		}
		h.start(ctx, clients, p)
	}
	changed := false
	for f, m := range h.members {
		switch {
		case there[f] || m.Err() == nil:
			m.gone = time.Time{}
		case m.gone.IsZero():
			m.gone = now
		case now.Sub(m.gone) > keepFormer:
			m.stop()
			delete(h.members, f)
			changed = true
		}
		away = away || m.Err() != nil
	}
	if changed || !h.looked {
		h.looked = true
		h.merge()
	}
	return away || len(h.members) == 0
}

// start follows one more libvirt.
func (h *Host) start(ctx context.Context, clients *sync.WaitGroup, p place) {
	opts := h.opts
	opts.Sockets = p.sockets
	c := New(h.log, opts)
	c.pauses = h.pauses
	ctx, stop := context.WithCancel(ctx)
	h.members[p.folder] = &member{Client: c, stop: stop}
	clients.Go(func() { c.Run(ctx) })
	clients.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-c.Changes():
			}
			if c.Err() != nil {
				signal(h.kick)
			}
			h.mu.Lock()
			h.merge()
			h.mu.Unlock()
		}
	})
}

// merge brings together what the libvirts know. Where two know the same domain, one
// that answers goes before one that does not, and who told of it before is asked on.
func (h *Host) merge() {
	type source struct {
		*Client
		name string
		away bool
	}
	var all []source
	away := map[*Client]bool{}
	for _, m := range h.members {
		s := source{m.Client, m.sockets()[0], m.Err() != nil}
		all, away[s.Client] = append(all, s), s.away
	}
	slices.SortFunc(all, func(a, b source) int { return strings.Compare(a.name, b.name) })
	list, owners := map[string]*collectors.Definition{}, map[string]*Client{}
	for _, s := range all {
		for uuid, def := range s.Definitions() {
			owner := owners[uuid]
			better := owner == nil || away[owner] && !s.away
			if better || away[owner] == s.away && h.owners[uuid] == s.Client {
				list[uuid], owners[uuid] = def, s.Client
			}
		}
	}
	var idle []*collectors.Definition
	resting := map[string]*Client{}
	for _, s := range all {
		for _, def := range s.Stopped() {
			if list[def.UUID] == nil && resting[def.UUID] == nil {
				idle, resting[def.UUID] = append(idle, def), s.Client
			}
		}
	}
	slices.SortFunc(idle, func(a, b *collectors.Definition) int { return strings.Compare(a.UUID, b.UUID) })
	h.owners, h.resting = owners, resting
	h.list.Store(&list)
	h.idle.Store(&idle)
	signal(h.changes)
}

// Definitions returns what is known of the active domains, by UUID. The map is
// never changed; another call may return another map. Of a libvirt that is away it
// holds what was known before.
func (h *Host) Definitions() map[string]*collectors.Definition { return *h.list.Load() }

// Stopped returns what is known of the domains that do not run, by UUID. The list
// is never changed; another call may return another one.
func (h *Host) Stopped() []*collectors.Definition { return *h.idle.Load() }

// Changes receives when there is something new in Definitions, or a libvirt came
// or went.
func (h *Host) Changes() <-chan struct{} { return h.changes }

// Pauses is [Client.Pauses] of all libvirts.
func (h *Host) Pauses() <-chan Pause { return h.pauses }

// Last returns what was known last of a domain, as [Client.Last].
func (h *Host) Last(uuid string) *collectors.Definition {
	for _, m := range h.all() {
		if def := m.Last(uuid); def != nil {
			return def
		}
	}
	return nil
}

// Refresh asks for a domain soon, because it may be new: its libvirt, or where that
// is not known all of them, and those that are new themselves.
func (h *Host) Refresh(uuid string) {
	h.mu.Lock()
	owner := h.owners[uuid]
	h.mu.Unlock()
	if owner != nil {
		owner.Refresh(uuid)
		return
	}
	for _, m := range h.all() {
		m.Refresh(uuid)
	}
	signal(h.kick)
}

// Err returns nil while any libvirt answers, or where there is none and none was
// named but by patterns; else what is wrong.
func (h *Host) Err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.looked {
		return ErrNotConnected
	}
	var errs []error
	for _, m := range h.members {
		err := m.Err()
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 && !Searches(h.patterns) {
		return noSocket(h.patterns)
	}
	return errors.Join(errs...)
}

// ErrOf is [Host.Err] of the domain's libvirt.
func (h *Host) ErrOf(uuid string) error {
	if c, err := h.ownerOf(&h.owners, uuid); err == nil {
		return c.Err()
	}
	return h.Err()
}

// Away says of each libvirt that does not answer, while others do, why.
func (h *Host) Away() (errs []error) {
	if h.Err() != nil {
		return nil
	}
	for _, m := range h.all() {
		if err := m.Err(); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// all returns the libvirts that are known.
func (h *Host) all() []*member {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Values(h.members))
}

// ownerOf returns the client of the libvirt that has the domain.
func (h *Host) ownerOf(owners *map[string]*Client, uuid string) (*Client, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := (*owners)[uuid]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("%w that has the domain", ErrNotConnected)
}

// Stats is [Client.Stats] of the domain's libvirt.
func (h *Host) Stats(ctx context.Context, uuid string, groups collectors.Groups) (collectors.GuestStats, error) {
	c, err := h.ownerOf(&h.owners, uuid)
	if err != nil {
		return collectors.GuestStats{}, err
	}
	return c.Stats(ctx, uuid, groups)
}

// Sizes is [Client.Sizes] of the libvirt of a domain that does not run.
func (h *Host) Sizes(ctx context.Context, uuid, device string) (collectors.DiskStats, error) {
	c, err := h.ownerOf(&h.resting, uuid)
	if err != nil {
		return collectors.DiskStats{}, err
	}
	return c.Sizes(ctx, uuid, device)
}

// Counters is [Client.Counters] of all libvirts at once. The domains of one that does
// not answer are left out, and it is an error only if all of them are.
func (h *Host) Counters(ctx context.Context, cpu []string, nics bool) (map[string]collectors.GuestStats, error) {
	asked := map[*Client][]string{}
	h.mu.Lock()
	for _, m := range h.members {
		if nics {
			asked[m.Client] = nil
		}
	}
	for _, uuid := range cpu {
		if c := h.owners[uuid]; c != nil {
			asked[c] = append(asked[c], uuid)
		}
	}
	h.mu.Unlock()
	var mu sync.Mutex
	var errs []error
	answers := map[*Client]map[string]collectors.GuestStats{}
	var wg sync.WaitGroup
	for c, uuids := range asked {
		wg.Go(func() {
			a, err := c.Counters(ctx, uuids, nics)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
				return
			}
			answers[c] = a
		})
	}
	wg.Wait()
	if len(answers) == 0 && len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	all := map[string]collectors.GuestStats{}
	h.mu.Lock()
	defer h.mu.Unlock()
	for c, answer := range answers {
		for uuid, s := range answer {
			if h.owners[uuid] == c {
				all[uuid] = s
			}
		}
	}
	return all, nil
}
