package store_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/publisher/store"
	"github.com/kvmeter/kvmeter/sample"
)

// recorder is a bus that keeps what it is given.
type recorder struct{ got []bus.Message }

// Publish implements [bus.Publisher].
func (r *recorder) Publish(_ context.Context, ms ...bus.Message) error {
	r.got = append(r.got, ms...)
	return nil
}

func open(t testing.TB, b bus.Publisher) publisher.EventPublisher {
	t.Helper()
	p, err := store.New(&url.URL{Scheme: "store"}, publisher.Deps{Bus: b, Name: "notifier-1", Keys: sample.Keys{"notifier-1": []byte("secret of notifier-1")}, Partitions: 1})
	if err != nil {
		t.Fatal(err)
	}
	return p.(publisher.EventPublisher)
}

func event(i, raw int) sample.Event {
	e := sample.Event{
		ID: fmt.Sprint("event ", i), Type: "compute.instance.exists", Generated: 1_800_000_000_000_000 + int64(i),
		Traits: []sample.Trait{{Name: "instance_id", Type: sample.TextTrait, Text: "a"}, {Name: "vcpus", Type: sample.IntTrait, Int: 2}},
	}
	if raw > 0 {
		e.Raw = []byte(`{"a":"` + strings.Repeat("x", raw) + `"}`)
	}
	return e
}

func TestEventsTravelInMessagesThatAreNotTooLarge(t *testing.T) {
	for name, tc := range map[string]struct {
		sizes []int // of what is raw of each
		want  []int // events in each message
	}{
		"none":                           {nil, nil},
		"few":                            {make([]int, 3), []int{3}},
		"many":                           {make([]int, 1100), []int{500, 500, 100}},
		"large ones":                     {[]int{0, 700_000, 700_000, 0}, []int{2, 2}},
		"one that is larger than a part": {[]int{0, 3_000_000, 0}, []int{1, 1, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			var sent, got []sample.Event
			for i, raw := range tc.sizes {
				sent = append(sent, event(i, raw))
			}
			r := &recorder{}
			if err := open(t, r).PublishEvents(t.Context(), sent); err != nil {
				t.Fatal(err)
			}
			dec, err := sample.NewDecoder()
			if err != nil {
				t.Fatal(err)
			}
			opener := bus.Opener{Keys: sample.Keys{"notifier-1": []byte("secret of notifier-1")}, Relays: []string{"notifier-1"}, Decoder: dec}
			var sizes []int
			for i := range r.got {
				events, err := opener.OpenEvents(&r.got[i])
				if err != nil {
					t.Fatal(err)
				}
				sizes, got = append(sizes, len(events)), append(got, events...)
			}
			if diff := cmp.Diff(tc.want, sizes); diff != "" {
				t.Errorf("events of each message (-want +got):\n%s", diff)
			}
			if !reflect.DeepEqual(sent, got) { // a diff of what is large takes long
				t.Errorf("%d events were sent, %d came, and they differ", len(sent), len(got))
			}
		})
	}
}

func TestAnEventThatCannotBeSentIsNamed(t *testing.T) {
	for name, bad := range map[string]sample.Event{
		"without an id":            {Type: "t"},
		"larger than what is read": event(7, sample.MaxDecoded),
	} {
		t.Run(name, func(t *testing.T) {
			err := open(t, &recorder{}).PublishEvents(t.Context(), []sample.Event{event(1, 0), bad, event(2, 0)})
			var refusal *publisher.Refusal
			if !errors.As(err, &refusal) || refusal.Part != 1 {
				t.Errorf("error %v, want a refusal of number 1", err)
			}
		})
	}
}
