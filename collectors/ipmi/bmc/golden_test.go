package bmc_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestDumps reads what `ipmitool sdr dump` wrote of QEMU's and of OpenIPMI's BMC
// (test/ipmi captures it).
func TestDumps(t *testing.T) {
	dumps, err := filepath.Glob("testdata/*.sdr")
	if err != nil || len(dumps) < 2 {
		t.Fatalf("%d dumps, %v", len(dumps), err)
	}
	for _, path := range dumps {
		t.Run(filepath.Base(path), func(t *testing.T) {
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			all, err := bmc.Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(all, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(path, ".sdr") + ".golden"
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}
