// Package libvirt knows the running domains of a libvirt daemon: who they
// are, and the counters that only libvirt and QEMU have. It needs no more than
// a read-only socket, and whatever hangs in libvirt costs only what libvirt
// would have said.
package libvirt

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors"
)

// DefaultSockets are the read-only sockets of the monolithic and of the modular
// daemon.
var DefaultSockets = []string{"/run/libvirt/libvirt-sock-ro", "/run/libvirt/virtqemud-sock-ro"}

// What [Client.Stats] refuses.
var (
	// ErrNotConnected says that no libvirt daemon answers now.
	ErrNotConnected = errors.New("not connected to libvirt")
	// ErrBusy says that QEMU's monitor does not answer libvirt, or is in use.
	ErrBusy = errors.New("QEMU's monitor is busy or stuck")
	// ErrManyStuck says that so many QEMUs do not answer libvirt that no other is
	// asked: each of them holds one of libvirt's threads.
	ErrManyStuck = fmt.Errorf("%d other QEMUs do not answer libvirt; none is asked until one does", maxStuck)
)

// Times of the synchronisation.
const (
	syncEvery  = time.Minute // list of the active domains
	trustXML   = time.Hour   // a definition without an event
	keepFormer = time.Minute // a definition of a domain that is no more
	debounce   = 50 * time.Millisecond
	retryFirst = time.Second
	retryLast  = 30 * time.Second
	maxPauses  = 256
	maxStuck   = 3 // calls given up, of the 5 that libvirt takes at once from a client and the 20 that it works on
)

// Options say where libvirt is.
type Options struct {
	Sockets []string      // tried in order; empty: [DefaultSockets]
	Host    string        // node name, for Nova's host id
	Timeout time.Duration // of every call; 0: 5 s

	FlavorIDs map[string]string // of Nova's flavors, by name, where the metadata has none

	// Where the owner of a domain that Nova did not make is, and the user metadata
	// of each: empty for nowhere.
	OwnerProject, OwnerUser, UserMetadata Path
	// Which user metadata is kept, as Ceilometer's options reserved_metadata_*.
	Reserved Reserved
}

// Client keeps a connection to libvirt and what is known of its domains.
type Client struct {
	log     *zap.Logger
	opts    Options
	seed    maphash.Seed
	changes chan struct{}
	kick    chan struct{}
	pauses  chan Pause

	asking sync.Mutex // held while asks is dialled

	mu     sync.Mutex
	link   *link // for events and definitions; nil: not connected
	asks   *link // for what a stuck QEMU may hold up; nil: not connected
	err    error // why not
	synced bool  // the list was complete at least once on this connection
	defs   map[string]entry
	off    map[string]*collectors.Definition // of domains that do not run, by UUID; nil: its XML cannot be read
	former map[string]former                 // of domains that were undefined a short time ago
	dirty  map[string]bool                   // UUIDs to ask for
	stuck  map[string]bool                   // UUIDs whose last Stats is not answered yet
	slow   map[string]bool                   // UUIDs that libvirt is being asked for; true: nobody waits for the answer any more
	list   atomic.Pointer[map[string]*collectors.Definition]
	idle   atomic.Pointer[[]*collectors.Definition]
}

type entry struct {
	def   *collectors.Definition // nil: its XML cannot be read
	text  uint64                 // hash of the XML that def was made of
	state golibvirt.DomainState
	id    int32 // libvirt's id of this run of the domain
	asked time.Time
}

// former is what was known of a domain when it was undefined.
type former struct {
	def *collectors.Definition
	at  time.Time
}

// New returns a client; [Client.Run] connects it.
func New(log *zap.Logger, opts Options) *Client {
	if len(opts.Sockets) == 0 {
		opts.Sockets = DefaultSockets
	}
	if opts.Timeout == 0 {
		opts.Timeout = 5 * time.Second
	}
	c := &Client{
		log: log, opts: opts, err: ErrNotConnected, seed: maphash.MakeSeed(),
		changes: make(chan struct{}, 1), kick: make(chan struct{}, 1), pauses: make(chan Pause, maxPauses),
		defs: map[string]entry{}, off: map[string]*collectors.Definition{}, former: map[string]former{}, dirty: map[string]bool{}, stuck: map[string]bool{}, slow: map[string]bool{},
	}
	c.list.Store(&map[string]*collectors.Definition{})
	c.idle.Store(&[]*collectors.Definition{})
	return c
}

// Definitions returns what is known of the active domains, by UUID. The map is
// never changed; another call may return another map. While libvirt is away it
// holds what was known before.
func (c *Client) Definitions() map[string]*collectors.Definition { return *c.list.Load() }

// Stopped returns what is known of the domains that do not run, by UUID. The list
// is never changed; another call may return another one.
func (c *Client) Stopped() []*collectors.Definition { return *c.idle.Load() }

// Last returns what was known last of a domain: also of one that was undefined
// within the last minute. It returns nil if that is nothing.
func (c *Client) Last(uuid string) *collectors.Definition {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last(uuid)
}

func (c *Client) last(uuid string) *collectors.Definition {
	return cmp.Or(c.defs[uuid].def, c.off[uuid], c.former[uuid].def)
}

// undefined keeps what was known of a domain for a while: it may have ended just
// now.
func (c *Client) undefined(uuid string) {
	now := time.Now()
	maps.DeleteFunc(c.former, func(_ string, f former) bool { return now.Sub(f.at) > keepFormer })
	if def := c.last(uuid); def != nil {
		c.former[uuid] = former{def, now}
	}
	delete(c.defs, uuid)
	delete(c.off, uuid)
}

// Changes receives when there is something new in Definitions, or libvirt came
// or went.
func (c *Client) Changes() <-chan struct{} { return c.changes }

// Pause says that a domain's vCPUs were stopped, or that they run again.
type Pause struct {
	UUID string
	Over bool
}

// Pauses receives what libvirt tells of pauses. Before a migration, a save or a
// snapshot takes a domain away its vCPUs are stopped: only then can it be asked for
// what it has counted in all. Receive soon: of many at once some are left out, of
// those that are over none.
func (c *Client) Pauses() <-chan Pause { return c.pauses }

// pause hands on what an event says of a domain's vCPUs, until ctx ends.
func (c *Client) pause(ctx context.Context, e any) {
	l, ok := e.(*golibvirt.DomainEventCallbackLifecycleMsg)
	if !ok {
		return
	}
	p := Pause{UUID: formatUUID(l.Msg.Dom.UUID)}
	switch golibvirt.DomainEventType(l.Msg.Event) {
	case golibvirt.DomainEventSuspended:
		select {
		case c.pauses <- p:
		default:
		}
	case golibvirt.DomainEventResumed:
		p.Over = true
		select {
		case c.pauses <- p:
		case <-ctx.Done():
		}
	}
}

// Err returns nil while the client is connected and knows the domains, and
// else what is wrong.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Refresh asks libvirt for a domain soon, because it may be new.
func (c *Client) Refresh(uuid string) {
	c.mu.Lock()
	c.dirty[uuid] = true
	c.mu.Unlock()
	signal(c.kick)
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// use changes where libvirt's sockets are, from the next connection on.
func (c *Client) use(sockets []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opts.Sockets = sockets
}

func (c *Client) sockets() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.opts.Sockets
}

// Run keeps the client connected until ctx ends.
func (c *Client) Run(ctx context.Context) {
	wait := retryFirst
	for ctx.Err() == nil {
		k, err := dial(ctx, c.sockets(), c.opts.Timeout)
		if err == nil {
			start := time.Now()
			err = c.serve(ctx, k)
			c.drop(err)
			k.close()
			if time.Since(start) > retryLast {
				wait = retryFirst
			}
		} else {
			c.drop(err)
		}
		if ctx.Err() != nil {
			return
		}
		c.log.Debug("libvirt is away", zap.Error(err), zap.Duration("retry", wait))
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait/2)):
		}
		wait = min(2*wait, retryLast)
	}
}

// drop forgets the connection, and keeps what is known of the domains.
func (c *Client) drop(err error) {
	c.mu.Lock()
	lost := c.link != nil
	asks := c.asks
	c.link, c.asks, c.err, c.synced = nil, nil, err, false
	clear(c.dirty)
	c.mu.Unlock()
	if asks != nil {
		asks.close()
	}
	if lost && !errors.Is(err, context.Canceled) {
		c.log.Warn("lost libvirt; domains keep what was known of them", zap.Error(err))
	}
	signal(c.changes)
}

// serve follows the domains over one connection until it is lost.
func (c *Client) serve(ctx context.Context, k *link) error {
	for _, id := range []golibvirt.DomainEventID{
		golibvirt.DomainEventIDLifecycle, golibvirt.DomainEventIDDeviceAdded,
		golibvirt.DomainEventIDDeviceRemoved, golibvirt.DomainEventIDMetadataChange,
		golibvirt.DomainEventIDBalloonChange, golibvirt.DomainEventIDBlockJob2, golibvirt.DomainEventIDTrayChange,
	} {
		err := k.subscribe(ctx, id, func(d golibvirt.Domain, event any) {
			c.Refresh(formatUUID(d.UUID))
			c.pause(k.ctx, event)
		})
		if err != nil {
			return fmt.Errorf("subscribe to libvirt's events: %w", err)
		}
	}
	tick := time.NewTicker(syncEvery)
	defer tick.Stop()
	for full := true; ; {
		if full {
			if err := c.syncAll(ctx, k); err != nil {
				return err
			}
		}
		if err := c.syncDirty(ctx, k); err != nil {
			return err
		}
		full = false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-k.conn.dead:
			return errClosed
		case <-tick.C:
			full = true
		case <-c.kick:
			// A start or a hot-plug comes as several events.
			select {
			case <-time.After(debounce):
			case <-ctx.Done():
			}
		}
	}
}

// syncAll lists the active domains, and marks those as dirty that it does not
// know well enough: on a new connection all, since events may have been missed.
func (c *Client) syncAll(ctx context.Context, k *link) error {
	var stats []golibvirt.DomainStatsRecord
	err := k.call(ctx, func() (err error) {
		// The state group asks no QEMU, and is one call for all domains.
		stats, err = k.ConnectGetAllDomainStats(nil, uint32(golibvirt.DomainStatsState),
			uint32(golibvirt.ConnectGetAllDomainsStatsActive|golibvirt.ConnectGetAllDomainsStatsNowait))
		return err
	})
	var idle []golibvirt.Domain
	if err == nil {
		err = k.call(ctx, func() (err error) {
			idle, _, err = k.ConnectListAllDomains(1, golibvirt.ConnectListDomainsInactive)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("list libvirt's domains: %w", err)
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	active := make(map[string]bool, len(stats))
	for _, s := range stats {
		uuid := formatUUID(s.Dom.UUID)
		active[uuid] = true
		e, known := c.defs[uuid]
		if !c.synced || !known || e.id != s.Dom.ID || e.state != stateOf(s.Params) || now.Sub(e.asked) > trustXML {
			c.dirty[uuid] = true
		}
	}
	for uuid := range c.defs {
		if !active[uuid] {
			c.undefined(uuid)
		}
	}
	inactive := make(map[string]bool, len(idle))
	for _, d := range idle {
		uuid := formatUUID(d.UUID)
		inactive[uuid] = true
		if _, known := c.off[uuid]; !known || !c.synced {
			c.dirty[uuid] = true
		}
	}
	for uuid := range c.off {
		if !inactive[uuid] {
			c.undefined(uuid)
		}
	}
	c.link = k
	return nil
}

func stateOf(params []golibvirt.TypedParam) golibvirt.DomainState {
	for _, p := range params {
		if p.Field == golibvirt.DomainStatsStateState {
			if v, ok := p.Value.I.(int32); ok {
				return golibvirt.DomainState(v)
			}
		}
	}
	return golibvirt.DomainNostate
}

// syncDirty asks for the domains that may have changed.
func (c *Client) syncDirty(ctx context.Context, k *link) error {
	c.mu.Lock()
	dirty := c.dirty
	c.dirty = map[string]bool{}
	c.mu.Unlock()
	for uuid := range dirty {
		if err := c.syncDomain(ctx, k, uuid); err != nil {
			return err
		}
	}
	c.mu.Lock()
	list := make(map[string]*collectors.Definition, len(c.defs))
	for uuid, e := range c.defs {
		if e.def != nil {
			list[uuid] = e.def
		}
	}
	off := make([]*collectors.Definition, 0, len(c.off))
	for _, uuid := range slices.Sorted(maps.Keys(c.off)) {
		if def := c.off[uuid]; def != nil {
			off = append(off, def)
		}
	}
	c.idle.Store(&off)
	old := c.list.Swap(&list)
	first := !c.synced
	c.synced, c.err = true, nil
	c.mu.Unlock()
	if first {
		c.log.Info("connected to libvirt", zap.String("socket", k.path), zap.Int("domains", len(list)))
	}
	if first || !maps.Equal(*old, list) {
		signal(c.changes)
	}
	return nil
}

// syncDomain asks for one domain. It returns an error only if libvirt does not
// answer; what is wrong with the domain costs the domain's definition only.
func (c *Client) syncDomain(ctx context.Context, k *link, uuid string) error {
	id, ok := parseUUID(uuid)
	if !ok {
		return nil
	}
	if !c.begin(uuid) {
		return nil // it is asked for again once libvirt has answered
	}
	var e entry
	var text string
	err := k.call(ctx, func() error {
		defer c.finish(uuid)
		dom, err := k.DomainLookupByUUID(id)
		if err != nil {
			return err
		}
		state, _, err := k.DomainGetState(dom, 0)
		if err != nil {
			return err
		}
		e.id, e.state = dom.ID, golibvirt.DomainState(state)
		text, err = k.DomainGetXMLDesc(dom, 0)
		return err
	})
	var refused golibvirt.Error
	switch {
	case errors.Is(err, errTimeout) && c.giveUp(ctx, k, uuid):
		c.log.Warn("libvirt does not tell of a domain; it is busy with it", zap.String("domain", uuid), zap.Error(err))
		return nil
	case errors.As(err, &refused) && !golibvirt.IsNotFound(err):
		c.log.Warn("libvirt tells nothing of a domain", zap.String("domain", uuid), zap.Error(err))
		return nil
	case err != nil && !golibvirt.IsNotFound(err):
		return fmt.Errorf("ask libvirt for domain %s: %w", uuid, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil { // it is not defined any more
		c.undefined(uuid)
		return nil
	}
	old, known := c.defs[uuid]
	delete(c.off, uuid)
	if e.id < 0 {
		delete(c.defs, uuid)
		c.off[uuid] = c.parse(uuid, text, e.state)
		return nil
	}
	e.asked, e.def, e.text = time.Now(), old.def, maphash.String(c.seed, text)
	if !known || old.text != e.text || old.state != e.state {
		e.def = c.parse(uuid, text, e.state)
	}
	c.defs[uuid] = e
	return nil
}

// parse makes a definition of a domain's XML, or logs why that cannot be and returns
// nil.
func (c *Client) parse(uuid, text string, state golibvirt.DomainState) *collectors.Definition {
	def, err := parse([]byte(text), state, &c.opts)
	if err != nil {
		c.log.Warn("domain without its definition: it is metered without project, user, display name and what libvirt knows of its devices",
			zap.String("domain", uuid), zap.Error(err))
		return nil
	}
	return def
}

// begin notes that libvirt is asked for a domain, unless it still is.
func (c *Client) begin(uuid string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.slow[uuid] {
		return false
	}
	c.slow[uuid] = false
	return true
}

// finish notes that libvirt has answered, and asks again where nobody waited.
func (c *Client) finish(uuid string) {
	c.mu.Lock()
	again := c.slow[uuid]
	delete(c.slow, uuid)
	c.mu.Unlock()
	if again {
		c.Refresh(uuid)
	}
}

// giveUp waits no longer for what libvirt tells of one domain, which it holds
// locked while it starts it, for one. It returns false if libvirt does not answer
// at all, or has left too much unanswered.
func (c *Client) giveUp(ctx context.Context, k *link, uuid string) bool {
	if k.call(ctx, func() error { _, err := k.ConnectGetLibVersion(); return err }) != nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	waiting := 1
	for _, left := range c.slow {
		if left {
			waiting++
		}
	}
	if waiting > maxStuck {
		return false
	}
	if _, asked := c.slow[uuid]; asked {
		c.slow[uuid] = true
	} else {
		c.dirty[uuid] = true // it has answered just now
		signal(c.kick)
	}
	return true
}

// Stats asks libvirt for groups of statistics of a domain. Those that make QEMU
// work cost 1 to 3 ms of CPU in it and libvirt. A domain whose QEMU does not
// answer costs one call's time, and is then refused with [ErrBusy] until it
// does. Beside ErrBusy there may be statistics that no monitor was needed for.
func (c *Client) Stats(ctx context.Context, uuid string, groups collectors.Groups) (collectors.GuestStats, error) {
	id, ok := parseUUID(uuid)
	if !ok {
		return collectors.GuestStats{}, fmt.Errorf("%q is no UUID", uuid)
	}
	c.mu.Lock()
	busy, many := c.stuck[uuid], len(c.stuck) >= maxStuck
	c.mu.Unlock()
	switch {
	case busy:
		return collectors.GuestStats{}, ErrBusy
	case many:
		return collectors.GuestStats{}, ErrManyStuck
	}
	k, err := c.asker(ctx)
	if err != nil {
		return collectors.GuestStats{}, err
	}
	var mask golibvirt.DomainStatsTypes
	for _, g := range groupMasks {
		if groups&g.group != 0 {
			mask |= g.mask
		}
	}
	type answer struct {
		stats []golibvirt.DomainStatsRecord
		err   error
	}
	result := make(chan answer, 1)
	err = k.call(ctx, func() error {
		c.setStuck(uuid, true)
		defer c.setStuck(uuid, false)
		s, err := k.ConnectGetAllDomainStats([]golibvirt.Domain{{UUID: id, Name: uuid, ID: -1}}, uint32(mask),
			uint32(golibvirt.ConnectGetAllDomainsStatsNowait))
		result <- answer{s, err}
		return err
	})
	if errors.Is(err, errTimeout) {
		c.suspect(ctx)
	}
	if err != nil {
		return collectors.GuestStats{}, fmt.Errorf("ask libvirt for statistics: %w", err)
	}
	a := <-result
	if len(a.stats) == 0 {
		return collectors.GuestStats{}, errors.New("libvirt has no statistics of the domain")
	}
	return guestStats(a.stats[0].Params, groups)
}

// Counters returns what libvirt counts itself, by the domains' UUIDs: the CPU
// time of the processes of those in cpu, in ticks of 10 ms, and with nics the
// NICs of all. No QEMU is asked, so that one that hangs costs nothing. A domain
// that libvirt does not know is left out.
func (c *Client) Counters(ctx context.Context, cpu []string, nics bool) (map[string]collectors.GuestStats, error) {
	c.mu.Lock()
	k, err := c.link, c.err
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	all := map[string]collectors.GuestStats{}
	if nics {
		records := make(chan []golibvirt.DomainStatsRecord, 1)
		err := k.call(ctx, func() error {
			s, err := k.ConnectGetAllDomainStats(nil, uint32(golibvirt.DomainStatsInterface),
				uint32(golibvirt.ConnectGetAllDomainsStatsActive|golibvirt.ConnectGetAllDomainsStatsNowait))
			records <- s
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("ask libvirt for the NICs: %w", err)
		}
		for _, r := range <-records {
			s, err := guestStats(r.Params, collectors.NICStatistics)
			if err != nil {
				return nil, err
			}
			all[formatUUID(r.Dom.UUID)] = s
		}
	}
	for _, uuid := range cpu {
		id, ok := parseUUID(uuid)
		if !ok {
			continue
		}
		times := make(chan uint64, 1)
		err := k.call(ctx, func() error {
			_, _, _, _, ns, err := k.DomainGetInfo(golibvirt.Domain{UUID: id, Name: uuid, ID: -1})
			times <- ns
			return err
		})
		var refused golibvirt.Error
		switch {
		case errors.As(err, &refused):
			continue
		case err != nil:
			return nil, fmt.Errorf("ask libvirt for the CPU time of domain %s: %w", uuid, err)
		}
		s := all[uuid]
		s.CPUTime, s.HasCPU = <-times, true
		all[uuid] = s
	}
	return all, nil
}

// Sizes asks libvirt for the sizes of a disk of a domain that does not run. It
// looks into the image.
func (c *Client) Sizes(ctx context.Context, uuid, device string) (collectors.DiskStats, error) {
	id, ok := parseUUID(uuid)
	if !ok {
		return collectors.DiskStats{}, fmt.Errorf("%q is no UUID", uuid)
	}
	k, err := c.asker(ctx)
	if err != nil {
		return collectors.DiskStats{}, err
	}
	sizes := make(chan collectors.DiskStats, 1)
	err = k.call(ctx, func() error {
		used, capacity, physical, err := k.DomainGetBlockInfo(golibvirt.Domain{UUID: id, Name: uuid, ID: -1}, device, 0)
		sizes <- collectors.DiskStats{Device: device, Capacity: capacity, Allocation: used, Physical: physical, HasAllocation: true}
		return err
	})
	if err != nil {
		return collectors.DiskStats{}, fmt.Errorf("ask libvirt for the sizes of %s: %w", device, err)
	}
	return <-sizes, nil
}

// groupMasks says which of libvirt's groups is which of ours.
var groupMasks = []struct {
	group collectors.Groups
	mask  golibvirt.DomainStatsTypes
}{
	{collectors.CPUStatistics, golibvirt.DomainStatsCPUTotal},
	{collectors.VCPUStatistics, golibvirt.DomainStatsVCPU},
	{collectors.DiskStatistics, golibvirt.DomainStatsBlock},
	{collectors.NICStatistics, golibvirt.DomainStatsInterface},
	{collectors.MemoryStatistics, golibvirt.DomainStatsBalloon},
	{collectors.PerfStatistics, golibvirt.DomainStatsPerf},
}

// asker returns the connection for what a stuck QEMU may hold up.
func (c *Client) asker(ctx context.Context) (*link, error) {
	c.asking.Lock()
	defer c.asking.Unlock()
	c.mu.Lock()
	main, k, err := c.link, c.asks, c.err
	c.mu.Unlock()
	switch {
	case err != nil:
		return nil, err
	case k != nil && !k.dead():
		return k, nil
	case k != nil:
		k.close()
	}
	k, err = dialOne(ctx, main.path, c.opts.Timeout)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asks = nil
	switch {
	case err != nil:
		return nil, err
	case c.link != main: // it was lost meanwhile, and with it what this is for
		k.close()
		return nil, ErrNotConnected
	}
	c.asks = k
	return k, nil
}

func (c *Client) setStuck(uuid string, stuck bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if stuck {
		c.stuck[uuid] = true
	} else {
		delete(c.stuck, uuid)
	}
}

// suspect tells a stuck guest from a stuck daemon after a call was given up: with
// the latter the connections are of no use. Run notices, and connects anew.
func (c *Client) suspect(ctx context.Context) {
	c.mu.Lock()
	k := c.link
	c.mu.Unlock()
	if k == nil {
		return
	}
	if err := k.call(ctx, func() error { _, err := k.ConnectGetLibVersion(); return err }); errors.Is(err, errTimeout) {
		_ = k.conn.Close()
	}
}

func formatUUID(u golibvirt.UUID) string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func parseUUID(s string) (u golibvirt.UUID, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(u) {
		return u, false
	}
	copy(u[:], b)
	return u, true
}
