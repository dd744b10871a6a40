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
	} {
		t.Run(name, func(t *testing.T) {
			cfg, err := pipeline.Load("pipeline.yaml", []byte(tc.file))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range cfg.Pipelines {
				text := p.Name + ":"
				for _, i := range p.Targets {
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

const sinks = "\nsinks: [{name: k, publishers: [store://]}]"

var bad = map[string]struct{ file, want string }{
	"an empty file": {"", "p.yaml: it is empty; it needs sources and sinks"},
	"a comment":     {"# nothing", "p.yaml: it is empty; it needs sources and sinks"},
	"a broken line": {"sources:\n- name: a\n  meters: ['*'\n", "p.yaml:2: did not find expected ',' or ']'"},
	"a star without quotes": {
		"sources:\n- name: a\n  meters: [*]\n",
		`p.yaml:3: did not find expected alphabetic or numeric character (a pattern that begins with * or ! needs quotes: "*")`,
	},
	"a list instead of a mapping":         {"- a", "p.yaml:1: the file is no mapping of keys to values"},
	"no sinks":                            {"sources: [{name: a, meters: ['*'], sinks: [k]}]", "p.yaml:1: sinks are missing\np.yaml:1: source \"a\": sink \"k\" is not defined"},
	"no sources":                          {"sinks: [{name: k, publishers: [store://]}]", "p.yaml:1: sources are missing"},
	"no source at all":                    {"sources: []" + sinks, "p.yaml:1: no source leads to a sink"},
	"an unknown key at the top":           {"sorces: []" + sinks, `p.yaml:1: unknown key "sorces" in the file`},
	"an unknown key of a source":          {"sources:\n- name: a\n  meter: ['*']\n  sinks: [k]" + sinks, `p.yaml:3: unknown key "meter" in a source`},
	"a key of the polling half":           {"sources:\n- name: a\n  interval: 600\n  meters: ['*']\n  sinks: [k]" + sinks, `p.yaml:3: "interval" is not read here; how often meters are polled is said in polling.yaml`},
	"a key that is set twice":             {"sources:\n- name: a\n  name: b\n  meters: ['*']\n  sinks: [k]" + sinks, `p.yaml:3: "name" is set twice in a source, first on line 2`},
	"a source without a name":             {"sources:\n- {meters: ['*'], sinks: [k]}" + sinks, "p.yaml:2: a source without a name"},
	"a source without meters":             {"sources:\n- {name: a, sinks: [k]}" + sinks, `p.yaml:2: source "a": meters: the list of names is empty`},
	"a source without sinks":              {"sources:\n- {name: a, meters: ['*']}" + sinks, `p.yaml:2: source "a" has no sinks`},
	"meters that are no list":             {"sources:\n- name: a\n  meters: '*'\n  sinks: [k]" + sinks, "p.yaml:3: meters is no list"},
	"names both included and excluded":    {"sources:\n- name: a\n  meters: [cpu, '!disk']\n  sinks: [k]" + sinks, `p.yaml:3: source "a": meters: both included ("cpu") and excluded ("!disk") names`},
	"a source that is defined twice":      {"sources:\n- {name: a, meters: ['*'], sinks: [k]}\n- {name: a, meters: ['*'], sinks: [k]}" + sinks, `p.yaml:3: source "a" is defined twice, first on line 2`},
	"a sink that is defined twice":        {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- {name: k, publishers: [store://]}\n- {name: k, publishers: [store://]}", `p.yaml:4: sink "k" is defined twice, first on line 3`},
	"a sink that is not defined":          {"sources:\n- name: a\n  meters: ['*']\n  sinks:\n  - x" + sinks, `p.yaml:5: source "a": sink "x" is not defined`},
	"a sink that is listed twice":         {"sources:\n- name: a\n  meters: ['*']\n  sinks:\n  - k\n  - k" + sinks, `p.yaml:6: source "a": sink "k" is listed twice`},
	"a sink without publishers":           {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k", `p.yaml:3: sink "k" has no publishers`},
	"a publisher that is listed twice":    {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers:\n  - store://\n  - store://", "p.yaml:6: this publisher is listed twice in the sink"},
	"a publisher that is no URL":          {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  publishers: ['http://u:p%zz@h/']", "p.yaml:4: a publisher is no URL of the form scheme://host/path?option=value"},
	"a transformer":                       {"sources: [{name: a, meters: ['*'], sinks: [k]}]\nsinks:\n- name: k\n  transformers:\n  - name: rate_of_change\n  publishers: [store://]", "p.yaml:5: transformers are not supported; leave the list empty and compute from the stored samples"},
	"a second document":                   {"sources: [{name: a, meters: ['*'], sinks: [k]}]" + sinks + "\n---\na: b\n", "p.yaml:3: a second document; one is read"},
	"two mistakes, both of which it says": {"x: 1\ny: 2", "p.yaml:1: unknown key \"x\" in the file\np.yaml:2: unknown key \"y\" in the file"},
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
			if len(p.Targets) == 0 || p.Meters == nil {
				t.Errorf("pipeline %q has no publisher or no meters", p.Name)
			}
		}
	})
}
