// Package cmdtest tests what programs say to configurations and flags.
package cmdtest

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// Run runs a command and returns what it prints.
func Run(t *testing.T, c *cobra.Command, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	return out.String(), err
}

// Configs runs the files of testdata/config through --check-config. What is
// printed of x.good.yaml must be in x.golden; x.bad.yaml must fail with the
// error that its first line gives after "# ". A file's name begins with the
// subcommand and a dash, unless the program itself runs.
func Configs(t *testing.T, program func() *cobra.Command) {
	files, err := filepath.Glob("testdata/config/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata/config has %d files, %v", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			c := program()
			args := []string{"--check-config", "--config", file}
			if word, _, _ := strings.Cut(name, "-"); !c.Runnable() {
				args = append([]string{word}, args...)
			}
			out, err := Run(t, c, args...)
			if strings.HasSuffix(name, ".bad") {
				bad(t, file, err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			Golden(t, strings.TrimSuffix(file, ".good.yaml")+".golden", out)
		})
	}
}

// Golden compares what was printed with a file, or with -update rewrites it.
func Golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func bad(t *testing.T, file string, err error) {
	t.Helper()
	text, readErr := os.ReadFile(file)
	if readErr != nil {
		t.Fatal(readErr)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	want, ok := strings.CutPrefix(line, "# ")
	if !ok {
		t.Fatalf("%s does not begin with the error that it must give", file)
	}
	if err == nil || err.Error() != want {
		t.Errorf("got error\n%v, want\n%s", err, want)
	}
}

// Documented checks that the program takes its command lines in the README and the
// pages of docs, those in running text included: that there are such commands and flags.
func Documented(t *testing.T, program func() *cobra.Command) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	name := program().Name()
	lines := regexp.MustCompile("(?m)(?:^(?:    )?(?:\\$ )?|`)" + name + "( [a-z-][^`\n]*)")
	found := 0
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range lines.FindAllStringSubmatch(string(text), -1) {
			line := m[1]
			for _, end := range []string{" #", " | ", " < ", " > ", "   "} {
				line, _, _ = strings.Cut(line, end)
			}
			if prose := strings.HasPrefix(m[0], name) && !strings.Contains(line, " -") && strings.Count(line, " ") > 4; prose {
				continue
			}
			found++
			args := strings.Fields(strings.ReplaceAll(line, "'", ""))
			root := program()
			root.InitDefaultHelpCmd()
			c, rest, err := root.Find(args)
			if err == nil && !strings.Contains(line, "…") {
				err = c.ParseFlags(rest)
			}
			if err == nil && !c.Runnable() && c.Flags().NArg() > 0 {
				err = fmt.Errorf("there is no %s of it", c.Flags().Arg(0))
			}
			if err == nil && !c.HasParent() {
				err = c.ValidateArgs(c.Flags().Args())
			}
			if err != nil && !errors.Is(err, pflag.ErrHelp) {
				t.Errorf("%s: %s%s: %v", page, name, line, err)
			}
		}
	}
	if found < 10 {
		t.Errorf("the pages have %d command lines of %s", found, name)
	}
}
