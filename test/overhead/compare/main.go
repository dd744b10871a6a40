// Command compare measures kvmeter beside what people run today: the compute agents
// on the same guests, and the stores with the same samples. Each part writes its
// figures to docs/comparison/ and docs/comparison.md anew. See compare --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	out := "docs"
	root := &cobra.Command{
		Use:           "compare",
		Short:         "Measure kvmeter beside what people run today",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&out, "out", out, "the folder of comparison.md, and of comparison/ with the raw figures and the plots")
	part := func(c *cobra.Command, name string, run func(context.Context, *facts) ([]record, error)) *cobra.Command {
		c.Args = cobra.NoArgs
		c.RunE = func(cmd *cobra.Command, _ []string) error { return runPart(cmd.Context(), out, name, c, run) }
		return c
	}
	agents := defaultAgents()
	agentsCommand := &cobra.Command{Use: "agents", Short: "What a host's agent costs, per guest and cycle"}
	agents.flags(agentsCommand)
	accuracy := defaultAccuracy()
	accuracyCommand := &cobra.Command{Use: "accuracy", Short: "Totals against the truth, guests that live shortly, and one that hangs"}
	accuracy.flags(accuracyCommand)
	quick := defaultQuick()
	quickCommand := &cobra.Command{
		Use: "quick", Short: "kvmeter-agent alone, the working tree beside its merge base; it fails where that costs clearly more", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return quick.run(cmd.Context()) },
	}
	quick.flags(quickCommand)
	root.AddCommand(
		quickCommand,
		part(agentsCommand, "agents", agents.run),
		part(accuracyCommand, "accuracy", accuracy.run),
		&cobra.Command{
			Use: "report", Short: "Write comparison.md from the figures that there are", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error { return report(out) },
		},
	)
	return root
}

// runPart measures one part, keeps its figures and writes the report anew.
func runPart(ctx context.Context, out, name string, c *cobra.Command, run func(context.Context, *facts) ([]record, error)) error {
	begun := time.Now()
	f := facts{Date: begun.UTC().Format(time.DateOnly), Machine: machine(), Load: [2]float64{load(), load()}, Command: strings.Join(os.Args[1:], " ")}
	stop := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		tick := time.NewTicker(5 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				f.Load[0], f.Load[1] = min(f.Load[0], load()), max(f.Load[1], load())
			}
		}
	}()
	records, err := run(ctx, &f)
	close(stop)
	<-watched
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	f.Lasted = time.Since(begun).Round(time.Second).String()
	dir := filepath.Join(out, "comparison")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := errors.Join(save(dir, name, records), saveFacts(dir, name, f)); err != nil {
		return err
	}
	fmt.Printf("%s took %s; figures in %s\n", name, f.Lasted, filepath.Join(dir, name+".csv"))
	return report(out)
}

// machine describes the hardware and the kernel.
func machine() string {
	model := "unknown CPU"
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	memory := ""
	info, _ = os.ReadFile("/proc/meminfo")
	var kb int64
	if _, err := fmt.Sscanf(string(info), "MemTotal: %d kB", &kb); err == nil {
		memory = fmt.Sprintf(", %d GiB of memory", (kb+1<<19)>>20)
	}
	return fmt.Sprintf("%d CPUs (%s)%s, Linux %s", runtime.NumCPU(), model, memory, strings.TrimSpace(string(kernel)))
}

// versions are those of Debian packages.
func versions(packages ...string) []string {
	var all []string
	for _, p := range packages {
		v, err := exec.Command("dpkg-query", "-W", "-f", "${Package} ${Version}", p).Output()
		if err != nil {
			v = []byte(p + ": not as a package")
		}
		all = append(all, string(v))
	}
	return all
}

// say shows how far a run is.
func say(format string, args ...any) {
	fmt.Printf(time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}

// build builds a program of this module from its tree in dir.
func build(ctx context.Context, dir, to, program string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", to, "./cmd/"+program)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", program, err, out)
	}
	return nil
}
