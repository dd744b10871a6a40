package pipeline

import (
	"math/bits"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// maxNames bounds the memory of which meters a pipeline passes.
const maxNames = 10_000

// Splitter finds what each pipeline passes of a batch. It is not safe for
// concurrent use.
type Splitter struct {
	cfg    *Config
	node   string
	passes []map[string]bool // by pipeline, then meter
	keep   []bool            // by meter of the batch at hand
}

// NewSplitter returns a splitter for the notifier of the given name.
func NewSplitter(cfg *Config, node string) *Splitter {
	s := &Splitter{cfg: cfg, node: node, passes: make([]map[string]bool, len(cfg.Pipelines))}
	for i := range s.passes {
		s.passes[i] = map[string]bool{}
	}
	return s
}

// Split calls emit with what each pipeline passes of b: b itself where that is
// all of it, else a derived batch, which shares memory with b. Gaps pass every
// pipeline, so of a batch without any that has no sample for a pipeline, that
// pipeline passes nothing.
func (s *Splitter) Split(b *sample.Batch, emit func(p *Pipeline, part *sample.Batch)) {
	for i := range s.cfg.Pipelines {
		p := &s.cfg.Pipelines[i]
		if p.Meters.All() {
			emit(p, b)
			continue
		}
		switch n := s.mark(i, b); {
		case n == b.Len():
			emit(p, b)
		case n > 0 || len(b.Gaps) > 0:
			emit(p, derive(b, s.keep, n, s.node, p.Name))
		}
	}
}

// mark sets keep for the meters that pipeline i passes and returns how many
// samples they have.
func (s *Splitter) mark(i int, b *sample.Batch) int {
	s.keep = s.keep[:0]
	known := s.passes[i]
	for m := range b.Meters {
		name := b.Meters[m].Name
		pass, ok := known[name]
		if !ok {
			if len(known) >= maxNames {
				clear(known)
			}
			pass = s.cfg.Pipelines[i].Meters.Match(name)
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
		IDs: ids(b, keep, n), Gaps: slices.Clone(b.Gaps),
	}
	for i := range d.Gaps {
		if d.Gaps[i].Node == "" {
			d.Gaps[i].Node = b.Node
		}
	}
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
