package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// fakeReader answers what usage says of each PID.
type fakeReader struct {
	origin string
	mu     sync.Mutex
	usage  map[int]bpf.Usage
	vcpus  map[int][]bpf.VCPUUsage // by PID
	last   []bpf.Proc
	err    error
	reads  int

	canceled bool // give up with the context
}

func (f *fakeReader) Origin() string   { return f.origin }
func (f *fakeReader) Stats() bpf.Stats { return bpf.Stats{} }
func (f *fakeReader) Close() error     { return nil }

func (f *fakeReader) VCPUs(i int) []bpf.VCPUUsage {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.vcpus[f.last[i].PID]
}

func (f *fakeReader) Read(ctx context.Context, procs []bpf.Proc, out []bpf.Usage) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	f.last = append(f.last[:0], procs...)
	if f.err != nil {
		return f.err
	}
	if err := ctx.Err(); f.canceled && err != nil {
		return err
	}
	for i, p := range procs {
		u, ok := f.usage[p.PID]
		if !ok {
			u.Err = bpf.ErrGone
		}
		out[i] = u
	}
	return nil
}

// count returns how often it was read.
func (f *fakeReader) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reads
}

func (f *fakeReader) set(pid int, u bpf.Usage) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.usage[pid] = u
}

// fakeLinks has the interface tapN at index N+shift.
type fakeLinks struct {
	shift int
	table []rtnl.Link // sorted by index
	err   error

	removed   []rtnl.Removed
	elsewhere bool
}

func (f *fakeLinks) Read(_ context.Context, links []rtnl.Link) ([]rtnl.Link, error) {
	return append(links, f.table...), f.err
}

func (f *fakeLinks) Removed(each func(rtnl.Removed)) error {
	for _, l := range f.removed {
		each(l)
	}
	f.removed = nil
	return nil
}

func (f *fakeLinks) Index(name string) (int, error) {
	i := 0
	if _, err := fmt.Sscanf(name, "tap%d", &i); err != nil {
		return 0, rtnl.ErrNoLink
	}
	return i + f.shift, nil
}

func (f *fakeLinks) Elsewhere(int, string) bool { return f.elsewhere }

// fakeGuests is a libvirt.
type fakeGuests struct {
	mu      sync.Mutex
	defs    map[string]*collectors.Definition
	idle    []*collectors.Definition
	stats   map[string]collectors.GuestStats
	errs    map[string]error
	err     error
	wanted  []string
	changes chan struct{}
	pauses  chan libvirt.Pause
	last    map[string]*collectors.Definition

	counted    int // how often Counters was called
	counterErr error

	stat func(ctx context.Context, uuid string) // called by Stats
}

func (f *fakeGuests) Definitions() map[string]*collectors.Definition {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.defs
}

func (f *fakeGuests) Stopped() []*collectors.Definition {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.idle
}

func (f *fakeGuests) Last(uuid string) *collectors.Definition { return f.last[uuid] }

func (f *fakeGuests) Sizes(_ context.Context, uuid, _ string) (collectors.DiskStats, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stats[uuid].Disks[0], f.errs[uuid]
}

func (f *fakeGuests) Changes() <-chan struct{} { return f.changes }

func (f *fakeGuests) Pauses() <-chan libvirt.Pause { return f.pauses }

func (f *fakeGuests) Refresh(uuid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wanted = append(f.wanted, uuid)
}

func (f *fakeGuests) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeGuests) ErrOf(string) error { return f.Err() }

func (f *fakeGuests) Away() []error { return nil }

func (f *fakeGuests) Run(ctx context.Context) { <-ctx.Done() }

// Counters says what Stats says.
func (f *fakeGuests) Counters(_ context.Context, cpu []string, nics bool) (map[string]collectors.GuestStats, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counted++
	all := map[string]collectors.GuestStats{}
	for uuid, s := range f.stats {
		var g collectors.GuestStats
		if slices.Contains(cpu, uuid) {
			g.CPUTime, g.HasCPU = s.CPUTime, s.HasCPU
		}
		if nics {
			g.NICs = s.NICs
		}
		all[uuid] = g
	}
	return all, f.counterErr
}

func (f *fakeGuests) Stats(ctx context.Context, uuid string, _ collectors.Groups) (collectors.GuestStats, error) {
	if f.stat != nil {
		f.stat(ctx, uuid)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stats[uuid], f.errs[uuid]
}

func guestUUID(n int) string { return fmt.Sprintf("5e1f0000-0000-4000-8000-%012x", n) }

func definition(n int) *collectors.Definition {
	u := guestUUID(n)
	return &collectors.Definition{
		UUID: u, Name: fmt.Sprintf("instance-%08x", n), Display: fmt.Sprintf("vm%d", n), Project: "p", User: "u", VCPUs: 1,
		State: 1, Memory: 16384, Perf: true, Flavor: &collectors.Flavor{Name: "m1.nano", RootGiB: 2, EphemeralGiB: 1},
		Metadata: fmt.Appendf(nil, `{"display_name":"vm%d"}`, n),
		NICs:     []collectors.NIC{{Device: fmt.Sprintf("tap%d", n), Resource: fmt.Sprintf("nic%d", n), Metadata: []byte(`{"name":"tap"}`)}},
		Disks:    []collectors.Disk{{Device: "vda", Sources: []string{fmt.Sprintf("/var/lib/vm%d.img", n)}, Resource: u + "-vda", Metadata: []byte(`{"disk_name":"vda"}`)}},
	}
}

// world is an agent with everything around it faked.
type world struct {
	t      testing.TB
	proc   fakeProc
	reader *fakeReader
	links  *fakeLinks
	guests *fakeGuests
	bus    *fakeBus
	cfg    Config
	deps   Deps
	agent  *Agent

	batches int // that take has found
}

// newWorld has guests 1 to n, with PIDs 101 and so on.
func newWorld(t testing.TB, n int, adapt func(*world)) *world {
	t.Helper()
	w := &world{
		t: t, proc: newProc(t), bus: newBus(), cfg: testConfig(), links: &fakeLinks{},
		reader: &fakeReader{origin: "walk", usage: map[int]bpf.Usage{}},
		guests: &fakeGuests{defs: map[string]*collectors.Definition{}, stats: map[string]collectors.GuestStats{}, errs: map[string]error{}, changes: make(chan struct{}, 1)},
	}
	for i := 1; i <= n; i++ {
		w.start(i)
	}
	w.deps = Deps{Log: zap.NewNop(), Publisher: w.bus, Usage: []collectors.UsageReader{w.reader}, Links: w.links, proc: w.proc.dir, guest: w.guests}
	if t, ok := t.(*testing.T); ok {
		w.deps.Log = zaptest.NewLogger(t)
	}
	if adapt != nil {
		adapt(w)
	}
	var err error
	if w.agent, err = New(w.cfg, w.deps); err != nil {
		t.Fatal(err)
	}
	return w
}

// alone has libvirt stand in for nobody.
func alone(w *world) {
	w.cfg.Origins = map[string][]sample.Origin{"cpu.process": readerOrigins, "network.*": {sample.RTNL}}
}

// start makes guest n, which has used n seconds.
func (w *world) start(n int) {
	w.proc.guest(100+n, uint64(1000+n), guestUUID(n), fmt.Sprintf("instance-%08x", n))
	u := used(uint64(n)*1e9, 5, 0)
	u.HasWait, u.HasIO, u.Wait[bpf.VCPU], u.ReadBytes, u.WriteBytes, u.VCPUs = true, true, 7, 8, 9, 1
	w.reader.set(100+n, u)
	w.links.table = append(w.links.table, rtnl.Link{Index: n, RxBytes: 10, TxBytes: 20, RxPackets: 1, TxPackets: 2})
	defs := map[string]*collectors.Definition{guestUUID(n): definition(n)}
	for k, v := range w.guests.Definitions() {
		defs[k] = v
	}
	w.guests.defs = defs
}

// task returns the agent's plan of that kind.
func (w *world) task(qemu bool) *task {
	w.t.Helper()
	for _, p := range w.agent.plans {
		if p.qemu == qemu {
			return newTask(p, w.agent.hooks)
		}
	}
	w.t.Fatal("no such plan")
	return nil
}

// poll polls once and returns what it made.
func (w *world) poll(task *task) ([]sample.Sample, []sample.Gap) {
	w.t.Helper()
	w.agent.mu.Lock()
	w.agent.scanned = time.Time{} // as if minScan had passed
	w.agent.mu.Unlock()
	if task.qemu {
		w.agent.pollQEMU(w.t.Context(), task)
	} else {
		w.agent.poll(w.t.Context(), task)
	}
	return w.take()
}

// take returns the samples and gaps of the batches that wait.
func (w *world) take() (samples []sample.Sample, gaps []sample.Gap) {
	w.t.Helper()
	w.batches = 0
	dec, err := sample.NewDecoder()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, m := range w.agent.deliver.Take() {
		w.batches++
		b, err := dec.Decode(m.Body)
		if err != nil {
			w.t.Fatal(err)
		}
		samples = slices.AppendSeq(samples, b.Samples())
		gaps = append(gaps, b.Gaps...)
	}
	return samples, gaps
}

// brief shows samples as "resource meter volume".
func brief(samples []sample.Sample, keep ...string) []string {
	var out []string
	for _, s := range samples {
		if slices.Contains(keep, s.Name) {
			out = append(out, fmt.Sprintf("%s %s %s", strings.TrimPrefix(s.Resource, "5e1f0000-0000-4000-8000-00000000000"), s.Name, s.Volume))
		}
	}
	slices.Sort(out)
	return out
}

// ofADomain is how many samples a domain of newWorld has at a poll that asks no
// QEMU: with its NIC, its size and its state.
const ofADomain = usageCount + nicCount + 2 + 6

func TestPoll(t *testing.T) {
	w := newWorld(t, 2, nil)
	before := time.Now()
	samples, gaps := w.poll(w.task(false))
	if len(gaps) != 0 {
		t.Errorf("gaps %+v", gaps)
	}
	if want := 2 * ofADomain; len(samples) != want {
		t.Fatalf("%d samples, want %d", len(samples), want)
	}
	want := []string{
		"1 cpu 1000000000", "1 cpu.process 1000000005", "1 cpu.wait 7", "1 disk.host.read.bytes 8",
		"2 cpu 2000000000", "2 cpu.process 2000000005", "2 cpu.wait 7", "2 disk.host.read.bytes 8",
		"nic1 network.incoming.bytes 20", "nic1 network.outgoing.packets 1",
		"nic2 network.incoming.bytes 20", "nic2 network.outgoing.packets 1",
	}
	if diff := cmp.Diff(want, brief(samples, "cpu", "cpu.process", "cpu.wait", "disk.host.read.bytes", "network.incoming.bytes", "network.outgoing.packets")); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	for _, s := range samples {
		origin := sample.Walk
		if strings.HasPrefix(s.Name, "network.") {
			origin = sample.RTNL
		}
		if s.Kind != sample.Cumulative {
			continue
		}
		if s.Origin != origin || s.Project != "p" || s.User != "u" || s.Source != "openstack" ||
			s.Incarnation == 0 || len(s.Metadata) == 0 || s.Time != samples[0].Time {
			t.Errorf("sample %+v", s)
		}
	}
	if at := time.UnixMicro(samples[0].Time); at.Before(before.Add(-time.Millisecond)) || at.After(time.Now()) {
		t.Errorf("time %s is not that of the poll", at)
	}
}

func TestADomainThatCannotBeReadCostsOnlyItself(t *testing.T) {
	w := newWorld(t, 3, alone)
	task := w.task(false)
	first, _ := w.poll(task)
	w.reader.set(102, bpf.Usage{Err: bpf.ErrTorn})
	samples, gaps := w.poll(task)
	if diff := cmp.Diff([]string{"1 cpu 1000000000", "3 cpu 3000000000"}, brief(samples, "cpu")); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	if len(gaps) != 1 || gaps[0].Resource != guestUUID(2) || gaps[0].Meter != "*" || gaps[0].Reason != bpf.ErrTorn.Error() ||
		gaps[0].From != first[0].Time || gaps[0].To != samples[0].Time {
		t.Errorf("gaps %+v", gaps)
	}
	again := used(9e9, 5, 0)
	again.HasWait, again.HasIO = true, true
	w.reader.set(102, again)
	samples, gaps = w.poll(task)
	if len(gaps) != 0 || !slices.Contains(brief(samples, "cpu"), "2 cpu 9000000000") {
		t.Errorf("after it can be read again: %v, gaps %+v", brief(samples, "cpu"), gaps)
	}
}

func TestADomainThatEnds(t *testing.T) {
	for name, end := range map[string]func(*world){
		"between two polls": func(w *world) { w.proc.kill(102) },
		"during a poll":     func(w *world) { delete(w.reader.usage, 102) },
		"and its PID is used by another program": func(w *world) {
			w.proc.run(102, 5000, "sh")
			w.reader.set(102, bpf.Usage{Err: bpf.ErrReused})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 2, nil)
			task := w.task(false)
			old, _ := w.poll(task)
			end(w)
			samples, gaps := w.poll(task)
			var lost []string
			for _, g := range gaps {
				lost = append(lost, g.Resource)
				// The disk was never read; all the others were, at the first poll.
				if !strings.Contains(g.Reason, "ended") || g.From != old[0].Time && !strings.HasSuffix(g.Resource, "vda") {
					t.Errorf("gap %+v", g)
				}
			}
			if diff := cmp.Diff([]string{"nic2", guestUUID(2) + "-vda", guestUUID(2)}, lost); diff != "" {
				t.Errorf("gaps of (-want +got):\n%s", diff)
			}
			got := brief(samples, "cpu")
			if diff := cmp.Diff([]string{"1 cpu 1000000000"}, got); diff != "" {
				t.Errorf("samples (-want +got):\n%s", diff)
			}
			if len(w.agent.domains) != 1 || len(w.agent.order) != 1 || len(w.agent.procs) != 1 {
				t.Errorf("its state is kept: %d, %d, %d", len(w.agent.domains), len(w.agent.order), len(w.agent.procs))
			}

			// Started again, it is another one.
			w.proc.guest(102, 6000, guestUUID(2), "instance-00000002")
			w.reader.set(102, used(1, 1, 0))
			samples, _ = w.poll(task)
			find := func(ss []sample.Sample) sample.Sample {
				return ss[slices.IndexFunc(ss, func(s sample.Sample) bool { return s.Resource == guestUUID(2) && s.Name == "cpu" })]
			}
			if a, b := find(old), find(samples); a.Incarnation == b.Incarnation || b.Volume != sample.Uint(1) {
				t.Errorf("before %+v\nafter %+v", a, b)
			}
		})
	}
}

func TestADeviceThatIsUnpluggedIsAGap(t *testing.T) {
	w := newWorld(t, 1, nil)
	task := w.task(false)
	old, _ := w.poll(task)
	def := *w.guests.defs[guestUUID(1)]
	def.NICs = nil
	w.guests.defs = map[string]*collectors.Definition{guestUUID(1): &def}
	samples, gaps := w.poll(task)
	if got := brief(samples, "cpu", "network.incoming.bytes"); len(got) != 1 {
		t.Errorf("samples %v, want cpu only", got)
	}
	if len(gaps) != 1 || gaps[0].Resource != "nic1" || gaps[0].From != old[0].Time || !strings.Contains(gaps[0].Reason, "removed") {
		t.Errorf("gaps %+v", gaps)
	}
	if _, gaps = w.poll(task); len(gaps) != 0 {
		t.Errorf("gaps %+v again", gaps)
	}
}

func TestAnInterfaceThatIsMadeAnewIsAnotherNIC(t *testing.T) {
	w := newWorld(t, 1, nil)
	task := w.task(false)
	old, _ := w.poll(task)
	w.links.table = nil // the tap is gone before libvirt says so
	samples, gaps := w.poll(task)
	if got := brief(samples, "network.incoming.bytes"); len(got) != 0 {
		t.Errorf("samples %v", got)
	}
	if len(gaps) != 1 || gaps[0].Resource != "nic1" || gaps[0].From != old[0].Time {
		t.Errorf("gaps %+v", gaps)
	}
	if _, gaps = w.poll(task); len(gaps) != 0 {
		t.Errorf("gaps %+v again", gaps)
	}
	w.links.table, w.links.shift = []rtnl.Link{{Index: 8, TxBytes: 3}}, 7
	samples, _ = w.poll(task)
	find := func(ss []sample.Sample) sample.Sample {
		i := slices.IndexFunc(ss, func(s sample.Sample) bool { return s.Name == "network.incoming.bytes" })
		if i < 0 {
			t.Fatal("no sample of the NIC")
		}
		return ss[i]
	}
	if a, b := find(old), find(samples); a.Incarnation == b.Incarnation || b.Volume != sample.Uint(3) {
		t.Errorf("before %+v\nafter %+v", a, b)
	}
}

func TestATapThatAnotherDomainHasNowIsNotThisOnes(t *testing.T) {
	w := newWorld(t, 1, nil)
	task := w.task(false)
	w.poll(task)
	// The port is moved to another domain while libvirt is away.
	w.guests.err = errors.New("libvirt is away")
	w.links.table, w.links.shift = []rtnl.Link{{Index: 8, TxBytes: 3}}, 7
	w.poll(task)
	for range 3 {
		if samples, _ := w.poll(task); len(brief(samples, "network.incoming.bytes")) != 0 {
			t.Fatalf("samples %v of an interface that libvirt did not say is the domain's", brief(samples, "network.incoming.bytes"))
		}
	}
	w.guests.err = nil
	if samples, _ := w.poll(task); len(brief(samples, "network.incoming.bytes")) != 1 {
		t.Error("no sample of the NIC after libvirt answers again")
	}
}

func TestTwoProcessesOfOneUUIDShareNoDevices(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.guests.stats[guestUUID(1)] = collectors.GuestStats{HasCPU: true, CPUTime: 1, Disks: []collectors.DiskStats{{Device: "vda"}}}
	poll, qemu := w.task(false), w.task(true)
	old, _ := w.poll(poll)
	// Started anew before its old process was reaped.
	w.proc.guest(90, 2000, guestUUID(1), "instance-00000001")
	w.reader.set(90, used(1e9, 5, 0))
	w.links.shift = 1
	w.links.table = []rtnl.Link{{Index: 2, TxBytes: 5}}
	w.poll(poll)
	w.agent.order[0].found = time.Now().Add(-grace)
	for range 2 {
		samples, _ := w.poll(poll)
		if got := brief(samples, "cpu", "network.incoming.bytes"); !slices.Equal(got, []string{"1 cpu 1000000000", "1 cpu 1000000000", "nic1 network.incoming.bytes 5"}) {
			t.Errorf("samples %v, want the CPU of both and one NIC", got)
		}
		for _, s := range samples {
			if s.Name == "network.incoming.bytes" && s.Incarnation == old[slices.IndexFunc(old, func(o sample.Sample) bool { return o.Name == s.Name })].Incarnation {
				t.Error("the NIC is the old process's")
			}
		}
	}
	samples, _ := w.poll(qemu)
	if got := brief(samples, "disk.device.read.bytes"); len(got) != 1 {
		t.Errorf("samples %v, want one disk", got)
	}
}

func TestAWatcherWhoLeavesIsNoFault(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.poll(w.task(false))
	w.reader.canceled = true
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.agent.watchers.Add(1)
	r := w.agent.glance(ctx, 0)
	if r.domains[0].info.Error != "" {
		t.Errorf("domain: %s", r.domains[0].info.Error)
	}
	for _, n := range w.agent.Notes() {
		if strings.Contains(n, "canceled") {
			t.Errorf("note %q", n)
		}
	}
}

func TestTwoPlansAskQEMUOneAfterTheOther(t *testing.T) {
	var asking, most atomic.Int32
	w := newWorld(t, 3, func(w *world) {
		w.guests.stat = func(context.Context, string) {
			most.Store(max(most.Load(), asking.Add(1)))
			time.Sleep(5 * time.Millisecond)
			asking.Add(-1)
		}
	})
	var polls sync.WaitGroup
	for range 2 {
		task := w.task(true)
		polls.Go(func() { w.agent.pollQEMU(t.Context(), task) })
	}
	polls.Wait()
	if n := most.Load(); n != 1 {
		t.Errorf("%d questions at once, which libvirt refuses: it looks as if QEMU hung", n)
	}
}

func TestAFailedScanIsCountedOnce(t *testing.T) {
	w := newWorld(t, 0, nil)
	w.agent.scanner.proc = "/nowhere"
	w.poll(w.task(true))
	if n := value(t, w.agent.runs.discovery.failures); n != 1 {
		t.Errorf("%v failures are counted, want 1", n)
	}
}

func TestFallOver(t *testing.T) {
	second := &fakeReader{origin: "cpuclock", usage: map[int]bpf.Usage{101: used(900, 5, 0)}}
	w := newWorld(t, 1, func(w *world) { w.deps.Usage = append(w.deps.Usage, second); alone(w) })
	w.reader.set(101, used(1000, 5, 0))
	task := w.task(false)
	w.poll(task)
	w.reader.err = errors.New("the program is gone")
	samples, gaps := w.poll(task)
	if len(gaps) != 0 {
		t.Errorf("gaps %+v although another reader answers", gaps)
	}
	for _, s := range samples {
		if s.Name == "cpu" && (s.Origin != sample.CPUClock || s.Volume != sample.Uint(1000)) {
			t.Errorf("cpu is %s by %s, want 1000 held, by cpuclock", s.Volume, s.Origin)
		}
	}
	if n := value(t, w.agent.metrics.heldUsage[iCPU]); n != 1 {
		t.Errorf("%v held values are counted, want 1", n)
	}
	if !slices.ContainsFunc(w.agent.Notes(), func(s string) bool { return strings.Contains(s, "the program is gone") }) {
		t.Errorf("notes %q do not say that walk failed", w.agent.Notes())
	}

	second.err = errors.New("no /proc")
	samples, gaps = w.poll(task)
	if got := brief(samples, "cpu", "network.incoming.bytes"); len(got) != 1 {
		t.Errorf("samples %v, want those of the NIC only", got)
	}
	if len(gaps) != 1 || gaps[0].Resource != guestUUID(1) {
		t.Errorf("gaps %+v", gaps)
	}

	w.reader.err = nil
	w.reader.set(101, used(2000, 5, 0))
	samples, _ = w.poll(task)
	if diff := cmp.Diff([]string{"1 cpu 2000"}, brief(samples, "cpu")); diff != "" {
		t.Errorf("after walk answers again (-want +got):\n%s", diff)
	}
}

func TestLinksThatCannotBeReadAreAGap(t *testing.T) {
	w := newWorld(t, 1, alone)
	task := w.task(false)
	w.poll(task)
	w.links.err = errors.New("netlink is out of order")
	samples, gaps := w.poll(task)
	if got := brief(samples, "cpu", "network.incoming.bytes"); len(got) != 1 || got[0] != "1 cpu 1000000000" {
		t.Errorf("samples %v, want CPU only", got)
	}
	if len(gaps) != 1 || gaps[0].Resource != "nic1" {
		t.Errorf("gaps %+v", gaps)
	}
}

func TestANewDomainWaitsForLibvirtAMoment(t *testing.T) {
	w := newWorld(t, 1, nil)
	def := w.guests.defs
	w.guests.defs = nil
	task := w.task(false)
	if samples, _ := w.poll(task); len(samples) != 0 {
		t.Errorf("%d samples before libvirt said whose they are", len(samples))
	}
	if !slices.Contains(w.guests.wanted, guestUUID(1)) {
		t.Error("libvirt was not asked for it")
	}
	w.guests.defs = def
	samples, _ := w.poll(task)
	if len(samples) == 0 || samples[0].Project != "p" {
		t.Errorf("samples %v after it did", brief(samples, "cpu"))
	}
	w.guests.defs = nil // libvirtd restarts
	samples, _ = w.poll(task)
	if len(samples) == 0 || samples[0].Project != "p" {
		t.Errorf("samples %v after libvirt forgot it", brief(samples, "cpu"))
	}
}

func TestADomainThatLibvirtDoesNotKnowIsMeteredAllTheSame(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.guests.defs = nil
	task := w.task(false)
	w.poll(task)
	w.agent.order[0].found = time.Now().Add(-grace)
	samples, _ := w.poll(task)
	if len(samples) != usageCount+1 || samples[0].Project != "" {
		t.Errorf("%d samples, project %q", len(samples), samples[0].Project)
	}
	var m map[string]string
	if err := json.Unmarshal(samples[0].Metadata, &m); err != nil || m["name"] != "instance-00000001" || m["instance_id"] != guestUUID(1) {
		t.Errorf("metadata %s", samples[0].Metadata)
	}
}

func TestWithoutLibvirt(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.deps.guest = nil })
	w.proc.run(101, 1001, "qemu-system-x86_64", "-netdev", "tap,ifname=tap1")
	samples, _ := w.poll(w.task(false))
	if want := usageCount + 1 + nicCount + 2; len(samples) != want {
		t.Fatalf("%d samples, want %d", len(samples), want)
	}
	if !isUUID(samples[0].Resource) {
		t.Errorf("a QEMU without a UUID has the resource %q", samples[0].Resource)
	}
	if samples, gaps := w.poll(w.task(true)); len(samples) != 0 || len(gaps) != 0 {
		t.Errorf("%d samples and %d gaps of meters that are switched off", len(samples), len(gaps))
	}
	if !slices.ContainsFunc(w.agent.Notes(), func(s string) bool { return strings.Contains(s, "libvirt is off") }) {
		t.Errorf("notes %q", w.agent.Notes())
	}
}

func TestPollQEMU(t *testing.T) {
	w := newWorld(t, 2, func(w *world) { w.cfg.CrosscheckInterval = 0 })
	task := w.task(true)
	w.guests.stats[guestUUID(1)] = collectors.GuestStats{
		CPUTime: 1e9 - 25, HasCPU: true,
		Disks: []collectors.DiskStats{{Device: "vda", ReadBytes: 1, WriteBytes: 2, ReadRequests: 3, WriteRequests: 4, FlushRequests: 5, ReadNs: 6, WriteNs: 7, Capacity: 9}},
	}
	w.guests.errs[guestUUID(2)] = libvirt.ErrBusy
	samples, gaps := w.poll(task)
	want := []string{
		"1-vda disk.device.allocation 0", "1-vda disk.device.capacity 9",
		"1-vda disk.device.flush.requests 5", "1-vda disk.device.read.bytes 1", "1-vda disk.device.read.latency 6", "1-vda disk.device.read.requests 3",
		"1-vda disk.device.usage 0", "1-vda disk.device.write.bytes 2", "1-vda disk.device.write.latency 7", "1-vda disk.device.write.requests 4",
	}
	var all []string
	for _, m := range sample.Catalogue {
		all = append(all, m.Name)
	}
	if diff := cmp.Diff(want, brief(samples, all...)); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	resources := map[string]string{}
	for _, g := range gaps {
		resources[g.Resource] = g.Meter
	}
	if diff := cmp.Diff(map[string]string{guestUUID(2) + "-vda": "*"}, resources); diff != "" {
		t.Errorf("gaps (-want +got):\n%s", diff)
	}
}

func TestPollQEMUWhileLibvirtIsAway(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.guests.err = errors.New("there is no socket")
	qemu := w.task(true)
	samples, gaps := w.poll(qemu)
	if len(samples) != 0 || len(gaps) != len(qemu.meters) {
		t.Errorf("%d samples, gaps %+v", len(samples), gaps)
	}
	samples, gaps = w.poll(w.task(false))
	if len(samples) != ofADomain || len(gaps) != 0 {
		t.Errorf("what libvirt is not needed for: %d samples, gaps %+v", len(samples), gaps)
	}
}

func TestADomainThatEndsWhileLibvirtIsAsked(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.guests.stat = func(context.Context, string) {
		w.proc.kill(101)
		w.agent.mu.Lock()
		defer w.agent.mu.Unlock()
		w.agent.scanned = time.Time{}
		if err := w.agent.discover(time.Now()); err != nil {
			t.Error(err)
		}
	}
	if samples, _ := w.poll(w.task(true)); len(samples) != 0 {
		t.Errorf("%d samples of a domain that is gone", len(samples))
	}
}

func TestAHungGuestDelaysNobodysCPU(t *testing.T) {
	release := make(chan struct{})
	w := newWorld(t, 2, func(w *world) {
		w.cfg.Interval, w.cfg.QEMUInterval = minInterval, minInterval
		w.guests.stat = func(ctx context.Context, _ string) {
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agent.Run(ctx) }()
	for range 3 { // three batches leave while libvirt answers nothing
		<-w.bus.got
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	close(release)
	cpu := 0
	for _, b := range w.bus.batches(t, nil) {
		cpu += len(brief(slices.Collect(b.Samples()), "cpu"))
	}
	if cpu < 4 {
		t.Errorf("%d samples of cpu, want those of several polls", cpu)
	}
}

func TestLargeBatchesAreSplit(t *testing.T) {
	w := newWorld(t, 10, nil)
	for _, d := range w.guests.defs {
		d.Metadata = fmt.Appendf(nil, `{"x":"%s"}`, strings.Repeat("y", maxBytes/4))
	}
	w.poll(w.task(false))
	w.agent.poll(t.Context(), w.task(false))
	samples, _ := w.take()
	if w.batches < 3 {
		t.Errorf("%d batches of 20 MiB, want at least 3", w.batches)
	}
	if want := 10 * ofADomain; len(samples) != want {
		t.Errorf("%d samples, want %d", len(samples), want)
	}
}

func TestBatchesHoldNoMoreThanTheirIdsCanNumber(t *testing.T) {
	w := newWorld(t, 0, nil)
	task := w.task(false)
	const rows = 4000
	for range rows {
		w.agent.row(task, &sample.Row{Resource: "r", Source: "openstack"}, usageCount+nicCount, 1)
		for _, m := range usageMeters {
			task.builder.Add(m.MeterRef, sample.Walk, sample.Uint(1))
		}
		for _, m := range nicMeters {
			task.builder.Add(m.MeterRef, sample.RTNL, sample.Uint(1))
		}
	}
	w.agent.flush(task, 1)
	if samples, _ := w.take(); len(samples) != rows*(usageCount+nicCount) {
		t.Errorf("%d samples, want %d", len(samples), rows*(usageCount+nicCount))
	}
	if w.batches != 2 {
		t.Errorf("%d batches, want 2", w.batches)
	}
}

func TestRunDeliversWhatIsLeft(t *testing.T) {
	w := newWorld(t, 2, func(w *world) { w.cfg.Interval = minInterval })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agent.Run(ctx) }()
	<-w.bus.got
	<-w.bus.got
	w.bus.set(true)
	select {
	case <-w.bus.got: // one that arrived
	default:
	}
	<-w.bus.got
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "not delivered") {
		t.Errorf("Run() = %v, want it to say what is lost", err)
	}
}

func TestDryRun(t *testing.T) {
	w := newWorld(t, 2, nil)
	for n := 1; n <= 2; n++ {
		w.guests.stats[guestUUID(n)] = w.agreeing(n)
	}
	w.deps.Publisher = nil
	w.reader.vcpus = map[int][]bpf.VCPUUsage{101: {{Run: 1}}, 102: {{Run: 2}}}
	samples, gaps, notes, err := DryRun(t.Context(), w.cfg, w.deps)
	if err != nil {
		t.Fatal(err)
	}
	var catalogue []*sample.Meter
	for _, m := range sample.Catalogue {
		if m.Legacy {
			continue
		}
		counted := m
		if c := m.Check; c != nil && m != c.Verdict { // what cannot be compared has a verdict only
			counted = c.Of
		}
		if m == sample.KVMExits || !slices.Contains([]sample.Origin{sample.Iomap, sample.TCX, sample.IPMI, sample.KVM, sample.RunQueue, sample.Exits}, counted.Origins[0]) { // there are no hooks, no BMC and no KVM, whose exits libvirt tells
			catalogue = append(catalogue, m)
		}
	}
	if want := 2 * len(catalogue); len(samples) != want || len(gaps) != 0 {
		t.Errorf("%d samples and %d gaps, want %d and 0", len(samples), len(gaps), want)
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "5m0s") {
		t.Errorf("notes %q", notes)
	}
	if !slices.IsSortedFunc(samples, func(a, b sample.Sample) int { return strings.Compare(a.Resource, b.Resource) }) {
		t.Error("the samples of a resource are not together")
	}
	var names []string
	for _, s := range samples {
		if s.Resource == guestUUID(2) {
			names = append(names, s.Name)
		}
	}
	var want []string
	for _, m := range catalogue {
		if m.Resource == "domain" {
			want = append(want, m.Name)
		}
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("meters of a domain (-want +got):\n%s", diff)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		adapt func(*Config)
		want  string
	}{
		"another definition of cpu":  {func(c *Config) { c.CPUDefinition = "process" }, `cpu_definition "process": it is vcpu`},
		"a bad list of meters":       {func(c *Config) { c.LegacyMeters = Patterns{"instance", "!disk.*"} }, `legacy_meters: both included`},
		"an interval of nothing":     {func(c *Config) { c.Interval = 0 }, "interval 0s is too short"},
		"a node without a name":      {func(c *Config) { c.Node = "" }, "node is empty"},
		"a key file that is missing": {func(c *Config) { c.KeyFile = "/nowhere/key" }, "/nowhere/key"},
		"a polling file that is too": {func(c *Config) { c.Polling = "/nowhere/polling.yaml" }, "/nowhere/polling.yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 0, nil)
			w.deps.Registry = nil
			tc.adapt(&w.cfg)
			if _, err := New(w.cfg, w.deps); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestSockets(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		want Sockets
	}{
		"off switches libvirt off":  {"libvirt: off", nil},
		"one path":                  {"libvirt: /a", Sockets{"/a"}},
		"a list":                    {"libvirt: [/a, /b]", Sockets{"/a", "/b"}},
		"nothing keeps the default": {"node: x", DefaultConfig().Libvirt},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := DefaultConfig()
			if err := yaml.Unmarshal([]byte(tc.text), &cfg); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, cfg.Libvirt); diff != "" {
				t.Errorf("sockets (-want +got):\n%s", diff)
			}
			text, err := yaml.Marshal(cfg)
			if err != nil {
				t.Fatal(err)
			}
			again := DefaultConfig()
			if err := yaml.Unmarshal(text, &again); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(cfg, again); diff != "" {
				t.Errorf("written and read (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSocket(t *testing.T) {
	w := newWorld(t, 2, func(w *world) {
		w.cfg.Socket = filepath.Join(t.TempDir(), "run", "agent.sock")
		w.cfg.Interval = time.Hour // the watcher has to read by itself
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agent.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	if _, err := New(w.cfg, w.deps); !errors.Is(err, ErrInUse) {
		t.Errorf("a second agent: %v, want %v", err, ErrInUse)
	}
	var got []client.Snapshot
	stop := errors.New("enough")
	err := client.Client{Path: w.cfg.Socket}.Watch(ctx, minWatch, func(s client.Snapshot) error {
		got = append(got, s)
		u := w.reader.usage[101]
		u.Run[bpf.VCPU] += 1e9
		u.Process += 1e9
		w.reader.set(101, u)
		if len(got) == 3 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if len(got[0].Domains) != 2 || got[0].Seconds != 0 || got[0].Domains[0].CPU != 0 {
		t.Errorf("first snapshot %+v", got[0])
	}
	d := got[2].Domains[0]
	if want := 100 / got[2].Seconds; d.CPU < want*0.99 || d.CPU > want*1.01 || d.UUID != guestUUID(1) || d.Display != "vm1" || d.Project != "p" || d.VCPUs != 1 || d.Origin != "walk" {
		t.Errorf("third snapshot %+v, want %g %% CPU", d, want)
	}
	if got[2].Domains[1].CPU != 0 || got[2].Node != "node" {
		t.Errorf("third snapshot %+v", got[2])
	}
	if err := (client.Client{Path: w.cfg.Socket}).Watch(ctx, time.Millisecond, func(client.Snapshot) error { return nil }); err == nil || !strings.Contains(err.Error(), "at least 100ms") {
		t.Errorf("watch=1ms: %v, want a refusal", err)
	}
}

func TestWatchSharesThePolls(t *testing.T) {
	w := newWorld(t, 1, func(w *world) {
		w.cfg.Socket = filepath.Join(t.TempDir(), "agent.sock")
		w.cfg.Interval = 200 * time.Millisecond
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agent.Run(ctx) }()
	// A poll that is late makes the watcher read by itself, on a busy machine too:
	// not every time.
	reads, stop := 0, errors.New("enough")
	for attempt := 0; attempt < 5 && (attempt == 0 || reads > 7); attempt++ {
		n, before := 0, 0
		err := client.Client{Path: w.cfg.Socket}.Watch(ctx, 200*time.Millisecond, func(client.Snapshot) error {
			if n++; n == 2 {
				before = w.reader.count()
			}
			if n == 7 {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) {
			t.Fatal(err)
		}
		reads = w.reader.count() - before
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if reads > 7 {
		t.Errorf("%d reads for 5 snapshots at the agent's own interval: it reads twice", reads)
	}
}

func BenchmarkPoll(b *testing.B) {
	for _, n := range []int{20, 500} {
		b.Run(fmt.Sprintf("domains=%d", n), func(b *testing.B) {
			w := newWorld(b, n, nil)
			t := w.task(false)
			samples, _ := w.poll(t)
			b.ReportAllocs()
			b.ResetTimer()
			for b.Loop() {
				w.agent.scanned = time.Now() // without the scan: see BenchmarkScan
				w.agent.poll(b.Context(), t)
				w.agent.deliver.Take()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/domain")
			b.ReportMetric(float64(len(samples)), "samples")
		})
	}
}
