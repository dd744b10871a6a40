package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/notifier/events"
	"github.com/kvmeter/kvmeter/notifier/meters"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/notifier/publisher/gnocchi"
)

// errLint is returned where a file has errors, which are printed already.
var errLint = errors.New("there are errors")

func lintCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "lint FILE...",
		Short: "Say what is wrong or surprising in definitions and pipelines",
		Long: `Lint reads files of meter definitions, event definitions, pipelines, what to
poll and the resources of Gnocchi, and tells them apart by what is in them. Each line it prints names the file, the line, what is
wrong or may surprise there, and what to write instead. It fails where something
cannot be used.`,
		Example: `  kvmeter lint /etc/ceilometer/meters.d/*.yaml /etc/ceilometer/event_definitions.yaml
  kvmeter lint /etc/kvmeter/pipeline.yaml`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			bad := false
			for _, file := range files {
				var findings []definition.Finding
				data, err := os.ReadFile(file)
				if err == nil {
					findings, err = lint(file, data)
				}
				bad = report(cmd.OutOrStdout(), findings, err) || bad
			}
			if bad {
				return errLint
			}
			return nil
		},
	}
}

// report prints findings, and reports whether one is an error.
func report(w io.Writer, findings []definition.Finding, err error) bool {
	slices.SortStableFunc(findings, func(a, b definition.Finding) int { return cmp.Compare(a.Line, b.Line) })
	for i := range findings {
		kind := "warning"
		if findings[i].Error {
			kind, err = "error", errors.Join(err, errLint)
		}
		fmt.Fprintf(w, "%s: %s\n", kind, findings[i].String())
	}
	if err != nil && !errors.Is(err, errLint) {
		fmt.Fprintf(w, "error: %v\n", err)
	}
	return err != nil
}

// lint returns what there is to say about a file, or an error about all of it.
func lint(file string, data []byte) ([]definition.Finding, error) {
	var doc yaml.Node
	if yaml.Unmarshal(data, &doc) == nil && len(doc.Content) == 1 {
		switch root := doc.Content[0]; {
		case has(root, "sinks"), root.Kind == yaml.SequenceNode && len(root.Content) > 0 && has(root.Content[0], "publishers"):
			return lintPipeline(file, data)
		case root.Kind == yaml.SequenceNode:
			set, err := events.Load(file, data, events.Options{})
			return said(set.Findings(), err)
		case has(root, "resources"):
			_, findings, err := gnocchi.Load(file, data)
			return findings, err
		case has(root, "sources"):
			odd, wrong := agent.CheckPolling(data)
			var findings []definition.Finding
			for _, text := range wrong {
				findings = append(findings, finding(file, errors.New(text), true))
			}
			for _, text := range odd {
				findings = append(findings, finding(file, errors.New(text), false))
			}
			return findings, nil
		case !has(root, "metric"):
			return nil, fmt.Errorf("%s: neither a list of event definitions, nor meter definitions under the key metric, nor sources and sinks of a pipeline, nor sources to poll, nor resources of Gnocchi", file)
		}
	}
	set, err := meters.Load([]meters.File{{Name: file, Data: data}}, meters.DefaultOptions())
	return said(set.Findings(), err)
}

// said returns findings without the error that they explain.
func said(findings []definition.Finding, err error) ([]definition.Finding, error) {
	if definition.Errors(findings) != nil {
		err = nil
	}
	return findings, err
}

// lintPipeline lints a pipeline.yaml or event_pipeline.yaml.
func lintPipeline(file string, data []byte) ([]definition.Finding, error) {
	load, events := pipeline.Load, pipeline.HasEvents(data)
	if events {
		load = pipeline.LoadEvents
	}
	cfg, err := load(file, data)
	findings, targets, ok := pipeline.Findings(cfg, err)
	if !ok {
		return nil, err
	}
	for _, t := range targets {
		fail := func(format string, args ...any) {
			findings = append(findings, finding(file, fmt.Errorf("%s: publisher %s%s", t.Where, t.Name, fmt.Sprintf(format, args...)), true))
		}
		core, odd := observer.New(zap.WarnLevel)
		s, err := publisher.Check(all.Publishers, t.URL, publisher.Deps{Log: zap.New(core), Name: "lint"})
		switch {
		case err != nil:
			fail(": %v", err)
		case events && !s.Events:
			fail(" takes samples only")
		}
		for _, w := range odd.All() {
			for _, what := range w.ContextMap() {
				findings = append(findings, finding(file, fmt.Errorf("%s: publisher %s: %s: %v", t.Where, t.Name, w.Message, what), false))
			}
		}
	}
	return findings, nil
}

// finding makes one of an error that begins with "FILE:LINE: ", or with "line
// LINE: ".
func finding(file string, err error, bad bool) definition.Finding {
	text := err.Error()
	at, ok := strings.CutPrefix(text, file+":")
	if !ok {
		at, ok = strings.CutPrefix(text, "line ")
	}
	number, rest, cut := strings.Cut(at, ": ")
	if line, err := strconv.Atoi(number); ok && cut && err == nil {
		return definition.Finding{File: file, Line: line, Text: rest, Error: bad}
	}
	return definition.Finding{File: file, Text: strings.TrimPrefix(text, file+": "), Error: bad}
}

// has reports whether a mapping has a key.
func has(n *yaml.Node, key string) bool {
	if n.Kind != yaml.MappingNode {
		return false
	}
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return true
		}
	}
	return false
}
