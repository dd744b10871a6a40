// Package cli holds the commands that people type: tables of what the API
// stores, and the live view of a host's domains.
package cli

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/central/client"
)

// DefaultEndpoint is where kvmeter's API listens unless it is told otherwise.
const DefaultEndpoint = "http://127.0.0.1:8777"

// EndpointEnv is the environment variable that names another API.
const EndpointEnv = "KVMETER_ENDPOINT"

// Options are what the program tells its commands.
type Options struct {
	Socket string   // default path of the agent's socket, for top
	Others []string // where top also looks for an agent, in this order
}

// Commands returns the user's commands. Errors are for the caller to print:
// one sentence each.
func Commands(o Options) []*cobra.Command {
	return []*cobra.Command{
		meterList(), sampleList(), sampleShow(), statistics(), resourceList(), resourceShow(), gapList(), top(o),
	}
}

// query is what the commands that ask the API have in common.
type query struct {
	endpoint string
	output   output
}

// apiCommand makes a command that asks the API with run and prints the table
// that it returns.
func apiCommand(c cobra.Command, run func(context.Context, *client.Client, []string) (*table, error)) *cobra.Command {
	q := &query{}
	cmd := &c
	cmd.SilenceUsage = true
	cmd.Flags().StringVar(&q.endpoint, "endpoint", endpoint(), "`URL` of the API; "+EndpointEnv+" sets it as well")
	cmd.Flags().StringVar(&q.endpoint, "os-endpoint", endpoint(), "")
	if err := cmd.Flags().MarkHidden("os-endpoint"); err != nil {
		panic(err) // the flag is defined one line above
	}
	q.output.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := q.output.check(); err != nil {
			return err
		}
		address := q.endpoint
		if !strings.Contains(address, "://") {
			address = "http://" + address
		}
		t, err := run(cmd.Context(), &client.Client{Endpoint: address}, args)
		if err != nil {
			return explain(err, address)
		}
		if err := q.output.print(cmd.OutOrStdout(), t); err != nil {
			return err
		}
		if t.cut {
			cmd.PrintErrf("The API lists %d unless told otherwise, and there may be more: -l N lists N.\n", defaultLimit)
		}
		return nil
	}
	return cmd
}

func endpoint() string {
	if e := os.Getenv(EndpointEnv); e != "" {
		return e
	}
	return DefaultEndpoint
}

// explain says what to do where the API could not be reached.
func explain(err error, address string) error {
	var unreachable *url.Error
	if !errors.As(err, &unreachable) {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return context.Canceled
	}
	return fmt.Errorf("cannot reach kvmeter's API at %s (%s): is `kvmeter up` or `kvmeter central` running? --endpoint or %s names another address", address, reason(unreachable.Err), EndpointEnv)
}

// reason returns the system's own words for an error where there are any.
func reason(err error) string {
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
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
		return fmt.Errorf("%s takes no argument %q; see `%s --help`", cmd.Name(), args[0], cmd.CommandPath())
	}
	return nil
}
