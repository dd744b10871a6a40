// Package control is the configuration of the control plane and of the
// all-in-one.
package control

import (
	"path/filepath"
	"time"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/api/auth"
	"github.com/kvmeter/kvmeter/central/export"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/oslo"
	"github.com/kvmeter/kvmeter/notifier"
)

// Notifier is notifier.yaml.
type Notifier struct {
	notifier.Config `yaml:",inline"`
	// AMQP says how to reach RabbitMQ.
	AMQP bus.Config `yaml:"amqp"`
	// Keys is the folder of the nodes' secrets, one file <node>.key each.
	Keys string `yaml:"keys"`
	// CeilometerConf is an existing ceilometer.conf, or a list of such files and
	// folders of them: what it says of the notification agent and the collector
	// holds where this file says nothing; docs/ceilometer.md lists it.
	CeilometerConf oslo.Paths `yaml:"ceilometer_conf"`
	// Metrics is the address of the Prometheus page, 127.0.0.1:9188 for
	// example. Empty: off.
	Metrics string `yaml:"metrics"`
	// MetricsWebConfig is a file with TLS and users for that page, in the form of
	// Prometheus' exporters (tls_server_config, basic_auth_users). Empty: neither.
	MetricsWebConfig string `yaml:"metrics_web_config"`
}

// DefaultNotifier returns what holds where notifier.yaml says nothing.
func DefaultNotifier(dirs config.Dirs) Notifier {
	n := Notifier{Config: notifier.DefaultConfig(), AMQP: bus.DefaultConfig(), Keys: keys(dirs)}
	n.Pipeline = filepath.Join(dirs.Config, "pipeline.yaml")
	n.EventPipeline = filepath.Join(dirs.Config, "event_pipeline.yaml")
	n.Spool = filepath.Join(dirs.State, "notifier", "spool")
	n.State = filepath.Join(dirs.State, "notifier", "state")
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
	// Export says where days that are over are written as Parquet.
	Export export.Config `yaml:"export"`
	// Metrics is the address of the Prometheus page, 127.0.0.1:9189 for
	// example. Empty: off.
	Metrics string `yaml:"metrics"`
	// MetricsWebConfig is a file with TLS and users for that page, in the form of
	// Prometheus' exporters (tls_server_config, basic_auth_users). Empty: neither.
	MetricsWebConfig string `yaml:"metrics_web_config"`
}

// DefaultCentral returns what holds where central.yaml says nothing.
func DefaultCentral(dirs config.Dirs) Central {
	return Central{
		IngestConfig: central.DefaultIngestConfig(), AMQP: bus.DefaultConfig(), Keys: keys(dirs),
		Store: defaultStore(dirs.State), API: defaultAPI, Export: export.DefaultConfig(),
	}
}

// Store is the part of central.yaml and up.yaml about the store.
type Store struct {
	// Path is the folder of the store.
	Path string `yaml:"path"`
	// Retention is how long samples are kept, in whole days; 0s: for ever.
	Retention time.Duration `yaml:"retention"`
	// RollupRetention is how long the rollups of 5 minutes and 1 hour are kept,
	// in whole days; 0s: for ever.
	RollupRetention time.Duration `yaml:"rollup_retention"`
	// EventRetention is how long events are kept, in whole days; 0s: for ever.
	EventRetention time.Duration `yaml:"event_retention"`
	// TimeToLive keeps some meters for another time, the first rule that fits:
	// "METER [project=ID] [samples=DURATION] [rollups=DURATION]". METER is a
	// name with wildcards; 0s keeps for ever, what is not said is as for the
	// others.
	TimeToLive []string `yaml:"time_to_live"`
	// Memory bounds what waits in memory to be written as chunks, in bytes; two
	// such are held while one is written. 0: 64 MiB.
	Memory int64 `yaml:"memory"`
	// MinFree is the floor of free disk space, in bytes: below it nothing is
	// stored until there is space again. 0: 1 GiB, or 5 % of a smaller disk
	// than 20 GiB.
	MinFree uint64 `yaml:"min_free"`
}

func defaultStore(state string) Store {
	return Store{Path: filepath.Join(state, "store"), Retention: 30 * 24 * time.Hour, RollupRetention: 400 * 24 * time.Hour, EventRetention: 400 * 24 * time.Hour}
}

// API is the part of central.yaml and up.yaml about the API.
type API struct {
	// Listen is the address of the API. Without authentication it must be on
	// the loopback interface.
	Listen string `yaml:"listen"`
	// WebConfig is a file with TLS for the API, in the form of Prometheus' exporters
	// (tls_server_config). Empty: plain HTTP.
	WebConfig string `yaml:"web_config"`
	// Auth says how who asks is known.
	Auth auth.Config `yaml:"auth"`
	// Policy is the path of a policy file, in the language of oslo.policy: which
	// roles may do what. Empty: the rules in docs/api.md.
	Policy string `yaml:"policy"`
	// RateLimit is how many requests a second each user in each project may
	// send, and each address whose tokens nobody knows, where requests are
	// authenticated; 0: no bound.
	RateLimit float64 `yaml:"rate_limit"`
	// QueryTimeout is how long the store may take to find each part of an
	// answer; 0: as long as it takes.
	QueryTimeout time.Duration `yaml:"query_timeout"`
	// TrustedProxies is the list of addresses, or of networks such as
	// 192.0.2.0/24, whose X-Forwarded-For says where a request comes from, for
	// rate_limit and audit.
	TrustedProxies []string `yaml:"trusted_proxies"`
	// Audit is the path of a file to which a line is added for each request: who
	// asked, what, and what came of it. Empty: none.
	Audit string `yaml:"audit"`
	// DefaultLimit is how many entries a list has where the request names no
	// limit (Ceilometer's default_api_return_limit).
	DefaultLimit int `yaml:"default_api_return_limit"`
	// MaxLimit bounds the limit that a request may name; 0: no bound.
	MaxLimit int `yaml:"max_limit"`
	// AllowedOrigins is the list of origins whose pages may use the API in a
	// browser (CORS), such as https://horizon.example; "*": all.
	AllowedOrigins []string `yaml:"allowed_origins"`
	// Prefix is a path below which the API answers as well as at /, for a proxy
	// that passes it on, such as http://cloud.example/telemetry/v2/meters; links in
	// answers have it then. Empty: none.
	Prefix string `yaml:"prefix"`
	// SampleSource is the source of samples sent to the API that name none
	// (Ceilometer's sample_source).
	SampleSource string `yaml:"sample_source"`
}

var defaultAPI = API{Listen: "127.0.0.1:8777", Auth: auth.DefaultConfig(), RateLimit: 200, QueryTimeout: time.Minute, DefaultLimit: 100, Prefix: "/telemetry", SampleSource: "openstack"}

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
	// MetricsWebConfig is a file with TLS and users for that page, in the form of
	// Prometheus' exporters (tls_server_config, basic_auth_users). Empty: neither.
	MetricsWebConfig string `yaml:"metrics_web_config"`
}

// DefaultUp returns what holds where up.yaml says nothing. The store is in the
// folder state, the socket and the counters in the folder run.
func DefaultUp(state, run string) Up {
	up := Up{
		Agent: agent.DefaultConfig(), Notifier: notifier.DefaultConfig(), Central: central.DefaultIngestConfig(),
		Store: defaultStore(state), API: defaultAPI,
	}
	up.Agent.Interval = time.Second
	up.Agent.Spread = false
	up.Agent.Socket = filepath.Join(run, "agent.sock")
	up.Agent.Counters = filepath.Join(run, "counters")
	up.Agent.IPMI.State = filepath.Join(state, "ipmi.json")
	up.Agent.Pins = ""       // it leaves nothing behind
	up.Agent.Spool.Path = "" // what could be away is in the same process
	up.Notifier.AllowUnsigned, up.Central.AllowUnsigned = true, true
	up.Notifier.Pipeline, up.Notifier.EventPipeline = "", ""
	up.Notifier.Spool, up.Notifier.State = filepath.Join(state, "spool"), filepath.Join(state, "transformers")
	return up
}

// UpDirs returns the folders of `kvmeter up` for its store and its socket, which
// are not those of the daemons.
func UpDirs(dirs config.Dirs) (state, run string) {
	return filepath.Join(dirs.State, "up"), filepath.Join(dirs.Run, "up")
}

func keys(dirs config.Dirs) string { return filepath.Join(dirs.Config, "keys.d") }
