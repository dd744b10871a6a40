//go:build lab

package gnocchi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// start runs Debian's gnocchi-api on a PostgreSQL of its own and returns its
// address. It needs root, since PostgreSQL does not run as root.
func start(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kvmeter-gnocchi-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	postgres, err := user.Lookup("postgres")
	if err != nil {
		t.Fatalf("%v: apt-get install postgresql", err)
	}
	uid, _ := strconv.Atoi(postgres.Uid)
	gid, _ := strconv.Atoi(postgres.Gid)
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	programs, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(programs) == 0 {
		t.Fatal("no initdb: apt-get install postgresql")
	}
	asPostgres := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(filepath.Dir(programs[0]), name), args...)
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		return cmd
	}
	run := func(cmd *exec.Cmd) {
		t.Helper()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
	}
	run(asPostgres("initdb", "-D", dir+"/pg", "-A", "trust", "-E", "UTF8", "-N"))
	background(t, asPostgres("postgres", "-D", dir+"/pg", "-k", dir, "-h", "", "-F"))
	for try := 0; asPostgres("createdb", "-h", dir, "gnocchi").Run() != nil; try++ {
		if try == 100 {
			t.Fatal("PostgreSQL does not answer")
		}
		time.Sleep(100 * time.Millisecond)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	config := dir + "/gnocchi.conf"
	text := "[DEFAULT]\nlog_file = " + dir + "/log\n[api]\nauth_mode = basic\n[indexer]\nurl = postgresql://postgres@/gnocchi?host=" + dir +
		"\n[storage]\ndriver = file\nfile_basepath = " + dir + "/data\n[incoming]\ndriver = file\n"
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	run(exec.Command("gnocchi-upgrade", "--config-file", config))
	background(t, exec.Command("uwsgi", "--plugin", "python3", "--http-socket", address, "--wsgi-file", "/usr/bin/gnocchi-api",
		"--pyargv", "--config-file "+config, "--lazy-apps", "--enable-threads", "--threads", "2", "--die-on-term"))
	for try := 0; ; try++ {
		if resp, err := http.Get("http://" + address + "/"); err == nil {
			_ = resp.Body.Close()
			return address
		}
		if try == 300 {
			t.Fatal("gnocchi-api does not answer")
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// background runs a program until the test ends.
func background(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT) // PostgreSQL: fast shutdown
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
		if t.Failed() {
			t.Logf("%s: %s", cmd.Path, out.String())
		}
	})
}

// TestGnocchiTakesIt publishes to the real one and asks it.
func TestGnocchiTakesIt(t *testing.T) {
	address := start(t)
	ask := func(method, path, body string, answer any) {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+address+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Close = true // uwsgi keeps no connection
		req.SetBasicAuth("admin", "")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode >= 300 {
			t.Fatalf("%s %s: %s, %s, %v", method, path, resp.Status, text, err)
		}
		if answer != nil {
			if err := json.Unmarshal(text, answer); err != nil {
				t.Fatal(err)
			}
		}
	}
	// An older release made this one.
	ask(http.MethodPost, "/v1/resource_type", `{"name": "instance", "attributes": {"host": {"type": "string", "required": false}}}`, nil)
	u, err := url.Parse("gnocchi://admin@" + address + "?resources_definition_file=testdata/gnocchi_resources.yaml&timeout=30")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	const vm = "5e1f0000-0000-4000-8000-000000000001"
	publish := func(minute int, name string) {
		t.Helper()
		b := sample.NewBuilder()
		b.Row(sample.Row{Resource: vm, Project: "p1", User: "u1", Metadata: []byte(`{"display_name": "` + name + `", "host": "h", "instance_host": null}`)})
		b.Add(sample.MeterRef{Name: "cpu", Kind: sample.Cumulative, Unit: "ns"}, sample.Walk, sample.Uint(uint64(1000*minute)))
		b.Add(sample.MeterRef{Name: "memory", Kind: sample.Gauge, Unit: "MB"}, sample.Walk, sample.Float(512.5))
		b.Add(sample.MeterRef{Name: "nobody.knows", Kind: sample.Gauge}, sample.Walk, sample.Uint(1))
		b.Row(sample.Row{Resource: vm + "-vda/x", Project: "p1", Metadata: []byte(`{"disk_name": "vda", "instance_id": "` + vm + `"}`)})
		b.Add(sample.MeterRef{Name: "disk.device.read.bytes", Kind: sample.Cumulative, Unit: "B"}, sample.Walk, sample.Uint(7))
		b.Row(sample.Row{Resource: "left-out", Project: "service"})
		b.Add(sample.MeterRef{Name: "memory", Kind: sample.Gauge, Unit: "MB"}, sample.Walk, sample.Uint(1))
		batch := b.Build()
		batch.Base = time.Date(2026, 1, 1, 0, minute, 0, 0, time.UTC).UnixMicro()
		if err := p.Publish(t.Context(), []publisher.Part{{Batch: batch}, {Batch: &sample.Batch{}}}); err != nil {
			t.Fatal(err)
		}
	}
	publish(1, "first name")
	publish(11, "second name")
	type found struct {
		Original string            `json:"original_resource_id"`
		Name     string            `json:"display_name"`
		Host     string            `json:"host"`
		Project  string            `json:"project_id"`
		User     string            `json:"user_id"`
		Ended    string            `json:"ended_at"`
		Metrics  map[string]string `json:"metrics"`
	}
	var instances []found
	ask(http.MethodGet, "/v1/resource/instance", "", &instances)
	if len(instances) != 1 {
		t.Fatalf("instances %+v", instances)
	}
	metrics := instances[0].Metrics
	instances[0].Metrics = nil
	if diff := cmp.Diff(found{Original: vm, Name: "second name", Host: "h", Project: "p1", User: "u1"}, instances[0]); diff != "" {
		t.Errorf("instance (-want +got):\n%s", diff)
	}
	if len(metrics) != 2 {
		t.Errorf("metrics %v", metrics)
	}
	var measures [][]any
	ask(http.MethodGet, "/v1/metric/"+metrics["cpu"]+"/measures?refresh=true&aggregation=mean", "", &measures)
	if got, want := fmt.Sprint(measures), "[[2026-01-01T00:00:00+00:00 300 1000] [2026-01-01T00:10:00+00:00 300 11000]]"; got != want {
		t.Errorf("measures %s, want %s", got, want)
	}
	var m struct {
		Unit   string                `json:"unit"`
		Policy struct{ Name string } `json:"archive_policy"`
	}
	ask(http.MethodGet, "/v1/metric/"+metrics["cpu"], "", &m)
	if m.Unit != "ns" || m.Policy.Name != "ceilometer-low-rate" {
		t.Errorf("cpu %+v", m)
	}
	text := func(name, value string) sample.Trait {
		return sample.Trait{Name: name, Type: sample.TextTrait, Text: value}
	}
	err = p.(publisher.EventPublisher).PublishEvents(t.Context(), []sample.Event{
		{ID: "1", Type: "image.create", Traits: []sample.Trait{text("resource_id", vm), text("project_id", "p2")}},
		{ID: "2", Type: "image.create", Traits: []sample.Trait{text("resource_id", vm), text("project_id", "p2")}},
		{ID: "3", Type: "compute.instance.update", Traits: []sample.Trait{text("instance_id", vm), text("name", "third name")}},
		{ID: "4", Type: "compute.instance.delete.start", Generated: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro(), Traits: []sample.Trait{text("instance_id", vm)}},
		{ID: "5", Type: "compute.instance.delete.start", Traits: []sample.Trait{text("instance_id", "5e1f0000-0000-4000-8000-00000000ffff")}},
		{ID: "6", Type: "compute.instance.delete.start"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var disks, all []found
	ask(http.MethodGet, "/v1/resource/instance", "", &instances)
	ask(http.MethodGet, "/v1/resource/instance_disk", "", &disks)
	ask(http.MethodGet, "/v1/resource/generic", "", &all)
	const ended = "2030-01-01T00:00:00+00:00"
	if instances[0].Name != "third name" || instances[0].Ended != ended || len(disks) != 1 || disks[0].Ended != ended || disks[0].Original != vm+"-vda_x" {
		t.Errorf("instance %+v, disks %+v", instances[0], disks)
	}
	if len(all) != 3-1 { // the image has the id of the instance, so it cannot be made
		t.Errorf("%d resources: %+v", len(all), all)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}

	// What kvmeter brings makes all types, and adds attributes to those that are there.
	if u, err = url.Parse("gnocchi://admin@" + address + "?timeout=30&filter_project="); err != nil {
		t.Fatal(err)
	}
	resources, findings, err := Load("shipped.yaml", shipped)
	if err != nil || len(findings) > 0 {
		t.Fatalf("%v, %v", err, findings)
	}
	brought := &gnocchi{log: zap.NewNop(), resources: resources, written: map[string]wrote{}, unknown: map[string]bool{}}
	if brought.web, err = publisher.NewWeb(u, "http", publisher.NewOptions(u)); err != nil {
		t.Fatal(err)
	}
	b := sample.NewBuilder()
	b.Row(sample.Row{Resource: "5e1f0000-0000-4000-8000-00000000000a", Project: "p1", Metadata: []byte(`{"display_name": "data", "volume_type_id": "t1"}`)})
	b.Add(sample.MeterRef{Name: "volume.size", Kind: sample.Gauge, Unit: "GiB"}, sample.Walk, sample.Uint(20))
	if err := brought.Publish(t.Context(), []publisher.Part{{Batch: b.Build()}}); err != nil {
		t.Fatal(err)
	}
	var types []struct {
		Name       string         `json:"name"`
		Attributes map[string]any `json:"attributes"`
	}
	ask(http.MethodGet, "/v1/resource_type", "", &types)
	made := map[string][]string{}
	for _, rt := range types {
		made[rt.Name] = slices.Sorted(maps.Keys(rt.Attributes))
	}
	for _, rt := range resources.types {
		if diff := cmp.Diff(slices.Sorted(maps.Keys(schemas[rt.name])), made[rt.name]); diff != "" {
			t.Errorf("resource type %s (-want +got):\n%s", rt.name, diff)
		}
	}
	var volumes []map[string]any
	ask(http.MethodGet, "/v1/resource/volume", "", &volumes)
	if len(volumes) != 1 || volumes[0]["display_name"] != "data" || volumes[0]["volume_type_id"] != "t1" {
		t.Errorf("volumes %v", volumes)
	}
	ask(http.MethodGet, "/v1/archive_policy/ceilometer-high-rate", "", nil)
	if err := brought.Close(); err != nil {
		t.Error(err)
	}
}

// TestTheMetricsAreCeilometers compares with the file that Debian's Ceilometer has:
// each of its metrics belongs to the same resource type, with the same policy.
func TestTheMetricsAreCeilometers(t *testing.T) {
	const file = "/etc/ceilometer/gnocchi_resources.yaml"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v: apt-get install ceilometer-common", err)
	}
	theirs, _, err := Load(file, data)
	if err != nil {
		t.Fatal(err)
	}
	ours, _, err := Load("shipped.yaml", shipped)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range theirs.metrics {
		got := ours.metrics[name]
		if got == nil || got.name != want.name || ours.policyOf(got, name, "") != theirs.policyOf(want, name, "") {
			t.Errorf("metric %s is not one of resource type %s with policy %s", name, want.name, theirs.policyOf(want, name, ""))
		}
	}
}
