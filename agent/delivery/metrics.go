package delivery

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/sample"
)

// Metrics are what a delivery tells of itself.
type Metrics struct {
	samples, batches, gaps, publishErrors, damaged prometheus.Counter
	dropped                                        *prometheus.CounterVec // meter
	queueBytes, queueBatches                       prometheus.Gauge
	spoolWrites, spoolBytes                        prometheus.Gauge
	spoolBatches, spoolOldest                      prometheus.Gauge
}

// NewMetrics registers the metrics of a delivery.
func NewMetrics(reg prometheus.Registerer) (*Metrics, error) {
	const namespace, subsystem = "kvmeter", "agent"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help})
	}
	m := &Metrics{
		samples:       counter("samples_total", "Samples made."),
		batches:       counter("batches_total", "Batches made."),
		gaps:          counter("gaps_total", "Gaps recorded: what could not be read."),
		publishErrors: counter("publish_errors_total", "Failed attempts to publish."),
		damaged:       counter("spool_damaged_total", "Batches that were lost because the spool was damaged on its disk."),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "dropped_samples_total",
			Help: "Samples dropped because the queue or the spool was full, or they were too old.",
		}, []string{"meter"}),
		queueBytes:   gauge("queue_bytes", "Size of the batches in memory that wait for the bus."),
		queueBatches: gauge("queue_batches", "Batches in memory that wait for the bus."),
		spoolWrites:  gauge("spool_writable", "1 while batches are kept on disk until they are delivered."),
		spoolBytes:   gauge("spool_bytes", "Size of the spool on disk."),
		spoolBatches: gauge("spool_batches", "Batches in the spool that are not confirmed."),
		spoolOldest:  gauge("spool_oldest_timestamp_seconds", "When the oldest of the spool was made; 0: nothing waits."),
	}
	for _, meter := range sample.Catalogue {
		m.dropped.WithLabelValues(meter.Name)
	}
	for _, c := range []prometheus.Collector{
		m.samples, m.batches, m.gaps, m.publishErrors, m.damaged, m.dropped, m.queueBytes, m.queueBatches,
		m.spoolWrites, m.spoolBytes, m.spoolBatches, m.spoolOldest,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// spool tells of the spool.
func (m *Metrics) spool(q *diskqueue.Queue, writable bool) {
	m.spoolWrites.Set(0)
	if writable {
		m.spoolWrites.Set(1)
	}
	if q == nil {
		return
	}
	st := q.Stats()
	m.spoolBytes.Set(float64(st.Files))
	m.spoolBatches.Set(float64(st.Records))
	m.spoolOldest.Set(float64(st.Oldest) / 1e6)
}
