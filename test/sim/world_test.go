// Package sim runs the whole path from agents to store in one goroutine and in
// simulated time, over a bus and disks that fail, and checks that each sample that
// was made is stored once, or is in a gap. What happens is drawn from a seed: the
// same seed is the same run.
//
// What runs is the product's own code: the agents' delivery with its spool, the
// notifier, central's ingest and the store. Simulated are the bus, the clock
// (testing/synctest), the agents' file systems and that under the store's samples.
package sim

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent/delivery"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/diskqueue/crashfs"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
)

const interval = 10 * time.Second

// world is one run.
type world struct {
	t    *testing.T
	rand *rand.Rand
	dir  string

	log    []string // what happened
	nodes  []*node
	queues map[string]*queue // by name
	dead   []string          // ids of messages that were refused
	poison []string          // ids of those that have to be
	down   bool              // the bus

	notifier, central *process
	store             *simStore
	counts            map[string]int // of faults
}

func (w *world) note(format string, args ...any) { w.log = append(w.log, fmt.Sprintf(format, args...)) }

// fault notes one that the checker counts.
func (w *world) fault(kind string) {
	w.counts[kind]++
	w.note("fault: %s", kind)
}

// chance is true once in n times.
func (w *world) chance(n int) bool { return w.rand.IntN(n) == 0 }

// queue is one of the broker's: what is in it survives everything.
type queue struct {
	waiting []*bus.Delivery
}

func queueOf(routingKey string) string { return "kvmeter." + routingKey }

// Publish implements [bus.Publisher]. It confirms, refuses, or takes some of the
// messages and says nothing; now and then it has a message twice.
func (w *world) Publish(_ context.Context, ms ...bus.Message) error {
	taken := len(ms)
	lost := false
	switch {
	case w.down:
		w.note("publish %d: the bus is down", len(ms))
		return errors.New("the bus is down")
	case w.chance(12):
		w.fault("confirm lost")
		taken, lost = w.rand.IntN(len(ms)+1), true
	}
	for i := range ms[:taken] {
		q := w.queues[queueOf(ms[i].RoutingKey)]
		if q == nil {
			return bus.ErrUnroutable
		}
		q.waiting = append(q.waiting, &bus.Delivery{Message: ms[i]})
		if w.chance(30) {
			w.fault("message twice")
			q.waiting = append(q.waiting, &bus.Delivery{Message: ms[i], Redelivered: true})
		}
	}
	w.note("publish %d to %s: %d taken, lost %v", len(ms), ms[0].RoutingKey, taken, lost)
	if lost {
		return errors.New("the confirm is lost")
	}
	return nil
}

// process is a notifier or central: what handles a queue.
type process struct {
	handlers map[string]bus.Handler
	stop     func() // waits until it has ended
}

// Consume implements [bus.Consumer]: it keeps the handler, which the world calls.
type consumer struct {
	mu sync.Mutex
	p  *process
}

func (c *consumer) Consume(ctx context.Context, queue string, _ int, handle bus.Handler) error {
	c.mu.Lock()
	c.p.handlers[queue] = handle
	c.mu.Unlock()
	<-ctx.Done()
	return nil
}

// run starts a process.
func run(w *world, loop func(context.Context) error, end func() error, p *process) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- loop(ctx) }()
	synctest.Wait()
	p.stop = func() {
		cancel()
		if err := errors.Join(<-ended, end()); err != nil {
			w.t.Error(err)
		}
	}
}

var keys = sample.Keys{"n0": []byte("0123456789abcdef0"), "n1": []byte("0123456789abcdef1"), "notifier": []byte("0123456789abcdef2")}

// pipelineFile passes everything to the store, and one meter a second time as
// derived batches.
const pipelineFile = `
sources:
  - {name: all, meters: ["*"], sinks: [whole]}
  - {name: some, meters: ["cpu"], sinks: [part]}
sinks:
  - {name: whole, transformers: [], publishers: ["store://"]}
  - {name: part, transformers: [], publishers: ["store://"]}
`

func (w *world) startNotifier() {
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Partitions, cfg.Spool, cfg.EventPipeline = "notifier", 1, "", ""
	cfg.Pipeline = filepath.Join(w.dir, "pipeline.yaml")
	c := &consumer{p: &process{handlers: map[string]bus.Handler{}}}
	n, err := notifier.New(cfg, notifier.Deps{Log: zap.NewNop(), Consumer: c, Publisher: w, Keys: keys, Publishers: all.Publishers})
	if err != nil {
		w.t.Fatal(err)
	}
	run(w, n.Run, n.Close, c.p)
	w.notifier = c.p
}

func (w *world) startCentral() {
	c := &consumer{p: &process{handlers: map[string]bus.Handler{}}}
	w.store.open()
	cfg := central.DefaultIngestConfig()
	cfg.Relays = []string{"notifier"}
	in, err := central.NewIngest(cfg, central.IngestDeps{Log: zap.NewNop(), Consumer: c, Store: w.store, Keys: keys})
	if err != nil {
		w.t.Fatal(err)
	}
	run(w, in.Run, func() error { return nil }, c.p)
	w.central = c.p
}

// consume has a process handle what waits in a queue, and reports whether there was anything.
// At dies it dies before its acks arrive.
func (w *world) consume(p *process, name string, dies bool) bool {
	q := w.queues[name]
	n := min(len(q.waiting), 1+w.rand.IntN(8))
	if n == 0 {
		return false
	}
	ds := slices.Clone(q.waiting[:n])
	handle := p.handlers[name]
	if handle == nil {
		w.t.Fatalf("nobody consumes %s", name)
	}
	err := handle(context.Background(), ds)
	w.note("consume %d of %s: %v, dies %v", n, name, err != nil, dies)
	if dies {
		for _, d := range q.waiting {
			*d = bus.Delivery{Message: d.Message, Redelivered: true}
		}
		return true
	}
	var kept []*bus.Delivery
	for _, d := range ds {
		taken, refused := d.Verdict()
		switch {
		case refused != nil:
			w.dead = append(w.dead, d.ID)
		case !taken:
			d.Redelivered = true
			kept = append(kept, d)
		}
	}
	q.waiting = append(kept, q.waiting[n:]...)
	return true
}

// simStore is the store, which can fail and lose its power.
type simStore struct {
	w   *world
	mem *vfs.MemFS
	dir string // of the catalogue
	*local.Store

	mu    sync.Mutex
	cutIn int // writes until the power goes; 0: it stays
	keep  int // percent of what was not synced then
	after *vfs.MemFS
}

// MaybeError implements [errorfs.Injector]: it sees each operation of the store.
func (s *simStore) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cutIn > 0 {
		if s.cutIn--; s.cutIn == 0 {
			s.cut()
		}
	}
	return nil
}

func (s *simStore) String() string { return "power cut" }

// cut keeps what the host will find after a power loss now; mu is held.
func (s *simStore) cut() {
	s.after = s.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: s.keep, RNG: rand.New(rand.NewPCG(1, 1))})
	if err := os.CopyFS(s.dir+".after", os.DirFS(s.dir)); err != nil {
		s.w.t.Fatal(err)
	}
}

func (s *simStore) open() {
	err := os.MkdirAll(s.dir, 0o700)
	if err != nil {
		s.w.t.Fatal(err)
	}
	// SQLite has a disk of its own; the floor of free space is that one's.
	s.Store, err = local.OpenOn(errorfs.Wrap(s.mem, s), s.dir, local.Options{Retention: -1, MinFree: 1, FlushEvery: time.Minute})
	if err != nil {
		s.w.t.Fatal(err)
	}
	synctest.Wait()
}

// crash takes the power from the store's host, unless it is gone already, and
// gives it back.
func (s *simStore) crash() {
	s.mu.Lock()
	s.cutIn = 0
	if s.after == nil {
		s.cut()
	}
	s.mu.Unlock()
	_ = s.Store.Close() // of what nobody will see
	s.mem, s.after = s.after, nil
	if err := errors.Join(os.RemoveAll(s.dir), os.Rename(s.dir+".after", s.dir)); err != nil {
		s.w.t.Fatal(err)
	}
}

// Append stores, or fails before or after it did.
func (s *simStore) Append(ctx context.Context, batches []store.Received) ([]store.Stored, error) {
	if s.w.chance(15) {
		s.w.fault("store full")
		return nil, store.ErrDiskFull
	}
	stored, err := s.Store.Append(ctx, batches)
	if err == nil && s.w.chance(15) {
		s.w.fault("store fails after it stored")
		return nil, errors.New("the answer is lost")
	}
	return stored, err
}

// sampleKey is a sample that was made: volumes of a series rise.
type sampleKey struct {
	resource, meter string
	volume          uint64
}

// node is an agent's host.
type node struct {
	w       *world
	name    string
	options delivery.Options
	fs      *crashfs.FS
	agent   *delivery.Delivery
	metrics *prometheus.Registry
	skew    time.Duration // of its wall clock
	last    int64
	stepped bool // the clock was

	counter uint64
	padding int
	made    map[sampleKey]int64 // with their times
	pending []sampleKey         // in memory only
	unsafe  map[sampleKey]bool  // that may be lost, by a kill
	untimed map[sampleKey]bool  // of those, whose gap may be of another time
	set     bool                // the clock was since the disk knew
	dropped bool                // a bound has dropped some
	bounded bool                // bounds are small enough to
}

func (n *node) wall() time.Time { return time.Now().Add(n.skew) }

func (n *node) start() {
	n.metrics = prometheus.NewRegistry()
	m, err := delivery.NewMetrics(n.metrics)
	if err != nil {
		n.w.t.Fatal(err)
	}
	n.options.FS, n.options.Metrics = n.fs, m
	if n.agent, err = delivery.New(n.options); err != nil {
		n.w.t.Fatal(err)
	}
}

// poll makes a batch.
func (n *node) poll() {
	b := sample.NewBuilder()
	now := n.wall().UnixMicro()
	for r := range 2 {
		resource := fmt.Sprintf("%s-r%d", n.name, r)
		row := sample.Row{Resource: resource, Source: "openstack", Project: "p", Incarnation: sample.IncarnationOf(resource)}
		if n.padding > 0 {
			noise := make([]byte, n.padding)
			for i := range noise {
				noise[i] = byte('a' + n.w.rand.IntN(26))
			}
			row.Metadata = fmt.Appendf(nil, `{"x":"%s"}`, noise)
		}
		b.Row(row)
		for _, m := range []*sample.Meter{sample.CPU, sample.NetInBytes} {
			n.counter += 1 + n.w.rand.Uint64N(1<<32)
			b.Add(m.MeterRef, sample.Walk, sample.Uint(n.counter))
			key := sampleKey{resource, m.Name, n.counter}
			n.made[key] = now
			n.pending = append(n.pending, key)
		}
	}
	from := n.last
	if from == 0 {
		from = now
	}
	n.agent.Add(b, now, from)
	n.last = now
	n.w.note("%s polls at %d", n.name, now)
}

// disk does the agent's work on its disk.
func (n *node) disk() {
	before := len(n.pending)
	n.agent.Spool(time.Now())
	if n.options.Spool.Path == "" {
		return // all is in memory only, and may be lost with it
	}
	if note := n.agent.Note(); note == "" {
		n.pending, n.set = n.pending[before:], false
	} else {
		n.w.note("%s: the disk fails", n.name)
	}
}

// send publishes what next gives.
func (n *node) send(next func(time.Time) (*delivery.Group, time.Duration)) bool {
	g, _ := next(time.Now())
	if g == nil {
		return false
	}
	err := n.w.Publish(context.Background(), g.Messages...)
	n.agent.Settle(g, err == nil)
	return true
}

// lose remembers what may be lost with the agent.
func (n *node) lose() {
	for _, key := range n.pending {
		n.unsafe[key] = true
		n.untimed[key] = n.set
	}
	n.pending, n.set = nil, false
}

// kill ends the agent, or its host, now or in the midst of its work on the disk.
func (n *node) kill() {
	power, keep := n.w.chance(2), n.w.rand.IntN(101)
	n.w.fault(map[bool]string{true: "agent's host loses power", false: "agent killed"}[power])
	if n.w.chance(2) {
		left := 1 + n.w.rand.IntN(12)
		var after *crashfs.FS
		n.fs.Fail(func(crashfs.Op, string) error {
			if left--; left == 0 && power {
				after = n.fs.Crash(keep, n.w.rand)
			}
			if left <= 0 {
				return errors.New("dead")
			}
			return nil
		})
		n.agent.Spool(time.Now())
		n.fs.Fail(nil)
		if after == nil && power {
			after = n.fs.Crash(keep, n.w.rand)
		}
		if power {
			n.fs = after
		}
	} else if power {
		n.fs = n.fs.Crash(keep, n.w.rand)
	}
	n.w.note("%s is dead with %d samples in memory", n.name, len(n.pending))
	n.lose()
	n.countDrops()
	n.fs.Fail(nil)
	time.Sleep(time.Duration(n.w.rand.IntN(30)) * time.Second)
	n.start()
}

// countDrops looks whether a bound has dropped something.
func (n *node) countDrops() {
	all, err := n.metrics.Gather()
	if err != nil {
		n.w.t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == "kvmeter_agent_dropped_samples_total" {
			for _, m := range f.GetMetric() {
				n.dropped = n.dropped || m.GetCounter().GetValue() > 0
			}
		}
	}
}

// hash returns what happened as a number.
func (w *world) hash() uint64 {
	h := fnv.New64a()
	for _, line := range w.log {
		_, _ = h.Write([]byte(line + "\n"))
	}
	return h.Sum64()
}

func newWorld(t *testing.T, seed uint64, dir string) *world {
	w := &world{t: t, rand: rand.New(rand.NewPCG(seed, 1)), dir: dir, queues: map[string]*queue{}, counts: map[string]int{}}
	if err := os.WriteFile(filepath.Join(dir, "pipeline.yaml"), []byte(pipelineFile), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{bus.SamplesQueue(0), bus.StoreQueue(0)} {
		w.queues[name] = &queue{}
	}
	for i := range 2 {
		n := &node{w: w, name: fmt.Sprint("n", i), fs: crashfs.New(), made: map[sampleKey]int64{}, unsafe: map[sampleKey]bool{}, untimed: map[sampleKey]bool{}}
		n.options = delivery.Options{
			Log: zap.NewNop(), Node: n.name, Partitions: 1, Keys: keys, QueueBytes: 1 << 20,
			Interval: interval, Spool: delivery.DefaultSpool(), Wall: n.wall,
		}
		n.options.Spool.Path = "/spool"
		if w.chance(2) {
			n.options.Spool.Order = "newest"
		}
		switch w.rand.IntN(8) {
		case 0: // a spool that is soon full
			n.bounded, n.padding, n.options.Spool.MaxBytes = true, 1500, 160<<10
		case 1: // memory that is
			n.bounded, n.padding, n.options.QueueBytes = true, 500, 8<<10
		case 2: // no spool at all
			n.options.Spool.Path = ""
		case 3: // what is old goes
			n.bounded, n.options.Spool.MaxAge = true, time.Hour
		}
		w.nodes = append(w.nodes, n)
		n.start()
	}
	w.store = &simStore{w: w, mem: vfs.NewCrashableMem(), dir: filepath.Join(dir, "store")}
	w.startCentral()
	w.startNotifier()
	return w
}

// step draws what happens next.
func (w *world) step() {
	n := w.nodes[w.rand.IntN(len(w.nodes))]
	switch p := w.rand.IntN(100); {
	case p < 26:
		for _, n := range w.nodes {
			n.poll()
			if !w.chance(6) {
				n.disk()
			}
		}
		time.Sleep(interval)
		synctest.Wait()
	case p < 36:
		n.disk()
	case p < 52:
		n.send(n.agent.Live)
	case p < 60:
		n.send(n.agent.Backlog)
	case p < 71:
		w.consume(w.notifier, bus.SamplesQueue(0), false)
	case p < 83:
		w.consume(w.central, bus.StoreQueue(0), false)
	case p < 86:
		w.down = !w.down
		w.fault("bus " + map[bool]string{true: "down", false: "up"}[w.down])
	case p < 88:
		n.kill()
	case p < 90:
		w.fault("notifier killed")
		w.consume(w.notifier, bus.SamplesQueue(0), true)
		w.notifier.stop()
		w.startNotifier()
	case p < 92:
		w.killCentral()
	case p < 94:
		if w.chance(2) {
			n.fs.Fail(nil)
			w.note("%s has a good disk", n.name)
			break
		}
		w.fault("agent's disk fails")
		flaky := w.rand.IntN(2) * w.rand.IntN(5)
		n.fs.Fail(func(op crashfs.Op, _ string) error {
			if op == crashfs.Open || flaky > 0 && !w.chance(flaky) {
				return nil
			}
			return errors.New("no space left on device")
		})
	case p < 96:
		w.fault("clock stepped")
		w.note("of %s", n.name)
		n.skew += []time.Duration{time.Hour, -time.Hour, time.Second, -time.Second}[w.rand.IntN(4)]
		n.stepped, n.set = true, true
	case p < 97:
		w.fault("outage of hours")
		was := w.down
		w.down = true
		w.central.stop() // its timers would cost much of the run
		if err := w.store.Close(); err != nil {
			w.t.Error(err)
		}
		for range 20 + w.rand.IntN(60) {
			for _, n := range w.nodes {
				n.poll()
				n.disk()
				n.send(n.agent.Live)
				n.disk()
			}
			time.Sleep(time.Duration(1+w.rand.IntN(20)) * time.Minute)
			synctest.Wait()
		}
		w.down = was
		w.startCentral()
	case p < 98:
		w.fault("poison")
		id := fmt.Sprint("poison ", len(w.poison))
		w.poison = append(w.poison, id)
		q := w.queues[[]string{bus.SamplesQueue(0), bus.StoreQueue(0)}[w.rand.IntN(2)]]
		q.waiting = append(q.waiting, &bus.Delivery{Message: bus.Message{
			ID: id, ContentType: sample.ContentType, ContentEncoding: sample.ContentEncoding, KeyID: "n0", HMAC: strings.Repeat("0", 64), Body: []byte("x"),
		}})
	default:
		time.Sleep(time.Duration(w.rand.IntN(300)) * time.Second)
		synctest.Wait()
	}
}

// killCentral takes the power from central and its store: between two handlings,
// after the store has committed and before the ack, or in the midst of a write of the
// commit or of the flush.
func (w *world) killCentral() {
	w.fault("central's host loses power")
	w.store.mu.Lock()
	w.store.keep = 100 * w.rand.IntN(2) // drawn here, so that the order of draws is that of the steps
	w.store.mu.Unlock()
	switch w.rand.IntN(3) {
	case 0:
		w.consume(w.central, bus.StoreQueue(0), true)
	case 1:
		w.store.mu.Lock()
		w.store.cutIn = 1 + w.rand.IntN(6)
		w.store.mu.Unlock()
		w.consume(w.central, bus.StoreQueue(0), true)
	case 2:
		w.store.mu.Lock()
		w.store.cutIn = 1 + w.rand.IntN(20)
		w.store.mu.Unlock()
		time.Sleep(time.Minute) // a flush
		synctest.Wait()
	}
	w.central.stop()
	w.store.crash()
	w.startCentral()
}

// settle ends all faults and lets everything arrive.
func (w *world) settle() {
	w.down = false
	for _, n := range w.nodes {
		n.fs.Fail(nil)
	}
	for idle, round := 0, 0; idle < 4; round++ {
		if round == 5000 {
			w.t.Fatal("it never comes to rest")
		}
		if round < 3 { // what is lost is told by new batches
			for _, n := range w.nodes {
				n.poll()
			}
		}
		busy := false
		for _, n := range w.nodes {
			n.disk()
			busy = n.send(n.agent.Live) || busy
			n.disk()
			busy = n.send(n.agent.Backlog) || busy
			n.disk()
		}
		for w.consume(w.notifier, bus.SamplesQueue(0), false) {
			busy = true
			time.Sleep(time.Second)
		}
		for w.consume(w.central, bus.StoreQueue(0), false) {
			busy = true
			time.Sleep(time.Second)
		}
		wait := time.Second
		if !busy {
			wait = 31 * time.Second
		}
		time.Sleep(wait)
		synctest.Wait()
		if idle++; busy {
			idle = 0
		}
	}
}

// close ends all processes.
func (w *world) close() {
	for _, n := range w.nodes {
		n.countDrops()
		if err := n.agent.Close(); err != nil {
			w.t.Error(err)
		}
	}
	w.notifier.stop()
	w.central.stop()
	if err := w.store.Close(); err != nil {
		w.t.Error(err)
	}
}
