package cli

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/agent/client"
)

func crosscheck(o Options) *cobra.Command {
	var out output
	var socket, domain string
	var now bool
	cmd := &cobra.Command{
		Use:   "crosscheck",
		Short: "Compare what kvmeter counts with what libvirt says",
		Long: `Show how the counters of this host's domains compared with libvirt's when the
agent checked each domain last. The difference is how far libvirt's figure lies
below (negative) or above those that the agent read right before and after it,
in the meter's unit and in parts of the greater figure. Within the tolerance
both agree.`,
		Example: `  kvmeter crosscheck
  kvmeter crosscheck --now --domain web1
  kvmeter crosscheck -f csv -c domain -c meter -c difference -c verdict`,
		Args:         noArgs,
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			sockets := []string{socket}
			if !cmd.Flags().Changed("socket") {
				sockets = append(sockets, o.Others...)
			}
			agent := client.Client{Path: answered(sockets)}
			s, err := agent.Crosscheck(ctx, domain, now)
			if err != nil {
				return explainAgent(err, agent.Path, sockets)
			}
			for _, n := range s.Notes {
				cmd.PrintErrln("Note: " + n)
			}
			if out.format == "table" && len(out.columns) == 0 {
				w := cmd.OutOrStdout()
				_, err = w.Write(appendComparisons(nil, &s, time.Now(), terminalWidth(w)))
				return err
			}
			return out.print(cmd.OutOrStdout(), comparisons(&s))
		},
	}
	out.flags(cmd)
	cmd.Flags().StringVar(&socket, "socket", o.Socket, "socket of the agent")
	cmd.Flags().StringVar(&domain, "domain", "", "only the domain with this UUID or `NAME`")
	cmd.Flags().BoolVar(&now, "now", false, "have the agent compare now; this makes QEMU work a little")
	return cmd
}

// comparisons makes the table. A domain that was not checked yet has one row.
func comparisons(s *client.Crosscheck) *table {
	t := newTable("Domain", "Meter", "Device", "kvmeter", "libvirt", "Difference", "Relative", "Tolerance", "Verdict", "Why", "Checked")
	for _, d := range s.Domains {
		name := text(cmp.Or(d.Display, d.Name))
		if d.Time == nil {
			t.add(name, null, null, null, null, null, null, null, null, text(unchecked), null)
			continue
		}
		checked := text(d.Time.Format(time.RFC3339))
		for _, c := range d.Comparisons {
			row := []cell{name, text(c.Meter), orNull(c.Device), null, null, null, null, null, text(c.Verdict), orNull(c.Why), checked}
			if f := c.Figures; f != nil {
				row[3], row[4] = exact(f.Ours), exact(f.Theirs)
				row[5], row[6], row[7] = exact(f.Difference), exact(f.Relative), exact(f.Tolerance)
			}
			t.add(row...)
		}
	}
	return t
}

const unchecked = "not checked yet"

// appendComparisons prints a table a domain, for people: within the width of
// their terminal, if it is not 0.
func appendComparisons(dst []byte, s *client.Crosscheck, now time.Time, width int) []byte {
	for i, d := range s.Domains {
		if i > 0 {
			dst = append(dst, '\n')
		}
		name := printable(cmp.Or(d.Display, d.Name))
		if d.Time == nil {
			dst = fmt.Appendf(dst, "%s: %s\n", name, unchecked)
			continue
		}
		at, layout := d.Time.In(now.Location()), time.TimeOnly
		if at.Format(time.DateOnly) != now.Format(time.DateOnly) {
			layout = time.DateTime
		}
		dst = fmt.Appendf(dst, "%s, checked %s\n", name, at.Format(layout))
		t := newTable("Meter", "kvmeter", "libvirt", "Difference", "Tolerance", "Verdict")
		var why []byte
		for _, c := range d.Comparisons {
			meter := strings.TrimSpace(c.Meter + " " + c.Device)
			row := []cell{text(meter), text(""), text(""), text(""), text(""), text(c.Verdict)}
			if f := c.Figures; f != nil {
				row[1], row[2], row[4] = exact(f.Ours), exact(f.Theirs), exact(f.Tolerance)
				row[3] = text(fmt.Sprintf("%+d %s (%.3g %%)", f.Difference, c.Unit, f.Relative*100))
			}
			t.add(row...)
			if c.Why != "" {
				why = fmt.Appendf(why, "%s: %s\n", printable(meter), printable(c.Why))
			}
		}
		dst = append(t.append(dst, width), why...)
	}
	return dst
}

func exact(v any) cell { return number(json.Number(encode(v))) }

func orNull(s string) cell {
	if s == "" {
		return null
	}
	return text(s)
}
