package export

import (
	"cmp"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/sample"
)

// duckDB runs a query and returns its rows, all of texts or null.
func duckDB(t *testing.T, query string) (out [][]*string) {
	t.Helper()
	const script = `
		const {DuckDBInstance} = require("@duckdb/node-api");
		DuckDBInstance.create().then(d => d.connect()).then(c => c.runAndReadAll(process.argv[1])).then(r => console.log(JSON.stringify(r.getRowsJson())))
			.catch(e => { console.error(e.message); process.exit(1) });`
	cmd := exec.Command("node", "-e", script, query)
	cmd.Dir, cmd.Stderr = os.Getenv("KVMETER_DUCKDB"), t.Output()
	text, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatalf("%s: %v of %s", query, err, text)
	}
	return out
}

// TestDuckDBReadsWhatIsExported holds that another reader than the one of our own
// library reads the same.
func TestDuckDBReadsWhatIsExported(t *testing.T) {
	if os.Getenv("KVMETER_DUCKDB") == "" {
		t.Skip("KVMETER_DUCKDB does not name a folder with DuckDB for node; make test-duckdb does")
	}
	f := newFixture(t)
	f.put(t, []sample.Gap{{Meter: "cpu", Resource: "*", From: newYear.UnixMicro(), To: newYear.UnixMicro() + 9, Reason: "mute", Node: "node-1"}}, random(2000)...)
	if _, err := f.AppendEvents(t.Context(), []sample.Event{{ID: "e", Type: "x", Generated: newYear.UnixMicro(), Traits: []sample.Trait{
		{Name: "host", Type: sample.TextTrait, Text: "ö"}, {Name: "vcpus", Type: sample.IntTrait, Int: 2},
	}}, {ID: "without traits", Type: "x", Generated: newYear.UnixMicro() + 1}}); err != nil {
		t.Fatal(err)
	}
	if err := f.exporter(t, f, nil).pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.sameAsStored(t, f.read(t, firstFile))
	var want [][]*string
	text := func(s string) *string { return &s }
	for _, day := range []string{"2025-12-31", "2026-01-01"} {
		all, _ := rows[sampleRow](t, f.read(t, "samples/day="+day+"/part-0.parquet"))
		for _, r := range all {
			want = append(want, []*string{
				&r.ID, &r.Meter, &r.Type, &r.Unit, &r.Resource, r.Project, r.User, &r.Source, r.Exact, r.Metadata, &r.Origin, &r.Incarnation,
				text(strconv.FormatInt(r.Timestamp, 10)), text(strconv.FormatInt(r.Recorded, 10)), text(strconv.FormatFloat(r.Volume, 'g', -1, 64)), &day,
			})
		}
	}
	slices.SortFunc(want, func(a, b []*string) int { return cmp.Compare(*a[0], *b[0]) })
	got := duckDB(t, `SELECT message_id, meter, type, unit, resource_id, project_id, user_id, source, volume_exact, metadata, origin, incarnation,
		epoch_us(timestamp)::VARCHAR, epoch_us(recorded_at)::VARCHAR, volume::VARCHAR, day::VARCHAR
		FROM read_parquet('`+filepath.Join(f.dir, "samples/*/*.parquet")+`', hive_partitioning = true) ORDER BY message_id`)
	for _, row := range got { // DuckDB writes numbers in its own way
		v, err := strconv.ParseFloat(*row[14], 64)
		if err != nil {
			t.Fatal(err)
		}
		row[14] = text(strconv.FormatFloat(v, 'g', -1, 64))
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("samples: got (+) is not what is wanted (-):\n%s", diff)
	}
	for query, want := range map[string]string{
		`SELECT meter, resource_id, (epoch_us("to") - epoch_us("from"))::VARCHAR, reason, node FROM read_parquet('` + filepath.Join(f.dir, "gaps/*/*.parquet") + `')`:                             `[["cpu","*","9","mute","node-1"]]`,
		`SELECT message_id, t.name, t.type, t.value FROM (SELECT message_id, unnest(traits) AS t FROM read_parquet('` + filepath.Join(f.dir, "events/*/*.parquet") + `'))`:                        `[["e","host","text","ö"],["e","vcpus","int","2"]]`,
		`SELECT message_id, event_type, len(traits)::VARCHAR, raw, strftime(generated, '%x') FROM read_parquet('` + filepath.Join(f.dir, "events/*/*.parquet") + `') WHERE message_id LIKE '% %'`: `[["without traits","x","0",null,"` + newYear.Format(time.DateOnly) + `"]]`,
	} {
		got, err := json.Marshal(duckDB(t, query))
		if err != nil || string(got) != want {
			t.Errorf("%s: got %s, %v, want %s", query, got, err, want)
		}
	}
}
