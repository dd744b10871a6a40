package bus

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"
)

// dialTimeout bounds connecting and the handshakes; heartbeat is the interval
// of keep-alive frames: a connection is given up after three without any.
const (
	dialTimeout = 10 * time.Second
	heartbeat   = 10 * time.Second
)

// Config says how to reach RabbitMQ.
type Config struct {
	// URL of the broker: amqp://user:password@host:5672/vhost, or amqps:// with
	// TLS. Special characters in the password are written as %XX.
	URL string `yaml:"url"`
	// TLSCA is a file of certificates that may have signed the broker's; empty:
	// those that the system trusts.
	TLSCA string `yaml:"tls_ca"`
	// TLSCert is the file of the certificate that this program shows the
	// broker; empty: none.
	TLSCert string `yaml:"tls_cert"`
	// TLSKey is the file of that certificate's key.
	TLSKey string `yaml:"tls_key"`
	// Partitions is the number of queues that the samples of all nodes are spread
	// over: the same for agents, notifiers and central.
	Partitions int `yaml:"partitions"`
}

// DefaultConfig returns the configuration of a broker on this host.
func DefaultConfig() Config { return Config{URL: "amqp://localhost:5672/", Partitions: 1} }

// AMQP is the bus over RabbitMQ. It connects when it is first used, makes what
// is missing of the topology, and reconnects until it is closed. Publishing
// has a connection of its own, so that a broker short of memory, which stops
// reading from publishers, still takes acks. It is safe for concurrent use.
type AMQP struct {
	cfg   Config
	name  string
	addr  string // without user and password
	vhost string
	tls   *tls.Config
	log   *zap.Logger
	retry backoff

	trouble *complaint     // about the connections
	full    *complaint     // about a broker that takes nothing
	out     chan *outgoing // taken by the publishing connection, while there is one
	start   sync.Once      // of the publishing connection
	ctx     context.Context
	close   context.CancelFunc
	running sync.WaitGroup
}

// NewAMQP returns a bus that is not connected yet. name is shown in
// RabbitMQ's list of connections. The error is about the configuration; it
// never holds the password.
func NewAMQP(cfg Config, name string, log *zap.Logger) (*AMQP, error) {
	uri, err := amqp.ParseURI(cfg.URL)
	if err != nil {
		// The error itself may quote the password.
		return nil, errors.New("url of RabbitMQ: not of the form amqp://user:password@host:5672/vhost; special characters in the password are written as %XX")
	}
	a := &AMQP{
		cfg: cfg, name: name, vhost: uri.Vhost, log: log,
		addr:  uri.Scheme + "://" + net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)),
		retry: backoff{min: 200 * time.Millisecond, max: 15 * time.Second},
		out:   make(chan *outgoing),
	}
	if a.tls, err = cfg.tls(uri); err != nil {
		return nil, err
	}
	a.trouble, a.full = newComplaint(log), newComplaint(log)
	a.ctx, a.close = context.WithCancel(context.Background())
	return a, nil
}

// tls returns nil where the URL asks for none.
func (c *Config) tls(uri amqp.URI) (*tls.Config, error) {
	if uri.Scheme != "amqps" {
		if c.TLSCA != "" || c.TLSCert != "" || c.TLSKey != "" {
			return nil, errors.New("tls_ca, tls_cert or tls_key is set, but the url of RabbitMQ begins with amqp://; use amqps://")
		}
		return nil, nil
	}
	t := &tls.Config{ServerName: uri.Host, MinVersion: tls.VersionTLS12}
	if c.TLSCA != "" {
		pem, err := os.ReadFile(c.TLSCA)
		if err != nil {
			return nil, fmt.Errorf("tls_ca: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls_ca: %s holds no certificate in PEM form", c.TLSCA)
		}
	}
	if c.TLSCert != "" || c.TLSKey != "" {
		pair, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
		if err != nil {
			return nil, fmt.Errorf("tls_cert and tls_key: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// Close ends the publishing connection. Consumers end with their contexts.
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

// link is a connection with one channel.
type link struct {
	conn *amqp.Connection
	ch   *amqp.Channel
}

func (l *link) close() {
	// An error means that the connection is gone already.
	_ = l.conn.CloseDeadline(time.Now().Add(time.Second))
}

// connect dials until it succeeds or ctx ends, when it returns nil.
func (a *AMQP) connect(ctx context.Context, retry *backoff) *link {
	for ctx.Err() == nil {
		l, err := a.dial(ctx)
		if err == nil {
			a.trouble.over("RabbitMQ at " + a.addr + " answers again")
			return l
		}
		if ctx.Err() == nil {
			a.trouble.say("no connection to RabbitMQ; retrying", err)
		}
		retry.wait(ctx)
	}
	return nil
}

// dial connects and makes the topology.
func (a *AMQP) dial(ctx context.Context) (*link, error) {
	var raw net.Conn
	var unhook func() bool
	cfg := amqp.Config{
		Heartbeat: heartbeat, TLSClientConfig: a.tls,
		Properties: amqp.Table{"product": "kvmeter", "connection_name": a.name},
		Dial: func(network, addr string) (net.Conn, error) {
			c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			// The library clears the deadline when the handshake is over.
			if err := c.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
				_ = c.Close()
				return nil, err
			}
			raw = c
			unhook = context.AfterFunc(ctx, func() { _ = c.Close() })
			return c, nil
		},
	}
	if a.tls != nil {
		cfg.TLSClientConfig = a.tls.Clone()
	}
	conn, err := amqp.DialConfig(a.cfg.URL, cfg)
	if unhook != nil {
		defer unhook()
	}
	if err != nil {
		if raw != nil {
			_ = raw.Close()
		}
		return nil, a.explain(err)
	}
	l := &link{conn: conn}
	if l.ch, err = conn.Channel(); err == nil {
		err = declare(l.ch, a.cfg.Partitions)
	}
	if err != nil {
		l.close()
		return nil, a.explain(err)
	}
	return l, nil
}

// explain turns an error of connecting into a sentence that says what to do.
func (a *AMQP) explain(err error) error {
	var refusal *amqp.Error
	var dns *net.DNSError
	var timeout interface{ Timeout() bool }
	var unknownCA x509.UnknownAuthorityError
	var hostname x509.HostnameError
	var noTLS tls.RecordHeaderError
	at := "RabbitMQ at " + a.addr
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s does not answer (connection refused): is it running, and is this its port?", at)
	case errors.As(err, &dns):
		return fmt.Errorf("%s: the host's name can't be resolved: %w", at, dns)
	case errors.As(err, &noTLS):
		return fmt.Errorf("%s does not speak TLS on this port: use amqp:// in url, or its TLS port (usually 5671)", at)
	case errors.As(err, &unknownCA):
		return fmt.Errorf("%s shows a certificate that is not trusted (%w); set tls_ca to the certificate of its signer", at, unknownCA)
	case errors.As(err, &hostname):
		return fmt.Errorf("%s shows the certificate of another host: %w", at, hostname)
	case errors.As(err, &refusal) && refusal.Code == amqp.PreconditionFailed:
		return fmt.Errorf("%s has a queue or exchange of this name with other arguments (%w); delete it, or give kvmeter a virtual host of its own", at, err)
	case errors.Is(err, amqp.ErrCredentials), errors.Is(err, amqp.ErrSASL):
		return fmt.Errorf("%s refuses the user or password in url (the user guest may only log in from the broker's own host)", at)
	case errors.Is(err, amqp.ErrVhost), errors.As(err, &refusal) && refusal.Code == amqp.NotAllowed:
		return fmt.Errorf("%s has no virtual host %q, or this user has no access to it", at, a.vhost)
	case errors.As(err, &refusal) && refusal.Code == amqp.AccessRefused:
		return fmt.Errorf("%s does not let this user make the queues (%w); give it configure, write and read permission for kvmeter.*", at, err)
	case errors.As(err, &refusal) && refusal.Code == amqp.FrameError, errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("%s closes the connection at once: it may be starting or ending, or speak TLS where url does not (%w)", at, err)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%s does not answer (timed out)", at)
	}
	return fmt.Errorf("%s: %w", at, err)
}
