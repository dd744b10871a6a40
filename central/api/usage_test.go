package api_test

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/parquet-go/parquet-go"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// used is a store of two projects: p1's vm-1 with a counter that starts anew and a
// gauge, p2's vm-2 with a counter beyond what a float64 holds.
func used(t *testing.T) store.Store {
	counter := func(id, resource, project string, after int64, volume uint64, flavor string) sample.Sample {
		s := gauge(id, resource, after*1e6, 0)
		s.Name, s.Kind, s.Unit, s.Volume, s.Project = "cpu", sample.Cumulative, "ns", sample.Uint(volume), project
		s.Metadata = []byte(`{"flavor":{"name":"` + flavor + `"}}`)
		return s
	}
	load := func(id string, after int64, volume float64) sample.Sample {
		return gauge(id, "vm-1", after*1e6, volume)
	}
	return storeOf(t,
		counter("a1", "vm-1", "p1", 0, 100, "small"), counter("a2", "vm-1", "p1", 10, 250, "small"),
		counter("a3", "vm-1", "p1", 20, 30, "big"), counter("a4", "vm-1", "p1", 30, 90, "big"),
		counter("b1", "vm-2", "p2", 0, 1<<53, "small"), counter("b2", "vm-2", "p2", 30, 1<<54+1, "small"),
		load("l1", 0, 0.5), load("l2", 10, 0.25),
	)
}

func period(from, to int64) string {
	text := func(after int64) string {
		return time.UnixMicro(at + after*1e6).UTC().Format("2006-01-02T15:04:05.999999")
	}
	return "start=" + text(from) + "&end=" + text(to)
}

func TestUsage(t *testing.T) {
	h := api.New(used(t), api.Options{})
	for name, tc := range map[string]struct{ query, want string }{
		"all":           {period(0, 60), "p1 vm-1 cpu 240 ns; p1 vm-1 load 5 %·s; p2 vm-2 cpu 9007199254740993 ns; "},
		"a meter":       {period(0, 60) + "&q.field=meter&q.value=load", "p1 vm-1 load 5 %·s; "},
		"a project":     {period(0, 60) + "&q.field=project&q.value=p2", "p2 vm-2 cpu 9007199254740993 ns; "},
		"a part":        {period(0, 15), "p1 vm-1 cpu 150 ns; p1 vm-1 load 5 %·s; p2 vm-2 cpu 0 ns; "},
		"split":         {period(0, 60) + "&q.field=meter&q.value=cpu&split=metadata.flavor.name", "p1 vm-1 cpu 90 ns big; p1 vm-1 cpu 150 ns small; p2 vm-2 cpu 9007199254740993 ns small; "},
		"nothing there": {period(-60, 0), ""},
	} {
		t.Run(name, func(t *testing.T) {
			status, body := get(h, "/v2/usage?"+tc.query)
			if status != http.StatusOK {
				t.Fatalf("got %d %s", status, body)
			}
			var rows []struct {
				Project  string `json:"project_id"`
				Resource string `json:"resource_id"`
				Meter    string
				Quantity json.Number
				Unit     string `json:"quantity_unit"`
				Split    map[string]string
				Origins  []string
			}
			if err := json.Unmarshal([]byte(body), &rows); err != nil {
				t.Fatalf("%v: %s", err, body)
			}
			got := ""
			for _, r := range rows {
				if len(r.Origins) > 0 {
					t.Errorf("got origins %q of samples that name none", r.Origins)
				}
				got += strings.Join([]string{r.Project, r.Resource, r.Meter, r.Quantity.String(), r.Unit}, " ")
				if v, ok := r.Split["flavor.name"]; ok {
					got += " " + v
				}
				got += "; "
			}
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func TestUsageInOtherFormats(t *testing.T) {
	h := api.New(used(t), api.Options{})
	_, body := get(h, "/v2/usage?format=csv&split=flavor.name&"+period(0, 60))
	rows, err := csv.NewReader(strings.NewReader(body)).ReadAll()
	if err != nil || len(rows) != 5 {
		t.Fatalf("%v: %s", err, body)
	}
	want := []string{"p1", "vm-1", "cpu", "cumulative", "ns", "openstack", "big", "90", "ns", "2"}
	if diff := cmp.Diff(want, rows[1][:len(want)]); diff != "" {
		t.Errorf("row (-want +got):\n%s", diff)
	}
	w := ask(h, http.MethodGet, "/v2/usage?format=parquet&split=flavor.name&"+period(0, 60), nil, "")
	type row struct {
		Resource string            `parquet:"resource_id"`
		Quantity string            `parquet:"quantity"`
		Split    map[string]string `parquet:"split"`
		First    int64             `parquet:"first"`
	}
	read, err := parquet.Read[row](bytes.NewReader(w.Body.Bytes()), int64(w.Body.Len()))
	if err != nil || len(read) != 4 {
		t.Fatalf("%v: %+v", err, read)
	}
	if diff := cmp.Diff(row{"vm-2", "9007199254740993", map[string]string{"flavor.name": "small"}, at}, read[3]); diff != "" {
		t.Errorf("row (-want +got):\n%s", diff)
	}
}

func TestUsageIsOfTheCallersProject(t *testing.T) {
	h := api.New(used(t), api.Options{})
	member := map[string]string{"X-Roles": "member", "X-Project-Id": "p2", "X-User-Id": "u2"}
	for _, format := range []string{"json", "csv", "parquet"} {
		w := ask(h, http.MethodGet, "/v2/usage?format="+format+"&"+period(0, 60), member, "")
		if body := w.Body.String(); w.Code != 200 || !strings.Contains(body, "vm-2") || strings.Contains(body, "vm-1") || strings.Contains(body, "nodes\":") {
			t.Errorf("%s: got %d %s", format, w.Code, body)
		}
	}
	w := ask(h, http.MethodGet, "/v2/usage?q.field=project&q.value=p1&"+period(0, 60), member, "")
	if w.Code != http.StatusUnauthorized {
		t.Errorf("another project: got %d %s", w.Code, w.Body)
	}
}

func TestBadUsage(t *testing.T) {
	h := api.New(used(t), api.Options{})
	for query, want := range map[string]string{
		"start=x":                     "Invalid input for field/attribute start. Value: 'x'. invalid timestamp format",
		period(10, 10):                "The period is empty: start must be before end.",
		"format=xml&" + period(0, 1):  "Invalid input for field/attribute format. Value: 'xml'. It can be json, csv or parquet.",
		"limit=1":                     `Unknown argument: "limit"`,
		"q.field=timestamp&q.value=1": `Unknown argument: "timestamp": not valid for this resource`,
		strings.Repeat("split=a&", 9): "Usage is split by at most 8 keys.",
	} {
		w := ask(h, http.MethodGet, "/v2/usage?"+query, nil, "")
		if w.Code != http.StatusBadRequest || fault(t, w) != want {
			t.Errorf("%s: got %d %s, want %s", query, w.Code, w.Body, want)
		}
	}
}
