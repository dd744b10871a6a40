package api_test

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
)

func TestRates(t *testing.T) {
	h := api.New(storeOf(t), api.Options{Rate: 0.001, Authenticate: func(r *http.Request) (api.Identity, error) {
		if r.Header.Get("X-Roles") == "" {
			return api.Identity{}, api.Unauthenticated("Bearer")
		}
		return api.NoAuth(r)
	}})
	alice := map[string]string{"X-Roles": "member", "X-User-Id": "alice", "X-Project-Id": "p1"}
	elsewhere := map[string]string{"X-Roles": "member", "X-User-Id": "alice", "X-Project-Id": "p2"}
	for i, step := range []struct {
		headers map[string]string
		path    string
		status  int
	}{
		{alice, "/v2/meters", 200},
		{alice, "/v2/meters", 429},
		{alice, "/v2/nothing", 404},    // it asks for nothing
		{elsewhere, "/v2/meters", 200}, // another project
		{nil, "/v2/meters", 401},
		{nil, "/v2/meters", 429},       // the address: nobody knows who asks
		{elsewhere, "/v2/meters", 429}, // nor will it be found out for a while
	} {
		w := ask(h, http.MethodGet, step.path, step.headers, "")
		if w.Code != step.status {
			t.Errorf("step %d: got %d %s, want %d", i, w.Code, w.Body, step.status)
		}
		if after := w.Header().Get("Retry-After"); (after != "") != (step.status == 429) {
			t.Errorf("step %d: got Retry-After %q", i, after)
		}
	}
}

func TestAudit(t *testing.T) {
	var lines strings.Builder
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(&lines), zap.InfoLevel))
	h := api.New(storeOf(t, gauge("a", "vm-1", 0, 1)), api.Options{Audit: log})
	admin := map[string]string{"X-Roles": "admin", "X-User-Id": "root", "X-Project-Id": "p9", "X-Auth-Token": "the-secret"}
	member := map[string]string{"X-Roles": "member", "X-User-Id": "eve"}
	ask(h, http.MethodGet, "/v2/meters?q.field=resource_id&q.value=vm-1", admin, "")
	ask(h, http.MethodGet, "/v2/samples", member, "")
	ask(h, http.MethodGet, "/v2/nothing", admin, "")
	type line struct {
		User, Project, Path, Query string
		Status                     int
	}
	want := []line{
		{"root", "p9", "/v2/meters", "q.field=resource_id&q.value=vm-1", 200},
		{"eve", "", "/v2/samples", "", 403},
		{"", "", "/v2/nothing", "", 404},
	}
	all := strings.Split(strings.TrimSpace(lines.String()), "\n")
	if len(all) != len(want) || strings.Contains(lines.String(), "the-secret") {
		t.Fatalf("got\n%s", lines.String())
	}
	for i, text := range all {
		var got line
		if err := json.Unmarshal([]byte(text), &got); err != nil || got != want[i] {
			t.Errorf("got %s (%v), want %+v", text, err, want[i])
		}
	}
}

// TestAddressesBehindProxies holds that a trusted proxy says where a request comes
// from, and that nobody else does.
func TestAddressesBehindProxies(t *testing.T) {
	var lines strings.Builder
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(&lines), zap.InfoLevel))
	h := api.New(storeOf(t), api.Options{
		Audit: log, Rate: 0.001, Proxies: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("::1/128")},
		Authenticate: func(*http.Request) (api.Identity, error) { return api.Identity{}, api.Unauthenticated("Bearer") },
	})
	for i, tc := range []struct {
		peer, forwarded, want string
		status                int
	}{
		{"192.0.2.1:1000", "198.51.100.1", "198.51.100.1", 401},
		{"192.0.2.1:1000", "198.51.100.1", "198.51.100.1", 429},
		{"192.0.2.2:1000", "forged, 198.51.100.2", "198.51.100.2", 401},
		{"192.0.2.2:1000", "198.51.100.1, 198.51.100.3, 192.0.2.9", "198.51.100.3", 401},
		{"[::1]:1000", "2001:db8::1", "2001:db8::1", 401},
		{"192.0.2.3:1000", "", "192.0.2.3", 401},
		{"192.0.2.4:1000", "192.0.2.5", "192.0.2.5", 401},
		{"203.0.113.1:1000", "198.51.100.4", "203.0.113.1", 401},
		{"203.0.113.1:1000", "198.51.100.5", "203.0.113.1", 429},
	} {
		lines.Reset()
		r := httptest.NewRequest(http.MethodGet, "http://api.example/v2/meters", nil)
		r.RemoteAddr = tc.peer
		if tc.forwarded != "" {
			r.Header.Set("X-Forwarded-For", tc.forwarded)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var got struct{ From string }
		if err := json.Unmarshal([]byte(lines.String()), &got); err != nil || got.From != tc.want || w.Code != tc.status {
			t.Errorf("%d: got %d from %q (%v), want %d from %q", i, w.Code, got.From, err, tc.status, tc.want)
		}
	}
}

// TestAnAnswerThatDoesNotGoOn holds that a query that costs too much ends, that one
// whose parts come does not, and that a client that does not read ends it.
func TestAnAnswerThatDoesNotGoOn(t *testing.T) {
	h := api.New(waiting{storeOf(t), nil}, api.Options{Patience: 50 * time.Millisecond})
	for method, path := range map[string]string{http.MethodGet: "/v2/samples", http.MethodPost: "/v2/query/samples"} {
		w := ask(h, method, path, nil, "")
		if got, want := fault(t, w), "The answer takes too long: ask for less time, or narrow the query."; w.Code != http.StatusServiceUnavailable || got != want {
			t.Errorf("%s: got %d %s, want 503 %s", path, w.Code, got, want)
		}
	}
	const parts = 10
	w := ask(api.New(slowly{parts: parts}, api.Options{Patience: 4 * time.Second}), http.MethodGet, "/v2/samples?limit=10000000", nil, "")
	if got := len(ids(t, w.Body.String())); w.Code != http.StatusOK || got != parts*partSamples {
		t.Errorf("an answer whose parts come: got %d with %d samples", w.Code, got)
	}
	ended := make(chan error, 1)
	server := httptest.NewServer(api.TransferWithin(api.New(slowly{parts: 1 << 40, ended: ended}, api.Options{}), 100*time.Millisecond))
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET /v2/samples?limit=1000000000000 HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Error("a client that does not read is served for ever")
	}
}

// partSamples are samples enough for a part of an answer.
const partSamples = 2000

// slowly is a store that takes its time for each part of an answer.
type slowly struct {
	store.Store
	parts int
	ended chan error
}

func (s slowly) Samples(ctx context.Context, _ store.Filter, yield func(store.Sample) bool) error {
	smp := store.Sample{Sample: gauge("a", "r", 0, 1)}
	for range s.parts {
		for range partSamples {
			if !yield(smp) || ctx.Err() != nil {
				if s.ended != nil {
					s.ended <- ctx.Err()
				}
				return ctx.Err()
			}
		}
		if s.ended == nil {
			time.Sleep(500 * time.Millisecond)
		}
	}
	return nil
}
