package pipeline

import "time"

// accumulator is the stage of that name: it holds samples until there are at
// least size of them, and lets them go at the end of a batch.
//
// State: the held samples, at most as many as the bound says; as many are let go
// early, and so are those that have waited for too long.
type accumulator struct {
	size  int
	bound Bound
	now   time.Time

	held  []Item
	since time.Time // when the first of held came

	tracked, cleared bool
	written          int // of held
}

func (a *accumulator) begin(now, _ time.Time) { a.now = now }

func (a *accumulator) process(it *Item) (bool, error) {
	if a.size < 1 {
		return true, nil
	}
	if len(a.held) == 0 {
		a.since = a.now
	}
	held := *it
	held.row = -1 // its batch is gone when it is let go
	a.held = append(a.held, held)
	return false, nil
}

func (a *accumulator) flush(emit func(*Item), _ func(error)) {
	old := a.bound.Age > 0 && a.now.Sub(a.since) > a.bound.Age
	if len(a.held) == 0 || len(a.held) < a.size && len(a.held) < a.bound.Series && !old {
		return
	}
	for i := range a.held {
		emit(&a.held[i])
	}
	a.clear()
}

func (a *accumulator) clear() {
	clear(a.held)
	a.held, a.written, a.cleared = a.held[:0], 0, true
}

func (a *accumulator) track() { a.tracked, a.cleared, a.written = true, false, len(a.held) }

func (a *accumulator) changes(w *writer) {
	if a.cleared {
		w.byte(opClear)
	}
	for i := a.written; i < len(a.held); i++ {
		a.writeItem(w, i)
	}
	a.cleared, a.written = false, len(a.held)
}

func (a *accumulator) writeItem(w *writer, i int) {
	w.byte(opSet)
	w.time(a.since)
	w.item(&a.held[i])
}

func (a *accumulator) all(op func(func(*writer))) {
	for i := range a.held {
		op(func(w *writer) { a.writeItem(w, i) })
	}
}

func (a *accumulator) load(r *reader) {
	switch r.byte() {
	case opClear:
		a.clear()
	case opSet:
		a.since = r.time()
		if it := r.item(); r.err == nil {
			a.held = append(a.held, it)
		}
	default:
		r.fail("unknown operation")
	}
}
