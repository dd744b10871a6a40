package pipeline

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/kvmeter/kvmeter/sample"
)

// Keeper runs the stages that sinks of a configuration have, and what those
// remember can be recorded: what has changed since it last was, or all of it. A
// batch that was made something of gives the same again whenever it comes again,
// over a restart, too, until it is [Keeper.Taken]; then it gives nothing. It is
// safe for concurrent use.
type Keeper struct {
	cfg    *Config
	node   string
	chains []*Chain // by sink; nil for those without stages
	marks  []uint64 // by stage of all chains that look back: see stagesOf
	enc    *sample.Encoder
	dec    *sample.Decoder
	pack   *zstd.Encoder
	unpack *zstd.Decoder

	mu      sync.Mutex
	sel     selector
	made    assembler
	open    map[sample.BatchID][][]*sample.Batch // by what came in, then sink: what it gave, until it is taken
	order   []sample.BatchID                     // of open, those that came first, and some that are taken
	seen    *memory[sample.BatchID, struct{}]    // what came in
	tracked bool
	fed     int              // samples since the last record
	inputs  []sample.BatchID // since the last record
	taken   []sample.BatchID // since the last record
}

const (
	// openAtMost is how many batches are known that are not taken: more than a
	// queue may hand out before the first is acked.
	openAtMost = 1024
	// seenAtMost is how many batches are known at all, and half of it at least.
	seenAtMost = 1 << 16
	// recordBytes is about how large a record is at most, before it is compressed.
	recordBytes = 1 << 20
)

// recordVersion is the first byte of a record.
const recordVersion = 1

// The sections of a record.
const (
	ofInput = 1 // a batch that came in, and what it gave
	ofTaken = 2 // a batch of which that is taken
	ofStage = 3 // operations of a stage
	ofSeen  = 4 // operations of what came in
)

// NewKeeper returns a keeper with empty state, for the notifier of the given
// name. onDrop is called with each sample that a stage drops.
func NewKeeper(cfg *Config, bound Bound, node string, onDrop func(Drop)) (*Keeper, error) {
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	dec, err := sample.NewDecoder()
	if err != nil {
		return nil, err
	}
	pack, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(recordBytes), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	unpack, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(1<<30))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	k := &Keeper{
		cfg: cfg, node: node, chains: cfg.Chains(bound, onDrop), sel: newSelector(cfg), enc: enc, dec: dec, pack: pack, unpack: unpack,
		open: map[sample.BatchID][][]*sample.Batch{},
		seen: newMemory[sample.BatchID, struct{}](Bound{Series: seenAtMost, Age: bound.Age}),
	}
	for i := range k.chains {
		if k.looksBack(i) {
			k.marks = append(k.marks, marks(cfg.Sinks[i].Stages)...)
		}
	}
	return k, nil
}

// marks returns a number for each stage that tells whether it and all before it
// are the same.
func marks(specs []StageSpec) []uint64 {
	var all []uint64
	h := sha256.New()
	for _, s := range specs {
		_, _ = fmt.Fprintf(h, "%d:%s", len(s.text), s.text) // hash.Hash never returns an error
		all = append(all, binary.BigEndian.Uint64(h.Sum(nil)))
	}
	return all
}

// looksBack reports whether a stage of sink i does.
func (k *Keeper) looksBack(i int) bool { return Stateful(k.cfg.Sinks[i].Stages) }

// LooksBack reports whether a stage of any sink does.
func (k *Keeper) LooksBack() bool { return len(k.marks) > 0 }

// eachStage calls f with the stages that remember something, by the name of their
// sink, their number in it and their mark.
func (k *Keeper) eachStage(f func(sink string, i int, mark uint64, s remembering)) {
	mark := 0
	for i, c := range k.chains {
		if !k.looksBack(i) {
			continue
		}
		for n := range c.stages {
			if s, ok := c.stages[n].(remembering); ok {
				f(k.cfg.Sinks[i].Name, n, k.marks[mark], s)
			}
			mark++
		}
	}
}

// Make returns what the sinks that look back make of b, by sink; what b gave the
// first time, if it is not taken.
func (k *Keeper) Make(b *sample.Batch) [][]*sample.Batch {
	k.mu.Lock()
	defer k.mu.Unlock()
	if made, ok := k.open[b.ID]; ok {
		return made
	}
	k.seen.begin(time.Now())
	if _, ok := k.seen.get(b.ID); ok {
		return nil
	}
	made := make([][]*sample.Batch, len(k.chains))
	something := false
	for i, c := range k.chains {
		if k.looksBack(i) {
			fed := 0
			made[i], fed = transform(&k.sel, &k.made, i, c, b, k.node)
			something = something || fed > 0 || len(made[i]) > 0
		}
	}
	if something {
		k.seen.set(b.ID, struct{}{})
		k.keep(b.ID, made)
		if k.tracked {
			k.inputs = append(k.inputs, b.ID)
			k.fed += b.Len()
		}
	}
	return made
}

// keep remembers what a batch gave.
func (k *Keeper) keep(id sample.BatchID, made [][]*sample.Batch) {
	k.open[id] = made
	k.order = append(k.order, id)
	for len(k.open) > openAtMost || len(k.order) > 2*openAtMost {
		delete(k.open, k.order[0])
		k.order = k.order[1:]
	}
}

// Taken says that whatever a batch gave is published: it gives nothing more.
func (k *Keeper) Taken(id sample.BatchID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.open[id]; !ok {
		return
	}
	delete(k.open, id)
	if k.tracked {
		k.taken = append(k.taken, id)
	}
}

// Track makes the keeper remember what changes, for [Keeper.Changes].
func (k *Keeper) Track() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tracked, k.seen.tracked, k.seen.changed = true, true, nil
	k.inputs, k.taken = nil, nil
	k.eachStage(func(_ string, _ int, _ uint64, s remembering) { s.track() })
}

// Unrecorded returns how many samples had the batches of which something was made
// since [Keeper.Changes] was last called.
func (k *Keeper) Unrecorded() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fed
}

// Changes returns a record of what was made of batches since it was last called;
// nil if nothing was.
func (k *Keeper) Changes() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.inputs) == 0 {
		return nil
	}
	var w writer
	for _, id := range k.inputs {
		if made, ok := k.open[id]; ok {
			k.writeInput(&w, id, made)
		}
	}
	for _, id := range k.taken {
		w.byte(ofTaken)
		w.buf = append(w.buf, id[:]...)
	}
	k.inputs, k.taken, k.fed = k.inputs[:0], k.taken[:0], 0
	var inner writer
	k.seen.write(&inner, writeSeen)
	section(&w, &inner, ofSeen)
	k.eachStage(func(sink string, i int, mark uint64, s remembering) {
		inner.buf = inner.buf[:0]
		s.changes(&inner)
		stageSection(&w, &inner, sink, i, mark)
	})
	return k.seal(&w)
}

// All returns records of all there is.
func (k *Keeper) All() (records [][]byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var w writer
	cut := func(at int) {
		if len(w.buf) > at {
			records = append(records, k.seal(&w))
			w.buf = w.buf[:0]
		}
	}
	for _, id := range k.order {
		if made, ok := k.open[id]; ok {
			k.writeInput(&w, id, made)
			cut(recordBytes)
		}
	}
	var inner writer
	k.seen.all(func(write func(*writer)) {
		if write(&inner); len(inner.buf) > recordBytes {
			section(&w, &inner, ofSeen)
			cut(recordBytes)
		}
	}, writeSeen)
	section(&w, &inner, ofSeen)
	k.eachStage(func(sink string, i int, mark uint64, s remembering) {
		s.all(func(write func(*writer)) {
			if write(&inner); len(inner.buf) > recordBytes {
				stageSection(&w, &inner, sink, i, mark)
				cut(recordBytes)
			}
		})
		stageSection(&w, &inner, sink, i, mark)
	})
	cut(0)
	return records
}

// seal returns the record of sections.
func (k *Keeper) seal(w *writer) []byte { return k.pack.EncodeAll(w.buf, []byte{recordVersion}) }

// section appends a section of operations, and empties them.
func section(w, operations *writer, of byte) {
	if len(operations.buf) > 0 {
		w.byte(of)
		w.bytes(operations.buf)
	}
	operations.buf = operations.buf[:0]
}

func stageSection(w, operations *writer, sink string, i int, mark uint64) {
	if len(operations.buf) > 0 {
		w.byte(ofStage)
		w.string(sink)
		w.uint(uint64(i))
		w.fixed(mark)
		w.bytes(operations.buf)
	}
	operations.buf = operations.buf[:0]
}

func writeSeen(w *writer, id sample.BatchID, _ struct{}) { w.buf = append(w.buf, id[:]...) }

func readSeen(r *reader) (id sample.BatchID, _ struct{}) {
	copy(id[:], r.take(len(id)))
	return id, struct{}{}
}

// writeInput writes what a batch gave. What cannot be encoded no publisher that
// encodes can take either.
func (k *Keeper) writeInput(w *writer, id sample.BatchID, made [][]*sample.Batch) {
	w.byte(ofInput)
	w.buf = append(w.buf, id[:]...)
	for i, parts := range made {
		for _, part := range parts {
			body, err := k.enc.Encode(nil, part)
			if err != nil {
				continue
			}
			w.bool(true)
			w.string(k.cfg.Sinks[i].Name)
			w.bytes(body)
		}
	}
	w.bool(false)
}

// Load does what records say, in order: those of [Keeper.All] of some keeper, and
// of its Changes since. What is about stages that are no more, or not the same, is
// passed over; kept is the number of stages of which there was something.
func (k *Keeper) Load(records [][]byte) (kept int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	found := map[remembering]bool{}
	for i, record := range records {
		if err := k.load(record, found); err != nil {
			return len(found), fmt.Errorf("record %d of %d: %w", i+1, len(records), err)
		}
	}
	return len(found), nil
}

func (k *Keeper) load(record []byte, found map[remembering]bool) error {
	if len(record) == 0 || record[0] != recordVersion {
		return fmt.Errorf("%w: it is of another version", errState)
	}
	data, err := k.unpack.DecodeAll(record[1:], nil)
	if err != nil {
		return fmt.Errorf("%w: %w", errState, err)
	}
	r := &reader{buf: data}
	for r.more() {
		switch r.byte() {
		case ofInput:
			k.loadInput(r)
		case ofTaken:
			id, _ := readSeen(r)
			delete(k.open, id)
		case ofSeen:
			for inner := (&reader{buf: r.view()}); inner.more(); {
				k.seen.load(inner, readSeen)
				r.err = errors.Join(r.err, inner.err)
			}
		case ofStage:
			sink, i, mark := r.string(), r.uint(), r.fixed()
			inner := &reader{buf: r.view()}
			k.eachStage(func(name string, n int, m uint64, s remembering) {
				if name != sink || uint64(n) != i || m != mark {
					return
				}
				found[s] = true
				for inner.more() {
					s.load(inner)
				}
			})
			r.err = errors.Join(r.err, inner.err)
		default:
			r.fail("unknown section")
		}
	}
	return r.err
}

func (k *Keeper) loadInput(r *reader) {
	id, _ := readSeen(r)
	made := make([][]*sample.Batch, len(k.chains))
	for r.bool() {
		sink, body := r.string(), r.view()
		if r.err != nil {
			return
		}
		b, err := k.dec.Decode(body)
		if err != nil {
			r.err = fmt.Errorf("%w: %w", errState, err)
			return
		}
		b.Node = k.node // which signs it now
		if i := slices.IndexFunc(k.cfg.Sinks, func(s Sink) bool { return s.Name == sink }); i >= 0 && k.looksBack(i) {
			made[i] = append(made[i], b)
		}
	}
	if r.err == nil {
		k.keep(id, made)
	}
}
