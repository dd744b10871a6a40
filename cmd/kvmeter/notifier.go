package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher"
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
				return errors.Join(config.Print(cmd.OutOrStdout(), &cfg), checkNotifier(cfg))
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

// checkNotifier returns what the notifier would refuse to start for.
func checkNotifier(cfg control.Notifier) error {
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter notifier", zap.NewNop())
	if err != nil {
		return err
	}
	amqp.Close()
	_, err = openNotifier(cfg, notifier.Deps{Log: zap.NewNop(), Publishers: inert()})
	if err != nil || cfg.Metrics == "" {
		return err
	}
	return daemon.CheckAddress("metrics", cfg.Metrics)
}

// inert returns the publishers' schemes, of which none opens anything: those
// that sign their batches only send them over the bus.
func inert() []publisher.Scheme {
	schemes := slices.Clone(all.Publishers)
	for i := range schemes {
		if !schemes[i].Signs {
			schemes[i].New = func(*url.URL, publisher.Deps) (publisher.Publisher, error) { return nothing{}, nil }
		}
	}
	return schemes
}

// nothing publishes nothing.
type nothing struct{}

// Publish implements [publisher.Publisher].
func (nothing) Publish(context.Context, []publisher.Part) error { return nil }

// Close implements [publisher.Publisher].
func (nothing) Close() error { return nil }

func runNotifier(ctx context.Context, cfg control.Notifier, log *zap.Logger, registry *prometheus.Registry) error {
	metrics, err := daemon.Metrics(cfg.Metrics, registry)
	if err != nil {
		return err
	}
	defer metrics.Close()
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter notifier", log)
	if err != nil {
		return err
	}
	defer func() { amqp.Close() }()
	n, err := openNotifier(cfg, notifier.Deps{Log: log, Consumer: amqp, Publisher: amqp, Publishers: all.Publishers, Registry: registry})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.Run(ctx) })
	g.Go(func() error { return metrics.Serve(ctx) })
	return errors.Join(g.Wait(), n.Close())
}

// openNotifier returns a notifier with the keys and the pipeline of the
// configuration. That the pipeline is not there is an error unless it is the
// default one.
func openNotifier(cfg control.Notifier, deps notifier.Deps) (*notifier.Notifier, error) {
	if err := checkPartitions(cfg.AMQP); err != nil {
		return nil, err
	}
	cfg.Partitions = cfg.AMQP.Partitions
	if cfg.Pipeline != "" && cfg.Pipeline != control.DefaultNotifier(daemon.Dirs()).Pipeline {
		if _, err := os.Stat(cfg.Pipeline); err != nil {
			return nil, fmt.Errorf("read pipeline: %w", err)
		}
	}
	var err error
	if deps.Keys, err = loadKeys(cfg.Keys, cfg.AllowUnsigned); err != nil {
		return nil, err
	}
	return notifier.New(cfg.Config, deps)
}

// loadKeys reads the keys. A daemon without any would move every batch to the
// dead letters.
func loadKeys(dir string, allowUnsigned bool) (sample.Keys, error) {
	keys, err := sample.LoadKeys(dir)
	if err == nil && len(keys) == 0 && !allowUnsigned {
		err = fmt.Errorf("there are no keys in %s, so every batch would be refused: put each node's secret there as NODE.key, or take unsigned batches with allow_unsigned: true", dir)
	}
	return keys, err
}

func checkPartitions(cfg bus.Config) error {
	if cfg.Partitions < 1 {
		return fmt.Errorf("amqp.partitions %d: must be at least 1", cfg.Partitions)
	}
	return nil
}
