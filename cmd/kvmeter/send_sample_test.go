package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestSendSample(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	p := file(t, "p.yaml", `
sources: [{name: s, meters: [power], sinks: [k, rate]}]
sinks:
- {name: k, publishers: ["file://`+out+`?json", "test://"]}
- {name: rate, transformers: [{name: rate_of_change}], publishers: ["test://"]}
`)
	args := func(more ...string) []string {
		return append([]string{"send-sample", "--config", "/dev/null", "--pipeline", p, "--sample-name", "power", "--sample-resource", "node-1"}, more...)
	}
	got, _, err := try(t, "", args("--sample-volume", "1.5", "--sample-unit", "W", "--sample-timestamp", "2026-01-01T00:00:00", "--sample-metadata", `{"a": 1}`)...)
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^file://` + regexp.QuoteMeta(out) + `\?json has sample [0-9a-f-]{36}\ntest:// has sample [0-9a-f-]{36}\n$`).MatchString(got) {
		t.Errorf("got %s", got)
	}
	data, err := os.ReadFile(out)
	want := `{"name": "power", "type": "gauge", "unit": "W", "volume": 1.5, "user_id": null, "user_name": null, "project_id": null, "project_name": null, "resource_id": "node-1", "timestamp": "2026-01-01T00:00:00", "resource_metadata": {"a": 1}, "source": "openstack", "id": "`
	if err != nil || !strings.HasPrefix(string(data), want) {
		t.Errorf("got %s, %v", data, err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{args("--sample-name", "other"), "no pipeline passes this sample on"},
		{args("--sample-volume", "much"), "the volume is no number"},
		{args("--sample-type", "sum"), `--sample-type "sum": it is gauge, delta or cumulative`},
		{args("--sample-metadata", "{"), "--sample-metadata is no JSON object"},
		{args("--pipeline", "/none"), "no such file"},
		{[]string{"send-sample"}, `required flag(s) "sample-name", "sample-resource" not set`},
	} {
		if _, _, err := try(t, "", tc.args...); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v: got %v, want %s", tc.args, err, tc.want)
		}
	}
}

func TestLintOfPipelines(t *testing.T) {
	for name, tc := range map[string]struct {
		file, want string
		bad        bool
	}{
		"a good one": {rates, "", false},
		"a publisher that there is not": {
			"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers:\n  - monasca://host",
			"error: FILE:5: publisher monasca://host: there is none of this scheme; there are ", true,
		},
		"a publisher that takes no events": {
			"sources: [{name: a, events: ['*'], sinks: [k]}]\nsinks:\n- {name: k, publishers: ['udp://host']}",
			"error: FILE:3: publisher udp://host takes samples only", true,
		},
		"the list of pipelines of old": {
			"- {name: a, interval: 60, meters: ['*'], publishers: ['udp://host']}",
			`warning: FILE:1: "interval" has no effect here`, false,
		},
		"polling.yaml":                       {"sources: [{name: a, interval: 60, meters: ['*']}]", "", false},
		"a polling.yaml without an interval": {"sources:\n- {name: a, interval: -5, meters: ['*']}", "error: FILE:2: ", true},
	} {
		t.Run(name, func(t *testing.T) {
			path := file(t, "f.yaml", tc.file)
			out, _, err := try(t, "", "lint", path)
			if (err != nil) != tc.bad || !strings.HasPrefix(out, strings.ReplaceAll(tc.want, "FILE", path)) || tc.want == "" && out != "" {
				t.Errorf("got %s, %v", out, err)
			}
		})
	}
}
