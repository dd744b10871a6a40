package main

import (
	"testing"

	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
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
