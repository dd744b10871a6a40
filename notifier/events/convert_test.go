package events_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/notifier/events"
	"github.com/kvmeter/kvmeter/notifier/notification"
)

// convert returns the traits that a definition gives, but for the default ones.
func convert(t *testing.T, definitions, payload string) (string, []string) {
	t.Helper()
	set, err := events.Load("e.yaml", []byte(definitions), events.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var d notification.Decoder
	n, err := d.Decode([]byte(`{"event_type": "x.y", "publisher_id": null, "message_id": "m", "timestamp": "2026-01-01T00:00:00", "payload": ` + payload + `}`))
	if err != nil {
		t.Fatal(err)
	}
	c := events.NewConverter(set)
	e, err := c.Convert(n)
	if err != nil {
		t.Fatal(err)
	}
	var traits []string
	for i := range e.Traits {
		traits = append(traits, fmt.Sprintf("%s %v %s", e.Traits[i].Name, e.Traits[i].Type, e.Traits[i].AppendValue(nil)))
	}
	return strings.Join(traits, ", "), c.Why(n)[1:]
}

// TestMapPlugin is of Ceilometer 2025.1.
func TestMapPlugin(t *testing.T) {
	for name, tc := range map[string]struct {
		parameters, payload string
		want, warning       string
	}{
		"a text":                        {`{values: {a: one, b: two}}`, `{"v": "b"}`, `x text "two"`, ""},
		"a text in another case":        {`{values: {a: one}}`, `{"v": "A"}`, ``, `map: there is no value for "A"`},
		"where the case does not count": {`{values: {Ab: one}, case_sensitive: false}`, `{"v": "aB"}`, `x text "one"`, ""},
		"a number":                      {`{values: {0: none, 1: some}}`, `{"v": 1}`, `x text "some"`, ""},
		"a number is no text":           {`{values: {"1": some}}`, `{"v": 1}`, ``, `map: there is no value for "1"`},
		"true is one":                   {`{values: {1: some}}`, `{"v": true}`, `x text "some"`, ""},
		"a default":                     {`{values: {a: one}, default: other}`, `{"v": "z"}`, `x text "other"`, `map: there is no value for "z"`},
		"nothing for nothing":           {`{values: {a: one}, default: other}`, `{}`, ``, ""},
	} {
		got, warnings := convert(t, "- event_type: x.*\n  traits: {x: {fields: payload.v, plugin: {name: map, parameters: "+tc.parameters+"}}}\n", tc.payload)
		if got != tc.want || strings.Join(warnings, "; ") != tc.warning {
			t.Errorf("%s: got %s and %q, want %s and %q", name, got, warnings, tc.want, tc.warning)
		}
	}
}

func TestMapPluginBecomesTheTraitsType(t *testing.T) {
	got, _ := convert(t, `
- event_type: x.*
  traits:
    i: {type: int, fields: payload.v, plugin: {name: map, parameters: {values: {on: 1, off: 0}}}}
    f: {type: float, fields: payload.v, plugin: {name: map, parameters: {values: {"on": 0.5}}}}
`, `{"v": "on"}`)
	if want := `i int 1, f float 0.5`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
