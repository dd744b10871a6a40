// Package agent meters the domains of one host: it finds them, reads what they
// use at the intervals of polling.yaml, and delivers the samples in batches.
package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent/delivery"
	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// LinkReader reads the counters of the host's network interfaces.
type LinkReader interface {
	Read(ctx context.Context, links []rtnl.Link) ([]rtnl.Link, error)
	Removed(each func(rtnl.Removed)) error
	Index(name string) (int, error)
	// Elsewhere reports whether what a process has under the name is not the
	// interface that is read here.
	Elsewhere(pid int, name string) bool
}

// guestSource is what the agent asks libvirt.
type guestSource interface {
	Definitions() map[string]*collectors.Definition
	Stopped() []*collectors.Definition
	Last(uuid string) *collectors.Definition
	Sizes(ctx context.Context, uuid, device string) (collectors.DiskStats, error)
	Changes() <-chan struct{}
	Pauses() <-chan libvirt.Pause
	Refresh(uuid string)
	Stats(ctx context.Context, uuid string, groups collectors.Groups) (collectors.GuestStats, error)
	Counters(ctx context.Context, cpu []string, nics bool) (map[string]collectors.GuestStats, error)
	Err() error
	ErrOf(uuid string) error
	Away() []error
	Run(ctx context.Context)
}

// Deps are what an agent works with. The agent closes none of them.
type Deps struct {
	Log       *zap.Logger
	Publisher bus.Publisher
	Registry  prometheus.Registerer    // for self-metrics; nil: none
	Usage     []collectors.UsageReader // best first; at least one
	Links     LinkReader               // nil: no network meters
	KVM       KVMReader                // nil: no kvm.* meters
	Hooks     []collectors.Hook        // detached
	Life      Lifecycle                // nil: domains are not accounted at their end
	Observe   func(*sample.Batch)      // gets each batch when it is made; nil: nobody does
	Notes     []string                 // what the caller knows that cannot be collected, and why

	proc    string                                     // in tests: another /proc
	openBMC func(device string) (bmc.Transport, error) // in tests: another BMC
	guest   guestSource                                // in tests: another libvirt
	ours    func(pid int) bool                         // in tests: which processes are on this host; nil: all
}

// Agent meters the domains of one host.
type Agent struct {
	cfg     Config
	log     *zap.Logger
	metrics *metrics
	deliver *delivery.Delivery
	guest   guestSource // nil: libvirt is off
	proc    string
	bootID  string
	plans   []plan
	reloads chan *reload
	began   time.Time // when the agent was made
	beats   sync.Map  // of *beat: the plans that are polled
	notes   []string  // that do not change
	socket  *server   // nil: none
	state   *state.File
	kvm     *kvm

	sched  *procfs.Sched // nil: cpu is without the vCPUs' waits
	images images

	// asking is held while libvirt asks a QEMU: one that is asked twice at once
	// would look stuck. It is taken before mu.
	asking sync.Mutex

	checks   checker
	hardware *hardware // nil: the BMC is not read

	billing  *billing
	fallover *task         // of what libvirt counts; nil: it counts nothing
	falling  chan struct{} // receives when libvirt is needed

	mu        sync.Mutex
	scanner   *scanner
	scanned   time.Time
	scanAll   bool // look at all processes in the next scan
	swept     bool // counters of domains that are no more were dropped
	domains   map[int]*domain
	order     []*domain // by UUID
	found     []*domain // of the last scan
	readers   []collectors.UsageReader
	reader    int // index of the one that answered last
	procs     []bpf.Proc
	usages    []bpf.Usage
	links     LinkReader
	table     []rtnl.Link
	faults    map[string]string // by collector: what is wrong with it now
	noted     bool              // the notes were logged
	planNotes []string          // of the plans
	runs      struct{ discovery, usage, links, libvirt, crosscheck, fallover run }
	hooks     *hooks
	brake     brake
	lives     *lives

	watchers atomic.Int32
	watch    watch
}

// Times of the discovery.
const (
	minScan    = 500 * time.Millisecond // between two scans for processes
	grace      = 2 * time.Second        // that a new domain waits for libvirt to say who it is
	retryTaps  = time.Minute            // between two searches for taps without libvirt
	firstSync  = 2 * time.Second        // that the first poll waits for libvirt
	readAtMost = 5 * time.Second        // deadline of a reader
)

// New returns an agent, with its local socket open; Run starts it.
func New(cfg Config, deps Deps) (*Agent, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if len(deps.Usage) == 0 {
		return nil, errors.New("the agent has nothing to read CPU time with")
	}
	keys, err := cfg.keys(deps.Log)
	if err != nil {
		return nil, err
	}
	sources, err := loadPolling(cfg.Polling, cfg.Interval)
	if err != nil {
		return nil, err
	}
	if deps.Registry == nil {
		deps.Registry = prometheus.NewRegistry()
	}
	m, err := newMetrics(deps.Registry)
	if err != nil {
		return nil, fmt.Errorf("register self-metrics: %w", err)
	}
	if deps.proc == "" {
		deps.proc = "/proc"
	}
	a := &Agent{
		cfg: cfg, log: deps.Log, metrics: m, guest: deps.guest, proc: deps.proc, notes: slices.Clone(deps.Notes),
		scanner: newScanner(deps.proc, deps.ours), scanAll: true, domains: map[int]*domain{},
		links: deps.Links, faults: map[string]string{}, reloads: make(chan *reload),
	}
	a.watch.fresh = make(chan struct{})
	if a.bootID, err = bootID(deps.proc); err != nil {
		return nil, err
	}
	if cfg.CPUDefinition == "ceilometer" {
		a.sched = procfs.NewSched(deps.proc)
	}
	if a.billing, err = newBilling(cfg.Origins); err != nil {
		return nil, err
	}
	a.readers, a.falling = a.billing.sort(deps.Usage), make(chan struct{}, 1)
	if a.hardware, err = newHardware(deps.Log, m, deps.Registry, &cfg, deps.proc, deps.openBMC); err != nil {
		return nil, err
	}
	a.plans, a.planNotes = a.planAll(sources, &cfg)
	a.fallover = newFallover(a.plans, a.billing)
	if a.checks, err = newChecker(&cfg, sources); err != nil {
		return nil, err
	}
	switch {
	case a.guest != nil:
	case len(cfg.Libvirt) == 0:
		a.notes = append(a.notes, "libvirt is off: disk.device.*, what the guest tells of its memory, power.state, perf.* and check.* cannot be collected, and domains have no project, user or display name")
	default:
		a.guest = libvirt.NewHost(deps.Log, cfg.libvirtOptions())
	}
	delay := time.Duration(0)
	if cfg.Spread {
		delay = rand.N(shortest(a.plans, cfg.Interval))
	}
	dm, err := delivery.NewMetrics(deps.Registry)
	if err != nil {
		return nil, fmt.Errorf("register self-metrics: %w", err)
	}
	if a.deliver, err = delivery.New(delivery.Options{
		Observe: deps.Observe,
		Log:     deps.Log, Metrics: dm, Publisher: deps.Publisher, Node: cfg.Node, Partitions: cfg.Partitions, Keys: keys,
		QueueBytes: cfg.QueueBytes, Delay: delay, Interval: shortest(a.plans, cfg.Interval), Spool: cfg.Spool,
	}); err != nil {
		return nil, err
	}
	a.runs.discovery, a.runs.usage = m.collector("discovery"), m.collector("usage")
	a.runs.links, a.runs.libvirt = m.collector("links"), m.collector("libvirt")
	a.runs.crosscheck, a.runs.fallover = m.collector("crosscheck"), m.collector("fallover")
	if cfg.Socket != "" {
		if a.socket, err = a.listen(); err != nil {
			return nil, errors.Join(err, a.deliver.Close())
		}
	}
	a.state = state.Memory()
	if cfg.Counters != "" {
		if a.state, err = state.Open(deps.Log, cfg.Counters, a.bootID); err != nil {
			if a.socket != nil {
				_ = a.socket.listener.Close()
			}
			return nil, errors.Join(err, a.deliver.Close())
		}
	}
	a.brake.budget = cfg.Budget / 100
	a.began = time.Now()
	a.hooks = newHooks(deps.Log, m, a.state, deps.Hooks, &cfg)
	a.lives = newLives(deps.Life, m, a.plans, a.hooks, &cfg)
	a.kvm = &kvm{reader: deps.KVM, run: m.collector("kvm")}
	return a, nil
}

func shortest(plans []plan, least time.Duration) time.Duration {
	for _, p := range plans {
		least = min(least, p.interval)
	}
	return least
}

// Run meters until ctx ends, and then tries to deliver what is queued. It
// returns an error if batches could not be delivered at the end. An agent runs
// once.
func (a *Agent) Run(ctx context.Context) error {
	// What the polls need outlives them: the last batches are still sent.
	rest, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var polls, background sync.WaitGroup
	background.Go(func() { a.deliver.Run(rest) })
	if a.guest != nil {
		background.Go(func() { a.guest.Run(rest) })
		background.Go(func() { a.follow(rest) })
		background.Go(func() { a.watchPauses(rest) })
		a.awaitGuest(ctx, firstSync)
	}
	if a.socket != nil {
		background.Go(func() { a.socket.serve(a.log) })
	}
	if a.lives.Lifecycle != nil {
		polls.Go(func() { a.watchLives(ctx) })
	}
	plans := len(a.plans)
	polls.Go(func() { a.keepPolling(ctx) })
	if a.guest != nil && a.cfg.CrosscheckInterval > 0 {
		polls.Go(func() { a.crosscheck(ctx) })
	}
	if a.guest != nil {
		polls.Go(func() { a.standIn(ctx) })
	}
	a.log.Info("metering", zap.String("node", a.cfg.Node), zap.Int("plans", plans))
	<-ctx.Done()
	if a.socket != nil {
		a.socket.close()
	}
	polls.Wait()
	a.mu.Lock()
	for _, d := range a.order {
		d.release()
	}
	a.mu.Unlock()
	if err := a.hardware.close(); err != nil {
		a.log.Warn("cannot close the IPMI device", zap.Error(err))
	}
	fctx, cancel := context.WithTimeout(rest, a.cfg.ShutdownTimeout)
	defer cancel()
	left := a.deliver.Flush(fctx)
	stop()
	background.Wait()
	if err := a.deliver.Close(); err != nil {
		a.log.Warn("cannot close the spool", zap.Error(err))
	}
	if err := a.state.Close(); err != nil {
		a.log.Warn("cannot close the counters", zap.Error(err))
	}
	if left > 0 {
		return fmt.Errorf("%d batches were not delivered within %s and are lost", left, a.cfg.ShutdownTimeout)
	}
	return nil
}

// awaitGuest waits until libvirt's domains are known, or it is clear that they
// will not be soon.
func (a *Agent) awaitGuest(ctx context.Context, atMost time.Duration) {
	deadline := time.NewTimer(atMost)
	defer deadline.Stop()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		if err := a.guest.Err(); !errors.Is(err, libvirt.ErrNotConnected) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-deadline.C:
			return
		case <-poll.C:
		}
	}
}

// follow has new domains looked for as soon as libvirt tells of a change.
func (a *Agent) follow(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.guest.Changes():
		}
		a.mu.Lock()
		a.scanAll = true
		a.scanned = time.Time{}
		for _, d := range a.order { // one that ends before the next poll would not be known
			a.identify(d, time.Now())
		}
		a.mu.Unlock()
	}
}

// beat is a plan that is polled.
type beat struct {
	what string
	due  atomic.Int64 // when its next poll must have ended, in ns since the agent began
}

// Stuck names a plan whose poll should have ended atLeast ago, "" if there is
// none. It may be called while Run runs.
func (a *Agent) Stuck(atLeast time.Duration) (what string) {
	now := time.Since(a.began)
	a.beats.Range(func(key, _ any) bool {
		if b := key.(*beat); now-time.Duration(b.due.Load()) > atLeast {
			what = b.what
		}
		return what == ""
	})
	return what
}

// schedule runs the task at once and then at its interval. A run that takes
// longer leaves out the runs it is late for.
func (a *Agent) schedule(ctx context.Context, t *task) {
	defer t.gaps.end(a.deliver.AddGap)
	alive := &beat{what: fmt.Sprintf("the poll of %s and others every %s", t.meters[0].Name, t.interval)}
	alive.due.Store(int64(time.Since(a.began) + 2*t.interval))
	a.beats.Store(alive, nil)
	defer a.beats.Delete(alive)
	start := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for n := int64(0); ; {
		// The wait takes an interval at most, and a run may take another.
		alive.due.Store(int64(time.Since(a.began) + 2*t.interval))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		switch {
		case t.qemu:
			a.pollQEMU(ctx, t)
		case t.bmc:
			a.pollBMC(ctx, t)
		default:
			a.poll(ctx, t)
		}
		next := int64(time.Since(start)/t.interval) + 1
		if skipped := next - n - 1; skipped > 0 {
			a.metrics.skipped.Add(float64(skipped))
		}
		n = next
		timer.Reset(time.Until(start.Add(time.Duration(n) * t.interval)))
	}
}

// Notes says in one sentence each what cannot be collected now, and why.
func (a *Agent) Notes() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append(a.domainNotes(), a.hardware.note()...)
}

// domainNotes are those of the domains: a host without a BMC is no fault.
func (a *Agent) domainNotes() []string {
	notes := slices.Concat(a.notes, a.planNotes)
	if a.guest != nil {
		if err := a.guest.Err(); err != nil {
			notes = append(notes, fmt.Sprintf("libvirt does not answer (%v): disk.device.*, what guests tell of their memory, perf.* and check.* cannot be collected, and domains that are new have no project, user or display name; CPU, disk bytes and network go on; start libvirtd or virtqemud, or set libvirt: off", err))
		}
		for _, err := range a.guest.Away() {
			notes = append(notes, fmt.Sprintf("a libvirt does not answer (%v): of its domains disk.device.*, what guests tell of their memory, perf.* and check.* cannot be collected", err))
		}
	}
	if err := a.state.Err(); err != nil {
		notes = append(notes, fmt.Sprintf("counters are not kept over a restart of the agent (%v): give it a file that it may write with the setting counters", err))
	}
	if note := a.deliver.Note(); note != "" {
		notes = append(notes, note)
	}
	if a.kvm.fault != "" {
		notes = append(notes, "kvm.* cannot be collected: "+a.kvm.fault)
	}
	for _, f := range a.faults {
		notes = append(notes, f)
	}
	notes = append(notes, a.falloverNotes()...)
	notes = append(notes, a.muteNotes()...)
	notes = append(notes, a.hooks.notes()...)
	var noWait, noIO, noSplit, blind bool
	for _, d := range a.order {
		blind = blind || d.blind && d.def == nil
		if d.fault == "" && d.origin != "" {
			noSplit = noSplit || d.usage.has&(1<<iCPU) == 0
			noWait = noWait || d.usage.has&(1<<iWait) == 0
			noIO = noIO || d.usage.has&(1<<iDiskRead) == 0
		}
	}
	if noSplit {
		notes = append(notes, "cpu and the cpu.* classes cannot be collected for all domains: the threads of their processes cannot be read; cpu.process is whole")
	}
	if noWait {
		notes = append(notes, "cpu.wait cannot be collected: the kernel keeps no scheduler statistics (CONFIG_SCHED_INFO)")
	}
	if noIO {
		notes = append(notes, "disk.host.* cannot be collected: neither BPF nor /proc/PID/io of the QEMU processes may be read; run the agent with CAP_BPF and CAP_PERFMON")
	}
	if blind {
		notes = append(notes, "network.* cannot be collected for domains that libvirt does not describe: the agent may not look into their QEMU processes for the tap devices (CAP_SYS_PTRACE)")
	}
	slices.Sort(notes)
	return notes
}
