package bmc_test

import (
	"os"
	"testing"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

// FuzzParse: whatever the records are, each sensor read from them can be used.
func FuzzParse(f *testing.F) {
	f.Add(rack().Raw())
	f.Add(bmctest.NodeManager(0x2c, 6))
	f.Add([]byte{1, 0, 0x51, 2, 0xff})
	for _, name := range []string{"qemu", "sim"} {
		dump, err := os.ReadFile("testdata/" + name + ".sdr")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(dump)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		all, err := bmc.Parse(raw)
		if err == nil && len(raw) > 0 && len(all.Sensors)+len(all.FRUs)+len(all.Controllers)+len(all.OEM)+all.Other+len(all.Faults) == 0 {
			t.Error("records were read and nothing is told of them")
		}
		for i := range all.Sensors {
			s := &all.Sensors[i]
			_, _ = s.Units.String(), s.Units.Short()
			for _, x := range []byte{0, 1, 0x7f, 0x80, 0xff} {
				if v, ok := s.Factors.Convert(x); ok && v-v != 0 {
					t.Errorf("%+v of %02xh is %v", s.Factors, x, v)
				}
			}
			_ = bmc.StateNames(s, 0x7fff)
		}
	})
}

// FuzzFRU: whatever an inventory is, it is read or its faults are told.
func FuzzFRU(f *testing.F) {
	f.Add(bmctest.Inventory("ACME", "Roadrunner", "SN-42"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > 2048 {
			return
		}
		fake := bmctest.New()
		fake.Inventory[0] = data
		u, err := open(fake).FRU(t.Context(), bmc.FRULocator{})
		if err != nil {
			t.Error(err)
		}
		if len(u.Fields) > 0 && data[0]&0x0f != 1 {
			t.Errorf("got %+v of an inventory without a header", u)
		}
	})
}

// FuzzEvent: whatever an entry is, it can be told.
func FuzzEvent(f *testing.F) {
	e := bmctest.Event(1700000000, 1, 1, 1, 9, true)
	f.Add(e[:])
	all, err := bmc.Parse(rack().Raw())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var raw [16]byte
		copy(raw[:], data)
		e := bmc.ParseEvent(raw)
		if e.Record != uint16(raw[0])|uint16(raw[1])<<8 || e.State() == "" || e.OEM == nil && all.SensorName(&e) == "" {
			t.Errorf("got %+v", e)
		}
		_ = e.When()
	})
}
