package conversion

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/value"
)

// better lists the cases in which kvmeter deliberately gives another answer;
// docs/ceilometer.md says the same.
var better = map[string]string{
	"one raises":                   "a definition that fails costs itself only",
	"volume [1]":                   "a volume that is a list costs its sample only, with an error",
	"volume {'a': 1}":              "a volume that is an object costs its sample only, with an error",
	"multi volume const":           "a constant holds for each of several samples",
	"multi volume const in lookup": "a constant holds for each of several samples",
	"trait int f":                  "a trait that can't be converted costs itself only",
	"trait int bad":                "a trait that can't be converted costs itself only",
	"trait int list":               "a trait that can't be converted costs itself only",
	"trait int big":                "an integer beyond 64 bits is left out, with an error",
	"trait float bad":              "a trait that can't be converted costs itself only",
	"trait float d":                "a trait that can't be converted costs itself only",
	"trait datetime bad":           "a trait that can't be converted costs itself only",
	"trait datetime n":             "a trait that can't be converted costs itself only",
	"trait datetime fl":            "a trait that can't be converted costs itself only",
	"trait none n":                 "there is no type none",
	"timedelta ['payload.a', 'payload.z'] datetime": "a trait that can't be converted costs itself only",
	"timedelta ['payload.z', 'payload.a'] datetime": "a trait that can't be converted costs itself only",
	"shipped meter identity.authenticate":           "the meter has the name that was meant",
	"paths":                                         "members are in another order",
}

// TestCasesGiveTheAnswersOfCeilometer compares with testdata/ceilometer.jsonl:
// notifications, and what Ceilometer 19.0.0 made of them by which definitions; "failed" says that it raised.
func TestCasesGiveTheAnswersOfCeilometer(t *testing.T) {
	data, err := os.ReadFile("testdata/ceilometer.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	first, rest, _ := strings.Cut(string(data), "\n")
	var inputs []json.RawMessage
	if err := json.Unmarshal([]byte(first), &inputs); err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	n := 0
	for line := range strings.Lines(rest) {
		var c struct {
			About, Kind string
			Options     []string
			Definitions *string
			Refused     bool
			Input       []int // numbers of inputs
			Want        []struct {
				Samples []map[string]any
				Event   map[string]any
				Failed  bool
			}
		}
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatal(err)
		}
		n++
		settings := DefaultSettings()
		settings.Meters.StrictContext, settings.Meters.LegacyUnits = true, true
		for _, o := range c.Options {
			if err := settings.Set(o); err != nil {
				t.Errorf("%s: %v", c.About, err)
			}
		}
		settings.NoMeters, settings.NoEvents = c.Kind != "meter", c.Kind != "event"
		meterFiles := []string{Shipped}
		file := ""
		if c.Definitions != nil {
			file = filepath.Join(t.TempDir(), "definitions.yaml")
			if err := os.WriteFile(file, []byte(*c.Definitions), 0o600); err != nil {
				t.Fatal(err)
			}
			if c.Kind == "meter" {
				meterFiles, file = []string{file}, ""
			}
		}
		var got string
		d, _, err := Load(settings, meterFiles, file)
		if err != nil != c.Refused {
			got = "refused: " + errorText(err)
		}
		if err == nil && got == "" {
			converter := NewConverter(d)
			for i, in := range c.Input {
				r, err := converter.Convert(inputs[in])
				if err != nil {
					t.Fatalf("%s: %v", c.About, err)
				}
				line := r.AppendLine(nil, nil)
				var out struct {
					Samples []map[string]any
					Event   map[string]any
					Errors  []string
				}
				if err := json.Unmarshal(line, &out); err != nil {
					t.Fatalf("%s: %s: %v", c.About, line, err)
				}
				samples := make([]map[string]any, 0)
				for _, s := range out.Samples {
					samples = append(samples, map[string]any{
						"name": s["counter_name"], "type": s["counter_type"], "unit": s["counter_unit"], "volume": s["counter_volume"],
						"user_id": s["user_id"], "project_id": s["project_id"], "resource_id": s["resource_id"], "timestamp": s["timestamp"],
						"resource_metadata": olderMetadata(s["resource_metadata"].(map[string]any), c.Definitions == nil), "source": s["source"],
					})
				}
				want := c.Want[i]
				if want.Samples == nil {
					want.Samples = samples[:0]
				}
				got += cmp.Diff(want.Samples, samples) + cmp.Diff(want.Event, olderTraits(out.Event, c.Definitions == nil))
				if want.Failed != (len(out.Errors) > 0) {
					got += strings.Join(append(out.Errors, "Ceilometer fails: "+map[bool]string{true: "yes", false: "no"}[want.Failed]), "; ")
				}
			}
		}
		switch reason, deliberate := better[c.About]; {
		case deliberate && got == "":
			t.Errorf("%s: is not different, though %s", c.About, reason)
		case !deliberate && got != "":
			t.Errorf("%s (-want +got):\n%.1500s", c.About, got)
		}
		used[c.About] = true
	}
	for about := range better {
		if !used[about] {
			t.Errorf("there is no case %q", about)
		}
	}
	if n < 400 {
		t.Errorf("%d cases only", n)
	}
}

func errorText(err error) string {
	if err == nil {
		return "no"
	}
	return err.Error()
}

// olderMetadata takes away what the shipped definitions have learnt since.
func olderMetadata(m map[string]any, shipped bool) map[string]any {
	if shipped {
		delete(m, "image_meta")
		delete(m, "volume_type_id")
	}
	return m
}

// olderTraits does the same for traits.
func olderTraits(e map[string]any, shipped bool) map[string]any {
	if e == nil || !shipped {
		return e
	}
	var traits []any
	for _, t := range e["traits"].([]any) {
		if t.([]any)[0] != "instance_flavor_id" {
			traits = append(traits, t)
		}
	}
	e["traits"] = traits
	return e
}

func wire(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestTheThreeFormsOfANotificationGiveTheSame converts a captured message, and
// what is in its envelope, and what oslo.messaging makes of that.
func TestTheThreeFormsOfANotificationGiveTheSame(t *testing.T) {
	body := wire(t, "compute.instance.create.end.json")
	var envelope struct {
		Message string `json:"oslo.message"`
	}
	if err := json.Unmarshal(body, &envelope); err != nil {
		t.Fatal(err)
	}
	var bare map[string]any
	if err := json.Unmarshal([]byte(envelope.Message), &bare); err != nil {
		t.Fatal(err)
	}
	ctxt := map[string]any{}
	for k, v := range bare {
		if name, ok := strings.CutPrefix(k, "_context_"); ok {
			ctxt[name] = v
		}
	}
	endpoint, err := json.Marshal(map[string]any{
		"ctxt": ctxt, "publisher_id": bare["publisher_id"], "event_type": bare["event_type"], "priority": "info", "payload": bare["payload"],
		"metadata": map[string]any{"message_id": bare["message_id"], "timestamp": bare["timestamp"]},
	})
	if err != nil {
		t.Fatal(err)
	}
	d, _, err := Load(DefaultSettings(), []string{Shipped}, "")
	if err != nil {
		t.Fatal(err)
	}
	var want any
	for i, form := range [][]byte{body, []byte(envelope.Message), endpoint} {
		r, err := NewConverter(d).Convert(form)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Samples) != 5 || r.Event == nil || len(r.Errors) != 0 {
			t.Errorf("form %d: %d samples, event %v, errors %v", i, len(r.Samples), r.Event, r.Errors)
		}
		var got any
		if err := json.Unmarshal(r.AppendLine(nil, nil), &got); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			want = got
		} else if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("form %d (-envelope +got):\n%s", i, diff)
		}
	}
}

// TestPolledSamplesAreTakenAsTheyAre converts a captured message of a polling
// agent.
func TestPolledSamplesAreTakenAsTheyAre(t *testing.T) {
	d, _, err := Load(DefaultSettings(), []string{Shipped}, "")
	if err != nil {
		t.Fatal(err)
	}
	var p value.Parser
	body := wire(t, "polling-cpu.json")
	v, err := p.Parse(string(body))
	if err != nil {
		t.Fatal(err)
	}
	var inner struct {
		Payload struct{ Samples []map[string]any }
	}
	if err := json.Unmarshal([]byte(v.Field("oslo.message").Text), &inner); err != nil {
		t.Fatal(err)
	}
	r, err := NewConverter(d).Convert(body)
	if err != nil || len(r.Errors) > 0 {
		t.Fatal(err, r.Errors)
	}
	var got struct{ Samples []map[string]any }
	if err := json.Unmarshal(r.AppendLine(nil, nil), &got); err != nil {
		t.Fatal(err)
	}
	for _, s := range inner.Payload.Samples {
		delete(s, "message_signature")
		s["user_name"], s["project_name"] = nil, nil
	}
	if diff := cmp.Diff(inner.Payload.Samples, got.Samples); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	b, refused := r.Batch("n1")
	if refused != 0 || b.Len() != len(got.Samples) {
		t.Fatalf("%d samples in the batch, %d refused, want %d", b.Len(), refused, len(got.Samples))
	}
	if err := b.Check(); err != nil {
		t.Error(err)
	}
	if id := b.SampleID(0).String(); id != got.Samples[0]["message_id"] {
		t.Errorf("the first sample's id is %s, want %s", id, got.Samples[0]["message_id"])
	}
}

func BenchmarkConvert(b *testing.B) {
	d, _, err := Load(DefaultSettings(), []string{Shipped}, "")
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"compute.instance.create.end.json", "compute.instance.exists.json", "compute.instance.update.json", "polling-cpu.json"} {
		body := wire(b, name)
		b.Run(strings.TrimSuffix(name, ".json"), func(b *testing.B) {
			c := NewConverter(d)
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			before := cpu(b)
			for b.Loop() {
				r, err := c.Convert(body)
				if err != nil || len(r.Errors) > 0 {
					b.Fatal(err, r.Errors)
				}
				if len(r.Samples) > 0 {
					if batch, _ := r.Batch("n1"); batch.Len() != len(r.Samples) {
						b.Fatal("samples are missing")
					}
				}
			}
			b.ReportMetric(float64(cpu(b)-before)/1e3/float64(b.N), "cpu-µs/op")
		})
	}
}

// cpu returns the CPU time of the process so far, the collector's included.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
