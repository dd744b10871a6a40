package central

import "github.com/prometheus/client_golang/prometheus"

type ingestMetrics struct {
	batches, samples, duplicates, failures prometheus.Counter
	events, duplicateEvents, epochs        prometheus.Counter
	refused                                *prometheus.CounterVec // by reason
	seconds                                prometheus.Histogram
}

func newIngestMetrics() ingestMetrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvmeter", Subsystem: "central", Name: name, Help: help})
	}
	return ingestMetrics{
		batches:    counter("stored_batches_total", "Batches that were stored."),
		samples:    counter("stored_samples_total", "Samples in those batches."),
		duplicates: counter("duplicate_batches_total", "Batches that were in the store before, and changed nothing."),
		failures:   counter("store_failures_total", "Attempts after which the store had not taken a group of batches or events."),
		epochs:     counter("live_epochs_total", "Times that a node was found to count its batches in two epochs at once: two agents speak for it."),
		events:     counter("stored_events_total", "Events that were stored."),

		duplicateEvents: counter("duplicate_events_total", "Events that were in the store before, and changed nothing."),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "kvmeter", Subsystem: "central", Name: "refused_batches_total",
			Help: "Batches and messages of events that were moved to the dead-letter queue.",
		}, []string{"reason"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "kvmeter", Subsystem: "central", Name: "store_seconds",
			Help:    "Time until the store had synced a group of batches.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
	}
}

// register registers the metrics; r may be nil.
func (m *ingestMetrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{m.batches, m.samples, m.duplicates, m.failures, m.epochs, m.events, m.duplicateEvents, m.refused, m.seconds} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
