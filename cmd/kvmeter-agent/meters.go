package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
)

func metersCommand() *cobra.Command {
	var flags daemon.Flags
	var format string
	var all bool
	file := daemon.File("agent.yaml")
	c := &cobra.Command{
		Use:   "meters",
		Short: "List the meters that the configuration and polling.yaml ask for, and how often",
		Long: `Meters lists what an agent of this configuration polls: each meter with its type,
unit, interval and who can count it, best first. It reads the configuration only;
doctor says what this host lacks for it.`,
		Example: `  kvmeter-agent meters
  kvmeter-agent meters --all
  kvmeter-agent meters -f json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("-f %s: it is table or json", format)
			}
			cfg := compute.DefaultAgent()
			if err := flags.Load(file, &cfg); err != nil {
				return err
			}
			cfg.Partitions = cfg.AMQP.Partitions
			plans, notes, err := agent.Plans(cfg.Config)
			if err != nil {
				return err
			}
			for _, n := range notes {
				fmt.Fprintln(cmd.ErrOrStderr(), "Note:", n)
			}
			return (&printer{out: cmd.OutOrStdout(), json: format == "json"}).meters(plans, all)
		},
	}
	c.SetFlagErrorFunc(daemon.FlagError)
	flags.RegisterConfig(c.Flags(), file)
	c.Flags().StringVarP(&format, "format", "f", "table", "table or json")
	c.Flags().BoolVar(&all, "all", false, "list meters that are not polled, too")
	return c
}

// polledMeter is a meter as -f json prints it.
type polledMeter struct {
	Meter     string    `json:"meter"`
	Type      string    `json:"type"`
	Unit      string    `json:"unit"`
	Resource  string    `json:"resource"`
	Intervals []float64 `json:"intervals"` // in seconds; none: it is not polled
	Origins   []string  `json:"origins"`
	QEMU      bool      `json:"asks_qemu"`
	Help      string    `json:"help"`
}

// meters prints plans, those of meters that are not polled only with all.
func (p *printer) meters(plans []agent.MeterPlan, all bool) error {
	rows := [][]string{{"METER", "TYPE", "UNIT", "RESOURCE", "EVERY", "ORIGINS"}}
	list := []polledMeter{}
	for _, m := range plans {
		if len(m.Intervals) == 0 && !all {
			continue
		}
		v := polledMeter{Meter: m.Name, Type: string(m.Kind), Unit: m.Unit, Resource: m.Resource, Intervals: []float64{}, Origins: []string{}, QEMU: m.QEMU, Help: m.Help}
		var every []string
		for _, d := range m.Intervals {
			v.Intervals = append(v.Intervals, d.Seconds())
			every = append(every, d.String())
		}
		for _, o := range m.Origins {
			v.Origins = append(v.Origins, string(o))
		}
		name := m.Name
		if m.Parts != "" {
			name += ".*"
		}
		rows = append(rows, []string{name, v.Type, v.Unit, v.Resource, strings.Join(every, ", "), strings.Join(v.Origins, ", ")})
		list = append(list, v)
	}
	if p.json {
		return p.value(list)
	}
	return p.table(rows)
}
