package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
	"github.com/kvmeter/kvmeter/cmd/internal/host"
)

func TestDoctorPrints(t *testing.T) {
	parts := []host.Part{
		{Name: "kernel", State: "ok", By: "Linux 6.12.1"},
		{Name: "processes", State: "worse", By: "cpuclock", Why: "CPU time is read from /proc"},
		{Name: "hook tcx", State: "missing", Why: "CAP_NET_ADMIN is needed", Costs: []string{"network.incoming.segments", "network.outgoing.segments"}},
	}
	for name, json := range map[string]bool{"doctor": false, "doctor-json": true} {
		var out bytes.Buffer
		if err := (&printer{out: &out, json: json}).parts(parts); err != nil {
			t.Fatal(err)
		}
		cmdtest.Golden(t, "testdata/"+name+".golden", out.String())
	}
}

func TestDoctorRefuses(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	nobody := filepath.Join(t.TempDir(), "agent.sock")
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"a format that it lacks":          {[]string{"-f", "yaml"}, "-f yaml: it is table or json"},
		"to measure an agent that's away": {[]string{"--cost", "--socket", nobody}, "start one"},
		"to measure for no time":          {[]string{"--cost", "--for", "0s"}, "--for must be more than 0"},
	} {
		t.Run(name, func(t *testing.T) {
			c := command()
			c.SetArgs(append([]string{"doctor"}, tc.args...))
			if err := c.Execute(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
