package pipeline

import (
	"slices"
	"time"

	"github.com/kvmeter/kvmeter/notifier/pipeline/python"
	"github.com/kvmeter/kvmeter/sample"
)

// arithmetic is the stage of that name: it computes a new sample of the last
// samples of several meters of a resource, once it has one of each, at the end
// of a batch.
//
// State: the last sample of each meter that the expression names, for at most as
// many resources as the bound says; beyond that, and when it has waited for too
// long, the one that waits longest is forgotten.
type arithmetic struct {
	name, unit string // of the new sample; empty: the first meter's
	kind       sample.Kind
	expr       *python.Expr
	bound      Bound
	now        time.Time

	time      int64 // of the last sample seen
	timestamp string
	waiting   map[string]*waiting
	order     []string // resources by when they began to wait

	tracked bool
	changed map[string]bool // resources, if tracked: whether one was forgotten
}

// waiting is what there is of one resource.
type waiting struct {
	meters []Item // by the number of the reference; one that is missing has no name
	n      int
	last   Item      // the newest: the new sample's id follows from its
	since  time.Time // when the first came
}

func (a *arithmetic) begin(now, _ time.Time) { a.now = now }

func (a *arithmetic) process(it *Item) (bool, error) {
	a.time, a.timestamp = it.Time, it.timestamp()
	i := slices.Index(a.expr.References, it.Name)
	if i < 0 {
		return false, nil
	}
	w := a.waiting[it.Resource]
	if w == nil {
		w = &waiting{meters: make([]Item, len(a.expr.References)), since: a.now}
		a.waiting[it.Resource] = w
		a.order = append(a.order, it.Resource)
	}
	if w.meters[i].Name == "" {
		w.n++
	}
	w.meters[i] = *it
	w.last = *it
	if _, ok := a.changed[it.Resource]; a.tracked && !ok {
		a.changed[it.Resource] = false
	}
	return false, nil
}

func (a *arithmetic) forget(resource string) {
	delete(a.waiting, resource)
	if a.tracked {
		a.changed[resource] = true
	}
}

// Name implements [python.Scope]: a name is a meter's that the expression refers
// to elsewhere, since $(cpu) is cpu.volume to Ceilometer.
func (w *waiting) Name(name string) python.Value {
	if slices.ContainsFunc(w.meters, func(it Item) bool { return it.Name == name }) {
		return w.Reference(name)
	}
	return python.Empty
}

// Reference implements [python.Scope].
func (w *waiting) Reference(name string) python.Value {
	i := slices.IndexFunc(w.meters, func(it Item) bool { return it.Name == name })
	return python.Namespace(func(field string) python.Value { return fieldOf(&w.meters[i].Sample, field) })
}

func (a *arithmetic) flush(emit func(*Item), drop func(error)) {
	kept := a.order[:0]
	for _, resource := range a.order {
		w := a.waiting[resource]
		if w.n < len(w.meters) {
			kept = append(kept, resource)
			continue
		}
		a.forget(resource)
		it := w.meters[0]
		v, err := a.volume(w)
		if err != nil {
			drop(err)
			continue
		}
		it.Volume = v
		if a.name != "" {
			it.Name = a.name
		}
		if a.unit != "" {
			it.Unit = a.unit
		}
		if a.kind != "" {
			it.Kind = a.kind
		}
		it.ID, it.pipeline, it.row = w.last.ID, w.last.pipeline, -1
		it.renew()
		it.setTime(a.time, a.timestamp)
		emit(&it)
	}
	clear(a.order[len(kept):])
	a.order = kept
	gone := max(0, len(kept)-a.bound.Series)
	for gone < len(kept) && a.bound.Age > 0 && a.now.Sub(a.waiting[kept[gone]].since) > a.bound.Age {
		gone++
	}
	for _, resource := range kept[:gone] {
		drop(errOld)
		a.forget(resource)
	}
	a.order = slices.Delete(kept, 0, gone)
}

func (a *arithmetic) track() { a.tracked, a.changed = true, map[string]bool{} }

func (a *arithmetic) changes(w *writer) {
	for resource, forgotten := range a.changed {
		if forgotten {
			w.byte(opDelete)
			w.string(resource)
		}
	}
	for _, resource := range a.order { // in the order in which they wait
		if _, ok := a.changed[resource]; ok {
			a.write(w, resource)
		}
	}
	if len(a.changed) > 0 {
		a.writeTotals(w)
	}
	clear(a.changed)
}

func (a *arithmetic) write(w *writer, resource string) {
	of := a.waiting[resource]
	w.byte(opSet)
	w.string(resource)
	w.time(of.since)
	w.uint(uint64(of.n))
	for i := range of.meters {
		if of.meters[i].Name != "" {
			w.uint(uint64(i))
			w.item(&of.meters[i])
		}
	}
	w.item(&of.last)
}

func (a *arithmetic) writeTotals(w *writer) {
	w.byte(opTotals)
	w.int(a.time)
	w.string(a.timestamp)
}

func (a *arithmetic) all(op func(func(*writer))) {
	for _, resource := range a.order {
		op(func(w *writer) { a.write(w, resource) })
	}
	op(a.writeTotals)
}

func (a *arithmetic) load(r *reader) {
	switch r.byte() {
	case opTotals:
		a.time, a.timestamp = r.int(), r.string()
	case opDelete:
		resource := r.string()
		delete(a.waiting, resource)
		a.order = slices.DeleteFunc(a.order, func(s string) bool { return s == resource })
	case opSet:
		resource := r.string()
		of := &waiting{meters: make([]Item, len(a.expr.References)), since: r.time()}
		for n := r.uint(); r.err == nil && n > 0; n-- {
			i := r.uint()
			if it := r.item(); i < uint64(len(of.meters)) && of.meters[i].Name == "" && it.Name != "" {
				of.meters[i] = it
				of.n++
			} else {
				r.fail("no such meter")
			}
		}
		if of.last = r.item(); r.err != nil {
			return
		}
		if a.waiting[resource] == nil {
			a.order = append(a.order, resource)
		}
		a.waiting[resource] = of
	default:
		r.fail("unknown operation")
	}
}

// volume evaluates the expression to a float.
func (a *arithmetic) volume(w *waiting) (sample.Volume, error) {
	n, err := a.expr.EvalNumber(w)
	if err != nil {
		return sample.Volume{}, err
	}
	f, err := n.Float64()
	if err != nil {
		return sample.Volume{}, err
	}
	return python.Float(f).Volume()
}
