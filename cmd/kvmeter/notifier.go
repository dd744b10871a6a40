package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/oslo"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
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
				return errors.Join(flags.Print(cmd.OutOrStdout(), &cfg), checkNotifier(cfg))
			}
			log, err := flags.Logger()
			if err != nil {
				return err
			}
			return runNotifier(cmd.Context(), cfg, log, daemon.Registry(), func() (control.Notifier, error) {
				cfg := control.DefaultNotifier(daemon.Dirs())
				return cfg, flags.Load(file, &cfg)
			})
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
	cfg.Spool, cfg.State = "", ""
	subscribers, done, err := openSubscribers(cfg, amqp, zap.NewNop())
	if err != nil {
		return err
	}
	done()
	_, err = openNotifier(cfg, notifier.Deps{Log: zap.NewNop(), Publishers: inert(), Subscribers: subscribers, Memory: amqp, Counter: amqp})
	if err != nil {
		return err
	}
	return daemon.CheckMetrics(cfg.Metrics, cfg.MetricsWebConfig)
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

// runNotifier runs the notifier until ctx ends. reload loads the configuration
// anew.
func runNotifier(ctx context.Context, cfg control.Notifier, log *zap.Logger, registry *prometheus.Registry, reload func() (control.Notifier, error)) error {
	if os.Getenv("GOGC") == "" {
		// Little is kept and much is garbage by the next batch, so that collecting
		// at twice of what is kept would take a quarter of the CPU time.
		debug.SetGCPercent(400)
	}
	if err := daemon.Harden(); err != nil {
		return err
	}
	metrics, err := daemon.Metrics(cfg.Metrics, cfg.MetricsWebConfig, registry)
	if err != nil {
		return err
	}
	defer metrics.Close()
	cfg.AMQP.Stages = cfg.StagePartitions
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter notifier", log)
	if err != nil {
		return err
	}
	defer func() { amqp.Close() }()
	registry.MustRegister(amqp.Metrics())
	subscribers, done, err := openSubscribers(cfg, amqp, log)
	if err != nil {
		return err
	}
	defer done()
	n, err := openNotifier(cfg, notifier.Deps{
		Log: log, Consumer: amqp, Publisher: amqp, Publishers: all.Publishers, Registry: registry, Subscribers: subscribers,
		Memory: amqp, Counter: amqp,
	})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.Run(ctx) })
	g.Go(func() error { return metrics.Serve(ctx) })
	g.Go(func() error {
		return daemon.OnHangup(ctx, log, func() error {
			cfg, err := reload()
			if err == nil {
				err = checkPipelines(cfg)
			}
			if err != nil {
				return err
			}
			return n.Reload(ctx, cfg.Config)
		})
	})
	g.Go(func() error { return daemon.Notify(ctx, log, daemon.NeverStuck) })
	return errors.Join(g.Wait(), n.Close())
}

// openSubscribers returns the brokers of OpenStack's services, none of which is
// connected yet: that of the agents, unless others are named.
func openSubscribers(cfg control.Notifier, amqp *bus.AMQP, log *zap.Logger) (all []bus.Subscriber, done func(), err error) {
	var opened []*bus.AMQP
	done = func() {
		for _, a := range opened {
			a.Close()
		}
	}
	if len(cfg.Notifications.URLs) == 0 {
		return []bus.Subscriber{amqp}, done, nil
	}
	for i, text := range cfg.Notifications.URLs {
		urls := []string{text} // of the nodes of one cluster
		if strings.HasPrefix(text, "rabbit://") {
			if urls, err = oslo.TransportURL(text, false); err != nil {
				done()
				return nil, nil, fmt.Errorf("notifications.messaging_urls, number %d: %w", i+1, err)
			}
		}
		a, err := bus.NewAMQP(cfg.AMQP.At(urls...), "kvmeter notifier", log)
		if err != nil {
			done()
			return nil, nil, fmt.Errorf("notifications.messaging_urls, number %d: %w", i+1, err)
		}
		opened, all = append(opened, a), append(all, a)
	}
	return all, done, nil
}

// openNotifier returns a notifier with the keys and the pipeline of the
// configuration. That the pipeline is not there is an error unless it is the
// default one.
func openNotifier(cfg control.Notifier, deps notifier.Deps) (*notifier.Notifier, error) {
	if err := checkPartitions(cfg.AMQP); err != nil {
		return nil, err
	}
	cfg.Partitions, deps.AMQP = cfg.AMQP.Partitions, cfg.AMQP
	if err := checkPipelines(cfg); err != nil {
		return nil, err
	}
	var err error
	if deps.Keys, err = loadKeys(cfg.Keys, cfg.AllowUnsigned, deps.Log); err != nil {
		return nil, err
	}
	return notifier.New(cfg.Config, deps)
}

// checkPipelines returns an error where a file is missing that is not the default
// one.
func checkPipelines(cfg control.Notifier) error {
	usual := control.DefaultNotifier(daemon.Dirs())
	for file, usual := range map[string]string{cfg.Pipeline: usual.Pipeline, cfg.EventPipeline: usual.EventPipeline} {
		if file != "" && file != usual {
			if _, err := os.Stat(file); err != nil {
				return fmt.Errorf("read pipeline: %w", err)
			}
		}
	}
	return nil
}

// loadKeys reads the keys. A daemon without any would move every batch to the
// dead letters.
func loadKeys(dir string, allowUnsigned bool, log *zap.Logger) (*bus.Keyring, error) {
	keys, err := bus.NewKeyring(dir, log)
	if err == nil && keys.Len() == 0 && !allowUnsigned {
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
