package daemon

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sys/unix"
)

// certificate writes a certificate for 127.0.0.1 that signs itself.
func certificate(t *testing.T, dir string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pool.AppendCertsFromPEM(certPEM)
	write(t, filepath.Join(dir, "cert.pem"), string(certPEM))
	write(t, filepath.Join(dir, "key.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})))
	return pool
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// serve serves a page of metrics until the test ends.
func serve(t *testing.T, file string) *Page {
	t.Helper()
	p, err := Metrics("127.0.0.1:0", file, Registry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return p
}

func TestMetricsWithTLSAndUsers(t *testing.T) {
	dir := t.TempDir()
	pool := certificate(t, dir)
	hash, err := bcrypt.GenerateFromPassword([]byte("canary"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "web.yaml")
	write(t, file, "tls_server_config: {cert_file: cert.pem, key_file: key.pem}\nbasic_auth_users: {prometheus: "+string(hash)+"}\n")
	p := serve(t, file)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}, Timeout: 30 * time.Second}
	for name, tc := range map[string]struct {
		scheme, user, password string
		want                   int // 0: no answer
	}{
		"the right password":   {"https", "prometheus", "canary", http.StatusOK},
		"a wrong password":     {"https", "prometheus", "other", http.StatusUnauthorized},
		"nobody":               {"https", "", "", http.StatusUnauthorized},
		"another user":         {"https", "root", "canary", http.StatusUnauthorized},
		"without TLS, nothing": {"http", "prometheus", "canary", http.StatusBadRequest},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := http.NewRequest(http.MethodGet, tc.scheme+"://"+p.listener.Addr().String()+"/metrics", nil)
			if err != nil {
				t.Fatal(err)
			}
			if tc.user != "" {
				r.SetBasicAuth(tc.user, tc.password)
			}
			a, err := client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			_ = a.Body.Close()
			if a.StatusCode != tc.want {
				t.Errorf("status %d, want %d", a.StatusCode, tc.want)
			}
		})
	}
}

func TestMetricsWithout(t *testing.T) {
	a, err := http.Get(serve(t, "").URL() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	_ = a.Body.Close()
	if a.StatusCode != http.StatusOK {
		t.Errorf("status %d", a.StatusCode)
	}
}

func TestCheckMetrics(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	write(t, bad, "basic_auth_users: {prometheus: canary}\n") // not a hash
	half := filepath.Join(dir, "half.yaml")
	write(t, half, "tls_server_config: {cert_file: none.pem, key_file: none.pem}\n")
	for name, tc := range map[string]struct{ addr, file, want string }{
		"off":                      {"", filepath.Join(dir, "none"), ""},
		"no file":                  {"127.0.0.1:9187", "", ""},
		"a file that is not there": {"127.0.0.1:9187", filepath.Join(dir, "none"), "no such file"},
		"a password in plain text": {"127.0.0.1:9187", bad, "metrics_web_config: " + bad},
		"no certificate":           {"127.0.0.1:9187", half, "none.pem"},
		"no address":               {"9187", "", "is not host:port"},
	} {
		err := CheckMetrics(tc.addr, tc.file)
		if tc.want == "" != (err == nil) || err != nil && (!strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "canary")) {
			t.Errorf("%s: error %v, want %q", name, err, tc.want)
		}
	}
}

// TestNotify plays systemd.
func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "40000")
	hear := func() string {
		t.Helper()
		buf := make([]byte, 256)
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	var stuck atomic.Bool
	var alive atomic.Int64             // how often it was asked while it was not stuck
	asked := make(chan struct{}, 1000) // while it was
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Notify(ctx, zap.NewNop(), func(atLeast time.Duration) string {
			if atLeast != 20*time.Millisecond {
				t.Errorf("asked for %s, want half the watchdog's time", atLeast)
			}
			if stuck.Load() {
				asked <- struct{}{}
				return "the poll"
			}
			alive.Add(1)
			return ""
		})
	}()
	if got := hear(); got != "READY=1" {
		t.Errorf("first said %q", got)
	}
	said := int64(0)
	for ; said < 3; said++ {
		if got := hear(); got != "WATCHDOG=1" {
			t.Errorf("said %q", got)
		}
	}
	stuck.Store(true)
	for range 5 {
		<-asked // and says nothing
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	for got := hear(); got != "STOPPING=1"; got = hear() {
		said++
	}
	if said != alive.Load() {
		t.Errorf("fed the watchdog %d times, but was alive %d times", said, alive.Load())
	}
}

func TestHarden(t *testing.T) {
	if err := Harden(); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || n != 0 {
		t.Errorf("dumpable is %d, %v", n, err)
	}
}
