package notifier

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	batches, samples, redelivered prometheus.Counter
	notifications, events         prometheus.Counter
	conversionErrors, noNumber    prometheus.Counter
	unsigned                      prometheus.Counter
	refused                       *prometheus.CounterVec // by reason
	published, failures           *prometheus.CounterVec // by publisher
	dropped                       *prometheus.CounterVec // by sink, stage and reason
	spooled                       *prometheus.CounterVec // by publisher
	lost                          *prometheus.CounterVec // by publisher and reason
	waiting, since                *prometheus.GaugeVec   // by publisher
	stateBytes, stateErrors       prometheus.Counter
	snapshots                     prometheus.Histogram
	owned                         prometheus.Gauge
	takeovers                     prometheus.Counter
	reloads                       *prometheus.CounterVec // by result
}

func newMetrics() metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvmeter", Subsystem: "notifier", Name: name, Help: help})
	}
	vector := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "kvmeter", Subsystem: "notifier", Name: name, Help: help}, labels)
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "kvmeter", Subsystem: "notifier", Name: name, Help: help}, labels)
	}
	return metrics{
		batches:     counter("batches_total", "Batches that were received and are good."),
		samples:     counter("samples_total", "Samples in those batches, and those that notifications gave."),
		redelivered: counter("redelivered_batches_total", "Good batches and notifications that the bus had delivered before."),
		refused:     vector("refused_batches_total", "Batches and notifications that were moved to the dead-letter queue.", "reason"),

		notifications:    counter("notifications_total", "Notifications that were received and are good."),
		events:           counter("events_total", "Events that notifications gave, and those that samples of batches are."),
		conversionErrors: counter("notification_errors_total", "Meters and traits of good notifications that could not be converted."),
		noNumber:         counter("notification_not_finite_total", "Samples of notifications that were left out since their volume is text that says NaN or infinite."),
		unsigned:         counter("polled_unsigned_samples_total", "Samples of polling agents whose signature does not fit telemetry_secret. They are refused where telemetry_secret_file is set and allow_unsigned is not."),

		stateBytes:  counter("state_bytes_total", "What was recorded of what transformers remember."),
		stateErrors: counter("state_errors_total", "Times that what transformers remember could not be recorded, or not be read."),
		snapshots: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "kvmeter", Subsystem: "notifier", Name: "state_snapshot_seconds",
			Help: "How long it took to record all that transformers remember.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 8),
		}),
		owned: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "kvmeter", Subsystem: "notifier", Name: "stage_partitions", Help: "Partitions whose state this notifier keeps.",
		}),
		takeovers: counter("stage_takeovers_total", "Times that this notifier took over the state of a partition."),
		reloads:   vector("reloads_total", "Reloads of the configuration.", "result"),

		published: vector("published_samples_total", "Samples and events that a publisher has taken.", "publisher"),
		failures:  vector("publish_failures_total", "Attempts after which a publisher had not taken its samples or events.", "publisher"),
		dropped:   vector("stage_dropped_samples_total", "Samples that a transformer of a pipeline dropped.", "sink", "stage", "reason"),
		spooled:   vector("spooled_samples_total", "Samples and events that had to wait in a publisher's spool.", "publisher"),
		lost:      vector("lost_samples_total", "Samples and events that a publisher will never get.", "publisher", "reason"),
		waiting:   gauge("spool_bytes", "What waits in a publisher's spool.", "publisher"),
		since:     gauge("spool_oldest_timestamp_seconds", "When the oldest that waits in a publisher's spool came there; 0: nothing waits.", "publisher"),
	}
}

// register registers the metrics; r may be nil.
func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{m.batches, m.samples, m.redelivered, m.notifications, m.events, m.conversionErrors, m.noNumber, m.unsigned, m.refused, m.published, m.failures, m.dropped, m.spooled, m.lost, m.waiting, m.since, m.stateBytes, m.stateErrors, m.snapshots, m.owned, m.takeovers, m.reloads} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

// spool returns what counts for the spool of a publisher.
func (m *metrics) spool(name string) *spoolMetrics { return &spoolMetrics{m, name} }

// spoolMetrics are [spool.Counters].
type spoolMetrics struct {
	m    *metrics
	name string
}

// Spooled implements [spool.Counters].
func (s *spoolMetrics) Spooled(n int) { s.m.spooled.WithLabelValues(s.name).Add(float64(n)) }

// Lost implements [spool.Counters].
func (s *spoolMetrics) Lost(reason string, n int) {
	s.m.lost.WithLabelValues(s.name, reason).Add(float64(n))
}

// Waiting implements [spool.Counters].
func (s *spoolMetrics) Waiting(bytes, since int64) {
	s.m.waiting.WithLabelValues(s.name).Set(float64(bytes))
	s.m.since.WithLabelValues(s.name).Set(float64(since) / 1e6)
}
