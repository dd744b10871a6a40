package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// report writes comparison.md and its plots from the figures in comparison/. A part
// that was not run is left out.
func report(out string) error {
	var text strings.Builder
	fmt.Fprintln(&text, "# kvmeter beside what people run today")
	fmt.Fprintln(&text)
	fmt.Fprintln(&text, "Written by `make compare` from the figures in [comparison/](comparison/); a run on another machine gives others. A figure is a")
	fmt.Fprintln(&text, "median, and what is in brackets after it are the quartiles.")
	dir := filepath.Join(out, "comparison")
	for _, part := range []struct {
		name  string
		write func(dir string, records []record, f *facts, text *strings.Builder) error
	}{{"agents", reportAgents}, {"accuracy", reportAccuracy}} {
		records, err := loadRecords(dir, part.name)
		if err != nil {
			return err
		}
		f, err := loadFacts(dir, part.name)
		if err != nil {
			return err
		}
		if f == nil {
			continue
		}
		fmt.Fprintln(&text)
		if err := part.write(dir, records, f, &text); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(out, "comparison.md"), []byte(text.String()), 0o644)
}

// about says where and when a part was run.
func about(f *facts, text *strings.Builder) {
	fmt.Fprintf(text, "On %s; %s, for %s, at a load of %.1f to %.1f (`compare %s`).", f.Machine, f.Date, f.Lasted, f.Load[0], f.Load[1], f.Command)
	if len(f.Versions) > 0 {
		fmt.Fprintf(text, " Debian's %s.", strings.Join(f.Versions, ", "))
	}
	fmt.Fprint(text, "\n\n")
}

// costOf is what one contender costs, in µs a guest and cycle, each cycle of each
// turn one value; less what it is without.
type costOf struct{ tool, libvirtd, qemu, broker, hooks, kernel, sum []float64 }

func costsOf(records []record, f *facts, who string, interval time.Duration) (c costOf) {
	per := func(what string, guests int) []float64 {
		idle := middle(series(records, nobodyRuns, interval, what))
		values := series(records, who, interval, what)
		for i := range values {
			values[i] = (values[i] - idle) / float64(guests)
		}
		return values
	}
	all := f.KVM + f.Linux
	c = costOf{tool: per("tool_us", all), libvirtd: per("libvirtd_us", all), qemu: per("qemu_us", f.KVM), broker: per("broker_us", all), hooks: per("hooks_us", all), kernel: per("kernel_us", all)}
	for i := range c.tool {
		c.sum = append(c.sum, c.tool[i]+c.libvirtd[i]+c.qemu[i]+c.broker[i]+c.hooks[i])
	}
	return c
}

const agentsText = `## The agent on a compute host

%d KVM guests that are idle and %d Linux guests with a light load of CPU, disk and network, on one private libvirtd and one private
RabbitMQ, which all contenders take turns at, each as Debian packages it (kvmeter as it is built here). What is in a turn before the
first delivery, and the cycle after it, is not counted. CPU time is the kernel's: of the contender by its control group, so that no
process that came and went is missed; of libvirtd, of the KVM guests' QEMU processes and of RabbitMQ by their CPU clocks, less what
they take while nobody meters; of BPF programs that run for others by the kernel's own count of their run time. What QEMU takes is a
KVM guest's: the Linux guests run under emulation, whose own CPU time drowns it.

`

func reportAgents(dir string, records []record, f *facts, text *strings.Builder) error {
	fmt.Fprintf(text, agentsText, f.KVM, f.Linux)
	about(f, text)
	for _, interval := range []time.Duration{10 * time.Second, time.Second} {
		if len(series(records, nobodyRuns, interval, "tool_us")) == 0 {
			continue
		}
		fmt.Fprintf(text, "### Every %.0f s: µs of CPU a guest and cycle\n\n", interval.Seconds())
		fmt.Fprintln(text, "| | itself | libvirtd | QEMU | RabbitMQ | BPF hooks | sum | kernel threads, not in the sum |")
		fmt.Fprintln(text, "|---|---|---|---|---|---|---|---|")
		var dots []dot
		sums := map[string]float64{}
		for _, c := range contenders {
			u := costsOf(records, f, c.name, interval)
			if n := len(series(records, c.name, interval, "failed")); n > 0 {
				fmt.Fprintf(text, "| %s | did not run in %d of its turns |\n", c.name, n)
			}
			if len(u.sum) == 0 {
				continue
			}
			d := dotOf(c.name, u.sum)
			dots, sums[c.name] = append(dots, d), d.mid
			fmt.Fprintf(text, "| %s | %s | %s | %s | %s | %s | **%s** (%s to %s) | %s |\n", c.name,
				figure(middle(u.tool)), figure(middle(u.libvirtd)), figure(middle(u.qemu)), figure(middle(u.broker)), figure(middle(u.hooks)),
				figure(d.mid), figure(d.low), figure(d.high), figure(middle(u.kernel)))
		}
		idle := costsOf(records, f, nobodyRuns, interval)
		fmt.Fprintf(text, "| nobody, around its own median | | %s | %s | %s | | %s | %s |\n\n", spread(idle.libvirtd), spread(idle.qemu), spread(idle.broker), spread(idle.sum), spread(idle.kernel))
		reportRatios(sums, text)
		name := fmt.Sprintf("agents-%s.svg", interval)
		title := fmt.Sprintf("CPU of a host's metering every %.0f s, all included", interval.Seconds())
		if err := plotDots(filepath.Join(dir, name), title, "µs a guest and cycle", 1, dots); err != nil {
			return err
		}
		fmt.Fprintf(text, "![%s](comparison/%s)\n\n", title, name)

		fmt.Fprintf(text, "### Every %.0f s: what is delivered, and how old it is\n\n", interval.Seconds())
		fmt.Fprintln(text, "| | samples a guest and cycle | bytes a guest and cycle | messages a cycle | late, of all samples | from reading to arrival | oldest that a reader has (p99) | RSS; PSS | first sample after | CPU until then |")
		fmt.Fprintln(text, "|---|---|---|---|---|---|---|---|---|---|")
		for _, c := range contenders {
			get := func(what string) []float64 { return series(records, c.name, interval, what) }
			samples := get("samples")
			if len(samples) == 0 {
				continue
			}
			all := float64(f.KVM + f.Linux)
			fmt.Fprintf(text, "| %s | %s | %s | %s | %.2g %% | %.0f ms | %.1f s | %.0f; %.0f MB | %.1f s | %.0f ms |\n", c.name,
				figure(middle(samples)/all), figure(middle(get("bytes"))/all), figure(middle(get("messages"))),
				100*sum(get("late"))/max(1, sum(samples)), 1e3*middle(get("delay_s")), middle(get("age_s")),
				middle(get("rss_mb")), middle(get("pss_mb")), middle(get("first_sample_s")), middle(get("start_ms")))
		}
		fmt.Fprintln(text)
	}
	fmt.Fprint(text, "A sample is late if it comes half an interval or more after it was due. The exporter's samples are as old as its scrape, collectd's as the\ntime that it says. RSS and PSS are of all processes of a contender.\n\n")
	fmt.Fprint(text, "### Configurations\n\n")
	for _, c := range f.Configs {
		fmt.Fprintf(text, "**%s**: %s.\n\n```\n%s\n```\n\n", c.Name, c.About, strings.TrimSpace(c.Text))
	}
	return nil
}

// reportRatios says how many times less the headline rows are.
func reportRatios(sums map[string]float64, text *strings.Builder) {
	lean, there := sums["kvmeter lean"]
	if check, ok := sums["kvmeter lean, check"]; ok && there {
		fmt.Fprintf(text, "With the cross-check at its default, once in ten minutes, lean takes %s: a tenth of what the row with ten times as many adds to it.\n", figure(lean+(check-lean)/10))
	}
	for _, ours := range []string{"kvmeter lean", "kvmeter, Ceilometer's list"} {
		for _, theirs := range []string{"Ceilometer", "libvirt exporter", "collectd virt"} {
			if a, b := sums[ours], sums[theirs]; a > 0 && b > 0 {
				fmt.Fprintf(text, "%s takes %s times what %s does.\n", theirs, figure(b/a), ours)
			}
		}
	}
	fmt.Fprintln(text)
}

// figure prints three digits that matter.
func figure(v float64) string {
	if v < 0 {
		return "−" + figure(-v)
	}
	switch {
	case v == 0:
		return "0"
	case v < 1:
		return fmt.Sprintf("%.2f", v)
	case v < 10:
		return fmt.Sprintf("%.1f", v)
	case v < 10000:
		return fmt.Sprintf("%.0f", v)
	}
	s := fmt.Sprintf("%.0f", v)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// spread is how far values are from each other.
func spread(values []float64) string {
	return fmt.Sprintf("%s to %s", figure(quantile(values, 0.25)), figure(quantile(values, 0.75)))
}

func sum(values []float64) (s float64) {
	for _, v := range values {
		s += v
	}
	return s
}
