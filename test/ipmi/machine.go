package ipmi

import (
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

// machine is a BMC with sensors of each kind, an event log, an inventory, DCMI
// and Node Manager.
func machine() *bmctest.BMC {
	b := bmctest.New()
	add := func(f bmctest.Full, s bmctest.Sensor) { b.Add(f.Record(), s) }
	celsius := bmc.Factors{M: 1, Format: bmc.TwosComplement}
	limits := [7]byte{0x3f, 5, 3, 1, 80, 90, 100}
	add(bmctest.Full{Number: 0x01, Name: "CPU1 Temp", Type: 1, Unit: 1, Factors: celsius}, bmctest.Sensor{Raw: 45, Thresholds: limits})
	add(bmctest.Full{Number: 0x02, Name: "CPU2 Temp", Type: 1, Unit: 1, Factors: celsius}, bmctest.Sensor{Raw: 0xfb, States: 1<<2 | 1<<1 | 1, Thresholds: limits})
	add(bmctest.Full{Number: 0x03, Name: "Inlet Temp", Type: 1, Unit: 1, Factors: bmc.Factors{M: 5, RExp: -1}}, bmctest.Sensor{Raw: 47, States: 1 << 3, Thresholds: limits})
	add(bmctest.Full{Number: 0x04, Name: "DIMM Temp", Type: 1, Unit: 1, Factors: celsius}, bmctest.Sensor{Off: true})
	add(bmctest.Full{Number: 0x05, Name: "GPU Temp", Type: 1, Unit: 1, Factors: celsius}, bmctest.Sensor{Unknown: true})
	add(bmctest.Full{Number: 0x10, Name: "Fan 1", Type: 4, Unit: 18, NormalMax: 250, Factors: bmc.Factors{M: 40}}, bmctest.Sensor{Raw: 100})
	add(bmctest.Full{Number: 0x11, Name: "Fan 2", Type: 4, Unit: 18, Factors: bmc.Factors{M: 40}}, bmctest.Sensor{Raw: 0, States: 1<<1 | 1})
	add(bmctest.Full{Number: 0x12, Name: "Fan 3 duty", Type: 4, Flags: 1, Factors: bmc.Factors{M: 4, RExp: -1}}, bmctest.Sensor{Raw: 150})
	add(bmctest.Full{Number: 0x20, Name: "P12V", Type: 2, Unit: 4, Factors: bmc.Factors{M: 65, RExp: -3}}, bmctest.Sensor{Raw: 0xb8})
	add(bmctest.Full{Number: 0x21, Name: "P3V3", Type: 2, Unit: 4, Factors: bmc.Factors{M: 156, B: 200, RExp: -4}}, bmctest.Sensor{Raw: 0xcf})
	add(bmctest.Full{Number: 0x22, Name: "N12V", Type: 2, Unit: 4, Factors: bmc.Factors{M: 64, B: -512, BExp: 1, RExp: -3}}, bmctest.Sensor{Raw: 0x40})
	add(bmctest.Full{Number: 0x30, Name: "PSU1 Current", Type: 3, Unit: 5, Factors: bmc.Factors{M: 1, RExp: -1}}, bmctest.Sensor{Raw: 25})
	add(bmctest.Full{Number: 0x31, Name: "Pwr Consumption", Type: 3, Unit: 6, Factors: bmc.Factors{M: 4}}, bmctest.Sensor{Raw: 77})
	add(bmctest.Full{Number: 0x38, Name: "PSU1 Power", Type: 0x0b, Unit: 6, Factors: bmc.Factors{M: 4}}, bmctest.Sensor{Raw: 60})
	add(bmctest.Full{Number: 0x40, Name: "Airflow", Type: 0x0b, Unit: 17, Factors: bmc.Factors{M: 1, Linearization: bmc.Inverse}}, bmctest.Sensor{Raw: 4})
	add(bmctest.Full{Number: 0x41, Name: "Odd", Type: 0x0b, Unit: 17, Factors: bmc.Factors{M: 1, Linearization: bmc.NonLinear}},
		bmctest.Sensor{Raw: 10, Factors: map[byte][6]byte{10: bmctest.FactorBytes(bmc.Factors{M: 25, B: -3, BExp: 1})}})
	b.Add(bmctest.Compact(0x50, "PSU1 Status", 0x08, 0x6f), bmctest.Sensor{States: 1<<0 | 1<<3})
	b.Add(bmctest.Compact(0x51, "Redundancy", 0x08, 0x0b), bmctest.Sensor{States: 1 << 1})
	b.Add(bmctest.EventOnly(0x60, "Watchdog", 0x23, 0x6f), bmctest.Sensor{})
	b.Add(bmctest.FRU(0, "Mainboard"), bmctest.Sensor{})
	b.Add(bmctest.Controller(0x2c, 6, "ME"), bmctest.Sensor{})
	b.Add(bmctest.NodeManager(0x2c, 6), bmctest.Sensor{})
	b.Inventory[0] = bmctest.Inventory("ACME", "Roadrunner", "SN-42")
	b.Node = &bmctest.Me{
		Addr: 0x2c, Channel: 6, Version: 5, Watts: 301, Inlet: 24, Outlet: 38, Airflow: 61, CUPS: 42,
		Busy: bmc.Utilization{CPU: 12, Memory: 34, IO: 5},
	}
	b.Log(bmctest.Event(1700000000, 0x01, 0x01, 0x01, 9, true))
	b.Log(bmctest.Event(1700000100, 0x08, 0x50, 0x6f, 3, true))
	b.Log(bmctest.Event(1700000200, 0x01, 0x01, 0x01, 9, false))
	return b
}
