//go:build lab

package test

import (
	"os/exec"
	"testing"
)

// TestRulesAlertWhenTheyShould has Prometheus check the rules and run their own
// tests.
func TestRulesAlertWhenTheyShould(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "kvmeter.rules.yml"}, {"test", "rules", "kvmeter.rules.test.yml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = "../packaging/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}
