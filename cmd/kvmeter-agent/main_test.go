package main

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/kvmeter/kvmeter/agent/exporter"
	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
	"github.com/kvmeter/kvmeter/sample"
)

func TestCheckConfig(t *testing.T) { cmdtest.Configs(t, command) }

func TestFlags(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"a file that is named must exist":     {[]string{"--config", "testdata/none.yaml"}, "read configuration: open testdata/none.yaml: no such file or directory"},
		"a folder is no configuration":        {[]string{"--config", "testdata"}, "read configuration: read testdata: is a directory"},
		"an unknown flag names the help":      {[]string{"--intervall", "5s"}, "unknown flag: --intervall (kvmeter-agent --help lists the flags)"},
		"a flag without its value says so":    {[]string{"--config"}, "flag needs an argument: --config (kvmeter-agent --help lists the flags)"},
		"words are not commands":              {[]string{"start"}, `unknown command "start" for "kvmeter-agent"`},
		"a level that is none lists them":     {[]string{"--config", "/dev/null", "--log-level", "loud"}, `--log-level "loud": it is debug, info, warn or error`},
		"a log format that is none does, too": {[]string{"--config", "/dev/null", "--log-format", "xml"}, `--log-format "xml": it is console or json`},
		"so does an output format":            {[]string{"--config", "/dev/null", "--dry-run", "-f", "xml"}, "-f xml: it is table or json"},
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := cmdtest.Run(t, command(), tc.args...); err == nil || err.Error() != tc.want || out != "" {
				t.Errorf("got error\n%v and output %q, want\n%s", err, out, tc.want)
			}
		})
	}
}

func TestVariablesThatAreWrongNameThemselves(t *testing.T) {
	for variable, tc := range map[string]struct{ value, want string }{
		"KVMETER_INTERVAL":          {"soon", `environment variable KVMETER_INTERVAL: "soon" is not a duration such as 500ms, 10s or 1h`},
		"KVMETER_INTERVALL":         {"5s", "environment variable KVMETER_INTERVALL: unknown key intervall"},
		"KVMETER_AMQP":              {"amqp://rabbit/", `environment variable KVMETER_AMQP: "amqp://..." is not a group of settings`},
		"KVMETER_AMQP__PARTITIONS":  {"two", `environment variable KVMETER_AMQP__PARTITIONS: "two" is not a whole number`},
		"KVMETER_QUEUE_BYTES":       {"1", "queue_bytes 1 is too small: use at least 1048576"},
		"KVMETER_SPREAD":            {"maybe", `environment variable KVMETER_SPREAD: "maybe" is not true or false`},
		"KVMETER_SHUTDOWN__TIMEOUT": {"5s", "environment variable KVMETER_SHUTDOWN__TIMEOUT: unknown key shutdown"},
	} {
		t.Run(variable, func(t *testing.T) {
			t.Setenv(variable, tc.value)
			if _, err := cmdtest.Run(t, command(), "--config", "/dev/null", "--check-config"); err == nil || err.Error() != tc.want {
				t.Errorf("got error\n%v, want\n%s", err, tc.want)
			}
		})
	}
}

func TestExporterPages(t *testing.T) {
	samples := exporter.New(nil)
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r"})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(7))
	samples.Observe(b.Build())
	pages, err := openExporter(compute.Exporter{Listen: []string{"127.0.0.1:0", "127.0.0.1:0"}}, samples)
	if err != nil || len(pages) != 2 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	for _, p := range pages {
		serving.Go(func() { _ = p.Serve(ctx) })
		r, err := http.Get(p.URL() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || !strings.Contains(string(body), `ceilometer_cpu{cpu="r",publisher="ceilometer",type="cpu",counter="cpu",unit="ns",resource="r"} 7`) {
			t.Errorf("%s, %v", body, err)
		}
		_ = r.Body.Close()
	}
	cancel()
	serving.Wait()
}

func TestDocumentedCommandsExist(t *testing.T) { cmdtest.Documented(t, command) }
