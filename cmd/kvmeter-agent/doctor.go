package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/agent/client"
	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/host"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
)

func doctorCommand() *cobra.Command {
	var flags daemon.Flags
	var format, socket string
	var withoutBPF, cost bool
	var during time.Duration
	file := daemon.File("agent.yaml")
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this host offers, what is missing and which meters that costs",
		Long: `Doctor tries what the agent would use on this host, as this user: the kernel's BPF,
the hooks, netlink, libvirt, and the configuration. It attaches nothing and leaves
nothing.

With --cost it has the kernel time the BPF programs of the agent that runs on this
host, for some seconds: how often each runs and how long. That takes root, and
each run of any BPF program on the host costs some 20 to 40 ns more meanwhile.`,
		Example: `  kvmeter-agent doctor
  kvmeter-agent doctor --cost --for 10s
  kvmeter-agent doctor -f json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("-f %s: it is table or json", format)
			}
			cfg := compute.DefaultAgent()
			if err := flags.Load(file, &cfg); err != nil {
				return err
			}
			p := &printer{out: cmd.OutOrStdout(), json: format == "json"}
			if !cost {
				cfg.Partitions = cfg.AMQP.Partitions
				err := check(cfg)
				parts := []host.Part{host.Configuration(cmp.Or(flags.Config, "the defaults"), err, cfg.Notes)}
				return p.parts(append(parts, host.Examine(cmd.Context(), zap.NewNop(), cfg.Config, withoutBPF)...))
			}
			if socket == "" {
				socket = cfg.Socket
			}
			return p.costs(cmd.Context(), client.Client{Path: socket}, during)
		},
	}
	c.SetFlagErrorFunc(daemon.FlagError)
	flags.RegisterConfig(c.Flags(), file)
	c.Flags().StringVarP(&format, "format", "f", "table", "table or json")
	c.Flags().BoolVar(&withoutBPF, "without-bpf", false, "as the agent with this flag")
	c.Flags().BoolVar(&cost, "cost", false, "measure what the BPF programs of the running agent cost")
	c.Flags().DurationVar(&during, "for", 5*time.Second, "of --cost: how long to measure")
	c.Flags().StringVar(&socket, "socket", "", "of --cost: the agent's socket (default: the setting)")
	return c
}

// parts prints what the host offers. Reasons and meters stand below the table,
// which they would not fit.
func (p *printer) parts(parts []host.Part) error {
	if p.json {
		return p.value(parts)
	}
	rows := [][]string{{"PART", "STATE", "BY"}}
	for _, part := range parts {
		rows = append(rows, []string{part.Name, part.State, part.By})
	}
	if err := p.table(rows); err != nil {
		return err
	}
	for _, part := range parts {
		if part.Why != "" {
			fmt.Fprintf(p.out, "\n%s: %s\n", part.Name, part.Why)
		}
		if len(part.Costs) > 0 {
			fmt.Fprintf(p.out, "  which costs: %s\n", strings.Join(part.Costs, ", "))
		}
	}
	return nil
}

// programCost is a program's cost as -f json prints it.
type programCost struct {
	Program string  `json:"program"`
	Runs    float64 `json:"runs_per_second"`
	Run     float64 `json:"ns_per_run"`
	Core    float64 `json:"percent_of_a_core"`
	Misses  uint64  `json:"misses"`
}

func (p *printer) costs(ctx context.Context, agent client.Client, during time.Duration) error {
	if during <= 0 {
		return errors.New("--for must be more than 0")
	}
	pid, err := agent.PID()
	if err != nil {
		return fmt.Errorf("%w: --cost measures an agent that runs; start one, or name its socket with --socket", err)
	}
	start := time.Now()
	programs, err := bpf.MeasureCost(ctx, pid, during)
	if err != nil {
		return err
	}
	seconds := time.Since(start).Seconds()
	costs := make([]programCost, 0, len(programs))
	for _, c := range programs {
		cost := programCost{Program: c.Name, Runs: float64(c.Runs) / seconds, Core: c.Time.Seconds() / seconds * 100, Misses: c.Misses}
		if c.Runs > 0 {
			cost.Run = float64(c.Time.Nanoseconds()) / float64(c.Runs)
		}
		costs = append(costs, cost)
	}
	if p.json {
		return p.value(costs)
	}
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "PROGRAM\tRUNS/S\tNS/RUN\t% OF A CORE\tMISSES\t")
	for _, c := range costs {
		fmt.Fprintf(w, "%s\t%.1f\t%.0f\t%.4f\t%s\t\n", c.Program, c.Runs, c.Run, c.Core, strconv.FormatUint(c.Misses, 10))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.out, "\nNS/RUN includes what timing a run costs, some 20 to 40 ns.")
	return err
}
