package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
)

// openBMC opens the device at path, or the kernel's first.
func openBMC(path string) (bmc.Transport, error) { return bmc.Open(path) }

func ipmiCommand(open func(path string) (bmc.Transport, error)) *cobra.Command {
	var device, format string
	var timeout time.Duration
	var sel, fru, power bool
	c := &cobra.Command{
		Use:   "ipmi",
		Short: "Show what this host's BMC says: sensors, event log, inventory, power",
		Long: `Ipmi asks this host's BMC through the kernel's driver (/dev/ipmi0) and prints its
sensors with their state and thresholds, or what one of --sel, --fru and --power
asks for. It needs no daemon and no configuration, only the right to use the device.`,
		Example: `  kvmeter-agent ipmi
  kvmeter-agent ipmi -f json
  kvmeter-agent ipmi --sel`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("-f %s: it is table or json", format)
			}
			if timeout <= 0 {
				return fmt.Errorf("--timeout %s: must be more than 0", timeout)
			}
			t, err := open(device)
			if err != nil {
				return err
			}
			show := showSensors
			switch {
			case sel:
				show = showSEL
			case fru:
				show = showFRU
			case power:
				show = showPower
			}
			b := bmc.New(t)
			b.Timeout = timeout
			err = show(cmd.Context(), b, &printer{out: cmd.OutOrStdout(), warn: cmd.ErrOrStderr(), json: format == "json"})
			return errors.Join(err, b.Close())
		},
	}
	c.SetFlagErrorFunc(daemon.FlagError)
	c.Flags().StringVar(&device, "device", "", "the driver's device (default "+bmc.Paths[0]+")")
	c.Flags().StringVarP(&format, "format", "f", "table", "table or json")
	c.Flags().DurationVar(&timeout, "timeout", bmc.DefaultTimeout, "for the answer to each command")
	c.Flags().BoolVar(&sel, "sel", false, "show the event log")
	c.Flags().BoolVar(&fru, "fru", false, "show the inventory")
	c.Flags().BoolVar(&power, "power", false, "show the chassis' state and its power meters")
	c.MarkFlagsMutuallyExclusive("sel", "fru", "power")
	return c
}

// printer prints what was read.
type printer struct {
	out, warn io.Writer
	json      bool
}

// value prints v as JSON.
func (p *printer) value(v any) error {
	e := json.NewEncoder(p.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints rows, of which the first is the head.
func (p *printer) table(rows [][]string) error {
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// records reads what the BMC describes. What could not be read of it is told
// on the side.
func (p *printer) records(ctx context.Context, b *bmc.BMC) (bmc.Records, error) {
	d, err := b.DeviceID(ctx, bmc.Addr{})
	if err != nil {
		return bmc.Records{}, err
	}
	raw, _, err := b.ReadRecords(ctx, d)
	if err != nil {
		return bmc.Records{}, err
	}
	all, err := bmc.Parse(raw)
	if err != nil {
		all.Faults = append(all.Faults, err.Error())
	}
	for _, f := range all.Faults {
		fmt.Fprintln(p.warn, "Missing:", f)
	}
	return all, nil
}

// sensorView is a sensor as -f json prints it.
type sensorView struct {
	Name       string          `json:"name"`
	Number     byte            `json:"number"`
	Type       string          `json:"type"`
	Entity     string          `json:"entity"`
	Value      *float64        `json:"value"` // null: none
	Unit       string          `json:"unit,omitempty"`
	State      string          `json:"state"` // ok, nc, cr, nr, ns (no reading) or error
	States     []string        `json:"states,omitempty"`
	Thresholds *bmc.Thresholds `json:"thresholds,omitempty"`
	Error      string          `json:"error,omitempty"`
}

func showSensors(ctx context.Context, b *bmc.BMC, p *printer) error {
	all, err := p.records(ctx, b)
	if err != nil {
		return err
	}
	views := []sensorView{}
	for i := range all.Sensors {
		if s := &all.Sensors[i]; s.Readable() {
			views = append(views, viewSensor(ctx, b, s))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if p.json {
		return p.value(views)
	}
	rows := [][]string{{"SENSOR", "READING", "UNIT", "STATE", "LNR", "LC", "LNC", "UNC", "UC", "UNR"}}
	for _, v := range views {
		r := []string{v.Name, number(v.Value), v.Unit, v.State}
		switch {
		case v.Error != "":
			r[1], r[3] = "na", "error: "+v.Error
		case v.Value == nil && len(v.States) > 0:
			r[3] = strings.Join(v.States, ", ")
		case v.Thresholds != nil:
			for _, t := range v.Thresholds.List() {
				r = append(r, number(t))
			}
		}
		rows = append(rows, r)
	}
	return p.table(rows)
}

// number prints a value as ipmitool does.
func number(v *float64) string {
	if v == nil {
		return "na"
	}
	return strconv.FormatFloat(*v, 'f', 3, 64)
}

func viewSensor(ctx context.Context, b *bmc.BMC, s *bmc.Sensor) sensorView {
	v := sensorView{
		Name: s.Name, Number: s.Number, Type: bmc.TypeName(s.Type), Entity: fmt.Sprintf("%d.%d", s.Entity, s.Instance&0x7f), State: "ok",
	}
	if s.Analog() {
		v.Unit = s.Units.String()
	}
	r, err := b.Read(ctx, s)
	if err != nil {
		v.State, v.Error = "error", err.Error()
		return v
	}
	if r.Valid {
		v.Value = &r.Value
	}
	switch {
	case r.Off || r.Unknown:
		v.State = "ns"
		return v
	case s.ByThreshold():
		v.State = r.Level().String()
	default:
		v.States = bmc.StateNames(s, r.States)
	}
	if t, err := b.Thresholds(ctx, s); err == nil {
		v.Thresholds = &t
	}
	return v
}

// eventView is an entry of the event log as -f json prints it. One of a
// manufacturer's own has neither sensor nor direction.
type eventView struct {
	Record   uint16 `json:"record"`
	Time     string `json:"time"` // by the BMC's clock; empty: the entry has none
	Sensor   string `json:"sensor,omitempty"`
	Number   *byte  `json:"number,omitempty"`
	Type     string `json:"type"`
	State    string `json:"state"`
	Asserted *bool  `json:"asserted,omitempty"` // false: the state ended
	Raw      string `json:"raw"`
}

func showSEL(ctx context.Context, b *bmc.BMC, p *printer) error {
	all, err := p.records(ctx, b)
	if err != nil && !errors.Is(err, bmc.ErrNoSDR) {
		return err
	}
	views := []eventView{}
	_, err = b.Events(ctx, bmc.Event{}, func(e bmc.Event) bool {
		v := eventView{Record: e.Record, Time: e.When(), Type: "OEM", State: e.State(), Raw: fmt.Sprintf("%x", e.Raw)}
		if e.OEM == nil {
			v.Sensor, v.Number, v.Type, v.Asserted = all.SensorName(&e), &e.Sensor, bmc.TypeName(e.Kind), &e.Asserted
		}
		views = append(views, v)
		return true
	})
	if err != nil {
		return err
	}
	if p.json {
		return p.value(views)
	}
	rows := [][]string{{"RECORD", "TIME", "SENSOR", "TYPE", "STATE", "DIRECTION"}}
	for _, v := range views {
		direction := ""
		switch {
		case v.Asserted == nil:
		case *v.Asserted:
			direction = "asserted"
		default:
			direction = "deasserted"
		}
		rows = append(rows, []string{fmt.Sprintf("%04x", v.Record), v.Time, v.Sensor, v.Type, v.State, direction})
	}
	return p.table(rows)
}

func showFRU(ctx context.Context, b *bmc.BMC, p *printer) error {
	all, err := p.records(ctx, b)
	if err != nil && !errors.Is(err, bmc.ErrNoSDR) {
		return err
	}
	// Inventory 0 is the BMC's own, which needs no record (§34).
	places := []bmc.FRULocator{{Name: "BMC", Logical: true}}
	for _, l := range all.FRUs {
		switch {
		case !l.Logical:
			fmt.Fprintf(p.warn, "Missing: inventory %q is in an EEPROM that the BMC only tells the place of\n", l.Name)
		case l.ID == 0 && l.Owner.IsBMC():
			places[0].Name = l.Name
		default:
			places = append(places, l)
		}
	}
	units := []bmc.FRU{}
	for _, l := range places {
		f, err := b.FRU(ctx, l)
		if err != nil {
			fmt.Fprintf(p.warn, "Missing: inventory %q: %v\n", l.Name, err)
			continue
		}
		for _, fault := range f.Faults {
			fmt.Fprintf(p.warn, "Missing: of inventory %q: %s\n", l.Name, fault)
		}
		units = append(units, f)
	}
	if p.json {
		return p.value(units)
	}
	rows := [][]string{{"UNIT", "FIELD", "VALUE"}}
	for _, f := range units {
		for _, field := range f.Fields {
			rows = append(rows, []string{f.Name, field.Name, field.Value})
		}
	}
	return p.table(rows)
}

// powerView is what --power -f json prints.
type powerView struct {
	Chassis *bmc.Chassis `json:"chassis,omitempty"`
	Meters  []meterView  `json:"meters"`
}

// meterView is a meter with statistics, or with a current value alone.
type meterView struct {
	Name    string          `json:"name"`
	Unit    string          `json:"unit"`
	Current uint64          `json:"current"`
	Since   *bmc.Statistics `json:"statistics,omitempty"`
}

func showPower(ctx context.Context, b *bmc.BMC, p *printer) error {
	all, err := p.records(ctx, b)
	if err != nil && !errors.Is(err, bmc.ErrNoSDR) {
		return err
	}
	v := powerView{Meters: []meterView{}}
	missing := func(what string, err error) {
		fmt.Fprintf(p.warn, "Missing: %s: %v\n", what, err)
	}
	if c, err := b.Chassis(ctx); err != nil {
		missing("chassis", err)
	} else {
		v.Chassis = &c
	}
	statistics := func(name, unit string, s bmc.Statistics, err error) {
		if err != nil {
			missing(name, err)
			return
		}
		v.Meters = append(v.Meters, meterView{name, unit, uint64(s.Current), &s})
	}
	s, err := b.DCMIPower(ctx)
	statistics("DCMI power", "W", s, err)
	n, err := b.FindNodeManager(ctx, &all)
	if err != nil {
		missing("Node Manager", err)
	} else {
		for _, m := range []struct {
			name, unit string
			what       bmc.Measurement
		}{
			{"Node Manager power", "W", bmc.NMPower},
			{"Node Manager inlet temperature", "C", bmc.NMInlet},
			{"Node Manager outlet temperature", "C", bmc.NMOutlet},
			{"Node Manager airflow", "CFM", bmc.NMAirflow},
		} {
			if n.Has(m.what) {
				s, err := b.NodeManagerStatistics(ctx, n, m.what)
				statistics(m.name, m.unit, s, err)
			}
		}
		if n.HasCUPS() {
			if index, err := b.CUPSIndex(ctx, n); err != nil {
				missing("CUPS index", err)
			} else {
				v.Meters = append(v.Meters, meterView{Name: "CUPS index", Unit: "CUPS", Current: uint64(index)})
			}
			if u, err := b.CUPSUtilization(ctx, n); err != nil {
				missing("CUPS utilization", err)
			} else {
				v.Meters = append(v.Meters, meterView{Name: "CPU utilization", Unit: "%", Current: u.CPU},
					meterView{Name: "memory utilization", Unit: "%", Current: u.Memory}, meterView{Name: "I/O utilization", Unit: "%", Current: u.IO})
			}
		}
	}
	if p.json {
		return p.value(v)
	}
	if c := v.Chassis; c != nil {
		state := "off"
		if c.On {
			state = "on"
		}
		if len(c.Faults) > 0 {
			state += ", " + strings.Join(c.Faults, ", ")
		}
		fmt.Fprintf(p.out, "Chassis: power is %s\n", state)
	}
	rows := [][]string{{"METER", "CURRENT", "MINIMUM", "MAXIMUM", "AVERAGE", "UNIT", "PERIOD"}}
	for _, m := range v.Meters {
		r := []string{m.Name, strconv.FormatUint(m.Current, 10), "", "", "", m.Unit, ""}
		if s := m.Since; s != nil {
			r[2], r[3], r[4], r[6] = fmt.Sprint(s.Minimum), fmt.Sprint(s.Maximum), fmt.Sprint(s.Average), s.Period.String()
		}
		rows = append(rows, r)
	}
	return p.table(rows)
}
