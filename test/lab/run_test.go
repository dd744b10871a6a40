//go:build lab

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sync/errgroup"
)

// change is what a guest's statistics that start with one of the prefixes have
// grown by.
func change(t *testing.T, g *Guest, do func()) map[string]uint64 {
	t.Helper()
	before, err := g.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	do()
	after, err := g.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	grown := map[string]uint64{}
	for name, v := range after {
		counted := strings.HasPrefix(name, "net.") || strings.HasPrefix(name, "block.")
		if counted && v != before[name] && !strings.HasSuffix(name, ".times") &&
			!strings.HasSuffix(name, "allocation") && !strings.HasSuffix(name, "physical") {
			grown[name] = v - before[name]
		}
	}
	return grown
}

func tell(t *testing.T, g *Guest, command string) string {
	t.Helper()
	out, err := g.Exec(t.Context(), command)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func started(t *testing.T) *Lab {
	t.Helper()
	l := Start(t, Options{})
	if err := l.StartLibvirt(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l
}

func start(t *testing.T, l *Lab, spec GuestSpec) *Guest {
	t.Helper()
	g, err := l.StartGuest(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestALinuxGuestDoesExactlyWhatItIsTold(t *testing.T) {
	l := started(t)
	g := start(t, l, GuestSpec{NICs: 2, Disks: []Disk{
		{Format: "raw", Cache: "none", AIO: "native"},
		{Format: "raw", Cache: "none", AIO: "threads"},
		{Format: "raw", Cache: "none", AIO: "io_uring"},
		{Format: "raw", Cache: "writeback", AIO: "threads"},
		{Format: "raw", Cache: "writeback", AIO: "io_uring"},
		{Format: "qcow2", Cache: "none", AIO: "native"},
		{Format: "qcow2", Cache: "none", AIO: "io_uring"},
		{Format: "qcow2", Cache: "writeback", AIO: "threads"},
	}})
	other := start(t, l, GuestSpec{})

	for i, d := range g.Spec.Disks {
		name := "vd" + string(rune('a'+i))
		t.Run(fmt.Sprintf("on a disk %s,%s,%s", d.Format, d.Cache, d.AIO), func(t *testing.T) {
			got := change(t, g, func() {
				tell(t, g, "write 65536 512 "+name)
				tell(t, g, "read 4096 1000 7 "+name)
				tell(t, g, "flush "+name)
			})
			b := fmt.Sprintf("block.%d.", i)
			same(t, got, map[string]uint64{
				b + "wr.reqs": 512, b + "wr.bytes": 512 * 65536,
				b + "rd.reqs": 1000, b + "rd.bytes": 1000 * 4096, b + "fl.reqs": 1,
			})
		})
	}
	t.Run("on the network, and no other guest sees any of it", func(t *testing.T) {
		idle := change(t, other, func() {
			got := change(t, g, func() {
				tell(t, g, "udp 2000 100")
				tell(t, g, "udp 300 1472 eth1")
				if err := g.SendUDP(t.Context(), 2000, 200); err != nil {
					t.Fatal(err)
				}
			})
			same(t, got, map[string]uint64{
				"net.0.tx.pkts": 2000, "net.0.tx.bytes": 2000 * 142,
				"net.0.rx.pkts": 2000, "net.0.rx.bytes": 2000 * 242,
				"net.1.tx.pkts": 300, "net.1.tx.bytes": 300 * 1514,
			})
		})
		same(t, idle, map[string]uint64{})
	})
	t.Run("with its CPU", func(t *testing.T) {
		begin := time.Now()
		before, err := g.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		out := tell(t, g, "cpusec 1")
		after, err := g.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var ns uint64
		if _, err := fmt.Sscanf(out, "%d ns", &ns); err != nil || ns < 1e9 || ns > 1.1e9 {
			t.Errorf("guest says %q, want little more than 1e9 ns", out)
		}
		// A host that is busy gives the vCPU less than the guest believes.
		used := time.Duration(after["vcpu.0.time"] - before["vcpu.0.time"])
		if used < 100*time.Millisecond || used > time.Since(begin)+20*time.Millisecond {
			t.Errorf("vCPU used %v in %v, want some of it", used, time.Since(begin))
		}
	})
	t.Run("and nothing while it is told nothing", func(t *testing.T) {
		same(t, change(t, g, func() { tell(t, g, "true") }), map[string]uint64{})
	})
	t.Run("nor while it is paused", func(t *testing.T) {
		if err := g.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		before, err := g.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := g.Exec(ctx, "true"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a paused guest answered: %v", err)
		}
		after, err := g.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if a, b := before["vcpu.0.time"], after["vcpu.0.time"]; a != b {
			t.Errorf("vCPU time went from %d to %d ns in a paused guest", a, b)
		}
		if err := g.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		// The answer to the abandoned command comes first and is not taken for this one's.
		if got := tell(t, g, "read 512 3"); got != "3 blocks of 512 bytes" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("refuses what it cannot do", func(t *testing.T) {
		for _, command := range []string{"write 100 1", "read 4096 1 99999", "flush vdz", "dance", "udp 1 9000", "cpu 200 1", "cpusec x"} {
			if out, err := g.Exec(t.Context(), command); !errors.Is(err, ErrCommand) || out == "" {
				t.Errorf("%s: got %q, %v, want a refusal with a reason", command, out, err)
			}
		}
	})
	t.Run("powers off when told, and starts again with its disks", func(t *testing.T) {
		tell(t, g, "off")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := poll(ctx, func() bool { return !g.Running() }); err != nil {
			t.Fatal("it still runs:", err)
		}
		if err := g.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		tell(t, g, "read 4096 1 vdh")
	})
	t.Run("and leaves nothing when destroyed", func(t *testing.T) {
		tap := g.NICs()[0].Tap
		if err := g.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{g.dir(), "/sys/class/net/" + tap} {
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is still there", path)
			}
		}
		if err := g.Destroy(t.Context()); err != nil {
			t.Errorf("destroying it twice: %v", err)
		}
	})
}

func same(t *testing.T, got, want map[string]uint64) {
	t.Helper()
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s grew by %d, want %d", name, got[name], want[name])
		}
	}
	for name, v := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s grew by %d, want 0", name, v)
		}
	}
}

func TestKVMGuestsHaveVCPUThreadsThatDoWhatTheirModeSays(t *testing.T) {
	if err := checkKVM(); err != nil {
		t.Skip(err)
	}
	l := started(t)
	t.Run("disk reads so many sectors", func(t *testing.T) {
		g := start(t, l, GuestSpec{Kind: KVM, Mode: "disk"})
		waitConsole(t, g, "D")
		got, err := g.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if reqs, bytes := got["block.0.rd.reqs"], got["block.0.rd.bytes"]; reqs != DiskReads || bytes != DiskReads*512 {
			t.Errorf("got %d reads of %d bytes in all, want %d of %d", reqs, bytes, DiskReads, DiskReads*512)
		}
	})
	t.Run("burn keeps all vCPUs busy", func(t *testing.T) {
		g := start(t, l, GuestSpec{Kind: KVM, Mode: "burn", VCPUs: 2})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := poll(ctx, func() bool {
			ran := vcpuTimes(t, g)
			return ran[0] > 200*time.Millisecond && ran[1] > 200*time.Millisecond
		})
		if err != nil {
			t.Errorf("vCPUs ran %v, want more than 200 ms each", vcpuTimes(t, g))
		}
		if err := g.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		if busy := grow(t, g); busy[0] != 0 || busy[1] != 0 {
			t.Errorf("paused vCPUs ran %v, want nothing", busy)
		}
		if err := g.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("pulse works a little", func(t *testing.T) {
		g := start(t, l, GuestSpec{Kind: KVM, Mode: "pulse"})
		waitConsole(t, g, "R")
		if busy := grow(t, g); busy[0] == 0 || busy[0] > 400*time.Millisecond {
			t.Errorf("vCPU ran %v of 500 ms, want some of it", busy[0])
		}
	})
	t.Run("idle does nothing", func(t *testing.T) {
		g := start(t, l, GuestSpec{Kind: KVM})
		waitConsole(t, g, "R")
		if busy := grow(t, g); busy[0] > 5*time.Millisecond {
			t.Errorf("vCPU ran %v, want nothing", busy[0])
		}
	})
}

func waitConsole(t *testing.T, g *Guest, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err := poll(ctx, func() bool {
		b, err := os.ReadFile(g.Console())
		return err == nil && strings.Contains(string(b), want)
	})
	if err != nil {
		t.Fatalf("no %q on the console of %s", want, g.Name)
	}
}

// grow is what each vCPU thread runs in half a second, by the kernel's account.
func grow(t *testing.T, g *Guest) []time.Duration {
	t.Helper()
	before := vcpuTimes(t, g)
	time.Sleep(500 * time.Millisecond)
	after := vcpuTimes(t, g)
	for i := range after {
		after[i] -= before[i]
	}
	return after
}

func vcpuTimes(t *testing.T, g *Guest) []time.Duration {
	t.Helper()
	comms, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", g.PID()))
	if err != nil {
		t.Fatal(err)
	}
	times := make([]time.Duration, g.Spec.VCPUs)
	found := 0
	for _, path := range comms {
		comm, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var n int
		if _, err := fmt.Sscanf(string(comm), "CPU %d/KVM", &n); err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(filepath.Dir(path), "schedstat"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(stat), &times[n]); err != nil {
			t.Fatal(err)
		}
		found++
	}
	if found != g.Spec.VCPUs {
		t.Fatalf("found %d vCPU threads, want %d", found, g.Spec.VCPUs)
	}
	return times
}

func TestTwoLabsRunSideBySideAndGuestsOutliveLibvirtd(t *testing.T) {
	var labs [2]*Lab
	var guests [2]*Guest
	var group errgroup.Group
	for i := range labs {
		labs[i] = Start(t, Options{})
		group.Go(func() error {
			if err := labs[i].StartLibvirt(t.Context()); err != nil {
				return err
			}
			var err error
			guests[i], err = labs[i].StartGuest(t.Context(), GuestSpec{})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	a, b := guests[0], guests[1]

	idle := change(t, b, func() {
		same(t, change(t, a, func() {
			tell(t, a, "udp 100 100")
			tell(t, a, "write 4096 10")
		}), map[string]uint64{
			"net.0.tx.pkts": 100, "net.0.tx.bytes": 14200, "block.0.wr.reqs": 10, "block.0.wr.bytes": 40960,
		})
	})
	same(t, idle, map[string]uint64{})

	for name, stop := range map[string]func(context.Context) error{
		"stopped": labs[0].StopLibvirt, "killed": labs[0].KillLibvirt,
	} {
		pid := a.PID()
		if err := stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Stats(t.Context()); err == nil {
			t.Errorf("libvirtd %s: it answers", name)
		}
		tell(t, a, "write 4096 5")
		tell(t, b, "true")
		if err := labs[0].StartLibvirt(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a.PID() != pid || pid == 0 {
			t.Errorf("libvirtd %s: the guest's process went from %d to %d", name, pid, a.PID())
		}
		same(t, change(t, a, func() { tell(t, a, "write 4096 7") }), map[string]uint64{
			"block.0.wr.reqs": 7, "block.0.wr.bytes": 7 * 4096,
		})
	}

	// A lab opened anew knows its guests, and its end does not touch the other's.
	again, err := New(labs[0].Dir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	found, err := again.Guest("1")
	if err != nil {
		t.Fatal(err)
	}
	if found.UUID != a.UUID || !found.Running() {
		t.Errorf("found guest %s, running %v, want %s, running", found.UUID, found.Running(), a.UUID)
	}
	tell(t, found, "true")
	if err := labs[0].KillLibvirt(t.Context()); err != nil { // as after a crash
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := labs[0].processes(func(process) bool { return true }); err != nil || len(left) != 0 {
		t.Errorf("closed lab still has processes %v, %v", left, err)
	}
	if _, err := os.Stat(labs[0].Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("closed lab still has its folder")
	}
	tell(t, b, "true")
	if _, err := b.Stats(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestTheMachinesOwnLibvirtIsNotTouched(t *testing.T) {
	before := listing(t)
	l := started(t)
	g := start(t, l, GuestSpec{})
	if after := listing(t); after != before {
		t.Errorf("before:\n%safter:\n%s", before, after)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", g.PID()))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "instance-") {
		t.Errorf("the guest has a control group of its own:\n%s", b)
	}
	// Everybody may read.
	if fi, err := os.Stat(l.ReadOnlySocket()); err != nil || fi.Mode().Perm() != 0o777 {
		t.Errorf("read-only socket: got %v, %v, want mode 0777", fi, err)
	}
}

// listing is every file of libvirt on the machine, with its time.
func listing(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, d := range libvirtDirs {
		err := filepath.WalkDir(d.path, func(path string, e os.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			fi, err := e.Info()
			if err == nil {
				fmt.Fprintln(&b, path, fi.ModTime().UnixNano())
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func TestRabbitMQKeepsConfirmedMessagesWhenKilled(t *testing.T) {
	l := Start(t, Options{})
	r, err := l.RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// RabbitMQ 3.10 writes down a new queue's name within half a second, without
	// which a kill takes the whole queue: so the messages are spread over two.
	const messages = 100
	publish(t, r, messages, 20*time.Millisecond)
	pid := r.PID()
	if err := r.Kill9(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); err == nil && r.PID() != 0 {
		t.Error("it still runs")
	}
	if _, err := amqp.Dial(r.URL()); err == nil {
		t.Error("it still answers")
	}
	again, err := l.RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if again.URL() != r.URL() {
		t.Errorf("node moved from %s to %s", r.URL(), again.URL())
	}
	if got := count(t, again); got != messages {
		t.Errorf("got %d messages after kill -9, want all %d confirmed ones", got, messages)
	}
	if err := r.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := l.processes(func(process) bool { return true }); err != nil || len(left) != 0 {
		t.Errorf("stopped node left processes %v, %v", left, err)
	}
}

// publish declares a quorum queue and puts n confirmed messages into it.
func publish(t *testing.T, r *Rabbit, n int, every time.Duration) {
	t.Helper()
	ch := channel(t, r)
	if _, err := ch.QueueDeclare("q", true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		t.Fatal(err)
	}
	if err := ch.Confirm(false); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		confirm, err := ch.PublishWithDeferredConfirm("", "q", true, false, amqp.Publishing{
			DeliveryMode: amqp.Persistent, Body: fmt.Append(nil, i),
		})
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := confirm.WaitContext(t.Context()); err != nil || !ok {
			t.Fatalf("message %d is not confirmed: %v", i, err)
		}
		time.Sleep(every)
	}
}

// count reads all messages and checks that each is the one due. A queue whose
// leader is not elected yet refuses: it is asked again.
func count(t *testing.T, r *Rabbit) (n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var last error
	err := poll(ctx, func() bool {
		n, last = read(t, r)
		return last == nil
	})
	if err != nil {
		t.Fatalf("read the queue: %v: %v", err, last)
	}
	return n
}

// read leaves the messages unacknowledged, so that they go back when its
// connection is closed.
func read(t *testing.T, r *Rabbit) (int, error) {
	conn, err := amqp.Dial(r.URL())
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close() }()
	ch, err := conn.Channel()
	if err != nil {
		return 0, err
	}
	for n := 0; ; n++ {
		m, ok, err := ch.Get("q", false)
		if err != nil || !ok {
			return n, err
		}
		if string(m.Body) != fmt.Sprint(n) {
			t.Errorf("message %d is %q", n, m.Body)
		}
	}
}

func channel(t *testing.T, r *Rabbit) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(r.URL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func TestAGuestMigratesWithAllThatItHas(t *testing.T) {
	ctx := t.Context()
	from, to := started(t), Start(t, Options{Apart: true})
	if err := to.StartLibvirt(ctx); err != nil {
		t.Fatal(err)
	}
	g := start(t, from, GuestSpec{})
	pid := g.PID()
	if err := g.Migrate(ctx, to); err != nil {
		t.Fatal(err)
	}
	if now := g.PID(); now == pid || now == 0 {
		t.Errorf("its PID is %d, was %d", now, pid)
	}
	got := change(t, g, func() {
		tell(t, g, "write 4096 10")
		tell(t, g, "udp 200 100")
		if err := g.SendUDP(ctx, 100, 10); err != nil {
			t.Error(err)
		}
	})
	for name, want := range map[string]uint64{"block.0.wr.reqs": 10, "net.0.rx.pkts": 100, "net.0.tx.pkts": 200} {
		if got[name] != want {
			t.Errorf("%s grew by %d, want %d", name, got[name], want)
		}
	}
}
