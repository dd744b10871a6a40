package zaqar

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// TestMessages has an identity service and a Zaqar.
func TestMessages(t *testing.T) {
	var sizes []int
	var bodies []string
	mux := http.NewServeMux()
	s := httptest.NewServer(mux)
	defer s.Close()
	mux.HandleFunc("POST /v3/auth/tokens", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Subject-Token", "token")
		_, _ = fmt.Fprintf(w, `{"token": {"expires_at": %q, "catalog": [{"type": "messaging", "endpoints": [{"interface": "public", "url": %q}]}]}}`,
			time.Now().Add(time.Hour).Format(time.RFC3339), s.URL)
	})
	mux.HandleFunc("POST /v2/queues/my queue/messages", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Messages []struct {
				Body json.RawMessage
				TTL  int
			}
		}
		text, err := io.ReadAll(r.Body)
		if err == nil {
			err = json.Unmarshal(text, &in)
		}
		if err != nil || r.Header.Get("X-Auth-Token") != "token" || len(r.Header.Get("Client-ID")) != 36 {
			t.Errorf("got %v %s, %v", r.Header, text, err)
		}
		sizes = append(sizes, len(in.Messages))
		for _, m := range in.Messages {
			if m.TTL != 60 {
				t.Errorf("ttl %d", m.TTL)
			}
			bodies = append(bodies, string(m.Body))
		}
		w.WriteHeader(http.StatusCreated)
	})
	t.Setenv("OS_AUTH_URL", s.URL+"/v3")
	t.Setenv("OS_USERNAME", "u")
	t.Setenv("OS_PASSWORD", "p")
	u, err := url.Parse("zaqar://?queue=my%20queue&ttl=60")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	b := sample.NewBuilder()
	for i := range 25 {
		b.Row(sample.Row{Resource: fmt.Sprint("r", i)})
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(uint64(i)))
	}
	if err := p.Publish(t.Context(), []publisher.Part{{Batch: b.Build()}}); err != nil {
		t.Fatal(err)
	}
	if err := p.(publisher.EventPublisher).PublishEvents(t.Context(), []sample.Event{{ID: "m", Type: "e"}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if fmt.Sprint(sizes) != "[20 5 1]" || !strings.HasPrefix(bodies[24], `{"name": "cpu", "type": "cumulative", "unit": "ns", "volume": 24,`) || !strings.HasPrefix(bodies[25], `{"message_id": "m", "event_type": "e",`) {
		t.Errorf("got %v, the last %s", sizes, bodies[24:])
	}
}

func TestNewSaysWhatIsMissing(t *testing.T) {
	t.Setenv("OS_AUTH_URL", "")
	for text, want := range map[string]string{"zaqar://": "it needs the option queue", "zaqar://?queue=q": "it needs OS_AUTH_URL", "zaqar://?queue=q&ttl=x": "option ttl"} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(u, publisher.Deps{Log: zap.NewNop()}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", text, err, want)
		}
	}
}
