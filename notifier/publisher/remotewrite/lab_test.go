//go:build lab

package remotewrite

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// TestPrometheusTakesIt writes to Debian's Prometheus and asks it.
func TestPrometheusTakesIt(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(config, []byte("global: {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+address, "--web.enable-remote-write-receiver")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: apt-get install prometheus", err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	ready := func() error {
		resp, err := http.Get("http://" + address + "/-/ready")
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d", resp.StatusCode)
		}
		return nil
	}
	for range 200 {
		if err = ready(); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	u, err := url.Parse("remotewrite://" + address + "/api/v1/write")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	base := time.Now().Add(-time.Minute).Truncate(time.Second)
	b := sample.NewBuilder()
	for i := range 3 {
		at := int64(2 - i) // the newest comes first
		b.Row(sample.Row{Resource: "r/1", User: "u", Offset: at * 1e6})
		b.Add(sample.MeterRef{Name: "disk.device.read-x", Kind: sample.Cumulative}, sample.Walk, sample.Uint(uint64(100*at)))
	}
	b.Row(sample.Row{Resource: "r2", Project: "p"})
	b.Add(sample.MeterRef{Name: "g", Kind: sample.Gauge}, sample.Walk, sample.Float(1.5))
	batch := b.Build()
	batch.Base = base.UnixMicro()
	if err := p.Publish(t.Context(), []publisher.Part{{Batch: batch}, {Batch: &sample.Batch{}}}); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	ask := func(query string) string {
		t.Helper()
		resp, err := http.Get("http://" + address + "/api/v1/query?" + url.Values{"query": {query}, "time": {fmt.Sprint(base.Unix() + 5)}}.Encode())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		var answer struct {
			Data struct{ Result json.RawMessage }
		}
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
			t.Fatal(err)
		}
		return string(answer.Data.Result)
	}
	at := base.Unix()
	want := fmt.Sprintf(`[{"metric":{"__name__":"disk_device_read_x","resource_id":"r/1","user_id":"u"},"values":[[%d,"0"],[%d,"100"],[%d,"200"]]}]`, at, at+1, at+2)
	if diff := cmp.Diff(want, ask(`disk_device_read_x[10s]`)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	want = fmt.Sprintf(`[{"metric":{"__name__":"g","project_id":"p","resource_id":"r2"},"values":[[%d,"1.5"]]}]`, at)
	if diff := cmp.Diff(want, ask(`g[10s]`)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
