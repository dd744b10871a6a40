package all

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

// sent is what a receiver got.
type sent struct {
	Proto, Body, Path string
	Headers           map[string]string
}

// TestOracle compares what real receivers get with what Ceilometer's publishers
// sent them, byte for byte.
func TestOracle(t *testing.T) {
	files, err := filepath.Glob("testdata/p*.json")
	if err != nil || len(files) < 3 {
		t.Fatalf("%d cases, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var c struct {
				Options  []string
				Input    []json.RawMessage
				Expected []sent
			}
			if err := json.Unmarshal(data, &c); err != nil {
				t.Fatal(err)
			}
			events := c.Options[0] == "--events"
			if events {
				c.Options = c.Options[1:]
			}
			var received func() []sent
			address := ""
			if c.Options[0] == "tcp" {
				address, received = listenTCP(t)
			} else {
				address, received = listenHTTP(t)
			}
			rest := ""
			if len(c.Options) > 1 {
				rest = c.Options[1]
			}
			publish(t, c.Options[0]+"://"+address+rest, c.Input, events)
			if diff := cmp.Diff(c.Expected, received()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// publish gives JSON to the publisher of a URL.
func publish(t *testing.T, text string, in []json.RawMessage, events bool) {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	p, _, err := publisher.Open(Publishers, u, publisher.Deps{Log: zap.NewNop(), Name: "node1", TelemetrySecret: ceilometer.DefaultSecret})
	if err != nil {
		t.Fatal(err)
	}
	if events {
		var all []sample.Event
		for _, raw := range in {
			e, err := sample.ParseEvent(raw)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, e)
		}
		err = p.(publisher.EventPublisher).PublishEvents(t.Context(), all)
	} else {
		var all []sample.Sample
		for _, raw := range in {
			s, err := sample.ParseForeign(raw)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, s)
		}
		for _, b := range pipeline.Batches(all, "node1", time.Now()) {
			if err == nil {
				err = p.Publish(t.Context(), []publisher.Part{{From: b, Batch: b}})
			}
		}
	}
	if err != nil {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func listenHTTP(t *testing.T) (address string, received func() []sent) {
	t.Helper()
	var all []sent
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost {
			t.Errorf("%s, %v", r.Method, err)
		}
		all = append(all, sent{"http", string(body), r.RequestURI, map[string]string{"Content-type": r.Header.Get("Content-Type")}})
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), func() []sent {
		s.Close()
		return all
	}
}

// listenTCP takes one connection and reads it to its end.
func listenTCP(t *testing.T) (address string, received func() []sent) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte, 1)
	go func() {
		var b bytes.Buffer
		if conn, err := l.Accept(); err == nil {
			_, _ = io.Copy(&b, conn)
		}
		got <- b.Bytes()
	}()
	return l.Addr().String(), func() []sent {
		defer func() { _ = l.Close() }()
		return []sent{{Proto: "tcp", Body: hex.EncodeToString(<-got)}}
	}
}
