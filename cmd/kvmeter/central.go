package main

import (
	"context"
	"errors"

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
	"github.com/kvmeter/kvmeter/sample"
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
				return config.Print(cmd.OutOrStdout(), &cfg)
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

func runCentral(ctx context.Context, cfg control.Central, log *zap.Logger, registry *prometheus.Registry) error {
	keys, err := sample.LoadKeys(cfg.Keys)
	if err != nil {
		return err
	}
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter central", log)
	if err != nil {
		return err
	}
	defer func() { amqp.Close() }()
	cfg.Partitions = cfg.AMQP.Partitions
	return withStore(cfg.Store, log, registry, func(s store.Store) error {
		ingest, err := central.NewIngest(cfg.IngestConfig, central.IngestDeps{Log: log, Consumer: amqp, Store: s, Keys: keys, Registry: registry})
		if err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return ingest.Run(ctx) })
		g.Go(func() error { return serveAPI(ctx, cfg.API, s, log) })
		g.Go(func() error { return daemon.Metrics(ctx, cfg.Metrics, registry) })
		return g.Wait()
	})
}

// withStore opens the store, runs f with it and closes it.
func withStore(cfg control.Store, log *zap.Logger, registry prometheus.Registerer, f func(store.Store) error) error {
	s, err := local.Open(cfg.Path, local.Options{Log: log, Retention: cfg.Retention, MinFree: cfg.MinFree, Registry: registry})
	if err != nil {
		return err
	}
	return errors.Join(f(s), s.Close())
}

// serveAPI answers the API until ctx ends.
func serveAPI(ctx context.Context, cfg control.API, s store.Store, log *zap.Logger) error {
	if err := api.CheckListen(cfg.Listen, false); err != nil {
		return err
	}
	l, err := daemon.Listen("the API", "api.listen", cfg.Listen)
	if err != nil {
		return err
	}
	log.Info("the API answers", zap.String("url", "http://"+l.Addr().String()))
	return daemon.Serve(ctx, l, api.New(s, api.Options{Log: log}))
}
