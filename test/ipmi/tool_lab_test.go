//go:build lab

package ipmi

import (
	"bytes"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

// ipmitool runs ipmitool of this machine on a fake BMC, through its interface
// for tests.
func ipmitool(t *testing.T, fake *bmctest.BMC, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ipmi")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- ServeDummy(l, fake) }()
	cmd := exec.CommandContext(t.Context(), "ipmitool", append([]string{"-I", "dummy"}, args...)...)
	cmd.Env = append(os.Environ(), "IPMI_DUMMY_SOCK="+path)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		t.Fatalf("ipmitool %s: %v\n%s%s", strings.Join(args, " "), err, &out, &said)
	}
	_ = l.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	return out.String()
}

// generated are sensors of every format, linearization, sign of M and B, and
// exponent of the result, with an exponent of B and a raw reading that go
// through all of theirs.
func generated() (all []bmc.Factors, raws []byte) {
	n := 0
	for format := byte(bmc.Unsigned); format <= bmc.TwosComplement; format++ {
		for l := byte(bmc.Linear); l <= bmc.CubeRoot; l++ {
			for sign := range 4 {
				for e := -8; e <= 7; e++ {
					m, b := int16(1+n*37%511), int16(n*61%512)
					if sign&1 != 0 {
						m = -m
					}
					if sign&2 != 0 {
						b = -b
					}
					all = append(all, bmc.Factors{M: m, B: b, BExp: int8(n*7%16) - 8, RExp: int8(e), Format: format, Linearization: l})
					raws = append(raws, byte(n*29+n/256))
					n++
				}
			}
		}
	}
	return all, raws
}

// TestGeneratedSensors is the bar of conversions: each value that ipmitool prints
// is ours to the last digit that it prints.
func TestGeneratedSensors(t *testing.T) {
	all, raws := generated()
	const each = 250 // sensors of one BMC: their numbers have 8 bits
	values, none := 0, 0
	for first := 0; first < len(all); first += each {
		last := min(len(all), first+each)
		fake := bmctest.New()
		for i := first; i < last; i++ {
			number := byte(1 + i - first)
			f := bmctest.Full{Number: number, Name: fmt.Sprintf("S%d", i), Type: 0x0b, Unit: 1, Factors: all[i]}
			fake.Add(f.Record(), bmctest.Sensor{Raw: raws[i]})
		}
		printed := map[string]string{}
		for line := range strings.Lines(ipmitool(t, fake, "sensor")) {
			columns := strings.Split(line, "|")
			printed[strings.TrimSpace(columns[0])] = strings.TrimSpace(columns[1])
		}
		b := bmc.New(&bmctest.Transport{BMC: fake})
		d, err := b.DeviceID(t.Context(), bmc.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		raw, _, err := b.ReadRecords(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		records, err := bmc.Parse(raw)
		if err != nil || len(records.Sensors) != last-first {
			t.Fatalf("got %d sensors, %v", len(records.Sensors), err)
		}
		for i := range records.Sensors {
			s := &records.Sensors[i]
			r, err := b.Read(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			if !same(printed[s.Name], r.Value, r.Valid) {
				t.Errorf("%+v of %02xh: got %v, %v, ipmitool prints %q", s.Factors, r.Raw, r.Value, r.Valid, printed[s.Name])
			}
			if values++; !r.Valid {
				none++
			}
		}
	}
	t.Logf("%d sensors, of which %d have no value", values, none)
	if values != 3*12*4*16 || none > values/4 {
		t.Errorf("%d sensors, of which %d have no value", values, none)
	}
}

// same reports whether a value is what ipmitool printed, to its last digit, or
// neither is a number.
func same(printed string, value float64, valid bool) bool {
	if printed == "-nan" { // as C writes what has no value
		printed = "nan"
	}
	p, err := strconv.ParseFloat(printed, 64)
	if err != nil || math.IsNaN(p) || math.IsInf(p, 0) {
		return err == nil && !valid
	}
	if !valid {
		return false
	}
	_, digits, _ := strings.Cut(printed, ".")
	half := 0.5 * math.Pow10(-len(digits))
	// It rounds before the end, which exponentials magnify: by 500 times for the
	// largest numbers.
	return math.Abs(p-value) <= half*(1+1e-9)+math.Abs(p)*5e-13
}
