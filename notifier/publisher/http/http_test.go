package http

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

func open(t *testing.T, text string) publisher.Publisher {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// parts are one part a name, with a sample of that name.
func parts(names ...string) (all []publisher.Part) {
	for _, name := range names {
		b := sample.NewBuilder()
		b.Row(sample.Row{Resource: "r"})
		b.Add(sample.MeterRef{Name: name}, sample.Walk, sample.Uint(1))
		all = append(all, publisher.Part{Batch: b.Build()})
	}
	return all
}

// recorder answers with a status and remembers.
type recorder struct {
	mu       sync.Mutex
	status   int
	requests []string // "path authorization body"
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	body, _ := io.ReadAll(req.Body)
	user, password, _ := req.BasicAuth()
	r.requests = append(r.requests, strings.Join([]string{req.RequestURI, user, password, string(body)}, " "))
	if r.status != 0 {
		http.Error(w, "because", r.status)
	}
}

func TestOneByOneWithBasicAuth(t *testing.T) {
	r := &recorder{}
	s := httptest.NewServer(r)
	defer s.Close()
	p := open(t, "http://me:s%20ecret@"+s.Listener.Addr().String()+"/x?batch=False&b=1&a=2&max_retries=1")
	events := []sample.Event{{ID: "m", Type: "e"}, {ID: "n", Type: "f"}}
	if err := p.(publisher.EventPublisher).PublishEvents(t.Context(), events); err != nil {
		t.Fatal(err)
	}
	want := []string{
		`/x?b=1&a=2 me s ecret {"message_id": "m", "event_type": "e", "generated": "1970-01-01T00:00:00", "traits": [], "raw": {}}`,
		`/x?b=1&a=2 me s ecret {"message_id": "n", "event_type": "f", "generated": "1970-01-01T00:00:00", "traits": [], "raw": {}}`,
	}
	if diff := cmp.Diff(want, r.requests); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestRawOnlyLeavesOutWhatIsEmpty(t *testing.T) {
	r := &recorder{}
	s := httptest.NewServer(r)
	defer s.Close()
	p := open(t, s.URL+"/x?raw_only=true")
	var events []sample.Event
	for _, raw := range []string{`{"payload": {"a": 1}}`, `{"payload": {}}`, `{"payload": null}`, `{}`, ""} {
		events = append(events, sample.Event{ID: "m", Type: "e", Raw: []byte(raw)})
	}
	for _, some := range [][]sample.Event{events, events[1:]} {
		if err := p.(publisher.EventPublisher).PublishEvents(t.Context(), some); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{`/x   [{"a": 1}]`}, r.requests); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestAnAnswerDecidesWhetherTheSameIsSentAgain(t *testing.T) {
	for status, final := range map[int]bool{400: true, 413: true, 422: true, 401: false, 404: false, 429: false, 500: false, 503: false} {
		r := &recorder{status: status}
		s := httptest.NewServer(r)
		err := open(t, s.URL).Publish(t.Context(), parts("a", "b"))
		s.Close()
		var refusal *publisher.Refusal
		var answer *publisher.StatusError
		if errors.As(err, &refusal) != final || !errors.As(err, &answer) || answer.Status != status || !strings.Contains(err.Error(), "because") {
			t.Errorf("%d: got %v", status, err)
		}
		if len(r.requests) != 1 {
			t.Errorf("%d: %d requests, want 1: answers are not retried here", status, len(r.requests))
		}
		if final && refusal.Part != 0 {
			t.Errorf("%d: part %d is refused", status, refusal.Part)
		}
	}
}

func TestConnectionsAreRetried(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan int, 1)
	go func() {
		n := 0
		for {
			conn, err := l.Accept()
			if err != nil {
				conns <- n
				return
			}
			n++
			_ = conn.Close()
		}
	}()
	if err := open(t, "http://"+l.Addr().String()+"/?max_retries=3").Publish(t.Context(), parts("a")); err == nil {
		t.Error("no error from a server that hangs up")
	}
	_ = l.Close()
	if n := <-conns; n != 4 {
		t.Errorf("%d connections, want 4", n)
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "notifier"}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, blocks ...*pem.Block) string {
		path := filepath.Join(dir, name)
		var text []byte
		for _, b := range blocks {
			text = append(text, pem.EncodeToMemory(b)...)
		}
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certBlock, keyBlock := &pem.Block{Type: "CERTIFICATE", Bytes: der}, &pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}
	both, certFile, keyFile := file("both.pem", certBlock, keyBlock), file("cert.pem", certBlock), file("key.pem", keyBlock)

	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.Config.ErrorLog = zap.NewStdLog(zap.NewNop())
	pool := x509.NewCertPool()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(cert)
	s.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	s.StartTLS()
	defer s.Close()
	ca := file("ca.pem", &pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	for name, tc := range map[string]struct {
		options string
		ok      bool
	}{
		"a certificate and its key":               {"?verify_ssl=" + ca + "&clientcert=" + certFile + "&clientkey=" + keyFile, true},
		"both in one file":                        {"?verify_ssl=" + ca + "&clientcert=" + both, true},
		"the server is not verified":              {"?verify_ssl=False&clientcert=" + both, true},
		"no certificate":                          {"?verify_ssl=" + ca, false},
		"the server is not one of those we trust": {"?clientcert=" + both, false},
	} {
		t.Run(name, func(t *testing.T) {
			err := open(t, s.URL+tc.options).Publish(t.Context(), parts("a"))
			if (err == nil) != tc.ok {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"http:///x":                       "it needs a host",
		"http://h/?timeout=soon":          `option timeout: "soon" is no number of seconds`,
		"http://h/?batch=maybe":           `option batch: "maybe" is neither true nor false`,
		"http://h/?max_retries=-1":        `option max_retries: "-1" is not a whole number of at least 0`,
		"https://h/?verify_ssl=/none":     "option verify_ssl is neither true nor false, so it names a file",
		"https://h/?verify_ssl=/dev/null": "holds no certificate in PEM form",
		"https://h/?clientcert=/none":     "options clientcert and clientkey",
	} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(u, publisher.Deps{Log: zap.NewNop()}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
}
