package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/central/client"
)

func directFlag(cmd *cobra.Command, direct *bool) {
	cmd.Flags().BoolVar(direct, "direct", false, "store at once, past the pipelines")
}

// takeDirect takes from the arguments the value of --direct, which in the original
// client is a word of its own.
func takeDirect(cmd *cobra.Command, args []string) []string {
	direct := cmd.Flags().Lookup("direct")
	return slices.DeleteFunc(slices.Clone(args), func(word string) bool {
		_, err := strconv.ParseBool(word)
		return err == nil && direct.Changed && direct.Value.Set(word) == nil
	})
}

func sampleCreate(conn *connection) *cobra.Command {
	var s client.NewSample
	var volume, metadata string
	var direct bool
	cmd := apiCommand(conn, cobra.Command{
		Use:   "sample-create -r RESOURCE -m METER --meter-type TYPE --meter-unit UNIT --sample-volume VOLUME",
		Short: "Send a sample",
		Example: `  kvmeter sample-create -r tree-1 -m apples --meter-type gauge --meter-unit piece --sample-volume 3
  kvmeter sample-create -r vm-1 -m power --meter-type gauge --meter-unit W --sample-volume 71.5 \
    --resource-metadata '{"rack": "b7"}' --timestamp 2026-01-01T10:00:00 --direct`,
		Args: func(cmd *cobra.Command, args []string) error { return noArgs(cmd, takeDirect(cmd, args)) },
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		for _, f := range []struct{ name, value string }{
			{"-r", s.Resource}, {"-m", s.Meter}, {"--meter-type", s.Type}, {"--meter-unit", s.Unit}, {"--sample-volume", volume},
		} {
			if f.value == "" {
				return nil, fmt.Errorf("a sample wants %s; see `kvmeter sample-create --help`", f.name)
			}
		}
		if s.Volume = json.Number(volume); !isNumber(volume) {
			return nil, fmt.Errorf("--sample-volume %q is no number", volume)
		}
		if metadata != "" {
			if err := json.Unmarshal([]byte(metadata), &s.Metadata); err != nil {
				return nil, fmt.Errorf("--resource-metadata is a JSON object of texts, such as '{\"rack\": \"b7\"}': %w", err)
			}
		}
		taken, err := c.CreateSamples(ctx, s.Meter, []client.NewSample{s}, direct)
		if err != nil {
			return nil, err
		}
		if len(taken) != 1 {
			return nil, fmt.Errorf("the API took %d samples instead of one", len(taken))
		}
		t := &taken[0]
		return show([]property{
			{"message_id", text(t.ID)},
			{"name", text(t.Meter)},
			{"project_id", known(t.Project)},
			{"resource_id", known(t.Resource)},
			{"resource_metadata", object(t.Metadata)},
			{"source", known(t.Source)},
			{"timestamp", text(t.Time)},
			{"type", text(t.Type)},
			{"unit", text(t.Unit)},
			{"user_id", known(t.User)},
			{"volume", number(t.Volume)},
		}), nil
	})
	f := cmd.Flags()
	f.StringVarP(&s.Resource, "resource-id", "r", "", "`ID` of the resource")
	f.StringVarP(&s.Meter, "meter-name", "m", "", "`NAME` of the meter")
	f.StringVar(&s.Type, "meter-type", "", "gauge, delta or cumulative")
	f.StringVar(&s.Unit, "meter-unit", "", "`UNIT` of the meter")
	f.StringVar(&volume, "sample-volume", "", "the `NUMBER`")
	f.StringVar(&s.Project, "project-id", "", "`ID` of the project that owns it; yours unless you are an admin")
	f.StringVar(&s.User, "user-id", "", "`ID` of the user that owns it")
	f.StringVar(&metadata, "resource-metadata", "", "`JSON` object of texts; a dot in a name nests")
	f.StringVar(&s.Time, "timestamp", "", "`TIME` of the sample (UTC); now unless given")
	directFlag(cmd, &direct)
	// The original's other name of -m.
	f.StringVar(&s.Meter, "meter", "", "")
	f.Lookup("meter").Hidden = true
	return cmd
}

// isNumber reports whether a text is a number of JSON.
func isNumber(text string) bool {
	var n json.Number
	return json.Unmarshal([]byte(text), &n) == nil && n != ""
}

func sampleCreateList(conn *connection) *cobra.Command {
	var list string
	var direct bool
	cmd := apiCommand(conn, cobra.Command{
		Use:   "sample-create-list JSON",
		Short: "Send samples",
		Long: `Send samples of one meter: a JSON array of objects with counter_name, counter_type,
counter_unit, counter_volume, resource_id and, if you like, project_id, user_id,
timestamp and resource_metadata.`,
		Example: `  kvmeter sample-create-list '[{"counter_name": "apples", "counter_type": "gauge", "counter_unit": "piece",
    "counter_volume": 3, "resource_id": "tree-1"}]'
  kvmeter sample-create-list "$(cat samples.json)" --direct`,
		Args: func(cmd *cobra.Command, args []string) error {
			if args = takeDirect(cmd, args); len(args) != 1 {
				return fmt.Errorf("sample-create-list wants one JSON array of samples, got %d arguments", len(args))
			}
			list = args[0]
			return nil
		},
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		var samples []map[string]json.RawMessage
		if err := json.Unmarshal([]byte(list), &samples); err != nil {
			return nil, fmt.Errorf("samples are a JSON array of objects: %w", err)
		}
		if len(samples) == 0 {
			return nil, errors.New("there is no sample in the array")
		}
		var meter string
		if err := json.Unmarshal(samples[0]["counter_name"], &meter); err != nil || meter == "" {
			return nil, errors.New("the first sample has no counter_name")
		}
		taken, err := c.CreateSamples(ctx, meter, samples, direct)
		if err != nil {
			return nil, err
		}
		t := newTable("Resource ID", "Name", "Type", "Volume", "Unit", "Timestamp")
		for i := range taken {
			s := &taken[i]
			t.add(known(s.Resource), text(s.Meter), text(s.Type), number(s.Volume), text(s.Unit), text(s.Time))
		}
		return t, nil
	})
	directFlag(cmd, &direct)
	return cmd
}

func querySamples(conn *connection) *cobra.Command {
	var filter, orderBy string
	var l limit
	cmd := listCommand(conn, cobra.Command{
		Use:   "query-samples",
		Short: "List samples by a complex query",
		Long: `List samples by a complex query. A filter is JSON: an object of one operator,
{"=": {"FIELD": VALUE}}, of = != < <= > >= =~ (a pattern) and in (a list), or
{"and": [FILTER, …]}, {"or": [FILTER, …]}, {"not": FILTER}. Fields are meter, resource, project,
user, source, type, unit, volume, timestamp, recorded_at, message_id, metadata.KEY.

An order is a list of {"FIELD": "asc"} or {"FIELD": "desc"}, or FIELD:asc,FIELD:desc.`,
		Example: `  kvmeter query-samples --filter '{"and": [{"=": {"meter": "cpu_util"}}, {">": {"volume": 80}}]}' -l 10
  kvmeter query-samples --filter '{"=~": {"metadata.display_name": "^web"}}' -o timestamp:asc,volume:desc`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		order, err := parseOrder(orderBy)
		if err != nil {
			return nil, err
		}
		if filter != "" && !json.Valid([]byte(filter)) {
			return nil, fmt.Errorf("--filter is no JSON: %s", filter)
		}
		samples, err := c.QuerySamples(ctx, filter, order, int(l))
		if err != nil {
			return nil, err
		}
		t := newTable("ID", "Resource ID", "Meter", "Type", "Volume", "Unit", "Timestamp")
		for i := range samples {
			s := &samples[i]
			t.add(text(s.ID), known(s.Resource), text(s.Meter), text(s.Type), number(s.Volume), text(s.Unit), text(s.Time))
		}
		return l.mark(t), nil
	})
	// -f is the format of what is printed, here as elsewhere; in the original client
	// it is the filter of this command. No format looks like one.
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if f := cmd.Flag("format").Value; filter == "" && strings.HasPrefix(strings.TrimSpace(f.String()), "{") {
			filter = f.String()
			return f.Set("table")
		}
		return nil
	}
	cmd.Flags().StringVar(&filter, "filter", "", "only what this `JSON` selects")
	cmd.Flags().StringVarP(&orderBy, "orderby", "o", "", "`ORDER` of the samples; newest first unless given")
	limitFlag(cmd, &l)
	return cmd
}

// parseOrder returns an order as the API takes it.
func parseOrder(text string) (string, error) {
	text = strings.TrimSpace(text)
	if text == "" || strings.HasPrefix(text, "[") {
		if text != "" && !json.Valid([]byte(text)) {
			return "", fmt.Errorf("--orderby is no JSON: %s", text)
		}
		return text, nil
	}
	var order []map[string]string
	for part := range strings.SplitSeq(text, ",") {
		field, way, _ := strings.Cut(strings.TrimSpace(part), ":")
		if way == "" {
			way = "asc"
		}
		if field == "" || way != "asc" && way != "desc" {
			return "", fmt.Errorf("--orderby %q: an order is FIELD:asc or FIELD:desc, several separated by commas", part)
		}
		order = append(order, map[string]string{field: way})
	}
	return string(encode(order)), nil
}
