package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/cmd/internal/cmdtest"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
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
	serve := func(t *testing.T, f func(ctx context.Context, api string, s store.Store) error) error {
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
		return serveStore(ctx, control.Store{Path: t.TempDir()}, control.API{Listen: addr}, zap.NewNop(), prometheus.NewRegistry(),
			func(ctx context.Context, s store.Store) error { return f(ctx, "http://"+addr, s) })
	}
	t.Run("the API answers while the function runs", func(t *testing.T) {
		err := serve(t, func(_ context.Context, api string, _ store.Store) error {
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
	t.Run("the function's error is returned and the store is closed", func(t *testing.T) {
		failure := errors.New("enough")
		var used store.Store
		err := serve(t, func(_ context.Context, _ string, s store.Store) error {
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
