package local

import (
	"cmp"
	"context"
	"encoding/binary"
	"math"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/diskqueue"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/fleet"
)

// BenchmarkAtRest prints the bytes that a day of an agent's samples takes, merged
// and rolled up, with ids and µs. KVMETER_BENCH_SPOOL names the spool of an agent
// that could reach no broker for a while, which is only read. The day is that
// while over and over: times are later by its length, and counters go on from
// where they were at its end. Domains that were not there all the while, and gaps, are left out.
func BenchmarkAtRest(b *testing.B) {
	spool := os.Getenv("KVMETER_BENCH_SPOOL")
	if spool == "" {
		b.Skip("KVMETER_BENCH_SPOOL names no agent's spool")
	}
	recorded := readSpool(b, spool)
	first, last := recorded[0].Base, recorded[len(recorded)-1].Base
	length := (last - first) * int64(len(recorded)) / int64(len(recorded)-1)
	keepSteady(recorded, first, last)
	grown := growth(recorded)
	var now time.Time
	dir := b.TempDir()
	o := Options{MinFree: 1, Retention: -1, Clock: func() time.Time { return now }}
	s := open(b, dir, o)
	enc, err := sample.NewEncoder()
	if err != nil {
		b.Fatal(err)
	}
	samples, cycles := 0, 0
	for round := int64(0); round*length < dayLength; round++ {
		for i, r := range recorded {
			batch := *r
			batch.Base += fleet.Start - first + round*length
			if batch.Base >= fleet.Start+dayLength {
				break
			}
			batch.Seq += uint64(round) * uint64(len(recorded))
			if round > 0 {
				batch.ID = sample.NewBatchID(time.UnixMicro(batch.Base))
			}
			batch.Columns, batch.Gaps = slices.Clone(r.Columns), nil
			eachValue(&batch, func(c, at int, key seriesOf) {
				if at == 0 {
					batch.Columns[c].Values = slices.Clone(r.Columns[c].Values)
				}
				batch.Columns[c].Values[at] += uint64(round) * grown[key]
			})
			now = time.UnixMicro(batch.Base).Add(time.Second)
			body, err := enc.Encode(nil, &batch)
			if err != nil {
				b.Fatal(err)
			}
			if st, err := s.Append(context.Background(), []store.Received{{Body: body, Batch: &batch}}); err != nil || st[0].Refused != nil || st[0].Duplicate {
				b.Fatalf("batch %d: %+v, %v", i, st, err)
			}
			samples, cycles = samples+batch.Len(), cycles+1
		}
	}
	settle(b, s)
	closeStore(b, s)
	s = open(b, dir, o) // drops spare log files
	kept := 0
	if err := s.Samples(context.Background(), store.Filter{}, func(store.Sample) bool { kept++; return true }); err != nil || kept != samples {
		b.Fatalf("%d samples of %d, %v", kept, samples, err)
	}
	rollups, err := s.db.EstimateDiskUsage([]byte{keyRollup}, []byte{keyRollup + 1})
	if err != nil {
		b.Fatal(err)
	}
	resources, err := s.Resources(context.Background(), store.Filter{})
	if err != nil {
		b.Fatal(err)
	}
	closeStore(b, s)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(len(resources)), "resources")
	b.ReportMetric(float64(len(recorded)), "batches-recorded")
	b.ReportMetric(float64(length)/1e6/float64(len(recorded)), "s/batch")
	b.ReportMetric(float64(cycles), "batches")
	b.ReportMetric(float64(samples), "samples")
	b.ReportMetric(float64(diskBytes(b, dir))/float64(samples), "B/sample")
	b.ReportMetric(float64(rollups)/float64(samples), "B-of-hours/sample")
	if info, err := os.Stat(filepath.Join(dir, "catalogue.db")); err == nil {
		b.ReportMetric(float64(info.Size())/float64(samples), "B-of-catalogue/sample")
	}
}

// readSpool returns the batches of a copy of a spool, oldest first.
func readSpool(b *testing.B, spool string) []*sample.Batch {
	dir := filepath.Join(b.TempDir(), "spool")
	if err := os.CopyFS(dir, os.DirFS(spool)); err != nil {
		b.Fatal(err)
	}
	q, err := diskqueue.Open(diskqueue.Options{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	defer q.Close()
	entries, err := q.Take(nil, diskqueue.OldestFirst, math.MaxInt32, math.MaxInt64)
	if err != nil {
		b.Fatal(err)
	}
	var out []*sample.Batch
	for _, e := range entries {
		const head = 8 + 16 // before the node's name: see agent/delivery
		if e.Kind != 1 || len(e.Body) < head+2 {
			continue
		}
		d, err := sample.NewDecoder()
		if err != nil {
			b.Fatal(err)
		}
		batch, err := d.Decode(e.Body[head+2+int(binary.LittleEndian.Uint16(e.Body[head:])):])
		if err != nil {
			b.Fatal(err)
		}
		out = append(out, batch)
	}
	if len(out) < 2 {
		b.Fatalf("%d batches in %s", len(out), spool)
	}
	slices.SortStableFunc(out, func(x, y *sample.Batch) int { return cmp.Compare(x.Base, y.Base) })
	return out
}

// seriesOf is what tells series apart whose counters go on.
type seriesOf struct {
	meter       sample.MeterRef
	resource    string
	incarnation sample.Incarnation
}

// eachValue calls visit with the column and position of each value.
func eachValue(b *sample.Batch, visit func(column, at int, key seriesOf)) {
	for c := range b.Columns {
		col, at := &b.Columns[c], 0
		for i, w := range col.Bitmap {
			for ; w != 0; w &= w - 1 {
				row := &b.Rows[i*8+bits.TrailingZeros8(w)]
				visit(c, at, seriesOf{b.Meters[col.Meter], row.Resource, row.Incarnation})
				at++
			}
		}
	}
}

// growth returns by how much each counter grew.
func growth(batches []*sample.Batch) map[seriesOf]uint64 {
	first, grown := map[seriesOf]uint64{}, map[seriesOf]uint64{}
	for _, b := range batches {
		eachValue(b, func(c, at int, key seriesOf) {
			v := b.Columns[c].Values[at]
			if key.meter.Kind != sample.Cumulative || b.Columns[c].Tag != sample.U64 {
				return
			}
			if _, ok := first[key]; !ok {
				first[key] = v
			}
			grown[key] = v - first[key]
		})
	}
	return grown
}

// keepSteady leaves out what is of resources that came or went: that were not seen
// in the first or the last tenth of the time.
func keepSteady(batches []*sample.Batch, first, last int64) {
	early, late := map[string]bool{}, map[string]bool{}
	for _, b := range batches {
		for i := range b.Rows {
			if b.Base < first+(last-first)/10 {
				early[b.Rows[i].Resource] = true
			}
			if b.Base > last-(last-first)/10 {
				late[b.Rows[i].Resource] = true
			}
		}
	}
	for _, b := range batches {
		var columns []sample.Column
		for _, c := range b.Columns {
			kept := sample.Column{Meter: c.Meter, Origin: c.Origin, Tag: c.Tag, Bitmap: make([]byte, len(c.Bitmap))}
			at := 0
			for i, w := range c.Bitmap {
				for ; w != 0; w &= w - 1 {
					bit := bits.TrailingZeros8(w)
					if r := b.Rows[i*8+bit].Resource; early[r] && late[r] {
						kept.Bitmap[i] |= 1 << bit
						kept.Values = append(kept.Values, c.Values[at])
					}
					at++
				}
			}
			if len(kept.Values) > 0 {
				columns = append(columns, kept)
			}
		}
		b.Columns = columns
	}
}
