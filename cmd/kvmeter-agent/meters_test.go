package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
	"github.com/kvmeter/kvmeter/sample"
)

func TestMeters(t *testing.T) {
	dir := t.TempDir()
	config, polling := filepath.Join(dir, "agent.yaml"), filepath.Join(dir, "polling.yaml")
	for file, text := range map[string]string{
		config:  "polling: " + polling + "\n",
		polling: "sources: [{name: a, interval: 20, meters: [cpu, vcpu.run]}, {name: b, interval: 60, meters: [cpu, disk.device.read.bytes]}]",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := cmdtest.Run(t, command(), "meters", "--config", config)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(got), "\n")
	want := map[string]string{
		"cpu":                    "cumulative ns domain 20s, 1m0s walk,",
		"vcpu.run":               "cumulative ns vcpu 20s walk,",
		"disk.device.read.bytes": "cumulative B disk 1m0s libvirt",
	}
	if len(lines) != len(want)+1 {
		t.Errorf("got\n%s\nwant %d meters", got, len(want))
	}
	for _, line := range lines[1:] {
		name, rest, _ := strings.Cut(strings.Join(strings.Fields(line), " "), " ")
		if want[name] == "" || !strings.HasPrefix(rest, want[name]) {
			t.Errorf("%s: got %q, want %q", name, rest, want[name])
		}
	}
	got, err = cmdtest.Run(t, command(), "meters", "--config", config, "--all", "-f", "json")
	if err != nil {
		t.Fatal(err)
	}
	var all []polledMeter
	if err := json.Unmarshal([]byte(got), &all); err != nil || len(all) != len(sample.Catalogue) {
		t.Errorf("%d meters in JSON, want %d, %v", len(all), len(sample.Catalogue), err)
	}
	if _, err := cmdtest.Run(t, command(), "meters", "-f", "xml"); err == nil || err.Error() != "-f xml: it is table or json" {
		t.Errorf("got %v", err)
	}
}
