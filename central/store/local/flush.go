package local

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample"
)

// freeze makes the active head the one to flush. The caller holds the lock,
// and no head is frozen.
func (s *Store) freeze() {
	s.frozen, s.active = s.active, newHead()
	s.thawed = make(chan struct{})
	select {
	case s.frozenUp <- struct{}{}:
	default:
	}
}

// flushLoop flushes when a head is full or old, and drops the days that are
// past their retention.
func (s *Store) flushLoop() {
	flush := time.NewTicker(s.options.FlushEvery)
	defer flush.Stop()
	retry := time.NewTicker(5 * time.Second)
	defer retry.Stop()
	expire := time.NewTicker(time.Hour)
	defer expire.Stop()
	expireAll := func() {
		for _, do := range []func() error{s.expire, s.sweep, s.expireRollups, s.expireEvents, s.collect} {
			s.try("expire", do)
		}
	}
	expireAll()
	for {
		select {
		case <-s.stop:
			return
		case done := <-s.kick:
			done <- s.flushAll()
		case <-s.frozenUp:
			s.try("flush", s.flush)
		case <-retry.C:
			s.try("flush", s.flush)
		case <-flush.C:
			s.try("flush", s.flushAll)
		case <-expire.C:
			expireAll()
		}
	}
}

func (s *Store) try(what string, do func() error) {
	if err := do(); err != nil && s.failure() == nil {
		s.log.Error(what+" of the store failed; it is tried again", zap.Error(err))
	}
}

// flushAll flushes a frozen head and then the active one.
func (s *Store) flushAll() error {
	if err := s.flush(); err != nil {
		return err
	}
	s.mu.Lock()
	if s.frozen == nil && len(s.active.batches) > 0 {
		s.freeze()
	}
	s.mu.Unlock()
	return s.flush()
}

// flush writes the frozen head, if there is one.
func (s *Store) flush() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.RLock()
	h, dims := s.frozen, s.catalogue.dimensions()
	s.mu.RUnlock()
	if h == nil {
		return nil
	}
	start := time.Now()
	err := s.writeHead(h, dims)
	s.metrics.flushed(time.Since(start), err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flushErr = err
	if err != nil && s.frozen != nil { // tell who waits for it
		close(s.thawed)
		s.thawed = make(chan struct{})
	}
	return err
}

func (s *Store) writeHead(h *head, dims dimensions) error {
	if err := s.catalogue.write(dims, h.gaps); err != nil {
		return err
	}
	b := s.db.NewBatchWithSize(int(h.bytes / 2))
	f := &flusher{store: s, batch: b, generation: s.generation + 1, hours: map[hour][]uint32{}, states: map[*resource]*state{}, slots: make([]*series, len(dims.meters))}
	if err := f.head(h); err != nil {
		return fmt.Errorf("encode head: %w", err)
	}
	first, last := h.batches[0].seq, h.batches[len(h.batches)-1].seq
	s.generation++
	if err := errors.Join(
		b.DeleteRange(walKey(first), walKey(last+1), nil),
		b.Set(stateKey(), s.stateValue(last), nil),
	); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	// What is known of the resources comes before the chunks, so that a query
	// never misses chunks for not knowing of them; the head goes after them.
	s.mu.Lock()
	for r, st := range f.states {
		r.flushed = st
	}
	for h := range f.hours {
		s.hours = with(s.hours, h)
	}
	s.mu.Unlock()
	if err := s.commit(b); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frozen = nil
	close(s.thawed)
	s.flushedGeneration = f.generation
	for h := range f.hours {
		s.pend(h, f.generation, s.options.Clock())
	}
	select {
	case s.flushedUp <- struct{}{}:
	default:
	}
	return nil
}

// flusher encodes a head into a Pebble batch.
type flusher struct {
	store      *Store
	batch      *pebble.Batch
	generation uint32
	hours      map[hour][]uint32 // the resources of each, ascending
	states     map[*resource]*state

	refs  []rowRef
	rows  rows
	slots []*series // by number of the meter: of the part being encoded
	used  []*series
	spare []*series
	key   []byte
	value []byte
	// chunks of the part being encoded
	chunks []byte
}

// series collects the points of one meter for a part.
type series struct {
	chunk
	meter       *meter
	first, last int64
}

func (f *flusher) head(h *head) error {
	// Batches first: a sample is not found by its id unless its batch is.
	for _, hb := range h.batches {
		if err := f.batchInfo(hb); err != nil {
			return err
		}
	}
	for meta, d := range h.used {
		if err := f.batch.Set(metaUsedKey(meta), binary.AppendVarint(nil, int64(d)), nil); err != nil {
			return err
		}
	}
	for node, at := range h.metered {
		if err := f.batch.Set(meteredKey(node), binary.AppendVarint(nil, at), nil); err != nil {
			return err
		}
	}
	resources := slices.SortedFunc(maps.Keys(h.rows), func(a, b *resource) int { return int(a.no) - int(b.no) })
	for _, r := range resources {
		if err := f.resource(r, h.rows[r]); err != nil {
			return err
		}
	}
	for hr, list := range f.hours {
		if err := f.batch.Set(pendingKey(hr, f.generation), appendNumbers([]byte{recordVersion}, list), nil); err != nil {
			return err
		}
	}
	return nil
}

// batchInfo writes the records of a batch.
func (f *flusher) batchInfo(hb *headBatch) error {
	infos := map[day]*batchInfo{}
	var last *batchInfo
	lastDay := day(math.MinInt32)
	for i := range hb.rows {
		if from, to := hb.span(i); from == to {
			continue
		}
		row := &hb.rows[i]
		if d := dayOf(row.time); d != lastDay {
			if last = infos[d]; last == nil {
				last = &batchInfo{id: hb.id, recorded: hb.recorded, from: row.time, to: row.time}
				infos[d] = last
			}
			lastDay = d
		}
		last.from, last.to = min(last.from, row.time), max(last.to, row.time)
		last.resources = append(last.resources, row.holder.resource.no)
	}
	p := place{seq: hb.seq, node: hb.node}
	for d, info := range infos {
		slices.Sort(info.resources)
		info.resources = slices.Compact(info.resources)
		f.key, f.value = batchKey(f.key[:0], d, hb.node, hb.seq), info.append(f.value[:0])
		if err := f.batch.Set(f.key, f.value, nil); err != nil {
			return err
		}
		p.days = append(p.days, d)
	}
	if hb.explicit {
		return f.foreign(hb)
	}
	slices.Sort(p.days)
	return f.batch.Set(batchIDKey(hb.id), p.append(f.value[:0]), nil)
}

// foreign writes where the samples with foreign ids are.
func (f *flusher) foreign(hb *headBatch) error {
	for i := range hb.rows {
		row := &hb.rows[i]
		for at, to := hb.span(i); at < to; at++ {
			index := int(hb.indexes[at])
			f.key = foreignKey(f.key[:0], dayOf(row.time), hashID(hb.sampleID(index)), hb.seq, uint32(index))
			f.value = appendSeriesRef(f.value[:0], hb.column(index).meter.no, row.holder.resource.no)
			if err := f.batch.Set(f.key, f.value, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

func hashID(id sample.ID) uint64 { return xxhash.Sum64String(id.String()) }

// resource writes the rows of a resource: for each hour one part, or several
// where there are many.
func (f *flusher) resource(r *resource, refs []rowRef) error {
	f.refs = append(f.refs[:0], refs...)
	if !slices.IsSortedFunc(f.refs, rowRef.order) {
		slices.SortFunc(f.refs, rowRef.order)
	}
	f.store.mu.RLock()
	old, meters, holders, foreign, last := r.flushed, r.meters, r.bornHolders(), r.foreign, r.last
	f.store.mu.RUnlock()
	st := &state{newest: old.newest, series: slices.Clone(old.series), holders: slices.Clone(old.holders)}
	f.states[r] = st
	segment := uint32(0)
	for rest := f.refs; len(rest) > 0; segment++ {
		hr := hourOf(rest[0].info().time)
		end, n := hr.end(), 0
		points := 0
		for n < len(rest) && n < maxRows && rest[n].info().time <= end {
			from, to := rest[n].span(rest[n].row)
			if points += to - from; points > maxPoints {
				break
			}
			n++
		}
		if segment > math.MaxUint16 {
			return fmt.Errorf("resource %q: too many rows for one flush", r.id)
		}
		p := part(f.generation)<<16 | part(segment)
		if err := f.part(r, meters, st, hr, p, rest[:n]); err != nil {
			return err
		}
		if list := f.hours[hr]; len(list) == 0 || list[len(list)-1] != r.no {
			f.hours[hr] = append(list, r.no)
		}
		rest = rest[n:]
	}
	f.value = st.append(f.value[:0], last, meters, holders, foreign)
	f.key = resourceKey(f.key[:0], r.no)
	return f.batch.Set(f.key, f.value, nil)
}

// part writes rows of one hour and their chunks, as one record: most parts are
// merged with others soon, and a record costs more than what it holds.
func (f *flusher) part(r *resource, meters []*meter, st *state, h hour, p part, refs []rowRef) error {
	f.rows.reset()
	for n, ref := range refs {
		row := ref.info()
		f.rows.times = append(f.rows.times, uint64(row.time))
		f.rows.seqs = append(f.rows.seqs, ref.seq)
		f.rows.nodes = append(f.rows.nodes, uint64(ref.node))
		f.rows.holders = append(f.rows.holders, uint64(row.holder.no))
		f.rows.metas = append(f.rows.metas, uint64(row.meta))
		for len(st.holders) <= row.holder.pos {
			st.holders = append(st.holders, lifetime{})
		}
		st.holders[row.holder.pos].add(row.time)
		from, to := ref.span(ref.row)
		c := 0
		for at := from; at < to; at++ {
			index := int(ref.indexes[at])
			for c+1 < len(ref.columns) && ref.columns[c+1].index <= index {
				c++
			}
			col := &ref.columns[c]
			sr := f.slots[col.meter.no]
			if sr == nil {
				sr = f.series(col.meter, row.time)
			}
			sr.last = row.time
			sr.rows = append(sr.rows, uint64(n))
			sr.indexes = append(sr.indexes, uint64(index))
			sr.origins = append(sr.origins, uint64(col.origin))
			sr.tags = append(sr.tags, byte(col.tag))
			sr.bits = append(sr.bits, ref.values[at])
			if ref.explicit || sr.ids != nil {
				sr.addID(ref, index)
			}
		}
	}
	f.rows.chunks = f.chunks[:0]
	for _, sr := range f.used {
		sr.length = sr.last - sr.first
		f.value = sr.append(f.value[:0], len(refs))
		f.rows.addChunk(h, sr.meter.no, sr.last, f.value)
		f.slots[sr.meter.no] = nil
	}
	f.chunks = f.rows.chunks
	f.key, f.value = rowsKey(f.key[:0], h, r.no, p), f.rows.append(f.value[:0])
	if err := f.batch.Set(f.key, f.value, nil); err != nil {
		return err
	}
	f.newest(meters, st, refs)
	f.spare = append(f.spare, f.used...)
	f.used = f.used[:0]
	return nil
}

func (f *flusher) series(m *meter, t int64) *series {
	var sr *series
	if n := len(f.spare); n > 0 {
		sr, f.spare = f.spare[n-1], f.spare[:n-1]
		sr.reset()
	} else {
		sr = &series{}
	}
	sr.meter, sr.first = m, t
	f.slots[m.no] = sr
	f.used = append(f.used, sr)
	return sr
}

// addID adds the id of the point that was added last.
func (sr *series) addID(ref rowRef, index int) {
	for len(sr.ids) < len(sr.rows) {
		sr.ids = append(sr.ids, sample.ID{})
	}
	if ref.explicit {
		sr.ids[len(sr.ids)-1] = foreignID(ref.sampleID(index))
	}
}

// foreignID makes sure that the id is not the zero ID, which stands for a
// derived one.
func foreignID(id sample.ID) sample.ID {
	if id == (sample.ID{}) {
		id.Text = id.String()
	}
	return id
}

// newest brings the state up to date with a part.
func (f *flusher) newest(meters []*meter, st *state, refs []rowRef) {
	for len(st.series) < len(meters) {
		st.series = append(st.series, newest{})
	}
	for _, sr := range f.used {
		at := len(sr.rows) - 1
		for i := at - 1; i >= 0 && refs[sr.rows[i]].sameTime(refs[sr.rows[at]]); i-- {
			if sr.indexes[i] > sr.indexes[at] {
				at = i
			}
		}
		row := refs[sr.rows[at]].info()
		n := &st.series[slices.Index(meters, sr.meter)]
		n.add(row.time, row.holder, row.meta)
		n.first = min(n.first, sr.first)
	}
	at := len(refs) - 1
	for i := at - 1; i >= 0 && refs[i].sameTime(refs[at]); i-- {
		if refs[i].lastIndex() > refs[at].lastIndex() {
			at = i
		}
	}
	row := refs[at].info()
	st.newest.add(row.time, row.holder, row.meta)
	st.newest.first = min(st.newest.first, refs[0].info().time)
}

// sameTime reports whether two rows differ only in the order within a batch.
func (r rowRef) sameTime(o rowRef) bool {
	return r.headBatch == o.headBatch && r.info().time == o.info().time
}

// lastIndex returns the index of the row's last sample.
func (r rowRef) lastIndex() uint16 {
	_, to := r.span(r.row)
	return r.indexes[to-1]
}
