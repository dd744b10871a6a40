package bmc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

func open(fake *bmctest.BMC) *bmc.BMC {
	b := bmc.New(&bmctest.Transport{BMC: fake})
	b.Timeout = 20 * time.Millisecond
	return b
}

// celsius is a temperature sensor of so many degrees.
func celsius(number byte, name string) []byte {
	return bmctest.Full{Number: number, Name: name, Type: bmc.TypeTemperature, Unit: 1, Factors: bmc.Factors{M: 1, Format: bmc.TwosComplement}}.Record()
}

func rack() *bmctest.BMC {
	b := bmctest.New()
	b.Add(celsius(1, "CPU1 Temp"), bmctest.Sensor{Raw: 45, Thresholds: [7]byte{0x18, 0, 0, 0, 80, 90, 0}})
	b.Add(celsius(2, "CPU2 Temp"), bmctest.Sensor{Raw: 0xfb, States: 1 << 1})
	b.Add(bmctest.Compact(3, "PSU1 Status", 0x08, 0x6f), bmctest.Sensor{States: 0x80<<8 | 3})
	b.Add(bmctest.EventOnly(4, "Watchdog", 0x23, 0x6f), bmctest.Sensor{})
	b.Add(bmctest.FRU(0, "Mainboard"), bmctest.Sensor{})
	b.Add(bmctest.Controller(0x2c, 6, "ME"), bmctest.Sensor{})
	b.Add(bmctest.NodeManager(0x2c, 6), bmctest.Sensor{})
	b.Node = &bmctest.Me{Addr: 0x2c, Channel: 6, Version: 5, Watts: 301, Inlet: 24, Outlet: 38, Airflow: 61, CUPS: 42, Busy: bmc.Utilization{CPU: 12, Memory: 34, IO: 5}}
	b.Inventory[0] = bmctest.Inventory("ACME", "Roadrunner", "SN-42")
	b.Log(bmctest.Event(1700000000, 0x01, 1, 0x01, 9, true))
	return b
}

func read(t *testing.T, b *bmc.BMC) ([]byte, bmc.Records) {
	t.Helper()
	d, err := b.DeviceID(t.Context(), bmc.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	raw, _, err := b.ReadRecords(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	all, err := bmc.Parse(raw)
	if err != nil || len(all.Faults) > 0 {
		t.Fatalf("got %v, %q", err, all.Faults)
	}
	return raw, all
}

func TestDeviceID(t *testing.T) {
	b := open(rack())
	got, err := b.DeviceID(t.Context(), bmc.Addr{})
	want := bmc.Device{ID: 0x20, Revision: 1, Firmware: "2.34", IPMI: "2.0", Support: 0xbf, Manufacturer: bmc.IntelManufacturer, Product: 0x49}
	if err != nil || got != want {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	fake := rack()
	fake.IPMI = 0x09
	if _, err := open(fake).DeviceID(t.Context(), bmc.Addr{}); !errors.Is(err, bmc.ErrReply) || !strings.Contains(err.Error(), "speaks IPMI 9.0") {
		t.Errorf("got %v of a BMC of another version", err)
	}
}

func TestWalkReadsWhatTheBMCHas(t *testing.T) {
	for name, change := range map[string]func(b *bmctest.BMC){
		"of a BMC that returns whole records":  func(*bmctest.BMC) {},
		"of one that returns at most 16 bytes": func(b *bmctest.BMC) { b.MaxPart = 16 },
		"of one that returns at most 8 bytes":  func(b *bmctest.BMC) { b.MaxPart = 8 },
		"though reservations are lost":         func(b *bmctest.BMC) { b.LoseEvery = 7 },
		"of one that has device records":       func(b *bmctest.BMC) { b.Device = true },
	} {
		t.Run(name, func(t *testing.T) {
			fake := rack()
			change(fake)
			raw, _ := read(t, open(fake))
			if !bytes.Equal(raw, fake.Raw()) {
				t.Errorf("got\n% x\nwant\n% x", raw, fake.Raw())
			}
		})
	}
}

func TestWalkGivesUp(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(b *bmctest.BMC)
		want   string
	}{
		"where there is no record":             {func(b *bmctest.BMC) { b.Records = nil }, bmc.ErrNoSDR.Error()},
		"on records that go round":             {func(b *bmctest.BMC) { b.Loop = true }, "do not end"},
		"on records that change all the time":  {func(b *bmctest.BMC) { b.Grow = true }, "go on changing"},
		"where every reservation is lost":      {func(b *bmctest.BMC) { b.LoseEvery = 2 }, "reservation is lost"},
		"on a BMC that falls silent":           {func(b *bmctest.BMC) { b.FaultOf[[2]byte{0x0a, 0x23}] = bmctest.Silent }, bmc.ErrTimeout.Error()},
		"on answers that are too short":        {func(b *bmctest.BMC) { b.FaultOf[[2]byte{0x0a, 0x23}] = bmctest.Short }, bmc.ErrReply.Error()},
		"on answers that are too long":         {func(b *bmctest.BMC) { b.FaultOf[[2]byte{0x0a, 0x23}] = bmctest.Long }, bmc.ErrReply.Error()},
		"on answers without a completion code": {func(b *bmctest.BMC) { b.FaultOf[[2]byte{0x0a, 0x20}] = bmctest.Empty }, "it is empty"},
		"on a BMC that stays busy":             {func(b *bmctest.BMC) { b.FaultOf[[2]byte{0x0a, 0x22}] = bmctest.Busy }, "busy"},
	} {
		t.Run(name, func(t *testing.T) {
			fake := rack()
			tc.change(fake)
			b := open(fake)
			d, err := b.DeviceID(t.Context(), bmc.Addr{})
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := b.ReadRecords(t.Context(), d); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// TestGarbage gives every decoder random answers: nothing may panic or hang.
func TestGarbage(t *testing.T) {
	fake := rack()
	b := open(fake)
	_, all := read(t, b)
	fake.Fault = bmctest.Garbage
	ctx := t.Context()
	node := &bmc.NodeManager{Addr: bmc.Addr{Slave: 0x2c, Channel: 6}, Version: 5}
	refused := 0
	for range 300 {
		d, err := b.DeviceID(ctx, bmc.Addr{})
		if err != nil {
			refused++
		}
		_, _, _ = b.ReadRecords(ctx, d)
		for i := range all.Sensors {
			_, _ = b.Read(ctx, &all.Sensors[i])
			_, _ = b.Thresholds(ctx, &all.Sensors[i])
		}
		_, _ = b.SEL(ctx)
		_, _ = b.Events(ctx, bmc.Event{}, func(bmc.Event) bool { return true })
		_, _ = b.FRU(ctx, all.FRUs[0])
		_, _ = b.Chassis(ctx)
		_, _ = b.DCMIPower(ctx)
		_, _ = b.NodeManagerStatistics(ctx, node, bmc.NMPower)
		_, _ = b.CUPSIndex(ctx, node)
		_, _ = b.CUPSUtilization(ctx, node)
	}
	if refused == 0 {
		t.Error("no answer of random bytes was refused")
	}
}

func TestReadings(t *testing.T) {
	fake := rack()
	b := open(fake)
	_, all := read(t, b)
	if len(all.Sensors) != 4 || len(all.FRUs) != 1 || len(all.Controllers) != 1 || len(all.OEM) != 1 {
		t.Fatalf("got %+v", all)
	}
	one := func(i int) string {
		s := &all.Sensors[i]
		r, err := b.Read(t.Context(), s)
		return fmt.Sprintf("%s %v %v %v%v %s %q %v", s.Name, r.Value, r.Valid, r.Off, r.Unknown, r.Level(), bmc.StateNames(s, r.States), err)
	}
	check := func(i int, want string) {
		t.Helper()
		if got := one(i); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	check(0, `CPU1 Temp 45 true falsefalse ok [] <nil>`)
	check(1, `CPU2 Temp -5 true falsefalse cr ["Lower Non-critical going high"] <nil>`)
	check(2, `PSU1 Status 0 false falsefalse cr ["Presence detected" "Failure detected"] <nil>`)
	fake.Sensors[1].Off = true
	check(0, `CPU1 Temp 0 false truefalse ok [] <nil>`)
	fake.Sensors[1].Off, fake.Sensors[1].Unknown = false, true
	check(0, `CPU1 Temp 0 false falsetrue ok [] <nil>`)
	if all.Sensors[3].Readable() {
		t.Error("a sensor that only has events is taken for readable")
	}
	th, err := b.Thresholds(t.Context(), &all.Sensors[0])
	if err != nil || th.UpperCritical == nil || *th.UpperCritical != 90 || *th.UpperNonCritical != 80 || th.LowerCritical != nil {
		t.Errorf("got thresholds %+v, %v", th, err)
	}
	delete(fake.Sensors, 1)
	if _, err := b.Read(t.Context(), &all.Sensors[0]); !bmc.Lacks(err) {
		t.Errorf("got %v of a sensor that is gone", err)
	}
}

// TestBusy: a BMC that is busy for a moment costs a moment only.
func TestBusy(t *testing.T) {
	fake := rack()
	b := open(fake)
	_, all := read(t, b)
	fake.Sensors[1].Fault = bmctest.Busy
	go func() {
		time.Sleep(30 * time.Millisecond)
		fake.Do(func() { fake.Sensors[1].Fault = bmctest.None })
	}()
	if r, err := b.Read(t.Context(), &all.Sensors[0]); err != nil || r.Value != 45 || b.Busy == 0 {
		t.Errorf("got %+v, %v, busy %d times", r, err, b.Busy)
	}
}

// TestNonLinear: such a sensor's factors are asked for with its reading.
func TestNonLinear(t *testing.T) {
	fake := bmctest.New()
	fake.Add(bmctest.Full{Number: 9, Name: "Odd", Type: bmc.TypeFan, Unit: 18, Factors: bmc.Factors{M: 1, Linearization: 0x70}}.Record(), bmctest.Sensor{
		Raw: 10, Factors: map[byte][6]byte{10: bmctest.FactorBytes(bmc.Factors{M: 25, B: -3, BExp: 1})},
	})
	b := open(fake)
	_, all := read(t, b)
	if r, err := b.Read(t.Context(), &all.Sensors[0]); err != nil || r.Value != 220 {
		t.Errorf("got %+v, %v, want 25·10 − 3·10¹ = 220", r, err)
	}
}

func TestConvert(t *testing.T) {
	for name, tc := range map[string]struct {
		f    bmc.Factors
		raw  byte
		want float64
	}{
		"linear":                         {bmc.Factors{M: 65, RExp: -3}, 0xb8, 11.96},
		"an offset with an exponent":     {bmc.Factors{M: 156, B: 200, RExp: -4}, 0xcf, 3.2492},
		"a negative B, K1 of its own":    {bmc.Factors{M: 64, B: -512, BExp: 1, RExp: -3}, 0x40, -1.024},
		"a negative K1":                  {bmc.Factors{M: 2, B: 5, BExp: -1}, 7, 14.5},
		"ones' complement":               {bmc.Factors{M: 1, Format: bmc.OnesComplement}, 0xfe, -1},
		"ones' complement, negative 0":   {bmc.Factors{M: 1, Format: bmc.OnesComplement}, 0xff, 0},
		"two's complement":               {bmc.Factors{M: 1, Format: bmc.TwosComplement}, 0xfb, -5},
		"a negative M":                   {bmc.Factors{M: -3}, 4, -12},
		"1/x":                            {bmc.Factors{M: 1, Linearization: bmc.Inverse}, 4, 0.25},
		"ln":                             {bmc.Factors{M: 1, Linearization: bmc.Ln}, 10, math.Log(10)},
		"log10":                          {bmc.Factors{M: 1, Linearization: bmc.Log10}, 100, 2},
		"log2":                           {bmc.Factors{M: 1, Linearization: bmc.Log2}, 8, 3},
		"e":                              {bmc.Factors{M: 1, Linearization: bmc.E}, 2, math.Exp(2)},
		"exp10":                          {bmc.Factors{M: 1, Linearization: bmc.Exp10}, 3, 1000},
		"exp2":                           {bmc.Factors{M: 1, Linearization: bmc.Exp2}, 5, 32},
		"x²":                             {bmc.Factors{M: 1, Linearization: bmc.Square}, 12, 144},
		"x³":                             {bmc.Factors{M: 1, Linearization: bmc.Cube}, 3, 27},
		"√x":                             {bmc.Factors{M: 1, Linearization: bmc.SquareRoot}, 144, 12},
		"∛x":                             {bmc.Factors{M: 1, Linearization: bmc.CubeRoot}, 27, 3},
		"1/0 has no value":               {bmc.Factors{M: 1, Linearization: bmc.Inverse}, 0, math.NaN()},
		"ln 0 has no value":              {bmc.Factors{M: 1, Linearization: bmc.Ln}, 0, math.NaN()},
		"√−1 has no value":               {bmc.Factors{M: -1, Linearization: bmc.SquareRoot}, 1, math.NaN()},
		"what is not analog has none":    {bmc.Factors{M: 1, Format: bmc.NotAnalog}, 5, math.NaN()},
		"the largest numbers don't wrap": {bmc.Factors{M: -512, B: -512, BExp: -8, RExp: 7}, 255, (-512*255 - 512e-8) * 1e7},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := tc.f.Convert(tc.raw)
			if ok == math.IsNaN(tc.want) || ok && math.Abs(got-tc.want) > math.Abs(tc.want)*1e-15 {
				t.Errorf("got %v, %v, want %v", got, ok, tc.want)
			}
		})
	}
}

func TestUnits(t *testing.T) {
	for want, u := range map[[2]string]bmc.Units{
		{"degrees C", "C"}:                             {Base: 1},
		{"Volts", "V"}:                                 {Base: 4},
		{"Amps", "Amps"}:                               {Base: 5},
		{"Watts", "W"}:                                 {Base: 6},
		{"RPM", "RPM"}:                                 {Base: 18},
		{"percent", "percent"}:                         {Flags: 1},
		{"unspecified", "unspecified"}:                 {},
		{"unspecified", "unspecified"}:                 {Base: 200},
		{"megabyte/second", "megabyte/second"}:         {Flags: 1 << 1, Base: 72, Modifier: 22},
		{"Watts * hour", "Watts * hour"}:               {Flags: 2 << 1, Base: 6, Modifier: 24},
		{"packets per min", "packets per min"}:         {Flags: 4 << 3, Base: 85},
		{"uncorrectable error", "uncorrectable error"}: {Base: 90},
	} {
		if got := [2]string{u.String(), u.Short()}; got != want {
			t.Errorf("%+v: got %q, want %q", u, got, want)
		}
	}
}

func TestEvents(t *testing.T) {
	fake := rack()
	b := open(fake)
	_, all := read(t, b)
	ctx := t.Context()
	var got []string
	tell := func(e bmc.Event) bool {
		got = append(got, fmt.Sprintf("%d %s %s %s %v", e.Record, e.When(), all.SensorName(&e), e.State(), e.Asserted))
		return true
	}
	expect := func(want ...string) {
		t.Helper()
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
		got = nil
	}
	last, err := b.Events(ctx, bmc.Event{}, tell)
	if err != nil {
		t.Fatal(err)
	}
	expect("1 2023-11-14T22:13:20Z CPU1 Temp Upper Critical going high true")
	if last, err = b.Events(ctx, last, tell); err != nil {
		t.Fatal(err)
	}
	expect()
	fake.Log(bmctest.Event(90, 0x01, 1, 0x01, 9, false))
	fake.Log([16]byte{2: 0xc1, 3: 1, 6: 0x40, 7: 0xaa})
	fake.Log([16]byte{2: 0xe0, 3: 0xbb})
	if last, err = b.Events(ctx, last, tell); err != nil {
		t.Fatal(err)
	}
	expect("2 start + 1m30s CPU1 Temp Upper Critical going high false",
		"3 2004-01-10T13:37:05Z  OEM aa 00 00 00 00 00 00 00 00 false",
		"4   OEM bb 00 00 00 00 00 00 00 00 00 00 00 00 false")
	// The log is cleared, and another entry has the number now.
	fake.Entries = nil
	fake.Log(bmctest.Event(1800000000, 0x08, 3, 0x6f, 1, true))
	if last, err = b.Events(ctx, last, tell); err != nil {
		t.Fatal(err)
	}
	expect("1 2027-01-15T08:00:00Z PSU1 Status Failure detected true")
	fake.Entries = nil
	if last, err = b.Events(ctx, last, tell); err != nil || last.Record != 0 {
		t.Fatalf("got %+v, %v of an empty log", last, err)
	}
	expect()
	info, err := b.SEL(ctx)
	if err != nil || info.Entries != 0 || info.Free != 16*512 {
		t.Errorf("got %+v, %v", info, err)
	}
}

func TestFRU(t *testing.T) {
	fake := rack()
	b := open(fake)
	_, all := read(t, b)
	got, err := b.FRU(t.Context(), all.FRUs[0])
	if err != nil {
		t.Fatal(err)
	}
	want := bmc.FRU{Name: "Mainboard", Fields: []bmc.FRUField{
		{"Board Mfg Date", "2017-12-11 15:28 UTC"},
		{"Board Mfg", "ACME"},
		{"Board Product", "Roadrunner board"},
		{"Board Serial", "SN-42"},
		{"Board Part Number", "PN-1"},
		{"Product Manufacturer", "ACME"},
		{"Product Name", "Roadrunner"},
		{"Product Part Number", "PN-2"},
		{"Product Version", "v3"},
		{"Product Serial", "SN-42"},
		{"Product Asset Tag", "asset-7"},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	fake.Inventory[0][20] ^= 0xff
	got, err = b.FRU(t.Context(), all.FRUs[0])
	if err != nil || len(got.Faults) != 1 || !strings.Contains(got.Faults[0], "Board area has a wrong checksum") || len(got.Fields) != 6 {
		t.Errorf("got %+v, %v of a broken board area", got, err)
	}
}

func TestChassisAndPower(t *testing.T) {
	fake := rack()
	fake.Trouble = 1<<3 | 1<<0
	b := open(fake)
	_, all := read(t, b)
	ctx := t.Context()
	c, err := b.Chassis(ctx)
	if err != nil || !c.On || fmt.Sprint(c.Faults) != "[intrusion cooling fault]" {
		t.Errorf("got %+v, %v", c, err)
	}
	s, err := b.DCMIPower(ctx)
	if want := (bmc.Statistics{Current: 312, Minimum: 273, Maximum: 390, Average: 311, Time: 1700000000, Period: time.Second, Active: true}); err != nil || s != want {
		t.Errorf("got %+v, %v, want %+v", s, err, want)
	}
	n, err := b.FindNodeManager(ctx, &all)
	if err != nil || n.Version != 5 || n.Addr != (bmc.Addr{Slave: 0x2c, Channel: 6}) {
		t.Fatalf("got %+v, %v", n, err)
	}
	for m, want := range map[bmc.Measurement]uint16{bmc.NMPower: 301, bmc.NMInlet: 24, bmc.NMOutlet: 38, bmc.NMAirflow: 61} {
		if s, err := b.NodeManagerStatistics(ctx, n, m); err != nil || s.Current != want || s.Period != time.Hour || !s.Active {
			t.Errorf("got %+v, %v, want %d", s, err, want)
		}
	}
	if v, err := b.CUPSIndex(ctx, n); err != nil || v != 42 {
		t.Errorf("got %d, %v", v, err)
	}
	if v, err := b.CUPSUtilization(ctx, n); err != nil || v != fake.Node.Busy {
		t.Errorf("got %+v, %v", v, err)
	}
	fake.Node.Version = 3
	if n, err = b.FindNodeManager(ctx, &all); err != nil || n.Has(bmc.NMOutlet) || !n.Has(bmc.NMInlet) || n.HasCUPS() {
		t.Errorf("got %+v, %v of Node Manager 2.0", n, err)
	}
	if _, err := b.FindNodeManager(ctx, &bmc.Records{}); !errors.Is(err, bmc.ErrNoNodeManager) {
		t.Errorf("got %v where no record tells of it", err)
	}
	fake.NoDCMI = true
	if _, err := b.DCMIPower(ctx); !bmc.Lacks(err) {
		t.Errorf("got %v of a BMC without DCMI", err)
	}
}

// fixed answers everything with the same bytes.
type fixed []byte

func (f fixed) Send(_ context.Context, _ *bmc.Request, buf []byte) (int, error) {
	return copy(buf, f), nil
}
func (fixed) Close() error { return nil }

// TestNodeManagerAnswer reads an answer that a vendor prints in its manual.
func TestNodeManagerAnswer(t *testing.T) {
	b := bmc.New(fixed{0, 0x57, 1, 0, 0x38, 0, 4, 0, 0x41, 0, 0x39, 0, 0xec, 0x56, 0xf7, 0x53, 0x5a, 0x86, 0, 0, 0x50})
	got, err := b.NodeManagerStatistics(t.Context(), &bmc.NodeManager{Version: 5}, bmc.NMPower)
	want := bmc.Statistics{Current: 56, Minimum: 4, Maximum: 65, Average: 57, Time: 0x53f756ec, Period: 34394 * time.Second, Active: true}
	if err != nil || got != want {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
}

func TestSharedRecords(t *testing.T) {
	r := bmctest.Compact(0x40, "DIMM ", 0x0c, 0x6f)
	r[23], r[24] = 0x10|3, 0x80|1 // three sensors, named from B on, each of its own entity
	all, err := bmc.Parse(r)
	if err != nil || len(all.Sensors) != 3 {
		t.Fatalf("got %+v, %v", all, err)
	}
	for i, want := range []string{"40 DIMMB 1", "41 DIMMC 2", "42 DIMMD 3"} {
		s := all.Sensors[i]
		if got := fmt.Sprintf("%x %s %d", s.Number, s.Name, s.Instance); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestNames(t *testing.T) {
	for name, tc := range map[string]struct {
		head byte
		text []byte
		want string
	}{
		"Latin-1":            {0xc0, []byte("Temp \xb0C"), "Temp °C"},
		"BCD plus":           {0x40, []byte{0x12, 0xab, 0x3d}, "12 -3:"},
		"packed six bits":    {0x80, []byte{0x29, 0xdc, 0xa6}, "IPMI"}, // §43.15's own example
		"unicode's low half": {0x00, []byte("A\x00B\x00"), "AB"},
		"no name":            {0xc0, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := bmctest.EventOnly(1, "", 1, 1)
			r = append(r[:16], append([]byte{tc.head | byte(len(tc.text))}, tc.text...)...)
			r[4] = byte(len(r) - 5)
			all, err := bmc.Parse(r)
			if err != nil || len(all.Sensors) != 1 || all.Sensors[0].Name != tc.want {
				t.Errorf("got %+v, %v, want %q", all, err, tc.want)
			}
		})
	}
}

func TestParseKeepsTheRest(t *testing.T) {
	good := celsius(1, "Good")
	short := celsius(2, "Short")
	short = short[:40]
	short[4] = 35
	long := celsius(3, "Long")
	long[47] = 0xc0 | 31
	all, err := bmc.Parse(bytes.Join([][]byte{good, short, long, good}, nil))
	if err != nil || len(all.Sensors) != 2 || len(all.Faults) != 2 {
		t.Errorf("got %+v, %v", all, err)
	}
	if all, err = bmc.Parse(append(bytes.Clone(good), good[:20]...)); err == nil || len(all.Sensors) != 1 {
		t.Errorf("got %+v, %v of records that are cut off", all, err)
	}
}

func TestErrorsOfTheDevice(t *testing.T) {
	dir := t.TempDir()
	if _, err := bmc.Open(dir + "/ipmi0"); err == nil || !strings.Contains(err.Error(), "ipmi_devintf") {
		t.Errorf("got %v where there is no device", err)
	}
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bmc.Open(dir + "/file"); err == nil || !strings.Contains(err.Error(), "is no IPMI device") {
		t.Errorf("got %v of a file", err)
	}
	if os.Getuid() != 0 {
		if _, err := bmc.Open("/dev/mem"); err == nil || !strings.Contains(err.Error(), "docs/ipmi.md") {
			t.Errorf("got %v without permission", err)
		}
	}
}

// TestSensorsOfOthers are asked for at their owner's address.
func TestSensorsOfOthers(t *testing.T) {
	r := celsius(9, "Riser Temp")
	r[5], r[6] = 0x24, 0x71 // address, channel and LUN
	all, err := bmc.Parse(r)
	if err != nil || len(all.Sensors) != 1 {
		t.Fatalf("got %+v, %v", all, err)
	}
	asked := &addressed{}
	v, err := bmc.New(asked).Read(t.Context(), &all.Sensors[0])
	if want := (bmc.Addr{Slave: 0x24, Channel: 7, LUN: 1}); err != nil || v.Value != 33 || asked.to != want || want.IsBMC() {
		t.Errorf("got %+v, %v, asked at %+v", v, err, asked.to)
	}
	r[5] = 0x41 // owned by software
	if all, err = bmc.Parse(r); err != nil || all.Sensors[0].Readable() {
		t.Errorf("got %+v, %v of a sensor that software owns", all, err)
	}
}

// addressed answers every reading with 33 and keeps whom it was asked of.
type addressed struct{ to bmc.Addr }

func (a *addressed) Send(_ context.Context, r *bmc.Request, buf []byte) (int, error) {
	a.to = r.To
	return copy(buf, []byte{0, 33, 0xc0, 0, 0}), nil
}
func (*addressed) Close() error { return nil }

func BenchmarkRead(b *testing.B) {
	fake := rack()
	c := open(fake)
	d, err := c.DeviceID(b.Context(), bmc.Addr{})
	if err != nil {
		b.Fatal(err)
	}
	raw, _, err := c.ReadRecords(b.Context(), d)
	if err != nil {
		b.Fatal(err)
	}
	all, err := bmc.Parse(raw)
	if err != nil {
		b.Fatal(err)
	}
	fast := bmc.New(fixed{0, 45, 0xc0, 0, 0})
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if r, err := fast.Read(ctx, &all.Sensors[0]); err != nil || r.Value != 45 {
			b.Fatal(r, err)
		}
	}
}
