// Package control is the configuration of the control plane and of the
// all-in-one.
package control

import (
	"path/filepath"
	"time"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/notifier"
)

// Notifier is notifier.yaml.
type Notifier struct {
	notifier.Config `yaml:",inline"`
	// AMQP says how to reach RabbitMQ.
	AMQP bus.Config `yaml:"amqp"`
	// Keys is the folder of the nodes' secrets, one file <node>.key each.
	Keys string `yaml:"keys"`
	// Metrics is the address of the Prometheus page, 127.0.0.1:9188 for
	// example. Empty: off.
	Metrics string `yaml:"metrics"`
}

// DefaultNotifier returns what holds where notifier.yaml says nothing.
func DefaultNotifier(dirs config.Dirs) Notifier {
	n := Notifier{Config: notifier.DefaultConfig(), AMQP: bus.DefaultConfig(), Keys: keys(dirs)}
	n.Pipeline = filepath.Join(dirs.Config, "pipeline.yaml")
	return n
}

// Central is central.yaml.
type Central struct {
	central.IngestConfig `yaml:",inline"`
	// AMQP says how to reach RabbitMQ.
	AMQP bus.Config `yaml:"amqp"`
	// Keys is the folder of the secrets of nodes and notifiers, one file
	// <node>.key each.
	Keys string `yaml:"keys"`
	// Store says where samples are kept, and for how long.
	Store Store `yaml:"store"`
	// API says where the API answers.
	API API `yaml:"api"`
	// Metrics is the address of the Prometheus page, 127.0.0.1:9189 for
	// example. Empty: off.
	Metrics string `yaml:"metrics"`
}

// DefaultCentral returns what holds where central.yaml says nothing.
func DefaultCentral(dirs config.Dirs) Central {
	return Central{
		IngestConfig: central.DefaultIngestConfig(), AMQP: bus.DefaultConfig(), Keys: keys(dirs),
		Store: defaultStore(dirs.State), API: defaultAPI,
	}
}

// Store is the part of central.yaml and up.yaml about the store.
type Store struct {
	// Path is the folder of the store.
	Path string `yaml:"path"`
	// Retention is how long samples are kept, in whole days; 0s: for ever.
	Retention time.Duration `yaml:"retention"`
	// MinFree is the floor of free disk space, in bytes: below it nothing is
	// stored until there is space again. 0: 1 GiB, or 5 % of a smaller disk
	// than 20 GiB.
	MinFree uint64 `yaml:"min_free"`
}

func defaultStore(state string) Store {
	return Store{Path: filepath.Join(state, "store"), Retention: 30 * 24 * time.Hour}
}

// API is the part of central.yaml and up.yaml about the API.
type API struct {
	// Listen is the address of the API. Without authentication it must be on
	// the loopback interface.
	Listen string `yaml:"listen"`
}

var defaultAPI = API{Listen: "127.0.0.1:8777"}

// Up is up.yaml.
type Up struct {
	// Agent is as in agent.yaml.
	Agent agent.Config `yaml:"agent"`
	// Notifier is as in notifier.yaml.
	Notifier notifier.Config `yaml:"notifier"`
	// Central is as in central.yaml.
	Central central.IngestConfig `yaml:"central"`
	// Store says where samples are kept, and for how long.
	Store Store `yaml:"store"`
	// API says where the API answers.
	API API `yaml:"api"`
	// Metrics is the address of the Prometheus page, 127.0.0.1:9189 for
	// example. Empty: off.
	Metrics string `yaml:"metrics"`
}

// DefaultUp returns what holds where up.yaml says nothing. The store is in the
// folder state, the socket in the folder run.
func DefaultUp(state, run string) Up {
	up := Up{
		Agent: agent.DefaultConfig(), Notifier: notifier.DefaultConfig(), Central: central.DefaultIngestConfig(),
		Store: defaultStore(state), API: defaultAPI,
	}
	up.Agent.Interval = time.Second
	up.Agent.Spread = false
	up.Agent.Socket = filepath.Join(run, "agent.sock")
	up.Notifier.AllowUnsigned, up.Central.AllowUnsigned = true, true
	up.Notifier.Pipeline = ""
	return up
}

// UpDirs returns the folders of `kvmeter up` for its store and its socket, which
// are not those of the daemons.
func UpDirs(dirs config.Dirs) (state, run string) {
	return filepath.Join(dirs.State, "up"), filepath.Join(dirs.Run, "up")
}

func keys(dirs config.Dirs) string { return filepath.Join(dirs.Config, "keys.d") }
