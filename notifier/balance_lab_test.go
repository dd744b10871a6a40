//go:build lab

package notifier_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

// member is one of several notifiers that share partitions.
type member struct {
	reg   *prometheus.Registry
	leave func()
}

// figure returns what a metric without labels says.
func (m *member) figure(t *testing.T, name string) int {
	t.Helper()
	families, err := m.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "kvmeter_notifier_"+name {
			return int(f.GetMetric()[0].GetGauge().GetValue() + f.GetMetric()[0].GetCounter().GetValue())
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// TestPartitionsAreSharedOutAndFewChangeHands has notifiers join and leave while
// samples come for all partitions.
func TestPartitionsAreSharedOutAndFewChangeHands(t *testing.T) {
	const partitions = 12
	r, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cfg := bus.Config{URL: r.URL(), Stages: partitions}
	feed, err := bus.NewAMQP(cfg, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	if err := feed.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var feeding sync.WaitGroup
	defer func() { cancel(); feeding.Wait() }()
	feeding.Go(func() { // of 200 resources, so that each partition has some
		enc, err := sample.NewEncoder()
		if err != nil {
			t.Error(err)
			return
		}
		for tick := 0; ctx.Err() == nil; tick++ {
			b := sample.NewBuilder()
			for i := range 200 {
				b.Row(sample.Row{Resource: fmt.Sprintf("domain-%d", i), Source: "openstack", Project: "p"})
				b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(uint64(tick)*1e9))
			}
			out := b.Build()
			at := time.Unix(1_800_000_000+int64(tick), 0)
			out.ID, out.Node, out.Epoch, out.Seq, out.Base = sample.NewBatchID(at), "node-1", 42, uint64(tick+1), at.UnixMicro()
			body, err := enc.Encode(nil, out)
			if err == nil {
				err = feed.Publish(ctx, bus.Seal(bus.SamplesKey("node-1", 1), out, body, keys["node-1"]))
			}
			if err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
	pipeline := write(t, "sources: [{name: s, meters: [cpu], sinks: [k]}]\nsinks: [{name: k, transformers: [{name: rate_of_change, parameters: {target: {name: cpu_util}}}], publishers: ['test://']}]")
	join := func() *member {
		b, err := bus.NewAMQP(cfg, "notifier", zap.NewNop())
		if err != nil {
			t.Fatal(err)
		}
		m := &member{reg: prometheus.NewRegistry()}
		c := notifier.DefaultConfig()
		c.Name, c.Pipeline, c.EventPipeline, c.StagePartitions = "notifier-1", pipeline, "", partitions
		c.Relays = []string{"notifier-1"}
		n, err := notifier.New(c, notifier.Deps{
			Log: zap.NewNop(), Consumer: b, Publisher: b, Keys: keys, Publishers: all.Publishers, Registry: m.reg, Memory: b, Counter: b,
		})
		if err != nil {
			t.Fatal(err)
		}
		n.BalanceEvery(2 * time.Second)
		running, stop := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := n.Run(running); err != nil {
				t.Error(err)
			}
		})
		m.leave = sync.OnceFunc(func() {
			stop()
			wg.Wait()
			if err := n.Close(); err != nil {
				t.Error(err)
			}
			b.Close()
		})
		t.Cleanup(m.leave)
		return m
	}
	var members []*member
	// settled waits until each has its share, and returns how many partitions have
	// changed hands since the last time.
	before := 0
	settled := func(what string) int {
		t.Helper()
		share := (partitions + len(members) - 1) / len(members)
		var owned []int
		for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
			owned = owned[:0]
			sum, takeovers := 0, 0
			for _, m := range members {
				owned = append(owned, m.figure(t, "stage_partitions"))
				takeovers += m.figure(t, "stage_takeovers_total")
				sum += owned[len(owned)-1]
			}
			if sum == partitions && slices.Max(owned) <= share {
				moved := takeovers - before
				before = takeovers
				t.Logf("%s: %v, %d changed hands", what, owned, moved)
				return moved
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: they own %v, want no more than %d each", what, owned, share)
			}
		}
	}
	for range 3 {
		members = append(members, join())
	}
	settled("three that start")
	members = append(members, join())
	// More than need be only where the machine is too slow for those times.
	if n := settled("a fourth joins"); n > 9 {
		t.Errorf("%d partitions changed hands when a fourth notifier joined, 3 are its share", n)
	}
	gone := members[0]
	members = members[1:]
	before -= gone.figure(t, "stage_takeovers_total")
	had := gone.figure(t, "stage_partitions")
	gone.leave()
	if n := settled("one leaves"); n < had || n >= partitions {
		t.Errorf("%d partitions changed hands when one left that had %d", n, had)
	}
}
