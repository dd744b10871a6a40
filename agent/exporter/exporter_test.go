package exporter

import (
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/kvmeter/kvmeter/sample"
)

// batch makes a batch of some rows with the meter cpu, and of the first with
// others.
func batch(rows ...sample.Row) *sample.Batch {
	b := sample.NewBuilder()
	for i, r := range rows {
		b.Row(r)
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<64-1-uint64(i)))
		if i == 0 {
			b.Add(sample.MeterRef{Name: "disk.device.read.bytes", Kind: sample.Cumulative, Unit: "B"}, sample.Libvirt, sample.Uint(7))
			b.Add(sample.MeterRef{Name: "memory.usage", Kind: sample.Gauge, Unit: "MiB"}, sample.Libvirt, sample.Float(51.5))
			b.Add(sample.MeterRef{Name: "network.incoming.bytes.delta", Kind: sample.Delta, Unit: "B"}, sample.RTNL, sample.Int(-1))
		}
	}
	return b.Build()
}

// page returns the page, which Prometheus' own parser must take.
func page(t *testing.T, e *Exporter) string {
	t.Helper()
	w := httptest.NewRecorder()
	e.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if got := w.Header().Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		t.Errorf("content type %q", got)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	text := w.Body.String()
	if _, err := parser.TextToMetricFamilies(strings.NewReader(text)); err != nil {
		t.Errorf("%v in\n%s", err, text)
	}
	return text
}

func TestPage(t *testing.T) {
	e := New(nil)
	e.Observe(batch(
		sample.Row{Resource: "5e1f", Project: "p", User: "u", Metadata: []byte(
			`{"display_name": "größe \"x\"\n\\", "name": "instance-1", "host": "hash", "user_metadata": {"server_group": "g"}, "flavor": {"id": "f1", "name": "m1"}}`)},
		sample.Row{Resource: "host", Metadata: []byte(`{"node": "n", "name": 5, "flavor": "m1"}`)},
		sample.Row{Resource: "tap\xff"},
	))
	want := `# HELP ceilometer_cpu HELP
# TYPE ceilometer_cpu counter
ceilometer_cpu{cpu="5e1f",publisher="ceilometer",type="cpu",counter="cpu",project="p",user="u",unit="ns",resource="5e1f",vm_instance="hash",resource_name="größe \"x\"\n\\:instance-1",server_group="g",flavor_id="f1",flavor_name="m1"} 18446744073709551615
ceilometer_cpu{cpu="host",publisher="ceilometer",type="cpu",counter="cpu",unit="ns",resource="host",server_group="none"} 18446744073709551614
ceilometer_cpu{cpu="tap�",publisher="ceilometer",type="cpu",counter="cpu",unit="ns",resource="tap�"} 18446744073709551613
# HELP ceilometer_disk_device_read_bytes HELP
# TYPE ceilometer_disk_device_read_bytes counter
ceilometer_disk_device_read_bytes{disk="read",publisher="ceilometer",type="device",counter="disk.device.read.bytes",LABELS 7
# TYPE ceilometer_memory_usage gauge
ceilometer_memory_usage{memory="5e1f",publisher="ceilometer",type="usage",counter="memory.usage",LABELS 51.5
# TYPE ceilometer_network_incoming_bytes_delta gauge
ceilometer_network_incoming_bytes_delta{network="bytes",publisher="ceilometer",type="incoming",counter="network.incoming.bytes.delta",LABELS -1
`
	var got []string
	for line := range strings.Lines(page(t, e)) {
		if rest, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, _, _ := strings.Cut(rest, " ")
			if name != "ceilometer_cpu" && name != "ceilometer_disk_device_read_bytes" {
				continue // others have no help before the catalogue has them
			}
			line = "# HELP " + name + " HELP\n"
		}
		if before, after, ok := strings.Cut(line, `project="p"`); ok && !strings.HasPrefix(line, "ceilometer_cpu") {
			line = before + "LABELS" + after[strings.LastIndexByte(after, ' '):]
		}
		got = append(got, line)
	}
	if diff := cmp.Diff(want, strings.Join(got, "")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestWhatIsStaleGoes(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	e := New(func() time.Time { return now })
	shown := func() string {
		var all []string
		for _, r := range []string{"once", "often", "slow"} {
			if strings.Contains(page(t, e), fmt.Sprintf("resource=%q", r)) {
				all = append(all, r)
			}
		}
		return strings.Join(all, " ")
	}
	often, slow := batch(sample.Row{Resource: "often"}), batch(sample.Row{Resource: "slow"})
	e.Observe(batch(sample.Row{Resource: "once"}))
	e.Observe(slow)
	now = now.Add(10 * time.Minute)
	e.Observe(slow)
	e.Observe(often)
	now = now.Add(10 * time.Second)
	e.Observe(often)
	for _, step := range []struct {
		after time.Duration
		want  string
	}{{0, "once often slow"}, {59 * time.Second, "once often slow"}, {2 * time.Second, "once slow"}, {4 * time.Minute, "slow"}, {20 * time.Minute, "slow"}, {6 * time.Minute, ""}} {
		now = now.Add(step.after)
		if got := shown(); got != step.want {
			t.Errorf("at %s: %q is shown, want %q", now, got, step.want)
		}
	}
	if len(e.families) != 0 {
		t.Errorf("%d families are kept", len(e.families))
	}
}

func TestLabelsFollowTheMetadata(t *testing.T) {
	e := New(nil)
	for _, name := range []string{"a", "b"} {
		e.Observe(batch(sample.Row{Resource: "r", Metadata: []byte(`{"display_name": "` + name + `"}`)}))
		if got := page(t, e); !strings.Contains(got, `resource_name="`+name+`"`) || strings.Count(got, "ceilometer_cpu{") != 1 {
			t.Errorf("after %s:\n%s", name, got)
		}
	}
}

func FuzzLabels(f *testing.F) {
	f.Add("cpu.x", "r", `{"display_name": "a\n\"\\"}`)
	f.Add("", "\xff", "{")
	f.Fuzz(func(t *testing.T, meter, resource, raw string) {
		e := New(nil)
		b := sample.NewBuilder()
		b.Row(sample.Row{Resource: resource, Metadata: []byte(raw)})
		b.Add(sample.MeterRef{Name: "m" + meter, Kind: sample.Gauge}, sample.Walk, sample.Uint(1))
		e.Observe(b.Build())
		page(t, e)
	})
}

// BenchmarkObserve takes a poll of 500 domains with 40 meters, whose metadata do
// not change.
func BenchmarkObserve(b *testing.B) {
	builder := sample.NewBuilder()
	for i := range 500 {
		builder.Row(sample.Row{Resource: fmt.Sprintf("5e1f0000-0000-4000-8000-%012d", i), Project: "p", Metadata: fmt.Appendf(nil, `{"display_name": "vm%d"}`, i)})
		for m := range 40 {
			builder.Add(sample.MeterRef{Name: fmt.Sprintf("meter.%d", m), Kind: sample.Cumulative, Unit: "ns"}, sample.Walk, sample.Uint(uint64(i)<<40))
		}
	}
	batch := builder.Build()
	e := New(nil)
	e.Observe(batch)
	b.ReportAllocs()
	for b.Loop() {
		e.Observe(batch)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch.Len()), "ns/sample")
}

func BenchmarkAppend(b *testing.B) {
	e := New(nil)
	var rows []sample.Row
	for i := range 5000 {
		rows = append(rows, sample.Row{Resource: fmt.Sprintf("5e1f0000-0000-4000-8000-%012d", i), Project: "p", Metadata: []byte(`{"display_name": "vm"}`)})
	}
	e.Observe(batch(rows...))
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		dst = e.Append(dst[:0])
	}
}
