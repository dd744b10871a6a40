package sample

import (
	"errors"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestEventsAreCeilometers reads testdata/events.jsonl, which Ceilometer 19.0.0
// published, and writes it again.
func TestEventsAreCeilometers(t *testing.T) {
	data, err := os.ReadFile("testdata/events.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		e, err := ParseEvent([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		want, _, ok := strings.Cut(line, `, "message_signature"`)
		if !ok {
			t.Fatalf("%s is not signed", line)
		}
		if got := string(e.AppendJSON(nil)); got != want+"}" {
			t.Errorf("got\n%s\nwant\n%s}", got, want)
		}
		n++
	}
	if n != 3 {
		t.Errorf("%d events, want 3", n)
	}
}

func TestEventKeepsEveryTypeOfTrait(t *testing.T) {
	want := Event{
		ID: "m-é\n", Type: "compute.x", Generated: 1_767_261_600_500_000, Raw: []byte(`{"payload": {"k": [1, null]}}`),
		Traits: []Trait{
			{Name: "t", Type: TextTrait, Text: `"quoted"`},
			{Name: "i", Type: IntTrait, Int: math.MinInt64},
			{Name: "f", Type: FloatTrait, Float: 0.1},
			{Name: "whole", Type: FloatTrait, Float: 60},
			{Name: "d", Type: DatetimeTrait, Int: 1_767_261_600_000_001},
		},
	}
	if err := want.Check(); err != nil {
		t.Error(err)
	}
	text := want.AppendJSON(nil)
	got, err := ParseEvent(text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after %s (-want +got):\n%s", text, diff)
	}
}

func TestASampleIsTheSameEventEachTime(t *testing.T) {
	s := Sample{
		ID: ID{UUID: [16]byte{15: 1}}, Resource: "r", Time: 1_767_261_600_500_000,
		Metadata: []byte(`{"z": "Fan 1", "host": "forged", "at": "2026-01-01T12:00:00+02:00", "n": -3, "f": 1.5, "big": 1e999, "b": true, "none": "", "null": null, "list": [1], "object": {}}`),
	}
	want := &Event{
		ID: "00000000-0000-0000-0000-000000000001", Type: "x.y", Generated: 1_767_261_600_500_000,
		Traits: []Trait{
			{Name: "at", Type: DatetimeTrait, Int: 1_767_261_600_000_000},
			{Name: "b", Type: TextTrait, Text: "true"},
			{Name: "f", Type: FloatTrait, Float: 1.5},
			{Name: "host", Type: TextTrait, Text: "node-1"},
			{Name: "n", Type: IntTrait, Int: -3},
			{Name: "resource_id", Type: TextTrait, Text: "r"},
			{Name: "z", Type: TextTrait, Text: "Fan 1"},
		},
	}
	for range 2 {
		got := EventOf(&s, "node-1", "x.y")
		if diff := cmp.Diff(want, got); diff != "" || got.Check() != nil {
			t.Errorf("%v (-want +got):\n%s", got.Check(), diff)
		}
	}
	for _, odd := range []string{"", "null", "[1]", "{", `{"z": 1} x`[:5]} {
		s.Metadata = []byte(odd)
		if got := EventOf(&s, "node-1", "x.y"); len(got.Traits) != 2 || got.Check() != nil {
			t.Errorf("metadata %q gives %+v", odd, got)
		}
	}
}

func TestParseEventSaysWhatIsWrong(t *testing.T) {
	head := `{"message_id": "m", "event_type": "e", "generated": "2026-01-01T00:00:00", `
	for text, want := range map[string]string{
		`[]`:                  "cannot unmarshal array",
		`{"message_id": "m"}`: "it needs message_id and event_type",

		head + `"generated": "x"}`:                                  `generated: "x" is no time of the form`,
		head + `"raw": 1}`:                                          "raw is no object",
		head + `"traits": [["a", 1]]}`:                              "trait 0: 2 elements, not name, type and value",
		head + `"traits": [["a", 7, 1]]}`:                           `"a": unknown type 7`,
		head + `"traits": [["a", 2, 1.5]]}`:                         `"a": json: cannot unmarshal number 1.5`,
		head + `"traits": [["a", 1, "b"], ["a", 1, null]]}`:         `trait 1: "a": its value is null`,
		head + `"traits": [["a", 4, "2026-01-01T00:00:00+25:00"]]}`: `no time of the form`,
		head + `"traits": [["a", 4, "9999-12-31T23:00:00-02:00"]]}`: `no time of the form`,
	} {
		if _, err := ParseEvent([]byte(text)); !errors.Is(err, ErrMalformedEvent) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\ngot  %v\nwant %s", text, err, want)
		}
	}
}

func TestTimesOfEvents(t *testing.T) {
	want := time.Date(2026, 1, 1, 10, 0, 0, 500_000_000, time.UTC).UnixMicro()
	for _, text := range []string{
		"2026-01-01T10:00:00.5", "2026-01-01 10:00:00.500000", "2026-01-01T10:00:00.5Z", "2026-01-01T10:00:00.500000+00:00",
		"2026-01-01T12:00:00.5+02:00", "2025-12-31 23:00:00.5-11:00",
	} {
		e, err := ParseEvent([]byte(`{"message_id": "m", "event_type": "e", "generated": "` + text + `", "traits": [["a", 4, "` + text + `"]]}`))
		if err != nil || e.Generated != want || e.Traits[0].Int != want {
			t.Errorf("%s: got %+v, %v", text, e, err)
		}
	}
}

func TestEventsThatCannotBeWrittenAreFound(t *testing.T) {
	for name, e := range map[string]Event{
		"no id":                   {Type: "e"},
		"a type that is none":     {ID: "m", Type: "e", Traits: []Trait{{Name: "a"}}},
		"a float that is no JSON": {ID: "m", Type: "e", Traits: []Trait{{Name: "a", Type: FloatTrait, Float: math.Inf(1)}}},
		"raw that is no object":   {ID: "m", Type: "e", Raw: []byte("[]")},
	} {
		if err := e.Check(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzParseEvent(f *testing.F) {
	f.Add([]byte(`{"message_id": "m", "event_type": "e", "generated": "2026-01-01T00:00:00", "traits": [["a", 1, "x"], ["b", 2, 5], ["c", 3, 1e3], ["d", 4, "2026-01-01T00:00:00.000001"]], "raw": {"a": 1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := ParseEvent(data)
		if err != nil {
			return
		}
		if err := e.Check(); err != nil {
			t.Fatalf("read but cannot be written: %v", err)
		}
		text := e.AppendJSON(nil)
		again, err := ParseEvent(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if diff := cmp.Diff(e, again); diff != "" {
			t.Errorf("%s (-first +again):\n%s", text, diff)
		}
	})
}

// FuzzDecodeEvents: what is read can be written, and is the same again.
func FuzzDecodeEvents(f *testing.F) {
	data, err := os.ReadFile("testdata/events.jsonl")
	if err != nil {
		f.Fatal(err)
	}
	var events []Event
	for _, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		e, err := ParseEvent([]byte(line))
		if err != nil {
			f.Fatal(err)
		}
		events = append(events, e)
	}
	enc, err := NewEncoder()
	if err != nil {
		f.Fatal(err)
	}
	dec, err := NewDecoder()
	if err != nil {
		f.Fatal(err)
	}
	body, err := enc.EncodeEvents(nil, events)
	if err != nil {
		f.Fatal(err)
	}
	if got, err := dec.DecodeEvents(body); err != nil || !cmp.Equal(got, events) {
		f.Fatalf("%v (-sent +got):\n%s", err, cmp.Diff(events, got))
	}
	f.Add(body)
	for _, text := range []string{"null", "[]", " [null]", `{"message_id": "m"}`} {
		f.Add(enc.zstd.EncodeAll([]byte(text), nil))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		events, err := dec.DecodeEvents(body)
		if err != nil {
			if !errors.Is(err, ErrMalformedEvent) {
				t.Errorf("%v is not ErrMalformedEvent", err)
			}
			return
		}
		again, err := enc.EncodeEvents(nil, events)
		if err != nil {
			t.Fatal(err)
		}
		got, err := dec.DecodeEvents(again)
		if err != nil || !cmp.Equal(got, events) {
			t.Errorf("%v (-first +again):\n%s", err, cmp.Diff(events, got))
		}
	})
}

func TestEventsThatAreNoneAreRefused(t *testing.T) {
	enc, err := NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	dec, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := enc.EncodeEvents(nil, []Event{{Type: "without an id"}}); err == nil {
		t.Error("an event without an id is encoded")
	}
	if _, err := enc.EncodeEvents(nil, []Event{{ID: "a", Type: "b", Raw: []byte(`{"a":"` + strings.Repeat("x", MaxDecoded) + `"}`)}}); err == nil {
		t.Error("an event that nobody would read is encoded")
	}
	for text, want := range map[string]string{
		"null": "no list of events", "[{}]": "event 0: malformed event: it needs message_id", `{"message_id": "m"}`: "cannot unmarshal object",
	} {
		if _, err := dec.DecodeEvents(enc.zstd.EncodeAll([]byte(text), nil)); !errors.Is(err, ErrMalformedEvent) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// FuzzEventOf: whatever metadata a sample has, its event can be written and read.
func FuzzEventOf(f *testing.F) {
	f.Add([]byte(`{"sensor": "Fan 1", "time": "2026-01-01T12:00:00Z", "record": 7, "asserted": true, "f": 1e300}`))
	f.Add([]byte(`{"\xff": "9999-12-31T23:59:59-12:00", "a": "0000-01-01T00:00:00+12:00"}`))
	f.Fuzz(func(t *testing.T, metadata []byte) {
		e := EventOf(&Sample{Metadata: metadata}, "node-1", "x.y")
		if err := e.Check(); err != nil {
			t.Fatal(err)
		}
		text := e.AppendJSON(nil)
		again, err := ParseEvent(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if diff := cmp.Diff(e, &again); diff != "" {
			t.Errorf("%s (-made +read):\n%s", text, diff)
		}
	})
}

func BenchmarkEventAppendJSON(b *testing.B) {
	data, err := os.ReadFile("testdata/events.jsonl")
	if err != nil {
		b.Fatal(err)
	}
	e, err := ParseEvent([]byte(strings.Split(string(data), "\n")[0]))
	if err != nil {
		b.Fatal(err)
	}
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = e.AppendJSON(buf[:0])
	}
}
