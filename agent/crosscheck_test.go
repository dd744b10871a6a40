package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/sample"
)

// agreeing is what libvirt says of guest n where it counts as the agent does.
func (w *world) agreeing(n int) collectors.GuestStats {
	return collectors.GuestStats{
		CPUTime: uint64(n)*1e9 + 5, HasCPU: true,
		VCPUs: []collectors.VCPUStats{{Time: uint64(n) * 1e9, HasTime: true, Delay: 7, HasDelay: true, Exits: 77, HasExits: true}},
		NICs:  []collectors.NICStats{{Device: fmt.Sprintf("tap%d", n), InBytes: 20, OutBytes: 10, InPackets: 2, OutPackets: 1}},
		Disks: []collectors.DiskStats{{Device: "vda"}},
		Memory: collectors.MemoryStats{
			Asked: true, Available: 2048, HasAvailable: true, Unused: 512, HasUnused: true, Usable: 1024, HasUsable: true,
			SwapIn: 1, SwapOut: 2, HasSwap: true,
		},
		Perf: map[string]uint64{"cpu_cycles": 1, "instructions": 2, "cache_references": 3, "cache_misses": 4},
	}
}

// diskless guests have nothing but CPUs and NICs to compare. The first two run
// under KVM.
func diskless(w *world) {
	w.deps.KVM = &fakeKVM{counts: map[int][]uint64{101: {0, 0, 77}, 102: {0, 0, 77}}}
	for _, d := range w.guests.defs {
		d.Disks = nil
	}
}

// checkOnce checks guest n and returns what it sent.
func (w *world) checkOnce(n int) ([]sample.Sample, []sample.Gap) {
	w.t.Helper()
	for _, d := range w.agent.defined() {
		if d.uuid == guestUUID(n) {
			w.agent.check(w.t.Context(), d)
		}
	}
	return w.take()
}

// checked shows what the agent tells of guest n's last check.
func (w *world) checked(n int) (all []string) {
	for _, g := range w.agent.crosschecks(guestUUID(n)).Domains {
		for _, c := range g.Comparisons {
			text := strings.TrimSpace(c.Meter+" "+c.Device) + ": " + c.Verdict
			if c.Why != "" {
				text += ", " + c.Why
			}
			if c.Figures != nil {
				text += fmt.Sprintf(" %d %d %+d", c.Figures.Ours, c.Figures.Theirs, c.Figures.Difference)
			}
			all = append(all, text)
		}
	}
	return all
}

func TestCrosscheck(t *testing.T) {
	good := []string{
		"cpu: agrees 1000000000 1000000000 +0", "cpu.process: agrees 1000000005 1000000005 +0", "cpu.wait: agrees 7 7 +0", "kvm.exits: agrees 77 77 +0",
		"network.incoming.bytes tap1: agrees 20 20 +0", "network.outgoing.bytes tap1: agrees 10 10 +0",
		"network.incoming.packets tap1: agrees 2 2 +0", "network.outgoing.packets tap1: agrees 1 1 +0",
	}
	// but is good with some lines replaced, by the meter they begin with.
	but := func(lines ...string) []string {
		all := slices.Clone(good)
		for _, l := range lines {
			name, _, _ := strings.Cut(l, ":")
			i := slices.IndexFunc(all, func(s string) bool { return strings.HasPrefix(s, name+":") })
			all[i] = l
		}
		return all
	}
	every := func(why string) (all []string) {
		for _, l := range good {
			name, _, _ := strings.Cut(l, ":")
			all = append(all, name+": not comparable, "+why)
		}
		return all
	}
	for name, tc := range map[string]struct {
		adapt func(*world, *collectors.GuestStats)
		want  []string
		gaps  int
	}{
		"both agree": {func(*world, *collectors.GuestStats) {}, good, 0},
		"a tick of libvirt's is within the tolerance": {
			func(_ *world, s *collectors.GuestStats) { s.VCPUs[0].Time -= tick; s.CPUTime -= tick },
			but("cpu: agrees 1000000000 970000000 -30000000", "cpu.process: agrees 1000000005 970000005 -30000000"), 0,
		},
		"more than that is not": {
			func(_ *world, s *collectors.GuestStats) { s.VCPUs[0].Time -= tick + 1; s.CPUTime += tick + 1 },
			but("cpu: differs 1000000000 969999999 -30000001", "cpu.process: differs 1000000005 1030000006 +30000001"), 0,
		},
		"each vCPU has its tick": {
			func(w *world, s *collectors.GuestStats) {
				u := used(1e9, 5, 0)
				u.HasWait, u.Wait[bpf.VCPU], u.VCPUs = true, 7, 2
				w.reader.set(101, u)
				s.VCPUs = append(s.VCPUs, collectors.VCPUStats{HasTime: true, HasDelay: true, HasExits: true})
				s.VCPUs[0].Time -= 2 * tick
			},
			but("cpu: agrees 1000000000 940000000 -60000000", "kvm.exits: not comparable, the process has 1 vCPU threads, libvirt counts 2 vCPUs"), 0,
		},
		"a byte on the network is too much": {
			func(_ *world, s *collectors.GuestStats) { s.NICs[0].InBytes++; s.NICs[0].OutPackets-- },
			but("network.incoming.bytes tap1: differs 20 21 +1", "network.outgoing.packets tap1: differs 1 0 -1"), 0,
		},
		"threads that are not told apart cost what needs them": {
			func(w *world, _ *collectors.GuestStats) { w.reader.set(101, bpf.Usage{Process: 1000000005}) },
			but("cpu: not comparable, the agent cannot read it of each thread", "cpu.wait: not comparable, the agent cannot read it of each thread"), 0,
		},
		"a vCPU that one side does not see is not compared": {
			func(_ *world, s *collectors.GuestStats) { s.VCPUs = append(s.VCPUs, s.VCPUs[0]) },
			but("cpu: not comparable, the process has 1 vCPU threads, libvirt counts 2 vCPUs", "cpu.wait: not comparable, the process has 1 vCPU threads, libvirt counts 2 vCPUs",
				"kvm.exits: not comparable, the process has 1 vCPU threads, libvirt counts 2 vCPUs"), 0,
		},
		"an exit too many differs": {
			func(_ *world, s *collectors.GuestStats) { s.VCPUs[0].Exits++ },
			but("kvm.exits: differs 77 78 +1"), 0,
		},
		"a domain that is not under KVM has no exits": {
			func(w *world, s *collectors.GuestStats) {
				w.deps.KVM.(*fakeKVM).counts, s.VCPUs[0].HasExits = nil, false
			},
			but("kvm.exits: not comparable, the domain does not run under KVM"), 0,
		},
		"KVM's statistics that cannot be read cost the exits": {
			func(w *world, _ *collectors.GuestStats) { w.deps.KVM.(*fakeKVM).err = errors.New("no memory") },
			but("kvm.exits: not comparable, the agent cannot read KVM's statistics: no memory"), 2,
		},
		"what libvirt leaves out is not compared": {
			func(_ *world, s *collectors.GuestStats) { s.HasCPU, s.VCPUs[0].HasDelay, s.NICs = false, false, nil },
			but("cpu.process: not comparable, libvirt does not tell the process's CPU time", "cpu.wait: not comparable, libvirt does not tell it of each vCPU",
				"network.incoming.bytes tap1: not comparable, libvirt has no statistics of tap1", "network.outgoing.bytes tap1: not comparable, libvirt has no statistics of tap1",
				"network.incoming.packets tap1: not comparable, libvirt has no statistics of tap1", "network.outgoing.packets tap1: not comparable, libvirt has no statistics of tap1"), 2,
		},
		"a process that cannot be read costs its CPU": {
			func(w *world, _ *collectors.GuestStats) { w.reader.set(101, bpf.Usage{Err: bpf.ErrTorn}) },
			but("cpu: not comparable, the agent cannot read it: "+bpf.ErrTorn.Error(), "cpu.process: not comparable, the agent cannot read it: "+bpf.ErrTorn.Error(),
				"cpu.wait: not comparable, the agent cannot read it: "+bpf.ErrTorn.Error()), 6,
		},
		"an interface that is gone is not compared": {
			func(w *world, _ *collectors.GuestStats) { w.links.table = nil },
			but("network.incoming.bytes tap1: not comparable, the host has no interface tap1", "network.outgoing.bytes tap1: not comparable, the host has no interface tap1",
				"network.incoming.packets tap1: not comparable, the host has no interface tap1", "network.outgoing.packets tap1: not comparable, the host has no interface tap1"), 0,
		},
		"link statistics that fail cost the network": {
			func(w *world, _ *collectors.GuestStats) { w.links.err = errors.New("no buffer") },
			but("network.incoming.bytes tap1: not comparable, the agent cannot read link statistics: no buffer", "network.outgoing.bytes tap1: not comparable, the agent cannot read link statistics: no buffer",
				"network.incoming.packets tap1: not comparable, the agent cannot read link statistics: no buffer", "network.outgoing.packets tap1: not comparable, the agent cannot read link statistics: no buffer"), 8,
		},
		"a monitor that is stuck costs the check": {
			func(w *world, s *collectors.GuestStats) {
				*s, w.guests.errs[guestUUID(1)] = collectors.GuestStats{}, libvirt.ErrBusy
			},
			every("libvirt: " + libvirt.ErrBusy.Error()), 16,
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, diskless)
			w.poll(w.task(false))
			s := w.agreeing(1)
			tc.adapt(w, &s)
			w.guests.stats[guestUUID(1)] = s
			samples, gaps := w.checkOnce(1)
			if diff := cmp.Diff(tc.want, w.checked(1)); diff != "" {
				t.Errorf("comparisons (-want +got):\n%s", diff)
			}
			if len(gaps) != tc.gaps {
				t.Errorf("%d gaps, want %d: %+v", len(gaps), tc.gaps, gaps)
			}
			verdicts := 0
			for _, s := range samples {
				if strings.HasSuffix(s.Name, ".verdict") {
					verdicts++
				}
				if s.Kind != sample.Gauge || s.Origin != sample.Libvirt || s.Project != "p" {
					t.Errorf("sample %+v", s)
				}
			}
			if verdicts != len(good) {
				t.Errorf("%d verdicts, want %d", verdicts, len(good))
			}
		})
	}
}

func TestCheckMeters(t *testing.T) {
	w := newWorld(t, 1, func(w *world) {
		w.cfg.Polling = filepath.Join(t.TempDir(), "polling.yaml")
		text := "sources: [{name: a, interval: 10, meters: [cpu, 'check.cpu.process*', 'check.network.incoming.bytes*', 'check.cpu.wait.verdict']}]"
		if err := os.WriteFile(w.cfg.Polling, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	s := w.agreeing(1)
	s.CPUTime -= 2 * tick
	s.NICs[0].InBytes = 25
	s.VCPUs = nil
	w.guests.stats[guestUUID(1)] = s
	samples, _ := w.checkOnce(1)
	var all []string
	for _, s := range samples {
		all = append(all, s.Name)
	}
	want := []string{
		"1 check.cpu.process -60000000", "1 check.cpu.process.relative -0.0599999997", "1 check.cpu.process.verdict 1", "1 check.cpu.wait.verdict 2",
		"nic1 check.network.incoming.bytes 5", "nic1 check.network.incoming.bytes.relative 0.2", "nic1 check.network.incoming.bytes.verdict 1",
	}
	if diff := cmp.Diff(want, brief(samples, all...)); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
}

func TestTheOperatorIsToldOnceThatFiguresDiffer(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	w := newWorld(t, 2, func(w *world) { w.deps.Log = zap.New(core) })
	w.agent.noted = true
	gauge := func() float64 {
		return value(t, w.agent.metrics.differs.WithLabelValues("network.incoming.bytes"))
	}
	off := func(n int, by uint64) {
		s := w.agreeing(n)
		s.NICs[0].InBytes += by
		w.guests.stats[guestUUID(n)] = s
		w.guests.errs[guestUUID(n)] = nil
		w.checkOnce(n)
	}
	warnings := func() (all []string) {
		for _, e := range logs.TakeAll() {
			all = append(all, e.Message+": "+fmt.Sprint(e.ContextMap()["what"]))
		}
		return all
	}
	steps := []struct {
		do    func()
		want  []string
		gauge float64
	}{
		{func() { off(1, 0) }, nil, 0},
		{func() { off(1, 9) }, []string{"libvirt counts otherwise, by more than the tolerance; see kvmeter crosscheck: network.incoming.bytes of nic1: kvmeter 20 B, libvirt +9"}, 1},
		{func() { off(1, 12) }, nil, 1},
		{func() {
			w.guests.stats[guestUUID(1)], w.guests.errs[guestUUID(1)] = collectors.GuestStats{}, libvirt.ErrBusy
			w.checkOnce(1)
		}, nil, 1},
		{func() { off(2, 1) }, []string{"libvirt counts otherwise, by more than the tolerance; see kvmeter crosscheck: network.incoming.bytes of nic2: kvmeter 20 B, libvirt +1"}, 2},
		{func() { off(1, 0) }, []string{"libvirt and kvmeter agree again: network.incoming.bytes of nic1"}, 1},
		{func() { w.proc.kill(102); w.poll(w.task(false)) }, nil, 0},
	}
	for i, s := range steps {
		s.do()
		if diff := cmp.Diff(s.want, warnings()); diff != "" {
			t.Errorf("step %d: warnings (-want +got):\n%s", i, diff)
		}
		if got := gauge(); got != s.gauge {
			t.Errorf("step %d: %v differ by the metric, want %v", i, got, s.gauge)
		}
	}
	if n := value(t, w.agent.metrics.comparisons.WithLabelValues("network.incoming.bytes", "differs")); n != 3 {
		t.Errorf("%v comparisons differed, want 3", n)
	}
}

func TestChecksAreSpreadOverTheInterval(t *testing.T) {
	const guests = 10
	var mu sync.Mutex
	var at []time.Time
	seen := map[string]int{}
	ctx, cancel := context.WithCancel(t.Context())
	w := newWorld(t, guests, func(w *world) {
		w.cfg.CrosscheckInterval = 500 * time.Millisecond
		w.guests.stat = func(_ context.Context, uuid string) {
			mu.Lock()
			defer mu.Unlock()
			at = append(at, time.Now())
			if seen[uuid]++; len(at) == 2*guests {
				cancel()
			}
		}
	})
	w.agent.crosscheck(ctx)
	for u, n := range seen {
		if n != 2 {
			t.Errorf("guest %s was checked %d times of %d, want 2", u, n, len(at))
		}
	}
	if took := at[len(at)-1].Sub(at[0]); took < 900*time.Millisecond {
		t.Errorf("two rounds took %s, want about 950 ms", took)
	}
	// One that the machine was late with bunches up with the next two.
	bunched := 0
	for i := 2; i < len(at); i++ {
		if at[i].Sub(at[i-2]) < 60*time.Millisecond {
			bunched++
		}
	}
	if bunched > len(at)/2 {
		t.Errorf("%d of %d checks had the two before within 60 ms, want 100 ms between", bunched, len(at))
	}
}

func TestADomainThatEndsDuringItsCheckCostsNothing(t *testing.T) {
	w := newWorld(t, 2, nil)
	w.guests.stat = func(_ context.Context, uuid string) {
		if uuid == guestUUID(1) {
			w.proc.kill(101)
			w.agent.mu.Lock()
			w.agent.scanned = time.Time{}
			w.agent.mu.Unlock()
			w.agent.defined()
		}
	}
	w.guests.stats[guestUUID(2)] = w.agreeing(2)
	if samples, _ := w.checkOnce(1); len(samples) != 0 {
		t.Errorf("samples of a domain that is gone: %v", samples)
	}
	if samples, _ := w.checkOnce(2); len(samples) == 0 {
		t.Error("no samples of the other")
	}
}

func TestTolerances(t *testing.T) {
	for name, tc := range map[string]struct {
		set  map[string]Tolerance
		want Tolerance // of cpu
		err  string
	}{
		"the default is libvirt's tick":       {nil, Tolerance{Absolute: tick}, ""},
		"a pattern holds over the default":    {map[string]Tolerance{"*": {Absolute: 1}}, Tolerance{Absolute: 1}, ""},
		"a longer pattern over a shorter one": {map[string]Tolerance{"*": {Absolute: 1}, "c*": {Absolute: 2}}, Tolerance{Absolute: 2}, ""},
		"a name over a pattern":               {map[string]Tolerance{"cpu": {Relative: 0.5}, "cp[u]": {Absolute: 2}}, Tolerance{Relative: 0.5}, ""},
		"a meter that is not compared":        {map[string]Tolerance{"disk.host.read.bytes": {}}, Tolerance{}, `crosscheck_tolerance: "disk.host.read.bytes" matches no meter that is compared with libvirt; those are cpu, cpu.process`},
		"a part that is none":                 {map[string]Tolerance{"cpu": {Relative: 5}}, Tolerance{}, `"cpu" has the relative tolerance 5; it is a part, from 0 to 1`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := tolerances(tc.set)
			switch {
			case tc.err != "":
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want %s", err, tc.err)
				}
			case err != nil:
				t.Error(err)
			case got[sample.CheckCPU] != tc.want:
				t.Errorf("got %+v, want %+v", got[sample.CheckCPU], tc.want)
			}
		})
	}
	if got := (Tolerance{Absolute: 10, Relative: 0.01}).of(1000, 3); got != 40 {
		t.Errorf("tolerance %d, want 10 for each of 3 counters and 1 %% of 1000", got)
	}
	if got := (Tolerance{Absolute: 1 << 63}).of(1, 4); got != 1<<64-1 {
		t.Errorf("tolerance %d, want the greatest number", got)
	}
}

func TestServeCrosscheck(t *testing.T) {
	w := newWorld(t, 2, func(w *world) {
		w.cfg.Socket = filepath.Join(t.TempDir(), "agent.sock")
		w.cfg.CrosscheckInterval = 0
		diskless(w)
		for n := 1; n <= 2; n++ {
			w.guests.stats[guestUUID(n)] = w.agreeing(n)
		}
	})
	go w.agent.socket.serve(w.deps.Log)
	defer w.agent.socket.close()
	c := client.Client{Path: w.cfg.Socket}
	s, err := c.Crosscheck(t.Context(), "", false)
	if err != nil || len(s.Domains) != 2 || s.Domains[0].Time != nil || len(s.Domains[0].Comparisons) != 0 {
		t.Errorf("before any check: %+v, %v", s, err)
	}
	if len(s.Notes) != 1 || !strings.Contains(s.Notes[0], "on request only") {
		t.Errorf("notes %q", s.Notes)
	}
	for _, name := range []string{guestUUID(2), "instance-00000002", "vm2"} {
		s, err = c.Crosscheck(t.Context(), name, true)
		if err != nil || len(s.Domains) != 1 || s.Domains[0].UUID != guestUUID(2) || len(s.Domains[0].Comparisons) != 8 || s.Domains[0].Time == nil {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	first := *s.Domains[0].Time
	if s, err = c.Crosscheck(t.Context(), "", false); err != nil || s.Domains[0].Time != nil || !s.Domains[1].Time.Equal(first) {
		t.Errorf("a check of one domain, or a fresh one, was made again: %+v, %v", s, err)
	}
	if _, err = c.Crosscheck(t.Context(), "web1", true); err == nil || !strings.Contains(err.Error(), `there is no domain "web1" on this host`) {
		t.Errorf("of a domain that there is not: %v", err)
	}
}
