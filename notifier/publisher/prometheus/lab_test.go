//go:build lab

package prometheus

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// TestTheGatewayTakesIt pushes to Debian's push gateway and reads its page.
func TestTheGatewayTakesIt(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("prometheus-pushgateway", "--web.listen-address="+address)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: apt-get install prometheus-pushgateway", err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	page := func() (map[string]*dto.MetricFamily, error) {
		resp, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return nil, err
		}
		defer func() { _ = resp.Body.Close() }()
		parser := expfmt.NewTextParser(model.LegacyValidation)
		return parser.TextToMetricFamilies(resp.Body)
	}
	for range 100 {
		if _, err = page(); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, path := range []string{"/metrics/job/kvm", "/metrics/job/grouped/zone/a"} {
		if err := open(t, address, path).Publish(t.Context(), someSamples()); err != nil {
			t.Errorf("%s: %v\n%s", path, err, out.String())
		}
	}
	families, err := page()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, name := range []string{"cpu", "disk_device_read_x", "net_delta"} {
		for _, m := range families[name].GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			value := m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetUntyped().GetValue()
			got[fmt.Sprintf("%s of %q in %s, %s", name, labels["resource_id"], labels["job"], families[name].GetType())] = value
		}
	}
	want := map[string]float64{
		`cpu of "r/1" in kvm, COUNTER`:                  18446744073709551615,
		`cpu of "r/1" in grouped, COUNTER`:              18446744073709551615,
		`disk_device_read_x of "r 2" in kvm, GAUGE`:     1.5,
		`disk_device_read_x of "r 2" in grouped, GAUGE`: 1.5,
		`net_delta of "r 2" in kvm, UNTYPED`:            2,
		`net_delta of "r 2" in grouped, UNTYPED`:        2,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
