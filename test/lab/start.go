package lab

import (
	"os"
	"testing"

	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/test/boot"
)

// Start opens a lab for a test, in a new folder that other users may enter, and
// closes it when the test ends. A test that has failed shows libvirtd's log and
// the guests' consoles.
//
// In a guest of package vm, where no lab can be, it skips the test.
func Start(t testing.TB, opts Options) *Lab {
	t.Helper()
	if os.Getenv(boot.GuestVariable) != "" {
		t.Skip(boot.NoLab)
	}
	dir, err := os.MkdirTemp("", "kvmeter-lab-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if opts.Log == nil {
		opts.Log = zaptest.NewLogger(t)
	}
	l, err := New(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(tail(l.path("log", "libvirtd.log")), tail(l.path("rabbitmq", "stdout")))
			guests, _ := l.Guests()
			for _, g := range guests {
				t.Log(tail(g.Console()))
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}
