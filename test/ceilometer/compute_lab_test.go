//go:build lab

package ceilometer

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/collectors/rtnl"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

const host = "compute-1"

// meters of Ceilometer 19's compute namespace, but for those that libvirt never
// gives (cpu_util, *.rate, disk.device.iops and latency).
var meters = []string{
	"cpu", "memory.*", "perf.*", "cpu_l3_cache", "network.*", "disk.device.*",
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestComputeAgents has both compute agents meter the same guests, which are
// paused, and compares what they send; and what Ceilometer's notification agent
// writes of both, and kvmeter's notifier and store have of Ceilometer's.
func TestComputeAgents(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := lab.Start(t, lab.Options{})
	must(t, l.StartLibvirt(ctx))
	rabbit, err := l.RabbitMQ(ctx)
	must(t, err)
	programs := build(t)
	tap, err := NewTap(rabbit.URL())
	must(t, err)
	defer func() { must(t, tap.Close()) }()
	_, written := StartNotification(t, rabbit.URL(), Secret, "")
	api := startControl(t, programs, rabbit.URL())
	linux, err := l.StartGuest(ctx, lab.GuestSpec{Name: "web <1>", NICs: 2, Disks: []lab.Disk{{}, {Format: "qcow2"}}})
	must(t, err)
	kvm, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "disk", VCPUs: 2, Flavor: "m1.small"})
	must(t, err)
	// One that an older Nova made, with all that it may say, and without a balloon.
	older, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, NICs: -1, Edits: []string{
		"libvirt/nova/1.1", "libvirt/nova/1.0",
		"<nova:ephemeral>0</nova:ephemeral>", "<nova:ephemeral>3</nova:ephemeral>",
		`<nova:root type="image"`, `<nova:root type="volume"`,
		"<memballoon model='virtio'><stats period='10'/></memballoon>", "<memballoon model='none'/>",
	}})
	must(t, err)
	off, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM})
	must(t, err)
	for _, command := range []string{"write 65536 16", "read 4096 100", "write 4096 16 vdb", "udp 200 100"} {
		if out, err := linux.Exec(ctx, command); err != nil {
			t.Fatalf("%s: %v %s", command, err, out)
		}
	}
	must(t, linux.SendUDP(ctx, 100, 100))
	awaitBalloon(t, linux)
	must(t, linux.Pause(ctx))
	must(t, kvm.Pause(ctx))
	must(t, older.Pause(ctx))
	must(t, off.PowerOff(ctx))

	flavors := map[string]string{"m1.nano": "f1a40000-0000-4000-8000-000000000001", "m1.small": "f1a40000-0000-4000-8000-000000000002"}
	before := poll(t, ctx, l, flavors)
	dir := t.TempDir()
	theirs, err := (&Agent{Host: host, Libvirt: l.ReadOnlySocket(), Broker: rabbit.URL(), Interval: 3 * time.Second, Meters: meters, Flavors: flavors}).Poll(ctx, dir, 2)
	must(t, err)
	ours := poll(t, ctx, l, flavors)
	compare(t, theirs, before, ours)

	sent := rest(t, ctx, tap)
	t.Run("kvmeter's notifier and store take all that Ceilometer's agent sends", func(t *testing.T) { compareStore(t, api, sent) })
	t.Run("Ceilometer's notification agent writes the same of both", func(t *testing.T) {
		first := lines(t, written, sent)
		tap.Bodies = nil
		again := runAgent(t, ctx, programs, dir, flavors, tap, theirs)
		compareWritten(t, first, lines(t, written, again))
		verify(t, tap.Bodies, len(again))
	})
}

// awaitBalloon waits until the guest's balloon driver has told something.
func awaitBalloon(t *testing.T, g *lab.Guest) {
	t.Helper()
	for range 300 {
		stats, err := g.Stats(t.Context())
		must(t, err)
		if stats["balloon.usable"] != 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("the guest's balloon driver tells nothing")
}

// poll is one round of kvmeter's agent.
func poll(t *testing.T, ctx context.Context, l *lab.Lab, flavors map[string]string) []sample.Sample {
	t.Helper()
	polling := filepath.Join(t.TempDir(), "polling.yaml")
	must(t, os.WriteFile(polling, []byte(`sources: [{name: all, interval: 60, meters: ["*"]}]`), 0o644))
	cfg := agent.DefaultConfig()
	cfg.Node, cfg.Polling, cfg.Libvirt, cfg.IPMI.Device = host, polling, agent.Sockets{l.ReadOnlySocket()}, ""
	cfg.LegacyMeters, cfg.LegacyUnits = agent.Patterns{"*"}, true
	cfg.FlavorIDs, cfg.CPUDefinition = flavors, "ceilometer"
	log := zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel))
	readers, notes := all.Usage(log, false)
	links, err := rtnl.Open()
	must(t, err)
	defer func() { must(t, all.Close(readers)); must(t, links.Close()) }()
	samples, gaps, notes, err := agent.DryRun(ctx, cfg, agent.Deps{Log: log, Usage: readers, Links: links, Notes: notes})
	must(t, err)
	t.Logf("gaps %+v, notes %q", gaps, notes)
	return samples
}

// known are differences that docs/ceilometer.md explains, by meter and field.
var known = map[string]string{}

// compare prints how ours differ from theirs, and fails for each difference that
// is not known.
func compare(t *testing.T, theirs []Sample, before, ours []sample.Sample) {
	t.Helper()
	type series struct{ name, resource string }
	have, earlier := map[series]*sample.Sample{}, map[series]float64{}
	for _, s := range before {
		earlier[series{s.Name, s.Resource}] = s.Volume.Float64()
	}
	for i := range ours {
		have[series{ours[i].Name, ours[i].Resource}] = &ours[i]
	}
	slices.SortFunc(theirs, func(a, b Sample) int { return strings.Compare(a.Name+" "+a.Resource, b.Name+" "+b.Resource) })
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "METER\tRESOURCE\tFIELD\tCEILOMETER\tKVMETER")
	unknown, names := 0, map[string]bool{}
	for _, s := range theirs {
		names[s.Name] = true
		differ := func(field string, a, b any) {
			why := known[s.Name+" "+field]
			if why == "" {
				unknown++
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%v\t%v\t%s\n", s.Name, s.Resource, field, a, b, why)
		}
		o := have[series{s.Name, s.Resource}]
		if o == nil {
			differ("sample", "there", "missing")
			continue
		}
		for field, pair := range map[string][2]string{
			"type": {s.Type, string(o.Kind)}, "unit": {s.Unit, o.Unit}, "source": {s.Source, o.Source},
			"project": {s.Project, o.Project}, "user": {s.User, o.User},
		} {
			if pair[0] != pair[1] {
				differ(field, pair[0], pair[1])
			}
		}
		theirs, low, high := volume(t, s), o.Volume.Float64(), o.Volume.Float64()
		if s.Name == "memory.resident" { // QEMU takes more when it is asked
			low, high = min(low, earlier[series{s.Name, s.Resource}]), max(high, earlier[series{s.Name, s.Resource}])
		}
		if off := max(low-theirs, theirs-high); off > tolerance(s.Name, s.Metadata) {
			differ("volume", s.Volume, o.Volume)
		}
		var a, b map[string]any
		must(t, json.Unmarshal(s.Metadata, &a))
		must(t, json.Unmarshal(o.Metadata, &b))
		for _, key := range slices.Sorted(maps.Keys(merged(a, b))) {
			if x, there := a[key]; !there || !reflect.DeepEqual(x, b[key]) {
				differ("metadata."+key, x, b[key])
			}
		}
	}
	_ = w.Flush()
	t.Logf("%d samples of %d meters by Ceilometer, %d samples by kvmeter; differences:\n%s", len(theirs), len(names), len(ours), table.String())
	if unknown > 0 {
		t.Errorf("%d differences that are not known", unknown)
	}
	if len(names) < 20 {
		t.Errorf("Ceilometer sent %d meters only: %v", len(names), slices.Sorted(maps.Keys(names)))
	}
}

func merged(a, b map[string]any) map[string]bool {
	keys := map[string]bool{}
	for k := range a {
		keys[k] = true
	}
	for k := range b {
		keys[k] = true
	}
	return keys
}

func volume(t *testing.T, s Sample) float64 {
	v, err := s.Volume.Float64()
	must(t, err)
	return v
}

// tolerance is how far volumes may be apart: libvirt cuts the user and the system
// time of each vCPU to ticks of 10 ms, and memory.resident may be off by a page;
// all else is equal.
func tolerance(name string, metadata []byte) float64 {
	switch name {
	case "cpu":
		var m struct {
			VCPUs int `json:"cpu_number"`
		}
		_ = json.Unmarshal(metadata, &m)
		return float64(20 * time.Millisecond * time.Duration(m.VCPUs))
	case "memory.resident":
		return 4.0 / 1024
	}
	return 0
}
