package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/collectors/ipmi"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
	"github.com/kvmeter/kvmeter/sample"
)

// IPMIConfig says how the host's BMC is read.
type IPMIConfig struct {
	// Device is the kernel's IPMI device. Empty: the BMC is not read.
	Device string `yaml:"device"`
	// Interval is the least interval at which the BMC is asked, for meters that
	// polling.yaml does not name without a wildcard.
	Interval time.Duration `yaml:"interval"`
	// Budget is how long the BMC may be waited for in each second. A command that
	// hangs can exceed it; then the BMC is left alone for up to five seconds.
	Budget time.Duration `yaml:"budget"`
	// Timeout is the longest wait for one answer. Sensors that usually answer
	// sooner are waited for less, before they are asked again.
	Timeout time.Duration `yaml:"timeout"`
	// Shape says which of Ceilometer's versions the samples look like: "newer",
	// since 2024.1 (sensors that measure watts are hardware.ipmi.power), or
	// "older" (they are hardware.ipmi.current, if that is their type).
	Shape string `yaml:"shape"`
	// State is the path of the file that keeps the BMC's sensor data records, the
	// place in its event log and which sensors never answer over a restart. Empty:
	// none.
	State string `yaml:"state"`
}

// defaultIPMI is what holds for a daemon.
func defaultIPMI() IPMIConfig {
	return IPMIConfig{
		Device: bmc.Paths[0], Interval: 10 * time.Second, Budget: 200 * time.Millisecond, Timeout: time.Second,
		Shape: string(ipmi.Newer), State: "/var/lib/kvmeter/agent/ipmi.json",
	}
}

func (c *IPMIConfig) check() error {
	switch {
	case c.Device == "":
	case c.Interval < minInterval:
		return fmt.Errorf("ipmi.interval %s is too short: use at least %s", c.Interval, minInterval)
	case c.Budget < time.Millisecond || c.Budget > time.Second:
		return fmt.Errorf("ipmi.budget %s: must be between 1ms and 1s", c.Budget)
	case c.Timeout < 50*time.Millisecond || c.Timeout > time.Minute:
		return fmt.Errorf("ipmi.timeout %s: must be between 50ms and 1m", c.Timeout)
	case c.Shape != string(ipmi.Newer) && c.Shape != string(ipmi.Older):
		return fmt.Errorf("ipmi.shape %q: it is newer or older", c.Shape)
	}
	return nil
}

// hardware is what reads the BMC. Its polls run on goroutines of their own and
// take nothing that others wait for.
type hardware struct {
	mu        sync.Mutex // held by a poll: the BMC is asked by one at a time
	collector *ipmi.Collector
	run       run
	sensors   *prometheus.GaugeVec // health
	kipmid    kipmid
}

// newHardware returns nil where the BMC is not to be read.
func newHardware(log *zap.Logger, m *metrics, reg prometheus.Registerer, cfg *Config, proc string, open func(string) (bmc.Transport, error)) (*hardware, error) {
	c := &cfg.IPMI
	if c.Device == "" {
		return nil, nil
	}
	h := &hardware{run: m.collector("ipmi"), kipmid: kipmid{proc: proc}}
	h.collector = ipmi.New(log, ipmi.Options{
		Node: cfg.Node, Device: c.Device, State: c.State, Budget: c.Budget, Timeout: c.Timeout, Shape: ipmi.Shape(c.Shape), Open: open,
	})
	if err := h.register(reg); err != nil {
		return nil, fmt.Errorf("register self-metrics: %w", err)
	}
	return h, nil
}

func (h *hardware) register(reg prometheus.Registerer) error {
	options := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "kvmeter", Subsystem: "agent", Name: "ipmi_" + name, Help: help}
	}
	gauge := func(name, help string, value func(s ipmi.Status) float64) error {
		return reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts(options(name, help)), func() float64 { return value(h.collector.Status()) }))
	}
	counter := func(name, help string, value func(s ipmi.Status) float64) error {
		return reg.Register(prometheus.NewCounterFunc(prometheus.CounterOpts(options(name, help)), func() float64 { return value(h.collector.Status()) }))
	}
	h.sensors = prometheus.NewGaugeVec(prometheus.GaugeOpts(options("sensors", "What the BMC is asked for, by how that goes.")), []string{"health"})
	for _, health := range ipmi.Healths() {
		h.sensors.WithLabelValues(health)
	}
	return errors.Join(
		reg.Register(h.sensors),
		gauge("up", "1 while the BMC answers.", func(s ipmi.Status) float64 {
			if s.Connected {
				return 1
			}
			return 0
		}),
		gauge("oldest_reading_seconds", "Age of the oldest reading of a sensor that has any.", func(s ipmi.Status) float64 { return s.Oldest.Seconds() }),
		counter("commands_total", "Commands sent to the BMC.", func(s ipmi.Status) float64 { return float64(s.Commands) }),
		counter("busy_total", "Commands that the BMC was too busy for.", func(s ipmi.Status) float64 { return float64(s.Busy) }),
		counter("waited_seconds_total", "Time spent waiting for the BMC.", func(s ipmi.Status) float64 { return s.Waited.Seconds() }),
		counter("walks_total", "Times that all of the BMC's sensor data records were read.", func(s ipmi.Status) float64 { return float64(s.Walks) }),
		counter("kipmid_cpu_seconds_total", "CPU time of the driver's threads that wait for the BMC (kipmid).", func(ipmi.Status) float64 {
			return time.Duration(h.kipmid.used.Load()).Seconds()
		}),
	)
}

// bmcPlans says which meters of the BMC are polled together: one plan for each
// interval.
func bmcPlans(sources []pollSource, least time.Duration) []plan {
	var plans []plan
	for _, s := range sources {
		for _, m := range sample.Catalogue {
			if !m.OfBMC() || !s.meters.Match(m.Name) {
				continue
			}
			interval := s.interval
			if !s.meters.Named(m.Name) {
				interval = max(interval, least)
			}
			i := slices.IndexFunc(plans, func(p plan) bool { return p.interval == interval })
			if i < 0 {
				i = len(plans)
				plans = append(plans, plan{interval: interval, bmc: true})
			}
			if !slices.Contains(plans[i].meters, m) {
				plans[i].meters = append(plans[i].meters, m)
			}
		}
	}
	return plans
}

// pollBMC runs a plan of meters that the BMC is asked for. It may take most of
// the plan's interval.
func (a *Agent) pollBMC(ctx context.Context, t *task) {
	h := a.hardware
	h.mu.Lock()
	defer h.mu.Unlock()
	base := time.Now().UnixMicro()
	begun := h.run.begin()
	err := h.collector.Poll(ctx, t.interval, t.wants, &bmcSink{a, t, base})
	h.run.done(begun, err)
	t.gaps.record(time.Now(), a.deliver.AddGap)
	a.flush(t, base)
	t.last = base
	for health, n := range h.collector.Status().Health {
		h.sensors.WithLabelValues(health).Set(float64(n))
	}
	h.kipmid.read(time.Now())
}

func (t *task) wants(m *sample.Meter) bool { return slices.Contains(t.meters, m) }

// bmcSink puts what a poll of the BMC reads into its task's batch.
type bmcSink struct {
	a    *Agent
	t    *task
	base int64
}

// Emit implements [ipmi.Sink].
func (s *bmcSink) Emit(p *ipmi.Point) {
	wanted := func(x *ipmi.Sample) bool {
		return slices.ContainsFunc(s.t.meters, func(m *sample.Meter) bool { return m.Name == x.Meter.Name })
	}
	n := 0
	for i := range p.Samples {
		if wanted(&p.Samples[i]) {
			n++
		}
	}
	if n == 0 {
		return
	}
	s.a.row(s.t, &sample.Row{Resource: p.Resource, Offset: p.At.UnixMicro() - s.base, Source: s.a.cfg.Source, Metadata: p.Metadata}, n, s.base)
	for i := range p.Samples {
		if x := &p.Samples[i]; wanted(x) {
			s.t.builder.Add(x.Meter, sample.IPMI, x.Volume)
		}
	}
}

// Miss implements [ipmi.Sink].
func (s *bmcSink) Miss(meter, resource, reason string) {
	s.t.gaps.miss(meter, resource, orNow(s.t.last, s.base), s.base, reason)
}

// Flush implements [ipmi.Sink].
func (s *bmcSink) Flush() { s.a.flush(s.t, s.base) }

// note says what the BMC does not give, or nothing.
func (h *hardware) note() []string {
	if h == nil {
		return nil
	}
	if fault := h.collector.Status().Fault; fault != "" {
		return []string{"hardware.ipmi.* cannot be collected: " + fault}
	}
	return nil
}

// close gives the BMC back.
func (h *hardware) close() error {
	if h == nil {
		return nil
	}
	return h.collector.Close()
}

// kipmid adds up the CPU time of the driver's threads. A BMC that has no interrupt
// is waited for by a thread that spins.
type kipmid struct {
	proc   string
	looked time.Time
	pids   []string
	used   atomic.Int64 // ns
}

// lookAgain is how often the threads are looked for.
const lookAgain = 10 * time.Minute

func (k *kipmid) read(now time.Time) {
	if k.looked.IsZero() || now.Sub(k.looked) > lookAgain {
		k.looked, k.pids = now, nil
		all, err := filepath.Glob(filepath.Join(k.proc, "[0-9]*", "comm"))
		if err != nil {
			return
		}
		for _, path := range all {
			if name, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(name), "kipmi") {
				k.pids = append(k.pids, filepath.Dir(path))
			}
		}
	}
	total := time.Duration(0)
	for _, pid := range k.pids {
		text, err := os.ReadFile(filepath.Join(pid, "stat"))
		if err != nil {
			continue
		}
		total += statCPU(string(text))
	}
	k.used.Store(max(int64(total), k.used.Load()))
}

// statCPU returns the CPU time in the text of a /proc/PID/stat: fields 14 and 15.
func statCPU(text string) time.Duration {
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 13 {
		return 0
	}
	ticks := uint64(0)
	for _, f := range fields[11:13] {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return 0
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick
}
