package test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/sample"
)

// rules are what packaging/prometheus has.
type rules struct {
	Groups []struct {
		Rules []struct{ Record, Alert, Expr string }
	}
}

// TestRulesAndDashboardsAskForWhatThereIs holds each metric that a rule or a
// dashboard names against docs/metrics.md, which is made of what the programs
// register, and against the catalogue of meters.
func TestRulesAndDashboardsAskForWhatThereIs(t *testing.T) {
	known := map[string]bool{}
	page, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(kvmeter_\\w+)` \\| (\\w+) ").FindAllStringSubmatch(string(page), -1) {
		known[m[1]] = true
		if m[2] == "histogram" {
			known[m[1]+"_bucket"] = true
		}
	}
	for _, m := range sample.Catalogue {
		known["ceilometer_"+strings.NewReplacer(".", "_", "-", "_").Replace(m.Name)] = true
	}
	exprs := map[string][]string{} // by file

	text, err := os.ReadFile("../packaging/prometheus/kvmeter.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	var r rules
	if err := yaml.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for _, g := range r.Groups {
		for _, rule := range g.Rules {
			if rule.Record != "" {
				known[rule.Record] = true
			}
			exprs["kvmeter.rules.yml"] = append(exprs["kvmeter.rules.yml"], rule.Expr)
		}
	}

	dashboards, err := filepath.Glob("../packaging/grafana/*.json")
	if err != nil || len(dashboards) < 2 {
		t.Fatalf("got dashboards %v, %v", dashboards, err)
	}
	for _, path := range dashboards {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var d struct {
			UID        string
			Templating struct{ List []struct{ Query string } }
			Panels     []struct {
				Title   string
				Targets []struct{ Expr string }
			}
		}
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if d.UID != strings.TrimSuffix(filepath.Base(path), ".json") {
			t.Errorf("%s has the uid %q", path, d.UID)
		}
		for _, v := range d.Templating.List {
			exprs[path] = append(exprs[path], v.Query)
		}
		for _, p := range d.Panels {
			if len(p.Targets) == 0 {
				t.Errorf("%s: %q shows nothing", path, p.Title)
			}
			for _, target := range p.Targets {
				exprs[path] = append(exprs[path], target.Expr)
			}
		}
	}

	names := regexp.MustCompile(`\b(?:kvmeter|ceilometer|project:kvmeter)_[a-z_]+(?::rate\w+)?`)
	quoted := regexp.MustCompile(`"[^"]*"`)
	alternatives := regexp.MustCompile(`__name__=~"kvmeter_\((\w+)\|(\w+)\)_(\w+)"`)
	for file, all := range exprs {
		found := 0
		for _, expr := range all {
			for _, m := range alternatives.FindAllStringSubmatch(expr, -1) {
				expr += " kvmeter_" + m[1] + "_" + m[3] + " kvmeter_" + m[2] + "_" + m[3]
			}
			for _, name := range names.FindAllString(quoted.ReplaceAllString(expr, ""), -1) {
				found++
				if !known[name] {
					t.Errorf("%s asks for %s, which nothing exposes", file, name)
				}
			}
		}
		if found < 10 {
			t.Errorf("%s names %d metrics only", file, found)
		}
	}
}
