package local

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

func TestEventsExpireByDay(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	now := time.UnixMicro(start)
	o := Options{Clock: func() time.Time { return now }, EventRetention: 10 * 24 * time.Hour}
	s := open(t, dir, o)
	defer func() { closeStore(t, s) }()
	at := func(i int) sample.Event {
		return sample.Event{
			ID: fmt.Sprint("e-", i), Type: fmt.Sprint("type-", i/20), Generated: start + int64(i)*dayLength,
			Traits: []sample.Trait{{Name: "n", Type: sample.IntTrait, Int: int64(i)}, {Name: "all", Type: sample.TextTrait, Text: "x"}},
		}
	}
	for i := range 40 {
		if _, err := s.AppendEvents(ctx, []sample.Event{at(i)}); err != nil {
			t.Fatal(err)
		}
	}
	now = now.Add(35 * 24 * time.Hour)
	closeStore(t, s)
	s = open(t, dir, o) // it expires what is old when it opens, in the background
	if err := s.expireEvents(); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		for name, q := range map[string]store.EventQuery{
			"all":      {},
			"by index": {Traits: []store.TraitCond{{Trait: sample.Trait{Name: "all", Type: sample.TextTrait, Text: "x"}, Op: store.Eq}}},
		} {
			var ids []string
			if err := s.Events(ctx, q, func(e sample.Event) bool {
				ids = append(ids, e.ID)
				return true
			}); err != nil {
				t.Fatal(err)
			}
			if len(ids) != 15 || ids[0] != "e-25" {
				t.Errorf("%s: got %v, want e-25 to e-39", name, ids)
			}
		}
		if _, err := s.Event(ctx, "e-24"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("an expired event: got %v", err)
		}
		if types, err := s.EventTypes(ctx); err != nil || len(types) != 1 || types[0] != "type-1" {
			t.Errorf("types: got %v, %v", types, err)
		}
		if ds, err := s.TraitDescriptions(ctx, "type-0"); err != nil || len(ds) != 0 {
			t.Errorf("traits of a type that is gone: got %v, %v", ds, err)
		}
	}
	check()
	closeStore(t, s)
	s = open(t, dir, o)
	check()
	stored, err := s.AppendEvents(ctx, []sample.Event{at(1), at(30)})
	if err != nil || stored[0].Duplicate || !stored[1].Duplicate {
		t.Errorf("got %+v, %v: what is gone is new, what is there is not", stored, err)
	}
}
