package notifier

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	batches, samples, redelivered prometheus.Counter
	refused                       *prometheus.CounterVec // by reason
	published, failures           *prometheus.CounterVec // by publisher
}

func newMetrics() metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvmeter", Subsystem: "notifier", Name: name, Help: help})
	}
	vector := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "kvmeter", Subsystem: "notifier", Name: name, Help: help}, []string{label})
	}
	return metrics{
		batches:     counter("batches_total", "Batches that were received and are good."),
		samples:     counter("samples_total", "Samples in those batches."),
		redelivered: counter("redelivered_batches_total", "Good batches that the bus had delivered before."),
		refused:     vector("refused_batches_total", "Batches that were moved to the dead-letter queue.", "reason"),
		published:   vector("published_samples_total", "Samples that a publisher has taken.", "publisher"),
		failures:    vector("publish_failures_total", "Attempts after which a publisher had not taken its samples.", "publisher"),
	}
}

// register registers the metrics; r may be nil.
func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{m.batches, m.samples, m.redelivered, m.refused, m.published, m.failures} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
