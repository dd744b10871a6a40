package pipeline

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDispatchersStandForTheBusToTheCollector(t *testing.T) {
	const file = `
sources: [{name: s, meters: ["*"], sinks: [a, b, c]}]
sinks:
  - {name: a, publishers: ["notifier://"]}
  - {name: b, publishers: ["udp://h", "rpc://?target=x", "file:///f"]}
  - {name: c, publishers: ["notifier://elsewhere"]}
`
	for name, tc := range map[string]struct {
		dispatchers []string
		want        map[string][]string
	}{
		"none leaves all":            {nil, map[string][]string{"a": {"notifier:"}, "b": {"udp://h", "rpc:?target=x", "file:///f"}, "c": {"notifier://elsewhere"}}},
		"several stand for each":     {[]string{"store://", "http://h/x"}, map[string][]string{"a": {"store:", "http://h/x"}, "b": {"udp://h", "store:", "http://h/x", "file:///f"}, "c": {"notifier://elsewhere"}}},
		"one that is there is taken": {[]string{"file:///f"}, map[string][]string{"a": {"file:///f"}, "b": {"udp://h", "file:///f"}, "c": {"notifier://elsewhere"}}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Load("pipeline.yaml", []byte(file))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Dispatch(tc.dispatchers); err != nil {
				t.Fatal(err)
			}
			got := map[string][]string{}
			used := map[int]bool{}
			for _, s := range c.Sinks {
				for _, n := range s.Targets {
					got[s.Name] = append(got[s.Name], c.Targets[n].URL.String())
					used[n] = true
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("sinks (-want +got):\n%s", diff)
			}
			if len(used) != len(c.Targets) {
				t.Errorf("%d publishers would be opened, %d are used", len(c.Targets), len(used))
			}
		})
	}
	c, err := Load("pipeline.yaml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Dispatch([]string{"%"}); err == nil {
		t.Error("no error about a dispatcher that is no URL")
	}
}
