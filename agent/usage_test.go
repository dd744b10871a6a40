package agent

import (
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/sample"
)

// used makes a reading of vCPU, emulator and exited time.
func used(vcpu, emulator, exited uint64) bpf.Usage {
	u := bpf.Usage{Exited: exited, Process: vcpu + emulator + exited, HasSplit: true, VCPUs: 1}
	u.Run[bpf.VCPU], u.Run[bpf.Emulator] = vcpu, emulator
	return u
}

// sliced adds what a vCPU is estimated to have run since the last tick.
func sliced(u bpf.Usage, slice uint64) bpf.Usage {
	u.Slice[bpf.VCPU] = slice
	u.Process += slice
	return u
}

func newUsage() usageState { return newUsageState(state.Memory(), 1, "uuid") }

func TestUsageAdvances(t *testing.T) {
	type published struct{ CPU, Emulator, Exited, Process uint64 }
	for name, tc := range map[string]struct {
		readings []bpf.Usage
		want     []published
		held     []string
	}{
		"growing counters are published as they are": {
			[]bpf.Usage{used(10, 5, 0), used(30, 6, 0)},
			[]published{{10, 5, 0, 15}, {30, 6, 0, 36}},
			nil,
		},
		"a slice in progress is added": {
			[]bpf.Usage{sliced(used(100, 0, 0), 7)},
			[]published{{107, 0, 0, 107}},
			nil,
		},
		"a slice that was told too long is held until the kernel has caught up": {
			[]bpf.Usage{sliced(used(100, 5, 0), 7), used(105, 5, 0), used(110, 6, 0)},
			[]published{{107, 5, 0, 112}, {107, 5, 0, 112}, {110, 6, 0, 116}},
			[]string{"cpu.process", "cpu"},
		},
		"what was told too long of one class is not told of another": {
			[]bpf.Usage{sliced(used(100, 5, 0), 7), used(105, 9, 0), used(108, 9, 0)},
			[]published{{107, 5, 0, 112}, {107, 7, 0, 114}, {108, 9, 0, 117}},
			[]string{"cpu"},
		},
		"a reading that is lower is held": {
			[]bpf.Usage{used(10, 5, 0), used(8, 5, 0), used(12, 5, 0)},
			[]published{{10, 5, 0, 15}, {10, 5, 0, 15}, {12, 5, 0, 17}},
			[]string{"cpu.process", "cpu"},
		},
		"the time of an unplugged vCPU stays in cpu, which goes on growing": {
			[]bpf.Usage{used(150, 5, 0), used(50, 5, 103), used(60, 5, 103)},
			[]published{{150, 5, 0, 155}, {150, 5, 3, 158}, {160, 5, 3, 168}},
			nil,
		},
		"the last tick of a thread that exits stays in the process": {
			[]bpf.Usage{sliced(used(150, 5, 0), 30), used(50, 5, 110), used(90, 5, 110)},
			[]published{{180, 5, 0, 185}, {180, 5, 0, 185}, {190, 5, 10, 205}},
			[]string{"cpu.process", "cpu"},
		},
		"time of threads that were never seen alive is exited": {
			[]bpf.Usage{used(10, 5, 100), used(11, 5, 130)},
			[]published{{10, 5, 100, 115}, {11, 5, 130, 146}},
			nil,
		},
		"a vCPU and a thread of QEMU's own may exit together": {
			[]bpf.Usage{used(100, 50, 0), used(60, 20, 71), used(61, 21, 71)},
			[]published{{100, 50, 0, 150}, {100, 50, 1, 151}, {101, 51, 1, 153}},
			nil,
		},
		"a thread that is renamed leaves its time in its old class": {
			[]bpf.Usage{used(100, 50, 0), used(40, 110, 0), used(50, 130, 0)},
			[]published{{100, 50, 0, 150}, {100, 50, 0, 150}, {110, 70, 0, 180}},
			nil,
		},
		"a reader without threads goes on with the process": {
			[]bpf.Usage{used(10, 5, 1), {Process: 20, Exited: 20}, used(14, 7, 1)},
			[]published{{10, 5, 1, 16}, {10, 5, 1, 20}, {14, 7, 1, 22}},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newUsage()
			var got []published
			var held []string
			for _, u := range tc.readings {
				s.advance(&u, nil, func(m int) { held = append(held, usageMeters[m].Name) })
				got = append(got, published{s.last[iCPU], s.last[iEmulator], s.last[iExited], s.last[iProcess]})
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("published (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.held, held); diff != "" {
				t.Errorf("held (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUsageHasOnlyWhatWasRead(t *testing.T) {
	s := newUsage()
	none := func(int) {}
	s.advance(&bpf.Usage{Process: 1, Exited: 1}, nil, none)
	if s.has != 1<<iProcess {
		t.Errorf("without threads: bits %b, want cpu.process only", s.has)
	}
	s.advance(&bpf.Usage{HasSplit: true, HasWait: true, HasIO: true}, nil, none)
	if s.has != 1<<usageCount-1 {
		t.Errorf("with everything: bits %b, want all %d", s.has, usageCount)
	}
}

// readingOf makes one of vCPU threads, and of what the process keeps of exited ones.
func readingOf(exited uint64, vcpus ...bpf.VCPUUsage) (bpf.Usage, []bpf.VCPUUsage) {
	u := bpf.Usage{Exited: exited, Process: exited, HasSplit: true, HasWait: true, VCPUs: uint32(len(vcpus))}
	for _, v := range vcpus {
		u.Run[bpf.VCPU] += v.Run
		u.Slice[bpf.VCPU] += v.Slice
		u.Wait[bpf.VCPU] += v.Wait
		u.Switches[bpf.VCPU] += v.Switches
		u.Process += v.Run + v.Slice
	}
	return u, vcpus
}

func TestAnUnpluggedVCPUKeepsWhatItCounted(t *testing.T) {
	type row struct{ Run, Wait, Switches uint64 }
	s := newUsage()
	steps := []struct {
		exited uint64
		vcpus  []bpf.VCPUUsage
		cpu    row // of the domain
		rows   map[int]row
	}{
		{
			0,
			[]bpf.VCPUUsage{{Index: 0, TID: 10, Run: 100, Wait: 5, Switches: 2}, {Index: 1, TID: 11, Run: 50, Wait: 7, Switches: 3}},
			row{150, 12, 5},
			map[int]row{0: {100, 5, 2}, 1: {50, 7, 3}},
		},
		// Unplugged, while the other goes on by more than it had.
		{
			51,
			[]bpf.VCPUUsage{{Index: 0, TID: 10, Run: 300, Wait: 25, Switches: 12}},
			row{350, 32, 15},
			map[int]row{0: {300, 25, 12}},
		},
		// Plugged in again: another thread, that has run more than the one before.
		{
			51,
			[]bpf.VCPUUsage{{Index: 0, TID: 10, Run: 300, Wait: 25, Switches: 12}, {Index: 1, TID: 12, Run: 60, Wait: 8, Switches: 4, Slice: 2}},
			row{412, 40, 19},
			map[int]row{0: {300, 25, 12}, 1: {112, 15, 7}},
		},
		// Replaced within one poll.
		{
			112,
			[]bpf.VCPUUsage{{Index: 0, TID: 10, Run: 300, Wait: 25, Switches: 12}, {Index: 1, TID: 13, Run: 70, Wait: 9, Switches: 5}},
			row{480, 49, 24},
			map[int]row{0: {300, 25, 12}, 1: {180, 24, 12}},
		},
	}
	for i, step := range steps {
		u, vcpus := readingOf(step.exited, step.vcpus...)
		s.advance(&u, vcpus, func(m int) { t.Errorf("step %d: %s was held", i, usageMeters[m].Name) })
		if got := (row{s.last[iCPU], s.last[iWait], s.last[iSwitches]}); got != step.cpu {
			t.Errorf("step %d: domain %+v, want %+v", i, got, step.cpu)
		}
		got := map[int]row{}
		for n, v := range s.vcpus {
			if v != nil && v.left == 0 {
				got[n] = row{v.last[iVCPURun], v.last[iVCPUWait], v.last[iVCPUSwitches]}
			}
		}
		if diff := cmp.Diff(step.rows, got); diff != "" {
			t.Errorf("step %d: vCPUs (-want +got):\n%s", i, diff)
		}
	}
}

func TestARenamedVCPUThreadCountsOnce(t *testing.T) {
	s := newUsage()
	none := func(int) {}
	zero, one := bpf.VCPUUsage{Index: 0, TID: 10, Run: 100, Wait: 5}, bpf.VCPUUsage{Index: 1, TID: 11, Run: 50, Wait: 6}
	u, vcpus := readingOf(0, zero, one)
	s.advance(&u, vcpus, none)
	renamed, vcpus := readingOf(0, zero)
	renamed.Run[bpf.Emulator], renamed.Wait[bpf.Emulator] = 55, 7
	renamed.Process += 55
	s.advance(&renamed, vcpus, none)
	if s.last[iCPU] != 150 || s.last[iEmulator] != 5 || s.last[iWait] != 11 || s.last[iEmulatorWait] != 1 {
		t.Errorf("cpu %d, emulator %d, wait %d and %d; want 150, 5, 11, 1", s.last[iCPU], s.last[iEmulator], s.last[iWait], s.last[iEmulatorWait])
	}
	one.Run, one.Wait = 60, 8
	u, vcpus = readingOf(0, zero, one)
	s.advance(&u, vcpus, none)
	if v := s.vcpus[1]; v.last[iVCPURun] != 60 || s.last[iCPU] != 155 || s.last[iProcess] != 160 {
		t.Errorf("renamed back: vCPU %d, cpu %d, process %d; want 60, 155, 160", v.last[iVCPURun], s.last[iCPU], s.last[iProcess])
	}
}

func TestEachPluggedInVCPUHasRows(t *testing.T) {
	w := newWorld(t, 1, nil)
	task := w.task(false)
	u, vcpus := readingOf(0, bpf.VCPUUsage{Index: 0, TID: 1, Run: 10, Wait: 2, Switches: 3}, bpf.VCPUUsage{Index: 5, TID: 2, Run: 20, Wait: 4, Switches: 6})
	w.reader.set(101, u)
	w.reader.vcpus = map[int][]bpf.VCPUUsage{101: vcpus}
	rows := func(samples []sample.Sample) map[string]string {
		t.Helper()
		got := map[string]string{}
		for _, s := range samples {
			if strings.HasPrefix(s.Name, "vcpu.") {
				got[s.Resource] += s.Name + " " + s.Volume.String() + " "
				if s.Incarnation != w.agent.order[0].incarnation || s.Project != "p" || s.Origin != sample.Walk {
					t.Errorf("%+v", s)
				}
			}
		}
		return got
	}
	first, _ := w.poll(task)
	want := map[string]string{
		guestUUID(1) + "-vcpu0": "vcpu.run 10 vcpu.wait 2 vcpu.switches 3 ",
		guestUUID(1) + "-vcpu5": "vcpu.run 20 vcpu.wait 4 vcpu.switches 6 ",
	}
	if diff := cmp.Diff(want, rows(first)); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}

	w.reader.set(101, bpf.Usage{Err: bpf.ErrTorn})
	samples, gaps := w.poll(task)
	var missing []string
	for _, g := range gaps {
		if strings.Contains(g.Resource, "-vcpu") {
			missing = append(missing, g.Resource)
		}
		if g.From != first[0].Time {
			t.Errorf("gap %+v", g)
		}
	}
	slices.Sort(missing)
	if len(rows(samples)) != 0 || !slices.Equal(missing, []string{guestUUID(1) + "-vcpu0", guestUUID(1) + "-vcpu5"}) {
		t.Errorf("while the process cannot be read: %v, gaps %+v", rows(samples), gaps)
	}
	u, vcpus = readingOf(21, vcpus[0])
	w.reader.set(101, u)
	w.reader.vcpus[101] = vcpus
	samples, gaps = w.poll(task)
	delete(want, guestUUID(1)+"-vcpu5")
	if diff := cmp.Diff(want, rows(samples)); diff != "" || len(gaps) != 0 {
		t.Errorf("after one was unplugged: gaps %+v, rows (-want +got):\n%s", gaps, diff)
	}
}

// thread is one of a process that the tests below play.
type thread struct {
	class           bpf.Class
	vcpu            int
	tid             uint32
	run, wait, runs uint64
}

// guest plays a QEMU process whose threads work, come, go and are renamed.
type guest struct {
	rnd    *rand.Rand
	live   []thread
	tids   uint32
	exited uint64
}

func (g *guest) start(class bpf.Class) {
	g.tids++
	t := thread{class: class, tid: g.tids, vcpu: -1}
	if class == bpf.VCPU {
		for t.vcpu = 0; ; t.vcpu++ {
			free := true
			for _, o := range g.live {
				free = free && (o.class != bpf.VCPU || o.vcpu != t.vcpu)
			}
			if free {
				break
			}
		}
	}
	g.live = append(g.live, t)
}

// step lets some time pass.
func (g *guest) step(renames bool) {
	if g.rnd.IntN(3) == 0 {
		g.start(bpf.Class(g.rnd.IntN(int(bpf.Classes))))
	}
	for i := range g.live {
		if g.rnd.IntN(2) == 0 {
			g.live[i].run += g.rnd.Uint64N(1000)
			g.live[i].wait += g.rnd.Uint64N(100)
			g.live[i].runs++
		}
	}
	if len(g.live) == 0 {
		return
	}
	i := g.rnd.IntN(len(g.live))
	switch g.rnd.IntN(6) {
	case 0:
		g.exited += g.live[i].run
		g.live = append(g.live[:i], g.live[i+1:]...)
	case 1:
		if renames && g.live[i].class != bpf.VCPU {
			g.live[i].class = bpf.Emulator
		}
	}
}

// read reads the process; slices are estimated, too long at times.
func (g *guest) read(slices bool) (bpf.Usage, []bpf.VCPUUsage) {
	u := bpf.Usage{Exited: g.exited, Process: g.exited, HasSplit: true, HasWait: true}
	var vcpus []bpf.VCPUUsage
	for _, t := range g.live {
		slice := uint64(0)
		if slices && g.rnd.IntN(3) == 0 {
			slice = g.rnd.Uint64N(20)
		}
		u.Run[t.class] += t.run
		u.Slice[t.class] += slice
		u.Wait[t.class] += t.wait
		u.Switches[t.class] += t.runs
		u.Process += t.run + slice
		if t.class == bpf.VCPU {
			u.VCPUs++
			vcpus = append(vcpus, bpf.VCPUUsage{Index: t.vcpu, TID: t.tid, Run: t.run, Slice: slice, Wait: t.wait, Switches: t.runs})
		}
	}
	return u, vcpus
}

// TestUsageAddsUp: threads come and go at random, and the agent is restarted;
// what is published never shrinks, and the classes add up to the process in
// each reading. What the process used is published, to the last ns, and so is
// what the vCPUs used, unplugged ones to their last reading.
func TestUsageAddsUp(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for game := range 300 {
		slices, renames, restarts := game%2 == 1, game%3 == 2, game%5 > 0
		path := filepath.Join(t.TempDir(), "counters")
		var file *state.File
		open := func() usageState {
			var err error
			if file, err = state.Open(zap.NewNop(), path, "boot"); err != nil || file.Err() != nil {
				t.Fatal(err, file.Err())
			}
			return newUsageState(file, 7, "uuid")
		}
		s := open()
		g := guest{rnd: rnd}
		var before [usageCount]uint64
		rows := map[int][vcpuCount]uint64{}
		most := uint64(0)  // that any reading said of the process
		ended := uint64(0) // vCPU time of threads that exited, as last read
		var alive []thread // vCPU threads of the last reading
		for step := range 100 {
			g.step(renames)
			if restarts && rnd.IntN(10) == 0 {
				file.Close()
				s = open()
			}
			if rnd.IntN(3) == 0 {
				continue // some things happen between two readings
			}
			u, vcpus := g.read(slices)
			most = max(most, u.Process)
			s.advance(&u, vcpus, func(int) {})
			sum := s.last[iExited]
			for _, m := range classMeters {
				sum += s.last[m.run]
			}
			for i := range before {
				if s.last[i] < before[i] {
					t.Fatalf("game %d, step %d: %s went back from %d to %d", game, step, usageMeters[i].Name, before[i], s.last[i])
				}
			}
			if s.last[iProcess] != most || sum != most {
				t.Fatalf("game %d, step %d: process %d, classes %d, read %d", game, step, s.last[iProcess], sum, most)
			}
			before = s.last
			now := uint64(0)
			for _, o := range alive {
				if !hasThread(g.live, o.tid) {
					ended += o.run
				}
			}
			alive = alive[:0]
			for _, o := range g.live {
				if o.class != bpf.VCPU {
					continue
				}
				alive = append(alive, o)
				now += o.run
				v := s.vcpus[o.vcpu]
				if v.left != 0 || v.last[iVCPURun] < o.run || v.last[iVCPURun] < rows[o.vcpu][iVCPURun] || v.last[iVCPUWait] < rows[o.vcpu][iVCPUWait] {
					t.Fatalf("game %d, step %d: vCPU %d has %+v after %v, its thread %+v", game, step, o.vcpu, v.keptVCPU, rows[o.vcpu], o)
				}
				rows[o.vcpu] = v.last
			}
			if !slices && !renames && s.last[iCPU] != now+ended {
				t.Fatalf("game %d, step %d: cpu is %d, its threads ran %d and those that ended %d", game, step, s.last[iCPU], now, ended)
			}
		}
		file.Close()
	}
}

func hasThread(threads []thread, tid uint32) bool {
	for _, t := range threads {
		if t.tid == tid {
			return true
		}
	}
	return false
}

// FuzzUsage feeds any sequence of readings, possible or not.
func FuzzUsage(f *testing.F) {
	f.Add([]byte{100, 7, 0, 0, 0, 1, 105, 0, 0, 0, 0, 1})
	f.Add([]byte{100, 0, 50, 30, 0, 1, 110, 0, 0, 0, 60, 1, 140, 0, 0, 0, 60, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		s := newUsage()
		var last [usageCount]uint64
		for ; len(b) >= 6; b = b[6:] {
			u, vcpus := readingOf(uint64(b[4]), bpf.VCPUUsage{Index: int(b[5]%4) - 1, TID: uint32(b[5] / 4), Run: uint64(b[0]), Slice: uint64(b[1])})
			u.Run[bpf.Worker], u.Slice[bpf.Worker] = uint64(b[2]), uint64(b[3])
			u.Process += u.Run[bpf.Worker] + u.Slice[bpf.Worker]
			s.advance(&u, vcpus, func(int) {})
			sum := s.last[iExited]
			for _, m := range classMeters {
				sum += s.last[m.run]
			}
			for i := range last {
				if s.last[i] < last[i] {
					t.Fatalf("%s went back from %d to %d", usageMeters[i].Name, last[i], s.last[i])
				}
			}
			if sum != s.last[iProcess] || s.last[iProcess] < u.Process {
				t.Fatalf("process %d, classes %d, read %d", s.last[iProcess], sum, u.Process)
			}
			last = s.last
		}
	})
}

func BenchmarkUsageAdvance(b *testing.B) {
	file, err := state.Open(zap.NewNop(), filepath.Join(b.TempDir(), "counters"), "boot")
	if err != nil || file.Err() != nil {
		b.Fatal(err, file.Err())
	}
	defer file.Close()
	s := newUsageState(file, 1, "uuid")
	u, vcpus := readingOf(0, bpf.VCPUUsage{Index: 0, TID: 1}, bpf.VCPUUsage{Index: 1, TID: 2}, bpf.VCPUUsage{Index: 2, TID: 3}, bpf.VCPUUsage{Index: 3, TID: 4})
	held := func(int) { b.Fatal("held") }
	b.Run("idle", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.advance(&u, vcpus, held)
		}
	})
	b.Run("all-busy", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for i := range vcpus {
				vcpus[i].Run++
			}
			u.Run[bpf.VCPU] += 4
			u.Process += 4
			s.advance(&u, vcpus, held)
		}
	})
}
