package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/agent/ceilometer"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/export"
	"github.com/kvmeter/kvmeter/central/store/local"
	collectors "github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/notifier"
	publishers "github.com/kvmeter/kvmeter/notifier/publisher/all"
)

// labels says what the values of labels are.
var labels = map[string]string{
	"collector": "`discovery` (finding domains), `usage` (CPU time and disk bytes), `links` (network), `ipmi` (the BMC), `libvirt`, `crosscheck`, `lifecycle` (execs and ends), `fallover` (what libvirt counts in place of the others), and each hook",
	"domain":    "its UUID",
	"hook":      "`disk`, `tcx`, `runqueue`, `exits`",
	"health":    "`ok`, `no reading` (it has none at present), `failing`, `quarantined` (it goes on failing and is asked rarely), `absent` (the BMC knows no such thing)",
	"meter":     "the meter's name, see [meters.md](meters.md)",
	"queue":     "of RabbitMQ",
	"publisher": "its URL in pipeline.yaml, without the password",
	"reason": "of a batch `unsigned`, `unknown_key`, `bad_signature`, `wrong_node` (the key is another node's), `malformed`, `other`; " +
		"of a transformer or a publisher see [pipeline.md](pipeline.md)",
	"verdict": "`agrees`, `differs`, `not comparable`",
	"result":  "as the metric's meaning says",
	"sink":    "its name in pipeline.yaml",
	"stage":   "the transformer's name in pipeline.yaml",
	"what":    "`processes`, `commands`, `ends`, `holds`",
}

// metricsPage is docs/metrics.md: what the parts of the programs register.
func metricsPage() ([]byte, error) {
	b := bytes.NewBufferString(`# Metrics of kvmeter itself

Generated from what the programs register. Each program serves its own on a Prometheus page, ` + "`/metrics`" + `, once the
setting ` + "`metrics`" + ` gives it an address (see [config.md](config.md)); customary are 127.0.0.1:9187 for the agent, 9188
for the notifier, 9189 for central and ` + "`kvmeter up`" + `, which shows all of them. Beside these each page has the
` + "`go_*`" + ` and ` + "`process_*`" + ` metrics of Prometheus' Go library: ` + "`process_cpu_seconds_total`" + ` and
` + "`process_resident_memory_bytes`" + ` are what the program costs.

These are about kvmeter's health. What the domains use are samples, not metrics: see [meters.md](meters.md).
`)
	used := map[string]bool{}
	for _, part := range []struct {
		program string
		open    func(prometheus.Registerer) (done func() error, err error)
	}{
		{"kvmeter-agent", openAgent},
		{"kvmeter notifier", openNotifier},
		{"kvmeter central", openCentral},
	} {
		families, err := families(func(r prometheus.Registerer) (func() error, error) {
			if err := openBus(r); err != nil {
				return nil, err
			}
			return part.open(r)
		})
		if err != nil {
			return nil, fmt.Errorf("metrics of %s: %w", part.program, err)
		}
		fmt.Fprintf(b, "\n## %s\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n", part.program)
		for _, f := range families {
			var names []string
			for _, l := range f.GetMetric()[0].GetLabel() {
				if labels[l.GetName()] == "" {
					return nil, fmt.Errorf("label %s of %s: say in labels what its values are", l.GetName(), f.GetName())
				}
				used[l.GetName()] = true
				names = append(names, "`"+l.GetName()+"`")
			}
			fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(names, ", "), f.GetHelp())
		}
	}
	b.WriteString("\n## Labels\n\n| label | values |\n|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		if !used[name] {
			return nil, fmt.Errorf("no metric has the label %s: remove it from labels", name)
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", name, labels[name])
	}
	return b.Bytes(), nil
}

// families returns the metrics that a part registers.
func families(open func(prometheus.Registerer) (func() error, error)) ([]*dto.MetricFamily, error) {
	r := touched{Registry: prometheus.NewRegistry()}
	done, err := open(&r)
	if err != nil {
		return nil, err
	}
	all, err := r.Gather()
	if err == nil && len(all) != r.described {
		err = fmt.Errorf("%d are registered, of which %d have a value", r.described, len(all))
	}
	return all, errors.Join(err, done())
}

// touched is a registry in which metrics with labels have a value from the
// start: Gather leaves out those that have none yet.
type touched struct {
	*prometheus.Registry
	described int
}

// Register implements prometheus.Registerer.
func (r *touched) Register(c prometheus.Collector) error {
	if err := r.Registry.Register(c); err != nil {
		return err
	}
	descriptions := make(chan *prometheus.Desc)
	go func() {
		c.Describe(descriptions)
		close(descriptions)
	}()
	for range descriptions {
		r.described++
	}
	switch v := c.(type) {
	case *prometheus.CounterVec:
		touch(v.GetMetricWithLabelValues)
	case *prometheus.GaugeVec:
		touch(v.GetMetricWithLabelValues)
	case *prometheus.HistogramVec:
		touch(v.GetMetricWithLabelValues)
	}
	return nil
}

// touch makes a metric with as many labels as it takes.
func touch[M any](with func(values ...string) (M, error)) {
	const most = 5
	for n := range most {
		if _, err := with(make([]string, n)...); err == nil {
			return
		}
	}
}

// The functions below open the parts as the programs do, without what they
// would need to run.

func openBus(r prometheus.Registerer) error {
	amqp, err := bus.NewAMQP(bus.DefaultConfig(), "", zap.NewNop())
	if err != nil {
		return err
	}
	defer amqp.Close()
	return r.Register(amqp.Metrics())
}

func openAgent(r prometheus.Registerer) (func() error, error) {
	cfg := agent.DefaultConfig()
	cfg.Socket, cfg.Counters, cfg.Libvirt = "", "", nil
	log := zap.NewNop()
	readers, _ := collectors.Usage(log, true)
	_, err := agent.New(cfg, agent.Deps{Log: log, Publisher: bus.NewLocal(1, log), Registry: r, Usage: readers})
	if err == nil {
		_, err = ceilometer.New(ceilometer.DefaultConfig(), nil, log, r)
	}
	return func() error { return collectors.Close(readers) }, err
}

func openNotifier(r prometheus.Registerer) (func() error, error) {
	cfg := notifier.DefaultConfig()
	cfg.Pipeline, cfg.AllowUnsigned = "", true
	log := zap.NewNop()
	b := bus.NewLocal(1, log)
	n, err := notifier.New(cfg, notifier.Deps{Log: log, Consumer: b, Publisher: b, Publishers: publishers.Publishers, Registry: r})
	if err != nil {
		return nil, err
	}
	return n.Close, nil
}

func openCentral(r prometheus.Registerer) (func() error, error) {
	dir, err := os.MkdirTemp("", "kvmeter-docs-")
	if err != nil {
		return nil, err
	}
	log := zap.NewNop()
	store, err := local.Open(filepath.Join(dir, "store"), local.Options{Log: log, Registry: r})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	done := func() error { return errors.Join(store.Close(), os.RemoveAll(dir)) }
	if _, err := central.NewIngest(central.DefaultIngestConfig(), central.IngestDeps{Log: log, Store: store, Registry: r}); err != nil {
		return nil, errors.Join(err, done())
	}
	files := export.DefaultConfig()
	files.To = dir
	if _, err := export.New(files, export.Deps{Log: log, Store: store, Registry: r}); err != nil {
		return nil, errors.Join(err, done())
	}
	return done, nil
}
