package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/central/client"
)

func eventList(conn *connection) *cobra.Command {
	var q string
	var l limit
	var noTraits, all bool
	cmd := listCommand(conn, cobra.Command{
		Use:   "event-list",
		Short: "List events, oldest first",
		Long: `List events, oldest first.

A query (-q) is a list of terms, separated by ";", that must all hold. A term
is FIELD OP VALUE, with OP one of = != < <= > >=. Fields are event_type, message_id,
start_timestamp (from, with >=), end_timestamp (until, with <=) and names of
traits. A VALUE for a trait may name its type: string::, integer::, float:: or
datetime::.`,
		Example: `  kvmeter event-list -l 10
  kvmeter event-list -q 'event_type=compute.instance.create.end;start_timestamp>=2026-01-01' --no-traits
  kvmeter event-list -q 'vcpus>=integer::4' -f json
  kvmeter event-list --all-projects`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		terms, err := parseQuery(q)
		if err != nil {
			return nil, err
		}
		events, err := c.Events(ctx, terms, int(l), all)
		if err != nil {
			return nil, ownEvents(err, all)
		}
		columns := []string{"Message ID", "Event Type", "Generated", "Traits"}
		if noTraits {
			columns = columns[:3]
		}
		t := newTable(columns...)
		for i := range events {
			e := &events[i]
			t.add([]cell{text(e.ID), text(e.Type), text(e.Generated), traitsCell(e.Traits)}[:len(columns)]...)
		}
		return l.mark(t), nil
	})
	queryFlag(cmd, &q)
	limitFlag(cmd, &l)
	cmd.Flags().BoolVar(&noTraits, "no-traits", false, "without the events' traits")
	allProjectsFlag(cmd, &all)
	return cmd
}

// allProjectsFlag is the flag of commands about events, of which also who sees
// every project is shown only some.
func allProjectsFlag(cmd *cobra.Command, all *bool) {
	cmd.Flags().BoolVar(all, "all-projects", false, "for admins: of every project, not only yours")
}

// ownEvents says what can be done where the API lists nobody's events.
func ownEvents(err error, all bool) error {
	if denied := (*client.Error)(nil); !all && errors.As(err, &denied) && denied.Status == http.StatusForbidden {
		return fmt.Errorf("%w: events are those of a user in a project; who sees every project asks with --all-projects", err)
	}
	return err
}

func eventShow(conn *connection) *cobra.Command {
	var all bool
	cmd := apiCommand(conn, cobra.Command{
		Use:     "event-show ID",
		Short:   "Show one event",
		Example: "  kvmeter event-show 4f6b4ea1-6a5c-4b52-9ba7-b8a5c0f8f7f1\n  kvmeter event-show 4f6b4ea1-6a5c-4b52-9ba7-b8a5c0f8f7f1 -f json",
		Args:    oneID("event"),
	}, func(ctx context.Context, c *client.Client, args []string) (*table, error) {
		e, err := c.Event(ctx, args[0], all)
		if err != nil {
			return nil, ownEvents(err, all)
		}
		raw := cell{text: string(e.Raw), json: e.Raw}
		if len(e.Raw) == 0 {
			raw = null
		}
		return show([]property{
			{"event_type", text(e.Type)},
			{"generated", text(e.Generated)},
			{"raw", raw},
			{"traits", traitsCell(e.Traits)},
		}), nil
	})
	allProjectsFlag(cmd, &all)
	return cmd
}

// traitsCell is a table in a cell.
func traitsCell(traits []client.Trait) cell {
	if traits == nil {
		traits = []client.Trait{}
	}
	nested := newTable("name", "type", "value")
	words := make([]string, len(traits))
	for i, t := range traits {
		nested.add(text(t.Name), text(t.Type), text(t.Value))
		words[i] = t.Name + "=" + t.Value
	}
	c := jsonCell(strings.Join(words, ", "), traits)
	if len(traits) > 0 {
		c.nested = nested
	}
	return c
}

func eventTypeList(conn *connection) *cobra.Command {
	return listCommand(conn, cobra.Command{
		Use:     "event-type-list",
		Short:   "List the types of events that there are",
		Example: "  kvmeter event-type-list\n  kvmeter event-type-list -f value",
		Args:    noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		types, err := c.EventTypes(ctx)
		if err != nil {
			return nil, err
		}
		t := newTable("Event Type")
		for _, name := range types {
			t.add(text(name))
		}
		return t, nil
	})
}

// eventTypeFlag is the flag of commands about the traits of a type of events.
func eventTypeFlag(cmd *cobra.Command, eventType *string) {
	cmd.Flags().StringVarP(eventType, "event_type", "e", "", "`TYPE` of the events; `kvmeter event-type-list` lists them")
}

var errNoEventType = errors.New("it wants the type of events: -e TYPE; `kvmeter event-type-list` lists them")

func traitDescriptionList(conn *connection) *cobra.Command {
	var eventType string
	cmd := listCommand(conn, cobra.Command{
		Use:     "trait-description-list -e TYPE",
		Short:   "List the traits that events of a type have",
		Example: "  kvmeter trait-description-list -e compute.instance.create.end",
		Args:    noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		if eventType == "" {
			return nil, errNoEventType
		}
		traits, err := c.TraitDescriptions(ctx, eventType)
		if err != nil {
			return nil, err
		}
		t := newTable("Trait Name", "Data Type")
		for _, d := range traits {
			t.add(text(d.Name), text(d.Type))
		}
		return t, nil
	})
	eventTypeFlag(cmd, &eventType)
	return cmd
}

func traitList(conn *connection) *cobra.Command {
	var eventType, name string
	cmd := listCommand(conn, cobra.Command{
		Use:     "trait-list -e TYPE -t NAME",
		Short:   "List the values of a trait of events",
		Example: "  kvmeter trait-list -e compute.instance.create.end -t instance_id",
		Args:    noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		if eventType == "" {
			return nil, errNoEventType
		}
		if name == "" {
			return nil, errors.New("it wants the name of a trait: -t NAME; `kvmeter trait-description-list` lists them")
		}
		traits, err := c.Traits(ctx, eventType, name)
		if err != nil {
			return nil, err
		}
		t := newTable("Trait Name", "Value", "Data Type")
		for _, v := range traits {
			t.add(text(v.Name), text(v.Value), text(v.Type))
		}
		return t, nil
	})
	eventTypeFlag(cmd, &eventType)
	cmd.Flags().StringVarP(&name, "trait_name", "t", "", "`NAME` of the trait")
	return cmd
}

func capabilities(conn *connection) *cobra.Command {
	return apiCommand(conn, cobra.Command{
		Use:     "capabilities",
		Short:   "Show what the API and its stores can do",
		Example: "  kvmeter capabilities\n  kvmeter capabilities -f json",
		Args:    noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		parts, err := c.Capabilities(ctx)
		if err != nil {
			return nil, err
		}
		var properties []property
		for name, part := range parts {
			keys := make([]string, 0, len(part))
			for k := range part {
				keys = append(keys, k)
			}
			slices.Sort(keys)
			c := jsonCell("", part)
			for i, k := range keys {
				value := "false"
				if part[k] {
					value = "true"
				}
				if keys[i] = `"` + k + `": ` + value; i < len(keys)-1 {
					keys[i] += ","
				}
			}
			c.text = strings.Join(keys, " ")
			c.list = keys
			properties = append(properties, property{name, c})
		}
		return show(properties), nil
	})
}
