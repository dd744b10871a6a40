package local

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// eventPlace is where an event is: its time, and its number in the order of
// storing.
type eventPlace struct {
	time int64
	no   uint64
}

const eventPlaceLen = 8 + 8

// append appends the place so that it sorts.
func (p eventPlace) append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(p.time)^1<<63)
	return binary.BigEndian.AppendUint64(dst, p.no)
}

func readEventPlace(b []byte) (p eventPlace, err error) {
	if len(b) != eventPlaceLen {
		return p, fmt.Errorf("read place of an event: %w", errCorrupt)
	}
	return eventPlace{int64(binary.BigEndian.Uint64(b) ^ 1<<63), binary.BigEndian.Uint64(b[8:])}, nil
}

func eventKey(p eventPlace) []byte { return p.append([]byte{keyEvent}) }

func eventIDKey(id string) []byte {
	sum := sha256.Sum256([]byte(id))
	return append([]byte{keyEventID}, sum[:16]...)
}

// termKey is the prefix of the events of a day that have a term.
func termKey(dst []byte, d day, hash uint64) []byte {
	return binary.BigEndian.AppendUint64(appendDay(append(dst, keyEventTerm), d), hash)
}

// hashTerm is the hash of a trait with its value, or with an empty name of an
// event type. Events that share it by chance are told apart when they are read.
func hashTerm(t *sample.Trait) uint64 {
	b := append([]byte(t.Name), 0, byte(t.Type))
	switch t.Type {
	case sample.TextTrait:
		b = append(b, t.Text...)
	case sample.FloatTrait:
		b = binary.BigEndian.AppendUint64(b, math.Float64bits(t.Float+0)) // -0 is 0
	default:
		b = binary.BigEndian.AppendUint64(b, uint64(t.Int))
	}
	return xxhash.Sum64(b)
}

func typeTerm(eventType string) *sample.Trait {
	return &sample.Trait{Type: sample.TextTrait, Text: eventType}
}

// eventBytes is what the record of an event takes, about.
func eventBytes(e *sample.Event) int {
	n := len(e.ID) + len(e.Type) + len(e.Raw) + 16
	for i := range e.Traits {
		n += len(e.Traits[i].Name) + len(e.Traits[i].Text) + 10
	}
	return n
}

func appendText(dst []byte, s string) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(s))), s...)
}

func (r *reader) text() string { return string(r.bytes(r.uvarint())) }

func appendEvent(dst []byte, e *sample.Event) []byte {
	dst = appendText(appendText(append(dst, recordVersion), e.ID), e.Type)
	dst = binary.AppendVarint(dst, e.Generated)
	dst = binary.AppendUvarint(dst, uint64(len(e.Traits)))
	for i := range e.Traits {
		t := &e.Traits[i]
		dst = append(appendText(dst, t.Name), byte(t.Type))
		switch t.Type {
		case sample.TextTrait:
			dst = appendText(dst, t.Text)
		case sample.FloatTrait:
			dst = binary.LittleEndian.AppendUint64(dst, math.Float64bits(t.Float))
		default:
			dst = binary.AppendVarint(dst, t.Int)
		}
	}
	return append(binary.AppendUvarint(dst, uint64(len(e.Raw))), e.Raw...)
}

func decodeEvent(src []byte) (e sample.Event, err error) {
	r := reader{src: src}
	r.version()
	e.ID, e.Type, e.Generated = r.text(), r.text(), r.varint()
	for n := r.length(uint64(len(r.src))); n > 0 && r.err == nil; n-- {
		t := sample.Trait{Name: r.text(), Type: sample.TraitType(r.byte())}
		switch t.Type {
		case sample.TextTrait:
			t.Text = r.text()
		case sample.FloatTrait:
			if b := r.bytes(8); b != nil {
				t.Float = math.Float64frombits(binary.LittleEndian.Uint64(b))
			}
		case sample.IntTrait, sample.DatetimeTrait:
			t.Int = r.varint()
		default:
			r.fail()
		}
		e.Traits = append(e.Traits, t)
	}
	if raw := r.bytes(r.uvarint()); len(raw) > 0 {
		e.Raw = bytes.Clone(raw)
	}
	return e, r.done("event")
}

// eventTypes holds for each type of event its traits and the day of the newest
// event that has them; without a name it is the day of the newest event.
type eventTypes map[string]map[store.TraitDescription]day

func (ts eventTypes) day(eventType string, d store.TraitDescription) (day, bool) {
	at, ok := ts[eventType][d]
	return at, ok
}

func (ts eventTypes) set(eventType string, d store.TraitDescription, at day) {
	traits := ts[eventType]
	if traits == nil {
		traits = map[store.TraitDescription]day{}
		ts[eventType] = traits
	}
	traits[d] = at
}

func eventTypeKey(eventType string, d store.TraitDescription) []byte {
	return append(append(appendText([]byte{keyEventType}, eventType), byte(d.Type)), d.Name...)
}

// loadEvents reads what is known of the events.
func (s *Store) loadEvents() error {
	v, closer, err := s.db.Get([]byte{keyEventNo})
	switch {
	case errors.Is(err, pebble.ErrNotFound):
	case err != nil:
		return fmt.Errorf("read events: %w", err)
	default:
		r := reader{src: v}
		s.eventNo = r.uvarint()
		if err := errors.Join(r.done("number of events"), closer.Close()); err != nil {
			return err
		}
	}
	err = s.scan([]byte{keyEventType}, []byte{keyEventType + 1}, func(k, v []byte) error {
		key, value := reader{src: k[1:]}, reader{src: v}
		eventType, d := key.text(), store.TraitDescription{Type: sample.TraitType(key.byte())}
		d.Name = string(key.src)
		s.types.set(eventType, d, day(value.varint()))
		return errors.Join(key.err, value.done("event type"))
	})
	if err != nil {
		return fmt.Errorf("read event types: %w", err)
	}
	return s.jump(keyEventTerm, 4, func(k []byte) { s.eventDays = append(s.eventDays, readDay(k)) })
}

// AppendEvents implements [store.Events].
func (s *Store) AppendEvents(ctx context.Context, events []sample.Event) ([]store.Stored, error) {
	return s.submit(&request{ctx: ctx, events: events, done: make(chan struct{})})
}

// newEvents are the events of one commit. Only the committer uses it.
type newEvents struct {
	s     *Store
	batch *pebble.Batch
	count uint64
	ids   map[[17]byte]bool
	days  map[day]bool
	types eventTypes // with the days that this commit makes newer
}

func (s *Store) newEvents(w *pebble.Batch) *newEvents {
	return &newEvents{s: s, batch: w, ids: map[[17]byte]bool{}, days: map[day]bool{}, types: eventTypes{}}
}

func (n *newEvents) add(e *sample.Event) (stored store.Stored, err error) {
	if stored.Refused = store.CheckEvent(e); stored.Refused != nil {
		return stored, nil
	}
	idKey := eventIDKey(e.ID)
	if stored.Duplicate = n.ids[[17]byte(idKey)]; stored.Duplicate {
		return stored, nil
	}
	_, closer, err := n.s.db.Get(idKey)
	if err == nil {
		stored.Duplicate = true
		return stored, closer.Close()
	}
	if !errors.Is(err, pebble.ErrNotFound) {
		return stored, fmt.Errorf("look up event: %w", err)
	}
	n.ids[[17]byte(idKey)] = true
	place := eventPlace{e.Generated, n.s.eventNo + n.count}
	n.count++
	d := dayOf(e.Generated)
	n.days[d] = true
	err = errors.Join(
		n.batch.Set(eventKey(place), appendEvent(nil, e), nil),
		n.batch.Set(idKey, place.append(nil), nil),
		n.term(d, place, typeTerm(e.Type)),
		n.known(e.Type, store.TraitDescription{}, d),
	)
	for i := range e.Traits {
		t := &e.Traits[i]
		err = errors.Join(err, n.term(d, place, t), n.known(e.Type, store.TraitDescription{Name: t.Name, Type: t.Type}, d))
	}
	if err != nil {
		return stored, fmt.Errorf("store event: %w", err)
	}
	return stored, nil
}

func (n *newEvents) term(d day, place eventPlace, t *sample.Trait) error {
	return n.batch.Set(place.append(termKey(nil, d, hashTerm(t))), nil, nil)
}

// known makes sure that it is known of a type that it has a trait on a day.
func (n *newEvents) known(eventType string, t store.TraitDescription, d day) error {
	if old, ok := n.s.types.day(eventType, t); ok && old >= d {
		return nil
	}
	if old, ok := n.types.day(eventType, t); ok && old >= d {
		return nil
	}
	n.types.set(eventType, t, d)
	return n.batch.Set(eventTypeKey(eventType, t), binary.AppendVarint(nil, int64(d)), nil)
}

// finish adds what is written once a commit.
func (n *newEvents) finish() error {
	if n.count == 0 {
		return nil
	}
	return n.batch.Set([]byte{keyEventNo}, binary.AppendUvarint(nil, n.s.eventNo+n.count), nil)
}

// committed makes the events known.
func (n *newEvents) committed() {
	if n.count == 0 {
		return
	}
	s := n.s
	s.eventNo += n.count
	s.mu.Lock()
	defer s.mu.Unlock()
	for d := range n.days {
		s.eventDays = with(s.eventDays, d)
	}
	for eventType, traits := range n.types {
		for t, d := range traits {
			s.types.set(eventType, t, d)
		}
	}
}

// with returns the ascending list with another element; readers keep the old
// one.
func with[T cmp.Ordered](list []T, e T) []T {
	i, found := slices.BinarySearch(list, e)
	if found {
		return list
	}
	return slices.Insert(slices.Clone(list), i, e)
}

// eventView is the events as one query sees them.
type eventView struct {
	ctx   context.Context
	snap  *pebble.Snapshot
	query *store.EventQuery
	days  []day
	n     int
}

// Events implements [store.Events]. Equal traits and the type are looked up in
// their index; what they have in common is read.
func (s *Store) Events(ctx context.Context, q store.EventQuery, yield func(sample.Event) bool) error {
	if err := q.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	v := &eventView{ctx: ctx, snap: s.db.NewSnapshot(), query: &q}
	s.mu.RLock() // later than the snapshot: it misses no day
	v.days = s.eventDays
	s.mu.RUnlock()
	return errors.Join(v.run(yield), s.leave(v.snap))
}

func (v *eventView) run(yield func(sample.Event) bool) error {
	q := v.query
	if q.ID != "" {
		value, closer, err := v.snap.Get(eventIDKey(q.ID))
		if errors.Is(err, pebble.ErrNotFound) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look up event: %w", err)
		}
		place, err := readEventPlace(value)
		if err := errors.Join(err, closer.Close()); err != nil {
			return err
		}
		_, err = v.visit(place, yield)
		return err
	}
	from, to := int64(math.MinInt64), int64(math.MaxInt64)
	if q.From != nil {
		from = *q.From
	}
	if q.To != nil {
		to = *q.To
	}
	if from > to {
		return nil
	}
	var terms []uint64
	if q.Type != "" {
		terms = append(terms, hashTerm(typeTerm(q.Type)))
	}
	for i := range q.Traits {
		if c := &q.Traits[i]; c.Op == store.Eq && !c.OrAbsent {
			terms = append(terms, hashTerm(&c.Trait))
		}
	}
	if len(terms) == 0 {
		return v.scan(from, to, yield)
	}
	return v.join(terms, from, to, yield)
}

// visit reads an event and yields it if it matches. One that is not there has
// expired while it was stored, and only its id is left.
func (v *eventView) visit(p eventPlace, yield func(sample.Event) bool) (more bool, err error) {
	value, closer, err := v.snap.Get(eventKey(p))
	if errors.Is(err, pebble.ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read event: %w", err)
	}
	more, err = v.offer(value, yield)
	return more, errors.Join(err, closer.Close())
}

func (v *eventView) offer(value []byte, yield func(sample.Event) bool) (more bool, err error) {
	if v.n++; v.n%64 == 0 && v.ctx.Err() != nil {
		return false, v.ctx.Err()
	}
	e, err := decodeEvent(value)
	if err != nil {
		return false, err
	}
	return !v.query.Match(&e) || yield(e), nil
}

// scan reads all events from one time to another.
func (v *eventView) scan(from, to int64, yield func(sample.Event) bool) error {
	it, err := v.snap.NewIter(&pebble.IterOptions{
		LowerBound: eventKey(eventPlace{from, 0}), UpperBound: append(eventKey(eventPlace{to, math.MaxUint64}), 0),
	})
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	more := true
	for ok := it.First(); ok && more && err == nil; ok = it.Next() {
		var value []byte
		if value, err = it.ValueAndErr(); err == nil {
			more, err = v.offer(value, yield)
		}
	}
	return errors.Join(err, it.Close())
}

// join reads the events that have all terms: each list of a term jumps to where
// another one is, until they agree.
func (v *eventView) join(terms []uint64, from, to int64, yield func(sample.Event) bool) (err error) {
	its := make([]*pebble.Iterator, len(terms))
	for i := range its {
		if its[i], err = v.snap.NewIter(&pebble.IterOptions{LowerBound: []byte{keyEventTerm}, UpperBound: []byte{keyEventTerm + 1}}); err != nil {
			return fmt.Errorf("look up events: %w", err)
		}
		defer func() { err = errors.Join(err, its[i].Close()) }()
	}
	var key []byte
	for _, d := range v.days {
		if d.end() < from || d.start() > to {
			continue
		}
		place := eventPlace{time: max(from, d.start())}
		for agree, i := 0, 0; ; i = (i + 1) % len(its) {
			key = place.append(termKey(key[:0], d, terms[i]))
			prefix := key[:len(key)-eventPlaceLen]
			if !its[i].SeekGE(key) || !bytes.HasPrefix(its[i].Key(), prefix) {
				break
			}
			at, err := readEventPlace(its[i].Key()[len(prefix):])
			if err != nil {
				return err
			}
			if at.time > to {
				break
			}
			if at != place {
				place, agree = at, 0
			}
			if agree++; agree < len(its) {
				continue
			}
			if more, err := v.visit(place, yield); err != nil || !more {
				return err
			}
			place.no++
			agree = 0
		}
		for _, it := range its {
			if err := it.Error(); err != nil {
				return fmt.Errorf("look up events: %w", err)
			}
		}
	}
	return nil
}

// Event implements [store.Events].
func (s *Store) Event(ctx context.Context, id string) (out sample.Event, err error) {
	found := false
	if id != "" {
		err = s.Events(ctx, store.EventQuery{ID: id}, func(e sample.Event) bool {
			out, found = e, true
			return false
		})
	}
	if err == nil && !found {
		err = store.ErrNotFound
	}
	return out, err
}

// EventTypes implements [store.Events]. It answers from memory.
func (s *Store) EventTypes(ctx context.Context) ([]string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []string
	for t := range s.types {
		out = append(out, t)
	}
	slices.Sort(out)
	return out, ctx.Err()
}

// TraitDescriptions implements [store.Events]. It answers from memory.
func (s *Store) TraitDescriptions(ctx context.Context, eventType string) ([]store.TraitDescription, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []store.TraitDescription
	for d := range s.types[eventType] {
		if d.Name != "" {
			out = append(out, d)
		}
	}
	store.SortTraitDescriptions(out)
	return out, ctx.Err()
}

// Traits implements [store.Events].
func (s *Store) Traits(ctx context.Context, eventType, name string, yield func(sample.Trait) bool) error {
	if eventType == "" {
		return ctx.Err()
	}
	return s.Events(ctx, store.EventQuery{Type: eventType}, func(e sample.Event) bool {
		for i := range e.Traits {
			if e.Traits[i].Name == name && !yield(e.Traits[i]) {
				return false
			}
		}
		return true
	})
}

// expireEvents drops the days of events that ended before their retention.
// An id goes first: one that is found names an event that is there.
func (s *Store) expireEvents() error {
	if s.options.EventRetention < 0 {
		return nil
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	cutoff := s.options.Clock().Add(-s.options.EventRetention)
	s.mu.RLock()
	days := s.eventDays
	s.mu.RUnlock()
	keep := 0
	for keep < len(days) && days[keep].end() < cutoff.UnixMicro() {
		keep++
	}
	if keep == 0 {
		return nil
	}
	last := days[keep-1]
	b := s.db.NewBatch()
	end := eventKey(eventPlace{time: last.end(), no: math.MaxUint64})
	if err := s.scan([]byte{keyEvent}, end, func(_, v []byte) error {
		e, err := decodeEvent(v)
		if err != nil {
			return err
		}
		return b.Delete(eventIDKey(e.ID), nil)
	}); err != nil {
		return fmt.Errorf("drop events: %w", err)
	}
	s.eventWriting.Lock()
	defer s.eventWriting.Unlock()
	err := errors.Join(
		b.DeleteRange([]byte{keyEvent}, end, nil),
		b.DeleteRange([]byte{keyEventTerm}, appendDay([]byte{keyEventTerm}, last+1), nil),
	)
	type known struct {
		eventType string
		store.TraitDescription
	}
	var gone []known
	s.mu.RLock()
	for eventType, traits := range s.types {
		for t, d := range traits {
			if d <= last {
				gone = append(gone, known{eventType, t})
				err = errors.Join(err, b.Delete(eventTypeKey(eventType, t), nil))
			}
		}
	}
	s.mu.RUnlock()
	if err == nil {
		err = s.commit(b)
	}
	if err != nil {
		return fmt.Errorf("drop events: %w", err)
	}
	s.mu.Lock()
	s.eventDays = slices.DeleteFunc(slices.Clone(s.eventDays), func(d day) bool { return d <= last })
	for _, k := range gone {
		delete(s.types[k.eventType], k.TraitDescription)
		if len(s.types[k.eventType]) == 0 {
			delete(s.types, k.eventType)
		}
	}
	s.mu.Unlock()
	s.log.Info("days of events dropped", zap.Int("days", keep), zap.Time("before", cutoff.UTC()))
	return nil
}
