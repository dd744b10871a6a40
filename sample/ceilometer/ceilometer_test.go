package ceilometer

import (
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vmihailenco/msgpack/v5"

	"github.com/kvmeter/kvmeter/sample"
)

// TestSignatureVectors are signatures that Ceilometer made with the secret
// "secret".
func TestSignatureVectors(t *testing.T) {
	for message, want := range map[string]string{
		`{"counter_name":"cpu","counter_volume":1}`: "e49c841edeb53c313def6b2129787da3179531f428bb1c3c5ff128ee926f5db8",
		`{"message_id":"m","event_type":"e","generated":"2026-01-01T00:00:00","traits":[["t",1,"v"],["n",2,3]],"raw":{}}`:    "4e080061430dc326f2fc5d1ee255afdcca6a75835bee18e597911a26aae5519b",
		`{"f":["é","a\"b","back\\slash","new\nline"]}`:                                                                       "db88f2c65dadb66647cd471f78a0eaadd14b855b12bcdb82b3b5d85c5ac98ec6",
		`{"n":12345678901234567890,"fl":0.1,"fl2":1e-7,"fl3":123456789012345680.0,"z":false,"message_signature":"whatever"}`: "d173510a670b841bf44e0b1b77592aa1cda3f510d087fa3bd2921c205867a27d",
	} {
		if got := Signature([]byte(message), "secret"); got != want {
			t.Errorf("signature of %s is %s, want %s", message, got, want)
		}
	}
	if got := Signature([]byte(`{"a": 1}`), ""); got != "" {
		t.Errorf("without a secret the signature is %q", got)
	}
}

func TestWhatIsSigned(t *testing.T) {
	for in, want := range map[string]string{
		`{"b": {"y": null, "x": [true, {"k": "v", "a": [1.0, []]}]}, "a": {}, "c": []}`: `:b:x[True, {b'a': [1.0, []], b'k': b'v'}]:b:yNone:c[]`,
		`{"a": ["it's", "\"it's\"", "\t\u0000"]}`:                                       `:a[b"it's", b'"it\'s"', b'\t\x00']`,
		`{"a": 1, "b": 2, "a": 3}`:                                                      ":a3:b2",
	} {
		t2 := parse([]byte(in))
		if got := string(t2.appendSigned(nil, "")); got != want {
			t.Errorf("%s\ngot  %s\nwant %s", in, got, want)
		}
	}
}

// TestTCPForm compares with what Ceilometer's tcp publisher sent.
func TestTCPForm(t *testing.T) {
	data, err := os.ReadFile("testdata/p02-tcp.json")
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		Input    []json.RawMessage
		Expected []struct{ Body string }
	}
	if err := json.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	want, err := hex.DecodeString(c.Expected[0].Body)
	if err != nil {
		t.Fatal(err)
	}
	b := NewWriter("change this for valid signing", "node1")
	for _, in := range c.Input {
		s, err := sample.ParseForeign(in)
		if err != nil {
			t.Fatal(err)
		}
		got := b.SampleMsgpack(nil, &s)
		var wanted, received any
		if err := msgpack.Unmarshal(want[8:8+int(want[0])|int(want[1])<<8], &wanted); err != nil {
			t.Fatal(err)
		}
		if err := msgpack.Unmarshal(got, &received); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(wanted, received); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if n := len(got); n+8 > len(want) || string(want[8:8+n]) != string(got) {
			t.Fatalf("got %x\nwant %x", got, want[8:])
		}
		want = want[8+len(got):]
	}
}

// FuzzSample: whatever a sample holds, the signature is that of the message as it
// is read.
func FuzzSample(f *testing.F) {
	f.Add("cpu", "5e1f0000-0000-4000-8000-000000000001", `{"a": [1, 1.0, "é'\"\u0000"], "b": {"c": null}}`, "", uint64(1)<<63, false)
	f.Add("\xff", "tap\xc3", "{\xff", "2026-11-21T10:00:00+00:00\xff", uint64(0x3ff0000000000000), true)
	f.Fuzz(func(t *testing.T, name, resource, metadata, at string, bits uint64, float bool) {
		s := sample.Sample{Name: name, Resource: resource, User: name, Volume: sample.Uint(bits), Metadata: []byte(metadata), ID: sample.ID{Text: at}}
		if float {
			if s.Volume = sample.Float(math.Float64frombits(bits)); s.Volume.Check() != nil {
				return
			}
			s.Foreign = &sample.Foreign{Timestamp: at, Monotonic: s.Volume.Float64(), HasMonotonic: true, ProjectName: resource}
		}
		out := NewWriter("secret", name).Sample(nil, &s)
		var m struct {
			Signature string `json:"message_signature"`
		}
		if err := json.Unmarshal(out, &m); err != nil || m.Signature != Signature(out, "secret") {
			t.Errorf("%s: signature %s, want %s, %v", out, m.Signature, Signature(out, "secret"), err)
		}
		n := Notification{Publisher: name, EventType: resource}
		var envelope map[string]string
		var inner struct{ Payload json.RawMessage }
		if err := json.Unmarshal(n.Append(nil, out), &envelope); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(envelope["oslo.message"]), &inner); err != nil || string(inner.Payload) != string(out) {
			t.Errorf("payload %s, want %s, %v", inner.Payload, out, err)
		}
	})
}

// BenchmarkSample writes and signs a sample with Nova's metadata.
func BenchmarkSample(b *testing.B) {
	w := NewWriter("secret", "")
	s := sample.Sample{
		Name: "cpu", Kind: sample.Cumulative, Unit: "ns", Volume: sample.Uint(1 << 40), Resource: "5e1f0000-0000-4000-8000-000000000001", Source: "openstack",
		Project: "p", User: "u", Time: 1_800_000_000_000_001, Metadata: []byte(`{"display_name": "` + strings.Repeat("x", 800) + `", "image": null}`),
	}
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		dst = w.Sample(dst[:0], &s)
	}
}
