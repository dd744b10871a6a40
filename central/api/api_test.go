package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var at = time.Date(2026, 1, 1, 10, 0, 0, 0, time.UTC).UnixMicro()

// second is a second in µs.
const second = int64(1e6)

// gauge is a sample of the meter load, in µs after at.
func gauge(id, resource string, after int64, volume float64) sample.Sample {
	return sample.Sample{
		ID: sample.ParseID(id), Name: "load", Kind: sample.Gauge, Unit: "%", Volume: sample.Float(volume),
		Resource: resource, Source: "openstack", Project: "p1", User: "u1", Time: at + after,
	}
}

func storeOf(t testing.TB, samples ...sample.Sample) store.Store {
	t.Helper()
	s := memory.New(func() time.Time { return recordedAt })
	add(t, s, samples...)
	return s
}

// get asks and returns the status and the body.
func get(h http.Handler, path string) (int, string) {
	w := ask(h, http.MethodGet, path, nil, "")
	return w.Code, w.Body.String()
}

// fault returns the text of an error object.
func fault(t *testing.T, w *httptest.ResponseRecorder) string {
	t.Helper()
	var body struct {
		Message struct {
			Code  string  `json:"faultcode"`
			Text  string  `json:"faultstring"`
			Debug *string `json:"debuginfo"`
		} `json:"error_message"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatalf("%v: %s", err, w.Body)
	}
	want := "Client"
	if w.Code >= 500 {
		want = "Server"
	}
	if body.Message.Code != want {
		t.Errorf("got faultcode %q for status %d", body.Message.Code, w.Code)
	}
	if kind := w.Header().Get("Content-Type"); kind != "application/json" {
		t.Errorf("got content type %q for an error", kind)
	}
	return body.Message.Text
}

func TestRequestsThatAreRefused(t *testing.T) {
	h := api.New(storeOf(t, gauge("a", "vm-1", 0, 1)), api.Options{})
	json := map[string]string{"Content-Type": "application/json"}
	for name, tc := range map[string]struct {
		method, path string
		headers      map[string]string
		body         string
		status       int
		text         string
	}{
		"unknown path":                   {path: "/v3/meters", status: 404, text: "The resource could not be found."},
		"the version itself":             {path: "/v2/", status: 404, text: "The resource could not be found."},
		"file extension":                 {path: "/v2/samples.json", status: 404, text: "The resource could not be found."},
		"below a sample":                 {path: "/v2/samples/a/b", status: 404, text: "The resource could not be found."},
		"below capabilities":             {path: "/v2/capabilities/x", status: 404, text: "The resource could not be found."},
		"below a meter":                  {path: "/v2/meters/load/median", status: 405, text: "A meter has statistics and nothing else below it."},
		"POST to a list":                 {method: "POST", path: "/v2/samples", headers: json, body: "[]", status: 405, text: "The method POST is not allowed for this resource."},
		"text alone is accepted":         {path: "/v2/samples", headers: map[string]string{"Accept": "text/plain, application/binary; q=0.8"}, status: 406, text: "The only media type of this API is application/json."},
		"JSON is accepted with q=0":      {path: "/v2/samples", headers: map[string]string{"Accept": "application/json; q=0"}, status: 406, text: "The only media type of this API is application/json."},
		"XML":                            {path: "/v2/samples", headers: map[string]string{"Accept": "application/xml"}, status: 406, text: "The only media type of this API is application/json."},
		"body of another type":           {path: "/v2/samples", headers: map[string]string{"Content-Type": "text/plain"}, body: "{}", status: 415, text: "Unknown mimetype: text/plain"},
		"body that is no JSON":           {path: "/v2/samples", headers: json, body: "{", status: 400, text: "Request is not in valid JSON format"},
		"body that is two":               {path: "/v2/samples", headers: json, body: "{} {}", status: 400, text: "Request is not in valid JSON format"},
		"body that is large":             {path: "/v2/samples", headers: json, body: `{"limit":"` + strings.Repeat("1", 1<<20) + `"}`, status: 413, text: "The request body is larger than 1048576 bytes."},
		"unknown argument":               {path: "/v2/samples?limits=1", status: 400, text: `Unknown argument: "limits"`},
		"unknown argument in the body":   {path: "/v2/samples", headers: json, body: `{"limits":1}`, status: 400, text: `Unknown argument: "limits"`},
		"argument of a single resource":  {path: "/v2/resources/vm-1?limit=1", status: 400, text: `Unknown argument: "limit"`},
		"query for a single sample":      {path: "/v2/samples/a?q.field=user&q.value=u1", status: 400, text: `Unknown argument: "q.field"`},
		"argument of a list of meters":   {path: "/v2/meters?extra=1", status: 400, text: `Unknown argument: "extra"`},
		"unknown attribute":              {path: "/v2/samples?q.feild=user", status: 400, text: "Unknown attribute for argument q: feild"},
		"unknown attribute in the body":  {path: "/v2/samples", headers: json, body: `{"q":[{"feild":"user"}]}`, status: 400, text: "Unknown attribute for argument q: feild"},
		"query that is no list":          {path: "/v2/samples", headers: json, body: `{"q":{"field":"user","value":"u1"}}`, status: 400, text: "Invalid input for field/attribute q. Value: '{'field': 'user', 'value': 'u1'}'. It must be a list of objects."},
		"value that is no scalar":        {path: "/v2/samples", headers: json, body: `{"q":[{"field":"user","value":["u1"]}]}`, status: 400, text: "Invalid input for field/attribute value. Value: '['u1']'. It must be text or a number."},
		"limit twice":                    {path: "/v2/samples?limit=1&limit=1", status: 400, text: "Invalid input for field/attribute limit. Value: '['1', '1']'. It must be given once."},
		"limit in the query and body":    {path: "/v2/samples?limit=1", headers: json, body: `{"limit":2}`, status: 400, text: "Invalid input for field/attribute limit. Value: '['1', '2']'. It must be given once."},
		"limit that is too large":        {path: "/v2/samples?limit=9223372036854775808", status: 400, text: "Invalid input for field/attribute limit. Value: '9223372036854775808'. unable to convert to int. Error: the number is too large"},
		"limit of zero":                  {path: "/v2/resources?limit=0", status: 400, text: "Limit must be positive"},
		"meter_links that are no number": {path: "/v2/resources?meter_links=many", status: 400, text: "Invalid input for field/attribute meter_links. Value: 'many'. unable to convert to int. Error: invalid literal for int() with base 10: 'many'"},
		"metadata of another form":       {path: "/v2/samples?metadata=xml", status: 400, text: "Invalid input for field/attribute metadata. Value: 'xml'. It can be raw."},
		"broken escape in the query":     {path: "/v2/samples?limit=%zz", status: 400, text: `The query string is not escaped as it must be: invalid URL escape "%zz"`},
		"broken escape within an id":     {path: "/v2/resources/a%252Fb%25zz", status: 400, text: `The path is not escaped as it must be: invalid URL escape "%zz"`},
		"term without a value":           {path: "/v2/samples?q.field=user&q.field=project&q.value=u1", status: 400, text: "Invalid input for field/attribute q.value. Value: 'None'. Mandatory field missing."},
		"term without a field":           {path: "/v2/samples?q.op=eq&q.value=u1", status: 400, text: "Invalid input for field/attribute q.field. Value: 'None'. Mandatory field missing."},
		"limit as a field":               {path: "/v2/meters?q.field=limit&q.value=1", status: 400, text: `Unknown argument: "limit": unrecognized field in query: [<Query 'limit' eq '1' Unset>], valid keys: ['project', 'resource', 'source', 'unique', 'user']`},
		"search_offset of meters":        {path: "/v2/meters?q.field=search_offset&q.value=1", status: 400, text: `Unknown argument: "search_offset": not valid for this resource`},
		"search_offset that is no int":   {path: "/v2/samples?q.field=search_offset&q.value=x&q.field=timestamp&q.op=gt&q.value=2026-01-01&q.op=eq", status: 400, text: "Invalid input for field/attribute op. Value: 'gt'. unimplemented operator for search_offset"},
		"search_offset that is text":     {path: "/v2/samples?q.field=search_offset&q.value=x", status: 400, text: "Invalid input for field/attribute search_offset. Value: 'x'. unable to convert to int. Error: invalid literal for int() with base 10: 'x'"},
		"search_offset of eternity":      {path: "/v2/samples?q.field=search_offset&q.value=1000000001", status: 400, text: "Invalid input for field/attribute search_offset. Value: '1000000001'. It must be between -1000000000 and 1000000000 minutes."},
		"metadata without a key":         {path: "/v2/samples?q.field=metadata.&q.value=1", status: 400, text: `Unknown argument: "metadata.": a key of at most 1024 bytes must follow the dot`},
		"boolean that is none":           {path: "/v2/samples?q.field=metadata.x&q.value=maybe&q.type=boolean", status: 400, text: "Unable to convert the value maybe to the expected data type boolean."},
		"float that is infinite":         {path: "/v2/samples?q.field=metadata.x&q.value=inf&q.type=float", status: 400, text: "Unable to convert the value inf to the expected data type float."},
		"time that is none":              {path: "/v2/samples?q.field=metadata.x&q.value=noon&q.type=datetime", status: 400, text: "Unable to convert the value noon to the expected data type datetime."},
		"two unknown groups":             {path: "/v2/meters/load/statistics?groupby=zz&groupby=user&groupby=user_id", status: 400, text: `Unknown argument: "{'user', 'zz'}": Invalid groupby fields`},
		"period of eternity":             {path: "/v2/meters/load/statistics?period=252288000001", status: 400, text: "Invalid period 252288000001: it is at most 252288000000 seconds"},
		"period that is no number":       {path: "/v2/meters/load/statistics?period=x", status: 400, text: "Invalid input for field/attribute period. Value: 'x'. unable to convert to int. Error: invalid literal for int() with base 10: 'x'"},
		"unknown aggregate":              {path: "/v2/meters/load/statistics?aggregate.func=quartile", status: 400, text: "Invalid aggregation function: quartile"},
		"parameter that is not used":     {path: "/v2/meters/load/statistics?aggregate.func=avg&aggregate.param=x", status: 400, text: "Bad aggregate: avg.x"},
		"aggregate without a function":   {path: "/v2/meters/load/statistics?aggregate.param=x", status: 400, text: "Invalid input for field/attribute aggregate.func. Value: 'None'. Mandatory field missing."},
		"statistics have no limit":       {path: "/v2/meters/load/statistics?limit=1", status: 400, text: `Unknown argument: "limit"`},
		"gaps from no time":              {path: "/v2/gaps?start=noon", status: 400, text: "Invalid input for field/attribute start. Value: 'noon'. invalid timestamp format"},
		"sample that is none":            {path: "/v2/samples/zz", status: 404, text: "Sample zz Not Found"},
		"resource that is none":          {path: "/v2/resources/a%2Fb", status: 404, text: "Resource a/b Not Found"},
	} {
		t.Run(name, func(t *testing.T) {
			method := tc.method
			if method == "" {
				method = http.MethodGet
			}
			w := ask(h, method, tc.path, tc.headers, tc.body)
			if got := fault(t, w); w.Code != tc.status || got != tc.text {
				t.Errorf("got %d %s\nwant %d %s", w.Code, got, tc.status, tc.text)
			}
			if got := w.Header().Values("Allow"); w.Code == 405 && len(got) != 1 {
				t.Errorf("got Allow %q", got)
			}
		})
	}
}

// crowded is a store whose statistics have too many rows.
type crowded struct{ store.Store }

func (crowded) Statistics(_ context.Context, q store.StatisticsQuery) ([]store.Statistics, error) {
	if q.MaxRows <= 0 {
		return nil, errors.New("the rows are not bounded")
	}
	return nil, store.ErrTooManyRows
}

func TestLargeRequestsAreBounded(t *testing.T) {
	h := api.New(crowded{storeOf(t)}, api.Options{})
	terms := func(n int) string {
		return `{"q": [` + strings.TrimSuffix(strings.Repeat(`{"field": "metadata.k", "value": "x"},`, n), ",") + `]}`
	}
	for name, tc := range map[string]struct {
		path, body string
		text       string
	}{
		"terms of a query":        {"/v2/samples", terms(1001), "1001 terms in a query, at most 1000 are taken."},
		"terms of events":         {"/v2/events", terms(10_000), "10000 terms in a query, at most 1000 are taken."},
		"a long key":              {"/v2/samples?q.value=1&q.field=metadata." + strings.Repeat("k", 1025), "", `Unknown argument: "metadata.kkk`},
		"an unknown field":        {"/v2/samples?q.value=1&q.field=" + strings.Repeat("<b>", 100_000), "", `Unknown argument: "<b><b>`},
		"an unknown argument":     {"/v2/samples?" + strings.Repeat("x", 300_000), "", `Unknown argument: "xxx`},
		"a value of a wrong type": {"/v2/samples?q.field=metadata.x&q.type=integer&q.value=" + strings.Repeat("9", 300_000), "", "Unable to convert the value 999"},
		"a list of limits":        {"/v2/samples?" + strings.Repeat("limit=1&", 50_000), "", "Invalid input for field/attribute limit. Value: '['1', '1'"},
		"groups":                  {"/v2/meters/x/statistics?" + "groupby=metadata.a" + groupsOf(33), "", "34 fields to group by, at most 32 are taken."},
		"groups that are none":    {"/v2/meters/x/statistics?groupby=" + strings.Repeat("x", 300_000), "", `Unknown argument: "{'xxx`},
		"rows":                    {"/v2/meters/x/statistics?period=1", "", "The statistics have more than 600000 rows: ask for longer periods, fewer groups or less time."},
	} {
		t.Run(name, func(t *testing.T) {
			w := ask(h, http.MethodGet, tc.path, eventAdmin, tc.body)
			if got := fault(t, w); w.Code != http.StatusBadRequest || !strings.HasPrefix(got, tc.text) {
				t.Errorf("got %d %.300s\nwant 400 %s", w.Code, got, tc.text)
			}
			if w.Body.Len() > 60_000 { // an escaped < has six bytes
				t.Errorf("the answer has %d bytes", w.Body.Len())
			}
		})
	}
}

// groupsOf asks to group by so many keys.
func groupsOf(n int) (args string) {
	for i := range n {
		args += fmt.Sprintf("&groupby=metadata.k%d", i)
	}
	return args
}

func TestHeadersOfAnswers(t *testing.T) {
	h := api.New(storeOf(t), api.Options{})
	id := regexp.MustCompile(`^req-[0-9a-f-]{36}$`)
	for path, kind := range map[string]string{
		"/": "application/json", "/v2/meters": "application/json; charset=UTF-8",
		"/v2/zz": "application/json", "/healthcheck": "text/plain; charset=UTF-8",
	} {
		w := ask(h, http.MethodGet, path, map[string]string{"Accept": "text/plain, application/json; q=0.8"}, "")
		if got := w.Header().Get("Content-Type"); got != kind {
			t.Errorf("%s: got content type %q, want %q", path, got, kind)
		}
		if got := w.Header().Get("x-openstack-request-id"); !id.MatchString(got) {
			t.Errorf("%s: got request id %q", path, got)
		}
	}
	w := ask(h, http.MethodPut, "/v2/meters", nil, "")
	if got := w.Header().Get("Allow"); got != "GET" {
		t.Errorf("got Allow %q, want GET", got)
	}
	if w := ask(h, http.MethodGet, "/healthcheck", nil, ""); w.Body.String() != "OK" {
		t.Errorf("got health %q, want OK", w.Body)
	}
}

func TestVersionNamesTheAddressThatWasAsked(t *testing.T) {
	h := api.New(storeOf(t), api.Options{})
	w := ask(h, http.MethodGet, "/", map[string]string{
		"X-Forwarded-Proto": "https", "X-Forwarded-Host": "cloud.example:443, proxy", "X-Forwarded-Prefix": "/telemetry/",
	}, "")
	if want := `"href": "https://cloud.example:443/telemetry/v2"`; !strings.Contains(w.Body.String(), want) {
		t.Errorf("got %s, want it to hold %s", w.Body, want)
	}
}

// TestBelowAPrefix holds that everything is below the prefix as well, and that
// links lead there.
func TestBelowAPrefix(t *testing.T) {
	h := api.New(storeOf(t, gauge("a", "vm-1", 0, 1)), api.Options{Prefix: "/telemetry/"})
	link := regexp.MustCompile(`"href": "(http://api.example[^"]*)"`)
	for path, want := range map[string]string{
		"/telemetry":                          "http://api.example/telemetry/v2",
		"/telemetry/":                         "http://api.example/telemetry/v2",
		"/":                                   "http://api.example/v2",
		"/telemetry/v2/resources":             "http://api.example/telemetry/v2/resources/vm-1",
		"/telemetry/v2/resources/vm-1?":       "http://api.example/telemetry/v2/resources/vm-1",
		"/v2/resources":                       "http://api.example/v2/resources/vm-1",
		"/telemetry/v2":                       "",
		"/telemetry/telemetry/v2/resources":   "",
		"/telemetryv2/resources":              "",
		"/telemetry/v2/meters/load/telemetry": "",
	} {
		status, body := get(h, path)
		got := ""
		if m := link.FindStringSubmatch(body); m != nil {
			got = m[1]
		}
		if got != want || (status == http.StatusOK) != (want != "") {
			t.Errorf("%s: got %d %s, want the link %s", path, status, body, want)
		}
	}
}

// ids returns the ids of a list of samples.
func ids(t *testing.T, body string) []string {
	t.Helper()
	var list []struct {
		ID    string `json:"id"`
		OldID string `json:"message_id"`
	}
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	all := []string{}
	for _, s := range list {
		all = append(all, s.ID+s.OldID)
	}
	return all
}

func TestQueriesSelect(t *testing.T) {
	with := func(s sample.Sample, change func(*sample.Sample)) sample.Sample { change(&s); return s }
	h := api.New(storeOf(
		t,
		with(gauge("a", "vm-1", 0, 1), func(s *sample.Sample) {
			s.Metadata = []byte(`{"n":2,"f":2.5,"b":true,"s":"2","t":"2026-01-01T09:30:00Z","l":["a",1],"o":null,"deep":{"er":{"x":"y"}},"empty":""}`)
		}),
		with(gauge("b", "vm-2", 10*second, 2), func(s *sample.Sample) { s.User, s.Project = "", "" }),
		with(gauge("c", "vm-2", 10*second, 3), func(s *sample.Sample) { s.Name, s.Source = "other", "lab" }),
		gauge("d", "vm-3", 20*second, 4),
	), api.Options{})
	for name, tc := range map[string]struct{ path, want string }{
		"newest first, equal times as stored":     {"/v2/samples", "d b c a"},
		"old and new names":                       {"/v2/meters/load", "d b a"},
		"a meter in the query is overridden":      {"/v2/meters/load?q.field=meter&q.value=other", "d b a"},
		"a meter in the query":                    {"/v2/samples?q.field=meter&q.value=other", "c"},
		"an id in the query":                      {"/v2/samples?q.field=message_id&q.value=b", "b"},
		"indexed terms":                           {"/v2/samples?q[1].field=source&q[1].value=lab&q[0].field=resource&q[0].value=vm-2", "c"},
		"terms are in the body":                   {`/v2/samples {"q":[{"field":"resource","value":"vm-2"}],"limit":1}`, "b"},
		"terms are in both":                       {`/v2/samples?q.field=resource&q.value=vm-2 {"q":[{"field":"source","value":"lab"}]}`, "c"},
		"the last of two equal terms holds":       {"/v2/samples?q.field=resource&q.value=vm-2&q.field=resource_id&q.value=vm-1", "a"},
		"empty values ask for nothing":            {"/v2/samples?q.field=resource&q.value=&q.op=&q.type=", "d b c a"},
		"an empty last value takes the term back": {"/v2/samples?q.field=resource&q.value=vm-2&q.field=resource_id&q.value=", "d b c a"},
		"None is not known":                       {"/v2/samples?q.field=user&q.value=None", "b"},
		"no project":                              {"/v2/samples?q.field=project_id&q.value=None", "b"},
		"strictly after":                          {"/v2/samples?q.field=timestamp&q.op=gt&q.value=2026-01-01T10:00:10", "d"},
		"at or after":                             {"/v2/samples?q.field=timestamp&q.op=ge&q.value=2026-01-01T10:00:10", "d b c"},
		"strictly before":                         {"/v2/samples?q.field=timestamp&q.op=lt&q.value=2026-01-01T10:00:10", "a"},
		"at or before":                            {"/v2/samples?q.field=timestamp&q.op=le&q.value=2026-01-01T10:00:10", "b c a"},
		"a zone is applied":                       {"/v2/samples?q.field=timestamp&q.op=lt&q.value=2026-01-01T12:00:10%2B02:00", "a"},
		"an offset widens both sides":             {"/v2/samples?q.field=timestamp&q.op=ge&q.value=2026-01-01T10:01:10&q.field=timestamp&q.op=lt&q.value=2026-01-01T09:59:20&q.field=search_offset&q.op=eq&q.value=1", "b c"},
		"the last lower bound holds":              {"/v2/samples?q.field=timestamp&q.op=ge&q.value=2026-01-01T10:00:00&q.field=timestamp&q.op=gt&q.value=2026-01-01T10:00:10", "d"},
		"a number":                                {"/v2/samples?q.field=metadata.n&q.value=2", "a"},
		"integer and float are numbers":           {"/v2/samples?q.field=metadata.n&q.value=2.0&q.type=float", "a"},
		"text is no number":                       {"/v2/samples?q.field=metadata.n&q.value=2&q.type=string", ""},
		"a text of digits":                        {"/v2/samples?q.field=metadata.s&q.value='2'", "a"},
		"the long name":                           {"/v2/samples?q.field=resource_metadata.f&q.value=2.5", "a"},
		"true":                                    {"/v2/samples?q.field=metadata.b&q.value=True", "a"},
		"true is not 1":                           {"/v2/samples?q.field=metadata.b&q.value=1", ""},
		"a boolean in the body":                   {`/v2/samples {"q":[{"field":"metadata.b","value":true}]}`, "a"},
		"yes is true where it is typed":           {"/v2/samples?q.field=metadata.b&q.value=YES&q.type=boolean", "a"},
		"a time":                                  {"/v2/samples?q.field=metadata.t&q.value=2026-01-01T10:30%2B01:00&q.type=datetime", "a"},
		"an element":                              {"/v2/samples?q.field=metadata.l[1]&q.value=1", "a"},
		"a list":                                  {"/v2/samples?q.field=metadata.l&q.value=['a',+1]", "a"},
		"null":                                    {"/v2/samples?q.field=metadata.o&q.value=None", "a"},
		"a path":                                  {"/v2/samples?q.field=metadata.deep.er.x&q.value=y", "a"},
		"empty text":                              {"/v2/samples?q.field=metadata.empty&q.value=", "a"},
		"unknown keys select nothing":             {"/v2/samples?q.field=metadata.zz&q.value=None", ""},
		"types of other fields are ignored":       {"/v2/samples?q.field=resource&q.value=vm-1&q.type=blob", "a"},
		"limit after the filter":                  {"/v2/samples?limit=2&q.field=meter&q.value=load", "d b"},
	} {
		t.Run(name, func(t *testing.T) {
			path, body, _ := strings.Cut(tc.path, " ")
			w := ask(h, http.MethodGet, path, nil, body)
			if w.Code != http.StatusOK {
				t.Fatalf("got status %d: %s", w.Code, w.Body)
			}
			if got := strings.Join(ids(t, w.Body.String()), " "); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestIdsMayHoldSlashes(t *testing.T) {
	h := api.New(storeOf(t, gauge("x/y", "a/b", 0, 1)), api.Options{})
	for _, path := range []string{"/v2/resources/a%2Fb", "/v2/resources/a%252Fb", "/v2/resources/a%252fb", "/v2/samples/x%2Fy"} {
		if status, body := get(h, path); status != http.StatusOK {
			t.Errorf("%s: got %d %s", path, status, body)
		}
	}
	_, body := get(h, "/v2/resources/a%2Fb")
	for _, want := range []string{`"http://api.example/v2/resources/a%2Fb"`, `"http://api.example/v2/meters/load?q.field=resource_id&q.value=a%2Fb"`} {
		if !strings.Contains(body, want) {
			t.Errorf("got %s, want it to hold %s", body, want)
		}
	}
}

func TestSamplesPrint(t *testing.T) {
	big := gauge("11111111-1111-8111-8111-111111110000", "vm-1", 500_000, 0)
	big.Volume, big.User, big.Origin, big.Incarnation = sample.Uint(1<<64-1), "", sample.Walk, 0xabc
	big.Metadata = []byte(`{"z":[true,{"k":"it's"}],"a":{"b":{"c":1},"d.e":null},"f":1.50,"s":"ü\n","i":-0,"big":12345678901234567890}`)
	h := api.New(storeOf(t, big), api.Options{})
	const flat = `"metadata": {"a.b:c": "1", "a.d:e": "None", "big": "12345678901234567890", "f": "1.5", "i": "0", "s": "ü\n", "z": "[True, {'k': \"it's\"}]"}`
	const start = `{"id": "11111111-1111-8111-8111-111111110000", "meter": "load", "type": "gauge", "unit": "%", "volume": 18446744073709551615.0, ` +
		`"user_id": null, "project_id": "p1", "resource_id": "vm-1", "source": "openstack", ` +
		`"timestamp": "2026-01-01T10:00:00.500000", "recorded_at": "2026-01-01T12:00:00.130802", `
	for path, want := range map[string]string{
		"/v2/samples": "[" + start + flat + "}]",
		"/v2/samples/11111111-1111-8111-8111-111111110000":            start + flat + "}",
		"/v2/samples/11111111-1111-8111-8111-111111110000?extra=true": start + flat + `, "origin": "walk", "incarnation": "0000000000000abc"}`,
		"/v2/samples?metadata=raw&extra=no":                           "[" + start + `"metadata": ` + string(big.Metadata) + "}]",
	} {
		if status, got := get(h, path); status != http.StatusOK || got != want {
			t.Errorf("%s: got %d %s\nwant %s", path, status, got, want)
		}
	}
}

func TestMetadataThatAreNoObjectAreEmpty(t *testing.T) {
	for _, doc := range []string{"{broken", `[1]`, `"text"`, "null", "{} {}", "{\"a\":1,}"} {
		s := gauge("a", "vm-1", 0, 1)
		s.Metadata = []byte(doc)
		h := api.New(storeOf(t, s), api.Options{})
		for _, path := range []string{"/v2/samples/a", "/v2/samples/a?metadata=raw", "/v2/resources/vm-1?metadata=raw"} {
			if status, got := get(h, path); status != http.StatusOK || !strings.Contains(got, `"metadata": {}`) {
				t.Errorf("%s with %s: got %d %s", path, doc, status, got)
			}
		}
	}
}

func TestMetersPrint(t *testing.T) {
	h := api.New(storeOf(t, gauge("a", "vm-1", 0, 1), gauge("b", "vm-2", 0, 1)), api.Options{})
	for path, want := range map[string]string{
		"/v2/meters?limit=1":    `[{"name": "load", "type": "gauge", "unit": "%", "resource_id": "vm-1", "project_id": "p1", "user_id": "u1", "source": "openstack", "meter_id": "dm0tMStsb2Fk"}]`,
		"/v2/meters?unique=Yes": `[{"name": "load", "type": "gauge", "unit": "%", "resource_id": null, "project_id": null, "user_id": null, "source": null, "meter_id": "Tm9uZStsb2Fk"}]`,
	} {
		if _, got := get(h, path); got != want {
			t.Errorf("%s: got %s\nwant %s", path, got, want)
		}
	}
}

func TestResourcesPrint(t *testing.T) {
	h := api.New(storeOf(t, gauge("a", "vm-1", 0, 1), gauge("b", "vm-1", 10*second, 1)), api.Options{})
	const start = `[{"resource_id": "vm-1", "project_id": "p1", "user_id": "u1", "source": "openstack", "first_sample_timestamp": `
	for path, want := range map[string]string{
		"/v2/resources?meter_links=0":                                         start + `"2026-01-01T10:00:00", "last_sample_timestamp": "2026-01-01T10:00:10", "metadata": {}, "links": [{"href": "http://api.example/v2/resources/vm-1", "rel": "self"}]}]`,
		"/v2/resources?q.field=timestamp&q.op=gt&q.value=2026-01-01T10:00:00": start + `"2026-01-01T10:00:10", "last_sample_timestamp": "2026-01-01T10:00:10", "metadata": {}, "links": [{"href": "http://api.example/v2/resources/vm-1", "rel": "self"}, {"href": "http://api.example/v2/meters/load?q.field=resource_id&q.value=vm-1", "rel": "load"}]}]`,
	} {
		if _, got := get(h, path); got != want {
			t.Errorf("%s: got %s\nwant %s", path, got, want)
		}
	}
}

func TestStatisticsPrint(t *testing.T) {
	exact := gauge("d", "vm-9", 0, 0)
	exact.Name, exact.Volume = "exact", sample.Uint(1<<53+1)
	h := api.New(storeOf(
		t, gauge("a", "vm-1", 0, 1), gauge("b", "vm-1", 600*second, 3), gauge("c", "vm-2", 601*second, 5), exact,
	), api.Options{})
	row := func(group, aggregates, duration, start, end string, period int, from, to string) string {
		return fmt.Sprintf(`{"groupby": %s, "unit": "%%", %s, "duration": %s, "duration_start": %s, "duration_end": %s, "period": %d, "period_start": "%s", "period_end": "%s"}`,
			group, aggregates, duration, start, end, period, from, to)
	}
	const ten, tenPast, tenPast1, twenty = "2026-01-01T10:00:00", "2026-01-01T10:10:00", "2026-01-01T10:10:01", "2026-01-01T10:20:00"
	one := `"min": 1.0, "max": 1.0, "avg": 1.0, "sum": 1.0, "count": 1`
	two := `"min": 3.0, "max": 5.0, "avg": 4.0, "sum": 8.0, "count": 2`
	all := `"min": 1.0, "max": 5.0, "avg": 3.0, "sum": 9.0, "count": 3`
	for name, tc := range map[string]struct{ path, want string }{
		"all in one": {"/v2/meters/load/statistics", row("null", all, "601.0", `"`+ten+`"`, `"`+tenPast1+`"`, 0, ten, tenPast1)},
		"a sample on the border of the last period": {
			"/v2/meters/load/statistics?period=600",
			row("null", one, "0.0", `"`+ten+`"`, `"`+ten+`"`, 600, ten, tenPast) + ", " +
				row("null", two, "1.0", `"`+tenPast+`"`, `"`+tenPast1+`"`, 600, tenPast, twenty),
		},
		"periods start at the lower bound": {
			"/v2/meters/load/statistics?period=1200&q.field=timestamp&q.op=gt&q.value=2026-01-01T09:50:00",
			row("null", one, "0.0", `"`+ten+`"`, `"`+ten+`"`, 1200, "2026-01-01T09:50:00", tenPast) + ", " +
				row("null", two, "1.0", `"`+tenPast+`"`, `"`+tenPast1+`"`, 1200, tenPast, "2026-01-01T10:30:00"),
		},
		"groups": {
			"/v2/meters/load/statistics?groupby=resource_id&groupby=resource_id&aggregate.func=count&aggregate.param=",
			row(`{"resource_id": "vm-1"}`, `"count": 2, "aggregate": {"count": 2.0}`, "600.0", `"`+ten+`"`, `"`+tenPast+`"`, 0, ten, tenPast) + ", " +
				row(`{"resource_id": "vm-2"}`, `"count": 1, "aggregate": {"count": 1.0}`, "0.0", `"`+tenPast1+`"`, `"`+tenPast1+`"`, 0, tenPast1, tenPast1),
		},
		"samples outside of the bounds themselves": {
			"/v2/meters/load/statistics?q.field=timestamp&q.op=le&q.value=2026-01-01T09:59:00&q.field=search_offset&q.op=eq&q.value=1",
			row("null", one, "null", "null", "null", 0, ten, ten),
		},
		"metadata that no sample has": {"/v2/meters/load/statistics?groupby=metadata.zz", ""},
		"no sample":                   {"/v2/meters/zz/statistics", ""},
		"aggregates in the body": {
			`/v2/meters/load/statistics {"aggregate":[{"func":"stddev"},{"func":"cardinality","param":"resource_id"}],"period":0}`,
			row("null", `"aggregate": {"stddev": 1.632993161855452, "cardinality/resource_id": 2.0}`, "601.0", `"`+ten+`"`, `"`+tenPast1+`"`, 0, ten, tenPast1),
		},
		"integers stay exact": {
			"/v2/meters/exact/statistics",
			row("null", `"min": 9007199254740993.0, "max": 9007199254740993.0, "avg": 9007199254740992.0, "sum": 9007199254740992.0, "count": 1`, "0.0", `"`+ten+`"`, `"`+ten+`"`, 0, ten, ten),
		},
	} {
		t.Run(name, func(t *testing.T) {
			path, body, _ := strings.Cut(tc.path, " ")
			w := ask(h, http.MethodGet, path, nil, body)
			if got := w.Body.String(); w.Code != http.StatusOK || got != "["+tc.want+"]" {
				t.Errorf("got %d %s\nwant [%s]", w.Code, got, tc.want)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	samples := make([]sample.Sample, 120)
	for i := range samples {
		samples[i] = gauge(fmt.Sprint(i), fmt.Sprintf("vm-%03d", i), int64(i), 1)
	}
	s := storeOf(t, samples...)
	for name, tc := range map[string]struct {
		o    api.Options
		path string
		want int
	}{
		"100 unless told otherwise":        {api.Options{}, "/v2/samples", 100},
		"meters too":                       {api.Options{}, "/v2/meters", 100},
		"resources too":                    {api.Options{}, "/v2/resources", 100},
		"told otherwise by the request":    {api.Options{}, "/v2/samples?limit=110", 110},
		"told otherwise by the operator":   {api.Options{DefaultLimit: 7}, "/v2/samples", 7},
		"bounded by the operator":          {api.Options{MaxLimit: 20}, "/v2/samples?limit=110", 20},
		"the bound also holds by default":  {api.Options{MaxLimit: 20}, "/v2/resources", 20},
		"statistics have none":             {api.Options{DefaultLimit: 7}, "/v2/meters/load/statistics?groupby=resource_id", 120},
		"limits may be larger than needed": {api.Options{}, "/v2/samples?limit=9223372036854775807", 120},
	} {
		t.Run(name, func(t *testing.T) {
			_, body := get(api.New(s, tc.o), tc.path)
			var list []any
			if err := json.Unmarshal([]byte(body), &list); err != nil {
				t.Fatal(err)
			}
			if len(list) != tc.want {
				t.Errorf("got %d entries, want %d", len(list), tc.want)
			}
		})
	}
}

func TestProjectsSeeTheirOwn(t *testing.T) {
	mine, theirs, moved := gauge("mine", "vm-1", 0, 1), gauge("theirs", "vm-2", 0, 9), gauge("moved", "vm-1", second, 5)
	theirs.Project, moved.Project = "p2", "p2"
	moved.Metadata, moved.Source = []byte(`{"secret":"of p2"}`), "other"
	// A resource that was theirs before it was mine.
	before, after := gauge("before", "vm-3", 0, 1), gauge("after", "vm-3", second, 1)
	before.Project, before.Name, after.Name = "p2", "theirs", "mine"
	h := api.New(storeOf(t, mine, theirs, moved, before, after), api.Options{})
	p1 := map[string]string{"X-Roles": "member, reader", "X-Project-Id": "p1", "X-User-Id": "u1"}
	admin := map[string]string{"X-Roles": "Admin", "X-Project-Id": "p1"}
	for name, tc := range map[string]struct {
		headers map[string]string
		path    string
		status  int
		has     string
		lacks   string
	}{
		"samples":                       {p1, "/v2/samples", 200, `"mine"`, "p2"},
		"samples of a meter":            {p1, "/v2/meters/load", 200, `"mine"`, "p2"},
		"meters by their newest owner":  {p1, "/v2/meters", 200, `"name": "mine"`, "load"},
		"statistics":                    {p1, "/v2/meters/load/statistics", 200, `"max": 1.0`, "9.0"},
		"resources":                     {p1, "/v2/resources", 200, `"vm-1"`, "p2"},
		"no link to another's meter":    {p1, "/v2/resources", 200, `/v2/meters/mine?`, "theirs"},
		"nor of a resource":             {p1, "/v2/resources/vm-3", 200, `/v2/meters/mine?`, "theirs"},
		"nor its source":                {p1, "/v2/resources/vm-1", 200, `"source": null`, "other"},
		"a resource":                    {p1, "/v2/resources/vm-1", 200, `"vm-1"`, "p2"},
		"a resource of another project": {p1, "/v2/resources/vm-2", 404, "Resource vm-2 Not Found", "p2"},
		"a sample":                      {p1, "/v2/samples/mine", 200, `"mine"`, "p2"},
		"a sample of another project":   {p1, "/v2/samples/theirs", 404, "Sample theirs Not Found", "p2"},
		"asking for the own project":    {p1, "/v2/samples?q.field=project&q.value=p1", 200, `"mine"`, "p2"},
		"asking for another project":    {p1, "/v2/samples?q.field=project&q.value=p2", 401, "Not Authorized to access project p2", "secret"},
		"asking for both":               {p1, "/v2/samples?q.field=project_id&q.value=p2&q.field=project&q.value=p1", 401, "Not Authorized to access project p2", "secret"},
		"asking for no project":         {p1, "/v2/samples?q.field=project&q.value=None", 401, "Not Authorized to access project None", "secret"},
		"asking for an empty project":   {p1, "/v2/samples?q.field=project&q.value=", 200, `"mine"`, "p2"},
		"gaps are for admins":           {p1, "/v2/gaps", 403, "RBAC Authorization Failed", "["},
		"a user without a project":      {map[string]string{"X-User-Id": "u1"}, "/v2/samples", 403, "RBAC Authorization Failed", "mine"},
		"a role without a project":      {map[string]string{"X-Roles": "member"}, "/v2/samples/mine", 403, "RBAC Authorization Failed", "\"mine\""},
		"an admin sees all":             {admin, "/v2/samples", 200, `"theirs"`, "zz"},
		"an admin asks for any project": {admin, "/v2/samples?q.field=project&q.value=p2", 200, `"theirs"`, `"mine"`},
		"an admin sees gaps":            {admin, "/v2/gaps", 200, "[]", "zz"},
		"nobody said who: all":          {nil, "/v2/samples", 200, `"theirs"`, "zz"},
		"capabilities are for all":      {map[string]string{"X-User-Id": "u1"}, "/v2/capabilities", 200, `"statistics:groupby": true`, "zz"},
	} {
		t.Run(name, func(t *testing.T) {
			w := ask(h, http.MethodGet, tc.path, tc.headers, "")
			if body := w.Body.String(); w.Code != tc.status || !strings.Contains(body, tc.has) || strings.Contains(strings.ReplaceAll(body, "project p2", ""), tc.lacks) {
				t.Errorf("got %d %s\nwant %d with %q, without %q", w.Code, body, tc.status, tc.has, tc.lacks)
			}
		})
	}
}

func TestAuthenticatorDecides(t *testing.T) {
	h := api.New(storeOf(t, gauge("a", "vm-1", 0, 1)), api.Options{Authenticate: func(r *http.Request) (api.Identity, error) {
		return api.Identity{User: "u", Project: r.Header.Get("X-Auth-Token")}, nil
	}})
	for token, want := range map[string]int{"p1": 1, "p2": 0} {
		w := ask(h, http.MethodGet, "/v2/samples", map[string]string{"X-Auth-Token": token, "X-Roles": "admin"}, "")
		if got := ids(t, w.Body.String()); len(got) != want {
			t.Errorf("%s: got %v, want %d samples", token, got, want)
		}
	}
}

func TestGapsAreListedNewestFirst(t *testing.T) {
	s := memory.New(time.Now)
	b := sample.NewBuilder()
	for i := range 3 {
		b.Gap(sample.Gap{Meter: "cpu", Resource: fmt.Sprintf("vm-%d", i), From: at + int64(i)*10*second, To: at + int64(i)*10*second + 5*second, Reason: "QEMU is stuck"})
	}
	batch := b.Build()
	batch.ID, batch.Node = sample.NewBatchID(recordedAt), "compute-1"
	if _, err := s.Append(context.Background(), []store.Received{{Batch: batch}}); err != nil {
		t.Fatal(err)
	}
	h := api.New(s, api.Options{})
	_, body := get(h, "/v2/gaps?limit=1")
	if want := `[{"meter": "cpu", "resource_id": "vm-2", "node": "compute-1", "from": "2026-01-01T10:00:20", "to": "2026-01-01T10:00:25", "reason": "QEMU is stuck"}]`; body != want {
		t.Errorf("got %s\nwant %s", body, want)
	}
	for query, want := range map[string]string{
		"": "vm-2 vm-1 vm-0", "?start=2026-01-01T10:00:06": "vm-2 vm-1", "?end=2026-01-01T10:00:19": "vm-1 vm-0",
		"?start=2026-01-01T10:00:06&end=2026-01-01T10:00:19": "vm-1",
	} {
		_, body := get(h, "/v2/gaps"+query)
		if got := regexp.MustCompile(`vm-\d`).FindAllString(body, -1); strings.Join(got, " ") != want {
			t.Errorf("%s: got %v, want %s", query, got, want)
		}
	}
}

// broken is a store that fails after some samples.
type broken struct {
	store.Store
	after int
	err   error
}

func (b broken) Samples(ctx context.Context, _ store.Filter, yield func(store.Sample) bool) error {
	for range b.after {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !yield(store.Sample{Sample: gauge("a", strings.Repeat("r", 200), 0, 1)}) {
			return nil
		}
	}
	return b.err
}

func TestAFailingStoreIsTheServersTrouble(t *testing.T) {
	h := api.New(broken{err: errors.New("disk on fire at /dev/sda")}, api.Options{})
	w := ask(h, http.MethodGet, "/v2/samples", nil, "")
	if got, want := fault(t, w), "The store could not answer; central's log has the reason."; w.Code != http.StatusInternalServerError || got != want {
		t.Errorf("got %d %s, want 500 %s", w.Code, got, want)
	}
}

func TestAnAnswerThatIsNotWholeIsSeenToBe(t *testing.T) {
	server := httptest.NewServer(api.New(broken{after: 1000, err: errors.New("disk on fire")}, api.Options{}))
	defer server.Close()
	resp, err := server.Client().Get(server.URL + "/v2/samples?limit=5000")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var list []any
	if err := json.NewDecoder(resp.Body).Decode(&list); err == nil {
		t.Errorf("got %d samples and no error", len(list))
	}
}

func TestAClientThatGoesAwayStopsTheStore(t *testing.T) {
	stopped := make(chan error, 1)
	h := api.New(broken{after: 1 << 62}, api.Options{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			_ = recover() // the handler may end the connection
			stopped <- r.Context().Err()
		}()
		h.ServeHTTP(w, r)
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+"/v2/samples?limit=9223372036854775807", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = resp.Body.Close()
	if err := <-stopped; err == nil {
		t.Error("the store was not told")
	}
}

func TestCheckListen(t *testing.T) {
	for addr, want := range map[string]bool{
		"127.0.0.1:8777": true, "localhost:8777": true, "[::1]:8777": true, "127.8.9.10:1": true,
		":8777": false, "0.0.0.0:8777": false, "[::]:8777": false, "192.0.2.1:8777": false, "cloud.example:8777": false,
	} {
		err := api.CheckListen(addr, false)
		if (err == nil) != want {
			t.Errorf("%s: got %v", addr, err)
		}
		if err := api.CheckListen(addr, true); err != nil {
			t.Errorf("%s with authentication: got %v", addr, err)
		}
	}
	if got, want := api.CheckListen("8777", true).Error(), "listen address 8777 is not host:port, such as 127.0.0.1:8777"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCapabilitiesSayWhatIsTrue(t *testing.T) {
	h := api.New(storeOf(t), api.Options{})
	_, body := get(h, "/v2/capabilities")
	var all map[string]map[string]bool
	if err := json.Unmarshal([]byte(body), &all); err != nil {
		t.Fatal(err)
	}
	for _, function := range []string{"max", "min", "sum", "avg", "count", "stddev", "cardinality"} {
		if !all["api"]["statistics:aggregation:selectable:"+function] {
			t.Errorf("%s is not among the capabilities", function)
		}
		path := "/v2/meters/x/statistics?aggregate.func=" + function
		if function == "cardinality" {
			path += "&aggregate.param=user_id"
		}
		if status, body := get(h, path); status != http.StatusOK {
			t.Errorf("%s: got %d %s", function, status, body)
		}
	}
	if got, want := slices.Sorted(maps.Keys(all)), []string{"alarm_storage", "api", "event_storage", "storage"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
