// Package cli holds the commands that people type: tables of what the API
// stores, and the live view of a host's domains.
package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/central/client"
)

// Options are what the program tells its commands.
type Options struct {
	Socket string   // default path of the agent's socket, for the commands that ask it
	Others []string // where they also look for an agent, in this order
	// DeadLetters adds to a command the flags that say where the broker is, and
	// returns what opens its dead letters and what is to be called when they are
	// done with. nil: there is no such command.
	DeadLetters func(*cobra.Command) func() (DeadLetters, func(), error)
}

// Add adds the user's commands to the program, in the group of that id. Errors
// are for the caller to print: one sentence each.
func Add(root *cobra.Command, group string, o Options) {
	conn := newConnection()
	// As in the original client, flags about the API may stand before the command.
	conn.flags(root.PersistentFlags(), true)
	commands := []*cobra.Command{
		meterList(conn), sampleList(conn), sampleShow(conn), sampleCreate(conn), sampleCreateList(conn), querySamples(conn),
		statistics(conn), resourceList(conn), resourceShow(conn),
		eventList(conn), eventShow(conn), eventTypeList(conn), traitDescriptionList(conn), traitList(conn),
		gapList(conn), usage(conn), capabilities(conn), top(o), crosscheck(o), hooks(o),
	}
	if o.DeadLetters != nil {
		commands = append(commands, deadLetters(o))
	}
	for _, c := range commands {
		addCompletions(conn, c)
		c.GroupID = group
		root.AddCommand(c)
	}
	root.AddCommand(openStackHelp())
}

// asked asks the API and returns what is to be printed.
type asked func(context.Context, *client.Client, []string) (*table, error)

// listCommand is an apiCommand that may ask again and again.
func listCommand(conn *connection, c cobra.Command, run asked) *cobra.Command {
	return command(conn, &c, true, run)
}

// apiCommand makes a command that asks the API with run and prints the table
// that it returns.
func apiCommand(conn *connection, c cobra.Command, run asked) *cobra.Command {
	return command(conn, &c, false, run)
}

func command(conn *connection, cmd *cobra.Command, again bool, run asked) *cobra.Command {
	var out output
	cmd.SilenceUsage = true
	conn.flags(cmd.Flags(), false)
	out.flags(cmd)
	if again {
		cmd.Flags().DurationVar(&out.watch, "watch", 0, "ask again every so often, until Ctrl-C: --watch, or --watch=10s")
		cmd.Flags().Lookup("watch").NoOptDefVal = "2s"
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := out.check(); err != nil {
			return err
		}
		api, err := conn.open(cmd.Context(), cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		return out.repeat(cmd.Context(), cmd.OutOrStdout(), func(w io.Writer) error {
			t, err := run(cmd.Context(), api, args)
			if err != nil {
				return explain(err, api.Endpoint)
			}
			if err := out.print(w, t); err != nil {
				return err
			}
			if t.cut {
				cmd.PrintErrf("The API lists %d unless told otherwise, and there may be more: -l N lists N.\n", defaultLimit)
			}
			return nil
		})
	}
	return cmd
}

// oneID is the check of a command that wants one id.
func oneID(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 || args[0] == "" {
			return fmt.Errorf("%s wants the id of one %s, got %d arguments", cmd.Name(), what, len(args))
		}
		return nil
	}
}

// noArgs refuses arguments that are no flags.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		if _, err := time.ParseDuration(args[0]); err == nil && cmd.Flags().Changed("watch") {
			return fmt.Errorf("--watch %s: write --watch=%s", args[0], args[0])
		}
		return fmt.Errorf("%s takes no argument %q; see `%s --help`", cmd.Name(), args[0], cmd.CommandPath())
	}
	return nil
}
