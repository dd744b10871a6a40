package main

import (
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// part is one part of collectd's protocol.
func part(kind uint16, body []byte) []byte {
	return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, kind), uint16(4+len(body))), body...)
}

func TestCollectd(t *testing.T) {
	came := time.Unix(1_700_000_002, 0)
	values := binary.BigEndian.AppendUint16(nil, 2)
	values = append(values, 2, 1) // a derivative, a gauge
	values = binary.BigEndian.AppendUint64(values, 4096)
	values = binary.LittleEndian.AppendUint64(values, math.Float64bits(0.5))
	packet := slices.Concat(
		part(0, []byte("host\x00")), part(8, binary.BigEndian.AppendUint64(nil, 1_700_000_000<<30|1<<29)),
		part(2, []byte("virt\x00")), part(3, []byte("\x00")), part(4, []byte("disk_octets\x00")), part(5, []byte("vda\x00")),
		part(6, values),
	)
	tally := newTally(10 * time.Second)
	if err := readCollectd(packet, came, tally); err != nil {
		t.Fatal(err)
	}
	if a, b := tally.totals["host virt disk_octets vda 0"], tally.totals["host virt disk_octets vda 1"]; a != 4096 || b != 0.5 {
		t.Errorf("got %v", tally.totals)
	}
	d, err := tally.reset()
	if err != nil || d.samples != 2 || d.delay[0] != 1.5 {
		t.Errorf("got %+v, %v", d, err)
	}
	for cut := range packet {
		_ = readCollectd(packet[:cut], came, tally) // must not panic
	}
}

func TestTallyKnowsWhatIsLate(t *testing.T) {
	tally := newTally(10 * time.Second)
	start := time.Unix(1_700_000_000, 0)
	for _, at := range []int{0, 10, 24, 40} {
		tally.sample("a", 1, start.Add(time.Duration(at)*time.Second), start.Add(time.Duration(at+1)*time.Second))
	}
	d, err := tally.reset()
	if err != nil || d.late != 1 || d.samples != 4 {
		t.Errorf("got %d of %d late, want 1 of 4; %v", d.late, d.samples, err)
	}
	if want := []float64{11, 15, 17}; !slices.Equal(d.age, want) {
		t.Errorf("got ages %v, want %v", d.age, want)
	}
}

func TestQuantile(t *testing.T) {
	for q, want := range map[float64]float64{0: 1, 0.5: 2.5, 1: 4} {
		if got := quantile([]float64{4, 2, 1, 3}, q); got != want {
			t.Errorf("quantile %v: got %v, want %v", q, got, want)
		}
	}
}

func TestFigure(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.123: "0.12", 4.56: "4.6", 1234: "1234", 26400: "26,400", -12: "−12", 1234567: "1,234,567"} {
		if got := figure(v); got != want {
			t.Errorf("%v: got %s, want %s", v, got, want)
		}
	}
}

func TestInterval95(t *testing.T) {
	mid, low, high := interval95([]float64{math.Log(1.1), math.Log(1.2), math.Log(1.3), math.Log(1.2)})
	if mid < 1.19 || mid > 1.21 || low < 1.1 || low > mid || high < mid || high > 1.3 {
		t.Errorf("got %.3f, from %.3f to %.3f", mid, low, high)
	}
}

func TestReport(t *testing.T) {
	out := t.TempDir()
	dir := filepath.Join(out, "comparison")
	var records []record
	note := func(who, what string, values ...float64) {
		for i, v := range values {
			records = append(records, record{who, 10 * time.Second, 1, i + 1, what, v})
		}
	}
	note(nobodyRuns, "tool_us", 0, 0)
	note(nobodyRuns, "libvirtd_us", 100, 100)
	note("kvmeter lean", "tool_us", 150, 250)
	note("kvmeter lean", "libvirtd_us", 100, 100)
	note("kvmeter lean", "samples", 300, 300)
	note("Ceilometer", "tool_us", 60_000, 60_000)
	note("Ceilometer", "libvirtd_us", 80_100, 80_100)
	note("Ceilometer", "qemu_us", 50_000, 50_000)
	note("libvirt exporter", "failed", 1)
	for _, who := range []string{nobodyRuns, "kvmeter lean", "Ceilometer"} {
		for _, what := range []string{"qemu_us", "broker_us", "hooks_us", "kernel_us"} {
			if len(series(records, who, 10*time.Second, what)) == 0 {
				note(who, what, 0, 0)
			}
		}
	}
	if err := errors.Join(os.Mkdir(dir, 0o755), save(dir, "agents", records), saveFacts(dir, "agents", facts{KVM: 10, Linux: 10})); err != nil {
		t.Fatal(err)
	}
	if err := report(out); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(out, "comparison.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| kvmeter lean | 10 | 0 | 0 | 0 | 0 | **10** (8.8 to 11) | 0 |",
		"| Ceilometer | 3000 | 4000 | 5000 | 0 | 0 | **12,000** (12,000 to 12,000) | 0 |",
		"Ceilometer takes 1200 times what kvmeter lean does.",
		"| libvirt exporter | did not run in 1 of its turns |",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if svg, err := os.ReadFile(filepath.Join(dir, "agents-10s.svg")); err != nil || !strings.Contains(string(svg), "kvmeter lean") {
		t.Errorf("the plot: %d bytes, %v", len(svg), err)
	}
}
