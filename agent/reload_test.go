package agent

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/collectors"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/sample"
)

const pollCPU = `sources: [{name: a, interval: 3600, meters: [cpu, cpu.wait]}, {name: b, interval: 1800, meters: [network.incoming.bytes]}]`

func TestReload(t *testing.T) {
	file := filepath.Join(t.TempDir(), "polling.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(pollCPU)
	cfg := testConfig()
	cfg.Polling = file
	log := zaptest.NewLogger(t)
	a, err := New(cfg, Deps{Log: log, Publisher: newBus(), Usage: []collectors.UsageReader{procfs.New(log)}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = a.Run(ctx) })
	defer running.Wait()
	defer cancel()
	check := sample.Checks[0].Meters()[0].Name
	for _, step := range []struct {
		name, text string
		want       []string
		err        string
	}{
		{"nothing changed", pollCPU, nil, ""},
		{"another interval, a meter more and one less", `sources: [{name: a, interval: 60, meters: [cpu, ` + check + `]}, {name: b, interval: 1800, meters: [network.incoming.bytes]}]`, []string{
			"cpu.wait: not polled any more", "cpu: polled every 1m0s, not every 1h0m0s", check + " is sent",
		}, ""},
		{"a mistake changes nothing", `sources: [{name: a, interval: 60, meters: [network.*]}, {name: b, meters: [cpu]}]`, nil, `source "b" has no interval: add`},
		{"nor does a file that is gone", "", nil, "no such file"},
		{"two intervals for one", `sources: [{name: a, interval: 60, meters: [cpu]}, {name: b, interval: 1800, meters: [cpu]}]`, []string{
			"cpu: polled every 1m0s and every 30m0s, not every 1m0s", "network.incoming.bytes: not polled any more", check + " is not sent any more",
		}, ""},
	} {
		if step.text == "" {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		} else {
			write(step.text)
		}
		changes, err := a.Reload(ctx, cfg)
		if step.err != "" {
			if err == nil || !strings.Contains(err.Error(), step.err) || changes != nil {
				t.Errorf("%s: got %v, %v", step.name, changes, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if diff := cmp.Diff(step.want, changes); diff != "" {
			t.Errorf("%s: -want +got:\n%s", step.name, diff)
		}
	}
	cfg.Interval = time.Nanosecond
	if _, err := a.Reload(ctx, cfg); err == nil || !strings.Contains(err.Error(), "too short") {
		t.Errorf("a setting that is impossible: got %v", err)
	}
}

// TestWhichPlansAReloadLeavesAlone compares plans before and after.

func TestWhichPlansAReloadLeavesAlone(t *testing.T) {
	before := []plan{{interval: time.Hour, meters: []*sample.Meter{sample.CPU}}, {interval: time.Minute, meters: []*sample.Meter{sample.CPUWait}}}
	for name, tc := range map[string]struct {
		after []plan
		same  int
	}{
		"the same":         {before, 2},
		"one is new":       {[]plan{before[0], {interval: time.Second, meters: before[1].meters}}, 1},
		"other meters":     {[]plan{{interval: time.Hour, meters: before[1].meters}}, 0},
		"a plan for QEMU":  {[]plan{{interval: time.Hour, meters: before[0].meters, qemu: true}}, 0},
		"a plan for a BMC": {[]plan{{interval: time.Hour, meters: before[0].meters, bmc: true}}, 0},
	} {
		same := 0
		for i := range before {
			for j := range tc.after {
				if before[i].same(&tc.after[j]) {
					same++
				}
			}
		}
		if same != tc.same {
			t.Errorf("%s: %d plans are the same, want %d", name, same, tc.same)
		}
	}
}
