// Package compute is the configuration of what runs on compute hosts. It is
// apart from package control so that the agent links nothing of the control
// plane.
package compute

import (
	"crypto/tls"
	"fmt"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/agent/ceilometer"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/oslo"
)

// Agent is agent.yaml.
type Agent struct {
	agent.Config `yaml:",inline"`
	// AMQP says how to reach RabbitMQ.
	AMQP bus.Config `yaml:"amqp"`
	// Wire says how samples travel: "kvmeter", in batches to kvmeter's notifier, or
	// "ceilometer", as Ceilometer's polling agents send them, to its notification
	// agent or kvmeter's notifier, or "off": not at all, the exporter alone has them.
	Wire string `yaml:"wire"`
	// Ceilometer is about wire: ceilometer.
	Ceilometer ceilometer.Config `yaml:"ceilometer"`
	// CeilometerConf is an existing ceilometer.conf, or a list of such files and
	// folders of them: what it says of a compute host holds where this file says
	// nothing; docs/ceilometer.md lists it.
	CeilometerConf oslo.Paths `yaml:"ceilometer_conf"`
	// Notes say what is done otherwise than CeilometerConf asks.
	Notes []string `yaml:"-"`
	// Exporter serves the newest samples to Prometheus.
	Exporter Exporter `yaml:"exporter"`
	// Metrics is the address of the Prometheus page, 127.0.0.1:9187 for
	// example. Empty: off.
	Metrics string `yaml:"metrics"`
	// MetricsWebConfig is a file with TLS and users for that page, in the form of
	// Prometheus' exporters (tls_server_config, basic_auth_users). Empty: neither.
	MetricsWebConfig string `yaml:"metrics_web_config"`
}

// Exporter is the part of agent.yaml about the page of samples, which has the names
// and labels of the one of Ceilometer's polling agent.
type Exporter struct {
	// Listen lists the addresses of the page /metrics, 127.0.0.1:9101 for example.
	// Empty: off.
	Listen []string `yaml:"listen"`
	// TLSCert is the file of a certificate; empty: the page answers without TLS.
	TLSCert string `yaml:"tls_cert"`
	// TLSKey is the file of its key.
	TLSKey string `yaml:"tls_key"`
}

// Check returns an error that names the first option with an impossible value.
func (e *Exporter) Check() error {
	if len(e.Listen) == 0 || e.TLSCert == "" && e.TLSKey == "" {
		return nil
	}
	if _, err := tls.LoadX509KeyPair(e.TLSCert, e.TLSKey); err != nil {
		return fmt.Errorf("exporter.tls_cert and exporter.tls_key: %w", err)
	}
	return nil
}

// Changed returns the keys of the settings that are not the same in two
// configurations.
func Changed(a, b *Agent) ([]string, error) {
	changed, err := config.Changed(a, b)
	if a.Ceilometer.TelemetrySecret != b.Ceilometer.TelemetrySecret {
		changed = append(changed, "ceilometer.telemetry_secret_file")
	}
	return changed, err
}

// DefaultAgent returns what holds where agent.yaml says nothing.
func DefaultAgent() Agent {
	return Agent{Config: agent.DefaultConfig(), AMQP: bus.DefaultConfig(), Wire: Kvmeter, Ceilometer: ceilometer.DefaultConfig(), Exporter: Exporter{Listen: []string{}}}
}

// The wires.
const (
	Kvmeter    = "kvmeter"
	Off        = "off"
	Ceilometer = "ceilometer"
)

// Check returns an error that names the first option with an impossible value.
func (a *Agent) Check() error {
	switch a.Wire {
	case Kvmeter, Off:
	case Ceilometer:
		if err := a.Ceilometer.Check(); err != nil {
			return err
		}
	default:
		return fmt.Errorf("wire %q: it is kvmeter, ceilometer or off", a.Wire)
	}
	if err := a.Exporter.Check(); err != nil {
		return err
	}
	return a.Config.Check()
}
