package notifier_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// services stand for what OpenStack's services publish: notifications are sent
// to the in-process bus under a key of it.
type services struct {
	*bus.Local
	subscriptions chan bus.Subscription
}

// Subscribe implements [bus.Subscriber]: priority info is what is sent.
func (s *services) Subscribe(ctx context.Context, sub bus.Subscription, prefetch int, handle bus.Handler) error {
	s.subscriptions <- sub
	if !strings.HasSuffix(sub.Queue, ".info") {
		<-ctx.Done()
		return nil
	}
	return s.Consume(ctx, bus.EventsQueue, prefetch, handle)
}

// captured returns a message that a service sent.
func captured(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("conversion", "testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// startWithServices is start, of a notifier that takes notifications.
func startWithServices(t *testing.T, pipeline string, change func(*notifier.Config)) (*rig, *services) {
	t.Helper()
	s := &services{subscriptions: make(chan bus.Subscription, 100)}
	r := startWith(t, pipeline, all.Publishers, func(c *notifier.Config) {
		c.Notifications.Enabled = true
		if change != nil {
			change(c)
		}
	}, func(d *notifier.Deps, local *bus.Local) {
		s.Local = local
		d.Subscribers = []bus.Subscriber{s}
	})
	return r, s
}

func TestNotificationsAreStoredOnceHoweverOftenTheyCome(t *testing.T) {
	r, _ := startWithServices(t, "", nil)
	body := captured(t, "compute.instance.exists.json")
	r.send(bus.Message{RoutingKey: bus.EventsKey, Body: body}, bus.Message{RoutingKey: bus.EventsKey, Body: body})
	if len(r.taken()) != 2 || r.taken()[0].ID != r.taken()[1].ID {
		t.Fatalf("%d messages in the store's queue, want the same twice", len(r.taken()))
	}
	b := open(t, r.taken()[0])
	if b.Node != "notifier-1" || b.IDs == nil || b.Epoch != 0 {
		t.Errorf("the batch is %s's, with ids %v and epoch %d", b.Node, b.IDs, b.Epoch)
	}
	var got []string
	for s := range b.Samples() {
		got = append(got, s.Name)
		if s.Resource != "5e1f0000-0000-4000-8000-00000000abcd" || s.Project == "" || s.User == "" || s.Foreign.Timestamp != "2026-11-21T19:45:22.220474+00:00" {
			t.Errorf("got %+v", s)
		}
	}
	if want := []string{"disk.ephemeral.size", "disk.root.size", "vcpus", "memory"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if again := open(t, r.taken()[1]); !slices.Equal(again.IDs, b.IDs) {
		t.Errorf("ids %q, then %q", b.IDs, again.IDs)
	}
}

func TestPolledSamplesKeepTheirIDs(t *testing.T) {
	r, _ := startWithServices(t, "", nil)
	r.send(bus.Message{RoutingKey: bus.EventsKey, Body: captured(t, "polling-cpu.json")})
	if len(r.taken()) != 1 {
		t.Fatalf("%d messages in the store's queue", len(r.taken()))
	}
	for s := range open(t, r.taken()[0]).Samples() {
		if !strings.HasSuffix(s.ID.String(), "-e5e7-11f1-8652-02fc00000001") || s.Foreign != nil && s.Foreign.Timestamp != "" {
			t.Errorf("id %s, %+v", s.ID, s.Foreign)
		}
		if s.Name != "cpu" || s.Kind != sample.Cumulative || !strings.HasPrefix(string(s.Metadata), `{"display_name":"vm`) {
			t.Errorf("got %+v", s)
		}
	}
}

// TestSignaturesOfPolledSamples sends a message with a good and a forged sample.
func TestSignaturesOfPolledSamples(t *testing.T) {
	signed := ceilometer.NewWriter("the secret", "")
	payload := []byte(`{"samples": [`)
	payload = signed.Sample(payload, &sample.Sample{Name: "cpu", Kind: sample.Cumulative, Volume: sample.Uint(1), ID: sample.ID{Text: "good"}, Time: 1_800_000_000_000_000})
	forged := ceilometer.NewWriter("another", "").Sample(nil, &sample.Sample{Name: "cpu", Kind: sample.Cumulative, Volume: sample.Uint(2), ID: sample.ID{Text: "forged"}, Time: 1_800_000_000_000_000})
	n := ceilometer.Notification{Publisher: "ceilometer.polling", EventType: "telemetry.polling", Priority: "SAMPLE", Time: time.UnixMicro(1)}
	both := n.Append(nil, append(append(append(payload, ", "...), forged...), "]}"...))
	none := n.Append(nil, append(append([]byte(`{"samples": [`), forged...), "]}"...))
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("the secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*notifier.Config)
		want   []string
		dead   uint64
	}{
		"are counted where everybody knows the secret": {func(*notifier.Config) {}, []string{"good", "forged", "forged"}, 0},
		"refuse a sample where there is a secret":      {func(c *notifier.Config) { c.TelemetrySecretFile, c.AllowUnsigned = file, false }, []string{"good"}, 1},
		"but where unsigned ones are allowed":          {func(c *notifier.Config) { c.TelemetrySecretFile, c.AllowUnsigned = file, true }, []string{"good", "forged", "forged"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := startWithServices(t, "", tc.change)
			r.send(bus.Message{RoutingKey: bus.EventsKey, Body: both}, bus.Message{RoutingKey: bus.EventsKey, Body: none})
			var got []string
			for _, m := range r.taken() {
				got = append(got, open(t, m).IDs...)
			}
			dead, n := r.local.Dead()
			if !slices.Equal(got, tc.want) || n != tc.dead {
				t.Errorf("got %q and %d dead letters, want %q and %d", got, n, tc.want, tc.dead)
			}
			for _, d := range dead {
				if !strings.Contains(d.Reason, "message_signature does not fit telemetry_secret") {
					t.Errorf("reason %q", d.Reason)
				}
			}
		})
	}
}

func TestABadNotificationCostsItselfOnly(t *testing.T) {
	r, _ := startWithServices(t, "", nil)
	good := captured(t, "compute.instance.exists.json")
	bad := map[string]string{
		`{broken`:         "malformed JSON",
		`[]`:              "it is a list, not an object",
		`{"payload": {}}`: "event_type is missing",
		`{"event_type": "compute.instance.exists", "message_id": "m"}`:    "it has no timestamp",
		"{\"event_type\": \"caf\xe9\"}":                                   "not UTF-8",
		strings.Replace(string(good), "2026-11-21 19", "yesterday 19", 1): "timestamp",
	}
	ms := []bus.Message{{RoutingKey: bus.EventsKey, Body: good}}
	for body := range bad {
		ms = append(ms, bus.Message{RoutingKey: bus.EventsKey, Body: []byte(body)})
	}
	ms = append(ms, bus.Message{RoutingKey: bus.EventsKey, Body: good, ContentEncoding: "latin-1"}, bus.Message{RoutingKey: bus.EventsKey, Body: good})
	r.send(ms...)
	if len(r.taken()) != 2 {
		t.Errorf("%d good notifications in the store's queue, want 2", len(r.taken()))
	}
	dead, n := r.local.Dead()
	if n != uint64(len(bad)+1) {
		t.Errorf("%d dead letters, want %d", n, len(bad)+1)
	}
	for _, d := range dead {
		want := bad[string(d.Body)]
		if d.ContentEncoding != "" {
			want = `content encoding "latin-1": send UTF-8`
		}
		if want == "" || !strings.Contains(d.Reason, want) {
			t.Errorf("%.60s: reason %q, want %q", d.Body, d.Reason, want)
		}
	}
}

func TestSubscriptionsAreOfOurOwnQueuesUnlessTheyAreTakenOver(t *testing.T) {
	for name, tc := range map[string]struct {
		takeOver bool
		want     []string
	}{
		"ours": {false, []string{"kvmeter.notifications.error", "kvmeter.notifications.info", "kvmeter.notifications.sample"}},
		"Ceilometer's": {true, []string{
			"notifications.audit", "notifications.critical", "notifications.debug", "notifications.error", "notifications.info",
			"notifications.sample", "notifications.warn",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			_, s := startWithServices(t, "", func(c *notifier.Config) { c.Notifications.TakeOver = tc.takeOver })
			var got []string
			for range tc.want {
				sub := <-s.subscriptions
				got = append(got, sub.Queue)
				priority := sub.Queue[strings.LastIndexByte(sub.Queue, '.'):]
				if sub.Theirs != tc.takeOver || !slices.Equal(sub.Keys, []string{"notifications" + priority}) || !slices.Contains(sub.Exchanges, "nova") {
					t.Errorf("got %+v", sub)
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestPipelinesPassWhatNotificationsGive(t *testing.T) {
	r, _ := startWithServices(t, `
sources: [{name: a, meters: ["disk.*"], sinks: [k]}]
sinks: [{name: k, publishers: ["store://"]}]`, nil)
	r.send(bus.Message{RoutingKey: bus.EventsKey, Body: captured(t, "compute.instance.exists.json")})
	if len(r.taken()) != 1 || open(t, r.taken()[0]).Len() != 2 {
		t.Errorf("%d messages in the store's queue, want one with two samples", len(r.taken()))
	}
}

func TestNotificationsNeedAKeyToSignWhatTheyGive(t *testing.T) {
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline, cfg.Notifications.Enabled = "notifier-9", "", true
	_, err := notifier.New(cfg, notifier.Deps{
		Log: zap.NewNop(), Keys: keys, Publishers: all.Publishers, Subscribers: []bus.Subscriber{&services{}},
	})
	if err == nil || !strings.Contains(err.Error(), "put a key named notifier-9.key among the keys") {
		t.Errorf("got %v", err)
	}
}

// TestEventsGoWhereTheirPipelineSays publishes samples and events to one file,
// which is opened once, and some events to another.
func TestEventsGoWhereTheirPipelineSays(t *testing.T) {
	dir := t.TempDir()
	both, some := filepath.Join(dir, "both"), filepath.Join(dir, "some")
	r, _ := startWithServices(t, `
sources: [{name: s, meters: ["vcpus"], sinks: [k]}]
sinks: [{name: k, publishers: ["file://`+both+`?json"]}]`, func(c *notifier.Config) {
		c.EventPipeline = write(t, `
sources:
- {name: all, events: ["*"], sinks: [k]}
- {name: deletes, events: ["*.delete.*"], sinks: [l]}
- {name: exists, events: ["compute.instance.exists"], sinks: [k, l]}
sinks:
- {name: k, publishers: ["file://`+both+`?json"]}
- {name: l, publishers: ["file://`+some+`?json"]}`)
	})
	r.send(
		bus.Message{RoutingKey: bus.EventsKey, Body: captured(t, "compute.instance.exists.json")},
		bus.Message{RoutingKey: bus.EventsKey, Body: captured(t, "compute.instance.update.json")},
	)
	for file, want := range map[string][]string{
		both: {`"name": "vcpus", "type": "gauge"`, `"event_type": "compute.instance.exists"`, `"event_type": "compute.instance.update"`},
		some: {`"event_type": "compute.instance.exists"`},
	} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		if strings.Count(text, "\n") != len(want) {
			t.Errorf("%s has\n%s\nwant %d lines", file, text, len(want))
		}
		for _, w := range want {
			if strings.Count(text, w) != 1 {
				t.Errorf("%s has %q %d times", file, w, strings.Count(text, w))
			}
		}
	}
}

func TestAPublisherOfSamplesOnlyIsNoneOfEvents(t *testing.T) {
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline, cfg.Notifications.Enabled = "notifier-1", "", true
	cfg.EventPipeline = write(t, `
sources: [{name: s, events: ["*"], sinks: [k]}]
sinks: [{name: k, publishers: ["udp://127.0.0.1:1"]}]`)
	_, err := notifier.New(cfg, notifier.Deps{
		Log: zap.NewNop(), Keys: keys, Publishers: all.Publishers, Subscribers: []bus.Subscriber{&services{}},
	})
	if err == nil || !strings.Contains(err.Error(), "pipeline.yaml:3: publisher udp://127.0.0.1:1 takes no events") {
		t.Errorf("got %v", err)
	}
}

// BenchmarkNotificationToFile converts a captured notification of Nova and writes
// its samples and event to files, without a broker.
func BenchmarkNotificationToFile(b *testing.B) {
	dir := b.TempDir()
	s := &services{Local: bus.NewLocal(1, zap.NewNop()), subscriptions: make(chan bus.Subscription, 100)}
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Notifications.Enabled = "notifier-1", true
	cfg.Pipeline = write(b, "sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+dir+"/samples?json']}]")
	cfg.EventPipeline = write(b, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+dir+"/events?json']}]")
	n, err := notifier.New(cfg, notifier.Deps{
		Log: zap.NewNop(), Consumer: s, Publisher: s, Keys: keys, Publishers: all.Publishers, Subscribers: []bus.Subscriber{s},
	})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	defer func() {
		cancel()
		if err := errors.Join(<-ended, n.Close()); err != nil {
			b.Error(err)
		}
	}()
	ms := make([]bus.Message, 100)
	for i := range ms {
		ms[i] = bus.Message{RoutingKey: bus.EventsKey, Body: captured(b, "compute.instance.exists.json")}
	}
	b.ReportAllocs()
	before := cpu(b)
	for b.Loop() {
		if err := s.Publish(ctx, ms...); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N*len(ms)), "cpu-µs/notification")
}

// cpu returns the CPU time of the process so far.
func cpu(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
