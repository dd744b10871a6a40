package agent

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// Meters of the fake hooks.
var (
	fakeBytes   = &sample.Meter{MeterRef: sample.MeterRef{Name: "fake.bytes", Kind: sample.Cumulative, Unit: "B"}, Resource: "disk"}
	fakeBuckets = &sample.Meter{MeterRef: sample.MeterRef{Name: "fake.bucket", Kind: sample.Cumulative, Unit: "request"}, Resource: "disk", Parts: "N"}
)

// fakeHook has what counts says of each ID: fake.bytes, fake.bucket.3, and a
// tally that is not published.
type fakeHook struct {
	name    string
	on      bool
	targets []collectors.Target
	blind   bool // it can't see bytes
	counts  map[uint32][3]uint64
	refuse  error // Attach
	lame    error // Follow
	fail    error // Read
}

func (f *fakeHook) Name() string          { return f.name }
func (f *fakeHook) Origin() sample.Origin { return sample.Iomap }
func (f *fakeHook) Close() error          { return nil }

func (f *fakeHook) Stats() collectors.HookStats {
	return collectors.HookStats{Misses: 1, Dropped: 2, Orphans: 3, Entries: 4, MaxEntries: 5}
}

func (f *fakeHook) Series() []collectors.Series {
	return []collectors.Series{
		{MeterRef: fakeBytes.MeterRef, Meter: fakeBytes, Cost: time.Microsecond},
		{MeterRef: fakeBuckets.Part("3"), Meter: fakeBuckets},
		{Tally: true},
	}
}

func (f *fakeHook) Attach() error {
	f.on = f.refuse == nil
	return f.refuse
}

func (f *fakeHook) Detach() error {
	f.on = false
	return nil
}

func (f *fakeHook) Follow(targets []collectors.Target) error {
	f.targets = slices.Clone(targets)
	return f.lame
}

func (f *fakeHook) Read(_ context.Context, emit func(uint32, int, uint64)) error {
	for id, counts := range f.counts {
		if !slices.Contains(f.ids(), id) {
			continue
		}
		for series, n := range counts {
			if series > 0 || !f.blind {
				emit(id, series, n)
			}
		}
	}
	return f.fail
}

// ids returns the IDs that the hook follows.
func (f *fakeHook) ids() (ids []uint32) {
	for _, t := range f.targets {
		ids = append(ids, t.ID)
		for _, k := range t.Disks {
			ids = append(ids, k.ID)
		}
		for _, k := range t.NICs {
			ids = append(ids, k.ID)
		}
	}
	return ids
}

// hookedWorld is a world whose agent has the hooks, with their meters polled.
func hookedWorld(t *testing.T, n int, profile string, fakes ...*fakeHook) *world {
	t.Helper()
	w := newWorld(t, n, func(w *world) {
		w.cfg.Profile = profile
		for _, f := range fakes {
			f.counts = map[uint32][3]uint64{}
			w.deps.Hooks = append(w.deps.Hooks, f)
		}
	})
	for i := range w.agent.plans {
		if !w.agent.plans[i].qemu {
			w.agent.plans[i].meters = append(w.agent.plans[i].meters, fakeBytes, fakeBuckets)
		}
	}
	return w
}

var hookMeters = []string{"fake.bytes", "fake.bucket.3", "check.hook.disk", "check.hook.tcx"}

func TestHooks(t *testing.T) {
	disk := &fakeHook{name: "disk"}
	w := hookedWorld(t, 2, "standard", disk)
	task := w.task(false)
	if got, _ := w.poll(task); !disk.on || len(brief(got, hookMeters...)) != 0 {
		t.Fatalf("attached %t, samples of disks that the hook has not told of: %v", disk.on, brief(got, hookMeters...))
	}
	if len(disk.targets) != 2 || disk.targets[0].Proc != (bpf.Proc{PID: 101, StartTicks: 1001}) || !slices.Equal(disk.targets[0].Disks[0].Sources, []string{"/var/lib/vm1.img"}) || disk.targets[0].NICs[0].Index != 1 {
		t.Fatalf("targets %+v", disk.targets)
	}
	vda, vda2 := disk.targets[0].Disks[0].ID, disk.targets[1].Disks[0].ID
	disk.counts[vda] = [3]uint64{0, 0, 0}
	disk.counts[vda2] = [3]uint64{100, 7, 0}
	got, gaps := w.poll(task)
	want := []string{"1 check.hook.disk 0", "1-vda fake.bytes 0", "2 check.hook.disk 0", "2-vda fake.bucket.3 7", "2-vda fake.bytes 100"}
	if diff := cmp.Diff(want, brief(got, hookMeters...)); diff != "" || len(gaps) != 0 {
		t.Errorf("samples (-want +got):\n%s\ngaps %+v", diff, gaps)
	}
	for _, s := range got {
		if s.Name == "fake.bytes" && (s.Origin != sample.Iomap || s.Incarnation == 0 || s.Project != "p") {
			t.Errorf("sample %+v", s)
		}
	}

	// The process moved 1,000 B more, of which the hook saw 940.
	u := w.reader.usage[102]
	u.ReadBytes += 1000
	w.reader.set(102, u)
	disk.counts[vda2] = [3]uint64{90, 7, 940} // and one counter goes back
	got, _ = w.poll(task)
	want = []string{"1 check.hook.disk 0", "1-vda fake.bytes 0", "2 check.hook.disk 60", "2-vda fake.bucket.3 7", "2-vda fake.bytes 100"}
	if diff := cmp.Diff(want, brief(got, hookMeters...)); diff != "" {
		t.Errorf("samples with a shortfall (-want +got):\n%s", diff)
	}
}

func TestWhatAHookHasCountedAtTheEndIsSent(t *testing.T) {
	disk := &fakeHook{name: "disk"}
	w := hookedWorld(t, 2, "standard", disk)
	w.agent.lives.task = lastTask(w.agent.plans, w.agent.hooks)
	task := w.task(false)
	w.poll(task)
	vda := disk.targets[1].Disks[0].ID
	disk.counts[vda] = [3]uint64{100, 7, 0}
	w.poll(task)
	disk.counts[vda] = [3]uint64{140, 9, 0}
	w.proc.kill(102)
	w.agent.mu.Lock()
	w.agent.scanned = time.Time{}
	w.agent.mu.Unlock()
	got, gaps := w.poll(task)
	if diff := cmp.Diff([]string{"2-vda fake.bucket.3 9", "2-vda fake.bytes 140"}, brief(got, "fake.bytes", "fake.bucket.3")); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	ended := slices.ContainsFunc(gaps, func(g sample.Gap) bool { return g.Resource == guestUUID(2)+"-vda" })
	if !ended { // of what QEMU alone counts
		t.Errorf("no gap of the disk in %+v", gaps)
	}
}

func TestWhatAHookCannotSeeIsNoZero(t *testing.T) {
	disk := &fakeHook{name: "disk", blind: true}
	w := hookedWorld(t, 1, "standard", disk)
	task := w.task(false)
	w.poll(task)
	disk.counts[disk.targets[0].Disks[0].ID] = [3]uint64{0, 1, 1}
	got, _ := w.poll(task)
	if diff := cmp.Diff([]string{"1-vda fake.bucket.3 1"}, brief(got, "fake.bytes", "fake.bucket.3")); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	disk.blind = false
	disk.counts[disk.targets[0].Disks[0].ID] = [3]uint64{4, 1, 1}
	w.poll(task)
	if spent := w.agent.hooks.find("disk").spent; spent != 4*time.Microsecond {
		t.Errorf("4 B that cost 1 µs each took %s", spent)
	}
}

func TestHookOfNICsIsComparedWithTheLink(t *testing.T) {
	tcx := &fakeHook{name: "tcx"}
	w := hookedWorld(t, 1, "standard", tcx)
	task := w.task(false)
	w.poll(task)
	// What passes before the hook has begun with a NIC is no shortfall.
	w.links.table = []rtnl.Link{{Index: 1, RxBytes: 10, TxBytes: 20, RxPackets: 1 + 50, TxPackets: 2}}
	w.poll(task)
	tcx.counts[tcx.targets[0].NICs[0].ID] = [3]uint64{5, 0, 0}
	w.poll(task)
	tcx.counts[tcx.targets[0].NICs[0].ID] = [3]uint64{5, 0, 9}
	w.links.table = []rtnl.Link{{Index: 1, RxBytes: 10, TxBytes: 20, RxPackets: 1 + 50 + 4, TxPackets: 2 + 4}}
	got, _ := w.poll(task)
	if diff := cmp.Diff([]string{"nic1 check.hook.tcx -1", "nic1 fake.bytes 5"}, brief(got, hookMeters...)); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
}

func TestHooksOfDomainsAreComparedWithTheScheduler(t *testing.T) {
	queue, exits := &fakeHook{name: "runqueue"}, &fakeHook{name: "exits"}
	kvm := &fakeKVM{counts: map[int][]uint64{101: {0, 0, 100, 0, 0}}}
	w := hookedWorld(t, 1, "deep", queue, exits)
	w.agent.kvm.reader = kvm
	task := w.task(false)
	w.poll(task)
	id := queue.targets[0].ID
	queue.counts[id], exits.counts[id] = [3]uint64{}, [3]uint64{}
	task.kvmAt = time.Time{}
	w.poll(task)
	// 100 switches, of which the hook saw 90; 50 exits, of which it saw 49.
	u := w.reader.usage[101]
	u.Switches[bpf.VCPU] += 100
	w.reader.set(101, u)
	kvm.counts[101] = []uint64{0, 0, 150, 0, 0}
	queue.counts[id], exits.counts[id] = [3]uint64{0, 0, 90}, [3]uint64{0, 0, 49}
	names := []string{"check.hook.runqueue", "check.hook.exits"}
	got, _ := w.poll(task)
	if diff := cmp.Diff([]string{"1 check.hook.exits 0", "1 check.hook.runqueue 10"}, brief(got, names...)); diff != "" {
		t.Errorf("before KVM is read again (-want +got):\n%s", diff)
	}
	task.kvmAt = time.Time{}
	got, _ = w.poll(task)
	if diff := cmp.Diff([]string{"1 check.hook.exits 1", "1 check.hook.runqueue 10"}, brief(got, names...)); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
}

func TestAHookThatIsSwitchedOffLeavesAGapAndNoShortfall(t *testing.T) {
	disk := &fakeHook{name: "disk"}
	w := hookedWorld(t, 1, "standard", disk)
	task := w.task(false)
	w.poll(task)
	vda := disk.targets[0].Disks[0].ID
	disk.counts[vda] = [3]uint64{1, 1, 1}
	w.poll(task)
	h := w.agent.hooks.find("disk")
	if err := w.agent.hooks.turn(h, false); err != nil || disk.on {
		t.Fatalf("switched off: %v, attached %t", err, disk.on)
	}
	got, gaps := w.poll(task)
	slices.SortFunc(gaps, func(a, b sample.Gap) int { return strings.Compare(a.Meter, b.Meter) })
	if len(brief(got, hookMeters...)) != 0 || len(gaps) != 2 || gaps[0].Meter != "fake.bucket" || gaps[1].Meter != "fake.bytes" ||
		gaps[0].Resource != "*" || !strings.Contains(gaps[0].Reason, "switched off") {
		t.Errorf("while it is off: samples %v, gaps %+v", brief(got, hookMeters...), gaps)
	}
	u := w.reader.usage[101]
	u.WriteBytes += 500 // unseen, as it must be
	w.reader.set(101, u)
	if err := w.agent.hooks.turn(h, true); err != nil {
		t.Fatal(err)
	}
	got, _ = w.poll(task)
	if diff := cmp.Diff([]string{"1 check.hook.disk -1", "1-vda fake.bucket.3 1", "1-vda fake.bytes 1"}, brief(got, hookMeters...)); diff != "" {
		t.Errorf("on again (-want +got):\n%s", diff)
	}
}

func TestAHookThatFailsCostsOnlyItsOwnMeters(t *testing.T) {
	disk, tcx := &fakeHook{name: "disk"}, &fakeHook{name: "tcx", refuse: errors.New("the kernel says no")}
	w := hookedWorld(t, 1, "standard", disk, tcx)
	task := w.task(false)
	w.poll(task)
	if notes := strings.Join(w.agent.Notes(), "\n"); !strings.Contains(notes, "tcx") || !strings.Contains(notes, "the kernel says no") {
		t.Errorf("notes %q", notes)
	}
	vda := disk.targets[0].Disks[0].ID
	disk.counts[vda] = [3]uint64{1, 1, 1}
	w.poll(task)
	disk.fail = errors.New("map is gone")
	got, gaps := w.poll(task)
	if len(got) != ofADomain || len(gaps) != 2 || !strings.Contains(gaps[0].Reason, "map is gone") || gaps[0].From >= gaps[0].To {
		t.Errorf("%d samples, gaps %+v", len(got), gaps)
	}
	disk.fail, disk.lame = nil, errors.New("vdb is a directory")
	w.start(2)
	if got, _ = w.poll(task); !slices.Contains(brief(got, hookMeters...), "1-vda fake.bytes 1") {
		t.Errorf("a target that cannot be followed cost another: %v", brief(got, hookMeters...))
	}
	if notes := strings.Join(w.agent.Notes(), "\n"); !strings.Contains(notes, "vdb is a directory") {
		t.Errorf("notes %q", notes)
	}
}

func TestADeviceThatIsPluggedAnewIsFollowedAnew(t *testing.T) {
	disk := &fakeHook{name: "disk"}
	w := hookedWorld(t, 1, "standard", disk)
	task := w.task(false)
	w.poll(task)
	old := disk.targets[0]
	disk.counts[old.Disks[0].ID] = [3]uint64{1, 1, 1}
	w.poll(task)
	without := *definition(1)
	without.Disks, without.NICs = nil, nil
	w.guests.defs = map[string]*collectors.Definition{without.UUID: &without}
	w.poll(task)
	if len(disk.targets[0].Disks) != 0 || len(w.agent.hooks.find("disk").counts) != 0 {
		t.Errorf("unplugged: %+v, counts %v", disk.targets, w.agent.hooks.find("disk").counts)
	}
	w.guests.defs = map[string]*collectors.Definition{without.UUID: definition(1)}
	w.poll(task)
	again := disk.targets[0]
	if again.ID != old.ID || again.Disks[0].ID == old.Disks[0].ID || again.NICs[0].ID == old.NICs[0].ID {
		t.Errorf("plugged again: %+v, before %+v", again, old)
	}
}

func TestCountersOfHooksGoOnOverARestart(t *testing.T) {
	disk := &fakeHook{name: "disk"}
	counters := filepath.Join(t.TempDir(), "counters")
	start := func() (*world, *task) {
		disk.counts, disk.targets = map[uint32][3]uint64{}, nil
		w := newWorld(t, 1, func(w *world) {
			w.cfg.Counters = counters
			w.deps.Hooks = []collectors.Hook{disk}
		})
		for i := range w.agent.plans {
			w.agent.plans[i].meters = append(w.agent.plans[i].meters, fakeBytes, fakeBuckets)
		}
		task := w.task(false)
		w.poll(task)
		return w, task
	}
	w, task := start()
	disk.counts[disk.targets[0].Disks[0].ID] = [3]uint64{100, 5, 0}
	w.poll(task)
	if err := w.agent.state.Close(); err != nil { // as the kernel does for one that is killed
		t.Fatal(err)
	}
	w, task = start()
	disk.counts[disk.targets[0].Disks[0].ID] = [3]uint64{11, 0, 0}
	got, _ := w.poll(task)
	want := []string{"1-vda fake.bucket.3 5", "1-vda fake.bytes 111"}
	if diff := cmp.Diff(want, brief(got, "fake.bytes", "fake.bucket.3")); diff != "" {
		t.Errorf("after a restart (-want +got):\n%s", diff)
	}
}

func TestHookSettings(t *testing.T) {
	for name, tc := range map[string]struct {
		profile string
		hooks   map[string]bool
		want    []string
	}{
		"lean attaches none":                  {"lean", nil, nil},
		"standard attaches two":               {"standard", nil, []string{"disk", "tcx"}},
		"deep attaches all":                   {"deep", nil, hookNames},
		"a hook can be added and left out":    {"standard", map[string]bool{"exits": true, "disk": false}, []string{"tcx", "exits"}},
		"what lean lacks can be switched on":  {"lean", map[string]bool{"tcx": true}, []string{"tcx"}},
		"saying what holds anyway is allowed": {"lean", map[string]bool{"tcx": false}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var fakes []*fakeHook
			for _, name := range hookNames {
				fakes = append(fakes, &fakeHook{name: name})
			}
			newWorld(t, 0, func(w *world) {
				w.cfg.Profile, w.cfg.Hooks = tc.profile, tc.hooks
				for _, f := range fakes {
					w.deps.Hooks = append(w.deps.Hooks, f)
				}
			})
			var on []string
			for _, f := range fakes {
				if f.on {
					on = append(on, f.name)
				}
			}
			if !slices.Equal(on, tc.want) {
				t.Errorf("attached %v, want %v", on, tc.want)
			}
		})
	}
	for _, cfg := range []func(*Config){
		func(c *Config) { c.Profile = "fat" },
		func(c *Config) { c.Hooks = map[string]bool{"diks": true} },
		func(c *Config) { c.HistogramInterval = time.Millisecond },
	} {
		c := testConfig()
		if cfg(&c); c.Check() == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}

func TestHooksOverTheSocket(t *testing.T) {
	disk, tcx := &fakeHook{name: "disk"}, &fakeHook{name: "tcx", refuse: errors.New("the kernel says no")}
	w := newWorld(t, 1, func(w *world) {
		w.deps.Hooks = []collectors.Hook{disk, tcx}
		w.cfg.Socket = filepath.Join(t.TempDir(), "run", "agent.sock")
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agent.Run(ctx) }()
	defer func() { cancel(); <-done }()
	agent := client.Client{Path: w.cfg.Socket}
	got, err := agent.Hooks(ctx)
	want := []client.Hook{
		{Name: "disk", On: true, Misses: 1, Dropped: 2, Orphans: 3, Entries: 4, MaxEntries: 5},
		{Name: "tcx", Fault: "the kernel says no", Misses: 1, Dropped: 2, Orphans: 3, Entries: 4, MaxEntries: 5},
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("hooks (-want +got):\n%s\n%v", diff, err)
	}
	if err := agent.Switch(ctx, "disk", false); err != nil {
		t.Error(err)
	}
	if got, err = agent.Hooks(ctx); err != nil || got[0].On {
		t.Errorf("switched off: %+v, %v", got, err)
	}
	for name, says := range map[string]string{"tcx": "the kernel says no", "no/such": `no hook "no/such"`} {
		if err := agent.Switch(ctx, name, true); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("switch %s on: %v, want %q", name, err, says)
		}
	}
}

// benchHook has 2,000 disks that never rest.
type benchHook struct {
	fakeHook
	reads uint64
}

func (f *benchHook) Read(_ context.Context, emit func(uint32, int, uint64)) error {
	f.reads++
	for id := range uint32(2000) {
		for series := range 3 {
			emit(id+1, series, f.reads)
		}
	}
	return nil
}

// BenchmarkHooks is a poll of what hooks counted for 500 domains with 4 disks each.
func BenchmarkHooks(b *testing.B) {
	f := &benchHook{fakeHook: fakeHook{name: "disk"}}
	m, err := newMetrics(prometheus.NewRegistry())
	if err != nil {
		b.Fatal(err)
	}
	cfg := testConfig()
	file, err := state.Open(zap.NewNop(), filepath.Join(b.TempDir(), "counters"), "boot")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	hs := newHooks(zap.NewNop(), m, file, []collectors.Hook{f}, &cfg)
	asked := hs.asked([]*sample.Meter{fakeBytes})
	hs.homes = map[uint32]home{}
	for id := range uint32(2000) {
		hs.homes[id+1] = home{1, sample.Incarnation(id + 1)}
	}
	hs.read(b.Context(), asked, nil, fresh{usage: true, links: true}, 1)
	b.ReportAllocs()
	for b.Loop() {
		hs.read(b.Context(), asked, nil, fresh{usage: true, links: true}, 1)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/2000, "ns/disk")
}
