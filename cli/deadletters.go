package cli

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

// DeadLetter is a message that nobody could take.
type DeadLetter struct {
	Name            string // its id, or what stands for it
	Queue           string // that it was in; empty: not known
	Reason          string
	Key             string // id of the key that signed it; empty: it is not signed
	RoutingKey      string
	ContentType     string
	ContentEncoding string
	Time            time.Time // when it was made; zero: not known
	Body            []byte
}

// DeadLetters calls decide with each dead letter, oldest first, until more is false, and
// carries out what it says.
type DeadLetters func(ctx context.Context, decide func(*DeadLetter) (fate string, more bool)) error

// The fates of a dead letter.
const (
	KeepDead  = "keep"
	RetryDead = "retry" // it goes back to its queue
	DropDead  = "drop"
)

func deadLetters(o Options) *cobra.Command {
	c := &cobra.Command{
		Use:   "dead-letters",
		Short: "List, show, retry and drop the messages that nobody could take",
		Long: `A message that a notifier or central can never take (unsigned, malformed, of
another node than its key) is moved to the queue kvmeter.dead with the reason. It
stays there until it is retried, which puts it back into its queue, or dropped.`,
	}
	c.AddCommand(deadList(o), deadShow(o), deadSettle(o, RetryDead), deadSettle(o, DropDead))
	return c
}

func deadList(o Options) *cobra.Command {
	var out output
	var limit limit
	c := &cobra.Command{
		Use:     "list",
		Short:   "List the messages that nobody could take, oldest first",
		Example: "  kvmeter dead-letters list\n  kvmeter dead-letters list -l 1000 -f json",
		Args:    noArgs, SilenceUsage: true,
	}
	open := o.DeadLetters(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := out.check(); err != nil {
			return err
		}
		t := newTable("ID", "Time", "Queue", "Key", "Bytes", "Reason")
		n := int(limit)
		if n == 0 {
			n = defaultLimit
		}
		more := false
		err := visit(cmd, open, func(d *DeadLetter) (string, bool) {
			if len(t.rows) == n {
				more = true
				return KeepDead, false
			}
			t.add(text(d.Name), timeCell(d.Time), text(d.Queue), text(d.Key), number(json.Number(strconv.Itoa(len(d.Body)))), text(d.Reason))
			return KeepDead, true
		})
		if err != nil {
			return err
		}
		if more {
			cmd.PrintErrf("There are more than these %d: -l N lists N.\n", n)
		}
		return out.print(cmd.OutOrStdout(), t)
	}
	out.flags(c)
	c.Flags().VarP(&limit, "limit", "l", "at most `N` rows (100)")
	return c
}

func timeCell(t time.Time) cell {
	if t.IsZero() {
		return null
	}
	return text(t.UTC().Format("2006-01-02T15:04:05"))
}

// visit calls decide with the dead letters.
func visit(cmd *cobra.Command, open func() (DeadLetters, func(), error), decide func(*DeadLetter) (string, bool)) error {
	letters, done, err := open()
	if err != nil {
		return err
	}
	defer done()
	return letters(cmd.Context(), decide)
}

func deadShow(o Options) *cobra.Command {
	var out output
	c := &cobra.Command{
		Use:   "show ID",
		Short: "Show one message that nobody could take",
		Long: `Show one message that nobody could take, with its body: as it is where that is
text, else in base64 (a batch is msgpack under zstd).`,
		Example: "  kvmeter dead-letters show 019aca5e-27f4-8b1d-9f2c-5f0e6a7d0000 -f json",
		Args:    oneID("message"), SilenceUsage: true,
	}
	open := o.DeadLetters(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := out.check(); err != nil {
			return err
		}
		var found *table
		err := visit(cmd, open, func(d *DeadLetter) (string, bool) {
			if d.Name != args[0] {
				return KeepDead, true
			}
			body := base64.StdEncoding.EncodeToString(d.Body)
			if d.ContentEncoding == "" || d.ContentEncoding == "utf-8" {
				body = string(d.Body)
			}
			found = show([]property{
				{"id", text(d.Name)},
				{"time", timeCell(d.Time)},
				{"queue", text(d.Queue)},
				{"reason", text(d.Reason)},
				{"key", text(d.Key)},
				{"routing_key", text(d.RoutingKey)},
				{"content_type", text(d.ContentType)},
				{"content_encoding", text(d.ContentEncoding)},
				{"body", text(body)},
			})
			return KeepDead, false
		})
		if err == nil && found == nil {
			err = errNoDead(args)
		}
		if err != nil {
			return err
		}
		return out.print(cmd.OutOrStdout(), found)
	}
	out.flags(c)
	return c
}

func errNoDead(ids []string) error {
	if len(ids) == 1 {
		return fmt.Errorf("there is no dead letter %s", ids[0])
	}
	return fmt.Errorf("there are no dead letters %v", ids)
}

// deadSettle is the command that retries or drops.
func deadSettle(o Options, fate string) *cobra.Command {
	words := map[string][2]string{
		RetryDead: {"Put messages back into the queue they came from", "retried"},
		DropDead:  {"Delete messages for good", "dropped"},
	}[fate]
	var all bool
	c := &cobra.Command{
		Use:     fate + " ID... | --all",
		Short:   words[0],
		Example: fmt.Sprintf("  kvmeter dead-letters %[1]s 019aca5e-27f4-8b1d-9f2c-5f0e6a7d0000\n  kvmeter dead-letters %[1]s --all", fate),
		Args: func(_ *cobra.Command, ids []string) error {
			if all == (len(ids) > 0) {
				return fmt.Errorf("%s takes the ids of messages, or --all", fate)
			}
			return nil
		},
		SilenceUsage: true,
	}
	open := o.DeadLetters(c)
	c.RunE = func(cmd *cobra.Command, ids []string) error {
		n := 0
		missing := slices.Clone(ids)
		err := visit(cmd, open, func(d *DeadLetter) (string, bool) {
			if !all && !slices.Contains(ids, d.Name) {
				return KeepDead, true
			}
			n++
			missing = slices.DeleteFunc(missing, func(id string) bool { return id == d.Name })
			return fate, true
		})
		if err == nil && len(missing) > 0 {
			err = errNoDead(missing)
		}
		_, printed := fmt.Fprintf(cmd.OutOrStdout(), "%d %s\n", n, words[1])
		return errors.Join(err, printed)
	}
	c.Flags().BoolVar(&all, "all", false, "all there are now")
	return c
}
