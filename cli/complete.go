package cli

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/central/client"
)

// Bounds of what a shell waits for and shows while somebody types.
const (
	completeWithin = 2 * time.Second
	maxCompletions = 1000
)

// completions are the values of flags that a shell can offer.
var completions = map[string]func(*connection) cobra.CompletionFunc{
	"format":      fixed(formats...),
	"unique":      fixed("True", "False"),
	"meter-type":  fixed("gauge", "delta", "cumulative"),
	"meter":       listed(meterNames),
	"meter-name":  listed(meterNames),
	"resource":    listed(resourceIDs),
	"resource-id": listed(resourceIDs),
	"event_type": listed(func(ctx context.Context, c *client.Client, _ *cobra.Command) ([]string, error) {
		return c.EventTypes(ctx)
	}),
	"trait_name": listed(func(ctx context.Context, c *client.Client, cmd *cobra.Command) ([]string, error) {
		traits, err := c.TraitDescriptions(ctx, cmd.Flag("event_type").Value.String())
		names := make([]string, len(traits))
		for i, t := range traits {
			names[i] = t.Name
		}
		return names, err
	}),
}

// addCompletions tells shells what may follow the command's flags, and that no
// argument is a file.
func addCompletions(conn *connection, cmd *cobra.Command) {
	for name, complete := range completions {
		if cmd.Flag(name) != nil {
			_ = cmd.RegisterFlagCompletionFunc(name, complete(conn)) // an error only for what is no flag
		}
	}
	if cmd.ValidArgsFunction == nil {
		cmd.ValidArgsFunction = cobra.NoFileCompletions
	}
}

func fixed(values ...string) func(*connection) cobra.CompletionFunc {
	return func(*connection) cobra.CompletionFunc {
		return cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
	}
}

// listed offers what the API lists. Where it does not answer in time, nothing is
// offered and nothing is said: somebody is typing.
func listed(list func(context.Context, *client.Client, *cobra.Command) ([]string, error)) func(*connection) cobra.CompletionFunc {
	return func(conn *connection) cobra.CompletionFunc {
		return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			ctx, cancel := context.WithTimeout(cmd.Context(), completeWithin)
			defer cancel()
			api, err := conn.open(ctx, io.Discard)
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			names, err := list(ctx, api, cmd)
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var plain []string
			for _, name := range names {
				if printable(name) == name { // others would change the terminal
					plain = append(plain, name)
				}
			}
			return plain, cobra.ShellCompDirectiveNoFileComp
		}
	}
}

func meterNames(ctx context.Context, c *client.Client, _ *cobra.Command) ([]string, error) {
	meters, err := c.Meters(ctx, nil, maxCompletions, true)
	names := make([]string, len(meters))
	for i, m := range meters {
		names[i] = m.Name
	}
	return names, err
}

func resourceIDs(ctx context.Context, c *client.Client, _ *cobra.Command) ([]string, error) {
	resources, err := c.Resources(ctx, nil, maxCompletions)
	ids := make([]string, len(resources))
	for i, r := range resources {
		ids[i] = r.ID
	}
	return ids, err
}
