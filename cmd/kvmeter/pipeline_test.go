package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// try runs a command with input and returns what it prints.
func try(t *testing.T, in string, args ...string) (out, complaints string, err error) {
	t.Helper()
	c := command()
	var stdout, stderr bytes.Buffer
	c.SetIn(strings.NewReader(in))
	c.SetOut(&stdout)
	c.SetErr(&stderr)
	c.SetArgs(args)
	err = c.ExecuteContext(t.Context())
	return stdout.String(), stderr.String(), err
}

// file writes a file and returns its path.
func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const rates = `
sources:
- {name: all, meters: ["!cpu"], sinks: [plain]}
- {name: cpu, meters: [cpu], sinks: [rate]}
sinks:
- {name: plain, publishers: [test://]}
- {name: rate, publishers: [test://], transformers: [{name: rate_of_change, parameters: {target: {name: cpu.rate, type: gauge}}}]}
`

const someSamples = `
[{"name": "cpu", "type": "cumulative", "unit": "ns", "volume": 10, "resource_id": "r", "timestamp": "2026-01-01T00:00:00", "id": "1"},
 {"counter_name": "memory", "counter_type": "gauge", "counter_unit": "MB", "counter_volume": 1.0, "resource_id": "r", "timestamp": "2026-01-01T00:00:00", "message_id": "2"},
 {"name": "bad", "volume": "many", "resource_id": "r", "timestamp": "2026-01-01T00:00:00"}]
{"name": "cpu", "type": "cumulative", "unit": "ns", "volume": 30, "resource_id": "r", "timestamp": "2026-01-01T00:00:10", "id": "3"}
`

const (
	memoryLine = `{"name": "memory", "type": "gauge", "unit": "MB", "volume": 1.0, "user_id": null, "user_name": null, "project_id": null, "project_name": null, "resource_id": "r", "timestamp": "2026-01-01T00:00:00", "resource_metadata": {}, "source": "openstack", "id": "2", "monotonic_time": null`
	rateLine   = `{"name": "cpu.rate", "type": "gauge", "unit": "ns", "volume": 2.0, "user_id": null, "user_name": null, "project_id": null, "project_name": null, "resource_id": "r", "timestamp": "2026-01-01T00:00:10", "resource_metadata": {}, "source": "openstack", "id": "`
)

func TestPipelineCommand(t *testing.T) {
	out, complaints, err := try(t, someSamples, "pipeline", "--config", file(t, "p.yaml", rates))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out, "\n")
	if len(lines) != 3 || lines[0] != memoryLine+`, "pipeline": "all:plain"}` || !strings.HasPrefix(lines[1], rateLine) || !strings.HasSuffix(lines[1], `, "pipeline": "cpu:rate"}`) {
		t.Errorf("got %s", out)
	}
	want := "Warning: sample \"bad\" of \"r\": the volume is no number: \"many\"\nWarning: sink rate: rate_of_change dropped 1 samples: first\n"
	if complaints != want {
		t.Errorf("got complaints %q, want %q", complaints, want)
	}
	out, _, err = try(t, someSamples, "pipeline", "--pipeline", "all:plain", "-c", file(t, "p.yaml", rates))
	if err != nil || out != memoryLine+"}\n" {
		t.Errorf("one pipeline only: got %s, %v", out, err)
	}
}

func TestPipelineCommandGivesIDsToSamplesWithoutOne(t *testing.T) {
	out, _, err := try(t, `[{"name": "a", "volume": 1, "timestamp": "2026-01-01T00:00:00"}, {"name": "b", "volume": 1, "timestamp": "2026-01-01T00:00:00"}]`,
		"pipeline", "-c", file(t, "p.yaml", rates), "--pipeline", "all:plain")
	ids := regexp.MustCompile(`"id": "[^"]+"`).FindAllString(out, -1)
	if err != nil || len(ids) != 2 || ids[0] == ids[1] || strings.Contains(out, "00000000-0000") {
		t.Errorf("got %s, %v", out, err)
	}
}

func TestPipelineCommandReadsEvents(t *testing.T) {
	path := file(t, "e.yaml", "sources: [{name: a, events: ['*pute.*', '!*.start'], sinks: [k]}]\nsinks: [{name: k, publishers: [test://]}]")
	event := `{"message_id": "m", "event_type": "compute.x", "generated": "2026-01-01T00:00:00", "traits": [["t", 1, "v"]], "raw": {}}`
	converted := `{"samples": [{"name": "m"}], "event": ` + event + `, "errors": []} {"samples": [], "event": null, "errors": []}`
	for _, in := range []string{event + strings.Replace(event, "compute.x", "compute.x.start", 1) + strings.Replace(event, "compute.x", "image.x", 1), converted} {
		if out, complaints, err := try(t, in, "pipeline", "-c", path); err != nil || out != event+"\n" || complaints != "" {
			t.Errorf("got %s, %s, %v", out, complaints, err)
		}
	}
}

func TestPipelineCommandSaysWhatIsWrong(t *testing.T) {
	good := file(t, "p.yaml", rates)
	for name, tc := range map[string]struct {
		in, want string
		args     []string
	}{
		"the file is not there":     {"", "no such file", []string{"-c", "/nowhere/p.yaml"}},
		"the file is wrong":         {"", ":1: sources are missing", []string{"-c", file(t, "bad.yaml", "sinks: []")}},
		"there is no such pipeline": {"", `has no pipeline "x"`, []string{"-c", good, "--pipeline", "x"}},
		"the input is no JSON":      {"[{},]", "value 1 of the input, before byte", []string{"-c", good}},
		"the input is a number":     {"{\"samples\": []} 5", "value 2 of the input: 5 is neither an object nor a list", []string{"-c", good}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := try(t, tc.in, append([]string{"pipeline"}, tc.args...)...); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
