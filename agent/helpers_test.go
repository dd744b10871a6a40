package agent

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeBus keeps what is published.
type fakeBus struct {
	mu   sync.Mutex
	down bool
	ms   []bus.Message
	got  chan struct{} // receives at every Publish
}

func newBus() *fakeBus { return &fakeBus{got: make(chan struct{}, 1)} }

func (f *fakeBus) Publish(_ context.Context, ms ...bus.Message) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case f.got <- struct{}{}:
	default:
	}
	if f.down {
		return errors.New("no broker")
	}
	f.ms = append(f.ms, ms...)
	return nil
}

func (f *fakeBus) set(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

// batches returns what arrived, opened and verified.
func (f *fakeBus) batches(t testing.TB, secret []byte) []*sample.Batch {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	dec, err := sample.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	o := bus.Opener{Keys: sample.Keys{"node": secret}, AllowUnsigned: secret == nil, Decoder: dec}
	var all []*sample.Batch
	for i := range f.ms {
		b, err := o.Open(&f.ms[i])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func testConfig() Config {
	cfg := DefaultConfig()
	cfg.Node, cfg.Libvirt, cfg.Spread, cfg.Socket, cfg.Counters = "node", nil, false, "", ""
	cfg.Spool.Path = ""
	cfg.IPMI.Device = "" // of this machine
	cfg.ShutdownTimeout = time.Second
	return cfg
}

// value returns what a self-metric says.
func value(t testing.TB, m prometheus.Metric) float64 {
	t.Helper()
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		t.Fatal(err)
	}
	return out.GetCounter().GetValue() + out.GetGauge().GetValue()
}

func TestAReaderThatTakesOverAddsOnlyItsOwnCount(t *testing.T) {
	m, err := newMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	m.countReader("walk", bpf.Stats{Retries: 10})
	m.countReader("cpuclock", bpf.Stats{Retries: 2})
	m.countReader("walk", bpf.Stats{Retries: 11})
	if n := value(t, m.retries); n != 13 {
		t.Errorf("%v retries, want 13", n)
	}
}
