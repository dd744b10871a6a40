package bus

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/kvmeter/kvmeter/sample"
)

const (
	// dialTimeout bounds connecting and the handshakes.
	dialTimeout = 10 * time.Second
	// setupTimeout bounds all of it, the topology included: a node that has lost
	// its cluster takes connections and then does not answer.
	setupTimeout = 30 * time.Second
	// shunFor is how long a node that has failed is tried after the others.
	shunFor = time.Minute
)

// node is one node of RabbitMQ.
type node struct {
	url    string
	uri    amqp.URI
	addr   string       // without user and password
	failed atomic.Int64 // when, in nanoseconds since the epoch
}

func newNode(url string) (*node, error) {
	uri, err := amqp.ParseURI(url)
	if err != nil {
		// The error itself may quote the password.
		return nil, errors.New("url of RabbitMQ: not of the form amqp://user:password@host:5672/vhost; special characters in the password are written as %XX")
	}
	return &node{url: url, uri: uri, addr: uri.Scheme + "://" + net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port))}, nil
}

// fail remembers that the node is no good for the moment.
func (n *node) fail() { n.failed.Store(time.Now().UnixNano()) }

// inTurn returns the nodes in the order in which to try them: at random, so that
// many clients spread over a cluster, and last those that have just failed, the
// one that failed first before the others.
func inTurn(nodes []*node) []*node {
	type turn struct {
		*node
		failed int64
	}
	now := time.Now()
	turns := make([]turn, len(nodes))
	for i, j := range rand.Perm(len(nodes)) {
		turns[i] = turn{nodes[j], nodes[j].failed.Load()}
		if now.Sub(time.Unix(0, turns[i].failed)) > shunFor {
			turns[i].failed = 0
		}
	}
	slices.SortStableFunc(turns, func(a, b turn) int { return cmp.Compare(a.failed, b.failed) })
	order := make([]*node, len(turns))
	for i, t := range turns {
		order[i] = t.node
	}
	return order
}

// tls returns nil where the URL asks for none. It reads the files, so that
// certificates which were renewed are used by the next connection.
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
		pair, err := tls.LoadX509KeyPair(sample.SecretPath(c.TLSCert), sample.SecretPath(c.TLSKey))
		if err != nil {
			return nil, fmt.Errorf("tls_cert and tls_key: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// sasl returns how to log in at a node.
func (c *Config) sasl(uri amqp.URI) (amqp.Authentication, error) {
	switch {
	case c.Auth == AuthExternal && (uri.Scheme != "amqps" || c.TLSCert == ""):
		return nil, errors.New("auth: external logs in by a client certificate: it needs amqps:// in the url, tls_cert and tls_key")
	case c.Auth == AuthExternal:
		return &amqp.ExternalAuth{}, nil
	case c.Auth != AuthPassword && c.Auth != "":
		return nil, fmt.Errorf("auth %q is not known: %s and %s are", c.Auth, AuthPassword, AuthExternal)
	case c.PasswordFile == "":
		return uri.PlainAuth(), nil
	}
	password, err := sample.ReadSecret(c.PasswordFile, 1)
	if err != nil {
		return nil, fmt.Errorf("password_file: %w", err)
	}
	return &amqp.PlainAuth{Username: uri.Username, Password: string(password)}, nil
}

// link is a connection with one channel.
type link struct {
	node *node
	conn *amqp.Connection
	ch   *amqp.Channel
	wire *wire // that conn is over
}

func (l *link) close() {
	// An error means that the connection is gone already.
	_ = l.conn.CloseDeadline(time.Now().Add(time.Second))
}

// dial connects to the first node that can be used, and makes or checks the
// topology.
func (a *AMQP) dial(ctx context.Context) (*link, error) {
	var errs []error
	for _, n := range inTurn(a.nodes) {
		l, err := a.dialNode(ctx, n)
		if err == nil {
			return l, nil
		}
		n.fail()
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) > 1 {
		// In the order of the configuration, so that the same trouble reads the same.
		slices.SortFunc(errs, func(a, b error) int { return cmp.Compare(a.Error(), b.Error()) })
	}
	return nil, errors.Join(errs...)
}

func (a *AMQP) dialNode(ctx context.Context, n *node) (*link, error) {
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	auth, err := a.cfg.sasl(n.uri)
	if err != nil {
		return nil, err
	}
	tlsConfig, err := a.cfg.tls(n.uri)
	if err != nil {
		return nil, err
	}
	var w *wire
	var unhook func() bool
	cfg := amqp.Config{
		Heartbeat: a.cfg.Heartbeat, SASL: []amqp.Authentication{auth},
		Properties: amqp.Table{"product": "kvmeter", "connection_name": a.name},
		Dial: func(network, _ string) (net.Conn, error) {
			c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, net.JoinHostPort(n.uri.Host, strconv.Itoa(n.uri.Port)))
			if err != nil {
				return nil, err
			}
			unhook = context.AfterFunc(ctx, func() { _ = c.Close() })
			// The library clears the deadline when the handshake is over.
			err = c.SetDeadline(time.Now().Add(dialTimeout))
			if tlsConfig != nil && err == nil {
				secure := tls.Client(c, tlsConfig)
				c, err = secure, secure.HandshakeContext(ctx)
			}
			if err != nil {
				_ = c.Close()
				return nil, err
			}
			w = newWire(c)
			return w, nil
		},
	}
	// TLS is beneath what looks for deliveries; the library would put it above.
	conn, err := amqp.DialConfig("amqp"+n.url[len(n.uri.Scheme):], cfg)
	if unhook != nil {
		defer unhook()
	}
	if err != nil {
		if w != nil {
			_ = w.Close()
		}
		return nil, a.explain(n, err)
	}
	l := &link{node: n, conn: conn, wire: w}
	if err = a.declare(conn); err == nil {
		l.ch, err = conn.Channel()
	}
	if err != nil {
		l.close()
		if ctx.Err() != nil && outer.Err() == nil {
			return nil, fmt.Errorf("RabbitMQ at %s takes connections but does not answer within %s (%w): has it lost the other nodes of its cluster?", n.addr, setupTimeout, err)
		}
		return nil, a.explain(n, err)
	}
	return l, nil
}

// explain turns an error of connecting into a sentence that says what to do.
func (a *AMQP) explain(n *node, err error) error {
	var refusal *amqp.Error
	var dns *net.DNSError
	var timeout interface{ Timeout() bool }
	var unknownCA x509.UnknownAuthorityError
	var hostname x509.HostnameError
	var noTLS tls.RecordHeaderError
	at := "RabbitMQ at " + n.addr
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, ErrSilent):
		return err
	case errors.Is(err, ErrTopology):
		return fmt.Errorf("%s: %w", at, err)
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
	// The library keeps only the text of what comes after the handshake, such as
	// what TLS 1.3 says about certificates of clients.
	case strings.Contains(err.Error(), "remote error: tls: ") && a.cfg.TLSCert == "":
		return fmt.Errorf("%s asks for a client certificate: set tls_cert and tls_key (%w)", at, err)
	case strings.Contains(err.Error(), "remote error: tls: "):
		return fmt.Errorf("%s refuses the certificate in tls_cert: is it in date, and does the broker's ssl_options.cacertfile hold its signer? (%w)", at, err)
	case errors.As(err, &refusal) && refusal.Code == amqp.PreconditionFailed:
		return fmt.Errorf("%s has a queue or exchange of this name with other arguments (%w); delete it, or give kvmeter a virtual host of its own", at, err)
	case errors.Is(err, amqp.ErrSASL) && a.cfg.Auth == AuthExternal:
		return fmt.Errorf("%s does not let clients log in by certificate: enable its plugin rabbitmq_auth_mechanism_ssl, and EXTERNAL in its auth_mechanisms", at)
	case errors.Is(err, amqp.ErrCredentials) && a.cfg.Auth == AuthExternal:
		return fmt.Errorf("%s has no user of the name in the certificate tls_cert: its ssl_cert_login_from says which of the certificate's names counts", at)
	case errors.Is(err, amqp.ErrCredentials), errors.Is(err, amqp.ErrSASL):
		return fmt.Errorf("%s refuses the user or password in url (the user guest may only log in from the broker's own host)", at)
	case errors.Is(err, amqp.ErrVhost), errors.As(err, &refusal) && refusal.Code == amqp.NotAllowed:
		return fmt.Errorf("%s has no virtual host %q, or this user has no access to it", at, n.uri.Vhost)
	case errors.As(err, &refusal) && refusal.Code == amqp.AccessRefused:
		return fmt.Errorf("%s does not let this user make the queues (%w); give it configure, write and read permission for kvmeter.*, or set topology: %s where another user makes them", at, err, TopologyCheck)
	case errors.As(err, &refusal) && refusal.Code == amqp.FrameError, errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		if n.uri.Scheme == "amqps" {
			return fmt.Errorf("%s closes the connection at once: it may be starting or ending, or ask for a client certificate, or not take the one in tls_cert (%w)", at, err)
		}
		return fmt.Errorf("%s closes the connection at once: it may be starting or ending, or speak TLS where url does not (%w)", at, err)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%s does not answer (timed out)", at)
	}
	return fmt.Errorf("%s: %w", at, err)
}
