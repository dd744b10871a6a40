package vm

import (
	"bufio"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// Report is what the tests in a guest came to.
type Report struct {
	Passed, Skipped int // subtests included
	// Failures say in a line each what is wrong: tests that failed or skipped
	// for a reason that the kernel does not have, programs that broke off.
	Failures []string

	ended []string // programs
}

var (
	resultLine = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) `)
	logLine    = regexp.MustCompile(`^\s*\w+\.go:\d+: (.*)`)
	endLine    = regexp.MustCompile(`^@@ end (\S+) (\d+)$`)
)

// read copies the output of a guest's tests to out, and adds it up.
func read(from io.Reader, out io.Writer, skips []string) (Report, error) {
	var r Report
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 1<<20)
	lastLog, program := "", ""
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		if _, err := fmt.Fprintln(out, line); err != nil {
			return r, err
		}
		if m := logLine.FindStringSubmatch(line); m != nil {
			lastLog = m[1]
		}
		if name, ok := strings.CutPrefix(line, "@@ begin "); ok {
			program = name
		}
		if m := endLine.FindStringSubmatch(line); m != nil {
			r.ended = append(r.ended, m[1])
			if m[2] != "0" {
				r.Failures = append(r.Failures, fmt.Sprintf("%s ended with status %s", m[1], m[2]))
			}
		}
		m := resultLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		switch name := program + ": " + m[2]; m[1] {
		case "PASS":
			r.Passed++
		case "FAIL":
			r.Failures = append(r.Failures, name+" failed")
		case "SKIP":
			r.Skipped++
			if !slices.ContainsFunc(skips, func(s string) bool { return strings.Contains(lastLog, s) }) {
				r.Failures = append(r.Failures, fmt.Sprintf("%s was skipped, which this kernel has no reason for: %s", name, lastLog))
			}
		}
	}
	return r, lines.Err()
}

// complete says which of the programs did not end, if any.
func (r *Report) complete(programs []Program) error {
	for _, p := range programs {
		if !slices.Contains(r.ended, p.name()+".test") {
			return fmt.Errorf("%s did not end", p.name())
		}
	}
	return nil
}
