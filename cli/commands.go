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

func queryFlag(cmd *cobra.Command, query *string) {
	cmd.Flags().StringVarP(query, "query", "q", "", "only what matches this `QUERY`")
}

func limitFlag(cmd *cobra.Command, limit *limit) {
	cmd.Flags().VarP(limit, "limit", "l", "at most `N` rows (the API's default: 100)")
}

// limit is the number of rows that were asked for; 0: not said.
type limit int

// defaultLimit is how many entries the API lists where no limit is said.
const defaultLimit = 100

// mark marks a table that the API may have cut.
func (l limit) mark(t *table) *table {
	t.cut = l == 0 && len(t.rows) == defaultLimit
	return t
}

func (l *limit) String() string {
	if *l == 0 {
		return ""
	}
	return fmt.Sprint(int(*l))
}

func (l *limit) Type() string { return "int" }

func (l *limit) Set(s string) error {
	var n int
	if _, err := fmt.Sscanf(s+"\n", "%d\n", &n); err != nil || n <= 0 {
		return errors.New("it must be a positive number")
	}
	*l = limit(n)
	return nil
}

func meterList(conn *connection) *cobra.Command {
	var q string
	var l limit
	var unique string
	cmd := listCommand(conn, cobra.Command{
		Use:   "meter-list",
		Short: "List the meters of each resource",
		Long:  "List the meters of each resource that has samples.\n" + queryHelp,
		Example: `  kvmeter meter-list
  kvmeter meter-list -q 'resource=5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10'
  kvmeter meter-list --unique True -f value -c Name`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		terms, err := parseQuery(q)
		if err != nil {
			return nil, err
		}
		if unique != "True" && unique != "False" {
			return nil, fmt.Errorf("--unique is True or False, not %q", unique)
		}
		meters, err := c.Meters(ctx, terms, int(l), unique == "True")
		if err != nil {
			return nil, err
		}
		slices.SortStableFunc(meters, func(a, b client.Meter) int { return strings.Compare(a.Name, b.Name) })
		t := newTable("Name", "Type", "Unit", "Resource ID", "User ID", "Project ID")
		for _, m := range meters {
			t.add(text(m.Name), text(m.Type), text(m.Unit), known(m.Resource), known(m.User), known(m.Project))
		}
		return l.mark(t), nil
	})
	queryFlag(cmd, &q)
	limitFlag(cmd, &l)
	cmd.Flags().StringVar(&unique, "unique", "False", "list each meter once, for all resources: True or False")
	return cmd
}

func sampleList(conn *connection) *cobra.Command {
	var q, meter string
	var l limit
	var long, plot bool
	cmd := listCommand(conn, cobra.Command{
		Use:   "sample-list",
		Short: "List samples, newest first",
		Long:  "List samples, newest first: of one meter (-m) or of all.\n" + queryHelp,
		Example: `  kvmeter sample-list -m cpu -l 10
  kvmeter sample-list -q 'resource=5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10;timestamp>2026-01-01'
  kvmeter sample-list -m cpu -q 'metadata.flavor.vcpus=integer::2' -f csv
  kvmeter sample-list -m cpu --long
  kvmeter sample-list -m cpu -l 1000 --plot
  kvmeter sample-list -m cpu -l 5 --watch`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		terms, err := parseQuery(q)
		if err != nil {
			return nil, err
		}
		ask := c.Samples
		columns := []string{"ID", "Resource ID", "Name", "Type", "Volume", "Unit", "Timestamp"}
		if meter != "" {
			columns = columns[1:]
			ask = func(ctx context.Context, terms []client.Term, limit int, extra bool) ([]client.Sample, error) {
				return c.MeterSamples(ctx, meter, terms, limit, extra)
			}
		}
		samples, err := ask(ctx, terms, int(l), long)
		if err != nil {
			return nil, err
		}
		if plot {
			return plotSamples(samples), nil
		}
		if long {
			columns = append(columns, "Origin", "Incarnation")
		}
		t := newTable(columns...)
		for _, s := range samples {
			row := []cell{text(s.ID), known(s.Resource), text(s.Meter), text(s.Type), number(s.Volume), text(s.Unit), text(s.Time)}
			if meter != "" {
				row = row[1:]
			}
			if long {
				row = append(row, known(s.Origin), known(s.Incarnation))
			}
			t.add(row...)
		}
		return l.mark(t), nil
	})
	queryFlag(cmd, &q)
	limitFlag(cmd, &l)
	cmd.Flags().StringVarP(&meter, "meter", "m", "", "name of the meter")
	cmd.Flags().BoolVar(&long, "long", false, "show also who counted (origin) and which life of the\ndomain it is of (incarnation)")
	cmd.Flags().BoolVar(&plot, "plot", false, "draw the samples over time, a line for each meter and\nresource; what only grows as its rate per second")
	return cmd
}

func sampleShow(conn *connection) *cobra.Command {
	var long bool
	cmd := apiCommand(conn, cobra.Command{
		Use:     "sample-show ID",
		Short:   "Show one sample",
		Example: "  kvmeter sample-show 019b8f6e-9d2a-8c41-b1f0-3a5c7e910004\n  kvmeter sample-show 019b8f6e-9d2a-8c41-b1f0-3a5c7e910004 -f value -c volume",
		Args:    oneID("sample"),
	}, func(ctx context.Context, c *client.Client, args []string) (*table, error) {
		s, err := c.Sample(ctx, args[0], long)
		if err != nil {
			return nil, err
		}
		properties := []property{
			{"id", text(s.ID)},
			{"metadata", object(s.Metadata)},
			{"meter", text(s.Meter)},
			{"project_id", known(s.Project)},
			{"recorded_at", text(s.Recorded)},
			{"resource_id", known(s.Resource)},
			{"source", known(s.Source)},
			{"timestamp", text(s.Time)},
			{"type", text(s.Type)},
			{"unit", text(s.Unit)},
			{"user_id", known(s.User)},
			{"volume", number(s.Volume)},
		}
		if long {
			properties = append(properties, property{"origin", known(s.Origin)}, property{"incarnation", known(s.Incarnation)})
		}
		return show(properties), nil
	})
	cmd.Flags().BoolVar(&long, "long", false, "show also who counted (origin) and which life of the\ndomain it is of (incarnation)")
	return cmd
}

func statistics(conn *connection) *cobra.Command {
	var q, meter string
	var period int64
	var groups, aggregates []string
	var plot bool
	cmd := listCommand(conn, cobra.Command{
		Use:   "statistics -m METER",
		Short: "Show aggregates of a meter's samples",
		Long: `Show aggregates of a meter's samples: of all that match, or of each period (-p)
and group (-g). Periods start at the query's lower timestamp bound, or else at
the first sample; those without a sample are left out.
` + queryHelp + `

Aggregates (-a) are max, min, avg, sum, count, stddev, and cardinality<-FIELD,
the number of different values of resource_id, user_id, project_id or source; of
raw samples also last, rate (per second, restarts of counters reckoned with), p50,
p95 and p99.`,
		Example: `  kvmeter statistics -m cpu_util
  kvmeter statistics -m cpu_util -p 3600 -q 'timestamp>=2026-01-01;timestamp<2026-01-02'
  kvmeter statistics -m cpu_util -g project_id -a avg -a max
  kvmeter statistics -m cpu -a 'cardinality<-resource_id'
  kvmeter statistics -m cpu -p 3600 -a rate -g resource_id
  kvmeter statistics -m cpu_util -p 300 -g resource_id --plot`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		if meter == "" {
			return nil, errors.New("statistics wants the name of a meter: -m METER; `kvmeter meter-list --unique True` lists them")
		}
		terms, err := parseQuery(q)
		if err != nil {
			return nil, err
		}
		ask := client.StatisticsQuery{Meter: meter, Query: terms, Period: period, GroupBy: groups}
		for _, a := range aggregates {
			aggregate, err := parseAggregate(a)
			if err != nil {
				return nil, err
			}
			ask.Aggregates = append(ask.Aggregates, aggregate)
		}
		rows, err := c.Statistics(ctx, ask)
		if err != nil {
			return nil, err
		}
		if plot {
			return plotStatistics(meter, rows, ask.Aggregates), nil
		}
		return statisticsTable(rows, groups, ask.Aggregates), nil
	})
	queryFlag(cmd, &q)
	cmd.Flags().StringVarP(&meter, "meter", "m", "", "name of the meter")
	cmd.Flags().Int64VarP(&period, "period", "p", 0, "length of a period in seconds; 0: one for all")
	cmd.Flags().StringArrayVarP(&groups, "groupby", "g", nil, "`FIELD` to group by: resource_id, project_id, user_id,\nsource or metadata.KEY; may be repeated")
	cmd.Flags().StringArrayVarP(&aggregates, "aggregate", "a", nil, "`FUNC[<-PARAM]` to show, not the five usual ones;\nmay be repeated")
	cmd.Flags().BoolVar(&plot, "plot", false, "draw the averages, or the first aggregate, over time:\na line for each group")
	return cmd
}

func statisticsTable(rows []client.Statistics, groups []string, aggregates []client.Aggregate) *table {
	columns := []string{"Period", "Period Start", "Period End"}
	if len(groups) > 0 {
		columns = append(columns, "Group By")
	}
	var keys []string // of the API's aggregate object
	if aggregates == nil {
		columns = append(columns, "Max", "Min", "Avg", "Sum", "Count")
	}
	for _, a := range aggregates {
		key, column := aggregateKey(a), strings.ToUpper(a.Func[:1])+a.Func[1:]
		if a.Param != "" {
			column = key
		}
		if !slices.Contains(keys, key) {
			keys = append(keys, key)
			columns = append(columns, column)
		}
	}
	t := newTable(append(columns, "Duration", "Duration Start", "Duration End")...)
	for _, s := range rows {
		row := []cell{number(s.Period), text(s.PeriodStart), text(s.PeriodEnd)}
		if len(groups) > 0 {
			row = append(row, group(s.Group))
		}
		if aggregates == nil {
			row = append(row, number(s.Max), number(s.Min), number(s.Avg), number(s.Sum), number(s.Count))
		}
		for _, key := range keys {
			row = append(row, number(s.Aggregate[key]))
		}
		duration := null
		if s.Duration != nil {
			duration = number(*s.Duration)
		}
		t.add(append(row, duration, known(s.DurationStart), known(s.DurationEnd))...)
	}
	return t
}

// aggregateKey is an aggregate's key in the API's answer.
func aggregateKey(a client.Aggregate) string {
	if a.Param == "" {
		return a.Func
	}
	return a.Func + "/" + a.Param
}

// group prints the values of the fields that were grouped by.
func group(values map[string]*string) cell {
	fields := make([]string, 0, len(values))
	for f := range values {
		fields = append(fields, f)
	}
	slices.Sort(fields)
	for i, f := range fields {
		fields[i] = f + "=" + known(values[f]).text
	}
	return jsonCell(strings.Join(fields, ", "), values)
}

func resourceList(conn *connection) *cobra.Command {
	var q string
	var l limit
	cmd := listCommand(conn, cobra.Command{
		Use:   "resource-list",
		Short: "List the resources that have samples",
		Long:  "List the resources that have samples: domains, and their disks and NICs.\n" + queryHelp,
		Example: `  kvmeter resource-list
  kvmeter resource-list -q 'metadata.display_name=web1'
  kvmeter resource-list -q 'timestamp>=2026-01-01' -f value -c 'Resource ID'`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		terms, err := parseQuery(q)
		if err != nil {
			return nil, err
		}
		resources, err := c.Resources(ctx, terms, int(l))
		if err != nil {
			return nil, err
		}
		t := newTable("Resource ID", "Source", "User ID", "Project ID")
		for _, r := range resources {
			t.add(text(r.ID), known(r.Source), known(r.User), known(r.Project))
		}
		return l.mark(t), nil
	})
	queryFlag(cmd, &q)
	limitFlag(cmd, &l)
	return cmd
}

func resourceShow(conn *connection) *cobra.Command {
	return apiCommand(conn, cobra.Command{
		Use:     "resource-show ID",
		Short:   "Show one resource",
		Example: "  kvmeter resource-show 5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10\n  kvmeter resource-show 5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10 -f json",
		Args:    oneID("resource"),

		ValidArgsFunction: listed(resourceIDs)(conn),
	}, func(ctx context.Context, c *client.Client, args []string) (*table, error) {
		r, err := c.Resource(ctx, args[0])
		if err != nil {
			return nil, err
		}
		return show([]property{
			{"metadata", object(r.Metadata)},
			{"project_id", known(r.Project)},
			{"resource_id", text(r.ID)},
			{"source", known(r.Source)},
			{"user_id", known(r.User)},
		}), nil
	})
}

func gapList(conn *connection) *cobra.Command {
	var start, end string
	var l limit
	cmd := listCommand(conn, cobra.Command{
		Use:   "gap-list",
		Short: "List the times for which numbers are missing, and why",
		Long: `List the times for which numbers are missing, and why, newest first. A meter
or resource of * means all of them on the node.`,
		Example: `  kvmeter gap-list
  kvmeter gap-list --start 2026-01-01 --end 2026-01-02T12:00:00`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		gaps, err := c.Gaps(ctx, start, end, int(l))
		if err != nil {
			return nil, err
		}
		t := newTable("Meter", "Resource ID", "Node", "From", "To", "Reason")
		for _, g := range gaps {
			t.add(text(g.Meter), text(g.Resource), text(g.Node), text(g.From), text(g.To), text(g.Reason))
		}
		return l.mark(t), nil
	})
	limitFlag(cmd, &l)
	cmd.Flags().StringVar(&start, "start", "", "only gaps that end at or after this `TIME` (UTC)")
	cmd.Flags().StringVar(&end, "end", "", "only gaps that begin at or before this `TIME` (UTC)")
	return cmd
}

// property is a row of a show table.
type property struct {
	name  string
	value cell
}

func show(properties []property) *table {
	t := &table{single: true}
	slices.SortFunc(properties, func(a, b property) int { return strings.Compare(a.name, b.name) })
	row := make([]cell, len(properties))
	for i, p := range properties {
		t.columns = append(t.columns, p.name)
		row[i] = p.value
	}
	t.add(row...)
	return t
}

// cell is a value of a table: as people read it, and as JSON.
type cell struct {
	text   string
	json   json.RawMessage
	nested *table   // drawn where there is room, in place of the text
	list   []string // lines, in place of the text
}

var null = cell{text: "None", json: json.RawMessage("null")}

func (c cell) null() bool { return string(c.json) == "null" }

func text(s string) cell { return jsonCell(s, s) }

// known is a text that may not be known.
func known(s *string) cell {
	if s == nil {
		return null
	}
	return text(*s)
}

// number keeps the digits of the API.
func number(n json.Number) cell {
	if n == "" {
		return null
	}
	return cell{text: n.String(), json: json.RawMessage(n)}
}

func uintCell(n uint64) cell { return number(json.Number(strconv.FormatUint(n, 10))) }

// object prints a JSON object with a blank after each comma and colon, so that
// it wraps well.
func object(o map[string]string) cell {
	keys := make([]string, 0, len(o))
	for k := range o {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for i, k := range keys {
		keys[i] = string(encode(k)) + ": " + string(encode(o[k]))
	}
	return jsonCell("{"+strings.Join(keys, ", ")+"}", o)
}

func jsonCell(text string, value any) cell { return cell{text: text, json: encode(value)} }
