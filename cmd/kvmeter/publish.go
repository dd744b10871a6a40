package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

func publishCommand() *cobra.Command {
	var t trial
	c := &cobra.Command{
		Use:   "publish URL < samples.json",
		Short: "Try a publisher: send samples or events to it",
		Long: `Reads samples or events as JSON and gives them to the publisher of a URL, as it
would stand in pipeline.yaml. A JSON list is one batch, and so is an object by
itself. Nothing is tried again or spooled: it ends with the publisher's error.

What the notifier's configuration says of its name, the broker and the secrets
holds here, too.`,
		Example: `  kvmeter publish file:///tmp/samples.jsonl?json < samples.json
  kvmeter publish 'https://user:password@billing/samples?timeout=10' < samples.json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := pipeline.ParseURL(args[0])
			if err != nil {
				return err
			}
			return t.run(cmd, func(d publisher.Deps) error {
				p, _, err := publisher.Open(all.Publishers, u, d)
				if err != nil {
					return err
				}
				err = publishAll(cmd.Context(), p, cmd.InOrStdin(), d.Name)
				return errors.Join(err, p.Close())
			})
		},
	}
	t.register(c.Flags())
	return c
}

// trial is what commands need that publish.
type trial struct{ flags daemon.Flags }

func (t *trial) register(fs *pflag.FlagSet) {
	fs.StringVar(&t.flags.Config, "config", "", "the notifier's configuration file (default "+daemon.File("notifier.yaml")+", if it is there)")
}

// load returns the notifier's configuration.
func (t *trial) load() (control.Notifier, error) {
	cfg := control.DefaultNotifier(daemon.Dirs())
	return cfg, t.flags.Load(daemon.File("notifier.yaml"), &cfg)
}

// run calls f with what publishers need.
func (t *trial) run(cmd *cobra.Command, f func(publisher.Deps) error) error {
	cfg, err := t.load()
	if err != nil {
		return err
	}
	secret, err := cfg.TelemetrySecret()
	if err != nil {
		return err
	}
	t.flags.LogLevel, t.flags.LogFormat = "warn", "console"
	log, err := t.flags.Logger()
	if err != nil {
		return err
	}
	keys, err := loadKeys(cfg.Keys, true, log)
	if err != nil {
		return err
	}
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter "+cmd.Name(), log)
	if err != nil {
		return err
	}
	defer amqp.Close()
	return f(publisher.Deps{
		Log: log, Bus: amqp, Name: cfg.Name, Keys: keys, Partitions: cfg.AMQP.Partitions, AMQP: cfg.AMQP, TelemetrySecret: secret,
	})
}

// publishAll gives a publisher what a stream of JSON holds, batch by batch. A sample
// or an event that is wrong costs itself only; the error says so.
func publishAll(ctx context.Context, p publisher.Publisher, in io.Reader, node string) error {
	var bad []error
	err := wire.ReadBatches(in, false, func(raw []json.RawMessage) error {
		if len(raw) == 0 {
			return nil
		}
		if isEvent(raw[0]) {
			return publishEvents(ctx, p, parsed(raw, sample.ParseEvent, &bad))
		}
		samples := parsed(raw, sample.ParseForeign, &bad)
		for _, b := range pipeline.Batches(samples, node, time.Now()) {
			whole := *b // what is published is signed anew
			if err := p.Publish(ctx, []publisher.Part{{From: &whole, Batch: b}}); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(append(bad, err)...)
}

// parsed returns what is good of a batch, and adds what is not to bad.
func parsed[T any](raw []json.RawMessage, parse func([]byte) (T, error), bad *[]error) (all []T) {
	for _, text := range raw {
		if v, err := parse(text); err != nil {
			*bad = append(*bad, err)
		} else {
			all = append(all, v)
		}
	}
	return all
}

func isEvent(raw json.RawMessage) bool {
	var e struct {
		Type string `json:"event_type"`
	}
	return json.Unmarshal(raw, &e) == nil && e.Type != ""
}

func publishEvents(ctx context.Context, p publisher.Publisher, events []sample.Event) error {
	to, ok := p.(publisher.EventPublisher)
	if !ok {
		return errors.New("this publisher takes samples only")
	}
	if len(events) == 0 {
		return nil
	}
	return to.PublishEvents(ctx, events)
}
