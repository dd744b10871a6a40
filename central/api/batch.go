package api

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// orderedColumns bounds what the order of samples may cost: a column begins
// wherever the meter changes, and each is as long as there are samples.
const orderedColumns = 1024

// BatchOf returns a batch of samples that came over HTTP, at most
// [sample.MaxSamples]. It keeps their order, in which samples of the same time
// are listed, unless their meters change a thousand times. Samples that have no id get one, made of the time now.
func BatchOf(now time.Time, samples []sample.Sample) *sample.Batch {
	n := len(samples)
	b := &sample.Batch{ID: sample.NewBatchID(now), Rows: make([]sample.Row, n), IDs: make([]string, n)}
	if n > 0 {
		b.Base = samples[0].Time
	}
	meters := map[sample.MeterRef]int{}
	type column struct {
		meter  int
		origin sample.Origin
		tag    sample.Tag
	}
	columns := map[column]int{}
	for i := range samples {
		s := &samples[i]
		b.Rows[i] = sample.Row{
			Resource: s.Resource, Offset: s.Time - b.Base, Incarnation: s.Incarnation, Source: s.Source,
			Project: s.Project, User: s.User, Metadata: s.Metadata, Foreign: s.Foreign,
		}
		b.IDs[i] = s.ID.String()
		if s.ID == (sample.ID{}) {
			b.IDs[i] = b.ID.Sample(i).String()
		}
		ref := sample.MeterRef{Name: s.Name, Kind: s.Kind, Unit: s.Unit}
		meter, ok := meters[ref]
		if !ok {
			meter = len(b.Meters)
			meters[ref] = meter
			b.Meters = append(b.Meters, ref)
		}
		key := column{meter, s.Origin, s.Volume.Tag}
		at, ok := columns[key]
		if !ok || at < len(b.Columns)-1 && len(b.Columns) < orderedColumns {
			at = len(b.Columns)
			columns[key] = at
			b.Columns = append(b.Columns, sample.Column{Meter: meter, Origin: s.Origin, Tag: s.Volume.Tag, Bitmap: make([]byte, (n+7)/8)})
		}
		c := &b.Columns[at]
		c.Bitmap[i/8] |= 1 << (i % 8)
		c.Values = append(c.Values, s.Volume.Bits)
	}
	return b
}

// Store stores a batch that came over HTTP. Its errors are for the client where
// the client can do something about them.
func Store(ctx context.Context, s store.Store, b *sample.Batch) error {
	enc, err := sample.NewEncoder()
	if err != nil {
		return err
	}
	body, err := enc.Encode(nil, b)
	if err != nil {
		return err
	}
	stored, err := s.Append(ctx, []store.Received{{Body: body, Batch: b}})
	if err != nil {
		return storeFault(err)
	}
	if stored[0].Refused != nil {
		return badRequest("The samples cannot be stored: %v", stored[0].Refused)
	}
	return nil
}

// storeFault tells the client of a store that is full: it may try again later.
func storeFault(err error) error {
	if errors.Is(err, store.ErrDiskFull) {
		return &fault{status: http.StatusServiceUnavailable, text: "The store has no room for more until its operator frees some."}
	}
	return err
}
