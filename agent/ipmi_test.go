package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
	"github.com/kvmeter/kvmeter/sample"
)

// withBMC gives the world's agent a BMC with a temperature and a fan.
func withBMC(w *world) *bmctest.BMC {
	fake := bmctest.New()
	fake.Add(bmctest.Full{Number: 1, Name: "CPU1 Temp", Type: 1, Unit: 1, Factors: bmc.Factors{M: 1}}.Record(), bmctest.Sensor{Raw: 45})
	fake.Add(bmctest.Full{Number: 2, Name: "Fan 1", Type: 4, Unit: 18, Factors: bmc.Factors{M: 40}}.Record(), bmctest.Sensor{Raw: 100})
	w.cfg.IPMI = defaultIPMI()
	w.cfg.IPMI.State, w.cfg.IPMI.Interval = "", w.cfg.Interval
	w.deps.openBMC = func(string) (bmc.Transport, error) { return &bmctest.Transport{BMC: fake}, nil }
	return fake
}

// bmcTask returns the agent's plan for the BMC.
func (w *world) bmcTask() *task {
	w.t.Helper()
	for _, p := range w.agent.plans {
		if p.bmc {
			return newTask(p, w.agent.hooks)
		}
	}
	w.t.Fatal("there is no plan for the BMC")
	return nil
}

func TestTheBMCIsPolled(t *testing.T) {
	w := newWorld(t, 1, func(w *world) { withBMC(w) })
	task := w.bmcTask()
	w.agent.pollBMC(t.Context(), task)
	samples, gaps := w.take()
	var got []string
	for _, s := range samples {
		if s.Origin != sample.IPMI || s.Source != "openstack" || s.Kind != sample.Gauge || !strings.Contains(string(s.Metadata), `"node":"`+w.cfg.Node+`"`) {
			t.Errorf("sample %+v", s)
		}
		got = append(got, s.Resource+" "+s.Name+" "+s.Volume.String()+" "+s.Unit)
	}
	slices.Sort(got)
	n := w.cfg.Node
	want := []string{
		n + " hardware.ipmi.dcmi.power 312 W",
		n + " hardware.ipmi.dcmi.power.average 311 W",
		n + " hardware.ipmi.dcmi.power.max 390 W",
		n + " hardware.ipmi.dcmi.power.min 273 W",
		n + "-chassis hardware.ipmi.chassis.faults 0 fault",
		n + "-chassis hardware.ipmi.chassis.power 1 on",
		n + "-cpu1_temp_(0x1) hardware.ipmi.sensor.state 0 level",
		n + "-cpu1_temp_(0x1) hardware.ipmi.temperature 45.0 C",
		n + "-fan_1_(0x2) hardware.ipmi.fan 4000.0 RPM",
		n + "-fan_1_(0x2) hardware.ipmi.sensor.state 0 level",
		n + "-sel hardware.ipmi.sel.entries 0 entry",
		n + "-sel hardware.ipmi.sel.free 8192 B",
	}
	if d := cmp.Diff(want, got); d != "" || len(gaps) != 0 {
		t.Errorf("samples (-want +got):\n%s\ngaps %+v", d, gaps)
	}
}

// TestASensorThatFailsIsAGap, and is told with its age.
func TestASensorThatFailsIsAGap(t *testing.T) {
	var fake *bmctest.BMC
	w := newWorld(t, 0, func(w *world) { fake = withBMC(w) })
	task := w.bmcTask()
	w.agent.pollBMC(t.Context(), task)
	w.take()
	fake.Sensors[1].Fault = bmctest.Short
	w.agent.pollBMC(t.Context(), task)
	w.agent.deliver.Add(sample.NewBuilder(), time.Now().UnixMicro(), 0)
	samples, gaps := w.take()
	if len(gaps) != 2 || gaps[0].Resource != w.cfg.Node+"-cpu1_temp_(0x1)" || !strings.Contains(gaps[0].Reason, "malformed") {
		t.Errorf("gaps %+v", gaps)
	}
	if !slices.ContainsFunc(samples, func(s sample.Sample) bool {
		return s.Name == "hardware.ipmi.sensor.age" && s.Resource == w.cfg.Node+"-cpu1_temp_(0x1)" && strings.Contains(string(s.Metadata), "malformed")
	}) || slices.ContainsFunc(samples, func(s sample.Sample) bool { return s.Name == "hardware.ipmi.temperature" }) {
		t.Errorf("samples %+v", samples)
	}
	if got := value(t, w.agent.hardware.sensors.WithLabelValues("failing")); got != 1 {
		t.Errorf("%v sensors are failing by the metrics, want 1", got)
	}
}

// TestAHungBMCDelaysNobody: the domains are polled on time while it hangs.
func TestAHungBMCDelaysNobody(t *testing.T) {
	var fake *bmctest.BMC
	w := newWorld(t, 2, func(w *world) {
		fake = withBMC(w)
		fake.Fault = bmctest.Silent
		w.cfg.Interval = minInterval
		w.cfg.IPMI.Interval = minInterval
	})
	ctx, cancel := context.WithTimeout(t.Context(), 1200*time.Millisecond)
	defer cancel()
	if err := w.agent.Run(ctx); err != nil {
		t.Fatal(err)
	}
	polls := 0
	var gaps []sample.Gap
	for _, b := range w.bus.batches(t, nil) {
		gaps = append(gaps, b.Gaps...)
		for s := range b.Samples() {
			if s.Name == "cpu" && s.Resource == guestUUID(1) {
				polls++
			}
		}
	}
	if polls < 4 {
		t.Errorf("%d polls in 1.2 s at an interval of 100 ms while the BMC hangs", polls)
	}
	if !slices.ContainsFunc(gaps, func(g sample.Gap) bool { return g.Meter == "hardware.ipmi.temperature" && g.Resource == "*" }) {
		t.Errorf("gaps %+v", gaps)
	}
}

// TestAHostWithoutBMC says so in one line, and everything else goes on.
func TestAHostWithoutBMC(t *testing.T) {
	w := newWorld(t, 1, func(w *world) {
		withBMC(w)
		w.deps.openBMC = func(string) (bmc.Transport, error) { return nil, errors.New("there is no /dev/ipmi0") }
	})
	w.agent.pollBMC(t.Context(), w.bmcTask())
	if samples, gaps := w.take(); len(samples)+len(gaps) != 0 {
		t.Errorf("got %+v, gaps %+v", samples, gaps)
	}
	want := "hardware.ipmi.* cannot be collected: there is no /dev/ipmi0"
	if notes := w.agent.Notes(); !slices.Contains(notes, want) {
		t.Errorf("notes %q, want %q among them", notes, want)
	}
	if samples, _ := w.poll(w.task(false)); len(samples) == 0 {
		t.Error("the domain is not polled")
	}
}

func TestPlansOfTheBMC(t *testing.T) {
	sources, err := parsePolling([]byte(`sources:
  - {name: all, interval: 1, meters: ["*"]}
  - {name: power, interval: 2, meters: [hardware.ipmi.power, hardware.ipmi.fan]}
  - {name: slow, interval: 60, meters: ["hardware.ipmi.f*"]}
`))
	if err != nil {
		t.Fatal(err)
	}
	got := map[time.Duration]int{}
	for _, p := range bmcPlans(sources, 10*time.Second) {
		got[p.interval] = len(p.meters)
		if !p.bmc || p.qemu {
			t.Errorf("plan %+v", p)
		}
	}
	all := 0
	for _, m := range sample.Catalogue {
		if m.OfBMC() {
			all++
		}
	}
	if d := cmp.Diff(map[time.Duration]int{10 * time.Second: all, 2 * time.Second: 2, time.Minute: 1}, got); d != "" {
		t.Errorf("meters by interval (-want +got):\n%s", d)
	}
	plans, _ := makePlans(sources, &Config{QEMUInterval: time.Minute, HistogramInterval: time.Minute})
	for _, p := range plans {
		if slices.ContainsFunc(p.meters, (*sample.Meter).OfBMC) {
			t.Error("a plan of domains has meters of the BMC")
		}
	}
}

func TestIPMIConfig(t *testing.T) {
	for want, change := range map[string]func(c *IPMIConfig){
		"": func(*IPMIConfig) {},
		"ipmi.interval 1ms is too short: use at least 100ms": func(c *IPMIConfig) { c.Interval = time.Millisecond },
		"ipmi.budget 2s: must be between 1ms and 1s":         func(c *IPMIConfig) { c.Budget = 2 * time.Second },
		"ipmi.timeout 0s: must be between 50ms and 1m":       func(c *IPMIConfig) { c.Timeout = 0 },
		`ipmi.shape "odd": it is newer or older`:             func(c *IPMIConfig) { c.Shape = "odd" },
	} {
		cfg := DefaultConfig()
		change(&cfg.IPMI)
		if err := cfg.Check(); (err == nil) != (want == "") || err != nil && err.Error() != want {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestKipmid(t *testing.T) {
	proc := t.TempDir()
	for path, text := range map[string]string{
		"77/comm": "kipmi0\n",
		"77/stat": "77 (kipmi0) S 2 0 0 0 -1 2129984 0 0 0 0 3 150 0 0 39 19 1 0 300 0 0",
		"78/comm": "kworker\n",
		"78/stat": "78 (kworker) S 2 0 0 0 -1 2129984 0 0 0 0 9 9 0 0 39 19 1 0 300 0 0",
	} {
		if err := os.MkdirAll(filepath.Join(proc, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	registry := prometheus.NewRegistry()
	w := newWorld(t, 0, func(w *world) {
		withBMC(w)
		w.deps.Registry = registry
	})
	w.agent.hardware.kipmid.proc = proc
	w.agent.hardware.kipmid.read(time.Now())
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(families, func(f *dto.MetricFamily) bool {
		return f.GetName() == "kvmeter_agent_ipmi_kipmid_cpu_seconds_total"
	})
	if i < 0 || families[i].GetMetric()[0].GetCounter().GetValue() != 1.53 {
		t.Errorf("got %v, want 1.53 s", families)
	}
	for _, text := range []string{"", "1 (x", "1 (x) S 2", "1 (x) S 2 0 0 0 -1 2129984 0 0 0 0 a b 0"} {
		if got := statCPU(text); got != 0 {
			t.Errorf("got %v of %q", got, text)
		}
	}
}

// BenchmarkPollBMC is a poll of 300 sensors by a transport in memory, up to the
// encoded batch.
func BenchmarkPollBMC(b *testing.B) {
	w := newWorld(b, 0, func(w *world) {
		fake := withBMC(w)
		for i := 2; i < 300; i++ {
			f := bmctest.Full{Number: byte(i % 256), LUN: byte(i / 256), Name: fmt.Sprintf("Temp %d", i), Type: 1, Unit: 1, Factors: bmc.Factors{M: 1}}
			fake.Add(f.Record(), bmctest.Sensor{Raw: 40})
		}
	})
	task := w.bmcTask()
	w.agent.pollBMC(b.Context(), task)
	cpu := func() (u unix.Rusage) {
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u
	}
	before := cpu()
	b.ReportAllocs()
	for b.Loop() {
		w.agent.pollBMC(b.Context(), task)
		w.agent.deliver.Take()
	}
	after := cpu()
	used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(used)/float64(b.N), "cpu-ns/op")
}
