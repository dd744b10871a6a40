package prometheus

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// someSamples has samples of all kinds of two resources, one of which twice.
func someSamples() []publisher.Part {
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "r/1", User: "u1", Project: "p\"1\n"})
	b.Add(sample.MeterRef{Name: "cpu", Kind: sample.Cumulative}, sample.Walk, sample.Uint(100))
	b.Row(sample.Row{Resource: "r 2", Project: "p1"})
	b.Add(sample.MeterRef{Name: "disk.device.read-x", Kind: sample.Gauge}, sample.Walk, sample.Float(1.5))
	b.Add(sample.MeterRef{Name: "net.delta", Kind: sample.Delta}, sample.Walk, sample.Uint(2))
	b.Row(sample.Row{Resource: "r/1", User: "u1", Project: "p\"1\n", Offset: 1})
	b.Add(sample.MeterRef{Name: "cpu", Kind: sample.Cumulative}, sample.Walk, sample.Uint(1<<64-1))
	return []publisher.Part{{Batch: b.Build()}}
}

func open(t *testing.T, address, path string) publisher.Publisher {
	t.Helper()
	u, err := url.Parse("prometheus://" + address + path)
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func TestPushes(t *testing.T) {
	const r1 = "# TYPE cpu counter\ncpu{resource_id=\"r/1\", user_id=\"u1\", project_id=\"p\\\"1\\n\"} 18446744073709551615\n"
	const r2 = "# TYPE disk_device_read_x gauge\ndisk_device_read_x{resource_id=\"r 2\", user_id=\"None\", project_id=\"p1\"} 1.5\n" +
		"net_delta{resource_id=\"r 2\", user_id=\"None\", project_id=\"p1\"} 2\n"
	for path, want := range map[string][]string{
		"/metrics/job/kvm":            {"POST /metrics/job/kvm/resource_id@base64/ci8x " + r1, "POST /metrics/job/kvm/resource_id/r%202 " + r2},
		"/metrics/job/kvm/zone/a?x=1": {"POST /metrics/job/kvm/zone/a?x=1 " + r1 + r2},
	} {
		var got []string
		s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			got = append(got, r.Method+" "+r.RequestURI+" "+string(body))
		}))
		if err := open(t, s.Listener.Addr().String(), path).Publish(t.Context(), someSamples()); err != nil {
			t.Error(err)
		}
		s.Close()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}
}
