package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

func pipelineCommand() *cobra.Command {
	var file, only string
	c := &cobra.Command{
		Use:   "pipeline --config FILE < samples.json",
		Short: "Print what a pipeline.yaml makes of samples",
		Long: `Reads samples as JSON, passes them through the pipelines of a file and prints
what would be published, one JSON object a line. Nothing is published.

Samples may be in either of Ceilometer's forms (counter_name or name). A JSON list
is one batch, and so is an object by itself: stages that aggregate let go at the end
of a batch. A list of lists is several batches.

With an event_pipeline.yaml (whose sources list events), it reads and prints events.
What "kvmeter convert" prints can be read in either case.

Where the file has several pipelines, each line says in "pipeline" which one it is of;
what a shared sink lets go at the end of a batch is of the pipeline that fed it.`,
		Example: `  kvmeter pipeline --config /etc/ceilometer/pipeline.yaml < samples.json
  kvmeter convert < notifications.json | kvmeter pipeline --config pipeline.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			data, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			p := &pipelinePrinter{out: out, only: only, complain: func(err error) { fmt.Fprintln(cmd.ErrOrStderr(), "Warning:", err) }}
			if err := p.load(file, data); err != nil {
				return err
			}
			if err := wire.ReadBatches(cmd.InOrStdin(), p.events, p.batch); err != nil {
				_ = out.Flush()
				return err
			}
			for d, n := range p.drops {
				p.complain(fmt.Errorf("sink %s: %s dropped %d samples: %s", d.Sink, d.Stage, n, d.Reason))
			}
			return out.Flush()
		},
	}
	c.Flags().StringVarP(&file, "config", "c", "", "the pipeline.yaml or event_pipeline.yaml")
	c.Flags().StringVar(&only, "pipeline", "", "print what this pipeline emits only, by its name (source:sink)")
	_ = c.MarkFlagRequired("config")
	return c
}

// pipelinePrinter prints what pipelines emit.
type pipelinePrinter struct {
	out      *bufio.Writer
	only     string
	complain func(error)
	cfg      *pipeline.Config
	events   bool
	chains   []*pipeline.Chain
	drops    map[pipeline.Drop]int
	buf      []byte
}

// load reads the file, as of events where it is none of samples.
func (p *pipelinePrinter) load(file string, data []byte) error {
	var err error
	if p.events = pipeline.HasEvents(data); p.events {
		p.cfg, err = pipeline.LoadEvents(file, data)
	} else {
		p.cfg, err = pipeline.Load(file, data)
	}
	if err != nil {
		return err
	}
	for _, w := range p.cfg.Warnings() {
		p.complain(w)
	}
	p.drops = map[pipeline.Drop]int{}
	p.chains = p.cfg.Chains(pipeline.Bound{Series: notifier.DefaultConfig().MaxSeries}, func(d pipeline.Drop) { p.drops[d]++ })
	for _, pl := range p.cfg.Pipelines {
		if p.only == "" || pl.Name == p.only {
			return nil
		}
	}
	return fmt.Errorf("%s has no pipeline %q", file, p.only)
}

func (p *pipelinePrinter) batch(raw []json.RawMessage) error {
	var bad []error
	defer func() {
		for _, err := range bad {
			p.complain(err)
		}
	}()
	if p.events {
		p.eventBatch(parsed(raw, sample.ParseEvent, &bad))
		return nil
	}
	samples := parsed(raw, sample.ParseForeign, &bad)
	ids := sample.NewBatchID(time.Now())
	for i := range samples {
		if samples[i].ID == (sample.ID{}) {
			samples[i].ID = sample.DeriveID(ids.Sample(0), binary.BigEndian.AppendUint64(nil, uint64(i)))
		}
	}
	w := wire.NewWriter(wire.JSON)
	for i := range p.cfg.Sinks {
		p.cfg.Emit(i, p.chains[i], samples, func(name string, s *sample.Sample) {
			p.line(name, w.Sample(p.buf[:0], s))
		})
	}
	return nil
}

func (p *pipelinePrinter) eventBatch(events []sample.Event) {
	for i := range events {
		for _, pl := range p.cfg.Pipelines {
			if pl.Match.Match(events[i].Type) {
				p.line(pl.Name, events[i].AppendJSON(p.buf[:0]))
			}
		}
	}
}

// line prints an object, with the pipeline's name where there are several.
func (p *pipelinePrinter) line(name string, object []byte) {
	p.buf = object
	if p.only != "" && name != p.only {
		return
	}
	if len(p.cfg.Pipelines) > 1 && p.only == "" {
		p.buf = append(p.buf[:len(p.buf)-1], `, "pipeline": `...)
		p.buf = append(sample.AppendText(p.buf, name), '}')
	}
	p.buf = append(p.buf, '\n')
	_, _ = p.out.Write(p.buf) // what fails is said by Flush
}
