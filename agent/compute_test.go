package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
)

// only returns samples as "resource meter volume", but for meters that begin with
// one of the prefixes.
func only(samples []sample.Sample, prefixes ...string) []string {
	var keep []string
	for _, s := range samples {
		if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s.Name, p) }) {
			keep = append(keep, s.Name)
		}
	}
	return brief(samples, keep...)
}

func TestFactsOfADomain(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.LegacyUnits, w.cfg.LegacyMeters = true, Patterns{"instance*"} })
	w.proc.write("101/stat", fmt.Sprintf("101 (x) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 1001 0 %d", (3<<20)/os.Getpagesize()))
	samples, _ := w.poll(w.task(false))
	want := []string{
		"1 disk.ephemeral.size 1", "1 disk.root.size 2", "1 instance 1", "1 instance:m1.nano 1",
		"1 memory 16.0", "1 memory.resident 3.0", "1 power.state 1", "1 vcpus 1",
	}
	if diff := cmp.Diff(want, only(samples, "disk.ephemeral", "disk.root", "instance", "memory", "power", "vcpus")); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	units := map[string]string{"memory": "MB", "memory.resident": "MB", "disk.root.size": "GB", "cpu": "ns", "power.state": ""}
	for _, s := range samples {
		if unit, ok := units[s.Name]; ok && s.Unit != unit {
			t.Errorf("%s is in %q, want %q", s.Name, s.Unit, unit)
		}
	}
}

func TestOlderMetersAreOffUntilAskedFor(t *testing.T) {
	samples, _ := newWorld(t, 1, nil).poll(newWorld(t, 1, nil).task(false))
	for _, s := range samples {
		for _, m := range sample.Catalogue {
			if m.Legacy && m.Name == s.Name {
				t.Errorf("%s came", s.Name)
			}
		}
	}
}

// age has the readings of a plan look as if they were that old.
func age(p pasts, by time.Duration) {
	for _, old := range p {
		old.at = old.at.Add(-by)
	}
}

func TestChangesBetweenPolls(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.LegacyMeters = Patterns{"*"} })
	task := w.task(false)
	first, _ := w.poll(task)
	want := []string{"nic1 network.incoming.bytes.delta 0", "nic1 network.outgoing.bytes.delta 0", "nic1 network.outgoing.packets.delta 0"}
	if diff := cmp.Diff(want, only(first, "cpu_util", "cpu.delta", "network.incoming.bytes.", "network.outgoing.bytes.", "network.incoming.packets.rate", "network.outgoing.packets.delta")); diff != "" {
		t.Errorf("the first poll (-want +got):\n%s", diff)
	}
	d := w.agent.order[0]
	age(d.cpuPast, 10*time.Second)
	age(d.nics[0].past, 10*time.Second)
	w.links.table = []rtnl.Link{{Index: 1, RxBytes: 10, TxBytes: 1020, RxPackets: 1, TxPackets: 52}}
	u := used(6e9, 5, 0)
	u.VCPUs = 1
	w.reader.set(101, u)
	second, _ := w.poll(task)
	got := map[string]float64{}
	for _, s := range second {
		got[s.Name] = s.Volume.Float64()
	}
	for name, want := range map[string]float64{
		"cpu.delta": 5e9, "cpu_util": 50, "network.incoming.bytes.delta": 1000, "network.outgoing.bytes.delta": 0,
		"network.incoming.bytes.rate": 100, "network.outgoing.bytes.rate": 0, "network.incoming.packets.rate": 5,
	} {
		// Some time has passed since the first poll, beside the 10 s.
		if v, ok := got[name]; !ok || v > want || v < want*0.5 {
			t.Errorf("%s is %v, want up to %v", name, v, want)
		}
	}
	w.links.table[0].TxBytes = 1021
	third, _ := w.poll(task)
	if diff := cmp.Diff([]string{"nic1 network.incoming.bytes.delta 1"}, only(third, "network.incoming.bytes.delta")); diff != "" {
		t.Errorf("deltas are not since the sample before (-want +got):\n%s", diff)
	}
}

func TestSizesOfDisks(t *testing.T) {
	lengths := map[string]uint64{"/a": 1000}
	file := func(format string) collectors.Disk {
		return collectors.Disk{Kind: "file", Format: format, Sources: []string{"/a"}}
	}
	for name, tc := range map[string]struct {
		disk    collectors.Disk
		stats   collectors.DiskStats
		want    [sizeCount]uint64 // capacity, allocation, usage
		missing uint32
	}{
		"a raw file that was written to its end so far": {
			file("raw"), collectors.DiskStats{Capacity: 1000, Allocation: 300, HasAllocation: true, Physical: 300}, [sizeCount]uint64{1000, 300, 1000}, 0,
		},
		"a raw file with a hole": {
			file("raw"), collectors.DiskStats{Capacity: 1000, Allocation: 700, HasAllocation: true, Physical: 300}, [sizeCount]uint64{1000, 700, 300}, 0,
		},
		"a raw file that was never written to": {
			file("raw"), collectors.DiskStats{Capacity: 1000, HasAllocation: true, Physical: 300}, [sizeCount]uint64{1000, 0, 1000}, 0,
		},
		"a qcow2 file": {
			file("qcow2"), collectors.DiskStats{Capacity: 9000, Allocation: 1000, HasAllocation: true, Physical: 300}, [sizeCount]uint64{9000, 300, 1000}, 0,
		},
		"a CD, whose image may be larger than what the guest sees": {
			file("raw"), collectors.DiskStats{Capacity: 900, Physical: 300}, [sizeCount]uint64{1000, 300, 1000}, 0,
		},
		"a block device": {
			collectors.Disk{Kind: "block", Format: "qcow2", Sources: []string{"/dev/x"}},
			collectors.DiskStats{Capacity: 900, Allocation: 500, HasAllocation: true, Physical: 2000},
			[sizeCount]uint64{2000, 500, 2000},
			0,
		},
		"an image whose length cannot be read": {
			collectors.Disk{Kind: "file", Format: "qcow2", Sources: []string{"/b"}},
			collectors.DiskStats{Capacity: 9000, Physical: 300},
			[sizeCount]uint64{9000, 300, 0},
			1<<iCapacity | 1<<iUsage,
		},
	} {
		got := sizesOf(&tc.disk, &tc.stats, lengths)
		if got.bytes != tc.want || got.missing != tc.missing {
			t.Errorf("%s: got %v, missing %b", name, got.bytes, got.missing)
		}
	}
}

func TestSumsOverDisks(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.LegacyMeters = Patterns{"*"} })
	task := w.task(true)
	stats := func(device string, n uint64) collectors.DiskStats {
		return collectors.DiskStats{Device: device, ReadBytes: n, WriteBytes: 2 * n, ReadRequests: 3, WriteRequests: 4, ReadNs: 5e6, WriteNs: 9e6, Capacity: 10 * n, Physical: 5 * n}
	}
	two := *w.guests.defs[guestUUID(1)]
	vdb := two.Disks[0]
	vdb.Device, vdb.Resource = "vdb", guestUUID(1)+"-vdb"
	two.Disks = append(slices.Clone(two.Disks), vdb)
	two.DisksMetadata = []byte(`{"device":["vda","vdb"]}`)
	w.guests.defs = map[string]*collectors.Definition{guestUUID(1): &two}
	w.guests.stats[guestUUID(1)] = collectors.GuestStats{Disks: []collectors.DiskStats{stats("vda", 100), stats("vdb", 10)}}
	samples, _ := w.poll(task)
	want := []string{
		"1 disk.allocation 550", "1 disk.capacity 1100", "1 disk.read.bytes 110", "1 disk.read.requests 6",
		"1 disk.usage 550", "1 disk.write.bytes 220", "1 disk.write.requests 8",
	}
	if diff := cmp.Diff(want, only(samples, "disk.read", "disk.write", "disk.capacity", "disk.allocation", "disk.usage", "disk.iops", "disk.latency")); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	for _, s := range samples {
		if s.Name == "disk.read.bytes" && string(s.Metadata) != `{"device":["vda","vdb"]}` {
			t.Errorf("metadata %s", s.Metadata)
		}
	}
	// vdb is unplugged: what it had counted stays in the sum.
	w.guests.defs = map[string]*collectors.Definition{guestUUID(1): definition(1)}
	w.guests.stats[guestUUID(1)] = collectors.GuestStats{Disks: []collectors.DiskStats{stats("vda", 101)}}
	age(w.agent.order[0].sumPast, time.Second)
	samples, _ = w.poll(task)
	want = []string{"1 disk.read.bytes 111", "1 disk.read.requests 6"}
	if diff := cmp.Diff(want, brief(samples, "disk.read.bytes", "disk.read.requests")); diff != "" {
		t.Errorf("without vdb (-want +got):\n%s", diff)
	}
	// It comes back and starts at zero, as QEMU's counters do.
	w.guests.defs = map[string]*collectors.Definition{guestUUID(1): &two}
	w.guests.stats[guestUUID(1)] = collectors.GuestStats{Disks: []collectors.DiskStats{stats("vda", 101), stats("vdb", 1)}}
	samples, _ = w.poll(task)
	if diff := cmp.Diff([]string{"1 disk.read.bytes 112"}, brief(samples, "disk.read.bytes")); diff != "" {
		t.Errorf("with vdb again (-want +got):\n%s", diff)
	}
}

func TestGuestMemory(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.CrosscheckInterval = 0 })
	task := w.task(true)
	poll := func(m collectors.MemoryStats) ([]string, []sample.Sample, []string) {
		m.Asked = true
		w.guests.stats[guestUUID(1)] = collectors.GuestStats{Memory: m, Disks: []collectors.DiskStats{{Device: "vda"}}}
		samples, gaps := w.poll(task)
		var missing []string
		for _, g := range gaps {
			missing = append(missing, g.Meter)
		}
		slices.Sort(missing)
		return only(samples, "memory"), samples, missing
	}
	if got, _, missing := poll(collectors.MemoryStats{}); len(got)+len(missing) != 0 {
		t.Errorf("without a balloon driver: %v, missing %v", got, missing)
	}
	older := collectors.MemoryStats{HasAvailable: true, Available: 2048, HasUnused: true, Unused: 512}
	if got, _, _ := poll(older); !slices.Equal(got, []string{"1 memory.available 2.0", "1 memory.usage 1.5"}) {
		t.Errorf("of an older driver: %v", got)
	}
	newer := collectors.MemoryStats{HasAvailable: true, Available: 2048, HasUnused: true, Unused: 512, HasUsable: true, Usable: 1024, HasSwap: true, SwapIn: 1024, SwapOut: 2048}
	got, before, _ := poll(newer)
	if !slices.Equal(got, []string{"1 memory.available 2.0", "1 memory.swap.in 1.0", "1 memory.swap.out 2.0", "1 memory.usage 1.0"}) {
		t.Errorf("of a newer driver: %v", got)
	}
	newer.SwapIn = 0 // the guest was rebooted
	_, after, _ := poll(newer)
	incarnation := func(all []sample.Sample) sample.Incarnation {
		return all[slices.IndexFunc(all, func(s sample.Sample) bool { return s.Name == "memory.swap.in" })].Incarnation
	}
	if incarnation(before) == incarnation(after) {
		t.Error("counters that start at zero have no other incarnation")
	}
	if _, _, missing := poll(older); !slices.Equal(missing, []string{"memory.swap.in", "memory.swap.out"}) {
		t.Errorf("of what the driver does not tell any more %v are missing", missing)
	}
	w.guests.errs[guestUUID(1)] = fmt.Errorf("busy")
	if _, _, missing := poll(newer); !slices.Contains(missing, "memory.usage") {
		t.Errorf("of a QEMU that does not answer only %v are missing", missing)
	}
}

func TestStoppedDomains(t *testing.T) {
	for name, tc := range map[string]struct {
		on    bool
		light []string
		heavy []string
	}{
		"have the sizes of their flavor only": {false, []string{"9 disk.ephemeral.size 1", "9 disk.root.size 2"}, nil},
		"have all that there is where that is asked for": {
			true,
			[]string{"9 disk.ephemeral.size 1", "9 disk.root.size 2", "9 memory 16.0", "9 power.state 5", "9 vcpus 1"},
			[]string{"9-vda disk.device.allocation 3", "9-vda disk.device.capacity 7", "9-vda disk.device.usage 7"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 0, func(w *world) { w.cfg.StoppedDomains = tc.on })
			off := definition(9)
			off.State = 5
			w.guests.idle = []*collectors.Definition{off}
			w.guests.stats[guestUUID(9)] = collectors.GuestStats{Disks: []collectors.DiskStats{{Device: "vda", Capacity: 5, Allocation: 3, Physical: 7}}}
			samples, _ := w.poll(w.task(false))
			if diff := cmp.Diff(tc.light, only(samples, "")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			samples, _ = w.poll(w.task(true))
			if diff := cmp.Diff(tc.heavy, only(samples, "")); diff != "" {
				t.Errorf("sizes (-want +got):\n%s", diff)
			}
			w.start(9) // its process is there before libvirt says so
			samples, _ = w.poll(w.task(false))
			if diff := cmp.Diff([]string{"9 power.state 1"}, only(samples, "power")); diff != "" {
				t.Errorf("it runs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestACheckComesWithAReadingInOneCall(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { w.cfg.CrosscheckInterval = 10 * time.Minute })
	asked := 0
	w.guests.stat = func(context.Context, string) { asked++ }
	w.guests.stats[guestUUID(1)] = w.agreeing(1)
	task := w.task(true)
	samples, _ := w.poll(task)
	if asked != 1 || len(only(samples, "check.cpu.process")) == 0 || len(only(samples, "disk.device.read.bytes")) == 0 {
		t.Errorf("%d calls, samples %v", asked, only(samples, ""))
	}
	if n := w.agent.checkNext(t.Context()); n != 1 || asked != 1 {
		t.Errorf("checked again at once: %d calls", asked)
	}
	samples, _ = w.poll(task)
	if asked != 2 || len(only(samples, "check.")) != 0 {
		t.Errorf("%d calls, samples of a check that was not due: %v", asked, only(samples, "check."))
	}
	w.agent.order[0].check.at = time.Now().Add(-w.cfg.CrosscheckInterval)
	if w.agent.checkNext(t.Context()); asked != 3 {
		t.Errorf("%d calls, want one of the check that is due", asked)
	}
}

func TestAStoppedProcessIsNotAsked(t *testing.T) {
	w := newWorld(t, 2, nil)
	var asked []string
	w.guests.stat = func(_ context.Context, uuid string) { asked = append(asked, uuid) }
	for n := 1; n <= 2; n++ {
		w.guests.stats[guestUUID(n)] = w.agreeing(n)
	}
	task := w.task(true)
	w.poll(task)
	w.proc.write("101/stat", "101 (x) T 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 1001 0 0")
	asked = nil
	samples, gaps := w.poll(task)
	if !slices.Equal(asked, []string{guestUUID(2)}) || len(only(samples, "disk.device.read.bytes")) != 1 {
		t.Errorf("asked %v, samples %v", asked, only(samples, "disk.device.read.bytes"))
	}
	if !slices.ContainsFunc(gaps, func(g sample.Gap) bool {
		return g.Resource == guestUUID(1)+"-vda" && strings.Contains(g.Reason, "is stopped")
	}) {
		t.Errorf("gaps %+v", gaps)
	}
	silent := func() int {
		n := 0
		for _, note := range w.agent.Notes() {
			if strings.Contains(note, "has not told of its disks") && strings.Contains(note, "is stopped") {
				n++
			}
		}
		return n
	}
	if silent() != 1 {
		t.Errorf("notes %q", w.agent.Notes())
	}
	w.proc.run(101, 1001, "qemu-system-x86_64")
	w.poll(task)
	if silent() != 0 {
		t.Errorf("notes %q", w.agent.Notes())
	}
}

func TestAnotherNumberOfVCPUThreadsHasLibvirtAsked(t *testing.T) {
	w := newWorld(t, 1, nil)
	task := w.task(false)
	w.poll(task)
	w.poll(task)
	if len(w.guests.wanted) != 0 {
		t.Errorf("libvirt was asked for %v", w.guests.wanted)
	}
	u := w.reader.usage[101]
	u.VCPUs++
	w.reader.set(101, u)
	w.poll(task)
	w.poll(task)
	if !slices.Equal(w.guests.wanted, []string{guestUUID(1)}) {
		t.Errorf("libvirt was asked for %v, want the domain once", w.guests.wanted)
	}
}

func TestLegacyMetersReadsAListOrASwitch(t *testing.T) {
	for text, want := range map[string]Patterns{"true": {"*"}, "false": nil, "[instance, 'disk.*']": {"instance", "disk.*"}} {
		var p Patterns
		if err := yaml.Unmarshal([]byte(text), &p); err != nil || !slices.Equal(p, want) {
			t.Errorf("%s: got %v, %v", text, p, err)
		}
		back, err := yaml.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var again Patterns
		if err := yaml.Unmarshal(back, &again); err != nil || !slices.Equal(again, want) {
			t.Errorf("%s: written as %q, which reads as %v, %v", text, back, again, err)
		}
	}
	var p Patterns
	if err := yaml.Unmarshal([]byte("sometimes"), &p); err == nil {
		t.Errorf("a text is %v", p)
	}
}

func TestCPUAsCeilometerCountsIt(t *testing.T) {
	const line = "se.statistics.wait_sum : %d.000000\n"
	w := newWorld(t, 1, func(w *world) {
		w.cfg.CPUDefinition = "ceilometer"
		w.proc.write("self/sched", fmt.Sprintf(line, 1))
	})
	task := w.task(false)
	poll := func(run uint64, threads map[uint32]int) string {
		var vcpus []bpf.VCPUUsage
		for tid, ms := range threads {
			w.proc.write(fmt.Sprintf("101/task/%d/sched", tid), fmt.Sprintf(line, ms))
			vcpus = append(vcpus, bpf.VCPUUsage{Index: 0, TID: tid, Run: run})
		}
		u := used(run, 5, 0)
		u.VCPUs = uint32(len(vcpus))
		w.reader.set(101, u)
		w.reader.vcpus = map[int][]bpf.VCPUUsage{101: vcpus}
		samples, _ := w.poll(task)
		return strings.Join(only(samples, "cpu")[:1], "")
	}
	for i, step := range []struct {
		run     uint64
		threads map[uint32]int
		want    string
	}{
		{1e9, map[uint32]int{7: 5}, "1 cpu 1005000000"},
		{2e9, map[uint32]int{7: 6}, "1 cpu 2006000000"},
		{3e9, map[uint32]int{8: 1}, "1 cpu 3007000000"}, // plugged out and in
	} {
		if got := poll(step.run, step.threads); got != step.want {
			t.Errorf("step %d: got %q, want %q", i, got, step.want)
		}
	}
	newer := newWorld(t, 1, func(w *world) { w.cfg.CPUDefinition = "ceilometer" })
	samples, _ := newer.poll(newer.task(false))
	if got := only(samples, "cpu"); !slices.Contains(got, "1 cpu 1000000000") {
		t.Errorf("on a kernel without that line: %v", got)
	}
}

func TestLengthsOfImages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	if err := os.WriteFile(path, make([]byte, 7), 0o600); err != nil {
		t.Fatal(err)
	}
	var i images
	for range 2 {
		if got := i.lengths(t.Context(), []string{path, "/nowhere", "/dev/null"}); len(got) != 1 || got[path] != 7 {
			t.Errorf("lengths %v", got)
		}
	}
	i.busy.Store(true) // a reading hangs
	if got := i.lengths(t.Context(), []string{path}); got != nil {
		t.Errorf("another reading was begun: %v", got)
	}
}

// FuzzDiskSums: whatever the disks count, and however they come and go, the sums
// over them only grow, by as much as they have counted.
func FuzzDiskSums(f *testing.F) {
	f.Add([]byte{1, 10, 2, 3, 0, 5, 1, 1})
	f.Fuzz(func(t *testing.T, steps []byte) {
		w := newWorld(t, 1, func(w *world) { w.cfg.LegacyMeters = Patterns{"disk.read.bytes"}; w.cfg.CrosscheckInterval = 0 })
		task := w.task(true)
		var counts [2]uint64
		var plugged [2]bool
		total, last := uint64(0), uint64(0)
		for _, s := range steps[:min(len(steps), 40)] {
			n, by := int(s&1), uint64(s>>2)
			switch {
			case s&2 != 0 && plugged[n]:
				plugged[n], counts[n] = false, 0
			default:
				plugged[n] = true
				counts[n] += by
				total += by
			}
			def := definition(1)
			def.Disks = nil
			var stats []collectors.DiskStats
			for i, device := range []string{"vda", "vdb"} {
				if plugged[i] {
					def.Disks = append(def.Disks, collectors.Disk{Device: device, Resource: guestUUID(1) + "-" + device})
					stats = append(stats, collectors.DiskStats{Device: device, ReadBytes: counts[i]})
				}
			}
			w.guests.defs = map[string]*collectors.Definition{guestUUID(1): def}
			w.guests.stats[guestUUID(1)] = collectors.GuestStats{Disks: stats}
			samples, _ := w.poll(task)
			for _, x := range samples {
				if x.Name != "disk.read.bytes" {
					continue
				}
				if x.Volume.Bits < last || x.Volume.Bits != total {
					t.Fatalf("the sum went from %d to %d, %d were counted", last, x.Volume.Bits, total)
				}
				last = x.Volume.Bits
			}
		}
	})
}
