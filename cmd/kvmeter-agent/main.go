// Command kvmeter-agent meters the domains of a compute host and sends the
// samples to RabbitMQ.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/agent/ceilometer"
	"github.com/kvmeter/kvmeter/agent/exporter"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/host"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
	"github.com/kvmeter/kvmeter/sample"
)

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

It needs CAP_BPF and CAP_PERFMON, and CAP_NET_ADMIN for the hook tcx (root has them),
until its programs are loaded and drops them then; without them it reads /proc
instead. It needs no other right: of libvirt, the read-only socket is enough.`,
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
				for _, n := range cfg.Notes {
					fmt.Fprintln(cmd.ErrOrStderr(), "Note:", n)
				}
				return errors.Join(flags.Print(cmd.OutOrStdout(), &cfg), check(cfg))
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
			deps, done := host.Open(log, cfg.Profile, withoutBPF)
			if dryRun {
				err = collectOnce(cmd.Context(), cmd.OutOrStdout(), cfg, deps, format)
			} else {
				closeLife := func() error { return nil }
				if !withoutBPF {
					closeLife = host.OpenLife(&deps, cfg.Config)
				}
				load := func() (compute.Agent, error) {
					again := compute.DefaultAgent()
					err := flags.Load(file, &again)
					again.Partitions = again.AMQP.Partitions
					return again, err
				}
				err = errors.Join(run(cmd.Context(), cfg, deps, load), closeLife())
			}
			return errors.Join(err, done())
		},
	}
	c.SetFlagErrorFunc(daemon.FlagError)
	flags.Register(c.Flags(), file)
	c.Flags().BoolVar(&dryRun, "dry-run", false, "collect once, print the samples, send nothing")
	c.Flags().StringVarP(&format, "format", "f", "table", "of --dry-run: table or json")
	c.Flags().BoolVar(&withoutBPF, "without-bpf", false, "read processes from /proc only")
	c.AddCommand(ipmiCommand(openBMC), doctorCommand(), metersCommand())
	return c
}

// check returns what the agent would refuse to start for.
func check(cfg compute.Agent) error {
	if err := cfg.Check(); err != nil {
		return err
	}
	if err := host.CheckAgent(cfg.Config); err != nil {
		return err
	}
	_, done, err := openBus(cfg, zap.NewNop(), prometheus.NewRegistry())
	if err != nil {
		return err
	}
	done()
	for _, addr := range cfg.Exporter.Listen {
		if err := daemon.CheckAddress("exporter.listen", addr); err != nil {
			return err
		}
	}
	return daemon.CheckMetrics(cfg.Metrics, cfg.MetricsWebConfig)
}

// run meters until ctx ends. load loads the configuration anew.
func run(ctx context.Context, cfg compute.Agent, deps agent.Deps, load func() (compute.Agent, error)) error {
	if err := errors.Join(daemon.Harden(), cfg.Check()); err != nil {
		return err
	}
	tell(deps.Log, cfg)
	registry := daemon.Registry()
	publisher, done, err := openBus(cfg, deps.Log, registry)
	if err != nil {
		return err
	}
	defer done()
	metrics, err := daemon.Metrics(cfg.Metrics, cfg.MetricsWebConfig, registry)
	if err != nil {
		return err
	}
	defer metrics.Close()
	deps.Publisher, deps.Registry = publisher, registry
	samples := exporter.New(nil)
	pages, err := openExporter(cfg.Exporter, samples)
	defer func() {
		for _, p := range pages {
			p.Close()
		}
	}()
	if err != nil {
		return err
	}
	if len(pages) > 0 {
		deps.Observe = samples.Observe
	}
	a, err := agent.New(cfg.Config, deps)
	if err != nil {
		return err
	}
	if err := a.DropCapabilities(ctx); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error {
		return daemon.OnHangup(ctx, deps.Log, func() error { return reload(ctx, deps.Log, a, &cfg, load) })
	})
	for _, p := range append(pages, metrics) {
		g.Go(func() error { return p.Serve(ctx) })
	}
	g.Go(func() error { return daemon.Notify(ctx, deps.Log, a.Stuck) })
	return g.Wait()
}

// tell logs what the configuration asks for in vain.
func tell(log *zap.Logger, cfg compute.Agent) {
	for _, n := range cfg.Notes {
		log.Warn("ceilometer_conf", zap.String("note", n))
	}
}

// reload has the agent take over what its configuration and polling.yaml say now,
// whole or not at all. cfg is what holds.
func reload(ctx context.Context, log *zap.Logger, a *agent.Agent, cfg *compute.Agent, load func() (compute.Agent, error)) error {
	again, err := load()
	var changed, changes []string
	if err == nil {
		err = check(again)
	}
	if err == nil {
		changed, err = compute.Changed(cfg, &again)
	}
	fixed := slices.DeleteFunc(slices.Clone(changed), func(key string) bool { return slices.Contains(agent.Reloadable, key) })
	if err == nil && len(fixed) > 0 {
		err = fmt.Errorf("%s: takes a restart of the agent; without it only %s and the files that they name can be changed", strings.Join(fixed, ", "), strings.Join(agent.Reloadable, ", "))
	}
	if err == nil {
		changes, err = a.Reload(ctx, again.Config)
	}
	if err != nil {
		return err
	}
	*cfg = again
	tell(log, again)
	log.Info("configuration reloaded", zap.Strings("settings", changed), zap.Strings("polling", changes))
	return nil
}

// openBus returns the bus of the configured wire, not connected yet.
func openBus(cfg compute.Agent, log *zap.Logger, reg prometheus.Registerer) (p bus.Publisher, done func(), err error) {
	switch cfg.Wire {
	case compute.Off:
		return nowhere{}, func() {}, nil
	case compute.Kvmeter:
		amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter-agent", log)
		if err != nil {
			return nil, nil, err
		}
		reg.MustRegister(amqp.Metrics())
		return amqp, amqp.Close, nil
	}
	amqp, err := ceilometer.NewBus(cfg.Ceilometer, cfg.AMQP, log)
	if err != nil {
		return nil, nil, err
	}
	reg.MustRegister(amqp.Metrics())
	if p, err = ceilometer.New(cfg.Ceilometer, amqp, log, reg); err != nil {
		amqp.Close()
	}
	return p, amqp.Close, err
}

// nowhere is the bus of an agent that sends nothing.
type nowhere struct{}

// Publish implements [bus.Publisher].
func (nowhere) Publish(context.Context, ...bus.Message) error { return nil }

// openExporter opens the pages of samples.
func openExporter(cfg compute.Exporter, samples http.Handler) (pages []*daemon.Page, err error) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", samples)
	for _, addr := range cfg.Listen {
		p, err := daemon.Open("the page of samples", "exporter.listen", addr, mux)
		if err != nil {
			return pages, err
		}
		pages = append(pages, p)
		if cfg.TLSCert != "" || cfg.TLSKey != "" {
			if err := p.UseTLS(cfg.TLSCert, cfg.TLSKey); err != nil {
				return pages, err
			}
		}
	}
	return pages, nil
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
