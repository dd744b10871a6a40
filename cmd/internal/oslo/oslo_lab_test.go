//go:build lab

package oslo

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

// TestAgainstOsloConfig compares what is read of testdata with what the
// original reads.
func TestAgainstOsloConfig(t *testing.T) {
	c := read(t, "testdata")
	ask := map[string]int{}
	for name, all := range c.values {
		ask[name] = len(all)
	}
	in, err := json.Marshal(ask)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/bin/python3", "testdata/read.py", "testdata/ceilometer.conf", "testdata/second.conf")
	cmd.Stdin = strings.NewReader(string(in))
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("oslo.config: %v", err)
	}
	var want map[string][]string
	if err := json.Unmarshal(out, &want); err != nil {
		t.Fatal(err)
	}
	if len(want) != len(ask) || len(want) < 20 {
		t.Fatalf("oslo.config reads %d options, want %d", len(want), len(ask))
	}
	for name, values := range want {
		text, ok := c.Text(name)
		if !ok || text.Text != values[0] {
			t.Errorf("%s: got %q, want %q", name, text.Text, values[0])
		}
		for i, v := range c.Multi(name) {
			if v.Text != values[i+1] {
				t.Errorf("%s, value %d: got %q, want %q", name, i, v.Text, values[i+1])
			}
		}
	}
}
