//go:build lab

package ceilometer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.yaml.in/yaml/v3"
)

// build builds kvmeter's programs and returns their folder.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", dir+"/", "github.com/kvmeter/kvmeter/cmd/kvmeter", "github.com/kvmeter/kvmeter/cmd/kvmeter-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return dir
}

// program starts a program with a configuration; the function it returns ends it,
// and the test's end does.
func program(t *testing.T, config string, name string, args ...string) (end func()) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	must(t, os.WriteFile(file, []byte(config), 0o600))
	var log bytes.Buffer
	cmd := exec.Command(name, append(args, "--config", file)...)
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	ended := false
	end = func() {
		if ended {
			return
		}
		ended = true
		if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
			t.Errorf("%s: %v", filepath.Base(name), err)
		}
		if t.Failed() {
			t.Logf("%s %v:\n%s", filepath.Base(name), args, log.Bytes())
		}
	}
	t.Cleanup(end)
	return end
}

// eventually waits until try has no error.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within 90 s: %v", err)
		}
	}
}

// startControl starts a notifier that takes what polling agents send, and a central,
// and returns the URL of its API once all that is sent is taken.
func startControl(t *testing.T, programs, broker string) (api string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	listen, dir := l.Addr().String(), t.TempDir()
	must(t, l.Close())
	must(t, os.WriteFile(filepath.Join(dir, "secret"), []byte(Secret), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "n.key"), []byte("the key of the notifier n"), 0o600))
	kvmeter := filepath.Join(programs, "kvmeter")
	program(t, fmt.Sprintf("keys: %[1]s\namqp: {url: '%[2]s'}\nrelays: [n]\nstore: {path: '%[1]s/store', min_free: 0}\napi: {listen: '%[3]s'}\n", dir, broker, listen), kvmeter, "central")
	program(t, fmt.Sprintf("name: n\nkeys: %[1]s\namqp: {url: '%[2]s'}\nstate: '%[1]s/state'\ntelemetry_secret_file: '%[1]s/secret'\nnotifications: {enabled: true}\n", dir, broker), kvmeter, "notifier")
	conn, err := amqp.Dial(broker)
	must(t, err)
	defer func() { must(t, conn.Close()) }()
	eventually(t, func() error {
		ch, err := conn.Channel() // a queue that is missing closes it
		if err != nil {
			return err
		}
		q, err := ch.QueueDeclarePassive("kvmeter.notifications.sample", true, false, false, false, nil)
		if err == nil && q.Consumers == 0 {
			err = errors.New("nobody reads kvmeter.notifications.sample")
		}
		return err
	})
	return "http://" + listen
}

// rest returns the samples that were sent since the tap was read last.
func rest(t *testing.T, ctx context.Context, tap *Tap) (all []Sample) {
	t.Helper()
	for {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		some, err := tap.Next(short)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return all
		}
		must(t, err)
		all = append(all, some...)
	}
}

// compareStore waits until the API has all samples, and compares each field.
func compareStore(t *testing.T, api string, sent []Sample) {
	t.Helper()
	type stored struct {
		Sample
		Recorded string `json:"recorded_at"`
	}
	byMeter := map[string][]Sample{}
	for _, s := range sent {
		byMeter[s.Name] = append(byMeter[s.Name], s)
	}
	for meter, want := range byMeter {
		have := map[string]stored{}
		eventually(t, func() error {
			resp, err := http.Get(api + "/v2/meters/" + url.PathEscape(meter) + "?metadata=raw&limit=100000")
			if err != nil {
				return err
			}
			defer func() { _ = resp.Body.Close() }()
			var all []stored
			if err := json.NewDecoder(resp.Body).Decode(&all); err != nil {
				return err
			}
			if len(all) != len(want) {
				return fmt.Errorf("%s: %d samples are stored, want %d", meter, len(all), len(want))
			}
			for _, s := range all {
				have[s.ID] = s
			}
			return nil
		})
		for _, w := range want {
			h := have[w.ID].Sample
			var a, b any
			must(t, json.Unmarshal(w.Metadata, &a))
			if err := json.Unmarshal(h.Metadata, &b); err != nil || !reflect.DeepEqual(a, b) {
				t.Errorf("%s of %s: metadata %s, want %s (%v)", w.Name, w.Resource, h.Metadata, w.Metadata, err)
			}
			if x, y := volume(t, h), volume(t, w); x != y {
				t.Errorf("%s of %s: volume %s, want %s", w.Name, w.Resource, h.Volume, w.Volume)
			}
			h.Metadata, h.Volume, h.Timestamp = w.Metadata, w.Volume, strings.TrimSuffix(h.Timestamp, "+00:00")
			if !reflect.DeepEqual(h, w) {
				t.Errorf("stored %+v\nsent   %+v", h, w)
			}
		}
	}
	t.Logf("%d samples of %d meters are stored as they were sent", len(sent), len(byMeter))
}

// line is a sample as the publisher file:// writes it.
type line struct {
	name, resource string
	volume         float64
	metadata       []byte
	others         map[string]any
}

// lines waits until all samples are in the file, and returns the last of each series.
func lines(t *testing.T, file string, sent []Sample) map[string]line {
	t.Helper()
	want := map[string]bool{}
	for _, s := range sent {
		want[s.ID] = true
	}
	var last map[string]line
	eventually(t, func() error {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		last = map[string]line{}
		seen := 0
		for text := range bytes.Lines(data[:bytes.LastIndexByte(data, '\n')+1]) {
			var all map[string]any
			must(t, json.Unmarshal(text, &all))
			if id, _ := all["id"].(string); !want[id] {
				continue
			}
			seen++
			l := line{name: all["name"].(string), resource: all["resource_id"].(string), volume: all["volume"].(float64), others: all}
			l.metadata, err = json.Marshal(all["resource_metadata"])
			must(t, err)
			for _, key := range []string{"id", "timestamp", "volume"} {
				delete(all, key)
			}
			last[l.name+" "+l.resource] = l
		}
		if seen != len(want) {
			return fmt.Errorf("%d samples are written, want %d", seen, len(want))
		}
		return nil
	})
	return last
}

// runAgent runs kvmeter's agent by the ceilometer.conf and polling.yaml in dir until
// each series has come that Ceilometer's agent has sent, and returns all that came.
func runAgent(t *testing.T, ctx context.Context, programs, dir string, flavors map[string]string, tap *Tap, theirs []Sample) (all []Sample) {
	t.Helper()
	config, err := yaml.Marshal(map[string]any{
		"ceilometer_conf": filepath.Join(dir, "ceilometer.conf"), "wire": "ceilometer", "legacy_units": true, "legacy_meters": true, "flavor_ids": flavors,
		"profile": "lean", "socket": "", "counters": "", "pins": "", "spool": map[string]any{"path": ""}, "ipmi": map[string]any{"device": ""},
	})
	must(t, err)
	end := program(t, string(config), filepath.Join(programs, "kvmeter-agent"))
	missing := map[string]bool{}
	for _, s := range theirs {
		missing[s.Name+" "+s.Resource] = true
	}
	for len(missing) > 0 {
		some, err := tap.Next(ctx)
		if err != nil {
			t.Fatalf("kvmeter's agent does not send %v: %v", missing, err)
		}
		for _, s := range some {
			delete(missing, s.Name+" "+s.Resource)
		}
		all = append(all, some...)
	}
	end()
	return append(all, rest(t, ctx, tap)...)
}

// compareWritten compares what was written of each series of Ceilometer's agent.
func compareWritten(t *testing.T, theirs, ours map[string]line) {
	t.Helper()
	for series, want := range theirs {
		got := ours[series]
		tolerated := tolerance(want.name, want.metadata)
		if want.name == "memory.resident" { // QEMU takes more when it is asked
			tolerated = 1
		}
		if off := got.volume - want.volume; off > tolerated || -off > tolerated {
			t.Errorf("%s: volume %v, want %v", series, got.volume, want.volume)
		}
		if !reflect.DeepEqual(got.others, want.others) {
			t.Errorf("%s:\n%v, want\n%v", series, got.others, want.others)
		}
	}
	t.Logf("%d series of Ceilometer's agent, %d of kvmeter's", len(theirs), len(ours))
}

// verify has Ceilometer's own code verify the signatures of messages.
func verify(t *testing.T, bodies []byte, samples int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", "../../agent/ceilometer/testdata/verify.py", Secret)
	cmd.Stdin = bytes.NewReader(bodies)
	out, err := cmd.Output()
	var verified struct{ Good, Bad int }
	if err = errors.Join(err, json.Unmarshal(out, &verified)); err != nil || verified.Good != samples || verified.Bad != 0 {
		t.Errorf("%d signatures hold and %d do not, want %d and 0 (%v)", verified.Good, verified.Bad, samples, err)
	}
}
