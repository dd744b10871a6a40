package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/sample"
)

func TestNewBillingRefuses(t *testing.T) {
	type set = map[string][]sample.Origin
	for name, tc := range map[string]struct {
		set  set
		want string
	}{
		"an origin that does not count the meter": {
			set{"cpu": {"walk", "libvirt"}},
			`origins: "cpu" cannot be billed from "libvirt", which does not count the same; it can from walk, iter, cpuclock, free`,
		},
		"another quantity": {
			set{"disk.host.*": {"libvirt"}},
			`origins: "disk.host.*" cannot be billed from "libvirt", which does not count the same; it can from walk, iter, cpuclock, free`,
		},
		"another quantity by a pattern of both": {
			set{"disk.*.bytes": {"rtnl"}},
			`origins: "disk.*.bytes" cannot be billed from "rtnl"`,
		},
		"no origin":            {set{"network.incoming.bytes": {}}, `origins: "network.incoming.bytes" has no origin: it can be billed from rtnl, libvirt`},
		"an origin that is no": {set{"cpu": {"magic"}}, `"magic", which does not count the same; it can from walk, iter, cpuclock, free`},
		"an origin twice":      {set{"cpu": {"walk", "walk"}}, `origins: "cpu" has walk twice`},
		"no such meter":        {set{"memories": {"libvirt"}}, `origins: no meter has the name or pattern "memories"`},
		"a bad pattern":        {set{"!cpu": {"walk"}}, `origins: "!cpu": a pattern cannot exclude here`},
		"two orders of one reading": {
			set{"cpu": {"walk", "iter"}, "cpu.wait": {"iter", "walk"}},
			"origins: the lists have walk, iter, cpuclock in different orders; one reading gives cpu, cpu.* and disk.host.*",
		},
		"orders that go round": {
			set{"cpu": {"walk", "iter"}, "cpu.wait": {"iter", "cpuclock"}, "cpu.process": {"cpuclock", "walk"}},
			"in different orders",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 0, nil)
			w.cfg.Origins = tc.set
			if _, err := New(w.cfg, w.deps); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

func TestTheFirstOriginThatAnswersIsBilled(t *testing.T) {
	second := &fakeReader{origin: "cpuclock", usage: map[int]bpf.Usage{101: used(5e9, 0, 0)}}
	for name, tc := range map[string]struct {
		set  map[string][]sample.Origin
		want sample.Origin
	}{
		"the catalogue's order without a setting":    {nil, "walk"},
		"the order of the setting":                   {map[string][]sample.Origin{"cpu.process": {"cpuclock", "walk"}}, "cpuclock"},
		"what the setting leaves out comes last":     {map[string][]sample.Origin{"cpu*": {"cpuclock"}, "disk.host.*": {"cpuclock"}}, "cpuclock"},
		"a pattern holds for what its origins count": {map[string][]sample.Origin{"*": {"cpuclock", "walk", "libvirt"}}, "cpuclock"},
		"what only libvirt may count is not of it":   {map[string][]sample.Origin{"cpu.process": {"libvirt"}}, "walk"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, func(w *world) { w.deps.Usage = append(w.deps.Usage, second); w.cfg.Origins = tc.set })
			samples, _ := w.poll(w.task(false))
			for _, s := range samples {
				if s.Name == "cpu" && s.Origin != tc.want {
					t.Errorf("origin %s, want %s", s.Origin, tc.want)
				}
			}
		})
	}
}

func TestAnOriginThatIsLeftOutBillsNothing(t *testing.T) {
	second := &fakeReader{origin: "cpuclock", usage: map[int]bpf.Usage{101: used(5e9, 5, 0)}}
	w := newWorld(t, 1, func(w *world) {
		w.deps.Usage = append(w.deps.Usage, second)
		w.cfg.Origins = map[string][]sample.Origin{"cpu": {"walk", "iter"}}
	})
	task := w.task(false)
	first, _ := w.poll(task)
	w.reader.err = errors.New("the program is gone")
	samples, gaps := w.poll(task)
	if got := brief(samples, "cpu", "cpu.process"); !slices.Equal(got, []string{"1 cpu.process 5000000005"}) {
		t.Errorf("samples %v, want cpu.process only", got)
	}
	gaps = slices.DeleteFunc(gaps, func(g sample.Gap) bool { return g.Meter != "cpu" })
	if len(gaps) != 1 || gaps[0].From != first[0].Time || gaps[0].Reason != "the setting origins does not have it billed from cpuclock" {
		t.Errorf("gaps of cpu: %+v", gaps)
	}
	if !slices.ContainsFunc(w.agent.Notes(), func(n string) bool {
		return n == "cpu is not collected: cpuclock counts, and the setting origins leaves it out"
	}) {
		t.Errorf("notes %q", w.agent.Notes())
	}
}

// stood has libvirt stand in once, and shows what it sent.
func (w *world) stood() []string {
	w.t.Helper()
	if !w.agent.pollLibvirt(w.t.Context()) {
		return nil
	}
	samples, _ := w.take()
	for _, s := range samples {
		if s.Origin != sample.Libvirt || s.Kind != sample.Cumulative || s.Project != "p" {
			w.t.Errorf("sample %+v", s)
		}
	}
	return brief(samples, "cpu.process", "network.incoming.bytes", "network.outgoing.packets")
}

func TestLibvirtStandsInForProcessesThatCannotBeRead(t *testing.T) {
	w := newWorld(t, 2, nil)
	task := w.task(false)
	for n := 1; n <= 2; n++ {
		w.guests.stats[guestUUID(n)] = w.agreeing(n)
	}
	first, _ := w.poll(task)
	if got := w.stood(); got != nil {
		t.Fatalf("libvirt stands in for what can be read: %v", got)
	}
	// The last value is 1000000005: libvirt's ticks must not take it back.
	w.guests.stats[guestUUID(1)] = collectors.GuestStats{CPUTime: 990e6, HasCPU: true}
	w.reader.set(101, bpf.Usage{Err: bpf.ErrTooManyThreads})
	samples, gaps := w.poll(task)
	if got := brief(samples, "cpu.process"); !slices.Equal(got, []string{"2 cpu.process 2000000005"}) {
		t.Errorf("samples %v, want the other's only", got)
	}
	for _, g := range gaps {
		if g.Meter == "cpu.process" || g.Meter == "*" || g.Resource != guestUUID(1) || g.From != first[0].Time {
			t.Errorf("gap %+v, want what libvirt cannot count", g)
		}
	}
	if len(gaps) != usageCount-1 {
		t.Errorf("%d gaps, want %d", len(gaps), usageCount-1)
	}
	if got := w.stood(); !slices.Equal(got, []string{"1 cpu.process 1000000005"}) {
		t.Errorf("libvirt, behind the last value, sent %v", got)
	}
	if n := value(t, w.agent.metrics.heldUsage[iProcess]); n != 1 {
		t.Errorf("%v values were held, want 1", n)
	}
	w.guests.stats[guestUUID(1)] = collectors.GuestStats{CPUTime: 1500e6, HasCPU: true}
	if got := w.stood(); !slices.Equal(got, []string{"1 cpu.process 1500000000"}) {
		t.Errorf("libvirt sent %v", got)
	}
	if notes := w.agent.Notes(); !slices.Contains(notes, "libvirt counts cpu.process of 1 domains and network.* of 0 NICs, every 10s") {
		t.Errorf("notes %q", notes)
	}

	w.reader.set(101, used(1400e6, 5, 0)) // it answers again, and is behind
	samples, _ = w.poll(task)
	if got := brief(samples, "cpu.process", "cpu"); !slices.Equal(got, []string{"1 cpu 1400000000", "1 cpu.process 1500000000", "2 cpu 2000000000", "2 cpu.process 2000000005"}) {
		t.Errorf("after it can be read again: %v", got)
	}
	w.reader.set(101, used(1600e6, 5, 0))
	samples, _ = w.poll(task)
	if got := brief(samples, "cpu.process"); got[0] != "1 cpu.process 1600000005" {
		t.Errorf("it goes on: %v", got)
	}
	if got := w.stood(); got != nil {
		t.Errorf("libvirt stands in for what can be read: %v", got)
	}
}

// TestLibvirtStandsInForANICThatIsNotOnTheHost: its tap is in a container's network
// namespace, say. What nobody counts is a gap.
func TestLibvirtStandsInForANICThatIsNotOnTheHost(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.guests.defs[guestUUID(1)].NICs[0].Device = "in-a-container" })
	task := w.task(false)
	stats := w.agreeing(1)
	stats.NICs[0].Device = "in-a-container"
	w.guests.stats[guestUUID(1)] = stats
	_, gaps := w.poll(task)
	if len(gaps) != 1 || gaps[0].Resource != "nic1" || gaps[0].Meter != "*" || !strings.Contains(gaps[0].Reason, "no interface in-a-container") {
		t.Errorf("gaps %+v, want one of the NIC", gaps)
	}
	if got := w.stood(); got != nil {
		t.Errorf("libvirt stands in before the interface was looked for twice: %v", got)
	}
	_, gaps = w.poll(task)
	if len(gaps) != 0 {
		t.Errorf("gaps %+v of what libvirt counts", gaps)
	}
	if got := w.stood(); !slices.Equal(got, []string{"nic1 network.incoming.bytes 20", "nic1 network.outgoing.packets 1"}) {
		t.Errorf("libvirt sent %v", got)
	}
	w.guests.err = errors.New("away")
	if _, gaps = w.poll(task); len(gaps) == 0 || gaps[0].Resource != "nic1" {
		t.Errorf("gaps %+v, want one of the NIC", gaps)
	}
}

func TestLibvirtStandsInForLinkStatistics(t *testing.T) {
	w := newWorld(t, 1, nil)
	task := w.task(false)
	w.guests.stats[guestUUID(1)] = w.agreeing(1)
	w.poll(task)
	w.links.err = errors.New("no buffer")
	samples, gaps := w.poll(task)
	if got := brief(samples, "network.incoming.bytes"); len(got) != 0 || len(gaps) != 0 {
		t.Errorf("samples %v and gaps %+v of a NIC that libvirt counts", got, gaps)
	}
	s := w.agreeing(1)
	s.NICs[0].InBytes, s.NICs[0].OutPackets = 500, 0
	w.guests.stats[guestUUID(1)] = s
	want := []string{"nic1 network.incoming.bytes 500", "nic1 network.outgoing.packets 1"}
	if diff := cmp.Diff(want, w.stood()); diff != "" {
		t.Errorf("libvirt sent (-want +got):\n%s", diff)
	}
	w.links.err = nil
	samples, _ = w.poll(task)
	if got := brief(samples, "network.incoming.bytes"); !slices.Equal(got, []string{"nic1 network.incoming.bytes 500"}) {
		t.Errorf("after links can be read again: %v, want the last value held", got)
	}
}

func TestLibvirtThatDoesNotStandInIsAGap(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.FalloverInterval, w.cfg.LibvirtTimeout = minInterval, time.Millisecond })
	task := w.task(false)
	w.poll(task)
	w.links.err, w.guests.counterErr = errors.New("no buffer"), errors.New("it does not answer")
	if _, gaps := w.poll(task); len(gaps) != 0 {
		t.Errorf("gaps at once: %+v", gaps)
	}
	if got := w.stood(); len(got) != 0 {
		t.Errorf("libvirt sent %v", got)
	}
	time.Sleep(w.agent.patience() + time.Millisecond)
	_, gaps := w.poll(task)
	if len(gaps) != 1 || gaps[0].Resource != "nic1" || gaps[0].Meter != "*" || gaps[0].Reason != "no buffer" {
		t.Errorf("gaps %+v, want one of the NIC", gaps)
	}
	w.guests.counterErr = nil
	w.guests.stats[guestUUID(1)] = w.agreeing(1)
	if got := w.stood(); len(got) != 2 {
		t.Errorf("libvirt, which answers again, sent %v", got)
	}
	w.guests.err = errors.New("there is no socket")
	w.poll(task)
	if got := w.stood(); got != nil {
		t.Errorf("libvirt is asked while it is away: %v", got)
	}
}

func TestLibvirtCountsFirstWhereTheSettingSaysSo(t *testing.T) {
	w := newWorld(t, 1, func(w *world) {
		w.cfg.Origins = map[string][]sample.Origin{"network.*": {"libvirt", "rtnl"}, "cpu.process": {"libvirt", "walk"}, "network.outgoing.packets": {"rtnl"}}
	})
	task := w.task(false)
	w.guests.stats[guestUUID(1)] = w.agreeing(1)
	samples, gaps := w.poll(task)
	if got := brief(samples, "cpu", "cpu.process", "network.incoming.bytes", "network.outgoing.packets"); !slices.Equal(got, []string{"1 cpu 1000000000", "nic1 network.outgoing.packets 1"}) || len(gaps) != 0 {
		t.Errorf("samples %v and gaps %+v, want what libvirt does not count", got, gaps)
	}
	if got := w.stood(); !slices.Equal(got, []string{"1 cpu.process 1000000005", "nic1 network.incoming.bytes 20"}) {
		t.Errorf("libvirt sent %v", got)
	}
	w.guests.err = errors.New("there is no socket")
	samples, _ = w.poll(task)
	if got := brief(samples, "cpu.process", "network.incoming.bytes"); !slices.Equal(got, []string{"1 cpu.process 1000000005", "nic1 network.incoming.bytes 20"}) {
		t.Errorf("samples %v, want the next origin's while libvirt is away", got)
	}
}

func TestFalloverAsksNoMoreOftenThanItMay(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.FalloverInterval = 200 * time.Millisecond })
	w.guests.stats[guestUUID(1)] = w.agreeing(1)
	task := w.task(false)
	w.agent.poll(t.Context(), task)
	w.links.err = errors.New("no buffer")
	done := make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
	defer cancel()
	go func() { w.agent.standIn(ctx); close(done) }()
	for ctx.Err() == nil {
		w.agent.poll(t.Context(), task)
		time.Sleep(5 * time.Millisecond)
	}
	<-done
	w.guests.mu.Lock()
	defer w.guests.mu.Unlock()
	if n := w.guests.counted; n < 3 || n > 6 {
		t.Errorf("libvirt was asked %d times in 900 ms at an interval of 200 ms", n)
	}
}
