//go:build lab

package conversion

import (
	"encoding/json"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
)

// takes is what a pipeline is to the oracle.
type takes struct {
	Name       string
	Takes      []string
	Publishers int
}

// TestGeneratedPipelinesTakeWhatThoseOfCeilometerTake makes files of pipelines at
// random and asks Ceilometer's own code about them. One without any pipeline is
// refused here only.
func TestGeneratedPipelinesTakeWhatThoseOfCeilometerTake(t *testing.T) {
	ask := startOracle(t)
	g := &generator{rand.New(rand.NewPCG(*oracleSeed, 1))}
	names := []string{"cpu", "cpu.delta", "disk.read", "disk.write.bytes", "network", "Cpu", "a[b]", "c", "x\ny", "!", "*"}
	refused, taken := 0, 0
	for i := range *oracleCases {
		kind, load, key := "sample pipeline", pipeline.Load, "meters"
		if g.maybe(3) {
			kind, load, key = "event pipeline", pipeline.LoadEvents, "events"
		}
		file, err := json.Marshal(g.pipelines(key))
		if err != nil {
			t.Fatal(err)
		}
		question, err := json.Marshal(map[string]any{"kind": kind, "definitions": string(file), "options": []string{}, "inputs": names})
		if err != nil {
			t.Fatal(err)
		}
		var want struct {
			Refused bool
			Why     string
			Answers []takes
		}
		ask(question, &want)
		cfg, err := load("p.yaml", file)
		if want.Refused || len(want.Answers) == 0 {
			if refused++; err == nil {
				t.Errorf("case %d of seed %d is not refused: %s\n%s", i, *oracleSeed, want.Why, file)
			}
			continue
		}
		if err != nil {
			t.Errorf("case %d of seed %d: %v\n%s", i, *oracleSeed, err, file)
			continue
		}
		got := make([]takes, len(cfg.Pipelines))
		for k, p := range cfg.Pipelines {
			got[k] = takes{p.Name, []string{}, len(cfg.Sinks[p.Sink].Targets)}
			for _, name := range names {
				if p.Match.Match(name) {
					got[k].Takes = append(got[k].Takes, name)
				}
			}
			taken += len(got[k].Takes)
		}
		if diff := cmp.Diff(want.Answers, got); diff != "" {
			t.Errorf("case %d of seed %d (-Ceilometer +kvmeter):\n%s\n%s", i, *oracleSeed, diff, file)
		}
	}
	t.Logf("%d names are taken, %d files refused", taken, refused)
	if taken < *oracleCases {
		t.Errorf("%d names are taken in %d cases: the generator makes nothing that counts", taken, *oracleCases)
	}
}

// pipelines makes a file whose sources list what key says.
func (g *generator) pipelines(key string) any {
	list := func(n int, of ...string) []any {
		all := make([]any, n)
		for i := range all {
			all[i] = g.one(of...)
		}
		return all
	}
	odd := func(m map[string]any) {
		if g.maybe(40) {
			keys := []string{"name", "sinks", "publishers", key, "other"}
			k := keys[g.IntN(len(keys))]
			if g.maybe(2) {
				delete(m, k)
			} else {
				m[k] = []any{[]any{}, map[string]any{}, []any{[]any{}}}[g.IntN(3)]
			}
		}
	}
	sources, sinks := make([]any, 1+g.IntN(3)), make([]any, 3)
	sinkNames := []string{"k1", "k2", "both"}
	for i := range sources {
		s := map[string]any{"name": []string{"s1", "both", "s3"}[i], "sinks": []any{sinkNames[g.IntN(3)]}}
		if g.maybe(3) {
			s["sinks"] = list(1+g.IntN(2), "k1", "k1", "k2", "both", "k3")
		}
		if g.maybe(10) {
			s["name"] = "s1"
		}
		switch g.IntN(4) {
		case 0:
			s[key] = list(1+g.IntN(2), "*", "*.bytes", "*[", "*\ny", "**")
		case 1:
			s[key] = append(list(1, "*"), list(g.IntN(3), "!cpu", "!cpu*", "!disk.*", "!", "!!", "!a[[]b]")...)
		case 2:
			s[key] = list(1+g.IntN(3), "cpu", "disk.*", "c?u", "[cC]pu", "[!c]*", "a[b]", "a[[]b[]]", "[a-d]*", "[", "[]", "[!]", "n[", "?")
		case 3:
			s[key] = list(1+g.IntN(3), "cpu", "*", "!cpu", "!*", "disk.*", "*.*")
		}
		if g.maybe(10) {
			s[key] = "*"
		}
		odd(s)
		sources[i] = s
	}
	for i := range sinks {
		k := map[string]any{"name": sinkNames[i], "publishers": list(1+g.IntN(3), "test://", "test", "test://x?y=1", "test://z")}
		if g.maybe(20) {
			k["name"] = "k1"
		}
		odd(k)
		sinks[i] = k
	}
	return map[string]any{"sources": sources, "sinks": sinks}
}
