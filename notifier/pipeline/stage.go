package pipeline

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/notifier/pipeline/python"
	"github.com/kvmeter/kvmeter/sample"
)

// Item is a sample on its way through the stages of a sink.
type Item struct {
	sample.Sample
	// row is the row of the batch it came in, as long as what a row holds is
	// unchanged, else -1.
	row int
	// pipeline is the one through which the sample came in, for derived ids.
	pipeline string
	// derived says that the stage at hand made a new sample of it, whose id follows
	// from the one it has.
	derived bool
}

// renew says that the item is a new sample. As in Ceilometer, it has no
// reading of the sender's monotonic clock.
func (it *Item) renew() {
	it.derived = true
	if f := it.Foreign; f != nil && f.HasMonotonic {
		kept := *f
		kept.HasMonotonic, kept.Monotonic = false, 0
		it.Foreign, it.row = &kept, -1
	}
}

// setTime gives the item the time of another one.
func (it *Item) setTime(time int64, text string) {
	it.Time, it.row = time, -1
	if it.timestamp() == text {
		return
	}
	var f sample.Foreign
	if it.Foreign != nil {
		f = *it.Foreign
	}
	f.Timestamp = text
	it.Foreign = &f
}

// timestamp returns the time as it was written, where that matters.
func (it *Item) timestamp() string {
	if it.Foreign == nil {
		return ""
	}
	return it.Foreign.Timestamp
}

// A stage transforms the samples of a sink. It is used by one goroutine at a
// time.
type stage interface {
	// begin is called before the samples of a batch: now is the time, and made
	// when the batch was made, by the clock of who made it.
	begin(now, made time.Time)
	// process changes the sample in place and returns true where it goes on to
	// the next stage; false where it is kept back. An error drops it.
	process(it *Item) (bool, error)
	// flush emits what was kept back and is due, after each batch.
	flush(emit func(*Item), drop func(error))
}

// Bound is how much a stage remembers.
type Bound struct {
	Series int           // at most
	Age    time.Duration // what was not seen for longer may be forgotten, and after twice of it is; 0: nothing is too old
}

// Why samples are dropped; each is a reason in the metrics.
var (
	errFirst  = errors.New("no earlier sample of the series")
	errLate   = errors.New("older than the series' last sample")
	errOld    = errors.New("the other meters of the expression did not come")
	errShrank = errors.New("the meter went down, and only growth is asked for")
)

// reason returns the word for an error of a stage.
func reason(err error) string {
	switch {
	case errors.Is(err, errFirst):
		return "first"
	case errors.Is(err, errLate):
		return "late"
	case errors.Is(err, errOld):
		return "old"
	case errors.Is(err, errShrank):
		return "shrank"
	case errors.Is(err, python.ErrZeroDivision):
		return "zero_division"
	}
	return "error"
}

// Drop says which stage dropped a sample, and why.
type Drop struct {
	Sink   string
	Stage  string // its name in pipeline.yaml
	Reason string
}

// Chain is the stages of one sink, which its pipelines share. It is safe for
// concurrent use: batches go through it one after the other.
type Chain struct {
	sink  string
	names []string // of the stages

	mu     sync.Mutex
	stages []stage
	onDrop func(Drop)
	what   []byte // scratch: what names a derivation
}

// Run passes samples through the stages: feed calls its argument with each of
// them, and emit gets what comes out, first what passed, then what the stages
// let go at the end of the batch, which was made at a time. Items are good until emit returns.
func (c *Chain) Run(made time.Time, feed func(put func(pipeline string, row int, s *sample.Sample)), emit func(*Item)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for _, st := range c.stages {
		st.begin(now, made)
	}
	var it Item
	feed(func(pipeline string, row int, s *sample.Sample) {
		it = Item{Sample: *s, row: row, pipeline: pipeline}
		c.from(0, &it, emit)
	})
	for i, st := range c.stages {
		ordinal := 0
		st.flush(func(it *Item) {
			c.name(it, i, ordinal)
			ordinal++
			c.from(i+1, it, emit)
		}, func(err error) { c.drop(i, err) })
	}
}

// from passes an item through the stages from the nth on.
func (c *Chain) from(n int, it *Item, emit func(*Item)) {
	for i := n; i < len(c.stages); i++ {
		on, err := c.stages[i].process(it)
		if err != nil {
			c.drop(i, err)
			return
		}
		if !on {
			return
		}
		c.name(it, i, 0)
	}
	emit(it)
}

// name gives an item that stage i made its id.
func (c *Chain) name(it *Item, i, ordinal int) {
	if !it.derived {
		return
	}
	it.derived = false
	c.what = append(c.what[:0], it.pipeline...)
	c.what = binary.BigEndian.AppendUint32(append(c.what, 0, byte(i)), uint32(ordinal))
	it.ID = sample.DeriveID(it.ID, c.what)
}

func (c *Chain) drop(i int, err error) { c.onDrop(Drop{c.sink, c.names[i], reason(err)}) }

// newChain returns the chain of a sink with empty state.
func newChain(sink string, specs []StageSpec, bound Bound, onDrop func(Drop)) *Chain {
	c := &Chain{sink: sink, onDrop: onDrop}
	for _, s := range specs {
		c.names = append(c.names, s.Name)
		c.stages = append(c.stages, s.make(bound))
	}
	return c
}

// Stateful reports whether a stage's answer depends on what it saw before.
func Stateful(specs []StageSpec) bool {
	return slices.ContainsFunc(specs, func(s StageSpec) bool { return s.stateful })
}
