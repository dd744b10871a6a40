package agent

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

func TestNICCountsInTheGuestsDirection(t *testing.T) {
	m, err := newMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	k := nic{block: state.Memory().Block(1, 1, state.Words[keptNIC]())}
	k.keptNIC = state.View[keptNIC](k.block)
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
	k.macvtap = true
	if got := k.counters(rtnl.Link{RxBytes: 1, TxBytes: 2, RxPackets: 3, TxPackets: 4, RxErrors: 5, TxErrors: 6, RxDropped: 7, TxDropped: 8}); got != [nicCount]uint64{
		iInBytes: 1, iOutBytes: 2, iInPackets: 3, iOutPackets: 4, iInErrors: 5, iOutErrors: 6, iInDrops: 7, iOutDrops: 8,
	} {
		t.Errorf("of a macvtap: %v", got)
	}
	k.macvtap = false
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
		d := newDomain(&process{pid: 7, start: ticks, uuid: def.UUID}, "boot", now, state.Memory())
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
	t.Run("over a restart of the agent a NIC holds and a disk goes on or starts anew as it would have", func(t *testing.T) {
		file := state.Memory() // stands for the file that both agents have in turn
		restart := func(disks ...collectors.Disk) *domain {
			d := newDomain(&process{pid: 9, start: 300, uuid: def.UUID}, "boot", now, file)
			with := *def
			with.Disks = disks
			d.define(now, &with, "openstack", "h", nil, func(string) int { return 5 })
			return d
		}
		d := restart(def.Disks...)
		d.nics[0].last[iInBytes] = 9
		d.advance(&d.disks[0], &collectors.DiskStats{ReadBytes: 100})
		first := d.disks[0].row.Incarnation
		if d = restart(def.Disks...); d.nics[0].last[iInBytes] != 9 || d.disks[0].row.Incarnation != first || d.disks[0].last[iReadBytes] != 100 {
			t.Errorf("began anew: %v, %v", d.nics[0].last, d.disks[0].keptDisk)
		}
		d.advance(&d.disks[0], &collectors.DiskStats{ReadBytes: 5})
		second := d.disks[0].row.Incarnation
		if d = restart(def.Disks...); second == first || d.disks[0].row.Incarnation != second {
			t.Errorf("an attachment before the last comes again")
		}
		d.define(now, &collectors.Definition{UUID: def.UUID, Name: "i"}, "openstack", "h", nil, func(string) int { return 5 })
		if d = restart(def.Disks...); d.disks[0].row.Incarnation == second || d.disks[0].row.Incarnation == first || d.disks[0].lives != 2 {
			t.Errorf("what was unplugged before the restart goes on after it: %+v", d.disks[0].keptDisk)
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
