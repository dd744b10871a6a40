package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/sample"
)

// metrics are what the agent tells of itself.
type metrics struct {
	domains       prometheus.Gauge
	samples       prometheus.Counter
	batches       prometheus.Counter
	dropped       *prometheus.CounterVec // meter
	gaps          prometheus.Counter
	held          *prometheus.CounterVec // meter
	skipped       prometheus.Counter
	queueBytes    prometheus.Gauge
	queueBatches  prometheus.Gauge
	publishErrors prometheus.Counter
	libvirt       prometheus.Gauge
	duration      *prometheus.GaugeVec   // collector
	success       *prometheus.GaugeVec   // collector
	failures      *prometheus.CounterVec // collector

	retries, readerHeld prometheus.Counter
	readers             map[string]bpf.Stats // by origin, as last counted

	heldUsage [usageCount]prometheus.Counter
	heldNIC   [nicCount]prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	const namespace, subsystem = "kvmeter", "agent"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help})
	}
	counters := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}, []string{label})
	}
	gauges := func(name, help, label string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}, []string{label})
	}
	m := &metrics{
		readers:       map[string]bpf.Stats{},
		domains:       gauge("domains", "Domains that are metered."),
		samples:       counter("samples_total", "Samples made."),
		batches:       counter("batches_total", "Batches made."),
		dropped:       counters("dropped_samples_total", "Samples dropped because the queue was full.", "meter"),
		gaps:          counter("gaps_total", "Gaps recorded: what could not be read."),
		held:          counters("held_values_total", "Readings that were lower than the one before, which was published instead.", "meter"),
		skipped:       counter("skipped_polls_total", "Polls that were left out because the one before was not done."),
		queueBytes:    gauge("queue_bytes", "Size of the batches that wait for the bus."),
		queueBatches:  gauge("queue_batches", "Batches that wait for the bus."),
		publishErrors: counter("publish_errors_total", "Failed attempts to publish."),
		libvirt:       gauge("libvirt_connected", "1 while libvirt answers."),
		duration:      gauges("collector_duration_seconds", "How long the collector's last run took.", "collector"),
		success:       gauges("collector_success", "1 if the collector's last run succeeded.", "collector"),
		failures:      counters("collector_failures_total", "Failed runs of the collector.", "collector"),
		retries:       counter("reader_retries_total", "Processes read again because a thread had exited meanwhile."),
		readerHeld:    counter("reader_held_total", "Processes of which the reader held a value so that it did not decrease."),
	}
	for i, meter := range usageMeters {
		m.heldUsage[i] = m.held.WithLabelValues(meter.Name)
	}
	for i, meter := range nicMeters {
		m.heldNIC[i] = m.held.WithLabelValues(meter.Name)
	}
	for _, meter := range sample.Catalogue {
		m.dropped.WithLabelValues(meter.Name)
	}
	for _, c := range []prometheus.Collector{
		m.domains, m.samples, m.batches, m.dropped, m.gaps, m.held, m.skipped, m.queueBytes, m.queueBatches,
		m.publishErrors, m.libvirt, m.duration, m.success, m.failures, m.retries, m.readerHeld,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// countReader adds what the reader of that origin has counted since the last call.
func (m *metrics) countReader(origin string, s bpf.Stats) {
	last := m.readers[origin]
	m.retries.Add(float64(s.Retries - last.Retries))
	m.readerHeld.Add(float64(s.Held - last.Held))
	m.readers[origin] = s
}

// run is one collector's part of the metrics.
type run struct {
	duration, success prometheus.Gauge
	failures          prometheus.Counter
}

func (m *metrics) collector(name string) run {
	return run{m.duration.WithLabelValues(name), m.success.WithLabelValues(name), m.failures.WithLabelValues(name)}
}

func (r *run) done(start time.Time, err error) {
	r.duration.Set(time.Since(start).Seconds())
	if err == nil {
		r.success.Set(1)
		return
	}
	r.success.Set(0)
	r.failures.Inc()
}
