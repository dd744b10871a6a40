// Package test holds what needs more than one package.
package test

import (
	"bufio"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/kvmeter/kvmeter/"

// allowed says which folders a folder may import; a folder may always import
// itself. docs/architecture.md has the picture. A folder with a slash is a rule
// of its own.
var allowed = map[string][]string{
	"sample":         {},
	"diskqueue":      {},
	"gen":            {},
	"bpf":            {"gen"},
	"collectors":     {"sample", "bpf"},
	"bus":            {"sample"},
	"agent":          {"collectors", "bpf", "bus", "diskqueue", "sample"},
	"agent/client":   {},
	"agent/state":    {"sample"},
	"notifier":       {"bus", "diskqueue", "sample"},
	"central":        {"bus", "sample"},
	"central/client": {},
	"central/store":  {"sample"},
	"central/api":    {"central/store", "sample"},
	"central/export": {"central/store", "sample"},
	"cli":            {"central/client", "agent/client", "sample"},
	"cmd":            {"agent", "notifier", "central", "bus", "collectors", "bpf", "cli", "sample"},
	"test":           {"agent", "notifier", "central", "bus", "collectors", "bpf", "cli", "cmd", "diskqueue", "sample"},
}

// siblings are folders whose sub-folders must not import each other, apart
// from the tables named all.
var siblings = []string{"collectors", "notifier/publisher", "central/store"}

func TestImportsPointOneWay(t *testing.T) {
	for pkg, imports := range packages(t) {
		from, ok := rule(pkg)
		if !ok {
			t.Errorf("%s has no rule here: say what it may import", pkg)
			continue
		}
		for _, imp := range imports {
			if !permitted(from, pkg, imp) {
				t.Errorf("%s imports %s, which %s must not", pkg, imp, from)
			}
			for _, parent := range siblings {
				a, b := child(parent, pkg), child(parent, imp)
				if a != "" && b != "" && a != b && a != "all" && !strings.HasSuffix(a, "test") {
					t.Errorf("%s imports its sibling %s", pkg, imp)
				}
			}
		}
	}
}

// TestAgentLinksNoStore keeps the daemon of the compute hosts small.
func TestAgentLinksNoStore(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", module+"cmd/kvmeter-agent").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		for _, bad := range []string{"cockroachdb/pebble", "modernc.org/sqlite", module + "central", module + "notifier", module + "cli"} {
			if strings.Contains(dep, bad) {
				t.Errorf("kvmeter-agent links %s", dep)
			}
		}
	}
}

// packages returns the module's packages, and what each imports of the module.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, module+"...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := map[string][]string{}
	for lines := bufio.NewScanner(strings.NewReader(string(out))); lines.Scan(); {
		var ours []string
		words := strings.Fields(lines.Text())
		for _, imp := range words[1:] {
			if p, ok := strings.CutPrefix(imp, module); ok {
				ours = append(ours, p)
			}
		}
		all[strings.TrimPrefix(words[0], module)] = ours
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages only", len(all))
	}
	return all
}

// rule returns the longest folder of pkg that has a rule.
func rule(pkg string) (string, bool) {
	for p := pkg; p != ""; p = p[:max(0, strings.LastIndexByte(p, '/'))] {
		if _, ok := allowed[p]; ok {
			return p, true
		}
	}
	return "", false
}

func permitted(from, pkg, imp string) bool {
	if imp == from || strings.HasPrefix(imp, from+"/") || strings.SplitN(pkg, "/", 2)[0] == "test" && strings.HasPrefix(imp, "test/") {
		return true
	}
	for _, a := range allowed[from] {
		if imp == a || strings.HasPrefix(imp, a+"/") {
			return true
		}
	}
	return false
}

// child returns the name of parent's sub-folder that pkg is in, or "".
func child(parent, pkg string) string {
	rest, ok := strings.CutPrefix(pkg, parent+"/")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, "/")
	return name
}
