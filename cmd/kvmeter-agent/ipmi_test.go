package main

import (
	"errors"
	"testing"

	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

// machine is a BMC with one of everything that the command prints.
func machine() *bmctest.BMC {
	b := bmctest.New()
	celsius := bmc.Factors{M: 1, Format: bmc.TwosComplement}
	b.Add(bmctest.Full{Number: 1, Name: "CPU1 Temp", Type: 1, Unit: 1, Factors: celsius}.Record(), bmctest.Sensor{Raw: 45, Thresholds: [7]byte{0x18, 0, 0, 0, 80, 90, 0}})
	b.Add(bmctest.Full{Number: 2, Name: "Inlet Temp", Type: 1, Unit: 1, Factors: bmc.Factors{M: 5, RExp: -1}}.Record(), bmctest.Sensor{Raw: 0x5b, States: 1 << 3, Thresholds: [7]byte{0x3f, 20, 10, 4, 90, 100, 110}})
	b.Add(bmctest.Full{Number: 3, Name: "Fan 1", Type: 4, Unit: 18, Factors: bmc.Factors{M: 40}}.Record(), bmctest.Sensor{Off: true})
	b.Add(bmctest.Full{Number: 4, Name: "Fan 2", Type: 4, Unit: 18, Factors: bmc.Factors{M: 40}}.Record(), bmctest.Sensor{Fault: bmctest.Refuse})
	b.Add(bmctest.Compact(5, "PSU1 Status", 0x08, 0x6f), bmctest.Sensor{States: 0x80<<8 | 3})
	b.Add(bmctest.EventOnly(6, "Watchdog", 0x23, 0x6f), bmctest.Sensor{})
	b.Add(bmctest.FRU(0, "Mainboard"), bmctest.Sensor{})
	b.Add(bmctest.FRU(7, "Gone"), bmctest.Sensor{})
	b.Add(bmctest.NodeManager(0x2c, 6), bmctest.Sensor{})
	b.Node = &bmctest.Me{Addr: 0x2c, Channel: 6, Version: 5, Watts: 301, Inlet: 24, Outlet: 38, Airflow: 61, CUPS: 42, Busy: bmc.Utilization{CPU: 12, Memory: 34, IO: 5}}
	b.Inventory[0] = bmctest.Inventory("ACME", "Roadrunner", "SN-42")
	b.Trouble = 1 << 3
	b.Log(bmctest.Event(1700000000, 1, 1, 1, 9, true))
	b.Log(bmctest.Event(90, 0x23, 6, 0x6f, 1, false))
	b.Log([16]byte{2: 0xe0, 3: 0xbb})
	return b
}

func TestIPMI(t *testing.T) {
	for name, args := range map[string][]string{
		"sensors":      {},
		"sensors-json": {"-f", "json"},
		"sel":          {"--sel"},
		"sel-json":     {"--sel", "-f", "json"},
		"fru":          {"--fru"},
		"fru-json":     {"--fru", "-f", "json"},
		"power":        {"--power"},
		"power-json":   {"--power", "-f", "json"},
	} {
		t.Run(name, func(t *testing.T) {
			fake := machine()
			c := ipmiCommand(func(string) (bmc.Transport, error) { return &bmctest.Transport{BMC: fake}, nil })
			got, err := cmdtest.Run(t, c, args...)
			if err != nil {
				t.Fatal(err)
			}
			cmdtest.Golden(t, "testdata/ipmi/"+name+".golden", got)
		})
	}
}

func TestIPMIRefuses(t *testing.T) {
	none := errors.New("there is no /dev/ipmi0")
	bare := func(string) (bmc.Transport, error) { return &bmctest.Transport{BMC: bmctest.New()}, nil }
	for name, tc := range map[string]struct {
		open func(string) (bmc.Transport, error)
		args []string
		want string
	}{
		"where there is no device":          {func(string) (bmc.Transport, error) { return nil, none }, []string{}, none.Error()},
		"a BMC without sensors":             {bare, []string{}, bmc.ErrNoSDR.Error()},
		"a format that is none":             {bare, []string{"-f", "xml"}, "-f xml: it is table or json"},
		"a time-out that is none":           {bare, []string{"--timeout", "0s"}, "--timeout 0s: must be more than 0"},
		"two things to show":                {bare, []string{"--sel", "--fru"}, "if any flags in the group [sel fru power] are set none of the others can be; [fru sel] were all set"},
		"a flag that is none, and helps on": {bare, []string{"--sdr"}, "unknown flag: --sdr (ipmi --help lists the flags)"},
	} {
		t.Run(name, func(t *testing.T) {
			c := ipmiCommand(tc.open)
			c.SilenceUsage, c.SilenceErrors = true, true
			if out, err := cmdtest.Run(t, c, tc.args...); err == nil || err.Error() != tc.want || out != "" {
				t.Errorf("got error\n%v and output %q, want\n%s", err, out, tc.want)
			}
		})
	}
}
