// Package libvirt knows the running domains of a libvirt daemon: who they
// are, and the counters that only libvirt and QEMU have. It needs no more than
// a read-only socket, and whatever hangs in libvirt costs only what libvirt
// would have said.
package libvirt

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
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
)

// Times of the synchronisation.
const (
	syncEvery  = time.Minute      // list of the active domains
	trustXML   = 10 * time.Minute // a definition without an event
	debounce   = 50 * time.Millisecond
	retryFirst = time.Second
	retryLast  = 30 * time.Second
	maxStuck   = 3 // calls given up, of the 5 that libvirt takes at once from a client
)

// Options say where libvirt is.
type Options struct {
	Sockets []string      // tried in order; empty: [DefaultSockets]
	Host    string        // node name, for Nova's host id
	Timeout time.Duration // of every call; 0: 5 s
}

// Client keeps a connection to libvirt and what is known of its domains.
type Client struct {
	log     *zap.Logger
	opts    Options
	seed    maphash.Seed
	changes chan struct{}
	kick    chan struct{}

	mu     sync.Mutex
	link   *link // nil: not connected
	err    error // why not
	synced bool  // the list was complete at least once on this connection
	defs   map[string]entry
	dirty  map[string]bool // UUIDs to ask for
	stuck  map[string]bool // UUIDs whose last Stats was given up and is not answered yet
	list   atomic.Pointer[map[string]*collectors.Definition]
}

type entry struct {
	def   *collectors.Definition
	text  uint64 // hash of the XML that def was made of
	state golibvirt.DomainState
	id    int32 // libvirt's id of this run of the domain
	asked time.Time
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
		changes: make(chan struct{}, 1), kick: make(chan struct{}, 1),
		defs: map[string]entry{}, dirty: map[string]bool{}, stuck: map[string]bool{},
	}
	c.list.Store(&map[string]*collectors.Definition{})
	return c
}

// Definitions returns what is known of the active domains, by UUID. The map is
// never changed; another call may return another map. While libvirt is away it
// holds what was known before.
func (c *Client) Definitions() map[string]*collectors.Definition { return *c.list.Load() }

// Changes receives when there is something new in Definitions, or libvirt came
// or went.
func (c *Client) Changes() <-chan struct{} { return c.changes }

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

// Run keeps the client connected until ctx ends.
func (c *Client) Run(ctx context.Context) {
	wait := retryFirst
	for ctx.Err() == nil {
		k, err := dial(ctx, c.opts.Sockets, c.opts.Timeout)
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
	c.link, c.err, c.synced = nil, err, false
	clear(c.dirty)
	c.mu.Unlock()
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
	} {
		err := k.subscribe(ctx, id, func(d golibvirt.Domain) { c.Refresh(formatUUID(d.UUID)) })
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
			delete(c.defs, uuid)
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
		list[uuid] = e.def
	}
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
	var e entry
	var text string
	err := k.call(ctx, func() error {
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
	case errors.As(err, &refused) && !golibvirt.IsNotFound(err):
		c.log.Warn("libvirt tells nothing of a domain", zap.String("domain", uuid), zap.Error(err))
		return nil
	case err != nil && !golibvirt.IsNotFound(err):
		return fmt.Errorf("ask libvirt for domain %s: %w", uuid, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old, known := c.defs[uuid]
	if err != nil || e.id < 0 { // not defined, or not running
		delete(c.defs, uuid)
		return nil
	}
	e.asked, e.def, e.text = time.Now(), old.def, maphash.String(c.seed, text)
	if !known || old.text != e.text || old.state != e.state {
		e.def, err = parse([]byte(text), e.state, c.opts.Host)
		if err != nil {
			c.log.Warn("domain skipped", zap.String("domain", uuid), zap.Error(err))
			delete(c.defs, uuid)
			return nil
		}
	}
	c.defs[uuid] = e
	return nil
}

// Stats asks libvirt, which asks QEMU's monitor: 1 to 3 ms of CPU in both. A
// domain whose QEMU does not answer costs one call's time, and is then refused
// with [ErrBusy] until it does.
func (c *Client) Stats(ctx context.Context, uuid string, cpu, disks bool) (collectors.GuestStats, error) {
	id, ok := parseUUID(uuid)
	if !ok {
		return collectors.GuestStats{}, fmt.Errorf("%q is no UUID", uuid)
	}
	c.mu.Lock()
	k, err := c.link, c.err
	busy := c.stuck[uuid]
	c.mu.Unlock()
	switch {
	case busy:
		return collectors.GuestStats{}, ErrBusy
	case err != nil:
		return collectors.GuestStats{}, err
	}
	var groups golibvirt.DomainStatsTypes
	if cpu {
		groups |= golibvirt.DomainStatsCPUTotal
	}
	if disks {
		groups |= golibvirt.DomainStatsBlock
	}
	type answer struct {
		stats []golibvirt.DomainStatsRecord
		err   error
	}
	result := make(chan answer, 1)
	err = k.call(ctx, func() error {
		c.setStuck(uuid, true)
		defer c.setStuck(uuid, false)
		s, err := k.ConnectGetAllDomainStats([]golibvirt.Domain{{UUID: id, Name: uuid, ID: -1}}, uint32(groups),
			uint32(golibvirt.ConnectGetAllDomainsStatsNowait))
		result <- answer{s, err}
		return err
	})
	if errors.Is(err, errTimeout) {
		c.suspect(ctx, k)
	}
	if err != nil {
		return collectors.GuestStats{}, fmt.Errorf("ask libvirt for statistics: %w", err)
	}
	a := <-result
	if len(a.stats) == 0 {
		return collectors.GuestStats{}, errors.New("libvirt has no statistics of the domain")
	}
	return guestStats(a.stats[0].Params, cpu, disks)
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

// suspect tells a stuck guest from a stuck daemon after a call was given up,
// and closes a connection that is of no use.
func (c *Client) suspect(ctx context.Context, k *link) {
	c.mu.Lock()
	many := len(c.stuck) >= maxStuck
	c.mu.Unlock()
	err := k.call(ctx, func() error { _, err := k.ConnectGetLibVersion(); return err })
	if many || errors.Is(err, errTimeout) {
		_ = k.conn.Close() // Run notices, and connects anew
	}
}

// guestStats reads the parameters of one domain.
func guestStats(params []golibvirt.TypedParam, cpu, disks bool) (collectors.GuestStats, error) {
	var s collectors.GuestStats
	byIndex := map[string]*collectors.DiskStats{}
	counted := map[string]bool{}
	var order []string
	for _, p := range params {
		if p.Field == golibvirt.DomainStatsCPUTime {
			s.CPUTime, s.HasCPU = p.Value.I.(uint64)
			continue
		}
		rest, ok := strings.CutPrefix(p.Field, "block.")
		index, field, ok2 := strings.Cut(rest, ".")
		if !ok || !ok2 {
			continue
		}
		d := byIndex[index]
		if d == nil {
			d = &collectors.DiskStats{}
			byIndex[index] = d
			order = append(order, index)
		}
		if name, ok := p.Value.I.(string); ok {
			if field == "name" {
				d.Device = name
			}
			continue
		}
		v, ok := p.Value.I.(uint64)
		if !ok {
			continue
		}
		switch field {
		case "rd.reqs":
			d.ReadRequests, counted[index] = v, true
		case "rd.bytes":
			d.ReadBytes = v
		case "wr.reqs":
			d.WriteRequests = v
		case "wr.bytes":
			d.WriteBytes = v
		case "fl.reqs":
			d.FlushRequests = v
		}
	}
	for _, index := range order {
		if d := byIndex[index]; d.Device != "" && counted[index] {
			s.Disks = append(s.Disks, *d)
		}
	}
	if disks && len(order) > 0 && len(s.Disks) == 0 {
		return s, ErrBusy // with nowait, libvirt leaves out what it cannot ask for now
	}
	if cpu && !s.HasCPU && !disks {
		return s, ErrBusy
	}
	return s, nil
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
