package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

func text(name, value string) sample.Trait {
	return sample.Trait{Name: name, Type: sample.TextTrait, Text: value}
}

// eventStore holds what the original's own tests have: three events a day
// apart, and some with owners.
func eventStore(t testing.TB) store.Store {
	t.Helper()
	var events []sample.Event
	day := time.Date(2013, 12, 31, 5, 0, 0, 0, time.UTC)
	for i, kind := range []string{"Foo", "Bar", "Zoo"} {
		at := day.AddDate(0, 0, i).UnixMicro()
		events = append(events, sample.Event{
			ID: fmt.Sprint(i * 100), Type: kind, Generated: at, Raw: []byte(`{"status": {"nested": "<started>"}}`),
			Traits: []sample.Trait{
				{Name: "trait_D", Type: sample.DatetimeTrait, Int: at},
				text("trait_A", "my_"+kind+"_text"),
				{Name: "trait_B", Type: sample.IntTrait, Int: int64(i*100 + 1)},
				{Name: "trait_C", Type: sample.FloatTrait, Float: float64(i*100) + 0.123456},
			},
		})
	}
	later := day.AddDate(0, 0, 9).UnixMicro()
	events = append(events,
		sample.Event{ID: "admins", Type: "owned", Generated: later, Traits: []sample.Trait{text("project_id", "p-admin"), text("user_id", "u-admin")}},
		sample.Event{ID: "users", Type: "owned", Generated: later + 1, Traits: []sample.Trait{text("project_id", "p1"), text("user_id", "u1")}},
		sample.Event{ID: "colleagues", Type: "owned", Generated: later + 2, Traits: []sample.Trait{text("project_id", "p1"), text("user_id", "u2")}},
	)
	s := memory.New(time.Now)
	if _, err := s.AppendEvents(context.Background(), events); err != nil {
		t.Fatal(err)
	}
	return s
}

var (
	eventAdmin  = map[string]string{"X-Roles": "admin", "X-Project-Id": "p-admin", "X-User-Id": "u-admin"}
	eventMember = map[string]string{"X-Roles": "member", "X-Project-Id": "p1", "X-User-Id": "u1"}
)

func TestEvents(t *testing.T) {
	h := api.New(eventStore(t), api.Options{})
	for name, tc := range map[string]struct {
		headers map[string]string
		query   string // terms as field op value type, separated by commas
		want    string // ids
	}{
		"admins see theirs, and those of nobody": {eventAdmin, "", "0 100 200 admins"},
		"others see their own in their project":  {eventMember, "", "users"},
		"another user sees nothing":              {map[string]string{"X-Roles": "member", "X-Project-Id": "p1", "X-User-Id": "blah"}, "", ""},
		"another project sees nothing":           {map[string]string{"X-Roles": "member", "X-Project-Id": "blah", "X-User-Id": "u1"}, "", ""},
		"a type":                                 {eventAdmin, "event_type  Foo ", "0"},
		"the last of two types":                  {eventAdmin, "event_type eq Foo ,event_type eq Bar ", "100"},
		"an id":                                  {eventAdmin, "message_id eq 200 ", "200"},
		"nothing asked for":                      {eventAdmin, "message_id eq  ", "0 100 200 admins"},
		"from a time on":                         {eventAdmin, "start_timestamp ge 2014-01-01T05:00:00 ", "100 200 admins"},
		"up to a time":                           {eventAdmin, "end_timestamp le 2014-01-01T05:00:00 ", "0 100"},
		"between times, as older clients say it": {eventAdmin, "start_timestamp eq 2014-01-01 ,end_timestamp  2014-01-02 ", "100"},
		"a trait is a text unless told":          {eventAdmin, "trait_A  my_Foo_text ", "0"},
		"another trait of nobody":                {eventAdmin, "nosuch eq x string", ""},
		"a text":                                 {eventAdmin, "trait_A eq my_Foo_text string", "0"},
		"a lesser text":                          {eventAdmin, "trait_A lt my_Bar_text string", ""},
		"a text at most":                         {eventAdmin, "trait_A le my_Zoo_text string", "0 100 200"},
		"another text":                           {eventAdmin, "trait_A ne my_Foo_text string", "100 200"},
		"a greater text":                         {eventAdmin, "trait_A gt my_Bar_text string", "0 200"},
		"a text at least":                        {eventAdmin, "trait_A ge my_Zoo_text string", "200"},
		"an integer":                             {eventAdmin, "trait_B eq 101 integer", "100"},
		"lesser integers":                        {eventAdmin, "trait_B lt 201 integer", "0 100"},
		"another integer":                        {eventAdmin, "trait_B ne 101 integer", "0 200"},
		"an integer is no text":                  {eventAdmin, "trait_B eq 101 string", ""},
		"a float":                                {eventAdmin, "trait_C eq 200.123456 float", "200"},
		"greater floats":                         {eventAdmin, "trait_C gt 0.123456 float", "100 200"},
		"a time":                                 {eventAdmin, "trait_D eq 2014-01-01T05:00:00 datetime", "100"},
		"times at least":                         {eventAdmin, "trait_D ge 2014-01-01T07:00:00+02:00 datetime", "100 200"},
		"two traits":                             {eventAdmin, "trait_B eq 1 integer,trait_A eq my_Foo_text string", "0"},
		"two traits of different events":         {eventAdmin, "trait_B eq 101 integer,trait_A eq my_Foo_text string", ""},
		"two values of one trait":                {eventAdmin, "trait_A eq my_Foo_text string,trait_A eq my_Bar_text string", ""},
		"a range of one trait":                   {eventAdmin, "trait_B gt 1 integer,trait_B lt 201 integer", "100"},
		"a trait of somebody else's":             {eventAdmin, "user_id eq u1 string", ""},
		"a trait of their own":                   {eventMember, "project_id eq p1 string", "users"},
		"a trait of a colleague":                 {eventMember, "user_id eq u2 string", ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := "/v2/events?"
			if tc.query != "" {
				for term := range strings.SplitSeq(tc.query, ",") {
					parts := strings.Split(term, " ")
					path += fmt.Sprintf("&q.field=%s&q.op=%s&q.value=%s&q.type=%s", parts[0], parts[1], strings.ReplaceAll(parts[2], "+", "%2B"), parts[3])
				}
			}
			w := ask(h, http.MethodGet, path, tc.headers, "")
			if w.Code != http.StatusOK {
				t.Fatalf("got %d %s", w.Code, w.Body)
			}
			if got := strings.Join(ids(t, w.Body.String()), " "); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
		})
	}
}

func TestEventsPrint(t *testing.T) {
	h := api.New(eventStore(t), api.Options{})
	const bar = `{"message_id": "100", "event_type": "Bar", "generated": "2014-01-01T05:00:00", "traits": [` +
		`{"name": "trait_A", "type": "string", "value": "my_Bar_text"}, {"name": "trait_B", "type": "integer", "value": "101"}, ` +
		`{"name": "trait_C", "type": "float", "value": "100.123456"}, {"name": "trait_D", "type": "datetime", "value": "2014-01-01T05:00:00"}], ` +
		`"raw": {"status": {"nested": "<started>"}}}`
	for path, want := range map[string]string{
		"/v2/events/100": bar,
		"/v2/events?limit=2&q.field=event_type&q.value=Bar": "[" + bar + "]",
		"/v2/events/admins":                     `{"message_id": "admins", "event_type": "owned", "generated": "2014-01-09T05:00:00", "traits": [{"name": "project_id", "type": "string", "value": "p-admin"}, {"name": "user_id", "type": "string", "value": "u-admin"}], "raw": {}}`,
		"/v2/event_types":                       `["Bar", "Foo", "Zoo", "owned"]`,
		"/v2/event_types/Foo/traits":            `[{"type": "string", "name": "trait_A"}, {"type": "integer", "name": "trait_B"}, {"type": "float", "name": "trait_C"}, {"type": "datetime", "name": "trait_D"}]`,
		"/v2/event_types/None/traits":           `[]`,
		"/v2/event_types/Foo/traits/trait_B":    `[{"name": "trait_B", "type": "integer", "value": "1"}]`,
		"/v2/event_types/owned/traits/user_id/": `[{"name": "user_id", "type": "string", "value": "u-admin"}, {"name": "user_id", "type": "string", "value": "u1"}, {"name": "user_id", "type": "string", "value": "u2"}]`,
		"/v2/event_types/Foo/traits/nosuch":     `[]`,
		"/v2/event_types/None/traits/trait_A":   `[]`,
	} {
		w := ask(h, http.MethodGet, path, eventAdmin, "")
		if got := w.Body.String(); w.Code != http.StatusOK || got != want {
			t.Errorf("%s: got %d %s\nwant %s", path, w.Code, got, want)
		}
	}
	for name, headers := range map[string]map[string]string{"an admin": eventAdmin, "an admin of no project": {"X-Roles": "admin"}, "nobody": nil} {
		if got := ids(t, ask(h, http.MethodGet, "/v2/events?all_projects=true", headers, "").Body.String()); len(got) != 6 {
			t.Errorf("all projects for %s: got %q, want all six", name, got)
		}
		if w := ask(h, http.MethodGet, "/v2/events/100?all_projects=true", headers, ""); w.Body.String() != bar {
			t.Errorf("one of all projects for %s: got %d %s", name, w.Code, w.Body)
		}
	}
	if got := ids(t, ask(api.New(eventStore(t), api.Options{DefaultLimit: 2}), http.MethodGet, "/v2/events", eventAdmin, "").Body.String()); len(got) != 2 {
		t.Errorf("the default limit: got %q, want two", got)
	}
	w := ask(h, http.MethodGet, "/v2/events", eventAdmin, `{"q": [{"field": "event_type", "op": "eq", "type": "string", "value": "Foo"}]}`)
	if got := ids(t, w.Body.String()); len(got) != 1 || got[0] != "0" {
		t.Errorf("a query in the body: got %q", got)
	}
}

func TestEventsThatAreRefused(t *testing.T) {
	h := api.New(eventStore(t), api.Options{})
	for name, tc := range map[string]struct {
		headers map[string]string
		path    string
		status  int
		text    string
	}{
		"nobody":                           {nil, "/v2/events", 403, "RBAC Authorization Failed"},
		"a role alone":                     {map[string]string{"X-Roles": "admin"}, "/v2/events", 403, "RBAC Authorization Failed"},
		"no project":                       {map[string]string{"X-Roles": "admin", "X-User-Id": "u"}, "/v2/events", 403, "RBAC Authorization Failed"},
		"no user":                          {map[string]string{"X-Roles": "admin", "X-Project-Id": "p"}, "/v2/events/100", 403, "RBAC Authorization Failed"},
		"an unknown argument":              {eventAdmin, "/v2/events?bad_Stuff_here", 400, `Unknown argument: "bad_Stuff_here"`},
		"an unknown argument of one event": {eventAdmin, "/v2/events/100?limit=1", 400, `Unknown argument: "limit"`},
		"a negative limit":                 {eventAdmin, "/v2/events?limit=-2", 400, "Limit must be positive"},
		"all projects are for admins":      {eventMember, "/v2/events?all_projects=1", 403, "RBAC Authorization Failed"},
		"one of all is for admins too":     {eventMember, "/v2/events/100?all_projects=1", 403, "RBAC Authorization Failed"},
		"an unknown operator":              {eventAdmin, "/v2/events?q.field=trait_A&q.op=whats-up&q.value=x", 400, "Operator whats-up is not supported. The supported operators are: ('lt', 'le', 'eq', 'ne', 'ge', 'gt')"},
		"another operator for a type":      {eventAdmin, "/v2/events?q.field=event_type&q.op=ne&q.value=x", 400, "Operator ne is not supported. Only `eq' operator is available for field event_type"},
		"another operator for an id":       {eventAdmin, "/v2/events?q.field=message_id&q.op=lt&q.value=x", 400, "Operator lt is not supported. Only `eq' operator is available for field message_id"},
		"another operator for the start":   {eventAdmin, "/v2/events?q.field=start_timestamp&q.op=gt&q.value=2014-01-01", 400, "Operator gt is not supported. Only `ge' operator is available for field start_timestamp"},
		"another operator for the end":     {eventAdmin, "/v2/events?q.field=end_timestamp&q.op=ge&q.value=2014-01-01", 400, "Operator ge is not supported. Only `le' operator is available for field end_timestamp"},
		"a time that is none":              {eventAdmin, "/v2/events?q.field=end_timestamp&q.op=le&q.value=soon", 400, "Invalid input for field/attribute end_timestamp. Value: 'soon'. invalid timestamp format"},
		"an unknown type of trait":         {eventAdmin, "/v2/events?q.field=trait_A&q.type=whats-up&q.value=x", 400, "The data type whats-up is not supported. The supported data type list is: ['integer', 'float', 'string', 'datetime']"},
		"traits are never true":            {eventAdmin, "/v2/events?q.field=trait_A&q.type=boolean&q.value=true", 400, "The data type boolean is not supported. The supported data type list is: ['integer', 'float', 'string', 'datetime']"},
		"an integer that is none":          {eventAdmin, "/v2/events?q.field=trait_B&q.type=integer&q.value=1.5", 400, "Unable to convert the value 1.5 to the expected data type integer."},
		"a float that is none":             {eventAdmin, "/v2/events?q.field=trait_B&q.type=float&q.value=inf", 400, "Unable to convert the value inf to the expected data type float."},
		"no value":                         {eventAdmin, "/v2/events?q.field=trait_B", 400, "Invalid input for field/attribute q.value. Value: 'None'. Mandatory field missing."},
		"an event that is not there":       {eventAdmin, "/v2/events/DNE", 404, "Event DNE Not Found"},
		"an event of another project":      {eventAdmin, "/v2/events/users", 404, "Event users Not Found"},
		"an event of a colleague":          {eventMember, "/v2/events/colleagues", 404, "Event colleagues Not Found"},
		"an event of nobody":               {eventMember, "/v2/events/100", 404, "Event 100 Not Found"},
		"event types are for admins":       {eventMember, "/v2/event_types", 401, "Not Authorized to access project p1"},
		"traits are for admins":            {eventMember, "/v2/event_types/Foo/traits", 401, "Not Authorized to access project p1"},
		"values of traits are for admins":  {eventMember, "/v2/event_types/Foo/traits/trait_A", 401, "Not Authorized to access project p1"},
		"an event type is never found":     {eventAdmin, "/v2/event_types/Foo", 404, "The resource could not be found."},
		"nor with a slash":                 {eventAdmin, "/v2/event_types/trait_A/", 404, "The resource could not be found."},
		"an argument of event types":       {eventAdmin, "/v2/event_types?limit=1", 400, `Unknown argument: "limit"`},
		"below a trait":                    {eventAdmin, "/v2/event_types/Foo/traits/trait_A/x", 404, "The resource could not be found."},
	} {
		t.Run(name, func(t *testing.T) {
			w := ask(h, http.MethodGet, tc.path, tc.headers, "")
			if got := fault(t, w); w.Code != tc.status || got != tc.text {
				t.Errorf("got %d %s\nwant %d %s", w.Code, got, tc.status, tc.text)
			}
		})
	}
	closed, err := api.ParsePolicy([]byte(`{"context_is_admin": "role:admin", "telemetry:events:index": "rule:context_is_admin", "telemetry:events:show": "rule:context_is_admin"}`))
	if err != nil {
		t.Fatal(err)
	}
	h = api.New(eventStore(t), api.Options{Policy: closed})
	for path, headers := range map[string]map[string]string{"/v2/events": eventMember, "/v2/events/users": eventMember} {
		if w := ask(h, http.MethodGet, path, headers, ""); w.Code != http.StatusForbidden {
			t.Errorf("%s by a policy for admins: got %d", path, w.Code)
		}
		if w := ask(h, http.MethodGet, strings.Replace(path, "users", "admins", 1), eventAdmin, ""); w.Code != http.StatusOK {
			t.Errorf("%s by a policy for admins, as one: got %d", path, w.Code)
		}
	}
}

func TestIngest(t *testing.T) {
	service := map[string]string{"X-Roles": "service", "X-Project-Id": "p-service", "X-User-Id": "u-service"}
	s := memory.New(time.Now)
	h := api.New(s, api.Options{})
	const published = `{"id": "i1", "name": "cpu", "type": "cumulative", "unit": "ns", "volume": 18446744073709551615, "user_id": "u", "project_id": "p", "resource_id": "vm-1",
		"timestamp": "2026-01-01T10:00:00.500000", "resource_metadata": {"n": {"x": 1}}, "source": "openstack", "user_name": null, "project_name": null, "monotonic_time": 5.5}`
	const onBus = `{"message_id": "i2", "counter_name": "cpu", "counter_type": "cumulative", "counter_unit": "ns", "counter_volume": 2, "resource_id": "vm-1", "timestamp": "2026-01-01T10:00:00"}`
	event := `{"message_id": "e1", "event_type": "x", "generated": "2026-01-01T10:00:00", "traits": [["project_id", 1, "p1"], ["user_id", 1, "u1"]], "raw": {}, "message_signature": "s"}`
	for _, body := range []string{"[" + published + "," + onBus + "]", "[" + published + "]", onBus} { // twice: they count once
		if w := ask(h, http.MethodPost, "/v2/ingest/samples", service, body); w.Code != http.StatusNoContent || w.Body.Len() > 0 {
			t.Fatalf("got %d %s", w.Code, w.Body)
		}
	}
	_, body := get(h, "/v2/samples")
	if got := strings.Join(ids(t, body), " "); got != "i1 i2" || !strings.Contains(body, `"volume": 18446744073709551615.0`) {
		t.Errorf("got %s", body)
	}
	for range 2 {
		if w := ask(h, http.MethodPost, "/v2/ingest/events", service, "["+event+"]"); w.Code != http.StatusNoContent {
			t.Fatalf("events: got %d %s", w.Code, w.Body)
		}
	}
	if got := ids(t, ask(h, http.MethodGet, "/v2/events", eventMember, "").Body.String()); len(got) != 1 || got[0] != "e1" {
		t.Errorf("got events %q", got)
	}
	for name, tc := range map[string]struct {
		headers    map[string]string
		path, body string
		status     int
		text       string
	}{
		"members send no samples":       {eventMember, "/v2/ingest/samples", "[" + onBus + "]", 403, "RBAC Authorization Failed"},
		"members send no events":        {eventMember, "/v2/ingest/events", "[" + event + "]", 403, "RBAC Authorization Failed"},
		"a bad sample costs the list":   {service, "/v2/ingest/samples", "[" + strings.ReplaceAll(onBus, "i2", "i3") + `, {"name": "x"}]`, 400, "Sample 1: "},
		"a bad event costs the list":    {service, "/v2/ingest/events", "[" + strings.ReplaceAll(event, "e1", "e2") + `, {"event_type": "x"}]`, 400, "Event 1: "},
		"an event without a trait name": {service, "/v2/ingest/events", strings.ReplaceAll(event, `"user_id"`, `""`), 400, "Event 0: "},
		"a volume without end":          {service, "/v2/ingest/samples", strings.ReplaceAll(onBus, ": 2,", ": 1e999,"), 400, "Sample 0: "},
		"an argument":                   {service, "/v2/ingest/samples?direct=1", "[]", 400, `Unknown argument: "direct"`},
		"no JSON":                       {service, "/v2/ingest/events", "[", 400, "Request is not in valid JSON format"},
	} {
		w := ask(h, http.MethodPost, tc.path, tc.headers, tc.body)
		if got := fault(t, w); w.Code != tc.status || !strings.HasPrefix(got, tc.text) {
			t.Errorf("%s: got %d %s, want %d %s", name, w.Code, got, tc.status, tc.text)
		}
	}
	open, err := api.ParsePolicy([]byte(`{"telemetry:ingest": ""}`))
	if err != nil {
		t.Fatal(err)
	}
	h = api.New(s, api.Options{Policy: open})
	w := ask(h, http.MethodPost, "/v2/ingest/samples", eventMember, "["+published+"]")
	if got, want := fault(t, w), "Invalid input for field/attribute project_id. Value: 'p'. can not post samples to other projects"; w.Code != 400 || got != want {
		t.Errorf("another project's: got %d %s", w.Code, got)
	}
	if w := ask(h, http.MethodPost, "/v2/ingest/events", eventMember, "["+event+"]"); w.Code != http.StatusForbidden {
		t.Errorf("events by a policy that lets everybody: got %d", w.Code)
	}
	var list []any
	_, body = get(h, "/v2/samples")
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list) != 2 {
		t.Errorf("what was refused is stored: %s", body)
	}
}
