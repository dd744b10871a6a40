//go:build testhooks

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/sample"
)

// withTestHooks gives the command the flag --test-hooks. With it central is
// something to run the API's conformance suites against: a store of its own in
// a folder that it removes at its end, no broker, and a second listener that
// fills and empties it.
func withTestHooks(c *cobra.Command) {
	var addr string
	c.Flags().StringVar(&addr, "test-hooks", "", "serve the API over a store for tests, and the hooks that fill it on this address; no broker is needed")
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if addr == "" {
			return run(cmd, args)
		}
		cfg := control.DefaultCentral(daemon.Dirs())
		flags := daemon.Flags{Config: cmd.Flag("config").Value.String()}
		if err := flags.Load(daemon.File("central.yaml"), &cfg); err != nil {
			return err
		}
		return runHooks(cmd.Context(), cfg, addr, cmd.OutOrStdout())
	}
}

// originalPolicy is what Ceilometer's policy.json says.
const originalPolicy = `{"context_is_admin": "role:admin", "segregation": "rule:context_is_admin", "telemetry:create_samples": ""}`

// hooks are what the tests' listener answers with, and the API that they
// change. Each request of either has the other's finished before it.
type hooks struct {
	dir    string // of the stores
	prefix string // of the API's paths

	mu        sync.RWMutex
	stores    int
	store     *local.Store
	options   api.Options
	handler   http.Handler
	published struct {
		sync.Mutex
		batches [][]json.RawMessage
	}
}

func runHooks(ctx context.Context, cfg control.Central, addr string, out io.Writer) (err error) {
	h := &hooks{prefix: cfg.API.Prefix}
	if h.dir, err = os.MkdirTemp("", "kvmeter-test-hooks"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.close(), os.RemoveAll(h.dir)) }()
	if err := h.reset(); err != nil {
		return err
	}
	served, err := daemon.Open("the API", "api.listen", cfg.API.Listen, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.RLock()
		defer h.mu.RUnlock()
		h.handler.ServeHTTP(w, r)
	}))
	if err != nil {
		return err
	}
	defer served.Close()
	page, err := daemon.Open("the test hooks", "--test-hooks", addr, h.routes())
	if err != nil {
		return err
	}
	defer page.Close()
	fmt.Fprintf(out, "API %s\ntest hooks %s/_test/\n", served.URL(), page.URL())
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return served.Serve(ctx) })
	g.Go(func() error { return page.Serve(ctx) })
	return g.Wait()
}

func (h *hooks) close() error {
	if h.store == nil {
		return nil
	}
	return h.store.Close()
}

// reset drops everything: a new store, the settings' defaults.
func (h *hooks) reset() error {
	if err := h.close(); err != nil {
		return err
	}
	if err := os.RemoveAll(h.path()); err != nil {
		return err
	}
	h.stores++
	var err error
	if h.store, err = local.Open(h.path(), maintenanceOptions()); err != nil {
		return err
	}
	policy, err := api.ParsePolicy([]byte(originalPolicy))
	if err != nil {
		return err
	}
	h.options = api.Options{Policy: policy, Publish: h.publish, Prefix: h.prefix, Patience: time.Minute}
	h.take()
	h.handler = api.New(h.store, h.options)
	return nil
}

func (h *hooks) path() string { return filepath.Join(h.dir, strconv.Itoa(h.stores)) }

// publish keeps a batch instead of publishing it.
func (h *hooks) publish(_ context.Context, b *sample.Batch) error {
	var batch []json.RawMessage
	for s := range b.Samples() {
		text, err := json.Marshal(map[string]any{
			"source": s.Source, "counter_name": s.Name, "counter_type": s.Kind, "counter_unit": s.Unit,
			"counter_volume": json.RawMessage(s.Volume.AppendAPI(nil)), "user_id": known(s.User), "project_id": known(s.Project),
			"resource_id": s.Resource, "timestamp": string(sample.AppendTime(nil, s.Time)), "resource_metadata": object(s.Metadata),
			"message_id": s.ID.String(),
		})
		if err != nil {
			return err
		}
		batch = append(batch, text)
	}
	h.published.Lock()
	defer h.published.Unlock()
	h.published.batches = append(h.published.batches, batch)
	return nil
}

func known(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func object(doc []byte) json.RawMessage {
	if len(doc) == 0 {
		return json.RawMessage("{}")
	}
	return doc
}

// take returns the published batches and forgets them.
func (h *hooks) take() [][]json.RawMessage {
	h.published.Lock()
	defer h.published.Unlock()
	batches := h.published.batches
	h.published.batches = nil
	if batches == nil {
		batches = [][]json.RawMessage{}
	}
	return batches
}

func (h *hooks) routes() http.Handler {
	mux := http.NewServeMux()
	for path, do := range map[string]func(context.Context, []byte) error{
		"reset":   func(context.Context, []byte) error { return h.reset() },
		"samples": h.samples,
		"events":  h.events,
		"config":  h.config,
	} {
		mux.HandleFunc("POST /_test/"+path, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err == nil {
				h.mu.Lock()
				err = do(r.Context(), body)
				h.mu.Unlock()
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			w.WriteHeader(http.StatusNoContent)
		})
	}
	mux.HandleFunc("GET /_test/published", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(h.take())
	})
	return mux
}

// samples stores samples as they are, in their order.
func (h *hooks) samples(ctx context.Context, body []byte) error {
	var elements []json.RawMessage
	if err := json.Unmarshal(body, &elements); err != nil {
		return err
	}
	now := time.Now()
	for start := 0; start < len(elements); start += sample.MaxSamples {
		part := elements[start:min(start+sample.MaxSamples, len(elements))]
		samples := make([]sample.Sample, len(part))
		for i, e := range part {
			var err error
			if samples[i], err = sample.ParseForeign(e); err != nil {
				return fmt.Errorf("sample %d: %w", start+i, err)
			}
		}
		if err := api.Store(ctx, h.store, api.BatchOf(now, samples)); err != nil {
			return err
		}
	}
	return nil
}

// events stores events as they are.
func (h *hooks) events(ctx context.Context, body []byte) error {
	var elements []json.RawMessage
	if err := json.Unmarshal(body, &elements); err != nil {
		return err
	}
	events := make([]sample.Event, len(elements))
	for i, e := range elements {
		var err error
		if events[i], err = sample.ParseEvent(e); err != nil {
			return fmt.Errorf("event %d: %w", i, err)
		}
	}
	stored, err := h.store.AppendEvents(ctx, events)
	for i := range stored {
		if stored[i].Refused != nil {
			err = errors.Join(err, fmt.Errorf("event %d: %w", i, stored[i].Refused))
		}
	}
	return err
}

// config changes settings.
func (h *hooks) config(_ context.Context, body []byte) error {
	var settings map[string]json.RawMessage
	if err := json.Unmarshal(body, &settings); err != nil {
		return err
	}
	o := h.options
	for name, value := range settings {
		var err error
		switch name {
		case "default_api_return_limit":
			err = json.Unmarshal(value, &o.DefaultLimit)
		case "cors_allowed_origin":
			o.AllowedOrigins, err = origins(value)
		case "policy":
			o.Policy, err = policy(value)
		default:
			err = errors.New("no such setting")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	h.options = o
	h.handler = api.New(h.store, o)
	return nil
}

// origins reads origins, separated by commas or as a list, or null.
func origins(value []byte) (list []string, err error) {
	var one *string
	if json.Unmarshal(value, &one) == nil {
		if one != nil && *one != "" {
			list = strings.Split(*one, ",")
		}
		return list, nil
	}
	return list, json.Unmarshal(value, &list)
}

// policy reads rules: an object, the text of a file, or null for the defaults.
func policy(value []byte) (*api.Policy, error) {
	var text *string
	if json.Unmarshal(value, &text) == nil {
		value = []byte(originalPolicy)
		if text != nil {
			value = []byte(*text)
		}
	}
	return api.ParsePolicy(value)
}
