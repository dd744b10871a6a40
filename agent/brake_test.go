package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/collectors"
)

func TestBrake(t *testing.T) {
	disk, exits := &fakeHook{name: "disk"}, &fakeHook{name: "exits"}
	w := newWorld(t, 1, func(w *world) {
		w.cfg.Profile = "deep"
		w.deps.Hooks = []collectors.Hook{disk, exits}
	})
	hs, b := w.agent.hooks, &brake{budget: 0.01}
	now := time.Now()
	// pass lets the time pass in which the disk hook takes a part of a core.
	pass := func(part float64) {
		hs.find("disk").spent += time.Duration(part * float64(brakeEvery))
		now = now.Add(brakeEvery)
		b.look(hs, now, 0)
	}
	hs.find("disk").spent = time.Hour
	b.look(hs, now, 0) // what was before does not count
	for range 3 {
		pass(0.009)
		b.look(hs, now.Add(time.Second), time.Hour) // nor does a moment
	}
	pass(0.5)
	pass(0.005)
	pass(0.5)
	if !disk.on || !exits.on {
		t.Fatal("a hook is off though the budget was not passed twice in succession")
	}
	pass(0.02)
	if exits.on || !disk.on {
		t.Errorf("over the budget: exits %t, disk %t; want exits off first", exits.on, disk.on)
	}
	if notes := strings.Join(w.agent.Notes(), "\n"); !strings.Contains(notes, "2.0 % of a core") {
		t.Errorf("notes %q", notes)
	}
	pass(0.02)
	if !disk.on {
		t.Error("the second hook is off before it could be told whether the first was enough")
	}
	pass(0.02)
	if disk.on {
		t.Error("still over the budget, and the disk hook is on")
	}
	pass(0.02)
	pass(0.02) // nothing is left to switch off
	if err := hs.turn(hs.find("disk"), true); err != nil || !disk.on {
		t.Errorf("switched on by hand: %v", err)
	}
	if slices.ContainsFunc(w.agent.Notes(), func(n string) bool { return strings.Contains(n, "the hook disk") }) {
		t.Errorf("notes of a hook that counts again: %q", w.agent.Notes())
	}
}

func TestWithoutABudgetNothingIsShed(t *testing.T) {
	disk := &fakeHook{name: "disk"}
	w := newWorld(t, 1, func(w *world) { w.deps.Hooks = []collectors.Hook{disk} })
	b, now := &brake{}, time.Now()
	for range 4 {
		w.agent.hooks.find("disk").spent += time.Hour
		now = now.Add(brakeEvery)
		b.look(w.agent.hooks, now, 0)
	}
	if !disk.on {
		t.Error("the hook is off")
	}
}
