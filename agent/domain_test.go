package agent

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// used makes a reading of vCPU, emulator and exited time.
func used(vcpu, emulator, exited uint64) bpf.Usage {
	u := bpf.Usage{Exited: exited, Process: vcpu + emulator + exited, HasSplit: true}
	u.Run[bpf.VCPU], u.Run[bpf.Emulator] = vcpu, emulator
	return u
}

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
		"a thread that is renamed moves nothing to exited": {
			[]bpf.Usage{used(100, 50, 0), used(40, 110, 0)},
			[]published{{100, 50, 0, 150}, {100, 110, 0, 150}},
			[]string{"cpu"},
		},
		"a reader without threads goes on with the process": {
			[]bpf.Usage{used(10, 5, 1), {Process: 20, Exited: 20}, used(14, 7, 1)},
			[]published{{10, 5, 1, 16}, {10, 5, 1, 20}, {14, 7, 1, 22}},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			var s usageState
			var got []published
			var held []string
			for _, u := range tc.readings {
				s.advance(&u, func(m int) { held = append(held, usageMeters[m].Name) })
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
	var s usageState
	none := func(int) {}
	s.advance(&bpf.Usage{Process: 1, Exited: 1}, none)
	if s.has != 1<<iProcess {
		t.Errorf("without threads: bits %b, want cpu.process only", s.has)
	}
	s.advance(&bpf.Usage{HasSplit: true, HasWait: true, HasIO: true}, none)
	if s.has != 1<<usageCount-1 {
		t.Errorf("with everything: bits %b, want all %d", s.has, usageCount)
	}
}

func TestWaitOfAnUnpluggedVCPUIsKept(t *testing.T) {
	var s usageState
	var got []uint64
	for _, u := range []struct{ run, wait, exited uint64 }{{100, 40, 0}, {30, 10, 70}, {35, 12, 70}} {
		r := used(u.run, 0, u.exited)
		r.Wait, r.HasWait = u.wait, true
		s.advance(&r, func(m int) { t.Errorf("%s was held", usageMeters[m].Name) })
		got = append(got, s.last[iWait])
	}
	if diff := cmp.Diff([]uint64{40, 40, 42}, got); diff != "" {
		t.Errorf("wait (-want +got):\n%s", diff)
	}
}

// TestUsageAddsUp: threads come and go at random; what is published never
// shrinks, and without noise the classes add up to the process.
func TestUsageAddsUp(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		type thread struct {
			class bpf.Class
			run   uint64
		}
		var live []thread
		var exited uint64
		var s usageState
		for range 100 {
			if rnd.IntN(3) == 0 {
				live = append(live, thread{class: bpf.Class(rnd.IntN(int(bpf.Classes)))})
			}
			if len(live) > 0 && rnd.IntN(4) == 0 {
				i := rnd.IntN(len(live))
				exited += live[i].run + rnd.Uint64N(5) // it runs a little before it exits
				live = append(live[:i], live[i+1:]...)
			}
			u := bpf.Usage{Exited: exited, Process: exited, HasSplit: true}
			for i := range live {
				live[i].run += rnd.Uint64N(1000)
				u.Run[live[i].class] += live[i].run
				u.Process += live[i].run
			}
			before := s.last
			s.advance(&u, func(int) {})
			sum := s.last[iExited]
			for _, m := range classMeters {
				sum += s.last[m]
			}
			for i := range before {
				if s.last[i] < before[i] {
					t.Fatalf("%s went back from %d to %d", usageMeters[i].Name, before[i], s.last[i])
				}
			}
			if s.last[iProcess] != u.Process || sum != u.Process {
				t.Fatalf("process %d, classes %d, kernel %d", s.last[iProcess], sum, u.Process)
			}
		}
	}
}

func TestNICCountsInTheGuestsDirection(t *testing.T) {
	m, err := newMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	var k nic
	k.advance(rtnl.Link{RxBytes: 1, TxBytes: 2, RxPackets: 3, TxPackets: 4, RxErrors: 5, TxErrors: 6, RxDropped: 7, TxDropped: 8}, m)
	want := map[string]uint64{
		"network.incoming.bytes": 2, "network.outgoing.bytes": 1,
		"network.incoming.packets": 4, "network.outgoing.packets": 3,
		"network.incoming.packets.error": 6, "network.outgoing.packets.error": 5,
		"network.incoming.packets.drop": 8, "network.outgoing.packets.drop": 7,
	}
	got := map[string]uint64{}
	for i, meter := range nicMeters {
		got[meter.Name] = k.last[i]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
	k.advance(rtnl.Link{RxBytes: 9, TxBytes: 1}, m)
	if k.last[iInBytes] != 2 || k.last[iOutBytes] != 9 {
		t.Errorf("after a lower reading: in %d, out %d, want 2 held and 9", k.last[iInBytes], k.last[iOutBytes])
	}
}

func TestIncarnations(t *testing.T) {
	now := time.Now()
	def := &collectors.Definition{
		UUID: "c0ffee00-1111-4222-8333-444455556666", Name: "i",
		NICs:  []collectors.NIC{{Device: "tap0", Resource: "n"}},
		Disks: []collectors.Disk{{Device: "vdb", Serial: "A", Resource: "d"}},
	}
	start := func(ticks uint64, index int) *domain {
		d := newDomain(&process{pid: 7, start: ticks, uuid: def.UUID}, "boot", now)
		d.define(now, def, "openstack", "h", nil, func(string) int { return index })
		return d
	}
	a, b, c := start(100, 5), start(100, 5), start(101, 5)
	if a.incarnation != b.incarnation || a.nics[0].row.Incarnation != b.nics[0].row.Incarnation || a.disks[0].row.Incarnation != b.disks[0].row.Incarnation {
		t.Error("another agent would find other incarnations of the same process")
	}
	if a.incarnation == c.incarnation || a.nics[0].row.Incarnation == c.nics[0].row.Incarnation || a.disks[0].row.Incarnation == c.disks[0].row.Incarnation {
		t.Error("a process that started later has the same incarnations")
	}
	if a.incarnation != sample.IncarnationOf("boot", "100") {
		t.Error("a process's incarnation is not (boot id, start time)")
	}

	t.Run("a tap that was made anew is another NIC", func(t *testing.T) {
		was := a.nics[0].row.Incarnation
		a.nics[0].last[iInBytes] = 9
		a.define(now, def, "openstack", "h", nil, func(string) int { return 6 })
		if a.nics[0].row.Incarnation == was || a.nics[0].last[iInBytes] != 0 {
			t.Errorf("NIC %+v goes on", a.nics[0])
		}
	})
	t.Run("a NIC and a disk that stay go on", func(t *testing.T) {
		b.nics[0].last[iInBytes], b.disks[0].last[iReadBytes] = 9, 8
		was := b.disks[0].row.Incarnation
		again := *def
		b.define(now, &again, "openstack", "h", nil, func(string) int { return 5 })
		if b.nics[0].last[iInBytes] != 9 || b.disks[0].last[iReadBytes] != 8 || b.disks[0].row.Incarnation != was {
			t.Errorf("NIC %+v and disk %+v began anew", b.nics[0], b.disks[0])
		}
	})
	t.Run("a disk whose counters shrank was attached anew", func(t *testing.T) {
		k := &b.disks[0]
		was := k.row.Incarnation
		b.advance(k, &collectors.DiskStats{ReadBytes: 100})
		if k.row.Incarnation != was {
			t.Error("counters that grew changed the incarnation")
		}
		b.advance(k, &collectors.DiskStats{ReadBytes: 5})
		if k.row.Incarnation == was || k.last[iReadBytes] != 5 {
			t.Errorf("disk %+v goes on", k)
		}
	})
	t.Run("a disk that was unplugged and plugged in again is another attachment", func(t *testing.T) {
		was := b.disks[0].row.Incarnation
		without := *def
		without.Disks = nil
		for range 2 {
			b.define(now, &without, "openstack", "h", nil, func(string) int { return 5 })
			b.define(now, def, "openstack", "h", nil, func(string) int { return 5 })
			if b.disks[0].row.Incarnation == was || b.disks[0].last != [diskCount]uint64{} {
				t.Errorf("disk %+v goes on", b.disks[0])
			}
			was = b.disks[0].row.Incarnation
		}
	})
	t.Run("a drive whose medium went and came back goes on", func(t *testing.T) {
		with, without := *def, *def
		with.Disks, without.Disks = []collectors.Disk{{Device: "sda", Removable: true, Resource: "cd"}}, nil
		c.define(now, &with, "openstack", "h", nil, func(string) int { return 5 })
		was := c.disks[0].row.Incarnation
		c.disks[0].last[iReadBytes] = 7
		c.define(now, &without, "openstack", "h", nil, func(string) int { return 5 })
		c.define(now, &with, "openstack", "h", nil, func(string) int { return 5 })
		if k := c.disks[0]; k.row.Incarnation != was || k.last[iReadBytes] != 7 || k.row.Resource != "cd" {
			t.Errorf("disk %+v began anew", k)
		}
		c.define(now, def, "openstack", "h", nil, func(string) int { return 5 })
	})
	t.Run("another volume at the same target is another disk", func(t *testing.T) {
		was := c.disks[0].row.Incarnation
		other := *def
		other.Disks = []collectors.Disk{{Device: "vdb", Serial: "B", Resource: "d"}}
		c.define(now, &other, "openstack", "h", nil, func(string) int { return 5 })
		if c.disks[0].row.Incarnation == was {
			t.Error("the disk goes on")
		}
	})
}
