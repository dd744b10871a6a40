package cli

import (
	"context"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/central/client"
)

func usage(conn *connection) *cobra.Command {
	var q, project, resource, file string
	var meters []string
	var ask client.UsageQuery
	var total bool
	cmd := apiCommand(conn, cobra.Command{
		Use:   "usage",
		Short: "Show how much was used in a period, for a bill",
		Long: `Show how much was used in a period, for a bill: of this month until now, or
--from a time --to another. Quantities are exact. Of what only grows it is by how much it
grew, whatever was started anew meanwhile; of a gauge it is the value multiplied by the
seconds that it lasted (its unit ends with ·s). Gaps are the times for which numbers are
missing.
` + queryHelp,
		Example: `  kvmeter usage --from 2026-01-01 --to 2026-02-01 --project 7f2a -m cpu -m memory
  kvmeter usage --from 2026-01-01 --to 2026-02-01 -m cpu --total
  kvmeter usage -m cpu --split flavor.name -f csv
  kvmeter usage --from 2026-01-01 --to 2026-02-01 --parquet january.parquet`,
		Args: noArgs,
	}, func(ctx context.Context, c *client.Client, _ []string) (*table, error) {
		terms, err := parseQuery(q)
		if err != nil {
			return nil, err
		}
		for field, value := range map[string]string{"project": project, "resource": resource} {
			if value != "" {
				terms = append(terms, client.Term{Field: field, Value: value})
			}
		}
		if len(meters) == 1 {
			terms = append(terms, client.Term{Field: "meter", Value: meters[0]})
		}
		ask.Query = terms
		if file != "" {
			if len(meters) > 1 || total {
				return nil, errors.New("--parquet writes everything that a query selects: one -m at most, and no --total")
			}
			return saveUsage(ctx, c, ask, file)
		}
		rows, err := c.Usage(ctx, ask)
		if err != nil {
			return nil, err
		}
		if len(meters) > 1 {
			rows = slices.DeleteFunc(rows, func(u client.Usage) bool { return !slices.Contains(meters, u.Meter) })
		}
		if total {
			return usageTotals(rows, ask.SplitBy)
		}
		return usageTable(rows, ask.SplitBy), nil
	})
	queryFlag(cmd, &q)
	f := cmd.Flags()
	f.StringVar(&ask.Start, "from", "", "beginning of the period, a `TIME` (UTC); this month's unless given")
	f.StringVar(&ask.End, "to", "", "end of the period, a `TIME` (UTC), not in it; now unless given")
	f.StringVar(&project, "project", "", "only of the project with this `ID`")
	f.StringVar(&resource, "resource", "", "only of the resource with this `ID`")
	f.StringArrayVarP(&meters, "meter", "m", nil, "only of this `METER`; may be repeated")
	f.StringArrayVar(&ask.SplitBy, "split", nil, "tell apart by the value of this `KEY` of the metadata, such\nas flavor.name; may be repeated")
	f.BoolVar(&total, "total", false, "add the resources of a project up")
	f.StringVar(&file, "parquet", "", "write a Parquet `FILE` in place of a table")
	return cmd
}

// saveUsage writes a file, whole or not at all.
func saveUsage(ctx context.Context, c *client.Client, q client.UsageQuery, path string) (*table, error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".usage-*")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	err = errors.Join(c.CopyUsage(ctx, f, q, "parquet"), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return nil, err
	}
	return show([]property{{"file", text(path)}}), nil
}

func splitColumns(splits []string) []string {
	columns := make([]string, len(splits))
	for i, key := range splits {
		columns[i] = "Metadata " + strings.TrimPrefix(key, "metadata.")
	}
	return columns
}

func splitCells(u *client.Usage, splits []string) []cell {
	cells := make([]cell, len(splits))
	for i, key := range splits {
		cells[i] = known(u.Split[strings.TrimPrefix(key, "metadata.")])
	}
	return cells
}

func usageTable(rows []client.Usage, splits []string) *table {
	t := newTable(slices.Concat([]string{"Project ID", "Resource ID", "Meter"}, splitColumns(splits), []string{"Quantity", "Unit", "First", "Last", "Origins", "Gaps"})...)
	for i := range rows {
		u := &rows[i]
		row := slices.Concat([]cell{known(u.Project), text(u.Resource), text(u.Meter)}, splitCells(u, splits), []cell{
			number(u.Quantity), text(u.Of), text(u.First), text(u.Last), text(strings.Join(u.Origins, ", ")), uintCell(uint64(len(u.Gaps))),
		})
		t.add(row...)
	}
	return t
}

// usageTotals adds up what the resources of a project used. Nothing is rounded.
func usageTotals(rows []client.Usage, splits []string) (*table, error) {
	type sum struct {
		cells     []cell
		quantity  *big.Rat
		unit      string
		resources map[string]bool
		gaps      int
	}
	sums := map[string]*sum{}
	var order []string
	for i := range rows {
		u := &rows[i]
		cells := slices.Concat([]cell{known(u.Project), text(u.Meter)}, splitCells(u, splits))
		key := u.Of
		for _, c := range cells {
			key += "\x00" + string(c.json)
		}
		s := sums[key]
		if s == nil {
			s = &sum{cells: cells, quantity: new(big.Rat), unit: u.Of, resources: map[string]bool{}}
			sums[key] = s
			order = append(order, key)
		}
		q, ok := new(big.Rat).SetString(u.Quantity.String())
		if !ok {
			return nil, fmt.Errorf("the API gives a quantity that is none: %s", u.Quantity)
		}
		s.quantity.Add(s.quantity, q)
		s.resources[u.Resource] = true
		s.gaps += len(u.Gaps)
	}
	slices.SortFunc(order, func(a, b string) int {
		return strings.Compare(a[strings.Index(a, "\x00"):], b[strings.Index(b, "\x00"):])
	})
	t := newTable(slices.Concat([]string{"Project ID", "Meter"}, splitColumns(splits), []string{"Quantity", "Unit", "Resources", "Gaps"})...)
	for _, key := range order {
		s := sums[key]
		places, _ := s.quantity.FloatPrec()
		digits := s.quantity.FloatString(places)
		t.add(append(s.cells, cell{text: digits, json: []byte(digits)}, text(s.unit), uintCell(uint64(len(s.resources))), uintCell(uint64(s.gaps)))...)
	}
	return t, nil
}
