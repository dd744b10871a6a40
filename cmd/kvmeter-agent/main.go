// Command kvmeter-agent meters the domains of a compute host and sends the
// samples to RabbitMQ.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/host"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
	"github.com/kvmeter/kvmeter/sample"
)

func main() {
	ctx, stop := daemon.Context(context.Background())
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var flags daemon.Flags
	var withoutBPF, dryRun bool
	var format string
	file := daemon.File("agent.yaml")
	c := &cobra.Command{
		Use:   "kvmeter-agent",
		Short: "Meters the domains of this host and sends the samples to RabbitMQ",
		Long: `kvmeter-agent meters every QEMU/KVM domain of this host: CPU time by thread class,
run-queue wait and disk bytes from the kernel's own accounting, read by BPF; network
from the kernel's link statistics; requests of the guests' disks from libvirt. It
sends one signed batch a poll to RabbitMQ.

It needs CAP_BPF and CAP_PERFMON (root has them) until its programs are loaded and
drops them then; without them it reads /proc instead. It needs no other right: of
libvirt, the read-only socket is enough.`,
		Example: `  kvmeter-agent --dry-run                  what would be sent, as a table
  kvmeter-agent --dry-run -f json
  kvmeter-agent --check-config
  KVMETER_AMQP__URL=amqp://kvmeter:secret@rabbit:5672/ kvmeter-agent`,
		Version:       daemon.Version(),
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := compute.DefaultAgent()
			if err := flags.Load(file, &cfg); err != nil {
				return err
			}
			cfg.Partitions = cfg.AMQP.Partitions
			if flags.Check {
				return errors.Join(config.Print(cmd.OutOrStdout(), &cfg), check(cfg))
			}
			if dryRun && !cmd.Flags().Changed("log-level") {
				flags.LogLevel = "error" // what is missing is printed as notes
			}
			if format != "table" && format != "json" {
				return fmt.Errorf("-f %s: it is table or json", format)
			}
			log, err := flags.Logger()
			if err != nil {
				return err
			}
			deps, done := host.Open(log, withoutBPF)
			if dryRun {
				err = collectOnce(cmd.Context(), cmd.OutOrStdout(), cfg, deps, format)
			} else {
				err = run(cmd.Context(), cfg, deps)
			}
			return errors.Join(err, done())
		},
	}
	c.SetFlagErrorFunc(daemon.FlagError)
	flags.Register(c.Flags(), file)
	c.Flags().BoolVar(&dryRun, "dry-run", false, "collect once, print the samples, send nothing")
	c.Flags().StringVarP(&format, "format", "f", "table", "of --dry-run: table or json")
	c.Flags().BoolVar(&withoutBPF, "without-bpf", false, "read processes from /proc only")
	return c
}

// check returns what the agent would refuse to start for.
func check(cfg compute.Agent) error {
	if err := host.CheckAgent(cfg.Config); err != nil {
		return err
	}
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter-agent", zap.NewNop())
	if err != nil {
		return err
	}
	amqp.Close()
	if cfg.Metrics == "" {
		return nil
	}
	return daemon.CheckAddress("metrics", cfg.Metrics)
}

func run(ctx context.Context, cfg compute.Agent, deps agent.Deps) error {
	registry := daemon.Registry()
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter-agent", deps.Log)
	if err != nil {
		return err
	}
	defer func() { amqp.Close() }()
	metrics, err := daemon.Metrics(cfg.Metrics, registry)
	if err != nil {
		return err
	}
	defer metrics.Close()
	deps.Publisher, deps.Registry = amqp, registry
	a, err := agent.New(cfg.Config, deps)
	if err != nil {
		return err
	}
	if err := a.DropCapabilities(ctx); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return metrics.Serve(ctx) })
	return g.Wait()
}

func collectOnce(ctx context.Context, out io.Writer, cfg compute.Agent, deps agent.Deps, format string) error {
	samples, gaps, notes, err := agent.DryRun(ctx, cfg.Config, deps)
	if err != nil {
		return err
	}
	for _, n := range notes {
		fmt.Fprintln(os.Stderr, "Note:", n)
	}
	for _, g := range gaps {
		if g.Resource == "*" {
			continue // the notes say it
		}
		fmt.Fprintf(os.Stderr, "Missing: %s of %s: %s\n", g.Meter, g.Resource, g.Reason)
	}
	if format == "json" {
		return printJSON(out, samples)
	}
	return printTable(out, samples)
}

func printTable(out io.Writer, samples []sample.Sample) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "RESOURCE\tMETER\tTYPE\tVOLUME\tUNIT\tORIGIN")
	for _, s := range samples {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", s.Resource, s.Name, s.Kind, s.Volume, s.Unit, s.Origin)
	}
	return w.Flush()
}

// jsonSample is a sample as --dry-run prints it, one a line.
type jsonSample struct {
	ID          string          `json:"id"`
	Meter       string          `json:"meter"`
	Type        sample.Kind     `json:"type"`
	Unit        string          `json:"unit"`
	Volume      json.Number     `json:"volume"`
	Resource    string          `json:"resource_id"`
	Project     string          `json:"project_id,omitempty"`
	User        string          `json:"user_id,omitempty"`
	Time        time.Time       `json:"timestamp"`
	Origin      sample.Origin   `json:"origin"`
	Incarnation string          `json:"incarnation"`
	Metadata    json.RawMessage `json:"metadata,omitempty"`
}

func printJSON(out io.Writer, samples []sample.Sample) error {
	e := json.NewEncoder(out)
	for _, s := range samples {
		if err := e.Encode(jsonSample{
			s.ID.String(), s.Name, s.Kind, s.Unit, json.Number(s.Volume.String()), s.Resource, s.Project, s.User,
			time.UnixMicro(s.Time).UTC(), s.Origin, s.Incarnation.String(), s.Metadata,
		}); err != nil {
			return err
		}
	}
	return nil
}
