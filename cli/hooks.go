package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/agent/client"
)

func hooks(o Options) *cobra.Command {
	var out output
	socket := o.Socket
	cmd := &cobra.Command{
		Use:   "hooks [on|off HOOK]",
		Short: "List the BPF hooks of this host's agent, or switch one on or off",
		Long: `List the BPF hooks of the agent on this host: whether each is attached, what it
has counted, and what it missed. A hook runs whenever its event happens, so it
costs something each time; docs/cost.md says what.

on and off switch a hook until the agent ends; the settings profile and hooks
say what holds from its start.`,
		Example: `  kvmeter hooks
  kvmeter hooks off disk
  kvmeter hooks -f json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 || len(args) == 2 && (args[0] == "on" || args[0] == "off") {
				return nil
			}
			return errors.New("hooks takes nothing, or on or off and the name of a hook")
		},
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			sockets := o.sockets(cmd, socket)
			agent := client.Client{Path: answered(sockets)}
			if len(args) == 2 {
				if err := agent.Switch(cmd.Context(), args[1], args[0] == "on"); err != nil {
					return explainAgent(err, agent.Path, sockets)
				}
			}
			list, err := agent.Hooks(cmd.Context())
			if err != nil {
				return explainAgent(err, agent.Path, sockets)
			}
			t := newTable("Hook", "On", "Events", "Misses", "Dropped", "Orphans", "Map", "Fault")
			for _, h := range list {
				on := "off"
				if h.On {
					on = "on"
				}
				t.add(text(h.Name), text(on), uintCell(h.Events), uintCell(h.Misses), uintCell(h.Dropped), uintCell(h.Orphans),
					text(fmt.Sprintf("%d of %d", h.Entries, h.MaxEntries)), text(h.Fault))
			}
			return out.print(cmd.OutOrStdout(), t)
		},
	}
	socketFlag(cmd, &socket)
	out.flags(cmd)
	return cmd
}
