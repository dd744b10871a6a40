//go:build lab

package ipmi

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
	"github.com/kvmeter/kvmeter/test/ipmi/proto"
)

var folder string // of what the guests boot from

func TestMain(m *testing.M) {
	var err error
	if folder, err = os.MkdirTemp("", "kvmeter-ipmi-"); err != nil {
		panic(err)
	}
	code := m.Run()
	if err := os.RemoveAll(folder); err != nil {
		panic(err)
	}
	os.Exit(code)
}

// build builds, once, what all guests boot from.
var build = sync.OnceValues(func() (*Builder, error) {
	return NewBuilder(context.Background(), zap.NewNop(), folder)
})

// start boots a guest, which ends with the test.
func start(t *testing.T, name string, devices []string) *Guest {
	t.Helper()
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	g, err := b.Boot(context.WithoutCancel(t.Context()), name, devices...)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the guest has its device after %v", time.Since(began).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := g.End(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// external is a BMC behind a socket.
func external(where string) []string {
	return []string{
		"-chardev", "socket,id=bmc," + where + ",reconnect=1",
		"-device", "ipmi-bmc-extern,chardev=bmc,id=bmc0", "-device", "isa-ipmi-kcs,bmc=bmc0",
	}
}

// serve serves a fake BMC and returns what QEMU needs for it.
func serve(t *testing.T, fake *bmctest.BMC) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bmc")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_ = Serve(conn, fake) // it ends with the guest
	}()
	return external("path=" + path)
}

// run runs a program in the guest, which must succeed.
func run(t *testing.T, g *Guest, command string) string {
	t.Helper()
	r := try(t, g, proto.Command{Args: strings.Fields(command)})
	if r.Code != 0 {
		t.Fatalf("%s ended with %d:\n%s%s", command, r.Code, r.Out, r.Err)
	}
	return r.Out
}

func try(t *testing.T, g *Guest, c proto.Command) proto.Result {
	t.Helper()
	r, err := g.Run(c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v of\n%s", err, text)
	}
	return v
}

// sensor is one as kvmeter-agent ipmi -f json prints it.
type sensor struct {
	Name   string
	Number int
	Value  *float64
	Unit   string
	State  string
	States []string
	Error  string
}

func (s *sensor) text() string {
	switch {
	case s.Value != nil:
		return strconv.FormatFloat(*s.Value, 'f', -1, 64)
	case s.Error != "":
		return s.Error
	}
	return s.State + " " + strings.Join(s.States, ", ")
}

// compare compares kvmeter's reading of every sensor with ipmitool's and with the
// library's, value by value, and returns how many values were compared.
func compare(t *testing.T, g *Guest) (values int) {
	t.Helper()
	ours := decode[[]sensor](t, run(t, g, "kvmeter-agent ipmi -f json"))
	elist := table(run(t, g, "ipmitool sdr elist"))
	detail := table(run(t, g, "ipmitool sensor"))
	library := decode[struct {
		Sensors []struct {
			Name   string
			Number int
			Value  float64
			Valid  bool
		}
		Watts int
	}](t, run(t, g, "oracle"))
	if len(ours) == 0 {
		t.Fatal("no sensor was read")
	}
	states := map[string]string{"ok": "ok", "lnc": "nc", "unc": "nc", "lcr": "cr", "ucr": "cr", "lnr": "nr", "unr": "nr", "ns": "ns"}
	for _, s := range ours {
		short, long := elist[s.Name], detail[s.Name]
		if len(short) < 5 || short[1] != fmt.Sprintf("%02Xh", s.Number) {
			t.Errorf("%s: ipmitool sdr elist has %q", s.Name, short)
			continue
		}
		i := slices.IndexFunc(library.Sensors, func(l struct {
			Name   string
			Number int
			Value  float64
			Valid  bool
		},
		) bool {
			return l.Number == s.Number
		})
		switch {
		case s.Value != nil:
			values++
			number, unit, _ := strings.Cut(short[4], " ")
			if !same(number, *s.Value, true) || unit != s.Unit {
				t.Errorf("%s: got %s %s, ipmitool sdr elist prints %q", s.Name, s.text(), s.Unit, short[4])
			}
			if len(long) < 4 || !same(long[1], *s.Value, true) || long[2] != s.Unit || long[3] != s.State {
				t.Errorf("%s: got %s %s %s, ipmitool sensor prints %q", s.Name, s.text(), s.Unit, s.State, long)
			}
			if states[short[2]] != s.State {
				t.Errorf("%s: got %s, ipmitool sdr elist prints %q", s.Name, s.State, short[2])
			}
			// The library does not ask for the factors of sensors that are not linear.
			if i < 0 || s.Name != "Odd" && math.Abs(library.Sensors[i].Value-*s.Value) > 1e-9*math.Abs(*s.Value) {
				t.Errorf("%s: got %s, go-ipmi has %+v", s.Name, s.text(), library.Sensors)
			}
		case s.State == "ns":
			if short[2] != "ns" {
				t.Errorf("%s: got no reading, ipmitool sdr elist prints %q", s.Name, short)
			}
		case len(s.States) > 0:
			if short[4] != strings.Join(s.States, ", ") {
				t.Errorf("%s: got %q, ipmitool sdr elist prints %q", s.Name, s.States, short[4])
			}
		}
	}
	if want := len(elist); len(ours) != want {
		t.Errorf("%d sensors, ipmitool lists %d", len(ours), want)
	}
	return values
}

// table splits what ipmitool prints by its first column.
func table(text string) map[string][]string {
	rows := map[string][]string{}
	for line := range strings.Lines(text) {
		columns := strings.Split(line, "|")
		for i := range columns {
			columns[i] = strings.TrimSpace(columns[i])
		}
		// Event-only sensors and locators have no reading.
		if len(columns) > 4 && (columns[4] != "" && columns[4] != "Event-Only" && !strings.Contains(columns[4], "FRU") && !strings.Contains(columns[4], "MC") || len(columns) > 5) {
			rows[columns[0]] = columns
		}
	}
	return rows
}

// TestQEMU asks QEMU's own BMC, which has one sensor.
func TestQEMU(t *testing.T) {
	g := start(t, "qemu", []string{"-device", "ipmi-bmc-sim,id=bmc0", "-device", "isa-ipmi-kcs,bmc=bmc0"})
	ours := decode[[]sensor](t, run(t, g, "kvmeter-agent ipmi -f json"))
	if len(ours) != 1 || ours[0].Name != "Watchdog" || ours[0].Error != "" {
		t.Errorf("got %+v", ours)
	}
	golden(t, g, "qemu")
}

// TestSim asks OpenIPMI's BMC.
func TestSim(t *testing.T) {
	dir := t.TempDir()
	s, err := StartSim(context.WithoutCancel(t.Context()), dir, machine())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.End() })
	g := start(t, "sim", external(fmt.Sprintf("host=127.0.0.1,port=%d", s.Port)))
	if n := compare(t, g); n < 12 {
		t.Errorf("%d values were compared", n)
	}
	golden(t, g, "sim")
}

// golden compares ipmitool's dump of the records with the one that the unit
// tests of package bmc read.
func golden(t *testing.T, g *Guest, name string) {
	t.Helper()
	run(t, g, "ipmitool sdr dump /tmp/sdr")
	got := try(t, g, proto.Command{Args: []string{proto.ReadFile, "/tmp/sdr"}}).Data
	path := "../../collectors/ipmi/bmc/testdata/" + name + ".sdr"
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("ipmitool dumps\n% x\nand %s has\n% x", got, path, want)
	}
}

// TestFake asks the fake BMC, which has all that others lack, and then fails in
// every way.
func TestFake(t *testing.T) {
	fake := machine()
	g := start(t, "fake", serve(t, fake))
	t.Run("every value is ipmitool's", func(t *testing.T) {
		if n := compare(t, g); n != 14 {
			t.Errorf("%d values were compared", n)
		}
	})
	t.Run("generated sensors are, too", func(t *testing.T) { generatedInGuest(t, g, fake) })
	t.Run("power is", func(t *testing.T) { power(t, g, fake) })
	t.Run("the inventory is", func(t *testing.T) { inventory(t, g) })
	t.Run("the event log is", func(t *testing.T) { eventLog(t, g) })
	t.Run("who may not use the device is told so", func(t *testing.T) {
		r := try(t, g, proto.Command{Args: []string{"kvmeter-agent", "ipmi"}, UID: 65534})
		if want := "Error: open /dev/ipmi0: permission denied: let the agent's group use the device by a udev rule (docs/ipmi.md)\n"; r.Code == 0 || r.Err != want {
			t.Errorf("got %d, %q, want %q", r.Code, r.Err, want)
		}
	})
	t.Run("the agent samples it", func(t *testing.T) { samples(t, g) })
	t.Run("samples are Ceilometer's", func(t *testing.T) { ceilometer(t, g) })
	t.Run("samples are older Ceilometers'", func(t *testing.T) { ceilometer(t, g, "KVMETER_IPMI__SHAPE=older") })
	t.Run("each fault costs what it is about", func(t *testing.T) { faults(t, g, fake) })
}

func generatedInGuest(t *testing.T, g *Guest, fake *bmctest.BMC) {
	all, raws := generated()
	saved := fake.Records
	fake.Do(func() {
		fake.Records = nil
		for i := range 100 {
			x := i * len(all) / 100
			f := bmctest.Full{Number: byte(0x80 + i), Name: fmt.Sprintf("S%d", i), Type: 0x0b, Unit: 1, Factors: all[x]}
			fake.Add(f.Record(), bmctest.Sensor{Raw: raws[x]})
		}
		fake.Stamp++
	})
	ours := decode[[]sensor](t, run(t, g, "kvmeter-agent ipmi -f json"))
	printed := table(run(t, g, "ipmitool sensor")) // the other lists cut long numbers
	for _, s := range ours {
		number := printed[s.Name][1]
		value := 0.0
		if s.Value != nil {
			value = *s.Value
		}
		if !same(number, value, s.Value != nil) {
			t.Errorf("%s: got %s, ipmitool prints %q", s.Name, s.text(), number)
		}
	}
	if len(ours) != 100 {
		t.Errorf("%d sensors were read", len(ours))
	}
	fake.Do(func() {
		fake.Records = saved
		fake.Stamp++
	})
}

// meter is one as kvmeter-agent ipmi --power -f json prints it.
type meter struct {
	Name       string
	Current    int
	Statistics struct{ Minimum, Maximum, Average int }
}

func power(t *testing.T, g *Guest, fake *bmctest.BMC) {
	got := decode[struct {
		Chassis struct{ On bool }
		Meters  []meter
	}](t, run(t, g, "kvmeter-agent ipmi --power -f json"))
	have := map[string]meter{}
	for _, m := range got.Meters {
		have[m.Name] = m
	}
	said := run(t, g, "ipmitool dcmi power reading")
	for _, x := range []struct {
		label string
		value int
	}{
		{"Instantaneous power reading:", have["DCMI power"].Current},
		{"Minimum during sampling period:", have["DCMI power"].Statistics.Minimum},
		{"Maximum during sampling period:", have["DCMI power"].Statistics.Maximum},
		{"Average power reading over sample period:", have["DCMI power"].Statistics.Average},
	} {
		_, after, found := strings.Cut(said, x.label)
		if words := strings.Fields(after); !found || words[0] != strconv.Itoa(x.value) {
			t.Errorf("got %d, ipmitool prints\n%s", x.value, said)
		}
	}
	if l := decode[struct{ Watts int }](t, run(t, g, "oracle")); l.Watts != have["DCMI power"].Current {
		t.Errorf("got %d, go-ipmi has %d", have["DCMI power"].Current, l.Watts)
	}
	if words := run(t, g, "ipmitool chassis power status"); got.Chassis.On != strings.Contains(words, "is on") {
		t.Errorf("got %v, ipmitool prints %q", got.Chassis.On, words)
	}
	for name, mode := range map[string]string{
		"Node Manager power": "0x01", "Node Manager inlet temperature": "0x02", "Node Manager airflow": "0x04", "Node Manager outlet temperature": "0x05",
	} {
		b := hex(t, run(t, g, "ipmitool -b 6 -t 0x2c raw 0x2e 0xc8 0x57 0x01 0x00 "+mode+" 0x00 0x00"))
		if want := int(b[3]) | int(b[4])<<8; have[name].Current != want || want == 0 {
			t.Errorf("%s: got %d, ipmitool prints % x", name, have[name].Current, b)
		}
	}
	b := hex(t, run(t, g, "ipmitool -b 6 -t 0x2c raw 0x2e 0x65 0x57 0x01 0x00 0x01"))
	if want := int(b[3]) | int(b[4])<<8; have["CUPS index"].Current != want {
		t.Errorf("CUPS index: got %d, ipmitool prints % x", have["CUPS index"].Current, b)
	}
	b = hex(t, run(t, g, "ipmitool -b 6 -t 0x2c raw 0x2e 0x65 0x57 0x01 0x00 0x05"))
	for i, name := range []string{"CPU utilization", "memory utilization", "I/O utilization"} {
		if have[name].Current != int(b[3+8*i]) {
			t.Errorf("%s: got %d, ipmitool prints % x", name, have[name].Current, b)
		}
	}
	if have["Node Manager power"].Current != int(fake.Node.Watts) {
		t.Errorf("got %+v", got.Meters)
	}
}

// hex reads the bytes that ipmitool raw prints.
func hex(t *testing.T, text string) (b []byte) {
	t.Helper()
	for word := range strings.FieldsSeq(text) {
		n, err := strconv.ParseUint(word, 16, 8)
		if err != nil {
			t.Fatalf("%v of %q", err, text)
		}
		b = append(b, byte(n))
	}
	return b
}

func inventory(t *testing.T, g *Guest) {
	units := decode[[]struct {
		Fields []struct{ Name, Value string }
	}](t, run(t, g, "kvmeter-agent ipmi --fru -f json"))
	said := map[string]string{}
	for line := range strings.Lines(run(t, g, "ipmitool fru print 0")) {
		if name, value, found := strings.Cut(line, " : "); found {
			said[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
	}
	n := 0
	for _, f := range units[0].Fields {
		if f.Name == "Board Mfg Date" { // in another format
			continue
		}
		if n++; said[f.Name] != f.Value {
			t.Errorf("%s: got %q, ipmitool prints %q", f.Name, f.Value, said[f.Name])
		}
	}
	if n != 10 {
		t.Errorf("%d fields: %+v", n, units)
	}
}

func eventLog(t *testing.T, g *Guest) {
	ours := decode[[]struct {
		Record              int
		Time, Sensor, State string
		Type                string
		Asserted            bool
	}](t, run(t, g, "kvmeter-agent ipmi --sel -f json"))
	lines := strings.Split(strings.TrimSpace(run(t, g, "ipmitool sel elist")), "\n")
	if len(ours) != 3 || len(lines) != len(ours) {
		t.Fatalf("got %+v, ipmitool prints %q", ours, lines)
	}
	for i, e := range ours {
		at, err := time.Parse(time.RFC3339, e.Time)
		if err != nil {
			t.Fatal(err)
		}
		direction := "Deasserted"
		if e.Asserted {
			direction = "Asserted"
		}
		want := fmt.Sprintf("%x | %s UTC | %s %s | %s | %s", e.Record, at.Format("01/02/06 | 15:04:05"), e.Type, e.Sensor, e.State, direction)
		if !strings.HasPrefix(strings.TrimSpace(lines[i]), want) {
			t.Errorf("got %q, ipmitool prints %q", want, lines[i])
		}
	}
}

// dryRun are the samples of the agent, by resource and meter, and what it says.
func dryRun(t *testing.T, g *Guest) (map[string]float64, string) {
	t.Helper()
	got := map[string]float64{}
	all, said := collected(t, g)
	for _, s := range all {
		got[s.Resource+" "+s.Meter] = s.Volume
	}
	return got, said
}

// taken is a sample as --dry-run -f json prints it.
type taken struct {
	Meter    string
	Resource string `json:"resource_id"`
	Volume   float64
	Unit     string
	Metadata map[string]any
}

func collected(t *testing.T, g *Guest, settings ...string) (all []taken, said string) {
	t.Helper()
	r := try(t, g, proto.Command{
		Args: []string{"kvmeter-agent", "--dry-run", "-f", "json", "--without-bpf", "--config", "/dev/null"},
		Env:  append(settings, "KVMETER_LIBVIRT=off", "KVMETER_NODE=n"),
	})
	if r.Code != 0 {
		t.Fatalf("the agent ended with %d: %s", r.Code, r.Err)
	}
	for line := range strings.Lines(r.Out) {
		all = append(all, decode[taken](t, line))
	}
	return all, r.Err
}

// ceilometer compares the samples with those that Ceilometer makes of what
// ipmitool prints: blocks of "key : value", of which it takes the sensor's id,
// the first word of the reading and the last of its unit.
func ceilometer(t *testing.T, g *Guest, settings ...string) {
	all, _ := collected(t, g, settings...)
	n := 0
	for _, kind := range []string{"Temperature", "Current", "Fan", "Voltage"} {
		meter := "hardware.ipmi." + strings.ToLower(kind)
		expected := 0
		for block := range strings.SplitSeq(run(t, g, "ipmitool -v sdr type "+kind), "\n\n") {
			field := map[string]string{}
			for line := range strings.Lines(block) {
				if key, value, ok := strings.Cut(line, ":"); ok && !strings.Contains(value, ":") {
					field[strings.TrimSpace(key)] = strings.TrimSpace(value)
				}
			}
			id, reading := field["Sensor ID"], strings.Fields(field["Sensor Reading"])
			// Ceilometer has watts apart since it has a meter for them.
			if len(reading) < 2 || strings.Contains(id, "Pwr Consumption") && settings == nil {
				continue
			}
			if _, err := strconv.ParseFloat(reading[0], 64); err != nil {
				continue // no reading
			}
			unit := reading[len(reading)-1]
			if short := map[string]string{"Watts": "W", "Volts": "V"}[unit]; short != "" {
				unit = short
			}
			resource := "n-" + strings.ReplaceAll(strings.ToLower(id), " ", "_")
			i := slices.IndexFunc(all, func(s taken) bool { return s.Meter == meter && s.Resource == resource })
			expected++
			if i < 0 || !same(reading[0], all[i].Volume, true) || all[i].Unit != unit || all[i].Metadata["node"] != "n" {
				t.Errorf("%s of %s: ipmitool prints %q, got %+v", meter, resource, reading, all)
				continue
			}
			if top := field["Normal Maximum"]; kind == "Fan" && top != "" && all[i].Metadata["maximum_rpm"] != top {
				t.Errorf("%s of %s: maximum_rpm is %q, got %+v", meter, resource, top, all[i])
			}
			n++
		}
		got := 0
		for _, s := range all {
			if s.Meter == meter {
				got++
			}
		}
		if got != expected {
			t.Errorf("%d samples of %s, Ceilometer makes %d", got, meter, expected)
		}
	}
	if n < 10 {
		t.Errorf("%d samples were compared", n)
	}
}

func samples(t *testing.T, g *Guest) {
	got, said := dryRun(t, g)
	for key, want := range map[string]float64{
		"n-cpu2_temp_(0x2) hardware.ipmi.temperature": -5, "n-cpu2_temp_(0x2) hardware.ipmi.sensor.state": 3, "n-fan_1_(0x10) hardware.ipmi.fan": 4000,
		"n-p3v3_(0x21) hardware.ipmi.voltage": 3.2492, "n-psu1_current_(0x30) hardware.ipmi.current": 2.5, "n-pwr_consumption_(0x31) hardware.ipmi.power": 308,
		"n-psu1_status_(0x50) hardware.ipmi.sensor.states": 9, "n hardware.ipmi.dcmi.power": 312, "n hardware.ipmi.node.power": 301, "n hardware.ipmi.node.cpu_util": 12,
		"n-chassis hardware.ipmi.chassis.power": 1, "n-sel hardware.ipmi.sel.entries": 3,
	} {
		if v, found := got[key]; !found || v != want {
			t.Errorf("%s: got %v, want %v", key, v, want)
		}
	}
	if strings.Contains(said, "Missing") {
		t.Errorf("it says %s", said)
	}
}

// faults has one sensor, and then all of the BMC, fail in every way.
func faults(t *testing.T, g *Guest, fake *bmctest.BMC) {
	for _, tc := range []struct {
		name  string
		fault bmctest.Fault
		want  string
	}{
		{"silence", bmctest.Silent, "the BMC does not answer"},
		{"no byte at all", bmctest.Empty, "the BMC does not answer"},
		{"too short an answer", bmctest.Short, "the BMC's answer is malformed"},
		{"busy", bmctest.Busy, "busy (c0h)"},
	} {
		fake.Do(func() { fake.Sensors[1].Fault = tc.fault })
		settle(t, g)
		got, said := dryRun(t, g)
		_, there := got["n-cpu1_temp_(0x1) hardware.ipmi.temperature"]
		if there || got["n-fan_1_(0x10) hardware.ipmi.fan"] != 4000 || got["n hardware.ipmi.dcmi.power"] != 312 || got["n hardware.ipmi.node.power"] != 301 {
			t.Errorf("%s of a sensor: got %v", tc.name, got)
		}
		if want := "Missing: hardware.ipmi.temperature of n-cpu1_temp_(0x1): failing: "; !strings.Contains(said, want) || !strings.Contains(said, tc.want) {
			t.Errorf("%s of a sensor: it says %s", tc.name, said)
		}
	}
	fake.Do(func() { fake.Sensors[1].Fault = bmctest.None })
	settle(t, g)
	for name, tc := range map[string]struct {
		change func()
		want   string
	}{
		"reservations are lost again and again": {func() { fake.LoseEvery = 5; fake.Stamp++ }, ""},
		"only 8 bytes go at once":               {func() { fake.MaxPart = 8; fake.Stamp++ }, ""},
		"its records go round":                  {func() { fake.Loop = true; fake.Stamp++ }, "the records do not end"},
		"it is another version's":               {func() { fake.IPMI = 0x03 }, "it speaks IPMI 3.0"},
		"it is busy":                            {func() { fake.Fault = bmctest.Busy }, "busy"},
		"it answers garbage":                    {func() { fake.Fault = bmctest.Garbage }, "hardware.ipmi.* cannot be collected"},
		"it falls silent":                       {func() { fake.Fault = bmctest.Silent }, "the BMC does not answer"},
	} {
		fake.Do(tc.change)
		got, said := dryRun(t, g)
		if tc.want == "" && (got["n-fan_1_(0x10) hardware.ipmi.fan"] != 4000 || strings.Contains(said, "Missing")) || !strings.Contains(said, tc.want) {
			t.Errorf("%s: got %v, it says %s", name, got, said)
		}
		fake.Do(func() {
			fake.LoseEvery, fake.MaxPart, fake.Loop, fake.IPMI, fake.Fault = 0, 0, false, 0x02, bmctest.None
			fake.Stamp++
		})
		settle(t, g)
	}
}

// settle waits until the driver has given up what was not answered.
func settle(t *testing.T, g *Guest) {
	t.Helper()
	for begin := time.Now(); ; {
		r := try(t, g, proto.Command{Args: []string{"kvmeter-agent", "ipmi", "--sel", "--timeout", "10s"}})
		if r.Code == 0 {
			return
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("the BMC is not read again: %s", r.Err)
		}
	}
}
