package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/sample"
)

func TestStoreIsLookedAfterWhileItRunsAndWhileNot(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "store")
	s, err := local.Open(dir, local.Options{MinFree: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.AppendEvents(t.Context(), []sample.Event{{ID: "e-1", Type: "x", Generated: time.Now().UnixMicro()}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done, err := serveMaintenance(ctx, dir, s, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		out, err := cmdtest.Run(t, command(), args...)
		return out, err
	}
	check := func(backup string) {
		t.Helper()
		if out, err := run("backup", backup, "--store", dir); err != nil || out != "" {
			t.Errorf("backup: got %q, %v", out, err)
		}
		if _, err := run("backup", backup, "--store", dir); err == nil || !strings.Contains(err.Error(), "is not empty") {
			t.Errorf("a second backup to the same place: got %v", err)
		}
		if out, err := run("store", "stats", "--store", dir); err != nil || !strings.Contains(out, "events") || !strings.Contains(out, "hours to roll up") {
			t.Errorf("stats: got %q, %v", out, err)
		}
		if out, err := run("store", "verify", "--store", dir); err != nil || !strings.HasSuffix(out, ": no problems\n") {
			t.Errorf("verify: got %q, %v", out, err)
		}
	}
	check(filepath.Join(base, "one"))
	if _, err := run("store", "repair", "--store", dir); err == nil || !strings.Contains(err.Error(), "another kvmeter uses this store") {
		t.Errorf("repair of a store in use: got %v", err)
	}
	done()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	check(filepath.Join(base, "two"))
	if out, err := run("store", "repair", "--store", dir); err != nil || !strings.Contains(out, "0 records dropped") {
		t.Errorf("repair: got %q, %v", out, err)
	}
	if _, err := run("restore", filepath.Join(base, "one"), "--store", dir); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Errorf("restore over a store: got %v", err)
	}
	dir = filepath.Join(base, "restored")
	if _, err := run("restore", filepath.Join(base, "one"), "--store", dir); err != nil {
		t.Fatal(err)
	}
	check(filepath.Join(base, "three"))
	if _, err := run("store", "stats", "--store", base); err == nil || !strings.Contains(err.Error(), "is no store") {
		t.Errorf("stats of no store: got %v", err)
	}
	if _, err := os.Stat(filepath.Join(base, "samples")); !errors.Is(err, os.ErrNotExist) {
		t.Error("a store was made where none is")
	}
}

func TestTimeToLive(t *testing.T) {
	for rule, want := range map[string]string{
		"cpu samples=48h": "",
		"disk.* project=4711 samples=0s rollups=800h": "",
		"cpu":               "want a meter",
		"cpu samples=two":   "is not project=ID",
		"cpu samples=-1h":   "is not project=ID",
		"cpu keep=48h":      "is not project=ID",
		"cpu project=":      "is not project=ID",
		"!cpu rollups=1h x": "is not project=ID",
	} {
		_, err := storeOptions(control.Store{TimeToLive: []string{rule}})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: got %v, want %q", rule, err, want)
		}
	}
	o, err := storeOptions(control.Store{Retention: time.Hour, TimeToLive: []string{"disk.* project=4711 samples=0s"}})
	if err != nil {
		t.Fatal(err)
	}
	if ttl := o.TimeToLive[0]; ttl.Samples != -1 || ttl.Rollups != 0 || ttl.Project != "4711" || !ttl.Meters.Match("disk.read") || o.RollupRetention != -1 {
		t.Errorf("got %+v", o)
	}
}
