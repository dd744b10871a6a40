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

func TestDoctorTellsOfTheConfiguration(t *testing.T) {
	t.Setenv("KVMETER_LIBVIRT", "off")
	t.Setenv("KVMETER_IPMI__DEVICE", `""`)
	for file, want := range map[string][]string{
		"testdata/config/polling.bad.yaml":  {"configuration  wrong", "configuration: the agent would not start: testdata/polling-broken.yaml: line "},
		"testdata/config/untaken.good.yaml": {"configuration  worse", "compute.fetch_extra_metadata has no effect", "\n  testdata/etc/untaken/ceilometer.conf:6 "},
		"testdata/config/ceilometer.golden": {"configuration  ok       testdata/config/ceilometer.golden\n"},
	} {
		out, err := cmdtest.Run(t, command(), "doctor", "--without-bpf", "--config", file)
		for _, part := range want {
			if err != nil || !strings.Contains(out, part) {
				t.Errorf("%s: it does not say %q: %v\n%s", file, part, err, out)
			}
		}
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
