//go:build lab

package main

import (
	"os"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/test/lab"
)

func TestUpIsRepeatableAndDownEndsAllAlsoAfterACrash(t *testing.T) {
	l := lab.Start(t, lab.Options{})
	do := func(args ...string) string {
		t.Helper()
		var out strings.Builder
		c := command()
		c.SetOut(&out)
		c.SetArgs(append([]string{"--dir", l.Dir()}, args...))
		if err := c.ExecuteContext(t.Context()); err != nil {
			t.Fatalf("lab %s: %v", strings.Join(args, " "), err)
		}
		return out.String()
	}
	first := do("up", "--vms", "1")
	if !strings.Contains(first, l.ReadOnlySocket()) || !strings.Contains(first, "instance-00000001") {
		t.Errorf("up does not say how to reach what it has started:\n%s", first)
	}
	if again := do("up", "--vms", "1"); again != first {
		t.Errorf("got\n%swhen repeated, want the same as before:\n%s", again, first)
	}
	if got, want := do("exec", "1", "--", "write", "4096", "3"), "3 blocks of 4096 bytes\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	do("send", "1", "5", "100")
	do("pause", "1")
	do("resume", "1")

	g, err := l.Guest("1")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.KillLibvirt(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !g.Running() {
		t.Error("the guest ended with libvirtd")
	}
	do("down")
	if g.Running() {
		t.Error("the guest still runs")
	}
	if _, err := os.Stat(l.Dir()); !os.IsNotExist(err) {
		t.Errorf("the lab's folder: got %v, want none", err)
	}
	do("down")
}
