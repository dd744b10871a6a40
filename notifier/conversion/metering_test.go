package conversion

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/meters"
)

// TestSamplesOfPublishersAreTakenIfTheirSignaturesHold reads what a polling agent
// sent, signed with lab-secret, and the same as a publisher sends it.
func TestSamplesOfPublishersAreTakenIfTheirSignaturesHold(t *testing.T) {
	polled, err := os.ReadFile("testdata/polling-cpu.json")
	if err != nil {
		t.Fatal(err)
	}
	var envelope struct {
		Message string `json:"oslo.message"`
	}
	var message struct {
		Payload struct{ Samples json.RawMessage }
	}
	if err := json.Unmarshal(polled, &envelope); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(envelope.Message), &message); err != nil {
		t.Fatal(err)
	}
	published := func(event string) []byte {
		return fmt.Appendf(nil, `{"message_id": "m", "publisher_id": "telemetry.publisher.h", "event_type": %q, "priority": "SAMPLE", "timestamp": "2026-11-21 19:30:02.187771", "payload": %s}`, event, message.Payload.Samples)
	}
	convert := func(secret string, body []byte) (ids []string, errs string) {
		t.Helper()
		settings := DefaultSettings()
		settings.Meters.Secret, settings.Meters.RefuseUnsigned = secret, true
		d, _, err := Load(settings, []string{Shipped}, "")
		if err != nil {
			t.Fatal(err)
		}
		r, err := NewConverter(d).Convert(body)
		if err != nil {
			t.Fatal(err)
		}
		for i := range r.Samples {
			ids = append(ids, r.sampleID(i))
		}
		return ids, fmt.Sprint(r.Errors)
	}
	want, errs := convert("", polled)
	if len(want) == 0 || errs != "[]" {
		t.Fatalf("%d samples, %s", len(want), errs)
	}
	for name, body := range map[string][]byte{"polled": polled, "published": published("metering"), "published by meter": published("metering.cpu")} {
		for secret, refusal := range map[string]string{"": "[]", "lab-secret": "[]", "another": meters.ErrSignature.Error()} {
			got, errs := convert(secret, body)
			if refusal == "[]" && !cmp.Equal(got, want) || refusal != "[]" && got != nil || !strings.Contains(errs, refusal) {
				t.Errorf("%s, secret %q: samples %v, errors %s; want %v, %s", name, secret, got, errs, want, refusal)
			}
		}
	}
	unsigned := []byte(strings.ReplaceAll(string(polled), "message_signature", "signature"))
	if got, errs := convert("lab-secret", unsigned); got != nil || !strings.Contains(errs, meters.ErrSignature.Error()) {
		t.Errorf("not signed: %v, %s", got, errs)
	}
}
