//go:build lab

package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// units is where packages take them from.
const units = "../packaging/systemd"

// TestUnitsExposeLittle has systemd say how much the units could do to a host,
// from 0 to 10. `systemd-analyze security --offline=true UNIT` shows the parts.
func TestUnitsExposeLittle(t *testing.T) {
	for unit, most := range map[string]float64{"kvmeter-agent": 2.0, "kvmeter-up": 2.0, "kvmeter-notifier": 1.5, "kvmeter-central": 1.5} {
		path := filepath.Join(units, unit+".service")
		out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", path).CombinedOutput()
		m := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`).FindSubmatch(out)
		if m == nil {
			t.Fatalf("%s: %v\n%s", unit, err, out)
		}
		score, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %.1f", unit, score)
		if score > most {
			t.Errorf("%s has an exposure of %.1f, at most %.1f:\n%s", unit, score, most, out)
		}
	}
}

// TestUnitsAreValid has systemd read the units; the programs need not be
// installed.
func TestUnitsAreValid(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(units, "*.service"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no units in %s, %v", units, err)
	}
	for _, path := range paths {
		out, _ := exec.Command("systemd-analyze", "verify", "--man=no", path).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, filepath.Base(path)+":") && !strings.Contains(line, "is not executable: No such file or directory") {
				t.Error(strings.TrimSpace(line))
			}
		}
	}
}

// TestUnitsGiveTheAgentWhatIsDocumented compares its capabilities with the table in
// docs/privileges.md, of which each row is tested.
func TestUnitsGiveTheAgentWhatIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/privileges.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `standard` \\|([^|]*)\\|").FindSubmatch(page)
	if row == nil {
		t.Fatal("no row of the profile standard in docs/privileges.md")
	}
	want := regexp.MustCompile(`CAP_\w+`).FindAllString(string(row[1]), -1)
	for _, name := range []string{"kvmeter-agent", "kvmeter-up"} {
		unit, err := os.ReadFile(filepath.Join(units, name+".service"))
		if err != nil {
			t.Fatal(err)
		}
		for _, setting := range []string{"AmbientCapabilities", "CapabilityBoundingSet"} {
			m := regexp.MustCompile("(?m)^" + setting + "=(.*)$").FindSubmatch(unit)
			if m == nil || !slices.Equal(strings.Fields(string(m[1])), want) {
				t.Errorf("%s of %s is %q, want %q", setting, name, m, want)
			}
		}
	}
}
