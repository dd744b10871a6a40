package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestANormalBuildHasNoTestHooks(t *testing.T) {
	for _, c := range command().Commands() {
		if c.Flags().Lookup("test-hooks") != nil {
			t.Errorf("%s has the flag", c.Name())
		}
	}
}

// hooked is a build with the tag testhooks that runs.
type hooked struct {
	t          *testing.T
	api, hooks string // addresses
}

func startHooked(t *testing.T) *hooked {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "kvmeter")
	if out, err := exec.Command("go", "build", "-tags", "testhooks", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command(program, "central", "--config", filepath.Join(dir, "none.yaml"), "--test-hooks", "127.0.0.1:0").CombinedOutput(); err == nil || !strings.Contains(string(out), "none.yaml") {
		t.Errorf("with a file that is not there: %v, %s", err, out)
	}
	cmd := exec.Command(program, "central", "--config", os.DevNull, "--test-hooks", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), "KVMETER_API__LISTEN=127.0.0.1:0", "TMPDIR="+dir)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("it ended with %v: %s", err, &errs)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "kvmeter-*")); len(left) > 0 {
			t.Errorf("it left %q", left)
		}
	})
	h := &hooked{t: t}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if addr, ok := strings.CutPrefix(lines.Text(), "API "); ok {
			h.api = addr
		}
		if addr, ok := strings.CutPrefix(lines.Text(), "test hooks "); ok {
			h.hooks = addr
			return h
		}
	}
	t.Fatalf("it never said where it listens: %s", &errs)
	return nil
}

// ask sends a request and returns the status and the body.
func (h *hooked) ask(method, url, body string, headers ...string) (int, string) {
	h.t.Helper()
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// hook calls a hook that must succeed.
func (h *hooked) hook(method, name, body string) string {
	h.t.Helper()
	status, text := h.ask(method, h.hooks+name, body)
	if status/100 != 2 {
		h.t.Fatalf("%s %s: %d %s", method, name, status, text)
	}
	return text
}

// list asks for a list of objects and returns one field of each.
func (h *hooked) list(path, field string, headers ...string) string {
	h.t.Helper()
	status, text := h.ask(http.MethodGet, h.api+path, "", headers...)
	var all []map[string]any
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		h.t.Fatalf("%s: %d %s", path, status, text)
	}
	var values []string
	for _, object := range all {
		value, _ := object[field].(string)
		values = append(values, value)
	}
	return strings.Join(values, " ")
}

func TestTestHooks(t *testing.T) {
	h := startHooked(t)
	const three = `[
		{"counter_name": "a", "counter_type": "gauge", "counter_unit": "", "counter_volume": 1, "resource_id": "r", "timestamp": "2012-07-02T10:40:00",
		 "message_id": "first", "source": "test", "user_id": null, "project_id": "p", "resource_metadata": {"size": 456, "n": {"t": [true, null]}}, "message_signature": "x"},
		{"counter_name": "b", "counter_type": "delta", "counter_unit": "u", "counter_volume": 2.5, "resource_id": "r", "timestamp": "2012-07-02T10:40:00", "message_id": "second"},
		{"counter_name": "a", "counter_type": "gauge", "counter_unit": "", "counter_volume": 3, "resource_id": "r", "timestamp": "2012-07-02T10:40:00", "message_id": "third"}]`
	h.hook(http.MethodPost, "samples", three)
	if got, want := h.list("/v2/samples", "id"), "first second third"; got != want {
		t.Errorf("got samples %s, want %s", got, want)
	}
	if _, got := h.ask(http.MethodGet, h.api+"/v2/samples/first?metadata=raw", ""); !strings.Contains(got, `"metadata": {"size": 456, "n": {"t": [true, null]}}`) {
		t.Errorf("the metadata is not as it was given: %s", got)
	}
	h.hook(http.MethodPost, "events", `[{"message_id": "e", "event_type": "x", "generated": "2013-12-31T05:00:00.5", "raw": {"a": 1}, "traits": [["t", 1, "v"], ["n", 2, 7], ["f", 3, 0.5], ["d", 4, "2013-12-31T05:00:00"]]}]`)
	if got, want := h.list("/v2/events", "generated", "X-Roles", "admin", "X-Project-Id", "p", "X-User-Id", "u"), "2013-12-31T05:00:00.500000"; got != want {
		t.Errorf("got events at %q, want %q", got, want)
	}
	h.hook(http.MethodPost, "config", `{"default_api_return_limit": 2, "cors_allowed_origin": "http://a", "policy": "default: '!'"}`)
	if status, text := h.ask(http.MethodGet, h.api+"/v2/samples", "", "X-Roles", "Member", "X-Project-Id", "p"); status != http.StatusForbidden {
		t.Errorf("with a closed policy: got %d %s", status, text)
	}
	h.hook(http.MethodPost, "config", `{"policy": {"telemetry:create_samples": "role:writer"}}`)
	if got, want := h.list("/v2/samples", "id"), "first second"; got != want {
		t.Errorf("with a limit of 2: got samples %s, want %s", got, want)
	}
	const sent = `[{"counter_name": "c", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1, "resource_id": "r", "resource_metadata": {"x.y": "z"}}]`
	if status, text := h.ask(http.MethodPost, h.api+"/v2/meters/c", sent, "X-Roles", "reader", "X-Project-Id", "p"); status != http.StatusForbidden {
		t.Errorf("sending without the role: got %d %s", status, text)
	}
	if status, text := h.ask(http.MethodPost, h.api+"/v2/meters/c", sent, "X-Roles", "writer", "X-Project-Id", "p"); status != http.StatusCreated {
		t.Errorf("sending with the role: got %d %s", status, text)
	}
	var batches [][]map[string]any
	if err := json.Unmarshal([]byte(h.hook(http.MethodGet, "published", "")), &batches); err != nil || len(batches) != 1 || len(batches[0]) != 1 {
		t.Fatalf("published: got %v, %v, want one sample", batches, err)
	}
	published := batches[0][0]
	for field, want := range map[string]any{"counter_name": "c", "source": "p:openstack", "counter_volume": 1.0, "user_id": nil, "message_signature": nil} {
		if published[field] != want {
			t.Errorf("published %s: got %v, want %v", field, published[field], want)
		}
	}
	if got := published["resource_metadata"].(map[string]any)["x"]; got == nil {
		t.Errorf("published metadata is not nested: %v", published)
	}
	if got := strings.TrimSpace(h.hook(http.MethodGet, "published", "")); got != "[]" {
		t.Errorf("published again: got %s", got)
	}
	h.hook(http.MethodPost, "reset", "")
	if got := h.list("/v2/samples", "id"); got != "" {
		t.Errorf("after a reset: got samples %s", got)
	}
	if status, _ := h.ask(http.MethodPost, h.api+"/v2/meters/c?direct=true", sent, "X-Roles", "reader", "X-Project-Id", "p"); status != http.StatusCreated {
		t.Errorf("after a reset the policy is not the original's: got %d", status)
	}
	if got, want := h.list("/v2/samples", "meter"), "c"; got != want {
		t.Errorf("sent directly: got %q, want %q", got, want)
	}
	for range 50 { // the store looks for what is past its retention when it is opened
		h.hook(http.MethodPost, "reset", "")
		h.hook(http.MethodPost, "events", `[{"message_id": "old", "event_type": "x", "generated": "2013-12-31T05:00:00", "raw": {}, "traits": []}]`)
		if got := h.list("/v2/events", "message_id", "X-Roles", "admin", "X-Project-Id", "p", "X-User-Id", "u"); got != "old" {
			t.Fatalf("an event of 2013: got %q", got)
		}
	}
	for hook, body := range map[string]string{"samples": `[{}]`, "events": `[{}]`, "config": `{"limit": 1}`} {
		if status, text := h.ask(http.MethodPost, h.hooks+hook, body); status != http.StatusBadRequest || text == "" {
			t.Errorf("%s %s: got %d %s", hook, body, status, text)
		}
	}
}
