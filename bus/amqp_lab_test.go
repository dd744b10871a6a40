//go:build lab

package bus_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/test/lab"
)

var queues = []string{"kvmeter.samples.0", "kvmeter.samples.1", "kvmeter.store.0", "kvmeter.store.1", "kvmeter.events", "kvmeter.dead"}

const queue = "kvmeter.samples.0"

func broker(t *testing.T) *lab.Rabbit {
	t.Helper()
	r, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// ctl runs rabbitmqctl.
func ctl(t *testing.T, r *lab.Rabbit, args ...string) {
	t.Helper()
	cmd := exec.Command("/usr/lib/rabbitmq/bin/rabbitmqctl", args...)
	cmd.Env = append(r.Env(), "PATH="+os.Getenv("PATH"), "LANG=C.UTF-8")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("rabbitmqctl %q: %v\n%s", args, err, out)
	}
}

// open returns a bus, and what it logs.
func open(t *testing.T, cfg bus.Config) (*bus.AMQP, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	cfg.Partitions = 2
	b, err := bus.NewAMQP(cfg, t.Name(), zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.Close()
		for _, e := range logs.All() {
			line := fmt.Sprint(e.Time.Format("05.000 "), e.Message, e.ContextMap())
			t.Log(line)
			if strings.Contains(line, "guest:guest") || strings.Contains(line, "hush") {
				t.Error("the password is in the log")
			}
		}
	})
	return b, logs
}

func at(url string) bus.Config { return bus.Config{URL: url} }

// admin is a plain channel to the broker, for looking at it.
func admin(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func empty(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	ch := admin(t, url)
	for _, q := range queues {
		if _, err := ch.QueuePurge(q, false); err != nil {
			t.Fatal(err)
		}
	}
	return ch
}

// deadLetters takes at least n messages from the dead-letter queue.
func deadLetters(t *testing.T, ch *amqp.Channel, n int) (ds []amqp.Delivery) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		d, ok, err := ch.Get("kvmeter.dead", true)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			ds = append(ds, d)
			continue
		}
		if len(ds) >= n {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return ds
}

// eventually waits until ok is true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestRabbitMQ runs on one broker; the tests that harm it come last.
func TestRabbitMQ(t *testing.T) {
	r := broker(t)
	if b, _ := open(t, at(r.URL())); b.Ping(t.Context()) != nil {
		t.Fatal(b.Ping(t.Context()))
	}

	conform(t, func(t *testing.T) (wire, func() []dead) {
		b, _ := open(t, at(r.URL()))
		ch := empty(t, r.URL())
		return b, func() (ds []dead) {
			for _, d := range deadLetters(t, ch, 1) {
				queue, _ := d.Headers["kvmeter-queue"].(string)
				reason, _ := d.Headers["kvmeter-reason"].(string)
				ds = append(ds, dead{d.MessageId, string(d.Body), queue, reason})
			}
			return ds
		}
	})

	t.Run("a rejected foreign message keeps its properties", func(t *testing.T) {
		b, _ := open(t, at(r.URL()))
		ch := empty(t, r.URL())
		err := ch.Publish("kvmeter", "samples.0", true, false, amqp.Publishing{
			ContentType: "application/json", Type: "t", AppId: "nova", Body: []byte("{}"),
			Headers: amqp.Table{"x": "y", "huge": strings.Repeat("z", 100_000), "table": amqp.Table{"a": int32(1)}},
		})
		if err != nil {
			t.Fatal(err)
		}
		consume(t, b, queue, 10, func(_ context.Context, ds []*bus.Delivery) error {
			ds[0].Reject(errors.New(strings.Repeat("long ", 1000)))
			return nil
		})
		got := deadLetters(t, ch, 1)
		if len(got) != 1 {
			t.Fatalf("%d dead letters, want 1", len(got))
		}
		d := got[0]
		if d.ContentType != "application/json" || d.Type != "t" || d.AppId != "nova" || string(d.Body) != "{}" || d.Headers["x"] != "y" ||
			d.Headers["kvmeter-routing-key"] != "samples.0" || d.RoutingKey != "samples.0" || d.DeliveryMode != amqp.Persistent {
			t.Errorf("dead letter %+v", d)
		}
		if n := len(d.Headers["kvmeter-reason"].(string)); n != 1024 {
			t.Errorf("reason of %d bytes, want the first 1024", n)
		}
	})

	t.Run("the broker dead-letters at least once by itself", func(t *testing.T) {
		ch := empty(t, r.URL())
		err := ch.Publish("kvmeter", "samples.0", true, false, amqp.Publishing{Expiration: "1", MessageId: "late"})
		if err != nil {
			t.Fatal(err)
		}
		if got := deadLetters(t, ch, 1); len(got) != 1 || got[0].MessageId != "late" || got[0].Headers["x-first-death-queue"] != queue {
			t.Errorf("dead letters %+v, want the expired one", got)
		}
	})

	t.Run("a full queue is back-pressure", func(t *testing.T) {
		b, logs := open(t, at(r.URL()))
		empty(t, r.URL())
		ctl(t, r, "set_policy", "full", "^kvmeter.samples", `{"max-length":3}`, "--apply-to", "queues")
		defer ctl(t, r, "clear_policy", "full")
		// The queue tells its publishers that it is full, which takes a moment.
		ms, ids := messages(200)
		var wait []func()
		for i := range 20 {
			wait = append(wait, publish(t, b, ms[10*i:10*i+10]...))
			time.Sleep(10 * time.Millisecond)
		}
		eventually(t, "a message is refused", func() bool {
			return logs.FilterMessage("RabbitMQ refuses messages; they are sent again").Len() > 0
		})
		got := map[string]bool{}
		var mu sync.Mutex
		consume(t, b, queue, 1, func(_ context.Context, ds []*bus.Delivery) error {
			mu.Lock()
			defer mu.Unlock()
			got[ds[0].ID] = true
			ds[0].Ack()
			return nil
		})
		for _, w := range wait {
			w()
		}
		eventually(t, "all have arrived", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) == len(ids) })
	})

	t.Run("a broker short of memory is back-pressure, and still takes acks", func(t *testing.T) {
		b, logs := open(t, at(r.URL()))
		empty(t, r.URL())
		ms, _ := messages(50)
		publish(t, b, ms...)()
		ctl(t, r, "set_vm_memory_high_watermark", "absolute", "1MB")
		wait := publish(t, b, message("later"))
		eventually(t, "the connection is blocked", func() bool {
			return logs.FilterMessage("RabbitMQ takes no messages for now; waiting").Len() > 0
		})
		var acked atomic.Int32
		stop := consume(t, b, queue, 10, func(_ context.Context, ds []*bus.Delivery) error {
			for _, d := range ds {
				acked.Add(1)
				d.Ack()
			}
			return nil
		})
		eventually(t, "what was there is consumed", func() bool { return acked.Load() >= 50 })
		ctl(t, r, "set_vm_memory_high_watermark", "0.4")
		wait()
		eventually(t, "the last has arrived", func() bool { return acked.Load() == 51 })
		stop()
		if n, err := admin(t, r.URL()).QueueDeclarePassive(queue, true, false, false, false, nil); err != nil || n.Messages != 0 {
			t.Errorf("%d messages are left (%v), want all acked", n.Messages, err)
		}
	})

	t.Run("a queue that is deleted under us is made again", func(t *testing.T) {
		b, _ := open(t, at(r.URL()))
		ch := empty(t, r.URL())
		rec := newRecorder(nil)
		consume(t, b, queue, 10, rec.handle)
		publish(t, b, message("a"))()
		rec.await(t, "a")
		if _, err := ch.QueueDelete(queue, false, false, false); err != nil {
			t.Fatal(err)
		}
		// The consumer's new connection makes it again; until then it is missing.
		eventually(t, "the queue is there", func() bool { return b.Publish(t.Context(), message("b")) == nil })
		rec.await(t, "a", "b")
	})

	t.Run("an exchange that is deleted under us is made again", func(t *testing.T) {
		b, _ := open(t, at(r.URL()))
		ch := empty(t, r.URL())
		publish(t, b, message("a"))()
		if err := ch.ExchangeDelete("kvmeter", false, false); err != nil {
			t.Fatal(err)
		}
		publish(t, b, message("b"))()
	})

	t.Run("a handler that holds a message for too long gets it again", func(t *testing.T) {
		b, _ := open(t, at(r.URL()))
		empty(t, r.URL())
		ctl(t, r, "eval", "application:set_env(rabbit, consumer_timeout, 1000), application:set_env(rabbit, channel_tick_interval, 500).")
		defer ctl(t, r, "eval", "application:set_env(rabbit, consumer_timeout, 1800000), application:set_env(rabbit, channel_tick_interval, 60000).")
		rec := newRecorder(nil)
		var calls atomic.Int32
		consume(t, b, queue, 10, func(ctx context.Context, ds []*bus.Delivery) error {
			if calls.Add(1) == 1 {
				<-ctx.Done() // the context ends with the channel
				return ctx.Err()
			}
			return rec.handle(ctx, ds)
		})
		publish(t, b, message("a"))()
		rec.await(t, "a+")
	})

	t.Run("a connection that went dead is noticed and replaced", func(t *testing.T) {
		p := newProxy(t, r.URL(), nil)
		b, _ := open(t, at(p.url("guest:guest")+"?heartbeat=1"))
		empty(t, r.URL())
		rec := newRecorder(nil)
		consume(t, b, queue, 10, rec.handle)
		publish(t, b, message("a"))()
		rec.await(t, "a")
		p.freeze() // packets vanish, nothing is closed
		wait := publish(t, b, message("b"))
		time.Sleep(100 * time.Millisecond)
		p.thaw() // for new connections
		wait()
		// The ack of "a" may have vanished too.
		eventually(t, "the second has arrived", func() bool {
			rec.mu.Lock()
			defer rec.mu.Unlock()
			return slices.Contains(rec.got, "b") || slices.Contains(rec.got, "b+")
		})
	})

	t.Run("TLS", func(t *testing.T) {
		ca, cert, key := certificate(t)
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		p := newProxy(t, r.URL(), &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool(t, ca), ClientAuth: tls.RequireAndVerifyClientCert})
		url := strings.Replace(p.url("guest:guest"), "amqp:", "amqps:", 1)
		b, _ := open(t, bus.Config{URL: url, TLSCA: ca, TLSCert: cert, TLSKey: key})
		if err := b.Ping(t.Context()); err != nil {
			t.Errorf("with the right certificates: %v", err)
		}
		b, _ = open(t, bus.Config{URL: url, TLSCert: cert, TLSKey: key})
		if err := b.Ping(t.Context()); err == nil || !strings.Contains(err.Error(), "set tls_ca") {
			t.Errorf("without the signer's certificate: %v", err)
		}
		b, _ = open(t, bus.Config{URL: url, TLSCA: ca})
		if err := b.Ping(t.Context()); err == nil {
			t.Error("without a certificate of ours: no error")
		}
	})

	t.Run("what is wrong is said in one sentence", func(t *testing.T) {
		ctl(t, r, "add_vhost", "other")
		ctl(t, r, "add_vhost", "taken")
		ctl(t, r, "set_permissions", "-p", "taken", "guest", ".*", ".*", ".*")
		if _, err := admin(t, r.URL()+"taken").QueueDeclare(queue, true, false, false, false, nil); err != nil {
			t.Fatal(err)
		}
		for name, tc := range map[string]struct{ url, want string }{
			"a wrong password":              {strings.Replace(r.URL(), "guest:guest", "guest:hush", 1), "refuses the user or password"},
			"no such virtual host":          {r.URL() + "nope", `has no virtual host "nope", or this user has no access to it`},
			"a virtual host without access": {r.URL() + "other", `has no virtual host "other", or this user has no access to it`},
			"a queue of other arguments":    {r.URL() + "taken", "delete it, or give kvmeter a virtual host of its own"},
		} {
			t.Run(name, func(t *testing.T) {
				b, _ := open(t, at(tc.url))
				err := b.Ping(t.Context())
				if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "hush") {
					t.Errorf("error %v, want %q", err, tc.want)
				}
			})
		}
	})

	t.Run("a broker killed with -9 loses no confirmed message", func(t *testing.T) { kill9(t, r) })

	t.Run("a publisher waits for a broker that is away", func(t *testing.T) {
		empty(t, r.URL())
		if err := r.Kill9(t.Context()); err != nil {
			t.Fatal(err)
		}
		b, logs := open(t, at(r.URL()))
		eventually(t, "the port is closed", func() bool {
			return strings.Contains(fmt.Sprint(b.Ping(t.Context())), "connection refused")
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := b.Publish(ctx, message("a")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Publish returned %v, want %v", err, context.DeadlineExceeded)
		}
		rec := newRecorder(nil)
		consume(t, b, queue, 10, rec.handle)
		wait := publish(t, b, message("b"))
		time.Sleep(2 * time.Second)
		said := logs.FilterMessage("no connection to RabbitMQ; retrying").All()
		if len(said) != 1 || !strings.Contains(fmt.Sprint(said[0].ContextMap()), "does not answer (connection refused)") {
			t.Errorf("said %+v, want one sentence", said)
		}
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		wait()
		rec.await(t, "b")
	})
}

// kill9 kills the broker while messages go in and out of it.
func kill9(t *testing.T, r *lab.Rabbit) {
	b, _ := open(t, at(r.URL()))
	empty(t, r.URL())
	var mu sync.Mutex
	confirmed, got := map[string]bool{}, map[string]int{}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				ms := make([]bus.Message, 25)
				for j := range ms {
					ms[j] = message(fmt.Sprintf("%d-%d-%d", worker, i, j))
				}
				// Without the deadline of ctx, so that what is confirmed is known.
				if err := b.Publish(context.WithoutCancel(ctx), ms...); err != nil {
					t.Errorf("Publish: %v", err)
					return
				}
				mu.Lock()
				for _, m := range ms {
					confirmed[m.ID] = true
				}
				mu.Unlock()
			}
		})
	}
	calls := 0
	stop := consume(t, b, queue, 50, func(_ context.Context, ds []*bus.Delivery) error {
		mu.Lock()
		defer mu.Unlock()
		calls++
		if calls%10 == 0 {
			return errors.New("now and then the handler fails")
		}
		for _, d := range ds {
			got[d.ID]++
			d.Ack()
		}
		return nil
	})
	counts := func() (int, int) { mu.Lock(); defer mu.Unlock(); return len(confirmed), len(got) }
	for range 2 {
		before, _ := counts()
		eventually(t, "messages flow", func() bool { n, _ := counts(); return n > before+2000 })
		if err := r.Kill9(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	before, _ := counts()
	eventually(t, "messages flow again", func() bool { n, _ := counts(); return n > before+1000 })
	cancel()
	wg.Wait()
	missing := func() (ids []string) {
		mu.Lock()
		defer mu.Unlock()
		for id := range confirmed {
			if got[id] == 0 {
				ids = append(ids, id)
			}
		}
		return ids
	}
	deadline := time.Now().Add(60 * time.Second)
	for len(missing()) > 0 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	n, m := counts()
	again := 0
	for _, c := range got {
		again += c - 1
	}
	t.Logf("%d confirmed, %d arrived, %d came more than once", n, m, again)
	if ids := missing(); len(ids) > 0 {
		slices.Sort(ids)
		t.Errorf("%d of %d confirmed messages are lost: %q …", len(ids), n, ids[:min(len(ids), 10)])
	}
}

// proxy passes connections on to the broker, as a network would.
type proxy struct {
	addr   string
	target string
	lis    net.Listener
	mu     sync.Mutex
	conns  []net.Conn
	frozen *atomic.Bool // of the connections made since the last thaw
}

func newProxy(t *testing.T, brokerURL string, conf *tls.Config) *proxy {
	t.Helper()
	uri, err := amqp.ParseURI(brokerURL)
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: lis.Addr().String(), target: fmt.Sprintf("%s:%d", uri.Host, uri.Port), frozen: new(atomic.Bool)}
	p.lis = lis
	if conf != nil {
		p.lis = tls.NewListener(lis, conf)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := p.lis.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", p.target)
			if err != nil {
				_ = c.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, c, up)
			frozen := p.frozen
			p.mu.Unlock()
			wg.Go(func() { pass(c, up, frozen) })
			wg.Go(func() { pass(up, c, frozen) })
		}
	})
	t.Cleanup(func() {
		_ = p.lis.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			_ = c.Close()
		}
		p.mu.Unlock()
		wg.Wait()
	})
	return p
}

func pass(from, to net.Conn, frozen *atomic.Bool) {
	buf := make([]byte, 1<<16)
	for {
		n, err := from.Read(buf)
		if err != nil {
			if !frozen.Load() {
				_ = to.Close()
			}
			return
		}
		if frozen.Load() {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil && !errors.Is(err, io.EOF) {
			_ = from.Close()
			return
		}
	}
}

func (p *proxy) url(user string) string { return "amqp://" + user + "@" + p.addr + "/" }

func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen.Store(true)
}

func (p *proxy) thaw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = new(atomic.Bool)
}

// certificate makes one that signs itself, for 127.0.0.1 and for clients.
func certificate(t *testing.T) (ca, cert, key string) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &priv.PublicKey, priv)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	cert = write("cert.pem", "CERTIFICATE", der)
	return cert, cert, write("key.pem", "EC PRIVATE KEY", keyDER)
}

func pool(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p := x509.NewCertPool()
	p.AppendCertsFromPEM(data)
	return p
}
