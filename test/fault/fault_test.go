//go:build lab

package fault

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/failpoint"
	"github.com/kvmeter/kvmeter/test/lab"
)

// recovery bounds how long it may take until samples flow again.
const recovery = 2 * time.Minute

// fault breaks something and mends it.
type fault struct {
	name string
	do   func(w *world)
}

// faults are the table.
func faults() []fault {
	var all []fault
	for _, at := range []struct{ program, point string }{
		{"agent", failpoint.SpoolPut},
		{"agent", failpoint.SpoolKept},
		{"agent", failpoint.PublishSent},
		{"agent", failpoint.PublishConfirmed},
		{"notifier", failpoint.PublishSent},
		{"notifier", failpoint.PublishConfirmed},
		{"notifier", failpoint.AckDue},
		{"notifier", failpoint.AckSent},
		{"central", failpoint.StoreCommit},
		{"central", failpoint.StoreCommitted},
		{"central", failpoint.AckDue},
		{"central", failpoint.AckSent},
	} {
		all = append(all, fault{at.program + " killed at " + at.point, func(w *world) { w.killAt(at.program, at.point) }})
	}
	for _, program := range []string{"agent", "notifier", "central"} {
		all = append(all, fault{program + " killed at any time", func(w *world) {
			w.pause()
			w.programs[program].kill()
			w.pause()
			w.programs[program].start("")
		}})
	}
	return append(
		all,
		fault{"broker killed", func(w *world) {
			w.check(w.rabbit.Kill9(w.t.Context()))
			w.check(w.rabbit.Start(w.t.Context()))
		}},
		fault{"broker stands still", func(w *world) {
			pid := w.rabbit.PID()
			w.check(syscall.Kill(pid, syscall.SIGSTOP))
			w.pause()
			w.check(syscall.Kill(pid, syscall.SIGCONT))
		}},
		fault{"broker slow", func(w *world) {
			pid := w.rabbit.PID()
			for range 20 { // it has a tenth of the time
				w.check(syscall.Kill(pid, syscall.SIGSTOP))
				time.Sleep(180 * time.Millisecond)
				w.check(syscall.Kill(pid, syscall.SIGCONT))
				time.Sleep(20 * time.Millisecond)
			}
		}},
		fault{"broker out of disk", func(w *world) {
			w.ctl("set_disk_free_limit", "1000000000000000")
			w.pause()
			w.ctl("set_disk_free_limit", "50MB")
		}},
		fault{"agent cut off from the broker", func(w *world) {
			w.check(w.net.link("down"))
			w.pause()
			w.check(w.net.link("up"))
		}},
		fault{"store out of disk", func(w *world) { w.fill("store") }},
		fault{"spool out of disk", func(w *world) { w.fill("spool") }},
		fault{"store stands still until the agent spools", func(w *world) {
			w.ctl("set_policy", "--apply-to", "queues", "short", `^kvmeter\.(samples|store)\.`, `{"max-length":3}`)
			central := w.programs["central"].cmd.Process
			w.check(central.Signal(syscall.SIGSTOP))
			w.eventually("the agent spools", func() error { return w.spools(10) })
			w.check(central.Signal(syscall.SIGCONT))
			w.ctl("clear_policy", "short")
		}},
		fault{"libvirtd killed", func(w *world) {
			w.check(w.lab.KillLibvirt(w.t.Context()))
			w.pause()
			w.check(w.lab.StartLibvirt(w.t.Context()))
		}},
		fault{"agent's clock set forward by an hour, and back", func(w *world) {
			w.step(time.Hour)
			w.step(0)
		}},
		fault{"agent's clock set back by an hour, and forward", func(w *world) {
			w.step(-time.Hour)
			w.step(0)
		}},
		fault{"all killed at once", func(w *world) {
			for _, p := range w.programs {
				p.kill()
			}
			for _, p := range w.programs {
				p.start("")
			}
		}},
	)
}

// TestFaults runs FAULT_ROUNDS faults in an order that follows from FAULT_SEED,
// and all of the table before any comes again.
func TestFaults(t *testing.T) {
	seed, rounds := number(t, "FAULT_SEED", 1), number(t, "FAULT_ROUNDS", 8)
	t.Logf("seed %d, %d rounds; FAULT_SEED=%d repeats them", seed, rounds, seed)
	w := newWorld(t, seed)
	table := faults()
	w.flows()
	var order []int
	for range rounds {
		if len(order) == 0 {
			order = w.rng.Perm(len(table))
		}
		f := table[order[0]]
		order = order[1:]
		began := time.Now()
		f.do(w)
		mended := time.Now()
		w.flows()
		t.Logf("%s, which took %s: samples flow again after %s", f.name, mended.Sub(began).Round(10*time.Millisecond), time.Since(mended).Round(10*time.Millisecond))
	}
	w.compare()
}

func number(t *testing.T, variable string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// world is an agent with three domains, a broker, a notifier and a central.
type world struct {
	t        *testing.T
	rng      *rand.Rand
	dir, api string
	lab      *lab.Lab
	rabbit   *lab.Rabbit
	net      *network
	ahead    time.Duration // that the agent's wall clock is
	programs map[string]*program
}

func newWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "kvmeter-fault-")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 0)), dir: dir, programs: map[string]*program{}}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	build := func(args ...string) {
		t.Helper()
		c := exec.Command("go", append([]string{"build", "-tags", "failpoints", "-o", dir + "/bin/"}, args...)...)
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
	}
	build("github.com/kvmeter/kvmeter/cmd/kvmeter")
	build("-overlay", overlay(t, dir), "github.com/kvmeter/kvmeter/cmd/kvmeter-agent")
	w.lab = lab.Start(t, lab.Options{})
	w.check(w.lab.StartLibvirt(t.Context()))
	_, err = w.lab.StartGuest(t.Context(), lab.GuestSpec{Kind: lab.KVM, Mode: "pulse"})
	w.check(err)
	w.rabbit, err = w.lab.RabbitMQ(t.Context())
	w.check(err)
	uri, err := amqp.ParseURI(w.rabbit.URL())
	w.check(err)
	w.net = newNetwork(t, fmt.Sprintf("%s:%d", uri.Host, uri.Port))
	for name, size := range map[string]string{"store": "64m", "spool": "16m"} {
		path := filepath.Join(dir, name)
		w.check(os.Mkdir(path, 0o755))
		w.check(unix.Mount("kvmeter", path, "tmpfs", 0, "size="+size))
		t.Cleanup(func() {
			if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	w.check(os.Mkdir(filepath.Join(dir, "keys"), 0o700))
	w.check(os.WriteFile(filepath.Join(dir, "keys", "compute-1.key"), []byte(hex.EncodeToString([]byte("a secret of the fault test"))), 0o600))
	listen, err := net.Listen("tcp", "127.0.0.1:0")
	w.check(err)
	w.api = "http://" + listen.Addr().String()
	w.check(listen.Close())
	for name, c := range map[string]struct {
		args   []string
		config string
	}{
		"agent": {[]string{"kvmeter-agent", "--without-bpf"}, fmt.Sprintf(`
node: compute-1
interval: 200ms
spread: false
libvirt: [%[3]s]
metrics: %[4]s
socket: ""
counters: %[1]s/counters
pins: ""
key_file: %[1]s/keys/compute-1.key
spool: {path: %[1]s/spool/agent, max_bytes: 8388608}
amqp: {url: "amqp://guest:guest@%[2]s/", heartbeat: 1s}
`, dir, w.net.broker, w.lab.ReadOnlySocket(), w.net.metrics)},
		"notifier": {[]string{"kvmeter", "notifier"}, fmt.Sprintf("keys: %[1]s/keys\nspool: \"\"\nstate: %[1]s/state\nprefetch: 10\namqp: {url: %[2]q}\n", dir, w.rabbit.URL())},
		"central": {[]string{"kvmeter", "central"}, fmt.Sprintf(`
keys: %[1]s/keys
prefetch: 10
amqp: {url: %[2]q}
store: {path: %[1]s/store/store, min_free: 4194304}
api: {listen: %[3]q}
`, dir, w.rabbit.URL(), strings.TrimPrefix(w.api, "http://"))},
	} {
		file := filepath.Join(dir, name+".yaml")
		w.check(os.WriteFile(file, []byte(c.config), 0o600))
		p := &program{w: w, name: name, args: append(c.args, "--config", file)}
		p.args[0] = filepath.Join(dir, "bin", p.args[0])
		if name == "agent" {
			p.args = append([]string{"ip", "netns", "exec", w.net.name}, p.args...)
		}
		w.programs[name] = p
		t.Cleanup(func() {
			p.kill()
			if t.Failed() {
				log, _ := os.ReadFile(p.log())
				t.Logf("%s:\n%s", name, log[max(0, len(log)-4000):])
			}
		})
	}
	lab.StartHerd(t, lab.HerdSpec{Count: 3, Threads: lab.QEMUThreads, Busy: 6, Work: 100 * time.Microsecond, Rest: 10 * time.Millisecond})
	w.programs["central"].start("")
	w.eventually("central has made the topology", func() error { return w.broker(func(ch *amqp.Channel) error { return w.tap(ch) }) })
	// RabbitMQ 3.10 writes the names of new quorum queues down some 500 ms later:
	// one that is younger when the broker is killed never has a leader again.
	time.Sleep(3 * time.Second)
	w.programs["notifier"].start("")
	w.programs["agent"].start("")
	return w
}

func (w *world) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// pause is a part of a second or two, while something is broken.
func (w *world) pause() { time.Sleep(time.Duration(500+w.rng.IntN(1000)) * time.Millisecond) }

func (w *world) ctl(args ...string) {
	w.t.Helper()
	cmd := exec.Command(lab.RabbitMQCtl, args...)
	cmd.Env = append(w.rabbit.Env(), "PATH="+os.Getenv("PATH"), "LANG=C.UTF-8")
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("rabbitmqctl %q: %v\n%s", args, err, out)
	}
}

// eventually tries until it works.
func (w *world) eventually(what string, try func() error) {
	w.t.Helper()
	for deadline := time.Now().Add(recovery); ; time.Sleep(50 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("waited in vain until %s: %v", what, err)
		}
	}
}

// broker runs f with a channel of the test's own.
func (w *world) broker(f func(*amqp.Channel) error) error {
	conn, err := amqp.Dial(w.rabbit.URL())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	return f(ch)
}

// tapQueue gets a copy of what agents send: an agent's confirm means that it has
// one, too.
const tapQueue = "tap"

func (w *world) tap(ch *amqp.Channel) error {
	if _, err := ch.QueueDeclare(tapQueue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		return err
	}
	return ch.QueueBind(tapQueue, "samples.#", "kvmeter", false, nil)
}

// killAt has a program end at a point between two writes.
func (w *world) killAt(name, point string) {
	p := w.programs[name]
	p.kill()
	p.start(fmt.Sprintf("%s:%d", point, w.rng.IntN(5)))
	select {
	case <-p.ended:
	case <-time.After(recovery):
		w.t.Fatalf("%s never came to %s", name, point)
	}
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		w.t.Fatalf("%s ended otherwise: %v", name, p.cmd.ProcessState)
	}
	p.start("")
}

// fill leaves no space on the disk of a name for a while.
func (w *world) fill(name string) {
	path := filepath.Join(w.dir, name, "fill")
	f, err := os.Create(path)
	w.check(err)
	for buf := make([]byte, 1<<16); err == nil; {
		_, err = f.Write(buf)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		w.t.Errorf("fill the disk of the %s: %v", name, err)
	}
	w.check(f.Close())
	w.pause()
	w.check(os.Remove(path))
}

// program is one that is killed and started again.
type program struct {
	w     *world
	name  string
	args  []string
	cmd   *exec.Cmd
	ended chan struct{}
}

func (p *program) log() string { return filepath.Join(p.w.dir, p.name+".log") }

func (p *program) start(failpoint string) {
	p.w.t.Helper()
	log, err := os.OpenFile(p.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	p.w.check(err)
	defer func() { _ = log.Close() }()
	cmd := exec.Command(p.args[0], p.args[1:]...)
	cmd.Env = append(os.Environ(), "FAILPOINT="+failpoint)
	if p.name == "agent" {
		cmd.Env = append(cmd.Env, "FAILPOINT_CLOCK="+filepath.Join(p.w.dir, "clock"))
	}
	cmd.Stdout, cmd.Stderr = log, log
	p.w.check(cmd.Start())
	p.cmd, p.ended = cmd, make(chan struct{})
	go func(ended chan struct{}) {
		_ = cmd.Wait() // how it ended is in its ProcessState
		close(ended)
	}(p.ended)
}

func (p *program) kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.ended
}

// end ends it in good order.
func (p *program) end() {
	p.w.t.Helper()
	p.w.check(p.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-p.ended:
	case <-time.After(recovery):
		p.w.t.Fatalf("%s does not end", p.name)
	}
}

// stored is a sample as the API has it.
type stored struct {
	ID       string      `json:"id"`
	Meter    string      `json:"meter"`
	Resource string      `json:"resource_id"`
	Time     string      `json:"timestamp"`
	Type     string      `json:"type"`
	Volume   json.Number `json:"volume"`
}

// whole is a volume without the fraction that the API gives to whole ones.
func whole(volume string) string { return strings.TrimSuffix(volume, ".0") }

// ask asks the API.
func (w *world) ask(into any, path string, query ...string) error {
	resp, err := http.Get(w.api + path + "?" + strings.Join(query, "&"))
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

const timeFormat = "2006-01-02T15:04:05.000000"

// flows waits until a sample that is made after now is stored.
func (w *world) flows() {
	w.t.Helper()
	// Others of the future are from when the clock was set.
	now := time.Now().UTC().Add(w.ahead)
	bound := func(op string, at time.Time) string {
		return "q.field=timestamp&q.op=" + op + "&q.value=" + at.Format(timeFormat)
	}
	w.eventually("samples flow", func() error {
		var newest []stored
		if err := w.ask(&newest, "/v2/samples", "limit=1", bound("gt", now), bound("lt", now.Add(recovery))); err != nil {
			return err
		}
		if len(newest) == 0 {
			return errors.New("there is none")
		}
		return nil
	})
}

// spools returns an error unless so many batches wait in the agent's spool.
func (w *world) spools(n int) error {
	resp, err := http.Get("http://" + w.net.metrics + "/metrics")
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(page)) {
		if text, ok := strings.CutPrefix(line, "kvmeter_agent_spool_batches "); ok {
			if has, err := strconv.ParseFloat(strings.TrimSpace(text), 64); err != nil || int(has) < n {
				return fmt.Errorf("%s wait (%w)", text, err)
			}
			return nil
		}
	}
	return errors.New("the page does not tell")
}

// compare ends the agent, lets the rest come, and compares what was sent with what
// is stored.
func (w *world) compare() {
	w.t.Helper()
	type key struct{ id, meter, resource, volume string }
	sent := map[key]bool{}
	decoder, err := sample.NewDecoder()
	w.check(err)
	w.programs["agent"].end()
	var dead int
	batches := map[sample.BatchID]*sample.Batch{}
	var epochs []uint64 // as they came
	copies := 0
	w.check(w.broker(func(ch *amqp.Channel) error {
		for {
			d, ok, err := ch.Get(tapQueue, true)
			if err != nil || !ok {
				return err
			}
			b, err := decoder.Decode(d.Body)
			if err != nil {
				return err
			}
			copies++
			if batches[b.ID] = b; !slices.Contains(epochs, b.Epoch) {
				epochs = append(epochs, b.Epoch)
			}
			for s := range b.Samples() {
				sent[key{s.ID.String(), s.Name, s.Resource, whole(s.Volume.String())}] = true
			}
		}
	}))
	var got map[key]int
	all := []stored{}
	w.eventually("everything is stored", func() error {
		if err := w.ask(&all, "/v2/samples", "limit=10000000"); err != nil {
			return err
		}
		got = map[key]int{}
		for _, s := range all {
			got[key{s.ID, s.Meter, s.Resource, whole(s.Volume.String())}]++
		}
		if len(got) < len(sent) {
			return fmt.Errorf("%d of %d samples are stored", len(got), len(sent))
		}
		return nil
	})
	w.check(w.broker(func(ch *amqp.Channel) error {
		q, err := ch.QueueDeclarePassive("kvmeter.dead", true, false, false, false, nil)
		dead = q.Messages
		return err
	}))
	w.t.Logf("%d samples in %d batches were sent, %d batches more than once; %d are stored", len(sent), len(batches), copies-len(batches), len(got))
	for k := range sent {
		if got[k] == 0 {
			w.t.Errorf("not stored, or altered: %v", k)
		}
	}
	for _, k := range slices.Collect(maps.Keys(got)) {
		if got[k] > 1 {
			w.t.Errorf("stored %d times: %v", got[k], k)
		}
		if !sent[k] {
			w.t.Errorf("stored, but never sent: %v", k)
		}
	}
	// Counters go on in the order in which they were read, whatever the clock said.
	type counter struct {
		meter, resource string
		of              sample.Incarnation // guests of others on this host may be started anew
	}
	cumulative := map[counter]uint64{}
	for _, b := range slices.SortedFunc(maps.Values(batches), func(a, b *sample.Batch) int {
		return cmp.Or(cmp.Compare(slices.Index(epochs, a.Epoch), slices.Index(epochs, b.Epoch)), cmp.Compare(a.Seq, b.Seq))
	}) {
		for s := range b.Samples() {
			series := counter{s.Name, s.Resource, s.Incarnation}
			if s.Kind != sample.Cumulative {
				continue
			}
			if before := cumulative[series]; s.Volume.Tag != sample.U64 || s.Volume.Bits < before {
				w.t.Errorf("%v goes back from %d to %s at %s", series, before, s.Volume, time.UnixMicro(s.Time))
			}
			cumulative[series] = s.Volume.Bits
		}
	}
	incarnations := map[[2]string]int{}
	for c := range cumulative {
		incarnations[[2]string{c.meter, c.resource}]++
	}
	w.compareUsage(slices.DeleteFunc(all, func(s stored) bool { return incarnations[[2]string{s.Meter, s.Resource}] != 1 }))
	if len(sent) == 0 || len(cumulative) == 0 {
		w.t.Error("nothing was sent")
	}
	if dead > 0 {
		w.t.Errorf("%d messages are in the dead-letter queue", dead)
	}
}

// compareUsage compares what the API says was used with the samples that are
// stored: by how much each counter exceeds the first in time, whatever the clock did.
func (w *world) compareUsage(all []stored) {
	w.t.Helper()
	slices.SortFunc(all, func(a, b stored) int { return strings.Compare(a.Time, b.Time) })
	type series struct{ meter, resource string }
	first, highest := map[series]uint64{}, map[series]uint64{}
	for _, s := range all {
		if s.Type != "cumulative" {
			continue
		}
		of := series{s.Meter, s.Resource}
		volume, err := strconv.ParseUint(whole(s.Volume.String()), 10, 64)
		w.check(err)
		if _, ok := first[of]; !ok {
			first[of] = volume
		}
		highest[of] = max(highest[of], volume)
	}
	var rows []struct {
		Meter    string      `json:"meter"`
		Resource string      `json:"resource_id"`
		Type     string      `json:"type"`
		Quantity json.Number `json:"quantity"`
	}
	begin := time.Now().UTC().Add(-2 * time.Hour).Format(timeFormat)
	end := time.Now().UTC().Add(2 * time.Hour).Format(timeFormat)
	w.check(w.ask(&rows, "/v2/usage", "start="+begin, "end="+end))
	used := map[series]uint64{}
	for _, r := range rows {
		if r.Type == "cumulative" {
			quantity, err := strconv.ParseUint(r.Quantity.String(), 10, 64)
			w.check(err)
			used[series{r.Meter, r.Resource}] += quantity
		}
	}
	for of := range first {
		// A domain that came when its node was metered already counts from zero.
		if want := highest[of] - first[of]; used[of] != want && used[of] != highest[of] {
			w.t.Errorf("usage of %v is %d, want %d, or all %d", of, used[of], want, highest[of])
		}
	}
}

// network is a network namespace whose only way out leads to the broker.
type network struct {
	name, host string // of the namespace, and of its device on this side
	broker     string // address of the broker, seen from inside
	metrics    string // address of the agent's metrics, seen from outside
}

func newNetwork(t *testing.T, target string) *network {
	t.Helper()
	id := os.Getpid() % 10000
	third := id % 250
	n := &network{name: fmt.Sprintf("kvm-fault-%d", id), host: fmt.Sprintf("kvf%d", id)}
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v\n%s", args, err, out)
		}
	}
	here, there := fmt.Sprintf("198.18.%d.1", third), fmt.Sprintf("198.18.%d.2/24", third)
	ip("netns", "add", n.name)
	t.Cleanup(func() { ip("netns", "del", n.name) }) // its devices end with it
	ip("link", "add", n.host, "type", "veth", "peer", "name", "eth0", "netns", n.name)
	ip("addr", "add", here+"/24", "dev", n.host)
	ip("link", "set", n.host, "up")
	ip("-n", n.name, "addr", "add", there, "dev", "eth0")
	ip("-n", n.name, "link", "set", "eth0", "up")
	ip("-n", n.name, "link", "set", "lo", "up")
	lis, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", here+":0")
	if err != nil {
		t.Fatal(err)
	}
	n.broker, n.metrics = lis.Addr().String(), strings.TrimSuffix(there, "/24")+":9187"
	t.Cleanup(func() { _ = lis.Close() })
	go forward(lis, target)
	return n
}

// link cuts the namespace off, or lets it in again: packets vanish, nothing is
// closed.
func (n *network) link(state string) error {
	if out, err := exec.Command("ip", "-n", n.name, "link", "set", "eth0", state).CombinedOutput(); err != nil {
		return fmt.Errorf("cut the network: %w: %s", err, out)
	}
	return nil
}

// forward passes connections on to the broker, which listens on loopback.
func forward(lis net.Listener, target string) {
	for {
		c, err := lis.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { _ = c.Close() }()
			up, err := net.Dial("tcp", target)
			if err != nil {
				return
			}
			defer func() { _ = up.Close() }()
			go func() {
				_, _ = io.Copy(up, c)
				_ = up.Close()
			}()
			_, _ = io.Copy(c, up)
		}()
	}
}
