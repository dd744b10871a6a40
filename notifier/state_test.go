package notifier_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
)

// rates stores the rate of cpu, and nothing else.
const rates = `
sources: [{name: s, meters: [cpu], sinks: [k]}]
sinks:
- name: k
  transformers: [{name: rate_of_change, parameters: {target: {name: cpu_rate, type: gauge, unit: /s}}}]
  publishers: ["store://"]`

// busy makes the nth batch of a domain that uses n seconds of CPU each 10 seconds.
func busy(n int) *sample.Batch {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "domain-a", Source: "openstack", Incarnation: 7})
	b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(uint64(n*(n+1)/2)*1e9))
	out := b.Build()
	at := time.Unix(1_800_000_000+10*int64(n), 0)
	out.ID, out.Node, out.Epoch, out.Seq, out.Base = sample.NamedBatchID(at, fmt.Appendf(nil, "%08d", n)), "node-1", 42, uint64(n+1), at.UnixMicro()
	return out
}

// volumes are those of the samples in messages.
func volumes(t *testing.T, ms []bus.Message) (all []string) {
	t.Helper()
	for _, m := range ms {
		for s := range open(t, m).Samples() {
			all = append(all, s.Name+" "+s.Volume.String())
		}
	}
	return all
}

// TestTransformersGoOnAfterARestart delivers batches to one notifier after the
// other, the last one of each again to the next.
func TestTransformersGoOnAfterARestart(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	var got []string
	for life := range 3 {
		t.Run(fmt.Sprint("life ", life), func(t *testing.T) {
			r := start(t, rates, all.Publishers, func(c *notifier.Config) { c.State = state })
			for n := 3*life - min(life, 1); n < 3*life+3; n++ {
				r.send(sealed(t, busy(n)))
			}
			got = append(got, volumes(t, r.taken())...)
		})
	}
	// The rate of batch 2 was taken, which the second life can't know, and that of
	// batch 5 likewise.
	want := []string{"1e+08", "2e+08", "2e+08", "3e+08", "4e+08", "5e+08", "5e+08", "6e+08", "7e+08", "8e+08"}
	for i := range want {
		want[i] = "cpu_rate " + strings.TrimSuffix(want[i], "e+08") + "00000000.0"
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rates (-want +got):\n%s", diff)
	}
}

// deafPublisher takes nothing while it is deaf.
type deafPublisher struct {
	mu    sync.Mutex
	deaf  bool
	taken []string
}

// Publish implements [publisher.Publisher].
func (d *deafPublisher) Publish(_ context.Context, parts []publisher.Part) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.deaf {
		return errors.New("what?")
	}
	for _, p := range parts {
		for s := range p.Batch.Samples() {
			d.taken = append(d.taken, s.Name+" "+s.Volume.String())
		}
	}
	return nil
}

// Close implements [publisher.Publisher].
func (d *deafPublisher) Close() error { return nil }

// TestABatchIsNotComputedAgainAfterItWasRecorded ends a notifier of which one
// publisher takes nothing, and delivers the same to the next one.
func TestABatchIsNotComputedAgainAfterItWasRecorded(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	deaf := &deafPublisher{deaf: true}
	schemes := append(slices.Clone(all.Publishers), publisher.Scheme{
		Name: "deaf", New: func(*url.URL, publisher.Deps) (publisher.Publisher, error) { return deaf, nil },
	})
	pipeline := strings.Replace(rates, `"store://"`, `"store://", "deaf://"`, 1)
	t.Run("deaf", func(t *testing.T) {
		r := start(t, pipeline, schemes, func(c *notifier.Config) { c.State = state })
		ctx, cancel := context.WithCancel(t.Context())
		var sending sync.WaitGroup
		defer func() { cancel(); sending.Wait() }()
		var ms []bus.Message
		for n := range 4 {
			ms = append(ms, sealed(t, busy(n)))
		}
		sending.Go(func() { _ = r.local.Publish(ctx, ms...) }) // which is never confirmed
		for deadline := time.Now().Add(30 * time.Second); len(r.taken()) < 3; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the store gets nothing while another publisher fails")
			}
		}
	})
	deaf.mu.Lock()
	deaf.deaf = false
	deaf.mu.Unlock()
	t.Run("hearing", func(t *testing.T) {
		r := start(t, pipeline, schemes, func(c *notifier.Config) { c.State = state })
		for n := range 5 {
			r.send(sealed(t, busy(n)))
		}
		want := []string{"cpu_rate 100000000.0", "cpu_rate 200000000.0", "cpu_rate 300000000.0", "cpu_rate 400000000.0"}
		if diff := cmp.Diff(want, volumes(t, r.taken())); diff != "" {
			t.Errorf("the store got (-want +got):\n%s", diff)
		}
		deaf.mu.Lock()
		defer deaf.mu.Unlock()
		if diff := cmp.Diff(want, deaf.taken); diff != "" {
			t.Errorf("the publisher that was deaf got (-want +got):\n%s", diff)
		}
	})
}

// TestStateThatIsDamagedIsSaidAndNotUsed puts a record of another version into the
// journal.
func TestStateThatIsDamagedIsSaidAndNotUsed(t *testing.T) {
	state := t.TempDir()
	// A record of version 2, with its length and CRC-32C.
	if err := os.WriteFile(filepath.Join(state, "journal"), []byte{1, 0, 0, 0, 0xa6, 0x23, 0x46, 0xb3, 2}, 0o600); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.InfoLevel)
	t.Run("start", func(t *testing.T) {
		r := startWith(t, rates, all.Publishers, func(c *notifier.Config) { c.State = state }, func(d *notifier.Deps, _ *bus.Local) { d.Log = zap.New(core) })
		r.send(sealed(t, busy(0)), sealed(t, busy(1)))
		if got := volumes(t, r.taken()); len(got) != 1 {
			t.Errorf("got %q, want one rate", got)
		}
	})
	if logs.FilterMessageSnippet("what transformers remembered is damaged").Len() != 1 {
		t.Errorf("the log has %v", logs.All())
	}
}

func TestAStateFolderIsOneNotifiersOnly(t *testing.T) {
	state := t.TempDir()
	start(t, rates, all.Publishers, func(c *notifier.Config) { c.State = state })
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline, cfg.EventPipeline, cfg.State = "notifier-1", "", "", state
	_, err := notifier.New(cfg, notifier.Deps{Log: zap.NewNop(), Keys: keys, Publishers: all.Publishers})
	if err == nil || !strings.Contains(err.Error(), "another notifier uses it; give each a folder of its own") {
		t.Errorf("error %v", err)
	}
}

// reloading is a notifier whose files change.
type reloading struct {
	*rig
	n    *notifier.Notifier
	cfg  notifier.Config
	logs *observer.ObservedLogs
}

func startReloading(t *testing.T, pipeline string, change func(*notifier.Config)) *reloading {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	r := &reloading{logs: logs}
	r.rig = startWith(t, pipeline, all.Publishers, func(c *notifier.Config) {
		c.State = filepath.Join(t.TempDir(), "state")
		if change != nil {
			change(c)
		}
		r.cfg = *c
	}, func(d *notifier.Deps, _ *bus.Local) { d.Log = zap.New(core) })
	r.n = r.rig.n
	return r
}

// reload writes another pipeline.yaml and reloads.
func (r *reloading) reload(pipeline string) error {
	r.t.Helper()
	if err := os.WriteFile(r.cfg.Pipeline, []byte(pipeline), 0o600); err != nil {
		r.t.Fatal(err)
	}
	return r.n.Reload(r.t.Context(), r.cfg)
}

// changed returns what the newest reload says that it has changed.
func (r *reloading) changed() string {
	all := r.logs.FilterMessageSnippet("configuration reloaded").All()
	if len(all) == 0 {
		return "nothing was reloaded"
	}
	return fmt.Sprint(all[len(all)-1].ContextMap()["changed"])
}

func TestAReloadTakesAllOrNothing(t *testing.T) {
	r := startReloading(t, rates, nil)
	r.send(sealed(t, busy(0)), sealed(t, busy(1)))
	for text, want := range map[string]string{
		strings.Replace(rates, "sinks: [k]", "sinks: [l]", 1):           `pipeline.yaml:2: source "s": sink "l" is not defined`,
		strings.Replace(rates, "rate_of_change", "rate_of_changes", 1):  `pipeline.yaml:5: there is no transformer "rate_of_changes"; there are accumulator,`,
		strings.Replace(rates, "store://", "file:///nowhere/at/all", 1): "pipeline.yaml:6: publisher file:///nowhere/at/all: open /nowhere/at/all: no such file or directory",
		"sources: [\n": "pipeline.yaml:",
	} {
		if err := r.reload(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %s", err, want)
		}
	}
	r.send(sealed(t, busy(2)))
	want := []string{"cpu_rate 100000000.0", "cpu_rate 200000000.0"}
	if diff := cmp.Diff(want, volumes(t, r.taken())); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
	if r.changed() != "nothing was reloaded" {
		t.Errorf("the log says that it has changed %s", r.changed())
	}
}

func TestAReloadKeepsTheStateOfWhatIsUnchanged(t *testing.T) {
	r := startReloading(t, rates, nil)
	r.send(sealed(t, busy(0)), sealed(t, busy(1)))
	if err := r.reload(rates + "\n# a comment\n"); err != nil {
		t.Fatal(err)
	}
	if got := r.changed(); got != "<nil>" {
		t.Errorf("a comment has changed %s", got)
	}
	file := filepath.Join(t.TempDir(), "samples")
	more := strings.Replace(strings.Replace(rates, "sources: [", "sources: [{name: more, meters: ['network.*'], sinks: [f]}, ", 1), "sinks:\n", "sinks:\n- {name: f, publishers: ['file://"+file+"?json']}\n", 1)
	if err := r.reload(more); err != nil {
		t.Fatal(err)
	}
	if got, want := r.changed(), "[pipeline more:f is new publisher file://"+file+"?json is new]"; got != want {
		t.Errorf("it says that it has changed %s, want %s", got, want)
	}
	r.send(sealed(t, busy(2)), sealed(t, batch(100)))
	want := []string{"cpu_rate 100000000.0", "cpu_rate 200000000.0"}
	if diff := cmp.Diff(want, volumes(t, r.taken())); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
	if data, err := os.ReadFile(file); err != nil || strings.Count(string(data), "network.incoming.bytes") != 1 {
		t.Errorf("the file of the new publisher has %q, %v", data, err)
	}
	if err := r.reload(strings.Replace(rates, "unit: /s", "unit: ns/s", 1)); err != nil {
		t.Fatal(err)
	}
	if got, want := r.changed(), "[pipeline more:f is gone pipeline s:k is another one publisher file://"+file+"?json is gone]"; got != want {
		t.Errorf("it says that it has changed %s, want %s", got, want)
	}
	r.send(sealed(t, busy(3)), sealed(t, busy(4))) // the transformer is another one: its first gives nothing
	want = append(want, "cpu_rate 400000000.0")
	if diff := cmp.Diff(want, volumes(t, r.taken())); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
}

// TestAReloadWhileBatchesCome reloads between two pipelines that pass the same
// while batches are sent: each is stored once.
func TestAReloadWhileBatchesCome(t *testing.T) {
	r := startReloading(t, rates, nil)
	other := strings.Replace(rates, "meters: [cpu]", "meters: ['cpu']", 1) + "\n"
	another := strings.Replace(other, "sinks:\n", "sinks:\n- {name: unused, publishers: ['test://']}\n", 1)
	stop := make(chan struct{})
	var reloading sync.WaitGroup
	reloads := 0
	reloading.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := r.reload([]string{rates, other, another}[reloads%3]); err != nil {
				t.Error(err)
				return
			}
			reloads++
		}
	})
	const many = 200
	for n := range many {
		r.send(sealed(t, busy(n)))
	}
	close(stop)
	reloading.Wait()
	var want []string
	for n := 1; n < many; n++ {
		want = append(want, fmt.Sprintf("cpu_rate %d00000000.0", n))
	}
	if diff := cmp.Diff(want, volumes(t, r.taken())); diff != "" || reloads == 0 {
		t.Errorf("stored after %d reloads (-want +got):\n%s", reloads, diff)
	}
}

func TestAReloadSaysWhatNeedsARestart(t *testing.T) {
	r := startReloading(t, rates, nil)
	cfg := r.cfg
	cfg.Prefetch, cfg.Notifications.Topics, cfg.MaxSeries = 7, []string{"other"}, 10
	if err := r.n.Reload(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	said := r.logs.FilterMessageSnippet("need a restart").All()
	if len(said) != 1 || fmt.Sprint(said[0].ContextMap()["settings"]) != "[prefetch notifications.topics]" {
		t.Errorf("the log has %v", said)
	}
	if got := r.changed(); got != "[setting max_series]" {
		t.Errorf("it says that it has changed %s", got)
	}
}

// TestDefinitionsAreReloaded changes meter and event definitions.
func TestDefinitionsAreReloaded(t *testing.T) {
	dir := t.TempDir()
	meters, events, out := filepath.Join(dir, "meters.yaml"), filepath.Join(dir, "events.yaml"), filepath.Join(dir, "out")
	files := func(meter, event string) {
		for file, text := range map[string]string{
			meters: "metric:\n- {name: " + meter + ", event_type: compute.instance.exists, type: gauge, unit: x, volume: 1, resource_id: $.payload.instance_id}\n",
			events: "- {event_type: " + event + ", traits: {}}\n",
		} {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	files("before", "compute.*")
	var cfg notifier.Config
	core, logs := observer.New(zapcore.InfoLevel)
	s := &services{subscriptions: make(chan bus.Subscription, 100)}
	r := startWith(t, "", all.Publishers, func(c *notifier.Config) {
		c.Notifications.Enabled, c.Notifications.MeterDefinitions, c.Notifications.EventDefinitions = true, []string{meters}, events
		c.EventPipeline = write(t, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+out+"?json']}]")
		cfg = *c
	}, func(d *notifier.Deps, local *bus.Local) {
		s.Local, d.Log = local, zap.New(core)
		d.Subscribers = []bus.Subscriber{s}
	})
	send := func() {
		r.send(bus.Message{RoutingKey: bus.EventsKey, Body: captured(t, "compute.instance.exists.json")})
	}
	send()
	files("after", "nova.*")
	if err := r.n.Reload(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	send()
	files("broken: [", "*")
	if err := r.n.Reload(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "meters.yaml:") {
		t.Errorf("error %v", err)
	}
	send()
	var got []string
	for _, m := range r.taken() {
		for s := range open(t, m).Samples() {
			got = append(got, s.Name)
		}
	}
	if diff := cmp.Diff([]string{"before", "after", "after"}, got); diff != "" {
		t.Errorf("meters (-want +got):\n%s", diff)
	}
	data, err := os.ReadFile(out)
	if err != nil || strings.Count(string(data), "\n") != 3 {
		t.Errorf("events %q, %v", data, err)
	}
	all := logs.FilterMessageSnippet("configuration reloaded").All()
	if want := "[definitions " + events + " is another one definitions " + meters + " is another one]"; len(all) != 1 || fmt.Sprint(all[0].ContextMap()["changed"]) != want {
		t.Errorf("the log has %v, want %s", all, want)
	}
}
