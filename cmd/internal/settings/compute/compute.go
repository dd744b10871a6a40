// Package compute is the configuration of what runs on compute hosts. It is
// apart from package control so that the agent links nothing of the control
// plane.
package compute

import (
	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bus"
)

// Agent is agent.yaml.
type Agent struct {
	agent.Config `yaml:",inline"`
	// AMQP says how to reach RabbitMQ.
	AMQP bus.Config `yaml:"amqp"`
	// Metrics is the address of the Prometheus page, 127.0.0.1:9187 for
	// example. Empty: off.
	Metrics string `yaml:"metrics"`
}

// DefaultAgent returns what holds where agent.yaml says nothing.
func DefaultAgent() Agent { return Agent{Config: agent.DefaultConfig(), AMQP: bus.DefaultConfig()} }
