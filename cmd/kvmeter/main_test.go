package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
)

func TestCheckConfig(t *testing.T) { cmdtest.Configs(t, command) }

func TestFlags(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"a file that is named must exist":     {[]string{"central", "--config", "testdata/none.yaml"}, "read configuration: open testdata/none.yaml: no such file or directory"},
		"an unknown flag names the help":      {[]string{"up", "--statedir", "/x"}, "unknown flag: --statedir (kvmeter up --help lists the flags)"},
		"a command almost known is suggested": {[]string{"meterlist"}, "unknown command \"meterlist\" for \"kvmeter\"\n\nDid you mean this?\n\tmeter-list\n"},
		"words are no arguments of a daemon":  {[]string{"notifier", "now"}, `unknown command "now" for "kvmeter notifier"`},
		"a level that is none lists them":     {[]string{"up", "--config", "/dev/null", "--log-level", "loud"}, `--log-level "loud": it is debug, info, warn or error`},
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := cmdtest.Run(t, command(), tc.args...); err == nil || err.Error() != tc.want || out != "" {
				t.Errorf("got error\n%v and output %q, want\n%s", err, out, tc.want)
			}
		})
	}
}

func TestATakenPortIsSaidBeforeTheStoreIsOpened(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dir := t.TempDir()
	t.Setenv("KVMETER_API__LISTEN", l.Addr().String())
	_, err = cmdtest.Run(t, command(), "up", "--config", "/dev/null", "--log-level", "error", "--state", filepath.Join(dir, "state"), "--run", filepath.Join(dir, "run"))
	want := "the API cannot listen on " + l.Addr().String() + ": another program does; end it, or set api.listen to another address"
	if err == nil || err.Error() != want {
		t.Errorf("got error\n%v, want\n%s", err, want)
	}
	if stores, _ := filepath.Glob(filepath.Join(dir, "state", "store", "*")); len(stores) > 0 {
		t.Errorf("the store was opened: %q", stores)
	}
}

func TestServeStore(t *testing.T) {
	serve := func(t *testing.T, webConfig string, f func(ctx context.Context, api string, s store.Store) error) error {
		t.Helper()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		return serveStore(ctx, control.Store{Path: t.TempDir()}, control.API{Listen: addr, WebConfig: webConfig}, nil, zap.NewNop(), prometheus.NewRegistry(),
			func(ctx context.Context, s store.Store) error { return f(ctx, "http://"+addr, s) })
	}
	t.Run("the API answers while the function runs", func(t *testing.T) {
		err := serve(t, "", func(_ context.Context, api string, _ store.Store) error {
			resp, err := http.Get(api + "/v2/meters")
			if err != nil {
				return err
			}
			defer func() { _ = resp.Body.Close() }()
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "[]" {
				return fmt.Errorf("got %q, %w", body, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("the API answers over TLS", func(t *testing.T) {
		// A server of httptest has a certificate that its client believes.
		other := httptest.NewTLSServer(nil)
		defer other.Close()
		pair := other.TLS.Certificates[0]
		key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		for name, text := range map[string][]byte{
			"cert":     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}),
			"key":      pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
			"web.yaml": []byte("tls_server_config: {cert_file: cert, key_file: key}\n"),
		} {
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err = serve(t, filepath.Join(dir, "web.yaml"), func(_ context.Context, api string, _ store.Store) error {
			resp, err := other.Client().Get(strings.Replace(api, "http://", "https://", 1) + "/v2/meters")
			if err != nil {
				return err
			}
			defer func() { _ = resp.Body.Close() }()
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "[]" {
				return fmt.Errorf("got %q, %w", body, err)
			}
			if resp, err := http.Get(api + "/v2/meters"); err == nil {
				_ = resp.Body.Close()
				if resp.StatusCode == http.StatusOK {
					return errors.New("it answers without TLS too")
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("the function's error is returned and the store is closed", func(t *testing.T) {
		failure := errors.New("enough")
		var used store.Store
		err := serve(t, "", func(_ context.Context, _ string, s store.Store) error {
			used = s
			return failure
		})
		if !errors.Is(err, failure) {
			t.Errorf("got %v, want %v", err, failure)
		}
		if _, err := used.Append(t.Context(), nil); err == nil {
			t.Error("the store takes batches still")
		}
	})
}

func TestGateSaysThatTheStoreIsBeingOpened(t *testing.T) {
	var g gate
	ask := func() (int, string) {
		t.Helper()
		w := httptest.NewRecorder()
		g.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/meters", nil))
		return w.Code, w.Body.String()
	}
	if status, body := ask(); status != http.StatusServiceUnavailable || !strings.Contains(body, "being opened") {
		t.Errorf("got %d, %s", status, body)
	}
	g.open(http.NotFoundHandler())
	if status, _ := ask(); status != http.StatusNotFound {
		t.Errorf("got %d from the handler", status)
	}
}

// A sample sent to the API without direct goes to a notifier and comes back
// through the store's queue.
func TestASampleSentToTheAPIPassesThePipelines(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	local := bus.NewLocal(1, zap.NewNop())
	cfg := central.DefaultIngestConfig()
	cfg.Name = "central-1"
	keys := sample.Keys{"central-1": []byte("its secret"), "notifier-1": []byte("another")}
	s := memory.New(time.Now)
	publish, err := posting(local, &cfg, keys, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	ncfg := notifier.DefaultConfig()
	ncfg.Name, ncfg.Pipeline, ncfg.EventPipeline, ncfg.Spool = "notifier-1", "", "", ""
	ncfg.Relays = []string{"central-1"}
	n, err := notifier.New(ncfg, notifier.Deps{Log: zap.NewNop(), Consumer: local, Publisher: local, Publishers: all.Publishers, Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	ingest, err := central.NewIngest(cfg, central.IngestDeps{Log: zap.NewNop(), Consumer: local, Store: s, Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { _ = n.Run(ctx) })
	running.Go(func() { _ = ingest.Run(ctx) })
	h := api.New(s, api.Options{Publish: publish})
	ask := func(method, path, body string) string {
		t.Helper()
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code/100 != 2 {
			t.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
		}
		return w.Body.String()
	}
	sent := ask(http.MethodPost, "/v2/meters/apples", `[
		{"counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1, "resource_id": "r", "resource_metadata": {"a.b": "c"}},
		{"counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 2.5, "resource_id": "r"}]`)
	deadline := time.Now().Add(30 * time.Second)
	for strings.Count(ask(http.MethodGet, "/v2/samples", ""), `"meter"`) < 2 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	got := ask(http.MethodGet, "/v2/meters/apples", "")
	for _, want := range regexp.MustCompile(`"message_id": "[^"]*"`).FindAllString(sent, -1) {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not stored: %s", want, got)
		}
	}
	if !strings.Contains(got, `"a.b": "c"`) {
		t.Errorf("its metadata is not stored: %s", got)
	}
	stop()
	running.Wait()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	cfg.Name = "central-2"
	if publish, err := posting(local, &cfg, keys, zap.NewNop()); publish != nil || err != nil {
		t.Errorf("central without a key would send unsigned batches: %v", err)
	}
}

func TestDocumentedCommandsExist(t *testing.T) { cmdtest.Documented(t, command) }
