package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
)

// TestLint compares what is said about each file of testdata/lint with the
// golden file beside it.
func TestLint(t *testing.T) {
	files, err := filepath.Glob("testdata/lint/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			out, err := cmdtest.Run(t, command(), "lint", file)
			if bad := strings.Contains(out, "error: "); bad != (err != nil) {
				t.Errorf("error %v for\n%s", err, out)
			}
			cmdtest.Golden(t, strings.TrimSuffix(file, ".yaml")+".golden", out)
		})
	}
}

// TestLintOfWhatKvmeterBrings finds nothing in its own definitions.
func TestLintOfWhatKvmeterBrings(t *testing.T) {
	for _, file := range []string{"../../notifier/meters/shipped.yaml", "../../notifier/meters/existence.yaml", "../../notifier/events/shipped.yaml"} {
		if out, err := cmdtest.Run(t, command(), "lint", file); err != nil || out != "" {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
}

func runConvert(t *testing.T, in string, args ...string) ([]map[string]any, string, error) {
	t.Helper()
	c := command()
	var out, complaints bytes.Buffer
	c.SetIn(strings.NewReader(in))
	c.SetOut(&out)
	c.SetErr(&complaints)
	c.SetArgs(append([]string{"convert"}, args...))
	err := c.ExecuteContext(t.Context())
	var lines []map[string]any
	for line := range strings.Lines(out.String()) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		lines = append(lines, v)
	}
	return lines, complaints.String(), err
}

const notification = `{"ctxt": {"user_id": "u"}, "publisher_id": "p.h", "event_type": "test.x", "priority": "info",
	"payload": {"id": "r", "volume": 3}, "metadata": {"message_id": "m", "timestamp": "2026-11-21 10:00:00"}}`

func TestConvertReadsAnyJSON(t *testing.T) {
	line := strings.ReplaceAll(notification, "\n", " ")
	for name, in := range map[string]string{
		"one, over several lines": notification,
		"a list":                  "[" + notification + "]",
		"one a line":              line + "\n" + line,
		"a broken line between":   line + "\n{broken\n" + line,
		"no notification":         line + "\n5\n" + line,
		"nothing":                 " \n",
	} {
		lines, _, err := runConvert(t, in, "--meters", "testdata/lint/meters.yaml")
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		good := 0
		for _, l := range lines {
			if len(l["samples"].([]any)) == 1 && l["event"] != nil && len(l["errors"].([]any)) == 0 {
				good++
			} else if len(l["errors"].([]any)) != 1 || l["event"] != nil {
				t.Errorf("%s: %v", name, l)
			}
		}
		want, all := strings.Count(in, `"test.x"`), strings.Count(in, `"test.x"`)
		if strings.Contains(name, "broken") || strings.Contains(name, "no not") {
			all++
		}
		if good != want || len(lines) != all {
			t.Errorf("%s: %d good lines of %d, want %d of %d", name, good, len(lines), want, all)
		}
	}
}

func TestConvertSaysWhatItLeavesOutAndWhy(t *testing.T) {
	lines, complaints, err := runConvert(t, notification, "--meters", "testdata/lint/meters.yaml", "--explain", "--set", "event.drop_unmatched_notifications=true")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(complaints, "left out: testdata/lint/meters.yaml:11: rate: unit") || strings.Contains(complaints, "warning") {
		t.Errorf("got on standard error\n%s", complaints)
	}
	why, err := json.Marshal(lines[0]["explain"])
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"quirks: the sample has no volume", "no event definition matches event type test.x"} {
		if !strings.Contains(string(why), want) {
			t.Errorf("%s does not say %q", why, want)
		}
	}
}

func TestConvertRefusesWhatCeilometerWouldNotStartWith(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"event definitions with an error": {[]string{"--events", "testdata/lint/events.yaml"}, `testdata/lint/events.yaml:5: trait b: invalid type "bool"; there are text, int, float and datetime`},
		"meters of a wrong expression":    {[]string{"--meters", "testdata/lint/refused.yaml"}, `testdata/lint/refused.yaml:3: expression: event_type: regular expression "test.("`},
		"meter definitions that are none": {[]string{"--meters", "testdata/lint/events.yaml"}, "testdata/lint/events.yaml:1: meter definitions are a list under the key metric"},
		"a file that is not there":        {[]string{"--meters", "testdata/none.yaml"}, "read meter definitions: open testdata/none.yaml"},
		"a folder without definitions":    {[]string{"--meters", "testdata/empty"}, "read meter definitions: no *.yaml in testdata/empty"},
		"a setting that is none":          {[]string{"--set", "event.foo=1"}, `--set: setting "event.foo=1" is none of the form group.option=value for event.drop_unmatched_notifications,`},
		"a setting with a wrong value":    {[]string{"--set", "event.drop_unmatched_notifications=maybe"}, `--set: setting event.drop_unmatched_notifications: "maybe" is neither true nor false`},
		"a length that is no number":      {[]string{"--set", "DEFAULT.reserved_metadata_length=-1"}, `"-1" is no whole number of at least 0`},
		"a fall-back that is none":        {[]string{"--set", "meter.context_fallback=maybe"}, `"maybe" is neither intended nor strict`},
		"a pipeline that there is not":    {[]string{"--set", "notification.pipelines=meter,foo"}, `"foo" is neither meter nor event`},
	} {
		_, _, err := runConvert(t, notification, tc.args...)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %s", name, err, tc.want)
		}
	}
}

func TestConvertReadsFoldersInOrder(t *testing.T) {
	dir := t.TempDir()
	for name, unit := range map[string]string{"a.yaml": "first", "b.yaml": "second", "c.txt": "third"} {
		text := "metric:\n  - {name: m, event_type: test.x, type: gauge, unit: " + unit + ", volume: 1, resource_id: $.payload.id}\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	lines, _, err := runConvert(t, notification, "--meters", dir)
	if err != nil {
		t.Fatal(err)
	}
	samples := lines[0]["samples"].([]any)
	if len(samples) != 1 || samples[0].(map[string]any)["counter_unit"] != "first" {
		t.Errorf("got %v", samples)
	}
}

// TestExistenceMeters switches on the meters that only say that something is.
func TestExistenceMeters(t *testing.T) {
	for event, tc := range map[string]struct {
		payload string
		want    []string // name, type, unit and resource of each sample
	}{
		"network.create.end":               {`{"network": {"id": "n1", "tenant_id": "t"}}`, []string{"network.create delta network n1", "network gauge network n1"}},
		"network.delete.start":             {`{"network_id": "n1"}`, []string{"network.delete delta network n1", "network gauge network n1"}},
		"floatingip.update.end":            {`{"floatingip": {"id": "f1"}}`, []string{"ip.floating.update delta ip f1", "ip.floating gauge ip f1"}},
		"firewall_rule.create.end":         {`{"firewall_rule": {"id": "w1"}}`, []string{"firewall_rule.create delta firewall_rule w1", "firewall_rule gauge firewall_rule w1"}},
		"compute.instance.exists":          {`{"instance_id": "i1", "instance_type": "m1.small"}`, []string{"instance:m1.small gauge instance i1", "instance gauge instance i1"}},
		"scheduler.run_instance.scheduled": {`{"instance_id": "i1"}`, []string{"instance.scheduled delta instance i1"}},
		"image.update":                     {`{"id": "im"}`, []string{"image.update delta image im", "image gauge image im"}},
		"volume.attach.end":                {`{"volume_id": "v1"}`, []string{"volume.attach.end delta volume v1", "volume gauge volume v1"}},
		"orchestration.stack.create.end":   {`{"stack_identity": "s1"}`, []string{"stack.create delta stack s1"}},
		"identity.user.created":            {`{"resource_info": "x1"}`, []string{"identity.user.created delta user x1"}},
		"identity.OS-TRUST:trust.deleted":  {`{"resource_info": "x1"}`, []string{"identity.trust.deleted delta trust x1"}},
		"sahara.cluster.create":            {`{"cluster_id": "c1"}`, []string{"cluster.create delta cluster c1"}},
		"profiler.api":                     {`{"name": "wsgi-start", "base_id": "b1"}`, []string{"wsgi-start gauge trace profiler-b1"}},
	} {
		in := strings.Replace(strings.Replace(notification, "test.x", event, 1), `{"id": "r", "volume": 3}`, tc.payload, 1)
		lines, _, err := runConvert(t, in, "--set", "notification.disable_non_metric_meters=false")
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range lines[0]["samples"].([]any) {
			m := s.(map[string]any)
			got = append(got, fmt.Sprintf("%v %v %v %v", m["counter_name"], m["counter_type"], m["counter_unit"], m["resource_id"]))
			if m["counter_volume"] != 1.0 {
				t.Errorf("%s: volume %v", event, m["counter_volume"])
			}
		}
		if strings.Join(got, ", ") != strings.Join(tc.want, ", ") || len(lines[0]["errors"].([]any)) > 0 {
			t.Errorf("%s: got %q, want %q; errors %v", event, got, tc.want, lines[0]["errors"])
		}
	}
}

// TestSensorsOfIronic makes samples of Ironic's sensors; one that is invalid
// costs itself only.
func TestSensorsOfIronic(t *testing.T) {
	in := `{"_context_user": null, "publisher_id": "ironic.h", "event_type": "hardware.ipmi.metrics.update", "priority": "INFO",
		"message_id": "m", "timestamp": "2026-11-21 10:00:00",
		"payload": {"node_uuid": "n1", "timestamp": "2026-11-21T09:59:00", "event_type": "hardware.ipmi.metrics.update", "user_id": "u", "payload": {
			"Temperature": {"DIMM (0x3b)": {"Sensor ID": "DIMM GH VR Temp (0x3b)", "Sensor Reading": "26 (+/- 0.500) degrees C", "Entity ID": "20.6"}, "Off": {"Sensor ID": "a", "Sensor Reading": "Disabled"}, "Bad": {"Sensor ID": "b"}},
			"Current": {"Avg Power (0x2e)": {"Sensor ID": "Avg Power (0x2e)", "Sensor Reading": "130 (+/- 0) Watts"}},
			"Fan": {"FAN": {"Sensor ID": "FAN 1", "Sensor Reading": "fast"}}}}}`
	lines, _, err := runConvert(t, in)
	if err != nil {
		t.Fatal(err)
	}
	samples := lines[0]["samples"].([]any)
	if len(samples) != 2 || len(lines[0]["errors"].([]any)) != 0 {
		t.Fatalf("got %v", lines[0])
	}
	got := samples[0].(map[string]any)
	for key, want := range map[string]any{
		"counter_name": "hardware.ipmi.temperature", "counter_type": "gauge", "counter_unit": "C", "counter_volume": 26.0, "user_id": "u",
		"project_id": nil, "resource_id": "n1-dimm_gh_vr_temp_(0x3b)", "timestamp": "2026-11-21T09:59:00+00:00",
	} {
		if got[key] != want {
			t.Errorf("%s: got %v, want %v", key, got[key], want)
		}
	}
	meta := got["resource_metadata"].(map[string]any)
	if meta["node"] != "n1" || meta["host"] != "ironic.h" || meta["event_type"] != "hardware.ipmi.metrics.update" || meta["Entity ID"] != "20.6" {
		t.Errorf("metadata %v", meta)
	}
	if second := samples[1].(map[string]any); second["counter_name"] != "hardware.ipmi.current" || second["counter_unit"] != "W" || second["counter_volume"] != 130.0 {
		t.Errorf("got %v", second)
	}
}
