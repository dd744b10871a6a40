package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/libvirt"
	"github.com/kvmeter/kvmeter/sample"
)

// TestAFaultThatLasts: what is stored covers all of it, in few gaps.
func TestAFaultThatLasts(t *testing.T) {
	var told []sample.Gap
	tell := func(g sample.Gap) { told = append(told, g) }
	var g openGaps
	now := time.Now()
	const second = int64(time.Second / time.Microsecond)
	for s := int64(1); s <= 150; s++ { // one poll a second
		if s < 131 {
			g.miss("*", "r", (s-1)*second, s*second, fmt.Sprintf("reason %d", s))
		}
		if s == 90 {
			g.miss("*", "once", 89*second, 90*second, "a moment")
		}
		g.record(now.Add(time.Duration(s)*time.Second), tell)
	}
	want := []sample.Gap{
		{Meter: "*", Resource: "r", From: 0, To: 1 * second, Reason: "reason 1"},
		{Meter: "*", Resource: "r", From: 1 * second, To: 61 * second, Reason: "reason 61"},
		{Meter: "*", Resource: "once", From: 89 * second, To: 90 * second, Reason: "a moment"},
		{Meter: "*", Resource: "r", From: 61 * second, To: 121 * second, Reason: "reason 121"},
		{Meter: "*", Resource: "r", From: 121 * second, To: 130 * second, Reason: "reason 130"},
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("gaps (-want +got):\n%s", diff)
	}
	if len(g.open) != 0 {
		t.Errorf("%d gaps are open after the fault", len(g.open))
	}
}

func TestAGapWhileTheWallClockIsSetBackCoversBothTimes(t *testing.T) {
	var told []sample.Gap
	tell := func(g sample.Gap) { told = append(told, g) }
	var g openGaps
	now := time.Now()
	for i, at := range []int64{100, 101, 102, 50, 51} {
		g.miss("*", "r", at-1, at, "why")
		g.record(now.Add(time.Duration(i)*time.Second), tell)
	}
	g.end(tell)
	want := []sample.Gap{
		{Meter: "*", Resource: "r", From: 99, To: 100, Reason: "why"},
		{Meter: "*", Resource: "r", From: 100, To: 102, Reason: "why"},
		{Meter: "*", Resource: "r", From: 49, To: 50, Reason: "why"},
		{Meter: "*", Resource: "r", From: 50, To: 51, Reason: "why"},
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("gaps (-want +got):\n%s", diff)
	}
}

// TestFaultsAreNoFlood: whatever fails at 1 Hz is recorded when it begins and when it ends.
func TestFaultsAreNoFlood(t *testing.T) {
	asked := 0 // meters that QEMU is asked for
	for _, m := range sample.Catalogue {
		if m.QEMU && !m.Legacy {
			asked++
		}
	}
	for name, tc := range map[string]struct {
		qemu        bool
		fail, cease func(*world)
		want        map[string]int // gaps by resource
	}{
		"a domain that cannot be read": {
			fail:  func(w *world) { w.reader.set(101, bpf.Usage{Err: bpf.ErrTooManyThreads}) },
			cease: func(w *world) { w.start(1) },
			want:  map[string]int{guestUUID(1): 2},
		},
		"a libvirt that does not answer": {
			qemu:  true,
			fail:  func(w *world) { w.guests.err = libvirt.ErrNotConnected },
			cease: func(w *world) { w.guests.err = nil },
			want:  map[string]int{"*": 2 * asked},
		},
		"a QEMU that hangs": {
			qemu:  true,
			fail:  func(w *world) { w.guests.errs[guestUUID(1)] = libvirt.ErrBusy },
			cease: func(w *world) { delete(w.guests.errs, guestUUID(1)) },
			want:  map[string]int{guestUUID(1) + "-vda": 2},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, func(w *world) {
				alone(w)
				w.cfg.CrosscheckInterval = 0
			})
			w.guests.stats[guestUUID(1)] = collectors.GuestStats{HasCPU: true, Disks: []collectors.DiskStats{{Device: "vda"}}}
			task := w.task(tc.qemu)
			first, _ := w.poll(task)
			tc.fail(w)
			got := map[string]int{}
			reach := map[string]int64{}
			poll := func() []sample.Sample {
				samples, gaps := w.poll(task)
				for _, g := range gaps {
					got[g.Resource]++
					key := g.Meter + g.Resource
					if from, ok := reach[key]; ok && g.From != from {
						t.Errorf("gap %+v does not go on from %d", g, from)
					}
					reach[key] = g.To
				}
				return samples
			}
			for range 20 {
				poll()
			}
			last := task.last
			tc.cease(w)
			if len(poll()) != len(first) {
				t.Error("not all samples came back")
			}
			poll()
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("gaps (-want +got):\n%s", diff)
			}
			for key, to := range reach {
				if to < last {
					t.Errorf("the gap of %s ends %d µs before the fault did", key, last-to)
				}
			}
		})
	}
}

func TestAnOpenGapIsRecordedWhenTheAgentStops(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.Interval = minInterval; alone(w) })
	w.reader.set(101, bpf.Usage{Err: bpf.ErrTooManyThreads})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agent.Run(ctx) }()
	for range 5 {
		<-w.bus.got
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	var last, to int64
	for _, b := range w.bus.batches(t, nil) {
		if b.Len() > 0 {
			last = b.Base // its NIC is read all the time
		}
		for _, g := range b.Gaps {
			if g.Resource == guestUUID(1) && g.Meter == "*" {
				to = max(to, g.To)
			}
		}
	}
	if to < last {
		t.Errorf("the gap ends %d µs before the last poll", last-to)
	}
}

func TestAGapBeginsAtThePlansOwnLastSample(t *testing.T) {
	w := newWorld(t, 1, func(w *world) {
		w.cfg.Polling = w.proc.file("polling.yaml", `sources:
- {name: fast, interval: 1, meters: [cpu]}
- {name: slow, interval: 10, meters: [cpu.wait]}`)
	})
	fast, slow := newTask(w.agent.plans[0], w.agent.hooks), newTask(w.agent.plans[1], w.agent.hooks)
	old, _ := w.poll(slow)
	w.poll(fast)
	w.reader.set(101, bpf.Usage{Err: bpf.ErrTorn})
	if _, gaps := w.poll(slow); len(gaps) != 1 || gaps[0].From != old[0].Time {
		t.Errorf("gaps %+v, want one since %d", gaps, old[0].Time)
	}
}

func TestAMeterThatNoReaderCanCountAnyMoreIsAGap(t *testing.T) {
	second := &fakeReader{origin: "cpuclock", usage: map[int]bpf.Usage{101: {Process: 2e9, Exited: 2e9}}}
	w := newWorld(t, 1, func(w *world) { w.deps.Usage = append(w.deps.Usage, second) })
	task := w.task(false)
	first, _ := w.poll(task)
	w.reader.err = fmt.Errorf("the program is gone")
	samples, gaps := w.poll(task)
	if want := ofADomain - usageCount + 1; len(samples) != want {
		t.Errorf("%d samples, want cpu.process and what no reader counts", len(samples))
	}
	var missing []string
	for _, g := range gaps {
		missing = append(missing, g.Meter)
		if g.Resource != guestUUID(1) || g.From != first[0].Time || !strings.Contains(g.Reason, "cpuclock") {
			t.Errorf("gap %+v", g)
		}
	}
	slices.Sort(missing)
	var want []string
	for _, m := range usageMeters {
		if m != sample.CPUProcess {
			want = append(want, m.Name)
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, missing); diff != "" {
		t.Errorf("gaps of (-want +got):\n%s", diff)
	}
}
