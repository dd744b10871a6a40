package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/notifier/pipeline"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
)

// one is a sample as flags say it.
type one struct {
	name, kind, unit, volume, resource, user, project, timestamp, metadata string
}

func sendSampleCommand() *cobra.Command {
	var t trial
	var s one
	var file string
	c := &cobra.Command{
		Use:   "send-sample --sample-name NAME --sample-resource ID",
		Short: "Send one sample through pipeline.yaml to its publishers",
		Long: `Makes a sample and passes it through the pipelines of the notifier's
configuration to their publishers, as if it had been received. Transformers that
need more than one sample give nothing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := s.sample(time.Now())
			if err != nil {
				return err
			}
			cfg, err := t.load()
			if err != nil {
				return err
			}
			pipe, err := loadPipeline(cmp.Or(file, cfg.Pipeline), file != "")
			if err != nil {
				return err
			}
			return t.run(cmd, func(d publisher.Deps) error {
				batch := pipeline.Batches([]sample.Sample{b}, d.Name, time.Now())[0]
				keeper, err := pipeline.NewKeeper(pipe, pipeline.Bound{Series: cfg.MaxSeries}, d.Name, func(pipeline.Drop) {})
				if err != nil {
					return err
				}
				var errs []error
				sent := 0
				pipeline.NewSplitter(keeper, 0).Split(batch, func(targets []int, part *sample.Batch) {
					whole := *batch // what is published is signed anew
					for _, i := range targets {
						to := pipe.Targets[i]
						p, _, err := publisher.Open(all.Publishers, to.URL, d)
						if err == nil {
							err = errors.Join(p.Publish(cmd.Context(), []publisher.Part{{From: &whole, Batch: part}}), p.Close())
						}
						if err != nil {
							errs = append(errs, fmt.Errorf("publisher %s: %w", to.Name, err))
							continue
						}
						sent++
						fmt.Fprintf(cmd.OutOrStdout(), "%s has sample %s\n", to.Name, part.SampleID(0))
					}
				})
				if sent == 0 && len(errs) == 0 {
					return errors.New("no pipeline passes this sample on")
				}
				return errors.Join(errs...)
			})
		},
	}
	t.register(c.Flags())
	f := c.Flags()
	f.StringVar(&file, "pipeline", "", "pipeline.yaml (default: the one of the configuration)")
	f.StringVar(&s.name, "sample-name", "", "name of the meter")
	f.StringVar(&s.resource, "sample-resource", "", "resource id")
	f.StringVar(&s.kind, "sample-type", "gauge", "gauge, delta or cumulative")
	f.StringVar(&s.unit, "sample-unit", "", "unit")
	f.StringVar(&s.volume, "sample-volume", "1", "volume")
	f.StringVar(&s.user, "sample-user", "", "user id")
	f.StringVar(&s.project, "sample-project", "", "project id")
	f.StringVar(&s.timestamp, "sample-timestamp", "", "time as 2006-01-02T15:04:05, in UTC (default: now)")
	f.StringVar(&s.metadata, "sample-metadata", "{}", "metadata, a JSON object")
	_ = c.MarkFlagRequired("sample-name")
	_ = c.MarkFlagRequired("sample-resource")
	return c
}

// sample returns the sample of the flags.
func (o *one) sample(now time.Time) (sample.Sample, error) {
	if !json.Valid([]byte(o.metadata)) {
		return sample.Sample{}, errors.New("--sample-metadata is no JSON object")
	}
	if o.kind != "gauge" && o.kind != "delta" && o.kind != "cumulative" {
		return sample.Sample{}, fmt.Errorf("--sample-type %q: it is gauge, delta or cumulative", o.kind)
	}
	raw, err := json.Marshal(map[string]any{
		"name": o.name, "type": o.kind, "unit": o.unit, "volume": o.volume, "resource_id": o.resource, "user_id": o.user, "project_id": o.project,
		"timestamp": cmp.Or(o.timestamp, string(sample.AppendTime(nil, now.UnixMicro()))), "resource_metadata": json.RawMessage(o.metadata),
	})
	if err != nil {
		return sample.Sample{}, err
	}
	return sample.ParseForeign(raw)
}

// loadPipeline reads a pipeline.yaml, or returns the built-in one where there
// is none and none must be there.
func loadPipeline(file string, must bool) (*pipeline.Config, error) {
	data, err := os.ReadFile(file)
	switch {
	case err == nil:
		return pipeline.Load(file, data)
	case errors.Is(err, os.ErrNotExist) && !must:
		return pipeline.Load("the built-in pipeline", []byte(pipeline.Default))
	}
	return nil, err
}
