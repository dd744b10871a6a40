package cli

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/memory"
	"github.com/kvmeter/kvmeter/sample"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var start = time.Date(2026, 1, 1, 10, 0, 0, 0, time.UTC)

// serve starts an API over two domains that were polled three times.
func serve(t *testing.T) string {
	t.Helper()
	s := memory.New(func() time.Time { return start.Add(time.Minute) })
	util := sample.MeterRef{Name: "cpu_util", Kind: sample.Gauge, Unit: "%"}
	for i := range 3 {
		b := sample.NewBuilder()
		b.Row(sample.Row{
			Resource: "5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10", Source: "openstack", Project: "7f2a", User: "u1",
			Incarnation: sample.IncarnationOf("boot", "1"),
			Metadata:    []byte(`{"display_name":"web1","flavor":{"name":"m1.small","vcpus":2},"image":{"id":"0a4d6c52-8f0e-4d8c-9a67-d5b1f7a0d8e2"},"tags":["blue","ünïcode"]}`),
		})
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<63+uint64(i)))
		b.Add(util, sample.Walk, sample.Float(12.5*float64(i)))
		b.Row(sample.Row{
			Resource: "dom-日本", Source: "openstack", Incarnation: sample.IncarnationOf("boot", "2"),
			Offset: 500_000, Metadata: []byte(`{"display_name":"a\u001b[31mb"}`),
		})
		b.Add(util, sample.Walk, sample.Float(1e-7))
		if i == 1 {
			b.Gap(sample.Gap{Meter: "*", Resource: "dom-日本", From: start.UnixMicro(), To: start.Add(1500 * time.Millisecond).UnixMicro(), Reason: "libvirt did not answer within 2 s"})
		}
		batch := b.Build()
		batch.ID = sample.NewBatchID(start)
		copy(batch.ID[6:], []byte{0x80, 1, 0x80, 2, 3, 4, 5, byte(i)})
		batch.Node, batch.Epoch, batch.Seq = "compute-1", 1, uint64(i+1)
		batch.Base = start.Add(time.Duration(i) * 10 * time.Second).UnixMicro()
		stored, err := s.Append(context.Background(), []store.Received{{Batch: batch}})
		if err != nil || stored[0] != (store.Stored{}) {
			t.Fatalf("append: %v, %v", stored, err)
		}
	}
	server := httptest.NewServer(api.New(s, api.Options{}))
	t.Cleanup(server.Close)
	return server.URL
}

// run runs a command line as the program does.
func run(t *testing.T, endpoint string, args ...string) (string, error) {
	t.Helper()
	t.Setenv(EndpointEnv, endpoint)
	root := &cobra.Command{Use: "kvmeter", SilenceErrors: true}
	Add(root, "", Options{Socket: "/run/kvmeter/agent.sock"})
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.ExecuteContext(context.Background())
	return out.String(), err
}

// golden compares got with a file, or rewrites it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

func TestCommandsPrintTheirTables(t *testing.T) {
	url := serve(t)
	for name, line := range map[string]string{
		"meter-list":           "meter-list",
		"meter-list-unique":    "meter-list --unique True",
		"meter-list-json":      "meter-list -f json -l 2",
		"meter-list-columns":   "meter-list -f value -c name -c resource_id",
		"sample-list":          "sample-list",
		"sample-list-limit":    "sample-list -l 1",
		"sample-list-meter":    "sample-list -m cpu",
		"sample-list-long":     "sample-list -m cpu --long",
		"sample-list-query":    "sample-list -q metadata.flavor.vcpus=integer::2;timestamp>2026-01-01T10:00:00",
		"sample-list-json":     "sample-list -m cpu -l 1 -f json --long",
		"sample-list-csv":      "sample-list -m cpu_util -f csv",
		"sample-list-none":     "sample-list -m nothing",
		"sample-show":          "sample-show 019b78ff-f900-8001-8002-030405020000",
		"sample-show-long":     "sample-show 019b78ff-f900-8001-8002-030405020000 --long",
		"sample-show-json":     "sample-show 019b78ff-f900-8001-8002-030405020000 -f json",
		"sample-show-csv":      "sample-show 019b78ff-f900-8001-8002-030405020000 -f csv -c id -c volume",
		"sample-show-value":    "sample-show 019b78ff-f900-8001-8002-030405020000 -f value -c volume -c unit",
		"statistics":           "statistics -m cpu_util",
		"statistics-period":    "statistics -m cpu_util -p 10",
		"statistics-group":     "statistics -m cpu_util -g project_id -g user_id -p 10",
		"statistics-aggregate": "statistics -m cpu_util -a avg -a stddev -a cardinality<-resource_id",
		"statistics-json":      "statistics -m cpu -g project_id -f json",
		"resource-list":        "resource-list",
		"resource-list-query":  "resource-list -q metadata.display_name=web1",
		"resource-show":        "resource-show 5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10",
		"resource-show-wide":   "resource-show dom-日本",
		"resource-show-json":   "resource-show dom-日本 -f json",
		"gap-list":             "gap-list",
		"gap-list-none":        "gap-list --start 2026-01-02",
		"usage":                "usage --from 2026-01-01 --to 2026-01-02 --split flavor.name",
		"usage-query":          "usage --from 2026-01-01 --to 2026-01-02 --project 7f2a -m cpu -f json",
		"usage-total":          "usage --from 2026-01-01 --to 2026-01-02 -m cpu -m cpu_util --total",
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

func TestAListThatMayBeCutSaysSo(t *testing.T) {
	for rows, want := range map[int]bool{99: false, 100: true, 101: false} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = fmt.Fprint(w, "["+strings.Repeat("{},", rows-1)+"{}]")
		}))
		for _, line := range []string{"meter-list", "sample-list", "sample-list -m cpu", "resource-list", "gap-list"} {
			out, err := run(t, server.URL, strings.Fields(line)...)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.HasSuffix(out, "there may be more: -l N lists N.\n"); got != want {
				t.Errorf("%s with %d rows: got %v, want %v", line, rows, got, want)
			}
			if out, err = run(t, server.URL, strings.Fields(line+" -l 100")...); err != nil || strings.Contains(out, "there may be more") {
				t.Errorf("%s -l 100: %v, it says that there may be more", line, err)
			}
		}
		server.Close()
	}
}

func TestHelpTeachesByExample(t *testing.T) {
	root := &cobra.Command{Use: "kvmeter"}
	Add(root, "", Options{Socket: "/run/kvmeter/agent.sock"})
	for _, cmd := range root.Commands() {
		if !cmd.Runnable() {
			continue // a topic
		}
		t.Run(cmd.Name(), func(t *testing.T) {
			got, err := run(t, "", cmd.Name(), "--help")
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"Examples:", "  kvmeter " + cmd.Name(), "Flags:"} {
				if !strings.Contains(got, want) {
					t.Errorf("help lacks %q:\n%s", want, got)
				}
			}
		})
	}
}

func TestShellsAreOfferedWhatMayFollow(t *testing.T) {
	url, _ := canned(t, map[string]string{
		"GET /v2/meters":                 `[{"name": "cpu"}, {"name": "cpu_util"}, {"name": "e\u001b[31mvil"}]`,
		"GET /v2/resources":              `[{"resource_id": "vm-1"}, {"resource_id": "vm-2"}]`,
		"GET /v2/event_types":            `["a.b"]`,
		"GET /v2/event_types/a.b/traits": `[{"name": "state", "type": "string"}]`,
	})
	for line, want := range map[string]string{
		"meter-list -f":              "table json csv value",
		"meter-list --unique":        "True False",
		"sample-create --meter-type": "gauge delta cumulative",
		"statistics -m":              "cpu cpu_util",
		"sample-list --meter":        "cpu cpu_util",
		"sample-create -r":           "vm-1 vm-2",
		"usage --resource":           "vm-1 vm-2",
		"resource-show":              "vm-1 vm-2",
		"sample-show":                "",
		"trait-list -e":              "a.b",
		"trait-list -e a.b -t":       "state",
	} {
		for _, endpoint := range []string{url, "http://127.0.0.1:1"} {
			got, err := run(t, endpoint, append(append([]string{"__complete"}, strings.Fields(line)...), "")...)
			words, _, ok := strings.Cut(got, ":4\n") // no files
			if endpoint != url && strings.Contains("cpu cpu_util vm-1 vm-2 a.b state", want) {
				want = ""
			}
			if words = strings.Join(strings.Fields(words), " "); err != nil || !ok || words != want {
				t.Errorf("%s at %s: got %q, %v, want %s", line, endpoint, got, err, want)
			}
		}
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	url := serve(t)
	for name, tc := range map[string]struct {
		endpoint string
		line     []string
		want     string
	}{
		"no API": {
			"http://127.0.0.1:1",
			[]string{"meter-list"},
			"cannot reach kvmeter's API at http://127.0.0.1:1 (connection refused): is `kvmeter up` or `kvmeter central` running? --endpoint or KVMETER_ENDPOINT names another address",
		},
		"no scheme": {
			"127.0.0.1:1",
			[]string{"meter-list"},
			"cannot reach kvmeter's API at http://127.0.0.1:1 (connection refused): is `kvmeter up` or `kvmeter central` running? --endpoint or KVMETER_ENDPOINT names another address",
		},
		"the API's own text":  {url, []string{"sample-show", "zz"}, "Sample zz Not Found (HTTP 404)"},
		"unknown field":       {url, []string{"resource-list", "-q", "zz=1"}, `Unknown argument: "zz": unrecognized field in query: [<Query 'zz' eq '1' >], valid keys: ['project', 'resource', 'search_offset', 'source', 'timestamp', 'user'] (HTTP 400)`},
		"no id":               {url, []string{"sample-show"}, "sample-show wants the id of one sample, got 0 arguments"},
		"empty id":            {url, []string{"resource-show", ""}, "resource-show wants the id of one resource, got 1 arguments"},
		"stray argument":      {url, []string{"meter-list", "cpu"}, "meter-list takes no argument \"cpu\"; see `kvmeter meter-list --help`"},
		"watch and a time":    {url, []string{"meter-list", "--watch", "1s"}, "--watch 1s: write --watch=1s"},
		"no meter":            {url, []string{"statistics"}, "statistics wants the name of a meter: -m METER; `kvmeter meter-list --unique True` lists them"},
		"empty aggregate":     {url, []string{"statistics", "-m", "cpu", "-a", ""}, `invalid aggregate "": it is FUNC or FUNC<-PARAM, such as avg or cardinality<-resource_id`},
		"unknown aggregate":   {url, []string{"statistics", "-m", "cpu", "-a", "median"}, "Invalid aggregation function: median (HTTP 400)"},
		"unknown format":      {url, []string{"meter-list", "-f", "xml"}, `there is no output format "xml"; there are table, json, csv, value`},
		"unknown column":      {url, []string{"resource-list", "-c", "Owner"}, `there is no column "Owner"; there are Resource ID, Source, User ID, Project ID`},
		"limit that is none":  {url, []string{"meter-list", "-l", "0"}, `invalid argument "0" for "-l, --limit" flag: it must be a positive number`},
		"limit with a tail":   {url, []string{"meter-list", "-l", "3x"}, `invalid argument "3x" for "-l, --limit" flag: it must be a positive number`},
		"unique that is none": {url, []string{"meter-list", "--unique", "maybe"}, `--unique is True or False, not "maybe"`},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(t, tc.endpoint, tc.line...)
			if err == nil || err.Error() != tc.want {
				t.Errorf("got  %v\nwant %s", err, tc.want)
			}
			if out != "" {
				t.Errorf("printed %q", out)
			}
		})
	}
}
