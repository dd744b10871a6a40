package conversion

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/notifier/events"
	"github.com/kvmeter/kvmeter/notifier/meters"
	"github.com/kvmeter/kvmeter/sample"
)

// FuzzConvert finds that whatever a notification gives can be printed, encoded
// and read again.
func FuzzConvert(f *testing.F) {
	for _, name := range []string{"compute.instance.create.end.json", "compute.instance.exists.json", "polling-cpu.json"} {
		f.Add(wire(f, name))
	}
	f.Add([]byte(`{"oslo.version": "2.0", "oslo.message": "{\"event_type\": \"http.request\", \"payload\": {\"request\": {}}, \"timestamp\": \"2026-01-01\"}"}`))
	f.Add([]byte(`{"event_type": "hardware.ipmi.x", "payload": {"node_uuid": 5, "payload": {"Fan": {"a": {"Sensor ID": "x", "Sensor Reading": "1 RPM"}}}}}`))
	f.Add([]byte(`{"event_type": "magnum.bay.metrics.update", "message_id": "m", "timestamp": "0001-01-01", "payload": {"metrics": [{"name": 1, "unit": null, "value": "7"}]}}`))
	d, _, err := Load(DefaultSettings(), []string{Shipped}, "")
	if err != nil {
		f.Fatal(err)
	}
	c := NewConverter(d)
	enc, err := sample.NewEncoder()
	if err != nil {
		f.Fatal(err)
	}
	dec, err := sample.NewDecoder()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := c.Convert(append([]byte(nil), body...))
		if err != nil {
			return
		}
		if line := r.AppendLine(nil, c.Explain()); !json.Valid(line) {
			t.Errorf("%s is no JSON", line)
		}
		if r.Event != nil {
			if err := r.Event.Check(); err != nil {
				t.Errorf("event: %v", err)
			}
		}
		b, refused := r.Batch("n1")
		if b == nil {
			return
		}
		if b.Len()+refused != len(r.Samples) {
			t.Errorf("%d samples, %d refused, of %d", b.Len(), refused, len(r.Samples))
		}
		encoded, err := enc.Encode(nil, b)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := dec.Decode(encoded); err != nil || again.Len() != b.Len() {
			t.Errorf("%v", err)
		}
	})
}

// FuzzLoad finds that no file of definitions does harm.
func FuzzLoad(f *testing.F) {
	for _, file := range meters.Shipped(meters.Options{Existence: true}) {
		f.Add(string(file.Data))
	}
	f.Add(string(events.Shipped()))
	for _, name := range []string{"meters.yaml", "events.yaml"} {
		data, err := os.ReadFile(filepath.Join("../../cmd/kvmeter/testdata/lint", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	f.Add("metric:\n- &a\n  <<: *a\n  name: b\n")
	f.Add("metric:\n- {name: a, event_type: a, type: gauge, unit: B, volume: 1, resource_id: a, metadata: &b {c: *b, d: [*b, *b]}}\n")
	f.Add("- event_type: [\"!a\", b]\n  traits: {x: {fields: a, plugin: {name: bitfield, parameters: {flags: [{path: a, bit: 1}]}}}}\n")
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Count(text, "(") > 5 { // backtracking of expressions
			return
		}
		if set, err := meters.Load([]meters.File{{Name: "m.yaml", Data: []byte(text)}}, meters.DefaultOptions()); err == nil {
			_ = meters.NewConverter(set)
		}
		set, err := events.Load("e.yaml", []byte(text), events.Options{})
		if err == nil {
			_ = events.NewConverter(set)
		}
		for _, finding := range set.Findings() {
			if finding.Line == 0 {
				t.Errorf("a finding without a line: %s", finding.String())
			}
		}
	})
}
