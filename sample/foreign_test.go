package sample

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseForeign(t *testing.T) {
	full := Sample{
		ID: ParseID("11111111-1111-1111-1111-111111111111"), Name: "cpu", Kind: Cumulative, Unit: "ns", Volume: Uint(1234567),
		Resource: "r", Source: "openstack", Project: "p", User: "u", Time: 1_767_225_600_000_001, Metadata: []byte(`{"a": 1}`),
		Foreign: &Foreign{UserName: "un", ProjectName: "pn", Monotonic: 12.5, HasMonotonic: true},
	}
	for name, tc := range map[string]struct {
		in   string
		want Sample
	}{
		"the form of the bus": {`{"source": "openstack", "counter_name": "cpu", "counter_type": "cumulative", "counter_unit": "ns",
			"counter_volume": 1234567, "user_id": "u", "user_name": "un", "project_id": "p", "project_name": "pn", "resource_id": "r",
			"timestamp": "2026-01-01T00:00:00.000001", "resource_metadata": {"a": 1}, "message_id": "11111111-1111-1111-1111-111111111111",
			"monotonic_time": 12.5, "message_signature": "aa"}`, full},
		"the form of files": {`{"name": "cpu", "type": "cumulative", "unit": "ns", "volume": 1234567, "user_id": "u", "user_name": "un",
			"project_id": "p", "project_name": "pn", "resource_id": "r", "timestamp": "2026-01-01T00:00:00.000001",
			"resource_metadata": {"a": 1}, "source": "openstack", "id": "11111111-1111-1111-1111-111111111111", "monotonic_time": 12.5}`, full},
		"a time with a zone is kept as it was written": {
			`{"name": "m", "volume": -1, "timestamp": "2026-01-01T01:00:00+01:00", "user_id": null}`,
			Sample{Name: "m", Volume: Int(-1), Source: "openstack", Time: 1_767_225_600_000_000, Foreign: &Foreign{Timestamp: "2026-01-01T01:00:00+01:00"}},
		},
		"text that is a number is one": {
			`{"name": "m", "volume": " 1.5", "timestamp": "2026-01-01T00:00:00"}`,
			Sample{Name: "m", Volume: Float(1.5), Source: "openstack", Time: 1_767_225_600_000_000},
		},
		"2^64-1 is exact": {
			`{"name": "m", "volume": 18446744073709551615, "timestamp": "2026-01-01 00:00:00"}`,
			Sample{Name: "m", Volume: Uint(1<<64 - 1), Source: "openstack", Time: 1_767_225_600_000_000, Foreign: &Foreign{Timestamp: "2026-01-01 00:00:00"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseForeign([]byte(tc.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	for in, want := range map[string]string{
		`{`:             "unexpected end",
		`{"volume": 1}`: "without a name",
		`{"name": "m", "resource_id": "r", "volume": null, "timestamp": "2026-01-01T00:00:00"}`:  `sample "m" of "r": the volume is no number`,
		`{"name": "m", "volume": "nan", "timestamp": "2026-01-01T00:00:00"}`:                     "the volume is no number",
		`{"name": "m", "volume": [], "timestamp": "2026-01-01T00:00:00"}`:                        "the volume is no number",
		`{"name": "m", "volume": 1, "timestamp": "yesterday"}`:                                   `timestamp "yesterday" is no time`,
		`{"name": "m", "volume": 1, "timestamp": "2026-01-01T00:00:00", "resource_metadata": 1}`: "resource_metadata is no object",
	} {
		if s, err := ParseForeign([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %+v, %v, want an error with %q", in, s, err, want)
		}
	}
}

func FuzzParseForeign(f *testing.F) {
	f.Add([]byte(`{"name": "m", "volume": 1, "timestamp": "2026-01-01T00:00:00+01:00", "monotonic_time": 1e9}`))
	f.Add([]byte(`{"counter_name": "m", "counter_volume": "1e400", "timestamp": "2026-01-01 00:00:00.5"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ParseForeign(data)
		if err == nil && (s.Name == "" || s.Volume.Check() != nil) {
			t.Errorf("got %+v", s)
		}
	})
}
