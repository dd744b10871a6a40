//go:build lab

package tier

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

var (
	ticks = flag.Int("ticks", 200, "batches that each node sends to three notifiers")
	pace  = flag.Duration("pace", 0, "time between the ticks; one of the notifiers is killed each 30 s then")
)

var keys = sample.Keys{
	"node-1": []byte("secret of node-1"), "node-2": []byte("secret of node-2"), "node-3": []byte("secret of node-3"), "a": []byte("secret of notifier a"),
	"b": []byte("secret of notifier b"), "c": []byte("secret of notifier c"),
}

// relays are the notifiers.
var relays = []string{"a", "b", "c"}

func TestMain(m *testing.M) {
	if os.Getenv("TIER_TEST_NOTIFIER") != "" {
		runNotifier()
		return
	}
	goleak.VerifyTestMain(m)
}

// runNotifier is a notifier as a process of its own.
func runNotifier() {
	log := zap.NewExample()
	stages, err := strconv.Atoi(os.Getenv("STAGES"))
	if err != nil {
		panic(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: os.Getenv("URL"), Stages: stages}, "notifier", log)
	if err != nil {
		panic(err)
	}
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline, cfg.EventPipeline = os.Getenv("TIER_TEST_NOTIFIER"), os.Getenv("PIPELINE"), "/nowhere/event_pipeline.yaml"
	cfg.StagePartitions, cfg.State, cfg.Relays = stages, os.Getenv("STATE"), relays
	cfg.Notifications.Enabled, cfg.Notifications.Exchanges = stages == 0, []string{"nova"}
	if stages > 0 {
		cfg.Prefetch = 5 // kills find it at work more often
	}
	n, err := notifier.New(cfg, notifier.Deps{
		Log: log, Consumer: b, Publisher: b, Keys: keys, Publishers: all.Publishers, Subscribers: []bus.Subscriber{b}, Memory: b, Counter: b,
	})
	if err != nil {
		panic(err)
	}
	panic(n.Run(context.Background()))
}

// process is a notifier that is killed.
type process struct {
	cmd *exec.Cmd
	out bytes.Buffer
}

func start(t *testing.T, name string, env ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(append(os.Environ(), "TIER_TEST_NOTIFIER="+name), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return p
}

// kill kills it, and looks that it did not end before.
func (p *process) kill(t *testing.T) {
	t.Helper()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	if strings.Contains(p.out.String(), "panic:") {
		t.Errorf("a notifier ended by itself:\n%s", &p.out)
	}
}

func broker(t *testing.T, stages int) (*lab.Rabbit, *bus.AMQP) {
	t.Helper()
	r, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: r.URL(), Stages: stages}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	if err := b.Ping(t.Context()); err != nil { // makes the queues
		t.Fatal(err)
	}
	return r, b
}

// until waits until ready says so. What is asked for takes as long as the machine
// is slow: what there is to fail is that nothing goes on.
func until(t *testing.T, progress func() int, ready func() bool, what string) {
	t.Helper()
	last, since := progress(), time.Now()
	for !ready() {
		if now := progress(); now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) > 5*time.Minute {
			t.Fatalf("%s: nothing goes on at %d", what, last)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

const pipelines = `
sources:
- {name: rates, meters: [cpu], sinks: [rate]}
- {name: sums, meters: [network.incoming.bytes], sinks: [delta]}
sinks:
- name: rate
  transformers:
  - {name: rate_of_change, parameters: {target: {name: cpu_util, unit: "%", type: gauge, scale: "100 / 10**9"}}}
  publishers: ["store://"]
- name: delta
  transformers:
  - {name: delta, parameters: {target: {name: bytes.delta}}}
  - {name: aggregator, parameters: {size: 37, resource_metadata: last}}
  publishers: ["store://"]`

// nodes make what three hosts send, tick by tick.
func nodes(n int) (all []bus.Message, err error) {
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	for tick := range n {
		for node := 1; node <= 3; node++ {
			at := time.Unix(1_800_000_000+10*int64(tick), int64(node)*1e6)
			b := sample.NewBuilder()
			for d := range 10 {
				b.Row(sample.Row{
					Resource: fmt.Sprintf("domain-%d-%d", node, d), Source: "openstack", Project: "p", Incarnation: sample.Incarnation(1 + tick/150),
					Offset: int64(d), Metadata: fmt.Appendf(nil, `{"tick": %d}`, tick),
				})
				grown := uint64(tick*tick*(d+1)*node) * 1000
				b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(grown))
				b.Add(sample.NetInBytes.MeterRef, sample.RTNL, sample.Uint(grown/7))
			}
			out := b.Build()
			name := fmt.Sprint("node-", node)
			out.ID, out.Node = sample.NamedBatchID(at, fmt.Appendf(nil, "%d %6d", node, tick)), name
			out.Epoch, out.Seq, out.Base = 42, uint64(tick+1), at.UnixMicro()
			body, err := enc.Encode(nil, out)
			if err != nil {
				return nil, err
			}
			all = append(all, bus.Seal(bus.SamplesKey(name, 1), out, body, keys[name]))
			b.Reset()
		}
	}
	return all, nil
}

// stored is what notifiers send to the store: each sample by its id, with all it
// has.
type stored struct {
	mu    sync.Mutex
	by    map[string]string
	again int
}

func (s *stored) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.by)
}

// consume takes what is sent to the store until ctx ends.
func (s *stored) consume(ctx context.Context, b *bus.AMQP) error {
	dec, err := sample.NewDecoder()
	if err != nil {
		return err
	}
	opener := bus.Opener{Keys: keys, Relays: relays, Decoder: dec}
	return b.Consume(ctx, bus.StoreQueue(0), 100, func(_ context.Context, ds []*bus.Delivery) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, d := range ds {
			in, err := opener.Open(&d.Message)
			if err != nil {
				d.Reject(err)
				continue
			}
			for smp := range in.Samples() {
				id := smp.ID.String()
				text := fmt.Sprintf("%+v", smp)
				if before, ok := s.by[id]; ok {
					if s.again++; before != text {
						s.by[id] = "it came twice and differs: " + before + " and " + text
					}
					continue
				}
				s.by[id] = text
			}
			d.Ack()
		}
		return nil
	})
}

// TestThreeNotifiersGiveWhatOneDoes sends the same to one notifier that nobody
// disturbs and to three of which one after the other is killed: rates, deltas and
// sums are the same, with their ids.
func TestThreeNotifiersGiveWhatOneDoes(t *testing.T) {
	const stages = 4
	file := filepath.Join(t.TempDir(), "pipeline.yaml")
	if err := os.WriteFile(file, []byte(pipelines), 0o600); err != nil {
		t.Fatal(err)
	}
	ms, err := nodes(*ticks)
	if err != nil {
		t.Fatal(err)
	}
	run := func(names []string, want int, disturb func(got *stored, kill func(i int))) *stored {
		r, b := broker(t, stages)
		env := []string{"URL=" + r.URL(), fmt.Sprint("STAGES=", stages), "PIPELINE=" + file, "STATE="}
		var all []*process
		for _, name := range names {
			all = append(all, start(t, name, env...))
		}
		defer func() {
			for _, p := range all {
				p.kill(t)
			}
		}()
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		defer func() { cancel(); running.Wait() }()
		got := &stored{by: map[string]string{}}
		running.Go(func() {
			if err := got.consume(ctx, b); err != nil {
				t.Error(err)
			}
		})
		running.Go(func() {
			perTick := len(ms) / *ticks
			for i := 0; i < len(ms) && ctx.Err() == nil; i += perTick {
				if err := b.Publish(ctx, ms[i:i+perTick]...); err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
				if len(names) > 1 {
					time.Sleep(*pace)
				}
			}
		})
		disturb(got, func(i int) {
			all[i].kill(t)
			all[i] = start(t, names[i], env...)
		})
		until(t, got.len, func() bool { return got.len() >= want }, "samples for the store")
		return got
	}
	want := computed(t, stages, ms)
	one := run([]string{"a"}, want, func(*stored, func(int)) {})
	began, killed := time.Now(), 0
	three := run([]string{"a", "b", "c"}, want, func(got *stored, kill func(int)) {
		if *pace > 0 {
			for next := began.Add(30 * time.Second); got.len() < one.len()*95/100; time.Sleep(100 * time.Millisecond) {
				if time.Now().After(next) {
					kill(killed % 3)
					killed++
					next = next.Add(30 * time.Second)
				}
			}
			return
		}
		for ; killed < 5; killed++ {
			want := (killed + 1) * one.len() / 7
			until(t, got.len, func() bool { return got.len() >= want }, "samples for the store")
			kill(killed % 3)
		}
	})
	one.mu.Lock()
	defer one.mu.Unlock()
	three.mu.Lock()
	defer three.mu.Unlock()
	wrong := 0
	for id, want := range one.by {
		if got := three.by[id]; got != want {
			if wrong++; wrong < 5 {
				t.Errorf("sample %s: got %s, want %s", id, got, want)
			}
		}
	}
	rates, sums := 0, 0
	for id, text := range three.by {
		if one.by[id] == "" {
			if wrong++; wrong < 5 {
				t.Errorf("the undisturbed notifier did not give %s", text)
			}
		}
		if strings.Contains(text, "Name:cpu_util") {
			rates++
		} else {
			sums++
		}
	}
	wantRates := (*ticks - 1) * 30
	if wrong > 0 || rates != wantRates || sums == 0 || len(one.by) != want {
		t.Errorf("%d samples are wrong; %d rates, want %d, and %d sums", wrong, rates, wantRates, sums)
	}
	t.Logf("%d batches, %d rates and %d sums; killed %d times in %.0f s; %d samples came again",
		len(ms), rates, sums, killed, time.Since(began).Seconds(), three.again)
}

// computed returns how many samples the transformers give of what partitions get,
// computed in this process.
func computed(t *testing.T, stages int, ms []bus.Message) (n int) {
	t.Helper()
	cfg, err := pipeline.Load("pipeline.yaml", []byte(pipelines))
	if err != nil {
		t.Fatal(err)
	}
	dec, err := sample.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	opener := bus.Opener{Keys: keys, Decoder: dec}
	keepers := make([]*pipeline.Keeper, 1+stages)
	for i := range keepers {
		if keepers[i], err = pipeline.NewKeeper(cfg, pipeline.Bound{Series: 10_000}, "a", func(pipeline.Drop) {}); err != nil {
			t.Fatal(err)
		}
	}
	s := pipeline.NewSplitter(keepers[stages], stages)
	for i := range ms {
		b, err := opener.Open(&ms[i])
		if err != nil {
			t.Fatal(err)
		}
		s.Split(b, func(_ []int, part *sample.Batch) {
			for _, made := range keepers[bus.Partition(part.Rows[0].Resource, stages)].Make(part) {
				for _, out := range made {
					n += out.Len()
				}
			}
		})
	}
	return n
}
