package central

import (
	"testing"

	"github.com/kvmeter/kvmeter/sample"
)

func TestTwoLiveEpochsOfANodeAreAnAlarm(t *testing.T) {
	const minute = 60e6
	type seen struct {
		node  string
		epoch uint64
		at    int64 // minutes
	}
	for name, tc := range map[string]struct {
		seen []seen
		want int
	}{
		"an agent that starts anew":         {seen: []seen{{"a", 1, 0}, {"a", 1, 30}, {"a", 2, 31}, {"a", 2, 90}}},
		"what waited, after what is new":    {seen: []seen{{"a", 1, 0}, {"a", 2, 60}, {"a", 1, 30}, {"a", 2, 90}, {"a", 1, 59}}},
		"two nodes":                         {seen: []seen{{"a", 1, 0}, {"b", 2, 0}, {"a", 1, 60}, {"b", 2, 60}}},
		"two agents":                        {seen: []seen{{"a", 1, 0}, {"a", 2, 1}, {"a", 1, 20}, {"a", 2, 21}, {"a", 1, 22}}, want: 1},
		"three agents":                      {seen: []seen{{"a", 1, 0}, {"a", 2, 0}, {"a", 3, 0}, {"a", 1, 20}, {"a", 2, 20}, {"a", 3, 20}}, want: 2},
		"a clock set a little at a restart": {seen: []seen{{"a", 1, 0}, {"a", 1, 60}, {"a", 2, 55}, {"a", 2, 90}}},
		"epochs of long ago are forgotten":  {seen: []seen{{"a", 1, 0}, {"a", 2, 100}, {"a", 3, 200}, {"a", 4, 300}, {"a", 5, 400}, {"a", 1, 500}}},
	} {
		t.Run(name, func(t *testing.T) {
			var e epochs
			n := 0
			for _, s := range tc.seen {
				b := sample.NewBuilder()
				b.Row(sample.Row{Resource: "r"})
				b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1))
				batch := b.Build()
				batch.Node, batch.Epoch, batch.Base = s.node, s.epoch, s.at*minute
				if err := e.see(batch); err != nil {
					n++
				}
			}
			if n != tc.want {
				t.Errorf("%d alarms, want %d", n, tc.want)
			}
		})
	}
}
