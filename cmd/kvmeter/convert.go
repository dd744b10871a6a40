package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/notifier/conversion"
	"github.com/kvmeter/kvmeter/notifier/value"
)

func convertCommand() *cobra.Command {
	var meterFiles, sets []string
	var eventFile string
	var explain bool
	c := &cobra.Command{
		Use:   "convert [--meters FILE]... [--events FILE] < notifications.json",
		Short: "Show the samples and the event that notifications give",
		Long: `Convert reads notifications, as JSON, a list of them or one a line, and prints for
each one line: {"samples": [...], "event": {...} or null, "errors": [...]}. Samples
and events are as they are on Ceilometer's bus, but for the signature. A
notification may be enveloped, bare with _context_ keys, or {ctxt, publisher_id,
event_type, priority, payload, metadata}.`,
		Example: `  kvmeter convert < notification.json
  kvmeter convert --meters /etc/ceilometer/meters.d --explain < notification.json
  kvmeter convert --events event_definitions.yaml --set event.store_raw=info < notifications.jsonl`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			settings := conversion.DefaultSettings()
			for _, s := range sets {
				if err := settings.Set(s); err != nil {
					return fmt.Errorf("--set: %w", err)
				}
			}
			if len(meterFiles) == 0 {
				meterFiles = []string{conversion.Shipped}
			}
			d, findings, err := conversion.Load(settings, meterFiles, eventFile)
			if err != nil {
				return err
			}
			for i := range findings {
				if findings[i].Error {
					fmt.Fprintln(cmd.ErrOrStderr(), "left out:", findings[i].String())
				}
			}
			return convert(cmd.InOrStdin(), cmd.OutOrStdout(), conversion.NewConverter(d), explain)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&meterFiles, "meters", nil, "file or folder of meter definitions, or \"shipped\"; may be repeated (default: shipped)")
	f.StringVar(&eventFile, "events", "", "file of event definitions (default: kvmeter's own)")
	f.StringArrayVar(&sets, "set", nil, "a setting, as group.option=value with ceilometer.conf's names; may be repeated")
	f.BoolVar(&explain, "explain", false, "also say why a definition gave no sample, and which one gave the event")
	return c
}

// convert prints a line for each notification. One that cannot be read costs its
// line only.
func convert(in io.Reader, out io.Writer, c *conversion.Converter, explain bool) error {
	w := bufio.NewWriter(out)
	var line []byte
	err := eachJSON(in, func(v *value.Value, err error) error {
		var r *conversion.Result
		if err == nil {
			r, err = c.ConvertValue(v)
		}
		var why []string
		switch {
		case err != nil:
			r = &conversion.Result{Errors: []error{err}}
			if explain {
				why = []string{}
			}
		case explain:
			why = c.Explain()
		}
		line = append(r.AppendLine(line[:0], why), '\n')
		_, err = w.Write(line)
		return err
	})
	return errors.Join(err, w.Flush())
}

// eachJSON calls do with each JSON value of a text, and with each element of one
// that is a list. What is no JSON is an error for do, and reading goes on with
// the next line.
func eachJSON(in io.Reader, do func(*value.Value, error) error) error {
	data, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("read standard input: %w", err)
	}
	var p value.Parser
	for rest := string(data); ; {
		p.Reset()
		v, after, ok, err := p.ParseNext(rest)
		if !ok {
			return nil
		}
		if err != nil {
			_, after, _ = strings.Cut(strings.TrimLeft(rest, " \t\r\n"), "\n")
			if err := do(nil, err); err != nil {
				return err
			}
		} else if v.Kind == value.List {
			for i := range v.Items {
				if err := do(&v.Items[i], nil); err != nil {
					return err
				}
			}
		} else if err := do(&v, nil); err != nil {
			return err
		}
		rest = after
	}
}
