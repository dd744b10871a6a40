package api_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/sample"
)

// complexStore holds three samples of three projects, as the original's own
// tests have them, and one whose owner and metadata are not known.
func complexStore(t testing.TB) []sample.Sample {
	t.Helper()
	var samples []sample.Sample
	for i, meta := range []string{
		`{"display_name": "test-server1", "tag": "self.sample", "size": 456, "util": 0.25, "is_public": true, "nested": {"list": ["a", "b"]}}`,
		`{"display_name": "test-server2", "tag": "self.sample", "size": 123, "util": 0.75, "is_public": true}`,
		`{"display_name": "test-server3", "tag": "self.sample", "size": "789", "util": 0.95, "is_public": false}`,
		``,
	} {
		n := i + 1
		s := sample.Sample{
			ID: sample.ParseID(fmt.Sprintf("s%d", n)), Name: "meter.test", Kind: sample.Cumulative, Unit: "u", Volume: sample.Uint(uint64(n)),
			Resource: fmt.Sprintf("resource-id%d", n), Source: "test_source", Project: fmt.Sprintf("project-id%d", n), User: fmt.Sprintf("user-id%d", n),
			Time: at + int64(i)*60*second, Metadata: []byte(meta),
		}
		if n == 4 {
			s.Project, s.User, s.Name, s.Kind = "", "", "meter.other", sample.Gauge
		}
		samples = append(samples, s)
	}
	return samples
}

func TestComplexQueries(t *testing.T) {
	h := api.New(storeOf(t, complexStore(t)...), api.Options{})
	admin := map[string]string{"X-Roles": "admin", "X-Project-Id": "project-id1"}
	member := map[string]string{"X-Roles": "Member", "X-Project-Id": "project-id1"}
	for name, tc := range map[string]struct {
		headers         map[string]string
		filter, orderby string
		limit           int
		want            string // ids
	}{
		"nothing asked: the newest first":       {admin, ``, ``, 0, "s4 s3 s2 s1"},
		"a limit":                               {admin, ``, ``, 3, "s4 s3 s2"},
		"non-admins see their project":          {member, ``, ``, 0, "s1"},
		"whatever their filter":                 {member, `{"or": [{"!=": {"project": "project-id1"}}, {"=": {"project": "project-id1"}}]}`, ``, 0, "s1"},
		"and its negation":                      {member, `{"not": {"<": {"project": "project-id1"}}}`, ``, 0, "s1"},
		"a field by its short name":             {admin, `{"=": {"project": "project-id2"}}`, ``, 0, "s2"},
		"and by its long one":                   {admin, `{"=": {"project_id": "project-id2"}}`, ``, 0, "s2"},
		"a resource":                            {admin, `{"=": {"resource": "resource-id2"}}`, ``, 0, "s2"},
		"a user":                                {admin, `{"!=": {"user_id": "user-id2"}}`, ``, 0, "s3 s1"},
		"a meter":                               {admin, `{"=": {"meter": "meter.other"}}`, ``, 0, "s4"},
		"a type":                                {admin, `{"=": {"counter_type": "gauge"}}`, ``, 0, "s4"},
		"a unit":                                {admin, `{"=": {"unit": "x"}}`, ``, 0, ""},
		"a source":                              {admin, `{"=": {"source": "test_source"}}`, ``, 0, "s4 s3 s2 s1"},
		"an id":                                 {admin, `{"=": {"message_id": "s3"}}`, ``, 0, "s3"},
		"less":                                  {admin, `{"<": {"volume": 2}}`, ``, 0, "s1"},
		"at most":                               {admin, `{"<=": {"counter_volume": 2.0}}`, ``, 0, "s2 s1"},
		"at most, the other way round":          {admin, `{"=<": {"volume": "2"}}`, ``, 0, "s2 s1"},
		"more":                                  {admin, `{">": {"volume": 3}}`, ``, 0, "s4"},
		"at least":                              {admin, `{">=": {"volume": 3}}`, ``, 0, "s4 s3"},
		"at least, the other way round":         {admin, `{"=>": {"volume": 3}}`, ``, 0, "s4 s3"},
		"a time":                                {admin, `{">=": {"timestamp": "2026-01-01T10:01:00"}}`, ``, 0, "s4 s3 s2"},
		"a time with an offset":                 {admin, `{">": {"timestamp": "2026-01-01T12:01:00+02:00"}}`, ``, 0, "s4 s3"},
		"times of a list":                       {admin, `{"in": {"timestamp": ["2026-01-01T10:01:00Z", "2026-01-01T10:02:00"]}}`, ``, 0, "s3 s2"},
		"the time of storing":                   {admin, `{">": {"recorded_at": "2027-01-01"}}`, ``, 0, ""},
		"operators in any case":                 {admin, `{"OR": [{"=": {"project": "project-id1"}}, {"=": {"project": "project-id3"}}]}`, ``, 0, "s3 s1"},
		"a list of values":                      {admin, `{"In": {"project_id": ["project-id1", "project-id2"]}}`, ``, 0, "s2 s1"},
		"numbers of a list":                     {admin, `{"in": {"volume": [1, "4", 9.5]}}`, ``, 0, "s4 s1"},
		"metadata of a list":                    {admin, `{"in": {"metadata.size": [123, "789"]}}`, ``, 0, "s3 s2"},
		"metadata that is a number":             {admin, `{">=": {"metadata.util": 0.5}}`, ``, 0, "s3 s2"},
		"not, with metadata that is missing":    {admin, `{"not": {">=": {"metadata.util": 0.5}}}`, ``, 0, "s1"},
		"unequal metadata":                      {admin, `{"!=": {"metadata.display_name": "test-server1"}}`, ``, 0, "s3 s2"},
		"or, where a branch is unknown":         {admin, `{"or": [{"=": {"metadata.util": 0.25}}, {"=": {"meter": "meter.other"}}]}`, ``, 0, "s4 s1"},
		"metadata that is true":                 {admin, `{"=": {"metadata.is_public": true}}`, ``, 0, "s2 s1"},
		"metadata of another type":              {admin, `{"=": {"metadata.size": "123"}}`, ``, 0, ""},
		"metadata in a list in an object":       {admin, `{"=": {"metadata.nested.list[1]": "b"}}`, ``, 0, "s1"},
		"not of not":                            {admin, `{"not": {"not": {"=": {"meter": "meter.other"}}}}`, ``, 0, "s4"},
		"a pattern":                             {admin, `{"=~": {"resource_id": "id[12]$"}}`, ``, 0, "s2 s1"},
		"a pattern of metadata":                 {admin, `{"=~": {"metadata.display_name": "(?i)SERVER[23]"}}`, ``, 0, "s3 s2"},
		"a pattern of a time":                   {admin, `{"=~": {"timestamp": "10:0[0-1]:00$"}}`, ``, 0, "s2 s1"},
		"a pattern of a number":                 {admin, `{"=~": {"volume": "^[34]"}}`, ``, 0, "s4 s3"},
		"a signature is equal to nothing":       {admin, `{"=": {"message_signature": "x"}}`, ``, 0, ""},
		"and unequal to everything":             {admin, `{"!=": {"message_signature": "x"}}`, ``, 0, "s4 s3 s2 s1"},
		"metadata as a whole, too":              {admin, `{"not": {"in": {"resource_metadata": ["x"]}}}`, ``, 0, "s4 s3 s2 s1"},
		"and as a pattern":                      {admin, `{"=~": {"resource_metadata": "x"}}`, ``, 0, ""},
		"a number where texts are":              {admin, `{"=": {"resource": 5}}`, ``, 0, ""},
		"sorted by a text, the last first":      {admin, ``, `[{"project_id": "DESC"}]`, 0, "s3 s2 s1 s4"},
		"sorted in any case":                    {admin, ``, `[{"user": "aSc"}]`, 0, "s4 s1 s2 s3"},
		"sorted by a number":                    {admin, ``, `[{"volume": "deSc"}]`, 0, "s4 s3 s2 s1"},
		"sorted by a time":                      {admin, ``, `[{"timestamp": "asc"}]`, 0, "s1 s2 s3 s4"},
		"sorted as it is anyway":                {admin, ``, `[{"timestamp": "desc"}]`, 2, "s4 s3"},
		"sorted by two":                         {admin, ``, `[{"type": "asc"}, {"volume": "desc"}]`, 0, "s3 s2 s1 s4"},
		"sorted, and limited":                   {admin, ``, `[{"volume": "asc"}]`, 2, "s1 s2"},
		"sorted by what all have equal":         {admin, ``, `[{"source": "asc"}]`, 0, "s4 s3 s2 s1"},
		"sorted by what nobody has":             {admin, ``, `[{"message_signature": "asc"}, {"resource_metadata": "asc"}]`, 0, "s4 s1 s2 s3"},
		"sorted by nothing":                     {admin, ``, `[]`, 1, "s4"},
		"sorted twice by one: the first counts": {admin, ``, `[{"volume": "asc"}, {"volume": "desc"}]`, 1, "s1"},
		"filtered, sorted and limited":          {admin, `{"and": [{">": {"volume": 1}}, {"<": {"volume": 4}}]}`, `[{"volume": "ASC"}, {"timestamp": "DESC"}]`, 1, "s2"},
	} {
		t.Run(name, func(t *testing.T) {
			body := map[string]any{}
			for key, value := range map[string]string{"filter": tc.filter, "orderby": tc.orderby} {
				if value != "" {
					body[key] = value
				}
			}
			if tc.limit > 0 {
				body["limit"] = tc.limit
			}
			text, err := json.Marshal(body)
			if err != nil {
				t.Fatal(err)
			}
			w := ask(h, http.MethodPost, "/v2/query/samples", tc.headers, string(text))
			if w.Code != http.StatusOK {
				t.Fatalf("got %d %s", w.Code, w.Body)
			}
			if got := strings.Join(ids(t, w.Body.String()), " "); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
		})
	}
}

func TestComplexQueriesThatAreRefused(t *testing.T) {
	h := api.New(storeOf(t, complexStore(t)...), api.Options{})
	filter := func(text string) string {
		b, err := json.Marshal(map[string]string{"filter": text})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	orderby := func(text string) string { return strings.Replace(filter(text), "filter", "orderby", 1) }
	list := func(n int, element string) string {
		return "[" + strings.Join(slices.Repeat([]string{element}, n), ",") + "]"
	}
	const schemas = " is not valid under any of the given schemas"
	member := map[string]string{"X-Roles": "member", "X-Project-Id": "project-id1"}
	for name, tc := range map[string]struct {
		headers map[string]string
		body    string
		status  int
		text    string // what the fault begins with
	}{
		"a body that is no JSON":           {nil, `{`, 400, "Request is not in valid JSON format"},
		"a body that is a list":            {nil, `[]`, 400, "Request is not in valid JSON format"},
		"an attribute that is none":        {nil, `{"sort": 1}`, 400, "Unknown attribute for argument body: sort"},
		"a filter that is an object":       {nil, `{"filter": {"=": {"meter": "x"}}}`, 400, "Invalid input for field/attribute filter. Value: '{'=': {'meter': 'x'}}'. Wrong type. Expected '<class 'str'>', got '<class 'dict'>'"},
		"an order that is a list":          {nil, `{"orderby": [1, 2.5]}`, 400, "Invalid input for field/attribute orderby. Value: '[1, 2.5]'. Wrong type. Expected '<class 'str'>', got '<class 'list'>'"},
		"a limit that is none":             {nil, `{"limit": "x"}`, 400, "Invalid input for field/attribute limit. Value: 'x'. unable to convert to int."},
		"a limit of zero":                  {nil, `{"limit": 0}`, 400, "Limit must be positive"},
		"a limit that is a list":           {nil, `{"limit": [1]}`, 400, "Invalid input for field/attribute limit. Value: '[1]'. It must be text or a number."},
		"a filter that is no JSON":         {nil, filter(`{"=": "resource": "resource-id2"}}`), 400, "Filter expression not valid: Expecting value: line 1 column 17 (char 16)"},
		"a filter that ends early":         {nil, filter(`{"=": `), 400, "Filter expression not valid: Expecting value: line 1 column 7 (char 6)"},
		"a filter that is empty text":      {nil, filter(``), 400, "Filter expression not valid: Expecting value: line 1 column 1 (char 0)"},
		"a filter that goes on":            {nil, filter("{}\n {}"), 400, "Filter expression not valid: Extra data: line 2 column 2 (char 4)"},
		"a field that is none":             {nil, filter(`{"=": {"unknown": "x"}}`), 400, "Filter expression not valid: {'=': {'unknown': 'x'}}" + schemas},
		"an operator that is none":         {nil, filter(`{"~": {"meter": "x"}}`), 400, "Filter expression not valid: {'~': {'meter': 'x'}}" + schemas},
		"an empty filter":                  {nil, filter(`{}`), 400, "Filter expression not valid: {}" + schemas},
		"two operators in one":             {nil, filter(`{"=": {"meter": "x"}, "not": {"=": {"meter": "x"}}}`), 400, "Filter expression not valid: {"},
		"two fields in one":                {nil, filter(`{"=": {"meter": "x", "user": "y"}}`), 400, "Filter expression not valid: {"},
		"a filter that is a number":        {nil, filter(`5`), 400, "Filter expression not valid: 5" + schemas},
		"null":                             {nil, filter(`{"=": {"user": null}}`), 400, "Filter expression not valid: {'=': {'user': None}}" + schemas},
		"a list where one value is wanted": {nil, filter(`{"=": {"user": ["a"]}}`), 400, "Filter expression not valid: {'=': {'user': ['a']}}" + schemas},
		"and of one":                       {nil, filter(`{"and": [{"=": {"meter": "cpu"}}]}`), 400, "Filter expression not valid: [{'=': {'meter': 'cpu'}}] is too short"},
		"and of no list":                   {nil, filter(`{"and": {"=": {"meter": "cpu"}}}`), 400, "Filter expression not valid: {'and': {'=': {'meter': 'cpu'}}}" + schemas},
		"in of nothing":                    {nil, filter(`{"in": {"meter": []}}`), 400, "Filter expression not valid: [] is too short"},
		"in of no list":                    {nil, filter(`{"in": {"meter": "a"}}`), 400, "Filter expression not valid: {'in': {'meter': 'a'}}" + schemas},
		"in of truth":                      {nil, filter(`{"in": {"meter": [true]}}`), 400, "Filter expression not valid: {'in': {'meter': [True]}}" + schemas},
		"a metadata field with a blank":    {nil, filter(`{"=": {"metadata.a b": 1}}`), 400, "Filter expression not valid: {'=': {'metadata.a b': 1}}" + schemas},
		"metadata without a key":           {nil, filter(`{"=": {"metadata.": 1}}`), 400, "Filter expression not valid: {'=': {'metadata.': 1}}" + schemas},
		"a time that is none":              {nil, filter(`{">": {"timestamp": "xx"}}`), 400, "Failed to parse the timestamp value xx"},
		"a volume that is none":            {nil, filter(`{">": {"volume": "xx"}}`), 400, "Filter expression not valid: xx is not a number, as volume is"},
		"a volume that is truth":           {nil, filter(`{"=": {"counter_volume": true}}`), 400, "Filter expression not valid: True is not a number, as counter_volume is"},
		"a volume without end":             {nil, filter(`{"=": {"volume": 1e999}}`), 400, "Filter expression not valid: "},
		"metadata without end":             {nil, filter(`{"=": {"metadata.x": 1e999}}`), 400, "Filter expression not valid: 1e999 is out of range"},
		"a pattern that is none":           {nil, filter(`{"=~": {"meter": "("}}`), 400, "Filter expression not valid: filter: meter: error parsing regexp: missing closing ): `(`"},
		"a pattern that explodes":          {nil, filter(`{"=~": {"meter": "((a{100}){100}){100}"}}`), 400, "Filter expression not valid: filter: meter: error parsing regexp: "},
		"a pattern that is long":           {nil, filter(`{"=~": {"meter": "` + strings.Repeat("a", 1001) + `"}}`), 400, "Filter expression not valid: filter: meter: a pattern of 1001 bytes, at most 1000 are taken"},
		"too many terms":                   {nil, filter(`{"or": ` + list(10_000, `{"=": {"meter": "x"}}`) + `}`), 400, "Filter expression not valid: it has more than 1000 terms"},
		"too many terms in parts":          {nil, filter(`{"or": ` + list(40, `{"and": `+list(30, `{"=": {"meter": "x"}}`)+`}`) + `}`), 400, "Filter expression not valid: it has more than 1000 terms"},
		"too many values":                  {nil, filter(`{"in": {"meter": ` + list(10_001, `"x"`) + `}}`), 400, "Filter expression not valid: a list has more than 10000 values"},
		"too many levels":                  {nil, filter(strings.Repeat(`{"not": `, 33) + `{"=": {"meter": "x"}}` + strings.Repeat(`}`, 33)), 400, "Filter expression not valid: it nests more than 32 levels"},
		"far too many levels":              {nil, filter(strings.Repeat(`{"not": `, 50_000) + `{}` + strings.Repeat(`}`, 50_000)), 400, "Filter expression not valid: Expecting value"},
		"an order that is no JSON":         {nil, orderby(`{"project_id": "desc"}]`), 400, "Order-by expression not valid: Extra data: line 1 column 23 (char 22)"},
		"an order that is no array":        {nil, orderby(`{"project_id": "desc"}`), 400, "Order-by expression not valid: {'project_id': 'desc'} is not of type 'array'"},
		"an order of texts":                {nil, orderby(`["project_id"]`), 400, "Order-by expression not valid: project_id is not of type 'object'"},
		"an order by nothing":              {nil, orderby(`[{}]`), 400, "Order-by expression not valid: {} does not have enough properties"},
		"an order by two at once":          {nil, orderby(`[{"user": "asc", "project": "asc"}]`), 400, "Order-by expression not valid: {'project': 'asc', 'user': 'asc'} has too many properties"},
		"an order by metadata":             {nil, orderby(`[{"metadata.x": "asc"}]`), 400, "Order-by expression not valid: 'metadata.x' does not match any of the regexes: '^counter_name$|"},
		"a direction that is none":         {nil, orderby(`[{"project_id": ""}]`), 400, "Order-by expression not valid: '' does not match '(?i)^asc$|^desc$'"},
		"a direction that is no text":      {nil, orderby(`[{"project_id": 1}]`), 400, "Order-by expression not valid: 1 is not of type 'string'"},
		"another project":                  {member, filter(`{"=": {"project_id": "project-id2"}}`), 401, "Not Authorized to access project project-id2"},
		"another project, well hidden":     {member, filter(`{"or": [{"=": {"project": "project-id1"}}, {"not": {"=": {"project": "project-id2"}}}]}`), 401, "Not Authorized to access project project-id2"},
		"nobody's project":                 {map[string]string{"X-Roles": "member"}, `{}`, 403, "RBAC Authorization Failed"},
	} {
		t.Run(name, func(t *testing.T) {
			w := ask(h, http.MethodPost, "/v2/query/samples", tc.headers, tc.body)
			if got := fault(t, w); w.Code != tc.status || !strings.HasPrefix(got, tc.text) {
				t.Errorf("got %d %.300s\nwant %d %s", w.Code, got, tc.status, tc.text)
			}
			if w.Body.Len() > 10_000 {
				t.Errorf("the answer has %d bytes", w.Body.Len())
			}
		})
	}
	if w := ask(h, http.MethodGet, "/v2/query/samples", nil, ""); w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "POST" {
		t.Errorf("GET: got %d, Allow %q", w.Code, w.Header().Get("Allow"))
	}
}

// A sorted answer holds no more in memory than it needs, and is the same.
func TestSortedQueriesOfManySamples(t *testing.T) {
	samples := make([]sample.Sample, 3000)
	for i := range samples {
		samples[i] = gauge(fmt.Sprint(i), "vm-1", int64(i)*second, float64(i*7919%3000))
	}
	h := api.New(storeOf(t, samples...), api.Options{})
	w := ask(h, http.MethodPost, "/v2/query/samples", nil, `{"orderby": "[{\"volume\": \"asc\"}]", "limit": 3}`)
	var list []struct{ Volume float64 }
	if err := json.Unmarshal(w.Body.Bytes(), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 3 || list[0].Volume != 0 || list[1].Volume != 1 || list[2].Volume != 2 {
		t.Errorf("got %v, want 0, 1, 2", list)
	}
	h = api.New(broken{after: 100_001}, api.Options{})
	w = ask(h, http.MethodPost, "/v2/query/samples", nil, `{"orderby": "[{\"volume\": \"asc\"}]", "limit": 200000}`)
	if got, want := fault(t, w), "More than 100000 samples match, too many to sort: narrow the filter, or set a limit of at most 100000."; w.Code != 400 || got != want {
		t.Errorf("got %d %s, want 400 %s", w.Code, got, want)
	}
	w = ask(h, http.MethodPost, "/v2/query/samples", nil, `{"orderby": "[{\"volume\": \"asc\"}]", "limit": 100000}`)
	if w.Code != http.StatusOK {
		t.Errorf("a limit that is sorted: got %d %.200s", w.Code, w.Body)
	}
}
