package pipeline

import (
	"time"

	"github.com/kvmeter/kvmeter/notifier/pipeline/python"
	"github.com/kvmeter/kvmeter/sample"
)

// policy says whose value of a field an aggregate has.
type policy uint8

const (
	inKey  policy = iota // the field tells aggregates apart
	first                // the first sample's
	last                 // the last sample's
	dropIt               // none's
)

// aggregator is the stage of that name: it adds up deltas, averages gauges and
// keeps the last of cumulative meters, for each meter and resource, until it has
// seen size samples, or the first of them is older than retention when a batch is
// made. It is the clock of who makes batches that counts: it does not matter when
// they come, or how often.
//
// State: the aggregates, at most as many as the bound says; as many are let go
// early, and so are those that have waited for too long.
type aggregator struct {
	conversion
	size                    int // 0: no bound
	retention               time.Duration
	user, project, metadata policy
	timestamp               policy // first or last
	bound                   Bound
	now, made               time.Time // of the batch at hand

	seen  int
	since int64     // time of the first sample
	began time.Time // when that came
	index map[aggregateKey]int
	held  []aggregate

	tracked, cleared bool
	changed          []int // of held
}

type aggregateKey struct{ name, resource, user, project string }

// aggregate is what was seen of one key.
type aggregate struct {
	Item
	key     aggregateKey
	sum     python.Number
	count   int64
	changed bool // since it was written
}

func (a *aggregator) begin(now, made time.Time) { a.now, a.made = now, made }

func (a *aggregator) key(it *Item) aggregateKey {
	k := aggregateKey{name: it.Name, resource: it.Resource}
	if a.user == inKey {
		k.user = it.User
	}
	if a.project == inKey {
		k.project = it.Project
	}
	return k
}

func (a *aggregator) process(it *Item) (bool, error) {
	key := a.key(it)
	i, ok := a.index[key]
	if ok {
		if err := a.add(&a.held[i], it); err != nil {
			return false, err
		}
	} else if err := a.newAggregate(key, it); err != nil {
		return false, err
	} else {
		i = len(a.held) - 1
	}
	if a.tracked && !a.held[i].changed {
		a.held[i].changed = true
		a.changed = append(a.changed, i)
	}
	if a.seen == 0 {
		a.since, a.began = it.Time, a.now
	}
	a.seen++
	return false, nil
}

func (a *aggregator) newAggregate(key aggregateKey, it *Item) error {
	held := aggregate{Item: *it, key: key, count: 1}
	if err := a.convert(&held.Item, one); err != nil {
		return err
	}
	held.sum, held.row = python.FromVolume(held.Volume), -1
	if a.metadata == dropIt {
		held.Metadata = nil
	}
	a.index[key] = len(a.held)
	a.held = append(a.held, held)
	return nil
}

func (a *aggregator) add(held *aggregate, it *Item) error {
	n, err := a.scaled(&it.Sample)
	if err == nil && it.Kind != sample.Cumulative {
		n, err = python.Add(held.sum, n)
	}
	if err != nil {
		return err
	}
	held.sum = n
	held.count++
	held.ID, held.pipeline = it.ID, it.pipeline // of the last that it is made of
	held.Incarnation, held.Origin = it.Incarnation, it.Origin
	if a.timestamp == last {
		held.setTime(it.Time, it.timestamp())
	}
	if a.user == last {
		held.User = it.User
	}
	if a.project == last {
		held.Project = it.Project
	}
	if a.metadata == last {
		held.Metadata = it.Metadata
	}
	return nil
}

func (a *aggregator) flush(emit func(*Item), drop func(error)) {
	full := a.size > 0 && a.seen >= a.size || len(a.held) >= a.bound.Series
	expired := a.retention > 0 && a.made.Sub(time.UnixMicro(a.since)) > a.retention ||
		a.bound.Age > 0 && a.now.Sub(a.began) > a.bound.Age
	if a.seen == 0 || !full && !expired {
		return
	}
	for i := range a.held {
		held := &a.held[i]
		var err error
		if held.Kind == sample.Gauge {
			held.sum, err = python.Div(held.sum, python.Int(held.count))
		}
		if err == nil {
			held.Volume, err = held.sum.Volume()
		}
		if err != nil {
			drop(err)
			continue
		}
		emit(&held.Item)
	}
	a.clear()
}

func (a *aggregator) clear() {
	clear(a.index)
	clear(a.held)
	a.held, a.seen, a.cleared, a.changed = a.held[:0], 0, true, a.changed[:0]
}

func (a *aggregator) track() {
	a.tracked, a.cleared, a.changed = true, false, nil
	for i := range a.held {
		a.held[i].changed = false
	}
}

func (a *aggregator) changes(w *writer) {
	if a.cleared {
		w.byte(opClear)
	}
	for _, i := range a.changed {
		a.write(w, i)
		a.held[i].changed = false
	}
	if a.cleared || len(a.changed) > 0 {
		a.writeTotals(w)
	}
	a.cleared, a.changed = false, a.changed[:0]
}

// write writes an aggregate with its number.
func (a *aggregator) write(w *writer, i int) {
	held := &a.held[i]
	w.byte(opSet)
	w.uint(uint64(i))
	w.string(held.key.name)
	w.string(held.key.user)
	w.string(held.key.project)
	w.number(held.sum)
	w.int(held.count)
	w.item(&held.Item)
}

func (a *aggregator) writeTotals(w *writer) {
	w.byte(opTotals)
	w.int(int64(a.seen))
	w.int(a.since)
	w.time(a.began)
}

func (a *aggregator) all(op func(func(*writer))) {
	for i := range a.held {
		op(func(w *writer) { a.write(w, i) })
	}
	op(a.writeTotals)
}

func (a *aggregator) load(r *reader) {
	switch r.byte() {
	case opClear:
		a.clear()
	case opTotals:
		a.seen, a.since, a.began = int(r.int()), r.int(), r.time()
	case opSet:
		i := r.uint()
		held := aggregate{key: aggregateKey{name: r.string(), user: r.string(), project: r.string()}}
		held.sum, held.count = r.number(), r.int()
		held.Item = r.item()
		held.key.resource = held.Resource
		switch {
		case r.err != nil:
		case i < uint64(len(a.held)):
			a.held[i] = held
		case i == uint64(len(a.held)):
			a.index[held.key] = len(a.held)
			a.held = append(a.held, held)
		default:
			r.fail("an aggregate is missing")
		}
	default:
		r.fail("unknown operation")
	}
}
