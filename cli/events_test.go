package cli

import (
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/parquet-go/parquet-go"
)

// canned answers requests by method and path, and notes what they bring.
func canned(t *testing.T, answers map[string]string) (url string, asked func() []string) {
	t.Helper()
	var requests []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		requests = append(requests, strings.TrimSpace(r.Method+" "+r.URL.String()+" "+string(body)))
		answer, ok := answers[r.Method+" "+r.URL.EscapedPath()]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = io.WriteString(w, answer)
	}))
	t.Cleanup(server.Close)
	return server.URL, func() []string { return requests }
}

const oneEvent = `{"message_id": "e-1", "event_type": "compute.instance.create.end", "generated": "2026-01-01T10:00:00.123456",
  "traits": [{"name": "instance_id", "type": "string", "value": "vm-1"}, {"name": "vcpus", "type": "integer", "value": "2"}],
  "raw": {"payload": {"host": "compute-1", "display_name": "web1 \u001b[31m"}}}`

func TestEventCommandsPrintTheirTables(t *testing.T) {
	url, _ := canned(t, map[string]string{
		"GET /v2/events":                       `[` + oneEvent + `, {"message_id": "e-2", "event_type": "a.b", "generated": "2026-01-01T10:00:01", "traits": [], "raw": {}}]`,
		"GET /v2/events/e-1":                   oneEvent,
		"GET /v2/event_types":                  `["a.b", "compute.instance.create.end"]`,
		"GET /v2/event_types/a.b/traits":       `[{"name": "ratio", "type": "float"}]`,
		"GET /v2/event_types/a.b/traits/ratio": `[{"name": "ratio", "type": "float", "value": "0.5"}]`,
		"GET /v2/capabilities":                 `{"storage": {"storage:production_ready": true}, "api": {"meters:query:simple": true, "a:b": false}}`,
	})
	for name, line := range map[string]string{
		"event-list":             "event-list",
		"event-list-no-traits":   "event-list --no-traits",
		"event-list-json":        "event-list -f json",
		"event-list-all":         "event-list --all-projects --no-traits",
		"event-list-csv":         "event-list -f csv",
		"event-show":             "event-show e-1",
		"event-type-list":        "event-type-list",
		"trait-description-list": "trait-description-list -e a.b",
		"trait-list":             "trait-list -e a.b -t ratio",
		"capabilities":           "capabilities",
		"capabilities-json":      "capabilities -f json",
	} {
		t.Run(name, func(t *testing.T) {
			got, err := run(t, url, strings.Fields(line)...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, got)
		})
	}
}

func TestWhatCommandsSend(t *testing.T) {
	sample := `{"message_id": "m-1", "counter_name": "apples", "counter_type": "gauge", "counter_unit": "piece", "counter_volume": 3.0,
	  "resource_id": "tree-1", "project_id": null, "user_id": "u1", "source": "None:openstack", "timestamp": "2026-01-01T10:00:00", "resource_metadata": {"sort": "Boskoop"}}`
	answers := map[string]string{"POST /v2/meters/apples": "[" + sample + "]", "POST /v2/query/samples": "[]", "GET /v2/events": "[]"}
	create := []string{"sample-create", "-r", "tree-1", "-m", "apples", "--meter-type", "gauge", "--meter-unit", "piece", "--sample-volume", "3"}
	for name, tc := range map[string]struct {
		line []string
		want string
	}{
		"sample-create": {create, `POST /v2/meters/apples [{"counter_name":"apples","counter_type":"gauge","counter_unit":"piece","counter_volume":3,"resource_id":"tree-1"}]`},
		"sample-create with everything": {
			append(create, "--project-id", "p1", "--user-id", "u1", "--resource-metadata", `{"sort": "Boskoop"}`, "--timestamp", "2026-01-01T10:00:00", "--direct=True"),
			`POST /v2/meters/apples?direct=true [{"counter_name":"apples","counter_type":"gauge","counter_unit":"piece","counter_volume":3,"resource_id":"tree-1","project_id":"p1","user_id":"u1","timestamp":"2026-01-01T10:00:00","resource_metadata":{"sort":"Boskoop"}}]`,
		},
		"sample-create-list":      {[]string{"sample-create-list", `[{"counter_name": "apples", "counter_volume": 1e400}]`, "--direct"}, `POST /v2/meters/apples?direct=true [{"counter_name":"apples","counter_volume":1e400}]`},
		"the original's --direct": {[]string{"sample-create-list", "--direct", "True", `[{"counter_name": "apples"}]`}, `POST /v2/meters/apples?direct=true [{"counter_name":"apples"}]`},
		"it may be False":         {append(create, "--direct", "False"), `POST /v2/meters/apples [{"counter_name":"apples","counter_type":"gauge","counter_unit":"piece","counter_volume":3,"resource_id":"tree-1"}]`},
		"seconds":                 {append(create, "--timeout", "600"), `POST /v2/meters/apples [{"counter_name":"apples","counter_type":"gauge","counter_unit":"piece","counter_volume":3,"resource_id":"tree-1"}]`},
		"query-samples":           {[]string{"query-samples", "--filter", `{"=": {"meter": "a"}}`, "-o", "volume:desc, timestamp", "-l", "3"}, `POST /v2/query/samples {"filter":"{\"=\": {\"meter\": \"a\"}}","limit":3,"orderby":"[{\"volume\":\"desc\"},{\"timestamp\":\"asc\"}]"}`},
		"the original's -f":       {[]string{"query-samples", "-f", `{"=": {"meter": "a"}}`}, `POST /v2/query/samples {"filter":"{\"=\": {\"meter\": \"a\"}}"}`},
		"the original's -o":       {[]string{"query-samples", "-o", `[{"volume": "ASC"}]`}, `POST /v2/query/samples {"orderby":"[{\"volume\": \"ASC\"}]"}`},
		"a query of events":       {[]string{"event-list", "-q", "event_type=a;vcpus>=integer::4", "-l", "7"}, `GET /v2/events?limit=7&q.field=event_type&q.field=vcpus&q.op=eq&q.op=ge&q.type=&q.type=integer&q.value=a&q.value=4`},
	} {
		t.Run(name, func(t *testing.T) {
			url, asked := canned(t, answers)
			out, err := run(t, url, tc.line...)
			if err != nil {
				t.Fatal(err)
			}
			if got := asked(); len(got) != 1 || got[0] != tc.want {
				t.Errorf("got %q\nwant %s", got, tc.want)
			}
			if strings.HasPrefix(name, "sample-create") {
				golden(t, strings.Fields(name)[0], out)
			}
		})
	}
}

func TestMistakesAreNotSent(t *testing.T) {
	for want, line := range map[string][]string{
		"a sample wants --meter-unit; see `kvmeter sample-create --help`":                                    {"sample-create", "-r", "r", "-m", "m", "--meter-type", "gauge", "--sample-volume", "3"},
		`--sample-volume "three" is no number`:                                                               {"sample-create", "-r", "r", "-m", "m", "--meter-type", "gauge", "--meter-unit", "u", "--sample-volume", "three"},
		`samples are a JSON array of objects: invalid character 'a' looking for beginning of value`:          {"sample-create-list", "a"},
		`there is no sample in the array`:                                                                    {"sample-create-list", "[]"},
		`the first sample has no counter_name`:                                                               {"sample-create-list", "[{}]"},
		`--filter is no JSON: {a`:                                                                            {"query-samples", "-f", "{a"},
		`--orderby "volume:up": an order is FIELD:asc or FIELD:desc, several separated by commas`:            {"query-samples", "-o", "volume:up"},
		"it wants the type of events: -e TYPE; `kvmeter event-type-list` lists them":                         {"trait-list", "-t", "x"},
		"it wants the name of a trait: -t NAME; `kvmeter trait-description-list` lists them":                 {"trait-list", "-e", "x"},
		`invalid argument "5 minutes" for "--timeout" flag: it is a number of seconds, or a time such as 5m`: {"meter-list", "--timeout", "5 minutes"},
		`sample-create takes no argument "True"; see ` + "`kvmeter sample-create --help`":                    {"sample-create", "True"},
		"sample-create-list wants one JSON array of samples, got 2 arguments":                                {"sample-create-list", "[]", "[]"},
		"--watch=1ms: at least 100ms":                                                                        {"meter-list", "--watch=1ms"},
	} {
		url, asked := canned(t, nil)
		_, err := run(t, url, line...)
		if err == nil || err.Error() != want || len(asked()) > 0 {
			t.Errorf("%q: got %v and requests %q\nwant %s", line, err, asked(), want)
		}
	}
}

func TestEventsOfNobodySayHowToSeeAll(t *testing.T) {
	url := serve(t)
	for _, line := range []string{"event-list", "event-show e-1"} {
		_, err := run(t, url, strings.Fields(line)...)
		if want := "RBAC Authorization Failed (HTTP 403): events are those of a user in a project; who sees every project asks with --all-projects"; err == nil || err.Error() != want {
			t.Errorf("%s: got %v\nwant %s", line, err, want)
		}
	}
	if _, err := run(t, url, "event-list", "--all-projects"); err != nil {
		t.Error(err)
	}
}

func TestUsageIsSaved(t *testing.T) {
	url := serve(t)
	path := filepath.Join(t.TempDir(), "usage.parquet")
	if _, err := run(t, url, "usage", "--from", "2026-01-01", "--to", "2026-01-02", "--parquet", path); err != nil {
		t.Fatal(err)
	}
	type row struct {
		Meter    string `parquet:"meter"`
		Quantity string `parquet:"quantity"`
	}
	rows, err := parquet.ReadFile[row](path)
	if err != nil || len(rows) != 3 {
		t.Fatalf("%v: %+v", err, rows)
	}
	if _, err := run(t, url, "usage", "--from", "2026-01-02", "--to", "2026-01-01", "--parquet", path+"2"); err == nil {
		t.Error("an empty period is no error")
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("files %v, %v", files, err)
	}
}

func TestPlots(t *testing.T) {
	samples := func(kind, resource string, values ...float64) []string {
		var all []string
		for i, v := range values {
			all = append(all, fmt.Sprintf(`{"counter_name": "m", "counter_type": %q, "counter_unit": "ns", "counter_volume": %v, "resource_id": %s, "timestamp": "2026-01-01T10:%02d:00"}`, kind, v, encode(resource), len(values)-i))
		}
		return all
	}
	list := func(all ...[]string) string {
		var joined []string
		for _, part := range all {
			joined = append(joined, part...)
		}
		return "[" + strings.Join(joined, ",") + "]"
	}
	for name, tc := range map[string]struct{ line, answer string }{
		"plot":            {"sample-list -m m --plot", list(samples("gauge", "vm-1", 5, 4, 9, 0, 1))},
		"plot-several":    {"sample-list -m m --plot", list(samples("gauge", "vm-1", 5, 4, 9), samples("gauge", "vm-\u001b2", 1, 1, 2))},
		"plot-cumulative": {"sample-list -m m --plot", list(samples("cumulative", "vm-1", 1500e9, 900e9, 0, 600e9, 0))},
		"plot-one":        {"sample-list -m m --plot", list(samples("gauge", "vm-1", 5))},
		"plot-none":       {"sample-list -m m --plot", "[]"},
		"plot-csv":        {"sample-list -m m --plot -f csv", list(samples("gauge", "vm-1", 5, 4))},
	} {
		t.Run(name, func(t *testing.T) {
			url, _ := canned(t, map[string]string{"GET /v2/meters/m": tc.answer})
			got, err := run(t, url, strings.Fields(tc.line)...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, got)
		})
	}
	t.Run("plot-statistics", func(t *testing.T) {
		got, err := run(t, serve(t), strings.Fields("statistics -m cpu_util -p 5 -g resource_id --plot")...)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "plot-statistics", got)
	})
}

// TestLogin logs in to what notes how; a test of central runs the real Keystone.
func TestLogin(t *testing.T) {
	var login []byte
	server := httptest.NewServer(nil)
	t.Cleanup(server.Close)
	server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v3/auth/tokens":
			login, _ = io.ReadAll(r.Body)
			w.Header().Set("X-Subject-Token", "a-token")
			w.WriteHeader(http.StatusCreated)
			fmt.Fprintf(w, `{"token": {"expires_at": "2100-01-01T00:00:00.000000Z", "catalog": [{"type": "metering", "endpoints": [
			  {"interface": "public", "region": "One", "region_id": "One", "url": "%[1]s/one"}, {"interface": "internal", "region": "One", "region_id": "One", "url": "%[1]s/inside"}]}]}}`, server.URL)
		case "/one/v2/meters", "/inside/v2/meters":
			if r.Header.Get("X-Auth-Token") != "a-token" {
				t.Errorf("token %q", r.Header.Get("X-Auth-Token"))
			}
			fmt.Fprintf(w, `[{"name": %q}]`, strings.Split(r.URL.Path, "/")[1])
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	t.Setenv("OS_AUTH_URL", server.URL)
	t.Setenv("OS_PASSWORD", "the-secret")
	t.Setenv("OS_PROJECT_NAME", "p1")
	got, err := run(t, "", "--os-username", "alice", "meter-list", "-f", "value", "-c", "Name", "-d")
	if err != nil || !strings.HasSuffix(got, "\none\n") {
		t.Fatalf("got %s, %v", got, err)
	}
	if strings.Contains(got, "the-secret") || strings.Contains(got, "a-token") || !strings.Contains(got, "> POST /v3/auth/tokens") {
		t.Errorf("--debug prints\n%s", got)
	}
	want := `{"auth":{"identity":{"methods":["password"],"password":{"user":{"domain":{"name":"Default"},"name":"alice","password":"the-secret"}}},"scope":{"project":{"domain":{"name":"Default"},"name":"p1"}}}}`
	if string(login) != want {
		t.Errorf("logged in with %s\nwant %s", login, want)
	}
	if got, err := run(t, "", "meter-list", "--os-username", "alice", "--os-endpoint-type", "internalURL", "-f", "value", "-c", "Name"); err != nil || got != "inside\n" {
		t.Errorf("internal: got %s, %v", got, err)
	}
	_, err = run(t, "", "meter-list", "--os-username", "alice", "--os-region-name", "Two")
	if err == nil || !strings.Contains(err.Error(), "catalogue of Keystone has no public address of a service of type metering") {
		t.Errorf("another region: %v", err)
	}
	login = nil
	if got, err := run(t, server.URL+"/one", "meter-list", "--os-auth-token", "a-token", "-f", "value", "-c", "Name"); err != nil || got != "one\n" || login != nil {
		t.Errorf("with token and endpoint: got %s, %v, logged in with %s", got, err, login)
	}
	_, err = run(t, "", "meter-list")
	if err == nil || !strings.Contains(err.Error(), "to log in to Keystone takes a user") {
		t.Errorf("without a user: %v", err)
	}
}

// TestCloudsYAML logs in to a cloud that is described in files, over TLS that its
// own authority vouches for, also where requests are printed.
func TestCloudsYAML(t *testing.T) {
	var login []byte
	server := httptest.NewUnstartedServer(nil)
	server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/meters" {
			_, _ = io.WriteString(w, `[{"name": "a"}]`)
			return
		}
		login, _ = io.ReadAll(r.Body)
		w.Header().Set("X-Subject-Token", "a-token")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"token": {"expires_at": "2100-01-01T00:00:00.000000Z", "catalog": [{"type": "metering", "endpoints": [
		  {"interface": "internal", "region": "One", "region_id": "One", "url": %[1]q}, {"interface": "public", "region": "One", "region_id": "One", "url": "http://127.0.0.1:1"}]}]}}`, server.URL)
	})
	server.StartTLS()
	t.Cleanup(server.Close)
	dir := t.TempDir()
	for name, text := range map[string]string{
		"ca.pem": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})),
		"clouds.yaml": `clouds:
  lab:
    auth: {auth_url: ` + server.URL + `/v3, username: alice, user_domain_name: Users, project_id: 7f2a}
    region_name: One
    interface: internal
    cacert: ` + filepath.Join(dir, "ca.pem") + "\n",
		"secure.yaml": "clouds: {lab: {auth: {password: the-secret}}}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("OS_CLIENT_CONFIG_FILE", filepath.Join(dir, "clouds.yaml"))
	t.Setenv("OS_USERNAME", "somebody-of-another-cloud")
	t.Setenv("OS_PROJECT_ID", "of-another-cloud")
	const user = `{"auth":{"identity":{"methods":["password"],"password":{"user":{"domain":{"name":"Users"},"name":%q,"password":"the-secret"}}},"scope":{"project":%s}}}`
	for name, tc := range map[string]struct{ args, user, project string }{
		"as the files say": {"", "alice", `{"id":"7f2a"}`},
		"printed":          {"-d", "alice", `{"id":"7f2a"}`},
		"with flags":       {"--os-username bob --os-project-name p1 --os-project-domain-id d1", "bob", `{"domain":{"id":"d1"},"name":"p1"}`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := run(t, "", strings.Fields("meter-list --os-cloud lab -f value -c Name "+tc.args)...)
			if err != nil || !strings.HasSuffix(got, "a\n") {
				t.Fatalf("got %s, %v", got, err)
			}
			if want := fmt.Sprintf(user, tc.user, tc.project); string(login) != want {
				t.Errorf("logged in with %s\nwant %s", login, want)
			}
		})
	}
	if _, err := run(t, "", "meter-list", "--os-cloud", "nowhere"); err == nil || err.Error() != `clouds.yaml: cloud "nowhere" not found in clouds.yaml` {
		t.Errorf("another cloud: %v", err)
	}
}
