package api_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/kvmeter/kvmeter/central/api"
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
