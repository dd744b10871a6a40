package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

// busSamples store what the original's bus carries: meter|type|unit|volume|
// user|project|resource|time|source|metadata, a line each.
func busSamples(t *testing.T, s store.Store, lines string) {
	t.Helper()
	var samples []sample.Sample
	for i, line := range strings.Split(strings.TrimSpace(lines), "\n") {
		f := strings.Split(strings.TrimSpace(line), "|")
		text, err := json.Marshal(map[string]any{
			"message_id": fmt.Sprintf("m%d", i+1), "counter_name": f[0], "counter_type": f[1], "counter_unit": f[2], "counter_volume": json.Number(f[3]),
			"user_id": f[4], "project_id": f[5], "resource_id": f[6], "timestamp": f[7], "source": f[8], "resource_metadata": json.RawMessage(f[9]),
		})
		if err != nil {
			t.Fatal(err)
		}
		smp, err := sample.ParseForeign(text)
		if err != nil {
			t.Fatal(err)
		}
		samples = append(samples, smp)
	}
	if err := api.Store(t.Context(), s, api.BatchOf(time.Now(), samples)); err != nil {
		t.Fatal(err)
	}
}

// onEveryEngine runs a test over the reference and over the store that central
// has.
func onEveryEngine(t *testing.T, test func(t *testing.T, s store.Store)) {
	t.Run("memory", func(t *testing.T) { test(t, memory.New(time.Now)) })
	t.Run("local", func(t *testing.T) {
		s, err := local.Open(t.TempDir(), local.Options{Retention: -1, MinFree: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		test(t, s)
	})
}

// fields prints some fields of each object of a list.
func fields(t *testing.T, w *httptest.ResponseRecorder, names string) string {
	t.Helper()
	var list []map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &list); err != nil {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	var rows []string
	for _, object := range list {
		var row []string
		for name := range strings.SplitSeq(names, " ") {
			var v any = object
			for part := range strings.SplitSeq(name, "/") {
				m, _ := v.(map[string]any)
				v = m[part]
			}
			row = append(row, fmt.Sprint(v))
		}
		rows = append(rows, strings.Join(row, " "))
	}
	return strings.Join(rows, "; ")
}

// q makes the query string of terms as clients send it: every attribute of
// every term, empty ones too.
func q(terms ...string) string {
	var b strings.Builder
	for _, t := range terms {
		f := append(strings.Split(t, " "), "", "", "")
		fmt.Fprintf(&b, "&q.field=%s&q.op=%s&q.value=%s&q.type=%s", f[0], f[1], f[2], f[3])
	}
	return b.String()
}

const meterLines = `
	m.test|cumulative||1|u1|p1|r1|2012-07-02T10:40:00|s1|{"name": "server", "tag": "t0", "size": 123, "util": 0.75, "public": true}
	m.test|cumulative||3|u1|p1|r1|2012-07-02T11:40:00|s1|{"name": "server", "tag": "t1", "size": 0, "util": 0.47, "public": false}
	m.mine|gauge||1|u1|p1|r2|2012-07-02T10:41:00|s1|{"name": "server", "tag": "t2", "size": 456, "util": 0.64, "public": false}
	m.test|cumulative||1|u2|p2|r3|2012-07-02T10:42:00|s1|{"name": "server", "tag": "t3", "size": 0, "util": 0.75, "public": false}
	m.test.new|cumulative||1|u1|p1|r1|2012-07-02T10:40:00|s1|{"name": "server", "tag": "t3", "size": 0, "util": 0.75, "public": false}
	m.mine|gauge||1|u4|p2|r4|2012-07-02T10:43:00|s2|{"name": "server", "tag": "t4", "props": {"p1": "v", "p2": {"sub": "sv"}, "p.3": {"$s.2": "sv2"}}, "size": 0, "util": 0.58, "public": true}
	m.accentéз|gauge||1|u4|p2|r4|2014-07-02T10:43:00|s2|{}`

func TestMetersSamplesAndResources(t *testing.T) {
	onEveryEngine(t, func(t *testing.T, s store.Store) {
		busSamples(t, s, meterLines)
		h := api.New(s, api.Options{})
		for name, tc := range map[string]struct{ path, fields, want string }{
			"meters":                               {"/v2/meters", "name resource_id user_id project_id source", "m.accentéз r4 u4 p2 s2; m.mine r2 u1 p1 s1; m.mine r4 u4 p2 s2; m.test r1 u1 p1 s1; m.test r3 u2 p2 s1; m.test.new r1 u1 p1 s1"},
			"meters whatever their resource":       {"/v2/meters?unique=True", "name resource_id", "m.accentéз <nil>; m.mine <nil>; m.test <nil>; m.test.new <nil>"},
			"meters of a resource":                 {"/v2/meters?" + q("resource_id  r1"), "name", "m.test; m.test.new"},
			"meters of a resource of a source":     {"/v2/meters?" + q("resource_id  r4", "source  s2"), "name", "m.accentéз; m.mine"},
			"meters of a source":                   {"/v2/meters?" + q("source  s1"), "resource_id", "r2; r1; r3; r1"},
			"meters of a user":                     {"/v2/meters?" + q("user_id  u1"), "name resource_id", "m.mine r2; m.test r1; m.test.new r1"},
			"meters of a user and a source":        {"/v2/meters?" + q("user  u4", "source  s2"), "name", "m.accentéз; m.mine"},
			"meters of a project":                  {"/v2/meters?" + q("project_id  p2"), "resource_id", "r4; r4; r3"},
			"meters of nobody":                     {"/v2/meters?" + q("project_id  p9"), "name", ""},
			"their ids":                            {"/v2/meters?limit=2", "meter_id", "cjQrbS5hY2NlbnTDqdC3; cjIrbS5taW5l"},
			"samples":                              {"/v2/samples", "id", "m7; m2; m6; m4; m3; m1; m5"},
			"samples of a meter":                   {"/v2/meters/m.test", "message_id", "m2; m4; m1"},
			"with a slash at the end":              {"/v2/meters/m.test/", "message_id", "m2; m4; m1"},
			"samples of a meter in Cyrillic":       {"/v2/meters/m.accent%C3%A9%D0%B7", "message_id", "m7"},
			"samples of a meter that has a suffix": {"/v2/meters/meter.jpg", "message_id", ""},
			"metadata in an object":                {"/v2/meters/m.mine?" + q("metadata.props.p2.sub eq sv"), "message_id", "m6"},
			"metadata whose key has dots":          {"/v2/meters/m.mine?" + q("metadata.props.p.3.$s.2 eq sv2"), "message_id resource_metadata/props.p:3:$s:2", "m6 sv2"},
			"metadata by its long name":            {"/v2/meters/m.test?" + q("resource_metadata.tag eq t1"), "message_id", "m2"},
			"two of metadata":                      {"/v2/meters/m.test?" + q("metadata.tag eq t1", "metadata.name eq server"), "message_id", "m2"},
			"an integer":                           {"/v2/meters/m.test?" + q("metadata.size eq 0 integer"), "message_id resource_metadata/size", "m2 0; m4 0"},
			"a float":                              {"/v2/meters/m.test?" + q("metadata.util eq 0.75 float"), "message_id resource_metadata/util", "m4 0.75; m1 0.75"},
			"a boolean":                            {"/v2/meters/m.mine?" + q("metadata.public eq False boolean"), "message_id resource_metadata/public", "m3 False"},
			"numbers without a type":               {"/v2/meters/m.test?" + q("metadata.size eq 0", "metadata.util eq 0.75"), "message_id", "m4"},
			"a resource and metadata":              {"/v2/meters/m.mine?" + q("resource_id eq r2", "metadata.tag eq t2"), "message_id", "m3"},
			"a project and metadata":               {"/v2/meters/m.test?" + q("project_id eq p1", "metadata.tag eq t1"), "message_id", "m2"},
			"samples from a time on":               {"/v2/samples?" + q("timestamp ge 2012-07-02T10:43:00"), "id", "m7; m2; m6"},
			"samples after a time":                 {"/v2/samples?" + q("timestamp gt 2012-07-02T10:43:00"), "id", "m7; m2"},
			"samples up to a time":                 {"/v2/samples?" + q("timestamp le 2012-07-02T10:41:00"), "id", "m3; m1; m5"},
			"samples before a time":                {"/v2/samples?" + q("timestamp lt 2012-07-02T10:41:00"), "id", "m1; m5"},
			"a day":                                {"/v2/samples?" + q("timestamp ge 2014-07-02", "timestamp lt 2014-07-03"), "id", "m7"},
			"a time with an offset":                {"/v2/samples?" + q("timestamp ge 2012-07-02T12:43:00%2B02:00"), "id", "m7; m2; m6"},
			"a window that is wider":               {"/v2/samples?" + q("timestamp ge 2012-07-02T10:50:00", "timestamp le 2012-07-02T11:00:00", "search_offset eq 7"), "id", "m6"},
			"a sample by its id":                   {"/v2/samples?" + q("message_id eq m4"), "id", "m4"},
			"a meter by a query":                   {"/v2/samples?" + q("meter eq m.test.new"), "id", "m5"},
			"a meter by a query of another's path": {"/v2/meters/m.mine?" + q("meter eq m.test.new"), "message_id", "m6; m3"},
			"an empty value asks for nothing":      {"/v2/samples?" + q("user eq "), "id", "m7; m2; m6; m4; m3; m1; m5"},
			"resources":                            {"/v2/resources", "resource_id user_id first_sample_timestamp last_sample_timestamp", "r1 u1 2012-07-02T10:40:00 2012-07-02T11:40:00; r2 u1 2012-07-02T10:41:00 2012-07-02T10:41:00; r3 u2 2012-07-02T10:42:00 2012-07-02T10:42:00; r4 u4 2012-07-02T10:43:00 2014-07-02T10:43:00"},
			"resources of a source":                {"/v2/resources?" + q("source  s2"), "resource_id source", "r4 s2"},
			"resources of a project":               {"/v2/resources?" + q("project_id  p1"), "resource_id", "r1; r2"},
			"resources by any of their metadata":   {"/v2/resources?" + q("metadata.tag  t0"), "resource_id metadata/tag", "r1 t1"},
			"resources of a time":                  {"/v2/resources?" + q("timestamp ge 2012-07-02T10:42:00", "timestamp lt 2014-01-01"), "resource_id first_sample_timestamp last_sample_timestamp", "r1 2012-07-02T11:40:00 2012-07-02T11:40:00; r3 2012-07-02T10:42:00 2012-07-02T10:42:00; r4 2012-07-02T10:43:00 2012-07-02T10:43:00"},
			"at most so many":                      {"/v2/resources?limit=2", "resource_id", "r1; r2"},
		} {
			t.Run(name, func(t *testing.T) {
				if got := fields(t, ask(h, http.MethodGet, tc.path, nil, ""), tc.fields); got != tc.want {
					t.Errorf("%s:\ngot  %s\nwant %s", tc.path, got, tc.want)
				}
			})
		}
		member := map[string]string{"X-Roles": "Member", "X-Project-Id": "p2"}
		for path, want := range map[string]string{
			"/v2/meters": "r4; r4; r3", "/v2/samples": "r4; r4; r3", "/v2/resources": "r3; r4", "/v2/meters?" + q("project_id  p2"): "r4; r4; r3", "/v2/meters/m.test": "r3",
		} {
			if got := fields(t, ask(h, http.MethodGet, path, member, ""), "resource_id"); got != want {
				t.Errorf("%s for a member: got %s, want %s", path, got, want)
			}
		}
	})
}

func TestStatisticsOfGroupsAndPeriods(t *testing.T) {
	onEveryEngine(t, func(t *testing.T, s store.Store) {
		busSamples(t, s, `
			i|cumulative|s|2|u1|p1|r1|2013-08-01T16:10:00|s2|{"flavor": "tiny"}
			i|cumulative|s|2|u1|p2|r1|2013-08-01T15:37:00|s2|{"flavor": "large"}
			i|cumulative|s|1|u2|p1|r2|2013-08-01T10:11:00|s1|{"flavor": "tiny"}
			i|cumulative|s|1|u2|p1|r2|2013-08-01T10:40:00|s1|{"flavor": "large"}
			i|cumulative|s|2|u2|p1|r1|2013-08-01T14:59:00|s1|{"flavor": "large"}
			i|cumulative|s|4|u2|p2|r2|2013-08-01T17:28:00|s1|{"flavor": "large"}
			i|cumulative|s|4|u3|p1|r3|2013-08-01T11:22:00|s3|{}
			other|gauge|x|9|u3|p1|r3|2013-08-01T11:22:00|s3|{}`)
		h := api.New(s, api.Options{})
		const five = "count min max sum avg"
		for name, tc := range map[string]struct{ args, fields, want string }{
			"all":                      {"", five + " unit groupby period period_start period_end duration", "7 1 4 16 2.2857142857142856 s <nil> 0 2013-08-01T10:11:00 2013-08-01T17:28:00 26220"},
			"by user":                  {"groupby=user_id", "groupby/user_id " + five, "u1 2 2 2 4 2; u2 4 1 4 8 2; u3 1 4 4 4 4"},
			"by resource":              {"groupby=resource_id", "groupby/resource_id " + five, "r1 3 2 2 6 2; r2 3 1 4 6 2; r3 1 4 4 4 4"},
			"by project":               {"groupby=project_id", "groupby/project_id " + five, "p1 5 1 4 10 2; p2 2 2 4 6 3"},
			"by source":                {"groupby=source", "groupby/source " + five, "s1 4 1 4 8 2; s2 2 2 2 4 2; s3 1 4 4 4 4"},
			"by metadata":              {"groupby=resource_metadata.flavor", "groupby/resource_metadata.flavor count", "large 4; tiny 2"},
			"by two":                   {"groupby=user_id&groupby=resource_id", "groupby/user_id groupby/resource_id count sum", "u1 r1 2 4; u2 r1 1 2; u2 r2 3 6; u3 r3 1 4"},
			"of a project by resource": {"groupby=resource_id" + q("project_id eq p1"), "groupby/resource_id count sum", "r1 2 4; r2 2 2; r3 1 4"},
			"by project in two hours": {
				"groupby=project_id&period=7200", "groupby/project_id period_start period_end count duration duration_start duration_end",
				"p1 2013-08-01T10:11:00 2013-08-01T12:11:00 3 4260 2013-08-01T10:11:00 2013-08-01T11:22:00; p1 2013-08-01T14:11:00 2013-08-01T16:11:00 2 4260 2013-08-01T14:59:00 2013-08-01T16:10:00; " +
					"p2 2013-08-01T14:11:00 2013-08-01T16:11:00 1 0 2013-08-01T15:37:00 2013-08-01T15:37:00; p2 2013-08-01T16:11:00 2013-08-01T18:11:00 1 0 2013-08-01T17:28:00 2013-08-01T17:28:00",
			},
			"hours from the bound on": {
				"groupby=project_id&period=3600" + q("timestamp ge 2013-08-01T14:00:00", "timestamp le 2013-08-01T17:00:00"), "groupby/project_id period_start count",
				"p1 2013-08-01T14:00:00 1; p2 2013-08-01T15:00:00 1; p1 2013-08-01T16:00:00 1",
			},
			"after the last":             {"groupby=project_id" + q("timestamp ge 2013-08-01T17:28:01"), five, ""},
			"before the first":           {q("timestamp le 2013-08-01T10:10:59"), five, ""},
			"a window, clamped":          {q("timestamp ge 2013-08-01T10:20:00", "timestamp le 2013-08-01T11:00:00", "search_offset eq 10"), "count duration duration_start duration_end", "2 1200 2013-08-01T10:20:00 2013-08-01T10:40:00"},
			"one aggregate":              {"groupby=project_id&aggregate.func=max", "max aggregate/max min", "4 4 <nil>; 4 4 <nil>"},
			"distinct values":            {"groupby=project_id&aggregate.func=cardinality&aggregate.param=resource_id", "aggregate/cardinality/resource_id", "<nil>; <nil>"},
			"two, of which one has none": {"aggregate.func=count&aggregate.func=sum&aggregate.param=&aggregate.param=", "count aggregate/count aggregate/sum avg", "7 7 16 <nil>"},
		} {
			t.Run(name, func(t *testing.T) {
				if got := fields(t, ask(h, http.MethodGet, "/v2/meters/i/statistics?"+tc.args, nil, ""), tc.fields); got != tc.want {
					t.Errorf("%s:\ngot  %s\nwant %s", tc.args, got, tc.want)
				}
			})
		}
		_, body := get(h, "/v2/meters/i/statistics?aggregate.func=cardinality&aggregate.param=resource_id&aggregate.func=cardinality&aggregate.param=project_id&")
		if !strings.Contains(body, `"aggregate": {"cardinality/resource_id": 3.0, "cardinality/project_id": 2.0}`) {
			t.Errorf("distinct values: got %s", body)
		}
	})
}

func TestAggregatesOfOurOwn(t *testing.T) {
	onEveryEngine(t, func(t *testing.T, s store.Store) {
		busSamples(t, s, `
			c|cumulative|ns|100|u1|p1|r1|2013-08-01T10:00:00|s1|{"f": "a"}
			c|cumulative|ns|200|u1|p1|r1|2013-08-01T10:00:10|s1|{"f": "a"}
			c|cumulative|ns|30|u1|p1|r1|2013-08-01T10:00:20|s1|{"f": "b"}
			c|cumulative|ns|18446744073709551615|u1|p2|r2|2013-08-01T10:00:20|s1|{"f": "b"}
			c|cumulative|ns|18446744073709551605|u1|p2|r2|2013-08-01T10:00:00|s1|{"f": "a"}
			c|cumulative|ns|7|u1|p3|r3|2013-08-01T10:00:19|s1|{}
			d|delta|B|10|u1|p1|r1|2013-08-01T10:00:00|s1|{}
			d|delta|B|20|u1|p1|r1|2013-08-01T10:00:10|s1|{}
			d|delta|B|30|u1|p1|r1|2013-08-01T10:00:20|s1|{}
			g|gauge|%|4|u1|p1|r1|2013-08-01T10:00:00|s1|{}
			g|gauge|%|1|u1|p1|r1|2013-08-01T10:00:20|s1|{}
			g|gauge|%|9|u1|p1|r1|2013-08-01T10:00:20|s1|{}
			g|gauge|%|2|u1|p1|r1|2013-08-01T10:00:10|s1|{}`)
		own := sample.NewBuilder()
		for i, life := range []string{"1", "1", "2"} {
			own.Row(sample.Row{Resource: "vm", Offset: int64(i) * 10 * second, Incarnation: sample.IncarnationOf("boot", life)})
			own.Add(sample.MeterRef{Name: "own", Kind: sample.Cumulative, Unit: "ns"}, sample.Walk, sample.Uint([]uint64{100, 150, 250}[i]))
		}
		b := own.Build()
		b.ID, b.Node, b.Base = sample.NewBatchID(recordedAt), "n", at
		if _, err := s.Append(t.Context(), []store.Received{{Batch: b}}); err != nil {
			t.Fatal(err)
		}
		h := api.New(s, api.Options{})
		for args, want := range map[string]string{
			"c rate groupby=resource_id":          `{"rate": 6.5}; {"rate": 0.5}; {}`,
			"c rate":                              `{"rate": 7.0}`,
			"c rate period=20&groupby=project_id": `{"rate": 10.0}; {}; {}; {}; {}`,
			"c last groupby=metadata.f":           `{"last": 200.0}; {"last": 1.8446744073709552e+19}`,
			"d rate":                              `{"rate": 2.5}`,
			"g rate":                              `{"rate": -0.15}`,
			"g last":                              `{"last": 9.0}`,
			"g p50":                               `{"p50": 3.0}`,
			"g p95":                               `{"p95": 8.25}`,
			"g p99 aggregate.func=p50&aggregate.func=avg": `{"p99": 8.85, "p50": 3.0, "avg": 4.0}`,
			"own rate":  `{"rate": 15.0}`,
			"none last": ``,
		} {
			f := append(strings.Fields(args), "")
			w := ask(h, http.MethodGet, "/v2/meters/"+f[0]+"/statistics?aggregate.func="+f[1]+"&"+f[2], nil, "")
			var got []string
			for _, m := range regexp.MustCompile(`"aggregate": (\{[^}]*\})`).FindAllStringSubmatch(w.Body.String(), -1) {
				got = append(got, m[1])
			}
			if strings.Join(got, "; ") != want {
				t.Errorf("%s: got %s of %s\nwant %s", args, strings.Join(got, "; "), w.Body, want)
			}
		}
	})
}

// TestAggregatesOfTooManySamples holds that they are not collected without end.
func TestAggregatesOfTooManySamples(t *testing.T) {
	h := api.New(plenty{storeOf(t, gauge("a", "r", 0, 1))}, api.Options{})
	w := ask(h, http.MethodGet, "/v2/meters/load/statistics?aggregate.func=p50", nil, "")
	if got, want := fault(t, w), "More than 1000000 samples match, too many for last, rate and percentiles: ask for less time."; w.Code != 400 || got != want {
		t.Errorf("got %d %s", w.Code, got)
	}
}

// plenty is a store with endless samples.
type plenty struct{ store.Store }

func (plenty) Samples(_ context.Context, _ store.Filter, yield func(store.Sample) bool) error {
	smp := store.Sample{Sample: gauge("a", "r", 0, 1)}
	for yield(smp) {
	}
	return nil
}
