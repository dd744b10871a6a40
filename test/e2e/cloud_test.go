//go:build lab

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// binaries are built once for all tests.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "kvmeter-bin-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/", "github.com/kvmeter/kvmeter/cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := binaries(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

func binary(t testing.TB, name string) string {
	t.Helper()
	dir, err := binaries()
	check(t, err)
	return filepath.Join(dir, name)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func output(t testing.TB, name string, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", filepath.Base(name), strings.Join(args, " "), err, &out, &errs)
	}
	return out.String()
}

// daemon is a program that the test starts, kills and starts again.
type daemon struct {
	t    testing.TB
	path string
	args []string
	attr *syscall.SysProcAttr
	log  string // file
	cmd  *exec.Cmd
}

func (d *daemon) start() {
	d.t.Helper()
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	check(d.t, err)
	defer func() { _ = log.Close() }()
	d.cmd = exec.Command(d.path, d.args...)
	d.cmd.Stdout, d.cmd.Stderr, d.cmd.SysProcAttr = log, log, d.attr
	check(d.t, d.cmd.Start())
}

func (d *daemon) kill9() {
	d.t.Helper()
	check(d.t, d.cmd.Process.Kill())
	_ = d.cmd.Wait()
	d.cmd = nil
}

// end asks the daemon to end and waits until it has.
func (d *daemon) end() {
	d.t.Helper()
	if d.cmd == nil {
		return
	}
	check(d.t, d.cmd.Process.Signal(syscall.SIGTERM))
	if err := d.cmd.Wait(); err != nil {
		d.t.Errorf("%s ended with %v", filepath.Base(d.path), err)
	}
	d.cmd = nil
}

// cloud is a compute host's agent and a control plane.
type cloud struct {
	t                        testing.TB
	lab                      *lab.Lab
	api                      string
	agent, notifier, central *daemon
	rabbit                   *lab.Rabbit
	libvirtResolution        uint64 // ns

	stopWitness func() map[string]sample.Sample
}

// The agent runs as nobody, with the capabilities that it needs at start.
var unprivileged = &syscall.SysProcAttr{
	Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
	AmbientCaps: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN},
}

func startCloud(t testing.TB, ctx context.Context, l *lab.Lab, rabbit *lab.Rabbit) *cloud {
	t.Helper()
	dir, err := os.MkdirTemp("", "kvmeter-e2e-")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	check(t, os.Chmod(dir, 0o755))
	for _, sub := range []string{"keys", "run", "store"} {
		check(t, os.Mkdir(filepath.Join(dir, sub), 0o755))
	}
	check(t, os.Chown(filepath.Join(dir, "run"), 65534, 65534))
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	check(t, os.WriteFile(filepath.Join(dir, "keys", "compute-1.key"), []byte(hex.EncodeToString(secret)), 0o644))
	listen := freeAddress(t)

	files := map[string]string{
		"polling.yaml": `
sources:
  - name: all
    interval: 1
    meters: ["*"]
  - name: disks
    interval: 1
    meters: [disk.device.read.bytes, disk.device.write.bytes, disk.device.read.requests, disk.device.write.requests, disk.device.flush.requests]
`,
		"agent.yaml": fmt.Sprintf(`
node: compute-1
polling: %[1]s/polling.yaml
libvirt: [%[2]s]
socket: %[1]s/run/agent.sock
counters: %[1]s/run/counters
spool: {path: %[1]s/spool}
pins: ""
key_file: %[1]s/keys/compute-1.key
amqp: {url: "%[3]s"}
`, dir, l.ReadOnlySocket(), rabbit.URL()),
		"notifier.yaml": fmt.Sprintf(`
keys: %[1]s/keys
amqp: {url: "%[2]s"}
`, dir, rabbit.URL()),
		"central.yaml": fmt.Sprintf(`
keys: %[1]s/keys
amqp: {url: "%[2]s"}
store: {path: %[1]s/store, min_free: 0}
api: {listen: "%[3]s"}
`, dir, rabbit.URL(), listen),
	}
	for name, text := range files {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	c := &cloud{t: t, lab: l, rabbit: rabbit, api: "http://" + listen, libvirtResolution: 20e6}
	program := func(name, command string, attr *syscall.SysProcAttr) *daemon {
		d := &daemon{t: t, path: binary(t, name), log: filepath.Join(dir, name+command+".log"), attr: attr}
		config := command
		if command == "" {
			config = "agent"
		} else {
			d.args = []string{command}
		}
		d.args = append(d.args, "--config", filepath.Join(dir, config+".yaml"))
		t.Cleanup(func() {
			if d.cmd != nil {
				d.end()
			}
			if t.Failed() {
				log, _ := os.ReadFile(d.log)
				t.Logf("== %s %s\n%s", name, command, log[max(0, len(log)-20000):])
			}
		})
		d.start()
		return d
	}
	c.central = program("kvmeter", "central", nil)
	c.notifier = program("kvmeter", "notifier", nil)
	c.eventually("the API", func() error { return c.get("/v2/meters", new([]any)) })
	c.stopWitness = witness(t, ctx, rabbit.URL())
	c.agent = program("kvmeter-agent", "", unprivileged)
	return c
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func (c *cloud) eventually(what string, try func() error) {
	c.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

type apiSample struct {
	ID       string      `json:"id"`
	Meter    string      `json:"meter"`
	Resource string      `json:"resource_id"`
	Project  string      `json:"project_id"`
	Time     string      `json:"timestamp"`
	Volume   json.Number `json:"volume"`
}

func (c *cloud) get(path string, v any) error {
	resp, err := http.Get(c.api + path)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, resp.Status)
	}
	d := json.NewDecoder(resp.Body)
	d.UseNumber()
	return d.Decode(v)
}

func (c *cloud) tool(args ...string) string {
	c.t.Helper()
	return output(c.t, binary(c.t, "kvmeter"), append(args, "--endpoint", c.api)...)
}

// witness binds a queue of its own beside the notifier's and returns a function
// that ends it and returns every sample it saw, by id.
func witness(t testing.TB, ctx context.Context, url string) (stop func() map[string]sample.Sample) {
	t.Helper()
	const queue = "witness"
	conn, err := amqp.Dial(url)
	check(t, err)
	ch, err := conn.Channel()
	check(t, err)
	_, err = ch.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"})
	check(t, err)
	check(t, ch.QueueBind(queue, "samples.#", bus.Exchange, false, nil))
	check(t, conn.Close())
	return func() map[string]sample.Sample {
		t.Helper()
		conn, err := amqp.Dial(url)
		check(t, err)
		defer func() { _ = conn.Close() }()
		ch, err := conn.Channel()
		check(t, err)
		decoder, err := sample.NewDecoder()
		check(t, err)
		seen := map[string]sample.Sample{}
		for {
			m, ok, err := ch.Get(queue, true)
			check(t, err)
			if !ok {
				return seen
			}
			b, err := decoder.Decode(m.Body)
			check(t, err)
			for s := range b.Samples() {
				id := s.ID.String()
				if old, ok := seen[id]; ok && (old.Volume != s.Volume || old.Time != s.Time) {
					t.Errorf("sample %s was sent with two values", id)
				}
				seen[id] = s
			}
		}
	}
}

// compareWithWitness checks that the store holds exactly what was on the bus:
// nothing missing, doubled or altered.
func (c *cloud) compareWithWitness() {
	c.t.Helper()
	want := c.stopWitness()
	var stored []apiSample
	c.eventually("every sample in the store", func() error {
		if err := c.get("/v2/samples?limit=10000000", &stored); err != nil {
			return err
		}
		if len(stored) < len(want) {
			return fmt.Errorf("%d samples, the witness saw %d", len(stored), len(want))
		}
		return nil
	})
	if len(want) == 0 {
		c.t.Fatal("the witness saw nothing")
	}
	seen := map[string]bool{}
	for _, s := range stored {
		if seen[s.ID] {
			c.t.Errorf("sample %s is stored twice", s.ID)
		}
		seen[s.ID] = true
		w, ok := want[s.ID]
		if !ok {
			c.t.Errorf("sample %s (%s of %s at %s) is stored and was never on the bus", s.ID, s.Meter, s.Resource, s.Time)
			continue
		}
		at, err := time.Parse("2006-01-02T15:04:05.999999", s.Time)
		check(c.t, err)
		if s.Meter != w.Name || s.Resource != w.Resource || s.Project != w.Project || at.UnixMicro() != w.Time || s.Volume.String() != string(w.Volume.AppendAPI(nil)) {
			c.t.Errorf("stored %+v, sent %+v", s, w)
		}
	}
	for id, w := range want {
		if !seen[id] {
			c.t.Errorf("sample %s (%s of %s) was on the bus and is not stored", id, w.Name, w.Resource)
		}
	}
	c.t.Logf("%d samples on the bus, %d in the store", len(want), len(stored))
}

// libvirtCPU returns libvirt's cpu.time of the guest, in ns.
func (c *cloud) libvirtCPU(g *lab.Guest) uint64 {
	c.t.Helper()
	conn, err := c.lab.Connect(c.t.Context())
	check(c.t, err)
	defer func() { _ = conn.Disconnect() }()
	_, _, _, _, ns, err := conn.DomainGetInfo(golibvirt.Domain{Name: g.Name, UUID: g.Domain().UUID, ID: g.Domain().ID})
	check(c.t, err)
	return ns
}

// stop stops a process until the function it returns is called.
func stop(t testing.TB, pid int) (resume func()) {
	t.Helper()
	check(t, syscall.Kill(pid, syscall.SIGSTOP))
	return func() { check(t, syscall.Kill(pid, syscall.SIGCONT)) }
}
