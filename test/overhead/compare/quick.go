package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"gonum.org/v1/gonum/stat"
	"gonum.org/v1/gonum/stat/distuv"

	"github.com/kvmeter/kvmeter/test/lab"
)

// quick compares the working tree with its merge base.
type quick struct {
	base  string
	pairs int
	turn  time.Duration
	most  float64
}

func defaultQuick() *quick {
	return &quick{base: "main", pairs: 6, turn: 5 * time.Second, most: 1.2}
}

func (q *quick) flags(c *cobra.Command) {
	c.Flags().StringVar(&q.base, "base", q.base, "the branch that the merge base is of")
	c.Flags().IntVar(&q.pairs, "pairs", q.pairs, "turns of each of both")
	c.Flags().DurationVar(&q.turn, "turn", q.turn, "how long a turn is measured")
	c.Flags().Float64Var(&q.most, "most", q.most, "it fails where the lower 95 % bound of the CPU time's ratio is more")
}

const (
	quickDomains  = 100
	quickInterval = 100 * time.Millisecond
)

// run has both agents take turns at processes that look like QEMU's, in the order
// AB, BA, AB and so on, and compares what a batch cost them.
func (q *quick) run(ctx context.Context) (err error) {
	git := func(args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, "git", args...).Output()
		if err != nil {
			return "", fmt.Errorf("git %s: %w", strings.Join(args, " "), err)
		}
		return strings.TrimSpace(string(out)), nil
	}
	base, err := git("merge-base", "HEAD", q.base)
	if err != nil {
		return err
	}
	changed, err := git("diff", "--name-only", base, "--", "*.go", "*.c", "*.h", "*.o", "go.mod")
	if err != nil {
		return err
	}
	if changed == "" {
		say("no code differs from the merge base %.12s", base)
		return nil
	}
	dir, err := os.MkdirTemp("", "kvmeter-quick-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	tree := filepath.Join(dir, "base")
	if _, err := git("worktree", "add", "-q", "--detach", tree, base); err != nil {
		return err
	}
	defer func() {
		_, e := git("worktree", "remove", "--force", tree)
		err = errors.Join(err, e)
	}()
	sides := []struct{ dir, program string }{{".", filepath.Join(dir, "agent-head")}, {tree, filepath.Join(dir, "agent-base")}}
	for _, s := range sides {
		if err := build(ctx, s.dir, s.program, "kvmeter-agent"); err != nil {
			return err
		}
	}
	l, err := lab.New(filepath.Join(dir, "lab"), lab.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	rabbit, err := l.RabbitMQ(ctx)
	if err != nil {
		return err
	}
	if err := declare(rabbit.URL()); err != nil {
		return err
	}
	herd, err := lab.NewHerd(dir, lab.HerdSpec{Count: quickDomains, Threads: lab.QEMUThreads, Busy: 10, Work: 20 * time.Microsecond, Rest: time.Second})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, herd.Close()) }()
	b := &bench{lab: l, rabbit: rabbit, dir: dir}
	var ratios []float64
	for n := range q.pairs {
		var cost [2]float64
		for k := range sides {
			side := (k + n) % 2
			if cost[side], err = q.cost(ctx, b, sides[side].program); err != nil {
				return fmt.Errorf("%s: %w", filepath.Base(sides[side].program), err)
			}
		}
		ratios = append(ratios, math.Log(cost[0]/cost[1]))
		say("pair %d of %d: %.1f µs a domain and poll, at the merge base %.1f", n+1, q.pairs, cost[0], cost[1])
	}
	mid, low, high := interval95(ratios)
	say("CPU time of HEAD by that of the merge base: %.3f, from %.3f to %.3f", mid, low, high)
	if low > q.most {
		return fmt.Errorf("an agent's poll takes %.2f times what it did, %.2f at least; %.2f is allowed", mid, low, q.most)
	}
	return nil
}

// cost is one turn: µs of CPU a domain and batch.
func (q *quick) cost(ctx context.Context, b *bench, program string) (us float64, err error) {
	b.program = program
	t, err := b.begin(ctx, contender{name: program, start: quickAgent}, quickInterval)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, t.end()) }()
	if err := t.wait(ctx, time.Second); err != nil { // its start is not a poll
		return 0, err
	}
	before, err := t.gauge.group.cpu()
	if err != nil {
		return 0, err
	}
	if _, err := t.tally.reset(); err != nil {
		return 0, err
	}
	if err := t.wait(ctx, q.turn); err != nil {
		return 0, err
	}
	after, err := t.gauge.group.cpu()
	if err != nil {
		return 0, err
	}
	came, err := t.tally.reset()
	if err == nil && came.messages == 0 {
		err = errors.New("no batch came")
	}
	return float64((after - before).Microseconds()) / quickDomains / float64(max(1, came.messages)), err
}

// quickAgent runs the agent with settings that older ones know too.
func quickAgent(s *stage) (err error) {
	conf := fmt.Sprintf("node: host\ninterval: %s\nlibvirt: off\nspread: false\nsocket: \"\"\ncounters: \"\"\npins: \"\"\nipmi: {device: \"\"}\nspool: {path: \"\"}\namqp: {url: %q}\n", s.interval, s.broker)
	if err := write(s, "agent.yaml", conf); err != nil {
		return err
	}
	s.cmd = agentCommand(s)
	s.sink, err = batchSink(s.broker, s.tally)
	return err
}

// interval95 is the geometric mean of ratios, given as logarithms, and the bounds
// that each hold with 95 %, by Student's t.
func interval95(logs []float64) (mid, low, high float64) {
	mean, dev := stat.MeanStdDev(logs, nil)
	n := float64(len(logs))
	off := distuv.StudentsT{Sigma: 1, Nu: n - 1}.Quantile(0.95) * dev / math.Sqrt(n)
	return math.Exp(mean), math.Exp(mean - off), math.Exp(mean + off)
}
