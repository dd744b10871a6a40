//go:build lab

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/collectors/procfs"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestUp runs everything in one process, beside guests that come and go.
func TestUp(t *testing.T) {
	ctx := t.Context()
	l := lab.Start(t, lab.Options{})
	check(t, l.StartLibvirt(ctx))
	dir := t.TempDir()
	listen := freeAddress(t)
	up := exec.Command(binary(t, "kvmeter"), "up", "--state", filepath.Join(dir, "state"), "--run", filepath.Join(dir, "run"), "--libvirt", l.ReadOnlySocket())
	up.Env = append(os.Environ(), "KVMETER_API__LISTEN="+listen)
	log, err := os.Create(filepath.Join(dir, "up.log"))
	check(t, err)
	up.Stdout, up.Stderr = log, log
	check(t, up.Start())
	ended := false
	t.Cleanup(func() {
		if !ended {
			check(t, up.Process.Kill())
			_ = up.Wait()
		}
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("== kvmeter up\n%s", text)
		}
	})
	c := &cloud{t: t, lab: l, api: "http://" + listen}
	c.eventually("the API", func() error { return c.get("/v2/meters", new([]any)) })

	// The machine may be busy with something else, so the best of three counts.
	best := time.Hour
	var guest *lab.Guest
	for range 3 {
		guest, err = l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn", Name: "burner"})
		check(t, err)
		best = min(best, firstSample(c, guest))
	}
	t.Logf("first sample of a guest %s after the exec of its QEMU", best)
	if best > 3*time.Second {
		t.Errorf("the first sample of a guest came %s after the exec of its QEMU, want 3 s at most", best)
	}

	var s client.Snapshot
	c.eventually("a burning guest in top", func() error {
		out := output(t, binary(t, "kvmeter"), "top", "--socket", filepath.Join(dir, "run", "agent.sock"), "-n", "2", "-f", "json")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		return json.Unmarshal([]byte(lines[len(lines)-1]), &s)
	})
	found := false
	for _, d := range s.Domains {
		if d.UUID == guest.UUID {
			found = true
			if d.Display != "burner" || d.PID != guest.PID() || d.CPU <= 0 {
				t.Errorf("top shows %+v", d)
			}
		}
	}
	if !found {
		t.Errorf("top does not show %s: %+v", guest.UUID, s.Domains)
	}

	check(t, up.Process.Signal(syscall.SIGTERM))
	err, ended = up.Wait(), true
	check(t, err)
}

// firstSample waits for the guest's first sample and returns how long after
// the exec of its QEMU it was taken.
func firstSample(c *cloud, g *lab.Guest) time.Duration {
	c.t.Helper()
	ticks, err := procfs.StartTicks(g.PID())
	check(c.t, err)
	boot := time.Now().Add(-uptime(c.t))
	exec := boot.Add(time.Duration(ticks) * 10 * time.Millisecond)
	var samples []apiSample
	c.eventually("a sample of "+g.Name, func() error {
		if err := c.get("/v2/samples?limit=10000&q.field=resource_id&q.value="+g.UUID, &samples); err != nil {
			return err
		}
		if len(samples) == 0 {
			return os.ErrNotExist
		}
		return nil
	})
	first := samples[len(samples)-1]
	at, err := time.Parse("2006-01-02T15:04:05.999999", first.Time)
	check(c.t, err)
	return at.Sub(exec)
}

// uptime is the time since boot.
func uptime(t testing.TB) time.Duration {
	t.Helper()
	data, err := os.ReadFile("/proc/uptime")
	check(t, err)
	d, err := time.ParseDuration(strings.Fields(string(data))[0] + "s")
	check(t, err)
	return d
}
