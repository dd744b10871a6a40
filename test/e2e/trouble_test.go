//go:build lab

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// TestTrouble is the day of an operator for whom everything goes wrong. Each
// trouble is said once, in a sentence, and costs only what depends on it.
func TestTrouble(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	l := lab.Start(t, lab.Options{})
	var rabbit *lab.Rabbit
	var guests [3]*lab.Guest
	var wg sync.WaitGroup
	var failed [2]error
	wg.Go(func() { rabbit, failed[0] = l.RabbitMQ(ctx) })
	wg.Go(func() {
		if failed[1] = l.StartLibvirt(ctx); failed[1] != nil {
			return
		}
		for i := range guests {
			if guests[i], failed[1] = l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "pulse"}); failed[1] != nil {
				return
			}
		}
	})
	_ = binary(t, "kvmeter") // is built meanwhile
	wg.Wait()
	check(t, errors.Join(failed[:]...))

	t.Run("what is missing is said, the rest is collected", func(t *testing.T) { missing(t, l, guests[0]) })
	t.Run("a broker that cannot be used is explained once", func(t *testing.T) { unusableBroker(t, rabbit) })
	t.Run("the all-in-one goes on", func(t *testing.T) { troubleOfUp(t, ctx, l) })
	t.Run("the daemons go on", func(t *testing.T) { troubleOfDaemons(t, ctx, l, rabbit, guests[:]) })
}

var nobody = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}

// missing collects once where something is not there.
func missing(t *testing.T, l *lab.Lab, g *lab.Guest) {
	const (
		noBPF     = "Note: CPU time is read from /proc, at more cost, since BPF cannot be used: "
		noCaps    = noBPF + "load walk: BPF needs capabilities that are missing: CAP_BPF and CAP_PERFMON; run as root, or grant them to the service (AmbientCapabilities=)\n"
		noBTF     = noBPF + "load walk: the kernel has no BTF (/sys/kernel/btf/vmlinux; built without CONFIG_DEBUG_INFO_BTF)\n"
		noDisk    = "Note: disk.host.* cannot be collected: "
		noKVM     = "Note: kvm.* cannot be collected: load kvm: "
		noHooks   = "Note: the hooks disk, tcx, runqueue, exits cannot be used, which costs disk.host.device.read.requests, "
		noTypes   = "Note: the hooks disk, runqueue, exits cannot be used, which costs disk.host.device.read.requests, " // tcx needs none
		noLibvirt = "Note: libvirt does not answer (there is no socket /nonexistent/libvirt-sock-ro (is libvirtd or virtqemud there?"
	)
	agent := binary(t, "kvmeter-agent")
	for name, tc := range map[string]struct {
		args    []string
		attr    *syscall.SysProcAttr
		libvirt string
		said    []string // and no more about it
		have    []string // meter and origin of the guest's samples
		lack    []string // meters
	}{
		"with all there is, nothing is": {
			args: []string{agent}, attr: unprivileged, libvirt: l.ReadOnlySocket(),
			have: []string{"cpu walk", "cpu.process walk", "disk.host.read.bytes walk", "network.incoming.bytes rtnl", "disk.device.read.bytes libvirt"},
		},
		"an ordinary user has no BPF": {
			args: []string{agent}, attr: nobody, libvirt: l.ReadOnlySocket(), said: []string{noCaps, noDisk, noKVM, noHooks},
			have: []string{"cpu cpuclock", "cpu.process cpuclock", "network.incoming.bytes rtnl", "disk.device.read.bytes libvirt"},
			lack: []string{"disk.host.read.bytes"},
		},
		"a kernel without BTF has none either": {
			args:    []string{"unshare", "-m", "sh", "-c", `mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"`, agent},
			libvirt: l.ReadOnlySocket(), said: []string{noBTF, noKVM, noTypes},
			have: []string{"cpu cpuclock", "cpu.process cpuclock", "disk.host.read.bytes cpuclock", "network.incoming.bytes rtnl", "disk.device.read.bytes libvirt"},
		},
		"without libvirt guests are found as processes": {
			args: []string{agent}, libvirt: "/nonexistent/libvirt-sock-ro", said: []string{noLibvirt},
			have: []string{"cpu walk", "disk.host.read.bytes walk", "network.incoming.bytes rtnl"},
			lack: []string{"disk.device.read.bytes"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			args := append(tc.args[1:], "--dry-run", "-f", "json", "--config", "/dev/null")
			cmd := exec.CommandContext(t.Context(), tc.args[0], args...)
			cmd.Env = append(os.Environ(), "HOME=/", "KVMETER_LIBVIRT="+tc.libvirt)
			cmd.SysProcAttr = tc.attr
			var out, said bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &said
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s", err, &said)
			}
			lines := slices.DeleteFunc(strings.SplitAfter(said.String(), "\n"), func(line string) bool {
				return !strings.HasPrefix(line, "Note: ") || strings.HasPrefix(line, "Note: hardware.ipmi.*") || // few test machines have a BMC
					strings.HasPrefix(line, "Note: meters that make every QEMU work") ||
					strings.HasPrefix(line, "Note: network.* cannot be collected for domains that libvirt does not describe") // of other labs
			})
			for _, want := range tc.said {
				if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, want) }) {
					t.Errorf("it does not say %q, but\n%s", want, strings.Join(lines, ""))
				}
			}
			if len(lines) != len(tc.said) {
				t.Errorf("it says\n%s", strings.Join(lines, ""))
			}
			origins := collected(t, out.Bytes(), g)
			for _, want := range tc.have {
				meter, origin, _ := strings.Cut(want, " ")
				if origins[meter] != origin {
					t.Errorf("%s is of origin %q, want %q", meter, origins[meter], origin)
				}
			}
			for _, meter := range tc.lack {
				if origins[meter] != "" {
					t.Errorf("%s is there, of origin %q", meter, origins[meter])
				}
			}
		})
	}
}

// collected returns the origins of a guest's samples by meter.
func collected(t *testing.T, out []byte, g *lab.Guest) map[string]string {
	t.Helper()
	origins := map[string]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var s struct {
			Meter    string `json:"meter"`
			Resource string `json:"resource_id"`
			Origin   string `json:"origin"`
		}
		err := d.Decode(&s)
		if errors.Is(err, io.EOF) {
			return origins
		}
		check(t, err)
		if strings.Contains(s.Resource, g.UUID) {
			origins[s.Meter] = s.Origin
		}
	}
}

// unusableBroker starts programs whose broker refuses them: they say why, once,
// wait for it, and end when they are told to.
func unusableBroker(t *testing.T, r *lab.Rabbit) {
	good, err := url.Parse(r.URL())
	check(t, err)
	with := func(change func(u *url.URL)) string {
		u := *good
		change(&u)
		return u.String()
	}
	at := "RabbitMQ at amqp://" + good.Host
	free := freeAddress(t)
	troubles := map[string]struct{ url, want string }{
		"a wrong password": {
			with(func(u *url.URL) { u.User = url.UserPassword("guest", "secret-word") }), at + " refuses the user or password in url",
		},
		"a wrong virtual host": {
			with(func(u *url.URL) { u.Path = "/elsewhere" }), at + ` has no virtual host \"elsewhere\", or this user has no access to it`,
		},
		"a wrong port": {
			with(func(u *url.URL) { u.Host = free }), "RabbitMQ at amqp://" + free + " does not answer (connection refused): is it running, and is this its port?",
		},
		"TLS against a plain port": {
			with(func(u *url.URL) { u.Scheme = "amqps" }), "RabbitMQ at amqps://" + good.Host + " does not speak TLS",
		},
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for name, trouble := range troubles {
		for _, program := range []string{"kvmeter-agent", "kvmeter notifier", "kvmeter central"} {
			dir := t.TempDir()
			words := strings.Fields(program)
			d := &daemon{t: t, path: binary(t, words[0]), log: filepath.Join(dir, "log")}
			d.args = append(words[1:], "--config", filepath.Join(dir, "config.yaml"))
			config := fmt.Sprintf("amqp: {url: %q}\n", trouble.url)
			switch program {
			case "kvmeter-agent":
				config += "node: compute-1\ninterval: 1s\nlibvirt: off\nshutdown_timeout: 1s\nsocket: ''\ncounters: ''\npins: ''\nspool: {path: ''}\n"
			case "kvmeter central":
				config += fmt.Sprintf("allow_unsigned: true\nstore: {path: %s/store}\napi: {listen: %q}\n", dir, freeAddress(t))
			default:
				config += fmt.Sprintf("allow_unsigned: true\nspool: %[1]s/spool\nstate: %[1]s/state\n", dir)
			}
			check(t, os.WriteFile(d.args[len(d.args)-1], []byte(config), 0o600))
			wg.Go(func() { unusable(t, name+", "+program, d, trouble.want) })
		}
	}
}

func unusable(t *testing.T, name string, d *daemon, want string) {
	log, err := os.Create(d.log)
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(d.path, d.args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return
	}
	said := func() string {
		text, _ := os.ReadFile(d.log)
		return string(text)
	}
	deadline := time.Now().Add(20 * time.Second)
	for !strings.Contains(said(), want) && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(3 * time.Second) // it tries again and again
	asked := time.Now()
	err = errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait())
	if took := time.Since(asked); took > 4*time.Second {
		t.Errorf("%s: it ended %s after it was told to", name, took)
	}
	// Only the agent has something to lose.
	if lost := strings.Contains(said(), "batches were not delivered within 1s and are lost"); (err != nil) != lost {
		t.Errorf("%s: it ended with %v", name, err)
	}
	if n := strings.Count(said(), want); n != 1 {
		t.Errorf("%s: it says %q %d times:\n%s", name, want, n, said())
	}
	if strings.Contains(said(), "secret-word") {
		t.Errorf("%s: it says the password:\n%s", name, said())
	}
}

// startUp starts `kvmeter up` with an address of its own.
func startUp(t *testing.T, l *lab.Lab, dir string, attr *syscall.SysProcAttr, env ...string) (*cloud, *daemon) {
	t.Helper()
	c := &cloud{t: t, lab: l, api: "http://" + freeAddress(t)}
	d := &daemon{t: t, path: "/usr/bin/env", log: filepath.Join(t.TempDir(), "log"), attr: attr}
	d.args = append([]string{
		"KVMETER_API__LISTEN=" + strings.TrimPrefix(c.api, "http://"), "KVMETER_AGENT__LIBVIRT=" + l.ReadOnlySocket(),
	}, env...)
	d.args = append(d.args, binary(t, "kvmeter"), "up")
	if dir != "" {
		d.args = append(d.args, "--state", filepath.Join(dir, "state"), "--run", filepath.Join(dir, "run"))
	}
	t.Cleanup(func() {
		if d.cmd != nil {
			d.end()
		}
		if t.Failed() {
			text, _ := os.ReadFile(d.log)
			t.Logf("== kvmeter up\n%s", text)
		}
	})
	d.start()
	c.eventually("the API", func() error { return c.get("/v2/meters", new([]any)) })
	return c, d
}

func troubleOfUp(t *testing.T, ctx context.Context, l *lab.Lab) {
	t.Run("an ordinary user has folders of his own", func(t *testing.T) {
		home, err := os.MkdirTemp("", "kvmeter-home-")
		check(t, err)
		t.Cleanup(func() { _ = os.RemoveAll(home) })
		check(t, os.Chown(home, 65534, 65534))
		c, d := startUp(t, l, "", nobody, "HOME="+home, "XDG_RUNTIME_DIR="+home+"/run", "XDG_STATE_HOME=", "XDG_CONFIG_HOME=")
		guests, err := l.Guests()
		check(t, err)
		c.eventually("a sample of "+guests[0].Name, func() error { return c.since(guests[0], "cpu", time.Time{}, 1) })
		d.end()
		_, err = os.Stat(filepath.Join(home, ".local/state/kvmeter/up/store"))
		check(t, err)
	})

	dir := t.TempDir()
	check(t, syscall.Mount("none", dir, "tmpfs", 0, "size=64m"))
	t.Cleanup(func() { check(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
	c, d := startUp(t, l, dir, nil, "KVMETER_AGENT__INTERVAL=100ms")
	stays, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "pulse"})
	check(t, err)
	c.eventually("a sample of "+stays.Name, func() error { return c.since(stays, "cpu", time.Time{}, 1) })

	t.Run("a second one says who has the store and the port", func(t *testing.T) {
		for _, tc := range []struct{ listen, state, want string }{
			{strings.TrimPrefix(c.api, "http://"), t.TempDir(), "the API cannot listen on " + strings.TrimPrefix(c.api, "http://") + ": another program does; end it, or set api.listen to another address"},
			{freeAddress(t), filepath.Join(dir, "state"), "another kvmeter uses this store; stop it or choose another folder"},
			{freeAddress(t), t.TempDir(), "another agent answers on the socket " + filepath.Join(dir, "run", "agent.sock") + ": stop it"},
		} {
			cmd := exec.Command(binary(t, "kvmeter"), "up", "--state", tc.state, "--run", filepath.Join(dir, "run"), "--log-level", "warn")
			cmd.Env = append(os.Environ(), "KVMETER_API__LISTEN="+tc.listen, "KVMETER_AGENT__LIBVIRT=off")
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), tc.want) || strings.Count(string(out), "\n") != 1 {
				t.Errorf("%v, it says %s, want one line with %q", err, out, tc.want)
			}
		}
	})

	t.Run("guests that vanish while they are polled cost no other sample", func(t *testing.T) {
		began := time.Now()
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for range 4 {
					g, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn"})
					if err == nil {
						time.Sleep(200 * time.Millisecond)
						err = g.Destroy(ctx)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		d.said("domain skipped", 0)
		seconds := int(time.Since(began) / time.Second)
		c.eventually("ten samples a second of the guest that stays", func() error {
			return c.since(stays, "cpu.process", began, 8*seconds)
		})
	})

	t.Run("a full disk costs no sample", func(t *testing.T) {
		fill(t, dir)
		c.eventually("a complaint", func() error { return d.complaint("store takes no more samples", "disk is full") })
		began := time.Now()
		time.Sleep(2 * time.Second)
		check(t, c.get("/v2/samples?limit=1", new([]apiSample)))
		if err := c.since(stays, "cpu", began.Add(time.Second), 1); err == nil {
			t.Error("samples are stored on a full disk")
		}
		check(t, os.Remove(filepath.Join(dir, "fill")))
		c.eventually("the samples of the time without space", func() error { return c.since(stays, "cpu", began, 15) })
		check(t, stays.Destroy(ctx))
	})

	t.Run("a second signal ends it at once", func(t *testing.T) {
		fill(t, dir)
		c.eventually("a complaint", func() error { return d.complaint("store takes no more samples", "disk is full") })
		time.Sleep(2 * time.Second) // there is something that it wants to deliver
		asked := time.Now()
		check(t, d.cmd.Process.Signal(syscall.SIGTERM))
		time.Sleep(200 * time.Millisecond)
		check(t, d.cmd.Process.Signal(syscall.SIGTERM))
		_ = d.cmd.Wait()
		d.cmd = nil
		if took := time.Since(asked); took > 2*time.Second {
			t.Errorf("it took %s", took)
		}
	})

	t.Run("it does not start on a full disk", func(t *testing.T) {
		fill(t, dir) // what the last one has given back
		cmd := exec.Command(binary(t, "kvmeter"), "up", "--state", filepath.Join(dir, "other"), "--run", filepath.Join(dir, "run"))
		cmd.Env = append(os.Environ(), "KVMETER_API__LISTEN="+freeAddress(t), "KVMETER_AGENT__LIBVIRT=off")
		out, err := cmd.CombinedOutput()
		if want := "Error: open store " + filepath.Join(dir, "other", "store") + ": its disk is full; free some space and start again\n"; err == nil || !strings.HasSuffix(string(out), want) {
			t.Errorf("%v, it says %s, want %s", err, out, want)
		}
	})
}

// fill fills the file system that holds dir.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "fill"))
	check(t, err)
	defer func() { _ = f.Close() }()
	block := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}

// said checks how often the daemon's log has a text.
func (d *daemon) said(text string, times int) {
	d.t.Helper()
	log, err := os.ReadFile(d.log)
	check(d.t, err)
	if n := strings.Count(string(log), text); n != times {
		d.t.Errorf("the log has %q %d times, want %d", text, n, times)
	}
}

// complaint returns an error unless the newest complaint in the daemon's log is
// one of the texts.
func (d *daemon) complaint(texts ...string) error {
	log, err := os.ReadFile(d.log)
	check(d.t, err)
	over := max(bytes.LastIndex(log, []byte("takes samples again")), bytes.LastIndex(log, []byte("has space again")))
	for _, text := range texts {
		if bytes.LastIndex(log, []byte(text)) > over {
			return nil
		}
	}
	return fmt.Errorf("the log has none of %q", texts)
}

// since returns an error unless the API has so many samples of a guest's meter,
// or more, from a time on.
func (c *cloud) since(g *lab.Guest, meter string, from time.Time, want int) error {
	resource := g.UUID
	switch {
	case strings.HasPrefix(meter, "network."):
		resource = fmt.Sprintf("%s-%s-%s", g.Name, g.UUID, g.NICs()[0].Tap)
	case strings.HasPrefix(meter, "disk.device."):
		resource += "-hda"
	}
	q := url.Values{"limit": {"10000"}, "q.field": {"meter", "resource_id", "timestamp"}, "q.op": {"eq", "eq", "gt"}, "q.value": {meter, resource, from.UTC().Format("2006-01-02T15:04:05.000000")}}
	var samples []apiSample
	if err := c.get("/v2/samples?"+q.Encode(), &samples); err != nil {
		return err
	}
	if len(samples) < want {
		return fmt.Errorf("%d samples of %s of %s since %s, want %d", len(samples), meter, g.Name, from.Format("15:04:05"), want)
	}
	return nil
}

func troubleOfDaemons(t *testing.T, ctx context.Context, l *lab.Lab, rabbit *lab.Rabbit, guests []*lab.Guest) {
	c := startCloud(t, ctx, l, rabbit)
	for _, g := range guests {
		c.eventually("samples of "+g.Name, func() error { return c.since(g, "disk.device.read.bytes", time.Time{}, 1) })
	}
	// each checks that a meter has a sample a second, of every guest given, from
	// two seconds after the trouble began.
	each := func(t *testing.T, began time.Time, seconds int, meters []string, guests ...*lab.Guest) {
		t.Helper()
		for _, g := range guests {
			for _, m := range meters {
				if err := c.since(g, m, began, seconds-2); err != nil {
					t.Error(err)
				}
			}
		}
	}
	always := []string{"cpu", "cpu.process", "network.incoming.bytes", "disk.host.read.bytes"}
	disks := []string{"disk.device.read.bytes"}

	t.Run("a stuck guest costs its disks' numbers", func(t *testing.T) {
		resume := stop(t, guests[0].PID())
		defer resume()
		time.Sleep(7 * time.Second) // libvirt_timeout is over
		began := time.Now()
		time.Sleep(4 * time.Second)
		each(t, began, 4, always, guests...)
		each(t, began, 4, disks, guests[1:]...)
		if err := c.since(guests[0], disks[0], began, 1); err == nil {
			t.Error("a stopped QEMU has told of its disks")
		}
	})
	c.eventually("the disks of all guests", func() error { return c.since(guests[0], disks[0], time.Now().Add(-3*time.Second), 1) })

	t.Run("a hung libvirtd costs the disks' numbers", func(t *testing.T) {
		pid, err := l.LibvirtPID()
		check(t, err)
		resume := stop(t, pid)
		began := time.Now()
		time.Sleep(8 * time.Second)
		resume()
		each(t, began, 8, always, guests...)
	})
	c.eventually("the disks of all guests", func() error { return c.since(guests[0], disks[0], time.Now().Add(-3*time.Second), 1) })

	t.Run("a killed libvirtd is found again", func(t *testing.T) {
		check(t, l.KillLibvirt(ctx))
		began := time.Now()
		time.Sleep(3 * time.Second)
		each(t, began, 3, always, guests...)
		check(t, l.StartLibvirt(ctx))
		c.eventually("the disks of all guests", func() error {
			return errors.Join(c.since(guests[0], disks[0], began, 1), c.since(guests[2], disks[0], began, 1))
		})
	})

	t.Run("a full disk stops central until there is space", func(t *testing.T) { fullStore(t, c, guests[0]) })

	asked := time.Now()
	c.agent.end()
	if took := time.Since(asked); took > 3*time.Second {
		t.Errorf("the agent took %s to end", took)
	}
	c.compareWithWitness()

	t.Run("bad batches are dead letters, their neighbours are stored", func(t *testing.T) { badBatches(t, ctx, c) })

	for _, d := range []*daemon{c.notifier, c.central} {
		asked := time.Now()
		d.end()
		if took := time.Since(asked); took > 3*time.Second {
			t.Errorf("%v took %s to end", d.args, took)
		}
	}
}

// fullStore moves the store to a small file system and fills that.
func fullStore(t *testing.T, c *cloud, g *lab.Guest) {
	store := filepath.Join(filepath.Dir(c.central.args[len(c.central.args)-1]), "store")
	c.central.end()
	check(t, os.Rename(store, store+".large"))
	check(t, os.Mkdir(store, 0o755))
	check(t, syscall.Mount("none", store, "tmpfs", 0, "size=96m"))
	c.t.Cleanup(func() { check(c.t, syscall.Unmount(store, syscall.MNT_DETACH)) }) // what follows needs the store
	output(t, "cp", "-a", store+".large/.", store)
	c.central.start()
	c.eventually("the API", func() error { return c.since(g, "cpu", time.Time{}, 1) })

	fill(t, store)
	c.eventually("a complaint", func() error { return c.central.complaint("store takes no more samples", "disk is full") })
	began := time.Now()
	time.Sleep(3 * time.Second)
	check(t, c.get("/v2/samples?limit=1", new([]apiSample)))
	check(t, os.Remove(filepath.Join(store, "fill")))
	c.eventually("the samples of the time without space", func() error { return c.since(g, "cpu", began, 3) })
}

// badBatches sends good and bad batches in turn, as agents and notifiers would.
func badBatches(t *testing.T, ctx context.Context, c *cloud) {
	dir := filepath.Dir(c.central.args[len(c.central.args)-1])
	key, err := os.ReadFile(filepath.Join(dir, "keys", "compute-1.key"))
	check(t, err)
	secret := bytes.TrimSpace(key)
	pub, err := bus.NewAMQP(bus.Config{URL: c.rabbit.URL(), Partitions: 1}, t.Name(), zap.NewNop())
	check(t, err)
	defer pub.Close()
	encoder, err := sample.NewEncoder()
	check(t, err)

	epoch, seq := rand.Uint64(), uint64(0)
	batch := func(node string) (*sample.Batch, []byte) {
		seq++
		b := sample.NewBuilder()
		b.Row(sample.Row{Resource: fmt.Sprintf("resource-%d", seq), Source: "trouble"})
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(seq))
		out := b.Build()
		out.ID, out.Node, out.Epoch, out.Seq, out.Base = sample.NewBatchID(time.Now()), node, epoch, seq, time.Now().UnixMicro()
		body, err := encoder.Encode(nil, out)
		check(t, err)
		return out, body
	}
	sealed := func(route, node string, secret []byte) bus.Message {
		b, body := batch(node)
		return bus.Seal(route, b, body, secret)
	}
	bad := []struct {
		spoil  func(route string) bus.Message
		reason string
	}{
		{func(route string) bus.Message {
			b, _ := batch("compute-1")
			return bus.Seal(route, b, []byte("hello, "+route), secret)
		}, "malformed batch"},
		{func(route string) bus.Message {
			b, body := batch("compute-1")
			return bus.Seal(route, b, body[:len(body)/2], secret)
		}, "malformed batch"},
		{func(route string) bus.Message {
			m := sealed(route, "compute-1", secret)
			m.ContentType = "application/json"
			return m
		}, `content type "application/json" is not`},
		{func(route string) bus.Message {
			m := sealed(route, "compute-1", secret)
			m.ID = "x"
			return m
		}, `message id "x" is not that of its batch`},
		{func(route string) bus.Message { return sealed(route, "compute-1", nil) }, "batch is not signed"},
		{func(route string) bus.Message { return sealed(route, "compute-1", []byte("not the secret")) }, "signature does not match"},
		{func(route string) bus.Message { return sealed(route, "compute-9", secret) }, `batch is signed with an unknown key "compute-9"`},
		{func(route string) bus.Message {
			m := sealed(route, "compute-2", secret)
			m.KeyID = "compute-1"
			return m
		}, `batch of another node than its key: node "compute-2", key "compute-1"`},
	}
	type letter struct{ queue, reason string }
	dead := map[string]letter{} // by body
	good := map[string]bool{}   // resources
	for route, queue := range map[string]string{bus.SamplesKey("compute-1", 1): bus.SamplesQueue(0), bus.StoreKey("compute-1", 1): bus.StoreQueue(0)} {
		for _, b := range bad {
			before := sealed(route, "compute-1", secret)
			good[fmt.Sprintf("resource-%d", seq)] = true
			m := b.spoil(route)
			dead[string(m.Body)] = letter{queue, b.reason}
			check(t, pub.Publish(ctx, before, m))
		}
	}

	c.eventually("the good batches in the store", func() error {
		var stored []apiSample
		if err := c.get("/v2/samples?limit=10000&q.field=source&q.op=eq&q.value=trouble", &stored); err != nil {
			return err
		}
		for _, s := range stored {
			if !good[s.Resource] {
				t.Errorf("the batch of %s is stored", s.Resource)
			}
		}
		if len(stored) < len(good) {
			return fmt.Errorf("%d samples, want %d", len(stored), len(good))
		}
		return nil
	})
	conn, err := amqp.Dial(c.rabbit.URL())
	check(t, err)
	defer func() { _ = conn.Close() }()
	ch, err := conn.Channel()
	check(t, err)
	c.eventually("the bad batches among the dead letters", func() error {
		for {
			m, ok, err := ch.Get(bus.DeadLetterQueue, true)
			check(t, err)
			if !ok {
				break
			}
			want, ok := dead[string(m.Body)]
			if !ok {
				t.Errorf("a dead letter that nobody sent, or twice: %v", m.Headers)
				continue
			}
			delete(dead, string(m.Body))
			queue, _ := m.Headers["kvmeter-queue"].(string)
			reason, _ := m.Headers["kvmeter-reason"].(string)
			if queue != want.queue || !strings.HasPrefix(reason, want.reason) {
				t.Errorf("dead letter of %s: %s; want %s: %s", queue, reason, want.queue, want.reason)
			}
		}
		if len(dead) > 0 {
			return fmt.Errorf("%d are missing: %v", len(dead), slices.Collect(maps.Values(dead)))
		}
		return nil
	})
}
