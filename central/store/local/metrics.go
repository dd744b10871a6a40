package local

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the store's own.
type metrics struct {
	registry   prometheus.Registerer
	collectors []prometheus.Collector
	samples    prometheus.Counter
	batches    *prometheus.CounterVec
	flushes    *prometheus.CounterVec
	flushTime  prometheus.Counter
	rolls      *prometheus.CounterVec
	rollTime   prometheus.Counter
}

// newMetrics makes the metrics; register shows them.
func newMetrics(s *Store) *metrics {
	m := &metrics{
		samples:   prometheus.NewCounter(prometheus.CounterOpts{Name: "kvmeter_store_samples_total", Help: "Samples stored."}),
		batches:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kvmeter_store_batches_total", Help: "Batches by what became of them: stored, duplicate, refused."}, []string{"result"}),
		flushes:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kvmeter_store_flushes_total", Help: "Heads written as chunks, by result: ok, failed."}, []string{"result"}),
		flushTime: prometheus.NewCounter(prometheus.CounterOpts{Name: "kvmeter_store_flush_seconds_total", Help: "Time spent writing heads."}),
		rolls:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kvmeter_store_rolled_hours_total", Help: "Hours merged and rolled up, by result: ok, failed."}, []string{"result"}),
		rollTime:  prometheus.NewCounter(prometheus.CounterOpts{Name: "kvmeter_store_roll_seconds_total", Help: "Time spent merging and rolling up hours."}),
	}
	m.collectors = []prometheus.Collector{
		m.samples, m.batches, m.flushes, m.flushTime, m.rolls, m.rollTime,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kvmeter_store_head_bytes", Help: "Memory of the samples that are not written as chunks yet."}, func() float64 {
			s.mu.RLock()
			defer s.mu.RUnlock()
			n := s.active.bytes
			if s.frozen != nil {
				n += s.frozen.bytes
			}
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kvmeter_store_disk_bytes", Help: "Disk space that the samples take."}, func() float64 {
			if s.failure() != nil {
				return 0
			}
			return float64(s.db.Metrics().DiskSpaceUsage())
		}),
	}
	return m
}

func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	m.registry = r
	for _, c := range m.collectors {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

func (m *metrics) unregister() {
	if m.registry != nil {
		for _, c := range m.collectors {
			m.registry.Unregister(c)
		}
	}
}

func (m *metrics) stored(samples int) {
	m.samples.Add(float64(samples))
	m.batches.WithLabelValues("stored").Inc()
}

func (m *metrics) duplicate() { m.batches.WithLabelValues("duplicate").Inc() }
func (m *metrics) refused()   { m.batches.WithLabelValues("refused").Inc() }

func (m *metrics) flushed(d time.Duration, err error) {
	m.flushes.WithLabelValues(result(err)).Inc()
	m.flushTime.Add(d.Seconds())
}

func (m *metrics) rolled(d time.Duration, err error) {
	m.rolls.WithLabelValues(result(err)).Inc()
	m.rollTime.Add(d.Seconds())
}

func result(err error) string {
	if err != nil {
		return "failed"
	}
	return "ok"
}
