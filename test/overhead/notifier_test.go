//go:build lab

package overhead

import (
	"bytes"
	"fmt"
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
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/test/lab"
)

const (
	// stream is how many notifications of a turn are measured.
	stream = 12_000
	// warm is how many each side is sent before.
	warm = 1_200
)

// side is a notification agent.
type side struct {
	name  string
	queue string // that it consumes from
	start func(b *testing.B, dir, broker string) *exec.Cmd
}

// BenchmarkNotifier sends the same notifications over one broker to Debian's
// ceilometer-agent-notification and to kvmeter notifier, in turns. Both convert them
// by the definitions that they bring, write the samples to a file, and keep the
// events in memory (test://: 19.0.0 writes no events to files). It reports the CPU
// time that each takes a notification, and how many times as much the original
// takes, as the medians of the turns. Start, loading and the first notifications
// are not in it.
func BenchmarkNotifier(b *testing.B) {
	program := filepath.Join(b.TempDir(), "kvmeter")
	build := exec.Command("go", "build", "-o", program, "github.com/kvmeter/kvmeter/cmd/kvmeter")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	sides := []side{{"ceilometer", "notifications.info", ceilometer}, {"kvmeter", "kvmeter.notifications.info", notifier(program)}}
	used := turns(b, sides)
	theirs, ours := used[0], used[1]
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = theirs[i] / ours[i]
	}
	b.ReportMetric(median(ratios), "times")
}

// turns lets the sides take turns, and returns how many µs of CPU a notification
// cost each in each.
func turns(b *testing.B, sides []side) [][]float64 {
	b.Helper()
	l := lab.Start(b, lab.Options{Log: zap.NewNop()})
	rabbit, err := l.RabbitMQ(b.Context())
	check(b, err)
	conn, err := amqp.Dial(rabbit.URL())
	check(b, err)
	defer func() { check(b, conn.Close()) }()
	used := make([][]float64, len(sides))
	for n := 0; b.Loop(); n++ {
		for i := range sides {
			i = (i + n) % len(sides) // each comes first in turn
			t := turn(b, conn, rabbit.URL(), &sides[i])
			used[i] = append(used[i], float64(t.Nanoseconds())/1e3/stream)
			b.Logf("%s: %.1f µs", sides[i].name, used[i][len(used[i])-1])
		}
	}
	for i := range sides {
		b.ReportMetric(median(slices.Clone(used[i])), sides[i].name+"-cpu-µs/notification")
	}
	b.ReportMetric(0, "ns/op") // the time it took says nothing
	return used
}

// turn returns how much CPU time a side takes for a stream.
func turn(b *testing.B, conn *amqp.Connection, broker string, s *side) time.Duration {
	b.Helper()
	dir := b.TempDir()
	cmd := s.start(b, dir, broker)
	pid := begin(b, cmd)
	waitFor(b, "it consumes", func() bool { return consumers(b, conn, s.queue) > 0 })
	lines := counter(filepath.Join(dir, "samples"))
	want := send(b, conn, 0, warm)
	waitFor(b, "the first samples are there", func() bool { return lines() >= want })
	before := cpuTime(b, pid)
	want += send(b, conn, warm, stream)
	waitFor(b, "all samples are there", func() bool { return lines() >= want })
	used := cpuTime(b, pid) - before
	if n := lines(); n != want {
		b.Errorf("%d samples, want %d", n, want)
	}
	end(cmd)
	ch, err := conn.Channel() // what the next one is sent is not for this queue
	check(b, err)
	_, err = ch.QueueDelete(s.queue, false, false, false)
	check(b, err)
	check(b, ch.Close())
	return used
}

// begin starts a daemon, with a process group of its own, that ends with the
// benchmark.
func begin(b *testing.B, cmd *exec.Cmd) (pid int) {
	b.Helper()
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	check(b, cmd.Start())
	b.Cleanup(func() { end(cmd) })
	return cmd.Process.Pid
}

// end ends a daemon, unless it has been ended.
func end(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}
}

// ceilometer returns the original's notification agent.
func ceilometer(b *testing.B, dir, broker string) *exec.Cmd {
	b.Helper()
	pipelines(b, dir)
	write(b, dir+"/ceilometer.conf", fmt.Sprintf("[DEFAULT]\ntransport_url = %s\npipeline_cfg_file = %s/pipeline.yaml\nevent_pipeline_cfg_file = %[2]s/event_pipeline.yaml\n",
		strings.Replace(broker, "amqp:", "rabbit:", 1), dir))
	return exec.Command("ceilometer-agent-notification", "--config-file", dir+"/ceilometer.conf", "--log-file", dir+"/log")
}

// notifier returns what starts kvmeter's.
func notifier(program string) func(b *testing.B, dir, broker string) *exec.Cmd {
	return func(b *testing.B, dir, broker string) *exec.Cmd {
		b.Helper()
		pipelines(b, dir)
		write(b, dir+"/notifier.yaml", fmt.Sprintf("amqp: {url: %q}\npipeline: %s/pipeline.yaml\nevent_pipeline: %[2]s/event_pipeline.yaml\nspool: %[2]s/spool\nallow_unsigned: true\nnotifications: {enabled: true}\n",
			broker, dir))
		return exec.Command(program, "notifier", "--config", dir+"/notifier.yaml", "--log-level", "error")
	}
}

// pipelines writes the pipelines of both sides.
func pipelines(b *testing.B, dir string) {
	b.Helper()
	write(b, dir+"/pipeline.yaml", "sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+dir+"/samples']}]\n")
	write(b, dir+"/event_pipeline.yaml", "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['test://']}]\n")
}

func write(b *testing.B, path, text string) {
	b.Helper()
	check(b, os.WriteFile(path, []byte(text), 0o644))
}

// send publishes n notifications as services do, numbered from first on, and returns
// how many samples they give. Nova's bodies are as oslo.messaging sends them, those of the others
// after what their services document.
func send(b *testing.B, conn *amqp.Connection, first, n int) (samples int) {
	b.Helper()
	kinds := []struct {
		name    string
		samples int // by the definitions of both sides
	}{
		{"compute.instance.exists", 4},
		{"compute.instance.create.end", 5},
		{"compute.instance.update", 0},
		{"volume.create.end", 1},
		{"image.upload", 1},
		{"port.update.end", 0},
	}
	bodies := make([][]byte, len(kinds))
	for i, k := range kinds {
		var err error
		bodies[i], err = os.ReadFile(filepath.Join("testdata", k.name+".json"))
		check(b, err)
	}
	ch, err := conn.Channel()
	check(b, err)
	check(b, ch.Confirm(false)) // a quorum queue may lose what is on its way when a channel closes
	var last *amqp.DeferredConfirmation
	for i := first; i < first+n; i++ {
		k := i % len(kinds)
		samples += kinds[k].samples
		// oslo.messaging takes no two messages with the same _unique_id.
		body := bytes.Replace(bodies[k], []byte("00000000-0000-0000-0000-000000000000"), fmt.Appendf(nil, "%08d-21fa-417b-b4f9-18240f05b888", i), 1)
		body = bytes.Replace(body, []byte("00000000000000000000000000000000"), fmt.Appendf(nil, "%032d", i+1), 1)
		last, err = ch.PublishWithDeferredConfirm("nova", "notifications.info", false, false, amqp.Publishing{
			ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: amqp.Persistent, Body: body,
		})
		check(b, err)
	}
	_, err = last.WaitContext(b.Context())
	check(b, err)
	check(b, ch.Close())
	return samples
}

// consumers returns how many consumers a queue has.
func consumers(b *testing.B, conn *amqp.Connection, queue string) int {
	b.Helper()
	ch, err := conn.Channel()
	check(b, err)
	q, err := ch.QueueDeclarePassive(queue, false, false, false, false, nil)
	if err != nil {
		return 0 // there is no queue yet, and no channel any more
	}
	check(b, ch.Close())
	return q.Consumers
}

// counter returns what tells how many lines a file has.
func counter(path string) func() int {
	n, offset := 0, int64(0)
	buf := make([]byte, 1<<20)
	return func() int {
		f, err := os.Open(path)
		if err != nil {
			return n
		}
		defer func() { _ = f.Close() }()
		for {
			got, err := f.ReadAt(buf, offset)
			n += bytes.Count(buf[:got], []byte{'\n'})
			offset += int64(got)
			if err != nil {
				return n
			}
		}
	}
}

func waitFor(b *testing.B, what string, done func() bool) {
	b.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !done(); {
		if time.Now().After(deadline) {
			b.Fatalf("five minutes passed before %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// cpuTime returns the CPU time that a process and its children have used.
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	var now unix.Timespec
	check(b, unix.ClockGettime(int32(^pid<<3|2), &now)) // clock_getcpuclockid(3)
	used := time.Duration(now.Nano())
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // each thread has its own
	check(b, err)
	for _, task := range tasks {
		children, err := os.ReadFile(task)
		check(b, err)
		for _, child := range strings.Fields(string(children)) {
			n, err := strconv.Atoi(child)
			check(b, err)
			used += cpuTime(b, n)
		}
	}
	return used
}
