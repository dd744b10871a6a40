package pipeline_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
)

func TestLoad(t *testing.T) {
	for name, tc := range map[string]struct {
		file      string
		pipelines []string // "name: url url"
	}{
		"the built-in pipeline sends everything to the store": {
			pipeline.Default, []string{"meter_source:meter_sink: store://"},
		},
		"each source with each of its sinks is a pipeline, and sinks share publishers": {`
sources:
- {name: a, meters: ["*"], sinks: [x, y]}
- {name: b, meters: ["!cpu"], sinks: [y]}
sinks:
- name: x
  transformers: []
  publishers: [store, "file:///tmp/x?json"]
- name: y
  transformers:
  publishers: ["store://"]
`, []string{"a:x: store:// file:///tmp/x?json", "a:y: store://", "b:y: store://"}},
		"anchors and comments are YAML's own": {`
sources:
- &s {name: a, meters: &m ["*"], sinks: &k [x]} # all
- {name: b, meters: *m, sinks: *k}
sinks: [{name: x, publishers: [store://]}]
`, []string{"a:x: store://", "b:x: store://"}},
		"merged keys are YAML's own, too": {`
all: &all {meters: "*", sinks: [x]}
sources:
- {<<: *all, name: a}
- {name: b, meters: [cpu], <<: *all}
sinks: [{name: x, publishers: [store://]}]
`, []string{"a:x: store://", "b:x: store://"}},
		"a source and a sink of one name give it to their pipeline": {
			"sources: [{name: a, meters: ['*'], sinks: [a]}]\nsinks: [{name: a, publishers: [store://]}]", []string{"a: store://"},
		},
		"the list of pipelines of old": {`
- name: all
  interval: 600
  meters: ["*", "!cpu"]
  resources: []
  transformers:
  publishers: [rpc://]
- name: cpu
  counters: [cpu]
  transformers: [{name: rate_of_change}]
  publishers: [rpc://, udp://host]
`, []string{"all: rpc://", "cpu: rpc:// udp://host"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, err := pipeline.Load("pipeline.yaml", []byte(tc.file))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range cfg.Pipelines {
				text := p.Name + ":"
				for _, i := range cfg.Sinks[p.Sink].Targets {
					text += " " + cfg.Targets[i].Name
				}
				got = append(got, text)
			}
			if diff := cmp.Diff(tc.pipelines, got); diff != "" {
				t.Errorf("pipelines (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadEvents(t *testing.T) {
	cfg, err := pipeline.LoadEvents("e.yaml", []byte(pipeline.DefaultEvents))
	if err != nil || len(cfg.Pipelines) != 1 || cfg.Pipelines[0].Name != "event:event_source:event_sink" {
		t.Errorf("got %+v, %v", cfg, err)
	}
	_, err = pipeline.LoadEvents("e.yaml", []byte("sources: [{name: a, events: ['*'], sinks: [k]}]\nsinks: [{name: k, transformers: [{name: delta}], publishers: [store://]}]"))
	if err == nil || err.Error() != "e.yaml:2: events have no transformers" {
		t.Errorf("got %v", err)
	}
	for file, want := range map[string]bool{
		pipeline.Default: false, pipeline.DefaultEvents: true, "- {name: a, events: ['*'], publishers: [x]}": true, "a": false, "": false, "[": false,
		"sources: [{meters: [a]}, {events: [b]}]": false,
	} {
		if got := pipeline.HasEvents([]byte(file)); got != want {
			t.Errorf("HasEvents(%q) is %v", file, got)
		}
	}
}

func TestLoadWarns(t *testing.T) {
	cfg, err := pipeline.Load("p.yaml", []byte(`
owner: me
sources:
- name: a
  interval: 600
  meters: ["*"]
  sinks: [k]
sinks:
- name: k
  publishers: [store://]
  transformers:
  - name: rate_of_change
    parameters:
      max: 100
      source: {map_from: {name: a}}
      target: {scale: 2}
  - name: delta
    parameters: {target: {name: d, scale: 5}, size: 1}
  - name: aggregator
    parameters: {user_id: drop, timestamp: never, resource_metadata: both}
- name: unused
  publishers: [store, "store://"]
  name: unused
`))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range cfg.Warnings() {
		got = append(got, w.Error())
	}
	want := []string{
		`p.yaml:2: unknown key "owner" in the file; it is ignored`,
		`p.yaml:5: "interval" has no effect here; what is polled, and how often, is said in polling.yaml`,
		`p.yaml:12: a numeric scale multiplies the rate by the volume, too; write it as text, as in scale: "2"`,
		`p.yaml:14: max belongs into target; here it is ignored`,
		`p.yaml:15: map_from has a name, but map_to has none; it is ignored`,
		`p.yaml:17: delta renames only: scale, max, type and the source's unit are ignored`,
		`p.yaml:18: transformer delta has no parameter "size"; it is ignored`,
		`p.yaml:20: resource_metadata is "both", which is neither first nor last; it is taken for last`,
		`p.yaml:20: timestamp is "never", which is neither first nor last; it is taken for first`,
		`p.yaml:20: user_id is "drop", which is neither first nor last; it is taken for last`,
		`p.yaml:21: no source leads to sink "unused"`,
		`p.yaml:22: this publisher is listed twice in the sink; it gets everything once`,
		`p.yaml:23: "name" is there twice, first on line 21; the last one counts`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

const sinks = "\nsinks: [{name: k, publishers: [store://]}]"

var bad = map[string]struct{ file, want string }{
	"an empty file": {"", "p.yaml: it is empty"},
	"a comment":     {"# nothing", "p.yaml: it is empty"},
	"a broken line": {"sources:\n- name: a\n  meters: ['*'\n", "p.yaml:2: did not find expected ',' or ']'"},
	"a star without quotes": {
		"sources:\n- name: a\n  meters: [*]\n",
		`p.yaml:3: did not find expected alphabetic or numeric character (a text that begins with *, & or ! needs quotes: "*")`,
	},
	"a list of anything but pipelines":    {"- a", "p.yaml:1: a pipeline is no mapping of keys to values"},
	"text instead of a mapping":           {"a", "p.yaml:1: the file is no mapping of keys to values"},
	"no sinks":                            {"sources: [{name: a, meters: ['*'], sinks: [k]}]", "p.yaml:1: sinks are missing"},
	"no sources":                          {"sinks: [{name: k, publishers: [store://]}]", "p.yaml:1: sources are missing"},
	"no source at all":                    {"sources: []" + sinks, "p.yaml:1: no source leads to a sink"},
	"an unknown key beside missing ones":  {"sorces: []" + sinks, "p.yaml:1: sources are missing\np.yaml:1: unknown key \"sorces\" in the file; it is ignored"},
	"an unknown key for a needed one":     {"sources:\n- name: a\n  meter: ['*']\n  sinks: [k]" + sinks, "p.yaml:2: source \"a\" has no meters\np.yaml:3: unknown key \"meter\" in a source; it is ignored"},
	"a source without a name":             {"sources:\n- {meters: ['*'], sinks: [k]}" + sinks, "p.yaml:2: a source without a name"},
	"a source without meters":             {"sources:\n- {name: a, sinks: [k]}" + sinks, `p.yaml:2: source "a" has no meters`},
	"a source without sinks":              {"sources:\n- {name: a, meters: ['*']}" + sinks, `p.yaml:2: source "a" has no sinks`},
	"meters that are no list":             {"sources:\n- name: a\n  meters: cpu\n  sinks: [k]" + sinks, "p.yaml:3: meters is no list"},
	"names both included and excluded":    {"sources:\n- name: a\n  meters: [cpu, '!disk']\n  sinks: [k]" + sinks, `p.yaml:3: source "a": meters: both included ("cpu") and excluded ("!disk") names`},
	"a source that is defined twice":      {"sources:\n- {name: a, meters: ['*'], sinks: [k]}\n- {name: a, meters: ['*'], sinks: [k]}" + sinks, `p.yaml:3: source "a" is defined twice, first on line 2`},
	"a sink that is defined twice":        {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- {name: k, publishers: [store://]}\n- {name: k, publishers: [store://]}", `p.yaml:4: sink "k" is defined twice, first on line 3`},
	"a sink that is not defined":          {"sources:\n- name: a\n  meters: ['*']\n  sinks:\n  - x" + sinks, `p.yaml:5: source "a": sink "x" is not defined`},
	"a sink that is listed twice":         {"sources:\n- name: a\n  meters: ['*']\n  sinks:\n  - k\n  - k" + sinks, `p.yaml:6: source "a": sink "k" is listed twice`},
	"a sink without publishers":           {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k", `p.yaml:3: sink "k" has no publishers`},
	"a publisher that is no URL":          {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: ['http://u:p%zz@h/']", "p.yaml:4: a publisher is no URL of the form scheme://host/path?option=value"},
	"an unknown transformer":              {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - name: rate", `p.yaml:6: there is no transformer "rate"; there are accumulator, aggregator, arithmetic, delta, rate_of_change, unit_conversion`},
	"a transformer without a name":        {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - parameters: {}", `p.yaml:6: a transformer without a name`},
	"a scale that is no expression":       {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - name: unit_conversion\n    parameters:\n      target:\n        scale: 'volume *'", `p.yaml:9: the expression ends too early, at character 9 of "volume *"`},
	"a function in a scale":               {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: rate_of_change, parameters: {target: {scale: 'min(volume, 1)'}}}", `p.yaml:6: a function call; expressions have operators only, at character 4 of "min(volume, 1)"`},
	"a scale that is a list":              {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: rate_of_change, parameters: {target: {scale: [1]}}}", `p.yaml:6: scale is no number`},
	"another meter in a scale":            {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: rate_of_change, parameters: {target: {scale: '$(cpu)'}}}", `p.yaml:6: $(cpu) can be used in arithmetic only; the sample's own number is volume`},
	"a wrong regular expression":          {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: rate_of_change, parameters: {source: {map_from: {name: 'a('}}, target: {map_to: {name: 'x'}}}}", `p.yaml:6: regular expression "a("`},
	"a group that is not there":           {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: rate_of_change, parameters: {source: {map_from: {name: '(a)'}}, target: {map_to: {name: '\\2'}}}}", `p.yaml:6: the replacement "\\2": there is no group 2 in the expression, which has 1`},
	"arithmetic without an expression":    {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: arithmetic, parameters: {target: {name: x}}}", `p.yaml:6: arithmetic needs target.expr, as in expr: "$(memory.usage) / $(memory)"`},
	"arithmetic without a meter":          {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: arithmetic, parameters: {target: {expr: '1'}}}", `p.yaml:6: the expression names no meter: write it as $(name)`},
	"a size that is no number":            {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: accumulator, parameters: {size: many}}", `p.yaml:6: size is no number`},
	"a flag that is none":                 {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: delta, parameters: {growth_only: perhaps}}", `p.yaml:6: growth_only is neither true nor false`},
	"parameters that are a list":          {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: [store://]\n  transformers:\n  - {name: delta, parameters: [a]}", `p.yaml:6: parameters is no mapping of keys to values`},
	"a second document":                   {"sources: [{name: a, meters: ['*'], sinks: [k]}]" + sinks + "\n---\na: b\n", "p.yaml:3: a second document; write one"},
	"two mistakes, both of which it says": {"sources: 1\nsinks: 2", "p.yaml:1: sources is no list\np.yaml:2: sinks is no list"},
}

func TestLoadSaysWhatIsWrongAndWhere(t *testing.T) {
	for name, tc := range bad {
		t.Run(name, func(t *testing.T) {
			_, err := pipeline.Load("p.yaml", []byte(tc.file))
			if err == nil || !strings.HasPrefix(err.Error(), tc.want) {
				t.Errorf("got  %v\nwant %s", err, tc.want)
			}
		})
	}
}

// TestLoadSaysEverythingThatIsWrong does not stop at the first mistake.
func TestLoadSaysEverythingThatIsWrong(t *testing.T) {
	_, err := pipeline.Load("p.yaml", []byte(`
sources:
- meters: [cpu, "!disk"]
  sinks: [k, x]
- {name: b, meters: [], sinks: []}
- {name: b, sinks: [k]}
sinks:
- {name: k, publishers: ["http://u:p%zz@h/"]}
- name: l
  publishers: []
  transformers:
  - {name: rate}
  - {name: unit_conversion, parameters: {target: {scale: "1 +"}}}
- {publishers: [store://]}
`))
	want := `p.yaml:3: a source without a name
p.yaml:3: source "": meters: both included ("cpu") and excluded ("!disk") names: exclude from a wildcard such as "*", or list names only
p.yaml:4: source "": sink "x" is not defined
p.yaml:5: source "b" has no meters
p.yaml:5: source "b" has no sinks
p.yaml:6: source "b" has no meters
p.yaml:6: source "b" is defined twice, first on line 5
p.yaml:8: a publisher is no URL of the form scheme://host/path?option=value
p.yaml:10: sink "l" has no publishers
p.yaml:12: there is no transformer "rate"; there are accumulator, aggregator, arithmetic, delta, rate_of_change, unit_conversion
p.yaml:13: the expression ends too early, at character 4 of "1 +"
p.yaml:14: a sink without a name`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(pipeline.Default)
	for _, tc := range bad {
		f.Add(tc.file)
	}
	f.Add("a: &a [*a]")
	f.Add("sources: &a\n- *a\nsinks: *a")
	f.Fuzz(func(t *testing.T, file string) {
		cfg, err := pipeline.Load("p.yaml", []byte(file))
		switch {
		case err == nil && len(cfg.Pipelines) == 0:
			t.Error("no error and no pipeline")
		case err != nil && !strings.HasPrefix(err.Error(), "p.yaml"):
			t.Errorf("the error does not name the file: %v", err)
		}
		if err != nil {
			return
		}
		for _, p := range cfg.Pipelines {
			if len(cfg.Sinks[p.Sink].Targets) == 0 || p.Match == nil {
				t.Errorf("pipeline %q has no publisher or no meters", p.Name)
			}
		}
	})
}
