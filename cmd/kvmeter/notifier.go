package main

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
)

func notifierCommand() *cobra.Command {
	var flags daemon.Flags
	file := daemon.File("notifier.yaml")
	c := &cobra.Command{
		Use:   "notifier",
		Short: "Take batches from the agents, verify them, pass them through pipeline.yaml",
		Long: `The notifier takes the agents' batches from RabbitMQ, verifies their signatures,
passes them through pipeline.yaml and acks them when every publisher has taken
them. Run as many as you like; each takes its share of the queues.`,
		Example: `  kvmeter notifier --check-config
  KVMETER_AMQP__URL=amqp://kvmeter:secret@rabbit:5672/ kvmeter notifier`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := control.DefaultNotifier(daemon.Dirs())
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
			return runNotifier(cmd.Context(), cfg, log, daemon.Registry())
		},
	}
	flags.Register(c.Flags(), file)
	return c
}

func runNotifier(ctx context.Context, cfg control.Notifier, log *zap.Logger, registry *prometheus.Registry) (err error) {
	keys, err := sample.LoadKeys(cfg.Keys)
	if err != nil {
		return err
	}
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter notifier", log)
	if err != nil {
		return err
	}
	defer func() { amqp.Close() }()
	cfg.Partitions = cfg.AMQP.Partitions
	n, err := notifier.New(cfg.Config, notifier.Deps{
		Log: log, Consumer: amqp, Publisher: amqp, Keys: keys, Publishers: all.Publishers, Registry: registry,
	})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.Run(ctx) })
	g.Go(func() error { return daemon.Metrics(ctx, cfg.Metrics, registry) })
	return errors.Join(g.Wait(), n.Close())
}
