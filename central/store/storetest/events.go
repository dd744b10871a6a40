package storetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

func textTrait(name, v string) sample.Trait {
	return sample.Trait{Name: name, Type: sample.TextTrait, Text: v}
}

func intTrait(name string, v int64) sample.Trait {
	return sample.Trait{Name: name, Type: sample.IntTrait, Int: v}
}

// event makes an event some time after base.
func event(id, eventType string, after int64, traits ...sample.Trait) sample.Event {
	return sample.Event{ID: id, Type: eventType, Generated: base + after, Traits: traits}
}

func (f *fixture) appendEvents(t testing.TB, events ...sample.Event) []store.Stored {
	t.Helper()
	stored, err := f.AppendEvents(context.Background(), events)
	if err != nil {
		t.Fatalf("append events: %v", err)
	}
	if len(stored) != len(events) {
		t.Fatalf("append events: got %d answers for %d events", len(stored), len(events))
	}
	return stored
}

func collectEvents(t testing.TB, s store.Store, q store.EventQuery) []sample.Event {
	t.Helper()
	var out []sample.Event
	if err := s.Events(context.Background(), q, func(e sample.Event) bool {
		out = append(out, e)
		return true
	}); err != nil {
		t.Fatalf("events: %v", err)
	}
	return out
}

func eventIDs(t testing.TB, s store.Store, q store.EventQuery) string {
	t.Helper()
	var ids []string
	for _, e := range collectEvents(t, s, q) {
		ids = append(ids, e.ID)
	}
	return strings.Join(ids, " ")
}

func testEventOnce(t *testing.T, f *fixture) {
	a := event("a", "compute.instance.create.end", 0, textTrait("instance_id", "vm-1"))
	other := event("a", "compute.instance.delete.end", 5, textTrait("instance_id", "vm-2"))
	got := f.appendEvents(t, a, a, event("b", "x", 0), other)
	equal(t, []bool{got[0].Duplicate, got[1].Duplicate, got[2].Duplicate, got[3].Duplicate}, []bool{false, true, false, true})
	f.everywhere(t, func(t *testing.T) {
		for _, st := range f.appendEvents(t, other, event("b", "y", 9)) {
			if !st.Duplicate {
				t.Error("an event was stored again")
			}
		}
		equal(t, collectEvents(t, f.Store, store.EventQuery{}), []sample.Event{a, event("b", "x", 0)})
	})
}

func testEventRefused(t *testing.T, f *fixture) {
	got := f.appendEvents(t,
		sample.Event{Type: "x"},
		event("nan", "x", 0, sample.Trait{Name: "f", Type: sample.FloatTrait, Float: math.NaN()}),
		event("nameless", "x", 0, textTrait("", "v")),
		event("good", "x", 0),
		sample.Event{ID: "raw", Type: "x", Raw: []byte("[1]")},
		sample.Event{ID: "large", Type: "x", Traits: []sample.Trait{textTrait("t", strings.Repeat("x", 17<<20))}},
	)
	for i, st := range got {
		if (st.Refused == nil) != (i == 3) {
			t.Errorf("event %d: got %v", i, st.Refused)
		}
	}
	equal(t, eventIDs(t, f.Store, store.EventQuery{}), "good")
}

func testEventQueries(t *testing.T, f *fixture) {
	at := func(t int64) *int64 { return new(base + t) }
	f.appendEvents(t,
		event("late", "delete", 6*minute, textTrait("project_id", "p1"), textTrait("user_id", "u1"), intTrait("vcpus", 4)),
		event("first", "create", 0, textTrait("project_id", "p1"), textTrait("user_id", "u2"), intTrait("vcpus", 2)),
		event("second", "create", 0, textTrait("project_id", "p2"), textTrait("vcpus", "2")),
		event("third", "create", 0, sample.Trait{Name: "ratio", Type: sample.FloatTrait, Float: 0.5}, sample.Trait{Name: "launched_at", Type: sample.DatetimeTrait, Int: base}),
	)
	raw := sample.Event{ID: "raw", Type: "audit", Generated: base + 7*minute, Raw: []byte(`{"payload": {"a": [1, 2.50]}}`)}
	f.appendEvents(t, raw)
	where := func(op store.Op, trait sample.Trait) store.TraitCond { return store.TraitCond{Trait: trait, Op: op} }
	orAbsent := where(store.Eq, textTrait("project_id", "p1"))
	orAbsent.OrAbsent = true
	f.everywhere(t, func(t *testing.T) {
		for name, tc := range map[string]struct {
			q    store.EventQuery
			want string
		}{
			"all, oldest first, equal ones as stored": {store.EventQuery{}, "first second third late raw"},
			"by id":                                    {store.EventQuery{ID: "second"}, "second"},
			"an id of another type":                    {store.EventQuery{ID: "second", Type: "delete"}, ""},
			"by type":                                  {store.EventQuery{Type: "create"}, "first second third"},
			"from a time on":                           {store.EventQuery{From: at(1)}, "late raw"},
			"both ends belong to it":                   {store.EventQuery{From: at(0), To: at(6 * minute)}, "first second third late"},
			"a time that is past its end":              {store.EventQuery{From: at(1), To: at(0)}, ""},
			"a type in a time":                         {store.EventQuery{Type: "create", From: at(1)}, ""},
			"by trait":                                 {store.EventQuery{Traits: []store.TraitCond{where(store.Eq, textTrait("project_id", "p1"))}}, "first late"},
			"by two traits":                            {store.EventQuery{Traits: []store.TraitCond{where(store.Eq, textTrait("project_id", "p1")), where(store.Eq, textTrait("user_id", "u2"))}}, "first"},
			"by trait and type":                        {store.EventQuery{Type: "delete", Traits: []store.TraitCond{where(store.Eq, textTrait("project_id", "p1"))}}, "late"},
			"a trait or none":                          {store.EventQuery{Traits: []store.TraitCond{orAbsent}}, "first third late raw"},
			"a trait has one type":                     {store.EventQuery{Traits: []store.TraitCond{where(store.Eq, intTrait("vcpus", 2))}}, "first"},
			"another value is not no value":            {store.EventQuery{Traits: []store.TraitCond{where(store.Ne, intTrait("vcpus", 2))}}, "late"},
			"more than":                                {store.EventQuery{Traits: []store.TraitCond{where(store.Gt, intTrait("vcpus", 2))}}, "late"},
			"at least and less than":                   {store.EventQuery{Traits: []store.TraitCond{where(store.Ge, intTrait("vcpus", 2)), where(store.Lt, intTrait("vcpus", 4))}}, "first"},
			"at most a float":                          {store.EventQuery{Traits: []store.TraitCond{where(store.Le, sample.Trait{Name: "ratio", Type: sample.FloatTrait, Float: 0.5})}}, "third"},
			"a datetime":                               {store.EventQuery{Traits: []store.TraitCond{where(store.Eq, sample.Trait{Name: "launched_at", Type: sample.DatetimeTrait, Int: base})}}, "third"},
			"a datetime is no int":                     {store.EventQuery{Traits: []store.TraitCond{where(store.Eq, intTrait("launched_at", base))}}, ""},
			"what nobody has":                          {store.EventQuery{Type: "nothing"}, ""},
			"a trait that contradicts itself":          {store.EventQuery{Traits: []store.TraitCond{where(store.Eq, intTrait("vcpus", 2)), where(store.Eq, intTrait("vcpus", 4))}}, ""},
			"the empty text is a value like any other": {store.EventQuery{Traits: []store.TraitCond{where(store.Gt, textTrait("project_id", ""))}}, "first second late"},
		} {
			if got := eventIDs(t, f.Store, tc.q); got != tc.want {
				t.Errorf("%s: got %q, want %q", name, got, tc.want)
			}
		}
		ctx := context.Background()
		got, err := f.Event(ctx, "raw")
		if err != nil {
			t.Fatal(err)
		}
		equal(t, got, raw)
		for _, id := range []string{"nothing", ""} {
			if _, err := f.Event(ctx, id); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("event %q: got %v, want %v", id, err, store.ErrNotFound)
			}
		}
		types, err := f.EventTypes(ctx)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, types, []string{"audit", "create", "delete"})
		descriptions, err := f.TraitDescriptions(ctx, "create")
		if err != nil {
			t.Fatal(err)
		}
		equal(t, descriptions, []store.TraitDescription{
			{Name: "launched_at", Type: sample.DatetimeTrait},
			{Name: "project_id", Type: sample.TextTrait},
			{Name: "ratio", Type: sample.FloatTrait},
			{Name: "user_id", Type: sample.TextTrait},
			{Name: "vcpus", Type: sample.TextTrait},
			{Name: "vcpus", Type: sample.IntTrait},
		})
		var traits []sample.Trait
		if err := f.Traits(ctx, "create", "vcpus", func(tr sample.Trait) bool {
			traits = append(traits, tr)
			return true
		}); err != nil {
			t.Fatal(err)
		}
		equal(t, traits, []sample.Trait{intTrait("vcpus", 2), textTrait("vcpus", "2")})
		for _, bad := range []store.TraitCond{where("like", textTrait("a", "b")), where(store.Eq, sample.Trait{Name: "a"})} {
			if err := f.Events(ctx, store.EventQuery{Traits: []store.TraitCond{bad}}, nil); err == nil {
				t.Errorf("%+v: got no error", bad)
			}
		}
	})
}

func testEventStop(t *testing.T, f *fixture) {
	var events []sample.Event
	for i := range 1000 {
		events = append(events, event(fmt.Sprint("e-", i), "x", int64(i), intTrait("n", int64(i))))
	}
	f.appendEvents(t, events...)
	for name, q := range map[string]store.EventQuery{"all": {}, "by index": {Type: "x"}} {
		n := 0
		if err := f.Events(context.Background(), q, func(sample.Event) bool {
			n++
			return n < 10
		}); err != nil || n != 10 {
			t.Errorf("%s: got %d events, %v, want 10", name, n, err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		n = 0
		err := f.Events(ctx, q, func(sample.Event) bool {
			cancel()
			n++
			return true
		})
		cancel()
		if !errors.Is(err, context.Canceled) || n == 1000 {
			t.Errorf("%s: got %d events, %v, want %v", name, n, err, context.Canceled)
		}
		if _, err := f.AppendEvents(ctx, events[:1]); !errors.Is(err, context.Canceled) {
			t.Errorf("append: got %v, want %v", err, context.Canceled)
		}
	}
}

// testRandomEvents feeds the engine and the reference with the same events and
// asks both the same questions.
func testRandomEvents(t *testing.T, f *fixture) {
	if _, itself := f.Store.(*memory.Store); itself {
		return // the reference, compared with itself, cannot fail
	}
	g := &eventGenerator{rand.New(rand.NewPCG(3, 4))}
	reference := memory.New(f.clock)
	ask := func(t *testing.T) {
		for range 60 {
			g.ask(t, f.Store, reference)
		}
	}
	for range 30 {
		var events []sample.Event
		for range g.IntN(12) {
			events = append(events, g.event())
		}
		want, err := reference.AppendEvents(context.Background(), events)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, f.appendEvents(t, events...), want)
		if g.IntN(6) == 0 {
			f.reopen(t)
		}
	}
	f.everywhere(t, ask)
}

type eventGenerator struct{ *rand.Rand }

func (g eventGenerator) pick(from ...string) string { return from[g.IntN(len(from))] }

func (g eventGenerator) time() int64 {
	if g.IntN(20) == 0 {
		return []int64{math.MinInt64, math.MaxInt64, 0, -1}[g.IntN(4)]
	}
	return base + g.Int64N(20)*minute - 5*minute
}

func (g eventGenerator) trait() sample.Trait {
	t := sample.Trait{Name: g.pick("a", "b", "project_id"), Type: sample.TraitType(1 + g.IntN(4))}
	switch t.Type {
	case sample.TextTrait:
		t.Text = g.pick("", "p1", "p2", "\x00", "p1\xff")
	case sample.FloatTrait:
		t.Float = []float64{0, math.Copysign(0, -1), 1.5, -2}[g.IntN(4)]
	default:
		t.Int = g.Int64N(4) - 1
	}
	return t
}

func (g eventGenerator) event() sample.Event {
	e := sample.Event{ID: fmt.Sprint("e-", g.IntN(250)), Type: g.pick("x", "y", "z.end"), Generated: g.time()}
	for range g.IntN(5) {
		e.Traits = append(e.Traits, g.trait())
	}
	if g.IntN(5) == 0 {
		e.Raw = []byte(`{"n": 1}`)
	}
	return e
}

func (g eventGenerator) ask(t *testing.T, s, reference store.Store) {
	t.Helper()
	var q store.EventQuery
	if g.IntN(4) == 0 {
		q.ID = fmt.Sprint("e-", g.IntN(250))
	}
	if g.IntN(3) == 0 {
		q.Type = g.pick("x", "y", "nothing")
	}
	if g.IntN(3) == 0 {
		q.From = new(g.time())
	}
	if g.IntN(3) == 0 {
		q.To = new(g.time())
	}
	for range g.IntN(3) {
		q.Traits = append(q.Traits, store.TraitCond{Trait: g.trait(), Op: store.Op(g.pick("eq", "eq", "eq", "ne", "lt", "le", "gt", "ge")), OrAbsent: g.IntN(4) == 0})
	}
	if diff := cmp.Diff(collectEvents(t, reference, q), collectEvents(t, s, q)); diff != "" {
		t.Fatalf("events %+v:\ngot (+) is not what is wanted (-):\n%s", q, diff)
	}
	ctx := context.Background()
	types, err := s.EventTypes(ctx)
	wantTypes, _ := reference.EventTypes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, types, wantTypes)
	eventType := g.pick("x", "y", "")
	got, err := s.TraitDescriptions(ctx, eventType)
	want, _ := reference.TraitDescriptions(ctx, eventType)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, want)
	var traits [2][]sample.Trait
	for i, s := range []store.Store{reference, s} {
		if err := s.Traits(ctx, eventType, "a", func(tr sample.Trait) bool {
			traits[i] = append(traits[i], tr)
			return true
		}); err != nil {
			t.Fatal(err)
		}
	}
	equal(t, traits[1], traits[0])
}
