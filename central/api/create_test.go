package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

// pipelines takes batches that are sent without direct.
type pipelines struct{ batches []*sample.Batch }

func (p *pipelines) publish(_ context.Context, b *sample.Batch) error {
	p.batches = append(p.batches, b)
	return nil
}

// one is a sample as a client sends it, with some attributes changed; nil takes
// one away.
func one(t testing.TB, changes map[string]any) string {
	t.Helper()
	s := map[string]any{"counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1, "resource_id": "r1"}
	for k, v := range changes {
		if s[k] = v; v == nil {
			delete(s, k)
		}
	}
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestSamplesThatAreSent(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 891234000, time.UTC)
	member := map[string]string{"X-Roles": "washer", "X-Project-Id": "p1", "X-User-Id": "u1"}
	for name, tc := range map[string]struct {
		headers map[string]string
		body    string
		answer  string // without the id
		stored  string // as the API shows it, without the id and the time of storing
	}{
		"what is not given is the caller's": {
			member, one(t, nil),
			`"source": "p1:openstack", "counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1.0, "user_id": "u1", "project_id": "p1", "resource_id": "r1", "timestamp": "2026-03-04T05:06:07.891234", "resource_metadata": {}`,
			`"user_id": "u1", "project_id": "p1", "resource_id": "r1", "source": "p1:openstack", "timestamp": "2026-03-04T05:06:07.891234", "resource_metadata": {}`,
		},
		"what is given is kept": {
			member, one(t, map[string]any{"user_id": "u9", "project_id": "p1", "source": "mine", "timestamp": "2012-08-27T01:00:00", "counter_volume": "2.50", "recorded_at": "2000-01-01"}),
			`"source": "p1:mine", "counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 2.5, "user_id": "u9", "project_id": "p1", "resource_id": "r1", "timestamp": "2012-08-27T01:00:00", "resource_metadata": {}`,
			`"user_id": "u9", "project_id": "p1", "resource_id": "r1", "source": "p1:mine", "timestamp": "2012-08-27T01:00:00", "resource_metadata": {}`,
		},
		"nobody has no project": {
			nil, one(t, map[string]any{"user_id": json.RawMessage("null")}),
			`"source": "None:openstack", "counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1.0, "user_id": null, "project_id": null, "resource_id": "r1", "timestamp": "2026-03-04T05:06:07.891234", "resource_metadata": {}`,
			`"user_id": null, "project_id": null, "resource_id": "r1", "source": "None:openstack", "timestamp": "2026-03-04T05:06:07.891234", "resource_metadata": {}`,
		},
		"an offset is echoed and applied": {
			nil, one(t, map[string]any{"timestamp": "2020-01-01 00:00:00.500+02:00"}),
			`"source": "None:openstack", "counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1.0, "user_id": null, "project_id": null, "resource_id": "r1", "timestamp": "2020-01-01T00:00:00.500000+02:00", "resource_metadata": {}`,
			`"user_id": null, "project_id": null, "resource_id": "r1", "source": "None:openstack", "timestamp": "2019-12-31T22:00:00.500000", "resource_metadata": {}`,
		},
		"dots nest where it is stored": {
			nil, one(t, map[string]any{"resource_metadata": map[string]any{"n.a": "1", "n.b.c": "<2>", "x": "y", "z": nil}}),
			`"source": "None:openstack", "counter_name": "apples", "counter_type": "gauge", "counter_unit": "u", "counter_volume": 1.0, "user_id": null, "project_id": null, "resource_id": "r1", "timestamp": "2026-03-04T05:06:07.891234", "resource_metadata": {"n.a": "1", "n.b.c": "<2>", "x": "y", "z": null}`,
			`"user_id": null, "project_id": null, "resource_id": "r1", "source": "None:openstack", "timestamp": "2026-03-04T05:06:07.891234", "resource_metadata": {"n.a": "1", "n.b:c": "<2>", "x": "y", "z": "None"}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			var pipes pipelines
			s := memory.New(func() time.Time { return now })
			h := api.New(s, api.Options{Policy: originalPolicy(t), Publish: pipes.publish, Clock: func() time.Time { return now }})
			for _, direct := range []string{"", "?direct=True", "?direct=nonsense"} {
				w := ask(h, http.MethodPost, "/v2/meters/apples/"+direct, tc.headers, "["+tc.body+"]")
				if w.Code != http.StatusCreated {
					t.Fatalf("got %d %s", w.Code, w.Body)
				}
				if got := w.Body.String(); !strings.HasPrefix(got, "[{"+tc.answer+`, "message_id": "`) {
					t.Errorf("got  %s\nwant [{%s", got, tc.answer)
				}
			}
			if len(pipes.batches) != 2 {
				t.Errorf("%d batches went to the pipelines, want those of the two that were not direct", len(pipes.batches))
			}
			_, body := get(h, "/v2/meters/apples")
			const recorded = `"recorded_at": "2026-03-04T05:06:07.891234", `
			if !strings.Contains(strings.Replace(body, recorded, "", 1), tc.stored) || strings.Count(body, recorded) != 1 {
				t.Errorf("stored:\ngot  %s\nwant %s", body, tc.stored)
			}
		})
	}
}

func TestSamplesThatAreSentKeepTheirOrderAndTheirNumbers(t *testing.T) {
	onEveryEngine(t, func(t *testing.T, s store.Store) {
		h := api.New(s, api.Options{})
		var list []string
		for _, volume := range []string{"18446744073709551615", "-9223372036854775808", "0.5", "3", "true", `" 7e0 "`} {
			list = append(list, one(t, map[string]any{"counter_volume": json.RawMessage(volume), "timestamp": "2026-01-01", "counter_unit": fmt.Sprint("u", len(list)%2)}))
		}
		w := ask(h, http.MethodPost, "/v2/meters/apples?direct=1", nil, "["+strings.Join(list, ",")+"]")
		const volumes = `"counter_volume": 18446744073709551615.0,"counter_volume": -9223372036854775808.0,"counter_volume": 0.5,"counter_volume": 3.0,"counter_volume": 1.0,"counter_volume": 7.0,`
		only := func(body string) (out string) {
			for _, part := range strings.Split(body, `"counter_volume"`)[1:] {
				out += `"counter_volume"` + part[:strings.Index(part, ",")+1]
			}
			return out
		}
		if got := only(w.Body.String()); got != volumes {
			t.Errorf("answered %s", got)
		}
		_, body := get(h, "/v2/meters/apples")
		if got := only(body); got != volumes {
			t.Errorf("stored %s", got)
		}
		id := ids(t, body)[3]
		if _, body := get(h, "/v2/samples/"+id); !strings.Contains(body, `"volume": 3.0`) {
			t.Errorf("by its id: got %s", body)
		}
	})
}

func TestSamplesThatAreRefused(t *testing.T) {
	member := map[string]string{"X-Roles": "Member", "X-Project-Id": "p1", "X-User-Id": "u1"}
	wrong := func(changes map[string]any) string { return "[" + one(t, nil) + ", " + one(t, changes) + "]" }
	const field = "Invalid input for field/attribute "
	for name, tc := range map[string]struct {
		headers map[string]string
		body    string
		status  int
		text    string // what the fault begins with
		end     string
	}{
		"nothing":                       {nil, "", 400, "Samples should be included in request body", ""},
		"an empty list":                 {nil, "[]", 400, "Samples should be included in request body", ""},
		"an object":                     {nil, "{}", 400, field + "samples. Value: '{}'. Value not a valid list: {}", ""},
		"a list in an object":           {nil, `{"samples": ["red"]}`, 400, field + "samples. Value: '{'samples': ['red']}'. Value not a valid list: ", ""},
		"a list of texts":               {nil, `["red"]`, 400, field + "samples. Value: '['red']'. Value not a valid sample: red", ""},
		"null in the list":              {nil, `[null]`, 400, field + "samples. Value: '[None]'. Value not a valid sample: None", ""},
		"no JSON":                       {nil, `[{]`, 400, "Request is not in valid JSON format", ""},
		"two of JSON":                   {nil, `[] []`, 400, "Request is not in valid JSON format", ""},
		"no name":                       {nil, wrong(map[string]any{"counter_name": nil}), 400, field + "counter_name. Value: 'None'. Mandatory field missing.", ""},
		"no type":                       {nil, wrong(map[string]any{"counter_type": nil}), 400, field + "counter_type. Value: 'None'. Mandatory field missing.", ""},
		"no unit":                       {nil, wrong(map[string]any{"counter_unit": nil}), 400, field + "counter_unit. Value: 'None'. Mandatory field missing.", ""},
		"no volume":                     {nil, wrong(map[string]any{"counter_volume": json.RawMessage("null")}), 400, field + "counter_volume. Value: 'None'. Mandatory field missing.", ""},
		"no resource":                   {nil, wrong(map[string]any{"resource_id": nil}), 400, field + "resource_id. Value: 'None'. Mandatory field missing.", ""},
		"another name":                  {nil, wrong(map[string]any{"counter_name": "cars"}), 400, field + "counter_name. Value: 'cars'. should be apples", ""},
		"a type that is none":           {nil, wrong(map[string]any{"counter_type": "elevation"}), 400, field + "counter_type. Value: 'elevation'. The counter type must be: gauge, delta, cumulative", ""},
		"an id":                         {nil, wrong(map[string]any{"message_id": "evil"}), 400, field + "message_id. Value: 'evil'. The message_id must not be set", ""},
		"an unknown attribute":          {nil, wrong(map[string]any{"colour": "red"}), 400, "Unknown attribute for argument samples: colour", ""},
		"two unknown attributes":        {nil, wrong(map[string]any{"colour": "red", "age": 1}), 400, "Unknown attributes for argument samples: age, colour", ""},
		"a unit that is a number":       {nil, wrong(map[string]any{"counter_unit": 5}), 400, field + "counter_unit. Value: '5'. Wrong type. Expected '<class 'str'>', got '<class 'int'>'", ""},
		"a resource that is an object":  {nil, wrong(map[string]any{"resource_id": map[string]any{}}), 400, field + "resource_id. Value: '{}'. Wrong type. Expected '<class 'str'>', got '<class 'dict'>'", ""},
		"a volume that is a word":       {nil, wrong(map[string]any{"counter_volume": "abc"}), 400, field + "samples. Value: '[", "could not convert string to float: 'abc'"},
		"a volume that is a list":       {nil, wrong(map[string]any{"counter_volume": []int{1}}), 400, field + "samples. Value: '[", "float() argument must be a string or a number, not 'list'"},
		"a volume that is not a number": {nil, wrong(map[string]any{"counter_volume": "NaN"}), 400, field + "samples. Value: '[", "the volume 'NaN' is not a finite number"},
		"a volume without end":          {nil, wrong(map[string]any{"counter_volume": json.RawMessage("1e999")}), 400, field + "samples. Value: '[", "the volume '1e999' is not a finite number"},
		"a volume in hexadecimal":       {nil, wrong(map[string]any{"counter_volume": "0x1p4"}), 400, field + "samples. Value: '[", "could not convert string to float: '0x1p4'"},
		"a time that is none":           {nil, wrong(map[string]any{"timestamp": "2013-01-bad 23:23:20"}), 400, field + "samples. Value: '[", "2013-01-bad 23:23:20 is not a legal datetime value"},
		"a time that is a number":       {nil, wrong(map[string]any{"timestamp": 5}), 400, field + "samples. Value: '[", "5 is not a legal datetime value"},
		"metadata that is a text":       {nil, wrong(map[string]any{"resource_metadata": "a string"}), 400, field + "samples. Value: '[", "Value not a valid dict: a string"},
		"metadata of numbers":           {nil, wrong(map[string]any{"resource_metadata": map[string]any{"a": 1}}), 400, field + "resource_metadata. Value: '{'a': 1}'. Wrong type. Expected '<class 'str'>', got '<class 'int'>'", ""},
		"metadata of lists":             {nil, wrong(map[string]any{"resource_metadata": map[string]any{"a": []any{true, 1.5, nil}}}), 400, field + "resource_metadata. Value: '{'a': [True, 1.5, None]}'. Wrong type. Expected '<class 'str'>', got '<class 'list'>'", ""},
		"metadata that nests too deep":  {nil, wrong(map[string]any{"resource_metadata": map[string]any{strings.Repeat("a.", 100_000): "x"}}), 400, field + "resource_metadata. Value: '{'a.a.", "A key has more than 32 dots."},
		"another project":               {member, wrong(map[string]any{"project_id": "p2"}), 400, field + "project_id. Value: 'p2'. can not post samples to other projects", ""},
		"a role without a project":      {map[string]string{"X-Roles": "member"}, "[" + one(t, nil) + "]", 403, "RBAC Authorization Failed", ""},
		"too many samples":              {nil, "[" + strings.Repeat("1,", sample.MaxSamples) + "1]", 413, "65537 elements in a request, at most 65536 are taken.", ""},
		"an answer is not as large":     {nil, `[{"counter_name": "` + strings.Repeat("a", 1<<20) + `"}]`, 400, field + "counter_type. Value: 'None'. Mandatory field missing.", ""},
		"nor as large as a bad name":    {nil, "[" + one(t, map[string]any{"counter_name": strings.Repeat("é", 1<<20)}) + "]", 400, field + "counter_name. Value: 'éé", "should be apples"},
	} {
		t.Run(name, func(t *testing.T) {
			var pipes pipelines
			s := memory.New(time.Now)
			h := api.New(s, api.Options{Policy: originalPolicy(t), Publish: pipes.publish})
			for _, direct := range []string{"", "?direct=1"} {
				w := ask(h, http.MethodPost, "/v2/meters/apples"+direct, tc.headers, tc.body)
				if got := fault(t, w); w.Code != tc.status || !strings.HasPrefix(got, tc.text) || !strings.HasSuffix(got, tc.end) {
					t.Errorf("got %d %.500s\nwant %d %s … %s", w.Code, got, tc.status, tc.text, tc.end)
				}
				if w.Body.Len() > 20_000 {
					t.Errorf("the answer has %d bytes", w.Body.Len())
				}
			}
			if _, body := get(h, "/v2/samples"); body != "[]" || len(pipes.batches) > 0 {
				t.Errorf("some of it was taken: %s", body)
			}
		})
	}
}

func TestWhoMaySendSamples(t *testing.T) {
	s := memory.New(time.Now)
	h := api.New(s, api.Options{})
	for name, tc := range map[string]struct {
		headers map[string]string
		status  int
	}{
		"admins":             {map[string]string{"X-Roles": "admin", "X-Project-Id": "p1"}, 201},
		"services of theirs": {map[string]string{"X-Roles": "service", "X-Project-Id": "p9"}, 201},
		"services of others": {map[string]string{"X-Roles": "service", "X-Project-Id": "p1"}, 400},
		"members":            {map[string]string{"X-Roles": "member", "X-Project-Id": "p9"}, 403},
		"nobody":             {nil, 201},
	} {
		body := "[" + one(t, map[string]any{"project_id": "p9"}) + "]"
		if w := ask(h, http.MethodPost, "/v2/meters/apples?direct=1", tc.headers, body); w.Code != tc.status {
			t.Errorf("%s: got %d %s, want %d", name, w.Code, w.Body, tc.status)
		}
	}
	w := ask(h, http.MethodPost, "/v2/meters/apples", nil, "["+one(t, nil)+"]")
	if got, want := fault(t, w), "There is no pipeline behind this API; send the samples with direct=true."; w.Code != 503 || got != want {
		t.Errorf("without pipelines: got %d %s", w.Code, got)
	}
	h = api.New(s, api.Options{Publish: func(context.Context, *sample.Batch) error { return errors.New("the broker is away") }})
	w = ask(h, http.MethodPost, "/v2/meters/apples", nil, "["+one(t, nil)+"]")
	if got, want := fault(t, w), "The pipelines take no samples now; send them again later, or with direct=true."; w.Code != 503 || got != want {
		t.Errorf("with pipelines that take nothing: got %d %s", w.Code, got)
	}
	for kind, status := range map[string]int{"text/plain": 415, "": 415, "application/json; charset=utf-8": 201} {
		r := httptest.NewRequest(http.MethodPost, "http://api.example/v2/meters/apples?direct=1", strings.NewReader("["+one(t, nil)+"]"))
		r.Header.Set("Content-Type", kind)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != status {
			t.Errorf("content type %q: got %d %s, want %d", kind, w.Code, w.Body, status)
		}
	}
}

// endless is a body that never ends; it counts what is read of it.
type endless struct{ read int64 }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '['
	}
	e.read += int64(len(p))
	return len(p), nil
}

func TestABodyThatNeverEnds(t *testing.T) {
	h := api.New(memory.New(time.Now), api.Options{})
	for path, most := range map[string]int64{"/v2/meters/x": 8 << 20, "/v2/ingest/samples": 8 << 20, "/v2/ingest/events": 8 << 20, "/v2/query/samples": 1 << 20, "GET /v2/samples": 1 << 20} {
		method, path, ok := strings.Cut(path, " ")
		if !ok {
			method, path = http.MethodPost, method
		}
		body := &endless{}
		r := httptest.NewRequest(method, "http://api.example"+path, io.NopCloser(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if got := fault(t, w); w.Code != http.StatusRequestEntityTooLarge || !strings.HasPrefix(got, "The request body is larger than") {
			t.Errorf("%s: got %d %s", path, w.Code, got)
		}
		if body.read > 2*most {
			t.Errorf("%s: %d bytes were read of at most %d", path, body.read, most)
		}
	}
}

// TestABodyThatComesTooSlowly holds that a client that sends a byte now and then
// keeps neither an endpoint nor a connection, and that an answer may take longer
// than a body.
func TestABodyThatComesTooSlowly(t *testing.T) {
	slow := make(chan struct{})
	server := httptest.NewServer(api.TransferWithin(api.New(waiting{memory.New(time.Now), slow}, api.Options{}), time.Second))
	defer server.Close()
	for name, tc := range map[string]struct{ request, want string }{
		"of a length":        {"POST /v2/query/samples HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{", "HTTP/1.1 408 "},
		"in chunks":          {"POST /v2/meters/x HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n", "HTTP/1.1 408 "},
		"that is not wanted": {"POST /v2/nothing HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{", "HTTP/1.1 404 "},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if _, err := io.WriteString(conn, tc.request); err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
			answer, err := io.ReadAll(conn) // the server ends it
			if err != nil || !strings.HasPrefix(string(answer), tc.want) {
				t.Errorf("got %q, %v\nwant %s", answer, err, tc.want)
			}
		})
	}
	time.AfterFunc(2500*time.Millisecond, func() { close(slow) })
	resp, err := http.Post(server.URL+"/v2/query/samples", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "[]" {
		t.Errorf("an answer that takes its time: got %s, %v", body, err)
	}
}

// waiting is a store whose samples come when ready is closed, if the client is
// still there.
type waiting struct {
	store.Store
	ready chan struct{}
}

func (w waiting) Samples(ctx context.Context, _ store.Filter, _ func(store.Sample) bool) error {
	select {
	case <-w.ready:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}
