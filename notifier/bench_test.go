package notifier_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
)

// tick is what a host of 50 domains sends: 20 meters each.
func tick(seq uint64) *sample.Batch {
	b := sample.NewBuilder()
	for i := range 50 {
		b.Row(sample.Row{
			Resource: fmt.Sprintf("5e1f0000-0000-4000-8000-%012d", i), Source: "openstack", Project: "p", User: "u",
			Metadata: fmt.Appendf(nil, `{"display_name": "vm%d", "host": "compute-1", "flavor": {"id": "f1", "vcpus": 1, "ram": 96}}`, i),
		})
		for _, m := range sample.Catalogue[:20] {
			b.Add(m.MeterRef, m.Origins[0], sample.Uint(uint64(i)<<40+seq))
		}
	}
	out := b.Build()
	out.ID = sample.NewBatchID(time.Unix(1_800_000_000+int64(seq), 0))
	out.Node, out.Epoch, out.Seq = "node-1", 42, seq
	return out
}

// forever hands the same deliveries to a handler, as fast as it takes them.
type forever struct {
	b  *testing.B
	ms []bus.Message
}

func (f *forever) Consume(ctx context.Context, _ string, _ int, handle bus.Handler) error {
	for f.b.Loop() {
		ds := make([]*bus.Delivery, len(f.ms))
		for i := range ds {
			ds[i] = &bus.Delivery{Message: f.ms[i]}
		}
		if err := handle(ctx, ds); err != nil {
			return err
		}
	}
	return nil
}

// nowhere confirms at once.
type nowhere struct{}

func (nowhere) Publish(context.Context, ...bus.Message) error { return nil }

// BenchmarkHandle is the notifier's own work, without a bus: ten batches of
// 1,000 samples a round.
func BenchmarkHandle(b *testing.B) {
	for name, meters := range map[string]string{"passes whole": `"*"`, "derives 19 of 20 meters": `"*", "!cpu"`} {
		b.Run(name, func(b *testing.B) {
			var ms []bus.Message
			for seq := range uint64(10) {
				ms = append(ms, sealed(b, tick(seq)))
			}
			cfg := notifier.DefaultConfig()
			cfg.Name = "notifier-1"
			cfg.Pipeline = write(b, "sources: [{name: s, meters: ["+meters+"], sinks: [k]}]\nsinks: [{name: k, publishers: [store://]}]")
			n, err := notifier.New(cfg, notifier.Deps{
				Log: zap.NewNop(), Consumer: &forever{b, ms}, Publisher: nowhere{}, Keys: keys, Publishers: all.Publishers,
			})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			if err := n.Run(b.Context()); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*10), "ns/batch")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*10*1000), "ns/sample")
		})
	}
}

// BenchmarkPassThroughLocal is a notifier on the in-process bus.
func BenchmarkPassThroughLocal(b *testing.B) {
	l := bus.NewLocal(1, zap.NewNop())
	passThrough(b, l, l)
}

// passThrough sends b.N batches of 1,000 samples through a notifier, 100 at a time.
func passThrough(b *testing.B, pub bus.Publisher, con bus.Consumer) {
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.Pipeline = "notifier-1", ""
	n, err := notifier.New(cfg, notifier.Deps{Log: zap.NewNop(), Consumer: con, Publisher: pub, Keys: keys, Publishers: all.Publishers})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var stored atomic.Int64
	ended := make(chan error, 2)
	go func() { ended <- n.Run(ctx) }()
	go func() {
		ended <- con.Consume(ctx, bus.StoreQueue(0), 200, func(_ context.Context, ds []*bus.Delivery) error {
			for _, d := range ds {
				d.Ack()
			}
			stored.Add(int64(len(ds)))
			return nil
		})
	}()
	m := sealed(b, tick(1))
	ms := make([]bus.Message, 100)
	for i := range ms {
		ms[i] = m
	}
	b.ReportAllocs()
	b.ResetTimer()
	for sent := 0; sent < b.N; sent += len(ms) {
		if err := pub.Publish(ctx, ms[:min(len(ms), b.N-sent)]...); err != nil {
			b.Fatal(err)
		}
	}
	for stored.Load() < int64(b.N) {
		time.Sleep(time.Millisecond)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "batches/s")
	b.StopTimer()
	cancel()
	for range 2 {
		if err := <-ended; err != nil {
			b.Error(err)
		}
	}
}

// rounds hands the same messages of services to a notifier for as long as the
// benchmark lasts.
type rounds struct{ forever }

// Subscribe implements [bus.Subscriber].
func (r *rounds) Subscribe(ctx context.Context, s bus.Subscription, prefetch int, handle bus.Handler) error {
	if s.Queue != "kvmeter.notifications.info" {
		<-ctx.Done()
		return nil
	}
	return r.Consume(ctx, s.Queue, prefetch, handle)
}

// idle is a bus without messages.
type idle struct{}

// Consume implements [bus.Consumer].
func (idle) Consume(ctx context.Context, _ string, _ int, _ bus.Handler) error {
	<-ctx.Done()
	return nil
}

// BenchmarkHandleNotifications is the notifier's own work on what Nova sends, without
// a bus: 198 notifications a round, samples to a file, events to memory.
func BenchmarkHandleNotifications(b *testing.B) {
	var ms []bus.Message
	for i := range 66 {
		for _, name := range []string{"exists", "create.end", "update"} {
			body := strings.Replace(string(captured(b, "compute.instance."+name+".json")), "-21fa-", fmt.Sprintf("-%04d-", i), 1)
			ms = append(ms, bus.Message{ContentType: "application/json", ContentEncoding: "utf-8", Body: []byte(body)})
		}
	}
	cfg := notifier.DefaultConfig()
	cfg.Name, cfg.AllowUnsigned, cfg.Notifications.Enabled = "notifier-1", true, true
	cfg.Pipeline = write(b, "sources: [{name: s, meters: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['file://"+b.TempDir()+"/samples']}]")
	cfg.EventPipeline = write(b, "sources: [{name: s, events: ['*'], sinks: [k]}]\nsinks: [{name: k, publishers: ['test://']}]")
	n, err := notifier.New(cfg, notifier.Deps{
		Log: zap.NewNop(), Consumer: idle{}, Publisher: nowhere{}, Keys: keys, Publishers: all.Publishers,
		Subscribers: []bus.Subscriber{&rounds{forever{b, ms}}},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	before := cpuTime(b)
	if err := n.Run(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/float64(b.N*len(ms)), "cpu-ns/notification")
}

// cpuTime returns the CPU time that the process has used: files are synced, and
// how long that takes is the disk's.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
