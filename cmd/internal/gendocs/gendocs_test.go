package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	collectors "github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
)

const root = "../../.."

// TestPagesAreFresh fails where `go generate ./...` would change a page.
func TestPagesAreFresh(t *testing.T) {
	fresh, err := pages(root)
	if err != nil {
		t.Fatal(err)
	}
	for name, page := range fresh {
		if diff := cmp.Diff(string(page), read(t, filepath.Join(root, "docs", name))); diff != "" {
			t.Errorf("docs/%s is stale, run `go generate ./...` (-fresh +got):\n%s", name, diff)
		}
	}
}

func TestPageIsTheSameForEveryUser(t *testing.T) {
	for _, name := range []string{"HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"} {
		t.Setenv(name, "/somewhere")
	}
	page, err := configPage(root)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(page), "/somewhere") {
		t.Error("the page has paths of the user who makes it")
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestVariablesOfThePageWork sets each to something that is not its default.
func TestVariablesOfThePageWork(t *testing.T) {
	c := comments{root: root}
	for i, f := range files() {
		settings, err := list(reflect.ValueOf(f.defaults).Elem(), "", c.of)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range settings {
			value := map[string]string{"whole number": "77", "number": "7.5", "duration": "77s", "`true` or `false`": "true", "list of texts": "[elsewhere]", "path, or list of paths": os.DevNull, "`{NAME: TEXT, …}`": "{a: b}", "`true`, `false`, or list of names and patterns": "[instance]", "`{NAME: VALUE, …}`": "{x-expires: 77}"}[s.kind]
			if strings.HasPrefix(s.kind, "`{PATTERN: {") {
				value = `{"*": {absolute: 77}}`
			}
			if strings.HasPrefix(s.kind, "`{PATTERN: [") {
				value = `{"*": [walk]}`
			}
			switch {
			case value == "":
				value = "/elsewhere"
			case s.value == "`true`":
				value = "false"
			}
			got := files()[i].defaults
			if _, err := config.Load("", []string{s.variable() + "=" + value}, got); err != nil {
				t.Errorf("%s: %v", f.name, err)
			} else if reflect.DeepEqual(got, f.defaults) {
				t.Errorf("%s: %s=%s changes nothing", f.name, s.variable(), value)
			}
		}
	}
}

// section is in the tests' structs.
type section struct {
	MinFree uint64        `yaml:"min_free"`
	Every   time.Duration `yaml:"every"`
}

type inner struct {
	On bool `yaml:"on"`
}

func TestList(t *testing.T) {
	comments := map[string]string{
		"inner.On":        "On switches it on.\n",
		"section.MinFree": "MinFree is the floor of\nfree space in <bytes>.\n",
		"section.Every":   "Every poll | scan.\n",
	}
	comment := func(t reflect.Type, field string) (string, error) {
		if t.Name() == "" && field != "Bare" {
			return field + " is a setting.", nil
		}
		return comments[t.Name()+"."+field], nil
	}
	for name, tc := range map[string]struct {
		defaults any
		want     []setting
		err      string
	}{
		"sections are dotted and inline ones are not": {
			defaults: struct {
				inner  `yaml:",inline"`
				Store  section `yaml:"store"`
				Hidden int     `yaml:"-"`
			}{Store: section{1 << 30, 90 * time.Minute}},
			want: []setting{
				{"on", "`true` or `false`", "`false`", "Switches it on."},
				{"store.min_free", "whole number", "`1073741824` (1 GiB)", "The floor of free space in &lt;bytes>."},
				{"store.every", "duration", "`1h30m`", `Every poll \| scan.`},
			},
		},
		"a field without a comment is an error": {
			defaults: struct {
				Bare string `yaml:"bare"`
			}{},
			err: "Bare string \"yaml:\\\"bare\\\"\" }.Bare has no doc comment",
		},
		"a field without a tag is an error": {
			defaults: struct{ Name string }{},
			err:      "Name string }.Name has no yaml tag",
		},
		"a field whose type has no words is an error": {
			defaults: struct {
				Ratio float32 `yaml:"ratio"`
			}{},
			err: ".Ratio is a float32: say in types what that looks like",
		},
		"a section's mistake is found": {
			defaults: struct {
				Part struct {
					Bare int `yaml:"bare"`
				} `yaml:"part"`
			}{},
			err: ".Bare has no doc comment",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := list(reflect.ValueOf(tc.defaults), "", comment)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("got  %v\nwant %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(setting{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestCommentsAreReadFromTheSource(t *testing.T) {
	dir := t.TempDir()
	source := `package p

// Config is read.
type Config struct {
	// Node is the name of
	// this host.
	Node string
	Bare int // is no doc comment
}

// T is no struct.
type T int
`
	if err := os.WriteFile(filepath.Join(dir, "p.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := parseFields(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"Config.Node": "Node is the name of\nthis host.\n", "Config.Bare": ""}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := os.WriteFile(filepath.Join(dir, "q.go"), []byte("package p\nbroken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := parseFields(dir); err == nil {
		t.Error("source that can't be read is no error")
	}
}

func TestFamilies(t *testing.T) {
	done := func() error { return nil }
	for name, tc := range map[string]struct {
		collector prometheus.Collector
		want      string // labels
		err       string
	}{
		"a metric with labels is listed before it has a value": {
			collector: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "x", Help: "h"}, []string{"a", "b"}), want: "a b",
		},
		"a metric without labels is listed": {
			collector: prometheus.NewGauge(prometheus.GaugeOpts{Name: "x", Help: "h"}),
		},
		"a metric that could not be listed is an error": {
			collector: prometheus.NewSummaryVec(prometheus.SummaryOpts{Name: "x", Help: "h"}, []string{"a"}),
			err:       "1 are registered, of which 0 have a value",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := families(func(r prometheus.Registerer) (func() error, error) { return done, r.Register(tc.collector) })
			if tc.err != "" {
				if err == nil || err.Error() != tc.err {
					t.Errorf("got %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil || len(got) != 1 {
				t.Fatalf("%d metrics and error %v", len(got), err)
			}
			var names []string
			for _, l := range got[0].GetMetric()[0].GetLabel() {
				names = append(names, l.GetName())
			}
			if strings.Join(names, " ") != tc.want {
				t.Errorf("labels %q, want %s", names, tc.want)
			}
		})
	}
	broken := errors.New("broken")
	if _, err := families(func(prometheus.Registerer) (func() error, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
}

// example is a file in a page: a block of YAML whose first line is a comment
// with its path.
var example = regexp.MustCompile("(?ms)^```yaml\n# (?:[^\n]*/)?([a-z]+\\.yaml)[^\n]*\n.*?^```$")

// TestExamplesLoad gives the files in the pages to the programs' own loaders.
func TestExamplesLoad(t *testing.T) {
	seen := map[string]int{}
	for _, page := range []string{"config.md", "run.md", "pipeline.md"} {
		for _, m := range example.FindAllStringSubmatch(read(t, filepath.Join(root, "docs", page)), -1) {
			block, name := m[0], m[1]
			seen[name]++
			text := strings.TrimSuffix(strings.TrimPrefix(block, "```yaml\n"), "```")
			if err := load(t, name, text); err != nil {
				t.Errorf("docs/%s: %s: %v", page, name, err)
			}
			// A mistake would be found.
			if err := load(t, name, text+"\nnobody_knows: 1\n"); err == nil {
				t.Errorf("docs/%s: %s: an unknown key is no error", page, name)
			}
		}
	}
	for _, name := range []string{"agent.yaml", "notifier.yaml", "central.yaml", "polling.yaml", "pipeline.yaml"} {
		if seen[name] == 0 {
			t.Errorf("no page has an example of %s", name)
		}
	}
}

func load(t *testing.T, name, text string) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	switch name {
	case "polling.yaml":
		cfg := agent.DefaultConfig()
		cfg.Socket, cfg.Counters, cfg.Libvirt, cfg.Polling = "", "", nil, path
		readers, _ := collectors.Usage(zap.NewNop(), true)
		_, err := agent.New(cfg, agent.Deps{Log: zap.NewNop(), Usage: readers})
		if odd, _ := agent.CheckPolling([]byte(text)); err == nil && len(odd) > 0 {
			err = errors.New(odd[0])
		}
		return errors.Join(err, collectors.Close(readers))
	case "pipeline.yaml":
		cfg, err := pipeline.Load(path, []byte(text))
		if err != nil {
			return err
		}
		return errors.Join(cfg.Warnings()...)
	case "agent.yaml":
		cfg := compute.DefaultAgent()
		_, err := config.Load(path, nil, &cfg)
		return errors.Join(err, cfg.Check())
	case "notifier.yaml":
		cfg := control.DefaultNotifier(config.Dirs{})
		_, err := config.Load(path, nil, &cfg)
		return err
	case "central.yaml":
		cfg := control.DefaultCentral(config.Dirs{})
		_, err := config.Load(path, nil, &cfg)
		return err
	}
	t.Fatalf("there is no %s", name)
	return nil
}
