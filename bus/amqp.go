package bus

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"
)

// How a client of RabbitMQ logs in ([Config.Auth]), and what it does about the
// topology ([Config.Topology]).
const (
	AuthPassword    = "password"
	AuthExternal    = "external"
	TopologyDeclare = "declare"
	TopologyCheck   = "check"
)

// Config says how to reach RabbitMQ.
type Config struct {
	// URL of the broker: amqp://user:password@host:5672/vhost, or amqps:// with
	// TLS. Special characters in the password are written as %XX.
	URL string `yaml:"url"`
	// URLs are the nodes of a cluster, each as url is written; they are tried in
	// random order, and another takes over from one that fails. Where there are
	// any, url is not used.
	URLs []string `yaml:"urls"`
	// PasswordFile is the file of the password of the user in url. Empty: the
	// password is in url.
	PasswordFile string `yaml:"password_file"`
	// Auth says how to log in: "password", or "external": by the certificate in
	// tls_cert, with RabbitMQ's plugin rabbitmq_auth_mechanism_ssl.
	Auth string `yaml:"auth"`
	// TLSCA is a file of certificates that may have signed the broker's; empty:
	// those that the system trusts.
	TLSCA string `yaml:"tls_ca"`
	// TLSCert is the file of the certificate that this program shows the
	// broker; empty: none.
	TLSCert string `yaml:"tls_cert"`
	// TLSKey is the file of that certificate's key. Files of certificates are read
	// anew for each connection.
	TLSKey string `yaml:"tls_key"`
	// Heartbeat is the interval of keep-alive frames: a connection without any for
	// three of them is replaced.
	Heartbeat time.Duration `yaml:"heartbeat"`
	// Topology says what is done about exchanges and queues: "declare" makes those
	// that are missing, "check" makes none and says which are missing, for users
	// without the permission to configure.
	Topology string `yaml:"topology"`
	// Partitions is the number of queues that the samples of all nodes are spread
	// over: the same for agents, notifiers and central.
	Partitions int `yaml:"partitions"`
	// Stages is the number of queues to transformers with memory; the notifier sets
	// it from its own configuration.
	Stages int `yaml:"-"`
}

// DefaultConfig returns the configuration of a broker on this host.
func DefaultConfig() Config {
	return Config{
		URL: "amqp://localhost:5672/", URLs: []string{}, Auth: AuthPassword, Heartbeat: 10 * time.Second,
		Topology: TopologyDeclare, Partitions: 1,
	}
}

// At returns the configuration of another broker, whose nodes are at urls.
func (c Config) At(urls ...string) Config {
	c.URL, c.URLs = "", urls
	for _, url := range urls {
		if uri, err := amqp.ParseURI(url); err == nil && uri.Scheme != "amqps" {
			c.TLSCA, c.TLSCert, c.TLSKey, c.Auth = "", "", "", AuthPassword
		}
		if strings.Contains(url, "@") {
			c.PasswordFile, c.Auth = "", AuthPassword
		}
	}
	return c
}

// AMQP is the bus over RabbitMQ. It connects when it is first used, makes what
// is missing of the topology, and reconnects until it is closed. Publishing
// has connections of its own, so that a broker short of memory, which stops
// reading from publishers, still takes acks: one for each queue, so that one which
// takes nothing holds up nothing else. It is safe for concurrent use.
type AMQP struct {
	cfg   Config
	name  string
	nodes []*node
	addr  string // of all nodes, without users and passwords
	log   *zap.Logger
	retry backoff
	// declare makes or checks the topology, over a connection.
	declare func(*amqp.Connection) error
	// confirmWithin is how long a node may take nothing of what it is sent, before
	// another is tried, and answerWithin how long before that is said.
	confirmWithin, answerWithin time.Duration
	silences                    *prometheus.CounterVec

	trouble *complaint           // about the connections
	queues  map[[2]string]string // by exchange and routing key
	ctx     context.Context
	close   context.CancelFunc
	running sync.WaitGroup

	mu    sync.Mutex
	lanes map[string]*lane // by queue
}

// NewAMQP returns a bus that is not connected yet. name is shown in
// RabbitMQ's list of connections. The error is about the configuration; it
// never holds the password.
func NewAMQP(cfg Config, name string, log *zap.Logger) (*AMQP, error) {
	urls := cfg.URLs
	if len(urls) == 0 {
		urls = []string{cfg.URL}
	}
	a := &AMQP{
		cfg: cfg, name: name, log: log,
		retry:         backoff{min: 200 * time.Millisecond, max: 15 * time.Second},
		confirmWithin: confirmWithin, answerWithin: answerWithin, silences: newSilences(),
		queues: map[[2]string]string{}, lanes: map[string]*lane{},
	}
	for _, b := range bindings(cfg.Partitions, cfg.Stages) {
		a.queues[[2]string{b.exchange, b.key}] = b.queue
	}
	for _, url := range urls {
		n, err := newNode(url)
		if err != nil {
			return nil, err
		}
		if _, err := cfg.tls(n.uri); err != nil {
			return nil, err
		}
		if _, err := cfg.sasl(n.uri); err != nil {
			return nil, err
		}
		if a.nodes = append(a.nodes, n); len(a.nodes) > 1 {
			a.addr += ", "
		}
		a.addr += n.addr
	}
	switch {
	case cfg.Heartbeat < 0 || cfg.Heartbeat > 0 && cfg.Heartbeat < time.Second:
		return nil, fmt.Errorf("heartbeat %s: must be at least 1s, of which AMQP counts whole ones", cfg.Heartbeat)
	case cfg.Topology != "" && cfg.Topology != TopologyDeclare && cfg.Topology != TopologyCheck:
		return nil, fmt.Errorf("topology %q is not known: %s and %s are", cfg.Topology, TopologyDeclare, TopologyCheck)
	}
	a.declare = a.topology
	a.trouble = newComplaint(log)
	a.ctx, a.close = context.WithCancel(context.Background())
	return a, nil
}

// NewForeignAMQP returns a bus on which nothing of kvmeter's is declared:
// declare makes what is missing, each time it has connected. Messages say which
// exchange they go to.
func NewForeignAMQP(cfg Config, name string, log *zap.Logger, declare func(*amqp.Connection) error) (*AMQP, error) {
	a, err := NewAMQP(cfg, name, log)
	if err == nil {
		a.declare = declare
	}
	return a, err
}

// topology makes or checks kvmeter's own exchanges and queues.
func (a *AMQP) topology(conn *amqp.Connection) error {
	if a.cfg.Topology == TopologyCheck {
		return check(conn, a.cfg.Partitions, a.cfg.Stages)
	}
	return onChannel(conn, func(ch *amqp.Channel) error { return declare(ch, a.cfg.Partitions, a.cfg.Stages) })
}

// Close ends the publishing connections. Consumers end with their contexts.
func (a *AMQP) Close() {
	a.close()
	a.running.Wait()
}

// Ping tries once whether the broker can be used, and makes the topology. Its
// error is a sentence that says what to do.
func (a *AMQP) Ping(ctx context.Context) error {
	l, err := a.dial(ctx)
	if err != nil {
		return err
	}
	l.close()
	return nil
}

// Consumers returns how many consumers a queue has; of one with a single active
// consumer RabbitMQ counts that alone.
func (a *AMQP) Consumers(ctx context.Context, queue string) (int, error) {
	l, err := a.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer l.close()
	q, err := l.ch.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		return 0, a.explain(l.node, err)
	}
	return q.Consumers, nil
}

// connect dials until it succeeds or ctx ends, when it returns nil.
func (a *AMQP) connect(ctx context.Context, retry *backoff) *link {
	for ctx.Err() == nil {
		l, err := a.dial(ctx)
		if err == nil {
			a.trouble.over("RabbitMQ at " + l.node.addr + " answers again")
			return l
		}
		if ctx.Err() == nil {
			a.trouble.say("no connection to RabbitMQ; retrying", err)
		}
		retry.wait(ctx)
	}
	return nil
}
