package ipmi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
	"github.com/kvmeter/kvmeter/sample"
)

func everything(*sample.Meter) bool { return true }

// kept is a sink that keeps what it gets.
type kept struct {
	points  []Point
	missing []string
	flushed int // points when it was flushed
}

func (k *kept) Emit(p *Point) {
	q := *p
	q.Metadata, q.Samples = slices.Clone(p.Metadata), slices.Clone(p.Samples)
	k.points = append(k.points, q)
}

func (k *kept) Miss(meter, resource, reason string) {
	k.missing = append(k.missing, meter+" of "+resource+": "+reason)
}

func (k *kept) Flush() { k.flushed = len(k.points) }

// lines are the samples, a line each.
func (k *kept) lines() (all []string) {
	for _, p := range k.points {
		for _, s := range p.Samples {
			all = append(all, fmt.Sprintf("%s %s %s %s %s", s.Meter.Name, p.Resource, s.Volume, s.Meter.Unit, p.Metadata))
		}
	}
	return all
}

func options(fake *bmctest.BMC) Options {
	t := &bmctest.Transport{BMC: fake}
	return Options{
		Node: "node1", Budget: 200 * time.Millisecond, Timeout: time.Second, Shape: Newer,
		Open: func(string) (bmc.Transport, error) { return t, nil },
	}
}

func celsius(number byte, name string) []byte {
	return bmctest.Full{Number: number, Name: name, Type: 1, Unit: 1, Factors: bmc.Factors{M: 1, Format: bmc.TwosComplement}}.Record()
}

func rack() *bmctest.BMC {
	b := bmctest.New()
	b.Add(celsius(1, "CPU1 Temp"), bmctest.Sensor{Raw: 45})
	b.Add(bmctest.Full{Number: 0x10, Name: "Fan 1", Type: 4, Unit: 18, NormalMax: 250, Factors: bmc.Factors{M: 40}}.Record(), bmctest.Sensor{Raw: 100, States: 1 << 3})
	b.Add(bmctest.Full{Number: 0x20, Name: "P12V", Type: 2, Unit: 4, Factors: bmc.Factors{M: 65, RExp: -3}}.Record(), bmctest.Sensor{Raw: 0xb8})
	b.Add(bmctest.Full{Number: 0x30, Name: "PSU1 Current", Type: 3, Unit: 5, Factors: bmc.Factors{M: 1, RExp: -1}}.Record(), bmctest.Sensor{Raw: 25})
	b.Add(bmctest.Full{Number: 0x31, Name: "Pwr Consumption", Type: 3, Unit: 6, Factors: bmc.Factors{M: 4}}.Record(), bmctest.Sensor{Raw: 77})
	b.Add(bmctest.Compact(0x50, "PSU1 Status", 0x08, 0x6f), bmctest.Sensor{States: 1<<0 | 1<<3})
	b.Add(bmctest.EventOnly(0x60, "Watchdog", 0x23, 0x6f), bmctest.Sensor{})
	b.Add(bmctest.NodeManager(0x2c, 6), bmctest.Sensor{})
	b.Node = &bmctest.Me{Addr: 0x2c, Channel: 6, Version: 5, Watts: 301, Inlet: 24, Outlet: 38, Airflow: 61, CUPS: 42, Busy: bmc.Utilization{CPU: 12, Memory: 34, IO: 5}}
	b.Trouble = 1 << 3
	b.Log(bmctest.Event(1700000000, 1, 1, 1, 9, true))
	return b
}

func poll(t *testing.T, c *Collector) *kept {
	t.Helper()
	var k kept
	if err := c.Poll(t.Context(), 10*time.Second, everything, &k); err != nil {
		t.Fatal(err)
	}
	return &k
}

func TestSamples(t *testing.T) {
	common := []string{
		`hardware.ipmi.chassis.power node1-chassis 1 on {"faults":["cooling fault"],"node":"node1"}`,
		`hardware.ipmi.chassis.faults node1-chassis 1 fault {"faults":["cooling fault"],"node":"node1"}`,
		`hardware.ipmi.dcmi.power node1 312 W {"node":"node1"}`,
		`hardware.ipmi.dcmi.power.min node1 273 W {"node":"node1"}`,
		`hardware.ipmi.dcmi.power.max node1 390 W {"node":"node1"}`,
		`hardware.ipmi.dcmi.power.average node1 311 W {"node":"node1"}`,
		`hardware.ipmi.sel.entries node1-sel 1 entry {"node":"node1"}`,
		`hardware.ipmi.sel.free node1-sel 8176 B {"node":"node1"}`,
		`hardware.ipmi.temperature node1-cpu1_temp_(0x1) 45.0 C {"node":"node1"}`,
		`hardware.ipmi.sensor.state node1-cpu1_temp_(0x1) 0 level {"node":"node1"}`,
		`hardware.ipmi.fan node1-fan_1_(0x10) 4000.0 RPM {"maximum_rpm":"10000.000","node":"node1"}`,
		`hardware.ipmi.sensor.state node1-fan_1_(0x10) 1 level {"maximum_rpm":"10000.000","node":"node1"}`,
		`hardware.ipmi.voltage node1-p12v_(0x20) 11.96 V {"node":"node1"}`,
		`hardware.ipmi.sensor.state node1-p12v_(0x20) 0 level {"node":"node1"}`,
		`hardware.ipmi.current node1-psu1_current_(0x30) 2.5 Amps {"node":"node1"}`,
		`hardware.ipmi.sensor.state node1-psu1_current_(0x30) 0 level {"node":"node1"}`,
		`POWER node1-pwr_consumption_(0x31) 308.0 W {"node":"node1"}`,
		`hardware.ipmi.sensor.state node1-pwr_consumption_(0x31) 0 level {"node":"node1"}`,
		`hardware.ipmi.sensor.states node1-psu1_status_(0x50) 9 bits {"node":"node1","sensor_type":"Power Supply","states":["Presence detected","Power Supply AC lost"]}`,
		`hardware.ipmi.node.power node1 301 W {"node":"node1"}`,
		`hardware.ipmi.node.temperature node1 24 C {"node":"node1"}`,
		`hardware.ipmi.node.outlet_temperature node1 38 C {"node":"node1"}`,
		`hardware.ipmi.node.airflow node1 61 CFM {"node":"node1"}`,
		`hardware.ipmi.node.cups node1 42 CUPS {"node":"node1"}`,
		`hardware.ipmi.node.cpu_util node1 12 % {"node":"node1"}`,
		`hardware.ipmi.node.mem_util node1 34 % {"node":"node1"}`,
		`hardware.ipmi.node.io_util node1 5 % {"node":"node1"}`,
	}
	for shape, power := range map[Shape]string{Newer: "hardware.ipmi.power", Older: "hardware.ipmi.current"} {
		t.Run(string(shape), func(t *testing.T) {
			o := options(rack())
			o.Shape = shape
			k := poll(t, New(zap.NewNop(), o))
			want := slices.Clone(common)
			for i := range want {
				want[i] = strings.Replace(want[i], "POWER", power, 1)
			}
			if d := cmp.Diff(want, k.lines()); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
			if k.missing != nil || k.flushed != len(k.points) {
				t.Errorf("missing %q, flushed after %d of %d", k.missing, k.flushed, len(k.points))
			}
		})
	}
}

// TestSameNameAndNumber: sensors of two LUNs stay two resources.
func TestSameNameAndNumber(t *testing.T) {
	fake := bmctest.New()
	for lun := range byte(2) {
		fake.Add(bmctest.Full{Number: 1, LUN: lun, Name: "Temp", Type: 1, Unit: 1, Factors: bmc.Factors{M: 1}}.Record(), bmctest.Sensor{Raw: 40})
	}
	var got []string
	for _, p := range poll(t, New(zap.NewNop(), options(fake))).points {
		if p.Samples[0].Meter.Name == sample.IPMITemperature.Name {
			got = append(got, p.Resource)
		}
	}
	if d := cmp.Diff([]string{"node1-temp_(0x1)", "node1-temp_(0x1)@0.20.1"}, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

// TestMetersThatNobodyWants are not asked for.
func TestMetersThatNobodyWants(t *testing.T) {
	fake := rack()
	var k kept
	c := New(zap.NewNop(), options(fake))
	if err := c.Poll(t.Context(), time.Second, func(m *sample.Meter) bool { return m == sample.IPMIVoltage }, &k); err != nil {
		t.Fatal(err)
	}
	if len(k.points) != 1 || fake.Commands[[2]byte{4, 0x2d}] != 1 || fake.Commands[[2]byte{0x2c, 2}] != 0 {
		t.Errorf("got %q, commands %v", k.lines(), fake.Commands)
	}
}

// TestSilentSensors is the bar: of 300 sensors 20 never answer, a command takes
// 2 ms, and in every interval of 10 s each of the others is read once, with no
// more waiting than the budget allows. Virtual time: half an hour of it.
func TestSilentSensors(t *testing.T) {
	for name, hold := range map[string]time.Duration{"an interface that is free at once": 0, "an interface that stays taken for 4 s": 4 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { silentSensors(t, hold) })
		})
	}
}

func silentSensors(t *testing.T, hold time.Duration) {
	const sensors, interval = 300, 10 * time.Second
	fake := bmctest.New()
	fake.Latency = 2 * time.Millisecond
	number := func(i int) (byte, byte) { return byte(i % 256), byte(i / 256) }
	for i := range sensors {
		n, lun := number(i)
		f := bmctest.Full{Number: n, LUN: lun, Name: fmt.Sprintf("Temp %d", i), Type: 1, Unit: 1, Factors: bmc.Factors{M: 1}}
		fake.Add(f.Record(), bmctest.Sensor{Raw: 40})
	}
	// Sensors 0 to 43 share their number with those of another LUN.
	silent := map[string]bool{}
	for i := 50; i < 250; i += 10 {
		n, _ := number(i)
		fake.Sensors[n].Fault = bmctest.Silent
		silent[fmt.Sprintf("node1-temp_%d_(0x%x)", i, n)] = true
	}
	o := options(fake)
	o.State = filepath.Join(t.TempDir(), "ipmi.json")
	tr := &bmctest.Transport{BMC: fake, Hold: hold}
	o.Open = func(string) (bmc.Transport, error) { return tr, nil }
	c := New(zap.NewNop(), o)
	last := map[string]time.Time{}
	late, worst := 0, time.Duration(0)
	begin := time.Now()
	// The walk takes a while, within the budget; the polls after it are measured.
	if k := poll(t, c); len(k.points) == 0 {
		t.Fatal("nothing was read")
	}
	settled := 0
	if hold > 0 {
		settled = 20 // the silent ones have to be found first, 4 s each
	}
	waited := c.Status().Waited
	start := time.Now()
	for n := range 180 {
		due := start.Add(time.Duration(n) * interval)
		time.Sleep(time.Until(due))
		k := poll(t, c)
		if took := time.Since(due); took > interval {
			t.Fatalf("poll %d took %v", n, took)
		}
		read := map[string]bool{}
		for _, p := range k.points {
			if p.Samples[0].Meter != sample.IPMISensorAge.MeterRef {
				read[p.Resource] = true
				if n > settled {
					worst = max(worst, p.At.Sub(last[p.Resource]))
				}
				last[p.Resource] = p.At
			}
		}
		for i := range sensors {
			n2, _ := number(i)
			id := fmt.Sprintf("node1-temp_%d_(0x%x)", i, n2)
			if n >= settled && !silent[id] && !read[id] {
				late++
			}
		}
		if len(k.missing) == 0 && n > 0 {
			t.Errorf("poll %d misses nothing", n)
		}
	}
	if late > 0 {
		t.Errorf("%d readings of sensors that answer were left out", late)
	}
	if limit := interval + 5*time.Second; worst > limit {
		t.Errorf("two readings of a sensor that answers were %v apart, want at most %v", worst, limit)
	}
	s := c.Status()
	perSecond := float64(s.Waited-waited) / float64(time.Since(start).Seconds())
	t.Logf("readings at most %v apart; %v of waiting a second; %v of health; first poll after %v", worst, time.Duration(perSecond), s.Health, start.Sub(begin))
	if perSecond > float64(o.Budget) {
		t.Errorf("waited %v a second, want at most %v", time.Duration(perSecond), o.Budget)
	}
	if s.Health[healthQuarantined] != len(silent) || s.Oldest < 29*time.Minute {
		t.Errorf("got %+v", s)
	}
	// After a restart those that never answer need not be found again.
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = New(zap.NewNop(), o)
	time.Sleep(interval)
	begin = time.Now()
	k := poll(t, c)
	if n := len(k.points) - 20; n != sensors-len(silent)+3 || time.Since(begin) > interval {
		t.Errorf("the first poll after a restart has %d readings, after %v", n, time.Since(begin))
	}
	if h := c.Status().Health; h[healthQuarantined] != len(silent) {
		t.Errorf("after a restart: %v", h)
	}
}

// TestRecovery: a sensor that answers again is read again, within its pause.
func TestRecovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := rack()
		fake.Latency = 2 * time.Millisecond
		c := New(zap.NewNop(), options(fake))
		fake.Sensors[1].Fault = bmctest.Silent
		for range 30 {
			k := poll(t, c)
			if !slices.ContainsFunc(k.missing, func(s string) bool {
				return strings.HasPrefix(s, "hardware.ipmi.temperature of node1-cpu1_temp_(0x1): ") && strings.HasSuffix(s, ": the BMC does not answer")
			}) {
				t.Fatalf("missing %q", k.missing)
			}
			last := k.points[len(k.points)-1]
			var m struct{ Reading string }
			if err := json.Unmarshal(last.Metadata, &m); err != nil || last.Samples[0].Meter != sample.IPMISensorAge.MeterRef || !strings.Contains(m.Reading, "does not answer") {
				t.Fatalf("got %s %+v", last.Metadata, last)
			}
			time.Sleep(10 * time.Second)
		}
		if h := c.Status().Health[healthQuarantined]; h != 1 {
			t.Fatalf("%d in quarantine", h)
		}
		fake.Sensors[1].Fault = bmctest.None
		time.Sleep(maxBackOff)
		if k := poll(t, c); !strings.Contains(strings.Join(k.lines(), "\n"), "hardware.ipmi.temperature node1-cpu1_temp_(0x1) 45.0 C") {
			t.Errorf("got %q, missing %q", k.lines(), k.missing)
		}
		if k := poll(t, c); k.missing != nil || c.Status().Health[healthQuarantined] != 0 {
			t.Errorf("missing %q, %+v", k.missing, c.Status())
		}
	})
}

// TestFaults: each way to fail costs that sensor only, and is told.
func TestFaults(t *testing.T) {
	for name, tc := range map[string]struct {
		fault bmctest.Fault
		want  string
	}{
		"silence":                     {bmctest.Silent, "failing: the BMC does not answer"},
		"an answer that is too short": {bmctest.Short, "failing: command 04h/2dh: the BMC's answer is malformed: 0 bytes, at least 2 are needed"},
		"no answer byte at all":       {bmctest.Empty, "failing: command 04h/2dh: the BMC's answer is malformed: it is empty"},
		"a claim not to be ready":     {bmctest.NotReady, "failing: the BMC refuses command 04h/2dh: it is initializing (d2h)"},
		"busy for ever":               {bmctest.Busy, "failing: the BMC refuses command 04h/2dh: busy (c0h)"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := rack()
				fake.Sensors[1].Fault = tc.fault
				k := poll(t, New(zap.NewNop(), options(fake)))
				if len(k.points) != 15 {
					t.Errorf("got %d points: %q", len(k.points), k.lines())
				}
				want := []string{"hardware.ipmi.temperature of node1-cpu1_temp_(0x1): " + tc.want, "hardware.ipmi.sensor.state of node1-cpu1_temp_(0x1): " + tc.want}
				if d := cmp.Diff(want, k.missing); d != "" {
					t.Errorf("(-want +got)\n%s", d)
				}
			})
		})
	}
}

// TestLongAnswers: what follows the bytes that are needed is no fault.
func TestLongAnswers(t *testing.T) {
	fake := rack()
	fake.Sensors[1].Fault = bmctest.Long
	if k := poll(t, New(zap.NewNop(), options(fake))); len(k.points) != 15 || k.missing != nil {
		t.Errorf("got %q, missing %q", k.lines(), k.missing)
	}
}

// TestGarbageOfASensor is that sensor's matter, whatever it is taken for.
func TestGarbageOfASensor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := rack()
		fake.Sensors[1].Fault = bmctest.Garbage
		c := New(zap.NewNop(), options(fake))
		for range 100 {
			others := 0
			for _, p := range poll(t, c).points {
				if p.Resource != "node1-cpu1_temp_(0x1)" {
					others++
				}
			}
			if others != 14 {
				t.Fatalf("%d readings of others", others)
			}
			time.Sleep(10 * time.Second)
		}
	})
}

// TestAbsent: a sensor that the BMC does not have is no gap, and neither is one
// that has no reading, unless it was read before.
func TestAbsent(t *testing.T) {
	fake := rack()
	fake.NoDCMI, fake.Node = true, nil
	fake.Sensors[1].Fault, fake.Sensors[0x20].Off = bmctest.Refuse, true
	c := New(zap.NewNop(), options(fake))
	k := poll(t, c)
	if k.missing != nil {
		t.Errorf("missing %q", k.missing)
	}
	if h := c.Status().Health; h[healthAbsent] != 2 || h[healthNoReading] != 1 {
		t.Errorf("got %v", h)
	}
	fake.Sensors[0x30].Unknown = true
	k = poll(t, c)
	want := []string{
		"hardware.ipmi.current of node1-psu1_current_(0x30): no reading: the BMC has no reading of it at present",
		"hardware.ipmi.sensor.state of node1-psu1_current_(0x30): no reading: the BMC has no reading of it at present",
	}
	if d := cmp.Diff(want, k.missing); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

// TestNodeManagerComesLater than the BMC, which starts before it.
func TestNodeManagerComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := rack()
		fake.Node.Mute = true
		c := New(zap.NewNop(), options(fake))
		if k := poll(t, c); len(k.points) != 9 {
			t.Fatalf("got %q", k.lines())
		}
		fake.Node.Mute = false
		time.Sleep(nodeAgain + time.Second)
		if k := poll(t, c); len(k.points) != 15 || k.missing != nil {
			t.Errorf("got %q, missing %q", k.lines(), k.missing)
		}
		if k := poll(t, c); len(k.points) != 15 {
			t.Errorf("got %q", k.lines())
		}
	})
}

// TestSlowNodeManager costs no sensor anything: a driver without interrupts finds
// its answers after more than a second.
func TestSlowNodeManager(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := rack()
		fake.Latency, fake.Node.Latency = 2*time.Millisecond, 1300*time.Millisecond
		c := New(zap.NewNop(), options(fake))
		for n := range 10 {
			start := time.Now()
			k := poll(t, c)
			if len(k.points) != 15 || k.missing != nil {
				t.Fatalf("poll %d: got %q, missing %q", n, k.lines(), k.missing)
			}
			for _, p := range k.points[:9] {
				if late := p.At.Sub(start); n > 0 && late > time.Second {
					t.Errorf("poll %d: %s was read after %v", n, p.Resource, late)
				}
			}
			if took := time.Since(start); n > 0 && took > 10*time.Second {
				t.Errorf("poll %d took %v", n, took)
			}
			time.Sleep(time.Until(start.Add(10 * time.Second)))
		}
	})
}

// TestTheBMCHangs: it costs its own meters, no sensor is blamed, and it is
// left alone for ever longer until it answers again.
func TestTheBMCHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := rack()
		fake.Latency = 2 * time.Millisecond
		c := New(zap.NewNop(), options(fake))
		poll(t, c)
		fake.Fault = bmctest.Silent
		for range 20 {
			time.Sleep(10 * time.Second)
			var k kept
			start := time.Now()
			err := c.Poll(t.Context(), 10*time.Second, everything, &k)
			if err == nil || len(k.points) != 0 || len(k.missing) == 0 || !strings.HasPrefix(k.missing[0], "hardware.ipmi.temperature of *: ") {
				t.Fatalf("got %v, %q, missing %q", err, k.lines(), k.missing)
			}
			if took := time.Since(start); took > 9*time.Second {
				t.Errorf("it took %v", took)
			}
		}
		if s := c.Status(); s.Connected || !strings.Contains(s.Fault, "does not answer") {
			t.Errorf("got %+v", s)
		}
		fake.Fault = bmctest.None
		time.Sleep(againLast)
		if k := poll(t, c); len(k.points) < 15 || k.missing != nil {
			t.Errorf("got %q, missing %q", k.lines(), k.missing)
		}
		if s := c.Status(); !s.Connected || s.Fault != "" || s.Health[healthOK] == 0 || s.Health[healthFailing] != 0 {
			t.Errorf("got %+v", s)
		}
	})
}

// TestTheBMCRestarts while it is asked: it says itself that it is not ready.
func TestTheBMCRestarts(t *testing.T) {
	fake := rack()
	o := options(fake)
	tr := &initializing{Transport: &bmctest.Transport{BMC: fake}}
	o.Open = func(string) (bmc.Transport, error) { return tr, nil }
	c := New(zap.NewNop(), o)
	poll(t, c)
	tr.now = true
	var k kept
	if err := c.Poll(t.Context(), time.Second, everything, &k); bmc.Code(err) != bmc.CodeInitializing {
		t.Errorf("got %v", err)
	}
	if h := c.Status().Health; h[healthFailing]+h[healthQuarantined] != 0 {
		t.Errorf("sensors are blamed: %v", h)
	}
}

// initializing is a BMC that says that it initializes.
type initializing struct {
	bmc.Transport
	now bool
}

func (t *initializing) Send(ctx context.Context, r *bmc.Request, buf []byte) (int, error) {
	if t.now && r.NetFn != 6 && r.Cmd != 0x20 {
		buf[0] = bmc.CodeInitializing
		return 1, nil
	}
	return t.Transport.Send(ctx, r, buf)
}

// TestTheDeviceGoes and comes back, as when its module is loaded anew.
func TestTheDeviceGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := rack()
		o := options(fake)
		tr := &goner{Transport: &bmctest.Transport{BMC: fake}}
		o.Open = func(string) (bmc.Transport, error) { return tr, tr.open }
		c := New(zap.NewNop(), o)
		tr.open = errors.New("there is no /dev/ipmi0")
		k := poll(t, c)
		if s := c.Status(); k.points != nil || k.missing != nil || s.Fault != "there is no /dev/ipmi0" {
			t.Errorf("got %q, missing %q, %+v of a host without a BMC", k.lines(), k.missing, s)
		}
		tr.open = nil
		if k = poll(t, c); len(k.points) < 15 {
			t.Errorf("got %q of a BMC that came", k.lines())
		}
		tr.gone = true
		k = &kept{}
		if err := c.Poll(t.Context(), time.Second, everything, k); !errors.Is(err, bmc.ErrGone) || len(k.missing) == 0 {
			t.Errorf("got %v, missing %q of a device that is gone", err, k.missing)
		}
		tr.gone = false
		time.Sleep(againFirst)
		if k = poll(t, c); len(k.points) < 15 {
			t.Errorf("got %q of a BMC that came back", k.lines())
		}
	})
}

type goner struct {
	bmc.Transport
	open error
	gone bool
}

func (t *goner) Send(ctx context.Context, r *bmc.Request, buf []byte) (int, error) {
	if t.gone {
		return 0, fmt.Errorf("send to /dev/ipmi0: %w", bmc.ErrGone)
	}
	return t.Transport.Send(ctx, r, buf)
}

// TestWrongBMCs: each is one clear line.
func TestWrongBMCs(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(b *bmctest.BMC)
		want   string
	}{
		"of another version of IPMI": {func(b *bmctest.BMC) { b.IPMI = 0x03 }, "it speaks IPMI 3.0, of which this program knows 1.5 and 2.0"},
		"that talks nonsense":        {func(b *bmctest.BMC) { b.FaultOf[[2]byte{6, 1}] = bmctest.Short }, "the BMC's answer is malformed"},
		"that is being updated":      {func(b *bmctest.BMC) { b.Updating = true }, "the BMC's firmware is being updated"},
		"whose records go round":     {func(b *bmctest.BMC) { b.Loop = true }, "the records do not end"},
	} {
		t.Run(name, func(t *testing.T) {
			fake := rack()
			tc.change(fake)
			c := New(zap.NewNop(), options(fake))
			var k kept
			if err := c.Poll(t.Context(), time.Second, everything, &k); err == nil || k.points != nil || !strings.Contains(c.Status().Fault, tc.want) {
				t.Errorf("got %v, %q, %+v", err, k.lines(), c.Status())
			}
		})
	}
	fake := rack()
	fake.Records, fake.Sensors = nil, nil
	k := poll(t, New(zap.NewNop(), options(fake)))
	if got := k.lines(); len(got) != 8 || k.missing != nil {
		t.Errorf("got %q, missing %q of a BMC without sensors", got, k.missing)
	}
}

// TestCache: the records are walked once, until they change; what the file
// holds, if anything, can't break that.
func TestCache(t *testing.T) {
	fake := rack()
	o := options(fake)
	o.State = filepath.Join(t.TempDir(), "state", "ipmi.json")
	walked := func() int { return fake.Commands[[2]byte{0x0a, 0x23}] }
	fresh := func(want string) {
		t.Helper()
		if k := poll(t, New(zap.NewNop(), o)); !strings.Contains(strings.Join(k.lines(), "\n"), want) {
			t.Errorf("got %q, want one with %q", k.lines(), want)
		}
	}
	fresh("cpu1_temp")
	n := walked()
	fresh("cpu1_temp")
	if walked() != n {
		t.Error("the records were walked again though the file has them")
	}
	c := New(zap.NewNop(), o)
	poll(t, c)
	fake.Add(celsius(0x70, "New Temp"), bmctest.Sensor{Raw: 30})
	fake.Stamp++
	if k := poll(t, c); !strings.Contains(strings.Join(k.lines(), "\n"), "new_temp") || walked() == n {
		t.Errorf("got %q after the BMC got another sensor", k.lines())
	}
	for _, content := range []string{"", "{", `{"records":"AAAA"}`, `{"stamp":{"records":9},"records":"` + strings.Repeat("/", 4000) + `"}`} {
		if err := os.WriteFile(o.State, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		fresh("new_temp")
	}
	o.State = "/dev/null/ipmi.json" // can't be written
	fresh("new_temp")
}

// TestEventLog: what is logged after the first start is told once, over
// restarts and clearings of the log.
func TestEventLog(t *testing.T) {
	fake := rack()
	o := options(fake)
	o.State = filepath.Join(t.TempDir(), "ipmi.json")
	c := New(zap.NewNop(), o)
	expect := func(want ...string) {
		t.Helper()
		var got []string
		for _, p := range poll(t, c).points {
			if p.Samples[0].Meter == sample.IPMISELEvent.MeterRef {
				var m struct {
					Record        int
					Sensor, State string
					Asserted      bool
				}
				if err := json.Unmarshal(p.Metadata, &m); err != nil || p.Samples[0].Volume != sample.Uint(1) || p.Resource != "node1-sel-event" {
					t.Errorf("got %+v, %v", p, err)
				}
				got = append(got, fmt.Sprint(m.Record, m.Sensor, m.State, m.Asserted))
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
	}
	expect() // what was there before
	fake.Log(bmctest.Event(1700000100, 8, 0x50, 0x6f, 3, true))
	expect(fmt.Sprint(2, "PSU1 Status", "Power Supply AC lost", true))
	expect()
	restart := func() {
		t.Helper()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		c = New(zap.NewNop(), o)
	}
	restart()
	expect()
	fake.Log(bmctest.Event(1700000200, 8, 0x50, 0x6f, 3, false))
	restart()
	third := fmt.Sprint(3, "PSU1 Status", "Power Supply AC lost", false)
	expect(third)
	c = New(zap.NewNop(), o) // it was killed before the next poll
	expect(third)
	expect()
	c = New(zap.NewNop(), o) // and after it
	expect()
	fake.Log(bmctest.Event(1700000250, 8, 0x50, 0x6f, 3, true))
	if err := c.Poll(t.Context(), time.Second, func(m *sample.Meter) bool { return m == sample.IPMISELEntries }, &kept{}); err != nil {
		t.Fatal(err)
	}
	expect(fmt.Sprint(4, "PSU1 Status", "Power Supply AC lost", true)) // which that poll did not take
	fake.Entries, fake.Erased = nil, 5
	fake.Log(bmctest.Event(1700000300, 1, 1, 1, 9, true))
	expect(fmt.Sprint(1, "CPU1 Temp", "Upper Critical going high", true))
	for i := range 2 * maxEvents {
		fake.Log(bmctest.Event(1700000400+uint32(i), 1, 1, 1, 9, true))
	}
	told := 0
	for range 4 {
		for _, p := range poll(t, c).points {
			if p.Samples[0].Meter == sample.IPMISELEvent.MeterRef {
				told++
			}
		}
	}
	if told != 2*maxEvents {
		t.Errorf("%d of %d entries were told", told, 2*maxEvents)
	}
}

// TestChangesOfState: each is told once, whatever is polled between, over walks of
// the records and outages, and from the state that was told last.
func TestChangesOfState(t *testing.T) {
	fake := rack()
	c := New(zap.NewNop(), options(fake))
	expect := func(want ...string) {
		t.Helper()
		var got []string
		for _, l := range poll(t, c).lines() {
			if strings.HasPrefix(l, sample.IPMISensorEvent.Name+" ") {
				got = append(got, l)
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
	}
	set := func(number byte, states uint16) { fake.Sensors[number].States = states }
	fan := func(old, state string) string {
		return `hardware.ipmi.sensor.event node1-fan_1_(0x10) 1 event {"node":"node1","old_state":"` + old + `","sensor":"Fan 1 (0x10)","sensor_type":"Fan","state":"` + state + `"}`
	}
	expect() // what it is in from the start
	set(0x10, 1<<4)
	set(0x50, 0)
	expect(fan("nc", "cr"), `hardware.ipmi.sensor.event node1-psu1_status_(0x50) 1 event {"node":"node1","old_state":"Presence detected, Power Supply AC lost","sensor":"PSU1 Status (0x50)","sensor_type":"Power Supply","state":""}`)
	expect()
	fake.Stamp++ // the records are walked
	expect()
	set(0x10, 0)
	set(0x50, 1)
	var k kept
	for _, m := range []*sample.Meter{sample.IPMISensorState, sample.IPMISensorStates} {
		if err := c.Poll(t.Context(), time.Second, func(o *sample.Meter) bool { return o == m }, &k); err != nil {
			t.Fatal(err)
		}
	}
	fake.Stamp++
	expect(fan("cr", "ok"), `hardware.ipmi.sensor.event node1-psu1_status_(0x50) 1 event {"node":"node1","old_state":"","sensor":"PSU1 Status (0x50)","sensor_type":"Power Supply","state":"Presence detected"}`)
	expect()
}

// none takes everything and keeps nothing.
type none struct{ samples int }

func (n *none) Emit(p *Point)     { n.samples += len(p.Samples) }
func (*none) Miss(_, _, _ string) {}
func (*none) Flush()              {}
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkPoll is a poll of 300 sensors, of which 20 are in quarantine, by a
// transport in memory.
func BenchmarkPoll(b *testing.B) {
	fake := bmctest.New()
	for i := range 300 {
		f := bmctest.Full{Number: byte(i % 256), LUN: byte(i / 256), Name: fmt.Sprintf("Temp %d", i), Type: 1, Unit: 1, Factors: bmc.Factors{M: 1}}
		fake.Add(f.Record(), bmctest.Sensor{Raw: 40})
	}
	for i := 50; i < 250; i += 10 {
		fake.Sensors[byte(i)].Fault = bmctest.Refuse
	}
	c := New(zap.NewNop(), options(fake))
	ctx := b.Context()
	var n none
	if err := c.Poll(ctx, time.Minute, everything, &n); err != nil {
		b.Fatal(err)
	}
	n.samples = 0
	b.ReportAllocs()
	before := cpuTime(b)
	for b.Loop() {
		if err := c.Poll(ctx, time.Minute, everything, &n); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(n.samples)/float64(b.N), "samples/op")
}
