package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/sample"
)

// fakeKVM answers what counts says of each PID.
type fakeKVM struct {
	counts map[int][]uint64
	asked  []uint32
	err    error
}

func (f *fakeKVM) Fields() []string {
	return []string{"halt_poll_success_ns", "halt_poll_fail_ns", "exits", "io_exits", "irq_window_exits"}
}

func (f *fakeKVM) Read(_ context.Context, procs []bpf.Proc, vcpus []uint32, out []bpf.KVMUsage) error {
	f.asked = append([]uint32{}, vcpus...)
	for i, p := range procs {
		out[i] = bpf.KVMUsage{}
		if counts := f.counts[p.PID]; counts != nil {
			out[i].VCPUs = 1
			copy(out[i].Counts[:], counts)
		}
	}
	return f.err
}

func TestKVMsStatistics(t *testing.T) {
	f := &fakeKVM{counts: map[int][]uint64{101: {5, 6, 100, 40, 2}}}
	w := newWorld(t, 2, func(w *world) {
		w.deps.KVM = f
		w.cfg.Interval = time.Second
	})
	task := w.task(false)
	poll := func() ([]string, []sample.Gap) {
		t.Helper()
		samples, gaps := w.poll(task)
		var got []string
		for _, s := range samples {
			if strings.HasPrefix(s.Name, "kvm.") {
				got = append(got, fmt.Sprint(s.Name, " ", s.Volume))
				if s.Resource != guestUUID(1) || s.Origin != sample.KVM || s.Kind != sample.Cumulative {
					t.Errorf("%+v", s)
				}
			}
		}
		return got, gaps
	}
	check := func(what string, got []string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	got, _ := poll()
	check("the first reading; the second domain has no KVM", got,
		"kvm.halt_poll 11", "kvm.exits 100", "kvm.exits.io 40", "kvm.exits.irq_window 2")
	if len(f.asked) != 2 || f.asked[0] != 1 {
		t.Errorf("asked for %v vCPUs, want those that were read", f.asked)
	}
	got, _ = poll()
	check("before the interval is over", got)

	later := func() { task.kvmAt = time.Now().Add(-w.cfg.KVMInterval) }
	f.counts[101] = []uint64{1, 1, 60, 20, 0} // a vCPU was unplugged
	later()
	got, _ = poll()
	check("after a vCPU was unplugged", got, "kvm.halt_poll 11", "kvm.exits 100", "kvm.exits.io 40", "kvm.exits.irq_window 2")
	f.counts[101] = []uint64{1, 2, 65, 21, 0}
	later()
	got, _ = poll()
	check("what the others count is added", got, "kvm.halt_poll 12", "kvm.exits 105", "kvm.exits.io 41", "kvm.exits.irq_window 2")

	f.err = errors.New("no KVM")
	later()
	got, gaps := poll()
	check("without KVM", got)
	if len(gaps) != 1 || gaps[0].Meter != "kvm.exits" || gaps[0].Resource != guestUUID(1) || !strings.Contains(gaps[0].Reason, "no KVM") {
		t.Errorf("gaps %+v", gaps)
	}
	if notes := strings.Join(w.agent.Notes(), "\n"); !strings.Contains(notes, "kvm.* cannot be collected: no KVM") {
		t.Errorf("notes %s", notes)
	}
}

func TestLibvirtTellsExitsWhereKVMCannotBeRead(t *testing.T) {
	f := &fakeKVM{counts: map[int][]uint64{101: {0, 0, 100, 0, 0}}}
	w := newWorld(t, 1, func(w *world) { w.deps.KVM = f })
	task := w.task(false)
	w.poll(task)
	told := w.agreeing(1)
	told.VCPUs[0].Exits, told.VCPUs[0].HasExits = 120, true
	exits := func() (got []string) {
		t.Helper()
		w.guests.stats[guestUUID(1)] = told
		w.agent.check(t.Context(), w.agent.order[0])
		samples, _ := w.take()
		for _, s := range samples {
			if s.Name == "kvm.exits" {
				got = append(got, fmt.Sprint(s.Volume, " ", s.Origin, " ", s.Resource == guestUUID(1)))
			}
		}
		return got
	}
	if got := exits(); got != nil {
		t.Errorf("while KVM can be read: %v", got)
	}
	f.err = errors.New("no KVM")
	task.kvmAt = time.Time{}
	w.poll(task)
	for _, step := range []struct {
		exits uint64
		want  string
	}{{120, "120 libvirt true"}, {110, "120 libvirt true"}, {130, "130 libvirt true"}} {
		told.VCPUs[0].Exits = step.exits
		if got := exits(); len(got) != 1 || got[0] != step.want {
			t.Errorf("libvirt tells %d: got %v, want %s", step.exits, got, step.want)
		}
	}
	told.VCPUs[0].HasExits = false
	if got := exits(); got != nil {
		t.Errorf("of a domain without KVM: %v", got)
	}
}
