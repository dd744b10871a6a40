package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
)

func centralCommand() *cobra.Command {
	var flags daemon.Flags
	file := daemon.File("central.yaml")
	c := &cobra.Command{
		Use:   "central",
		Short: "Store samples and answer the API",
		Long: `Central takes batches from RabbitMQ, stores each sample exactly once, acks what is
on disk, and answers the Telemetry API v2.`,
		Example: `  kvmeter central --check-config
  KVMETER_STORE__PATH=/srv/kvmeter kvmeter central`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := control.DefaultCentral(daemon.Dirs())
			if err := flags.Load(file, &cfg); err != nil {
				return err
			}
			if flags.Check {
				return errors.Join(config.Print(cmd.OutOrStdout(), &cfg), checkCentral(cfg))
			}
			log, err := flags.Logger()
			if err != nil {
				return err
			}
			return runCentral(cmd.Context(), cfg, log, daemon.Registry())
		},
	}
	flags.Register(c.Flags(), file)
	return c
}

// checkCentral returns what central would refuse to start for.
func checkCentral(cfg control.Central) error {
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter central", zap.NewNop())
	if err != nil {
		return err
	}
	amqp.Close()
	if err := checkPartitions(cfg.AMQP); err != nil {
		return err
	}
	if _, err := loadKeys(cfg.Keys, cfg.AllowUnsigned); err != nil {
		return err
	}
	return checkServed(cfg.Store, cfg.API, cfg.Metrics)
}

// checkServed checks what central and the all-in-one have in common.
func checkServed(s control.Store, a control.API, metrics string) error {
	switch {
	case s.Path == "":
		return errors.New("store.path is empty: name the folder of the store")
	case s.Retention < 0:
		return fmt.Errorf("store.retention %s: must not be negative; 0s keeps samples for ever", s.Retention)
	}
	if err := daemon.CheckAddress("api.listen", a.Listen); err != nil {
		return err
	}
	if err := api.CheckListen(a.Listen, false); err != nil {
		return err
	}
	if metrics == "" {
		return nil
	}
	return daemon.CheckAddress("metrics", metrics)
}

func runCentral(ctx context.Context, cfg control.Central, log *zap.Logger, registry *prometheus.Registry) error {
	if err := checkCentral(cfg); err != nil {
		return err
	}
	keys, err := loadKeys(cfg.Keys, cfg.AllowUnsigned)
	if err != nil {
		return err
	}
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter central", log)
	if err != nil {
		return err
	}
	defer func() { amqp.Close() }()
	metrics, err := daemon.Metrics(cfg.Metrics, registry)
	if err != nil {
		return err
	}
	defer metrics.Close()
	cfg.Partitions = cfg.AMQP.Partitions
	return serveStore(ctx, cfg.Store, cfg.API, log, registry, func(ctx context.Context, s store.Store) error {
		ingest, err := central.NewIngest(cfg.IngestConfig, central.IngestDeps{Log: log, Consumer: amqp, Store: s, Keys: keys, Registry: registry})
		if err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return ingest.Run(ctx) })
		g.Go(func() error { return metrics.Serve(ctx) })
		return g.Wait()
	})
}

// serveStore answers the API, opens the store, runs f with it and closes it.
// Until the store is open the API says so.
func serveStore(ctx context.Context, cfg control.Store, listen control.API, log *zap.Logger, registry prometheus.Registerer, f func(context.Context, store.Store) error) error {
	var answers gate
	page, err := daemon.Open("the API", "api.listen", listen.Listen, &answers)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() {
		served <- page.Serve(ctx)
		stop() // without the API there is no central
	}()
	s, err := openStore(ctx, cfg, log, registry)
	if s != nil {
		answers.open(api.New(s, api.Options{Log: log}))
		log.Info("the API answers", zap.String("url", page.URL()))
		err = f(ctx, s)
	}
	stop()
	err = errors.Join(err, <-served) // no request outlives the store
	if s != nil {
		err = errors.Join(err, s.Close())
	}
	return err
}

// openStore opens the store. It returns neither a store nor an error if ctx ends
// first, which is safe: a store that is being opened has taken nothing yet.
func openStore(ctx context.Context, cfg control.Store, log *zap.Logger, registry prometheus.Registerer) (*local.Store, error) {
	options := local.Options{Log: log, Retention: cfg.Retention, MinFree: cfg.MinFree, Registry: registry}
	if cfg.Retention == 0 {
		options.Retention = -1 // for ever
	}
	var s *local.Store
	opened := make(chan error, 1)
	go func() {
		var err error
		s, err = local.Open(cfg.Path, options)
		opened <- err
	}()
	select {
	case err := <-opened:
		switch {
		case errors.Is(err, fs.ErrPermission):
			err = fmt.Errorf("%w: let this user write there, or set store.path to a folder of its own", err)
		case err != nil && strings.Contains(err.Error(), syscall.ENOSPC.Error()): // which Pebble does not wrap
			err = fmt.Errorf("open store %s: its disk is full; free some space and start again", cfg.Path)
		}
		return s, err
	case <-ctx.Done():
		return nil, nil
	}
}

// gate answers by a handler once there is one.
type gate struct{ handler atomic.Pointer[http.Handler] }

func (g *gate) open(h http.Handler) { g.handler.Store(&h) }

// ServeHTTP implements [http.Handler].
func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := g.handler.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = io.WriteString(w, `{"error_message": {"faultcode": "Server", "faultstring": "The store is being opened; try again in a moment.", "debuginfo": null}}`)
}
