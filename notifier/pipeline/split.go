package pipeline

import (
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strings"
	"time"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
)

// maxNames bounds the memory of which meters a pipeline passes.
const maxNames = 10_000

// selector knows which meters each pipeline passes. It is not safe for concurrent
// use.
type selector struct {
	cfg    *Config
	passes []map[string]bool // by pipeline, then meter
	keep   []bool            // by meter of the batch at hand
}

func newSelector(cfg *Config) selector {
	s := selector{cfg: cfg, passes: make([]map[string]bool, len(cfg.Pipelines))}
	for i := range s.passes {
		s.passes[i] = map[string]bool{}
	}
	return s
}

// Splitter finds what each sink gets of a batch. It is not safe for concurrent
// use.
type Splitter struct {
	selector
	keeper *Keeper
	made   assembler
	// partitions is how many queues there are to those who keep the state; 0: it
	// is kept here.
	partitions int
	union      []bool // by meter of the batch at hand: whether a sink that looks back gets it
}

// Elsewhere stands for the targets of what is for those who keep the state.
const Elsewhere = -1

var elsewhere = []int{Elsewhere}

// Chains returns the chains of the sinks that have stages, by sink, with empty
// state. onDrop is called with each sample that a stage drops.
func (c *Config) Chains(bound Bound, onDrop func(Drop)) []*Chain {
	chains := make([]*Chain, len(c.Sinks))
	for i, s := range c.Sinks {
		if len(s.Stages) > 0 {
			chains[i] = newChain(s.Name, s.Stages, bound, onDrop)
		}
	}
	return chains
}

// NewSplitter returns a splitter of the keeper's configuration. With partitions,
// nothing is kept: what sinks that look back get is split by resource, for as many
// queues.
func NewSplitter(k *Keeper, partitions int) *Splitter {
	return &Splitter{selector: newSelector(k.cfg), keeper: k, partitions: partitions}
}

// Split calls emit with what each sink gets of b and with the indexes of its
// targets: b itself where a pipeline passes all of it as it is, else a derived
// batch, which shares memory with b. Gaps pass every pipeline, so of a batch
// without any that has no sample for a pipeline, that pipeline passes nothing.
func (s *Splitter) Split(b *sample.Batch, emit func(targets []int, part *sample.Batch)) {
	k := s.keeper
	for i := range s.cfg.Pipelines {
		p := &s.cfg.Pipelines[i]
		targets := s.cfg.Sinks[p.Sink].Targets
		if k.chains[p.Sink] != nil {
			continue
		}
		if p.Match.All() {
			emit(targets, b)
			continue
		}
		switch n := s.mark(i, b); {
		case n == b.Len():
			emit(targets, b)
		case n > 0 || len(b.Gaps) > 0:
			emit(targets, derive(b, s.keep, n, k.node, p.Name))
		}
	}
	var made [][]*sample.Batch
	if k.LooksBack() && s.partitions == 0 {
		made = k.Make(b)
	}
	for i, chain := range k.chains {
		var parts []*sample.Batch
		switch {
		case chain == nil:
		case !k.looksBack(i):
			parts, _ = transform(&s.selector, &s.made, i, chain, b, k.node)
		case made != nil:
			parts = made[i]
		case s.partitions > 0 && len(b.Gaps) > 0: // they need no state
			s.made.begin(b)
			parts = s.made.batches(s.cfg.Sinks[i].Name, k.node)
		}
		for _, part := range parts {
			emit(s.cfg.Sinks[i].Targets, part)
		}
	}
	if k.LooksBack() && s.partitions > 0 {
		s.scatter(b, func(part *sample.Batch) { emit(elsewhere, part) })
	}
}

// scatter calls emit with what the sinks that look back get of b, a batch for
// each partition that its resources are of. Samples keep their ids.
func (s *Splitter) scatter(b *sample.Batch, emit func(part *sample.Batch)) {
	s.union = append(s.union[:0], make([]bool, len(b.Meters))...)
	n := 0
	for i := range s.cfg.Pipelines {
		if s.keeper.looksBack(s.cfg.Pipelines[i].Sink) && s.mark(i, b) > 0 {
			for m, keep := range s.keep {
				s.union[m] = s.union[m] || keep
			}
			n++
		}
	}
	if n == 0 {
		return
	}
	var meters []sample.MeterRef
	number := make([]int, len(b.Meters)) // new number of each meter
	for m := range b.Meters {
		if s.union[m] {
			number[m] = len(meters)
			meters = append(meters, b.Meters[m])
		}
	}
	used := make([]bool, len(b.Rows))
	for i := range b.Columns {
		if s.union[b.Columns[i].Meter] {
			b.VisitColumn(i, func(row int, _ uint64) { used[row] = true })
		}
	}
	type scattered struct {
		*sample.Batch
		column int // of b, of which its last one is
	}
	parts := map[int]*scattered{}
	of := make([]*scattered, len(b.Rows)) // the part of each row
	rows := make([]int, len(b.Rows))      // its number there
	for r := range b.Rows {
		if !used[r] {
			continue
		}
		p := bus.Partition(b.Rows[r].Resource, s.partitions)
		part := parts[p]
		if part == nil {
			part = &scattered{&sample.Batch{
				ID: sample.DeriveBatchID(b.ID, fmt.Sprintf("stages:%d/%d", p, s.partitions)), Node: s.keeper.node, Base: b.Base, Meters: meters,
			}, -1}
			part.Relay(b)
			parts[p] = part
		}
		of[r], rows[r] = part, len(part.Rows)
		part.Rows = append(part.Rows, b.Rows[r])
	}
	index := 0
	for i := range b.Columns {
		c := &b.Columns[i]
		if !s.union[c.Meter] {
			index += len(c.Values)
			continue
		}
		b.VisitColumn(i, func(row int, bits uint64) {
			part, r := of[row], rows[row]
			if part.column != i {
				part.column = i
				part.Columns = append(part.Columns, sample.Column{
					Meter: number[c.Meter], Origin: c.Origin, Tag: c.Tag, Bitmap: make([]byte, (len(part.Rows)+7)/8),
				})
			}
			to := &part.Columns[len(part.Columns)-1]
			to.Bitmap[r/8] |= 1 << (r % 8)
			to.Values = append(to.Values, bits)
			part.IDs = append(part.IDs, b.SampleID(index).String())
			index++
		})
	}
	for _, p := range slices.Sorted(maps.Keys(parts)) {
		emit(parts[p].Batch)
	}
}

// transform returns what the chain of sink i makes of b, and how many samples it
// was fed.
func transform(s *selector, made *assembler, i int, chain *Chain, b *sample.Batch, node string) (parts []*sample.Batch, fed int) {
	made.begin(b)
	chain.Run(b.ID.Time(), func(put func(string, int, *sample.Sample)) {
		for p := range s.cfg.Pipelines {
			pipeline := &s.cfg.Pipelines[p]
			if pipeline.Sink != i {
				continue
			}
			if n := s.mark(p, b); n > 0 {
				fed += n
				b.Visit(s.keep, func(row int, smp *sample.Sample) { put(pipeline.Name, row, smp) })
			}
		}
	}, made.add)
	return made.batches(s.cfg.Sinks[i].Name, node), fed
}

// Emit calls emit with what sink i makes of samples that came together, in the
// order in which Ceilometer publishes them, and with the pipeline through which
// they came. chain is the sink's, or nil.
func (c *Config) Emit(i int, chain *Chain, samples []sample.Sample, emit func(pipeline string, s *sample.Sample)) {
	feed := func(put func(string, int, *sample.Sample)) {
		for p := range c.Pipelines {
			if c.Pipelines[p].Sink != i {
				continue
			}
			for s := range samples {
				if c.Pipelines[p].Match.Match(samples[s].Name) {
					put(c.Pipelines[p].Name, -1, &samples[s])
				}
			}
		}
	}
	if chain == nil {
		feed(func(pipeline string, _ int, s *sample.Sample) { emit(pipeline, s) })
		return
	}
	chain.Run(time.Now(), feed, func(it *Item) { emit(it.pipeline, &it.Sample) })
}

// mark sets keep for the meters that pipeline i passes and returns how many
// samples they have.
func (s *selector) mark(i int, b *sample.Batch) int {
	s.keep = s.keep[:0]
	known := s.passes[i]
	for m := range b.Meters {
		name := b.Meters[m].Name
		pass, ok := known[name]
		if !ok {
			if len(known) >= maxNames {
				clear(known)
			}
			pass = s.cfg.Pipelines[i].Match.Match(name)
			known[name] = pass
		}
		s.keep = append(s.keep, pass)
	}
	n := 0
	for c := range b.Columns {
		if s.keep[b.Columns[c].Meter] {
			n += len(b.Columns[c].Values)
		}
	}
	return n
}

// derive returns the n samples of b whose meters are kept, with the ids that
// they have in b, and the rows that they need. The batch's own id follows from
// b's and the pipeline's name, so that it is the same whenever b is delivered; it
// has neither epoch nor sequence number. Its gaps are still those of b's node.
func derive(b *sample.Batch, keep []bool, n int, node, pipeline string) *sample.Batch {
	d := &sample.Batch{
		ID: sample.DeriveBatchID(b.ID, pipeline), Node: node, Base: b.Base,
		IDs: ids(b, keep, n), Gaps: gapsOf(b),
	}
	d.Relay(b)
	meters := make([]int, len(b.Meters)) // new number of each
	for m, k := range keep {
		if k {
			meters[m] = len(d.Meters)
			d.Meters = append(d.Meters, b.Meters[m])
		}
	}
	used := make([]byte, (len(b.Rows)+7)/8)
	for i := range b.Columns {
		c := &b.Columns[i]
		if !keep[c.Meter] {
			continue
		}
		d.Columns = append(d.Columns, sample.Column{
			Meter: meters[c.Meter], Origin: c.Origin, Tag: c.Tag, Bitmap: c.Bitmap, Values: c.Values,
		})
		for w := range used {
			used[w] |= c.Bitmap[w]
		}
	}
	d.Rows = compact(b.Rows, d.Columns, used)
	return d
}

// gapsOf returns the gaps of b with the node that each is of.
func gapsOf(b *sample.Batch) []sample.Gap {
	gaps := slices.Clone(b.Gaps)
	for i := range gaps {
		if gaps[i].Node == "" {
			gaps[i].Node = b.Host()
		}
	}
	return gaps
}

// ids returns the ids of the n samples whose meters are kept. They share one
// string: those that follow from the batch's differ in their last four digits.
func ids(b *sample.Batch, keep []bool, n int) []string {
	out := make([]string, 0, n)
	const size, digits = 36, "0123456789abcdef"
	prefix := b.ID.String()[:size-4]
	var text strings.Builder
	if b.IDs == nil {
		text.Grow(n * size)
	}
	index := 0
	for i := range b.Columns {
		c := &b.Columns[i]
		if !keep[c.Meter] {
			index += len(c.Values)
			continue
		}
		for range c.Values {
			if b.IDs != nil {
				out = append(out, b.IDs[index])
			} else {
				text.WriteString(prefix)
				for shift := 12; shift >= 0; shift -= 4 {
					text.WriteByte(digits[index>>shift&15])
				}
			}
			index++
		}
	}
	for all := text.String(); len(all) > 0; all = all[size:] {
		out = append(out, all[:size])
	}
	return out
}

// compact returns the used rows and rewrites the columns' bitmaps to them.
func compact(rows []sample.Row, columns []sample.Column, used []byte) []sample.Row {
	n := 0
	for _, w := range used {
		n += bits.OnesCount8(w)
	}
	if n == len(rows) {
		return rows
	}
	kept := make([]sample.Row, 0, n)
	number := make([]int, len(rows)) // new number of each used row
	for w, set := range used {
		for ; set != 0; set &= set - 1 {
			r := w*8 + bits.TrailingZeros8(set)
			number[r] = len(kept)
			kept = append(kept, rows[r])
		}
	}
	for i := range columns {
		old := columns[i].Bitmap
		bitmap := make([]byte, (n+7)/8)
		for w, set := range old {
			for ; set != 0; set &= set - 1 {
				r := number[w*8+bits.TrailingZeros8(set)]
				bitmap[r/8] |= 1 << (r % 8)
			}
		}
		columns[i].Bitmap = bitmap
	}
	return kept
}
