package meters

import (
	"os"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/notifier/notification"
	"github.com/kvmeter/kvmeter/notifier/value"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/sample/ceilometer"
)

func parse(t testing.TB, text string) value.Value {
	t.Helper()
	var p value.Parser
	v, err := p.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// polled returns the samples of a message that Ceilometer's polling agent sent
// with the secret "lab-secret".
func polled(t testing.TB) []value.Value {
	t.Helper()
	data, err := os.ReadFile("../conversion/testdata/polling-cpu.json")
	if err != nil {
		t.Fatal(err)
	}
	var d notification.Decoder
	n, err := d.Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	samples := n.Payload().Field("samples")
	if samples == nil || len(samples.Items) == 0 {
		t.Fatalf("no samples in %s", data)
	}
	return samples.Items
}

func TestSignaturesOfCeilometer(t *testing.T) {
	good, other := newVerifier("lab-secret"), newVerifier("another")
	for i, s := range polled(t) {
		if !good.good(&s) {
			t.Errorf("sample %d: its signature is refused", i)
		}
		if other.good(&s) {
			t.Errorf("sample %d: the signature of another secret is taken", i)
		}
		text := string(s.AppendJSON(nil))
		for _, change := range [][2]string{{`"source":"openstack"`, `"source":"openstack2"`}, {`"message_signature":"`, `"message_signature":"0`}, {`"message_signature"`, `"signature"`}, {`"display_name":"`, `"display_name":"x`}} {
			forged := parse(t, strings.Replace(text, change[0], change[1], 1))
			if !strings.Contains(text, change[0]) || good.good(&forged) {
				t.Errorf("sample %d: %s can be changed in %s", i, change[0], text)
			}
		}
	}
}

// FuzzSignature: what the writer signs, the verifier takes.
func FuzzSignature(f *testing.F) {
	f.Add("cpu", `{"a": [1, 1.0, -0.0, 1e22, "é'\"\u0000", {"b": [], "a": null}], "b": {"c": {"d": true}}, "message_signature": "x", "": 0}`, uint64(1)<<63)
	f.Add("\xff", "no JSON \xff", uint64(0))
	f.Fuzz(func(t *testing.T, name, metadata string, volume uint64) {
		s := sample.Sample{Name: name, Volume: sample.Uint(volume), Metadata: []byte(metadata)}
		out := ceilometer.NewWriter("secret", "").Sample(nil, &s)
		var p value.Parser
		v, err := p.Parse(string(out))
		if err != nil {
			t.Skip("what the parser refuses is never verified")
		}
		if !newVerifier("secret").good(&v) {
			t.Errorf("refused: %s", out)
		}
		if newVerifier("another").good(&v) {
			t.Errorf("taken with another secret: %s", out)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	samples := polled(b)
	v := newVerifier("lab-secret")
	b.ReportAllocs()
	for b.Loop() {
		if !v.good(&samples[0]) {
			b.Fatal("refused")
		}
	}
}
