package main

import (
	"context"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cli"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
)

// openDead gives a command the dead letters of the broker that the notifier's
// configuration names.
func openDead(c *cobra.Command) func() (cli.DeadLetters, func(), error) {
	var flags daemon.Flags
	file := daemon.File("notifier.yaml")
	flags.RegisterConfig(c.Flags(), file)
	return func() (cli.DeadLetters, func(), error) {
		cfg := control.DefaultNotifier(daemon.Dirs())
		if err := flags.Load(file, &cfg); err != nil {
			return nil, nil, err
		}
		amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter dead-letters", zap.NewNop())
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context, decide func(*cli.DeadLetter) (string, bool)) error {
			return amqp.DeadLetters(ctx, func(d *bus.DeadLetter) (bus.Fate, bool) {
				fate, more := decide(&cli.DeadLetter{
					Name: d.Name, Queue: d.Queue, Reason: d.Reason, Key: d.KeyID, RoutingKey: d.RoutingKey,
					ContentType: d.ContentType, ContentEncoding: d.ContentEncoding, Time: d.Time, Body: d.Body,
				})
				return map[string]bus.Fate{cli.KeepDead: bus.Keep, cli.RetryDead: bus.Retry, cli.DropDead: bus.Drop}[fate], more
			})
		}, amqp.Close, nil
	}
}
