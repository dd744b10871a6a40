//go:build lab

package conversion

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/notifier/definition"
	"github.com/kvmeter/kvmeter/sample"
)

var (
	oracleSeed  = flag.Uint64("oracle.seed", 1, "of the cases that the oracle is asked")
	oracleCases = flag.Int("oracle.cases", 40, "how many cases the oracle is asked")
)

// oracleCase is a question to testdata/oracle.py.
type oracleCase struct {
	Kind        string            `json:"kind"`
	Definitions string            `json:"definitions"`
	Options     []string          `json:"options"`
	Inputs      []json.RawMessage `json:"inputs"`
}

type oracleAnswer struct {
	Refused bool
	Why     string
	Answers []struct {
		Failed  bool
		Why     string
		Samples []map[string]any
		Event   map[string]any
	}
}

// TestGeneratedCasesGiveTheAnswersOfCeilometer makes definitions and notifications
// at random and asks Ceilometer's own code, as Debian has it, about them. Where
// that fails, kvmeter says an error; how much is left of the notification is
// deliberately not the same.
func TestGeneratedCasesGiveTheAnswersOfCeilometer(t *testing.T) {
	ask := startOracle(t)
	g := &generator{rand.New(rand.NewPCG(*oracleSeed, 0))}
	failed, refused, given := 0, 0, 0
	for i := range *oracleCases {
		c := g.next()
		question, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var want oracleAnswer
		ask(question, &want)
		if diff := compare(t, c, &want); diff != "" {
			t.Errorf("case %d of seed %d:\n%s\n%s", i, *oracleSeed, question, diff)
		}
		if want.Refused {
			refused++
		}
		for _, a := range want.Answers {
			if a.Failed {
				failed++
			}
			given += len(a.Samples)
			if a.Event != nil {
				given++
			}
		}
	}
	t.Logf("%d samples and events; the original failed on %d notifications and refused %d files", given, failed, refused)
	if given < *oracleCases/2 {
		t.Errorf("%d samples and events of %d cases: the generator makes nothing that counts", given, *oracleCases)
	}
}

// startOracle returns what asks testdata/oracle.py.
func startOracle(t *testing.T) func(question []byte, answer any) {
	t.Helper()
	cmd := exec.Command("/usr/bin/python3", "testdata/oracle.py")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: apt-get install python3-ceilometer", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
			t.Error(err)
		}
	})
	answers := bufio.NewScanner(out)
	answers.Buffer(nil, 1<<26)
	return func(question []byte, answer any) {
		if _, err := in.Write(append(question, '\n')); err != nil {
			t.Fatal(err)
		}
		if !answers.Scan() {
			tail := log.Bytes()
			t.Fatalf("the oracle ended: %s", tail[max(0, len(tail)-2000):])
		}
		if err := decode(answers.Bytes(), answer); err != nil {
			t.Fatalf("%v: %s", err, answers.Bytes())
		}
	}
}

// decode reads JSON and keeps numbers as they are written; Python's NaN and
// infinities, which JSON has not, become null, as kvmeter prints them.
func decode(data []byte, v any) error {
	for _, word := range []string{"-Infinity", "Infinity", "NaN"} {
		for _, before := range []string{" ", "["} {
			data = bytes.ReplaceAll(data, []byte(before+word), []byte(before+"null"))
		}
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	return d.Decode(v)
}

// compare says what kvmeter answers otherwise.
func compare(t *testing.T, c oracleCase, want *oracleAnswer) string {
	t.Helper()
	settings := DefaultSettings()
	settings.Meters.StrictContext = true
	for _, o := range c.Options {
		if err := settings.Set(o); err != nil {
			t.Fatal(err)
		}
	}
	settings.NoMeters, settings.NoEvents = c.Kind != "meter", c.Kind != "event"
	file := filepath.Join(t.TempDir(), "definitions.yaml")
	if err := os.WriteFile(file, []byte(c.Definitions), 0o600); err != nil {
		t.Fatal(err)
	}
	meterFiles, eventFile := []string{file}, ""
	if c.Kind == "event" {
		meterFiles, eventFile = nil, file
	}
	d, findings, err := Load(settings, meterFiles, eventFile)
	if err != nil || want.Refused {
		if !want.Refused || err == nil && definition.Errors(findings) == nil { // Ceilometer stops at what costs kvmeter a meter
			return fmt.Sprintf("refused: Ceilometer %v (%s), kvmeter %v %v", want.Refused, want.Why, err, findings)
		}
		return ""
	}
	converter := NewConverter(d)
	diff := ""
	for i, in := range c.Inputs {
		r, err := converter.Convert(in)
		if err != nil {
			return fmt.Sprintf("input %d: %v", i, err)
		}
		var got struct {
			Samples []map[string]any
			Event   map[string]any
			Errors  []string
		}
		if err := decode(r.AppendLine(nil, nil), &got); err != nil {
			t.Fatal(err)
		}
		a := &want.Answers[i]
		if a.Why == "MemoryError()" || strings.Contains(a.Why, "index-sized") || slices.ContainsFunc(got.Errors, func(e string) bool {
			return strings.HasSuffix(e, "does not fit in 64 bits") || strings.HasSuffix(e, sample.ErrNotFinite.Error())
		}) {
			continue // deliberately
		}
		if a.Failed != (len(got.Errors) > 0) {
			diff += fmt.Sprintf("input %d: Ceilometer fails: %v (%s), kvmeter: %q\n", i, a.Failed, a.Why, got.Errors)
		}
		if a.Failed {
			continue
		}
		var samples []any
		for _, s := range got.Samples {
			samples = append(samples, map[string]any{
				"name": s["counter_name"], "type": s["counter_type"], "unit": s["counter_unit"], "volume": s["counter_volume"],
				"user_id": s["user_id"], "project_id": s["project_id"], "resource_id": s["resource_id"], "timestamp": s["timestamp"],
				"resource_metadata": s["resource_metadata"], "source": s["source"],
			})
		}
		var theirs []any
		for _, s := range a.Samples {
			theirs = append(theirs, s)
		}
		if d := cmp.Diff(canonical(theirs), canonical(samples)); d != "" {
			diff += fmt.Sprintf("input %d: samples (-Ceilometer +kvmeter)\n%s", i, d)
		}
		if raw, ok := got.Event["raw"].(map[string]any); ok {
			delete(raw, "priority") // where it is kept is not the definitions'
		}
		if d := cmp.Diff(canonical(a.Event), canonical(got.Event)); d != "" {
			diff += fmt.Sprintf("input %d: event (-Ceilometer +kvmeter)\n%s", i, d)
		}
	}
	return diff
}

// canonical writes numbers in one way; whole ones and floats stay apart.
func canonical(v any) any {
	switch v := v.(type) {
	case json.Number:
		if strings.ContainsAny(string(v), ".eE") {
			f, _ := strconv.ParseFloat(string(v), 64)
			return f
		}
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = canonical(v[i])
		}
		return out
	case map[string]any:
		if v == nil {
			return nil
		}
		out := map[string]any{}
		for k := range v {
			out[k] = canonical(v[k])
		}
		return out
	}
	return v
}

// generator makes cases.
type generator struct{ *rand.Rand }

func (g *generator) one(of ...string) string { return of[g.IntN(len(of))] }

// maybe is true once in n times.
func (g *generator) maybe(n int) bool { return g.IntN(n) == 0 }

func (g *generator) next() oracleCase {
	c := oracleCase{Kind: g.one("meter", "event"), Options: []string{}}
	var file any
	if c.Kind == "meter" {
		list := make([]any, 1+g.IntN(3))
		for i := range list {
			list[i] = g.meter()
		}
		file = map[string]any{"metric": list}
		if g.maybe(4) {
			c.Options = append(c.Options, g.one("DEFAULT.reserved_metadata_keys=k1", "DEFAULT.reserved_metadata_length=3", "DEFAULT.sample_source=here", "DEFAULT.reserved_metadata_namespace=k", "DEFAULT.reserved_metadata_namespace=metering.a"))
		}
	} else {
		list := make([]any, 1+g.IntN(3))
		for i := range list {
			list[i] = g.event()
		}
		file = list
		if g.maybe(4) {
			c.Options = append(c.Options, g.one("event.drop_unmatched_notifications=true", "event.store_raw=info", "event.store_raw=error"))
		}
	}
	text, err := json.Marshal(file)
	if err != nil {
		panic(err)
	}
	c.Definitions = string(text)
	for range 1 + g.IntN(3) {
		c.Inputs = append(c.Inputs, g.notification())
	}
	return c
}

func (g *generator) eventType() string {
	return g.one("t.a", "t.a.start", "t.b.end", "other.x", "compute.instance.create.end")
}

func (g *generator) meter() any {
	m := map[string]any{
		"name": g.one("m1", "m2", "m.3", "$.payload.text", "$.payload.list[*].name", "payload.objs[*].name", g.path()),
		"type": g.one("gauge", "delta", "cumulative"), "unit": g.one("u", "B", "$.payload.unit", "payload.objs[*].unit", "event_type", g.path()),
		"event_type":  g.patterns("t.*", "t", "t.a", "t\\.a$", "t.(a|b)", "t.(?!a)", "[tc].*", "compute.instance.*", "(other|t).x", "", "^t.a", "T.A"),
		"volume":      g.value("1", 3),
		"resource_id": g.value("$.payload.id", 2),
	}
	for _, key := range []string{"user_id", "project_id", "timestamp"} {
		if g.maybe(4) {
			m[key] = g.value(g.one("$.payload.user", "payload.time", "$.payload.objs[*].time", "ctxt.user_id"), 2)
		}
	}
	if g.maybe(3) {
		metadata := map[string]any{}
		for range 1 + g.IntN(3) {
			metadata[g.one("a", "b", "c", "k1")] = g.value("$.payload.text", 4)
		}
		m["metadata"] = metadata
	}
	if g.maybe(4) {
		m["user_metadata"] = g.one("$.payload.meta", "payload.obj", "payload.none", "$.payload.text", "ctxt")
	}
	if g.maybe(3) {
		attributes := []string{"name", "unit", "volume", "resource_id", "user_id", "timestamp", "type", "metadata"}
		if g.maybe(3) {
			m["lookup"] = g.one(attributes...)
		} else {
			g.Shuffle(len(attributes), func(i, j int) { attributes[i], attributes[j] = attributes[j], attributes[i] })
			m["lookup"] = attributes[:1+g.IntN(3)]
		}
		m["name"] = g.one("$.payload.objs[*].name", "payload.list[*]", "m1", "payload.objs[?(@.n > 1)].name")
		m["volume"] = g.one("$.payload.objs[*].n", "payload.objs[*].maybe", "payload.list[*]", "$.payload.int", g.path())
		for key, v := range m {
			if _, constant := v.(int); constant { // on which the original fails
				delete(m, key)
			}
		}
	}
	if g.maybe(20) {
		delete(m, g.one("name", "type", "unit", "volume", "resource_id", "event_type"))
	}
	if g.maybe(20) {
		odd := []any{nil, "", 0, 5, []any{}, map[string]any{}, true, "nothing", []any{"t(", 5}, []any{1.5}}
		m[g.one("name", "type", "unit", "volume", "resource_id", "event_type", "user_id", "timestamp", "metadata", "user_metadata")] = odd[g.IntN(len(odd))]
	}
	return m
}

// patterns returns a text or a list.
func (g *generator) patterns(of ...string) any {
	if g.maybe(3) {
		list := make([]any, 1+g.IntN(3))
		for i := range list {
			list[i] = g.one(of...)
		}
		return list
	}
	return g.one(of...)
}

func (g *generator) event() any {
	traits := map[string]any{}
	for range 1 + g.IntN(4) {
		name := g.one("a", "b", "c", "service", "project_id", "tenant_id")
		if g.maybe(3) {
			traits[name] = g.value("payload.text", 1)
			continue
		}
		trait := map[string]any{"fields": g.value("payload.text", 1)}
		if _, computed := trait["fields"].(map[string]any); computed {
			trait = trait["fields"].(map[string]any)
		}
		if g.maybe(2) {
			trait["type"] = g.one("int", "float", "datetime", "text", "Int", "TEXT", "datetime", "int")
		}
		traits[name] = trait
	}
	e := map[string]any{"traits": traits, "event_type": g.patterns("t.*", "*", "!t.a", "t.[ab]*", "t.?", "other.*", "!other.*", "*.end", "t.[!a]*", "T.*", "compute.instance.*")}
	if g.maybe(30) {
		delete(e, g.one("traits", "event_type"))
	}
	return e
}

// value returns what may stand for a path; usual once in n times it is not.
func (g *generator) value(usual string, n int) any {
	if !g.maybe(n) {
		return usual
	}
	switch g.IntN(8) {
	case 0:
		list := make([]any, 1+g.IntN(3))
		for i := range list {
			list[i] = g.path()
		}
		return list
	case 1:
		return g.IntN(5)
	case 2, 3:
		f := map[string]any{"fields": g.path()}
		if g.maybe(2) {
			f["fields"] = []any{g.path(), g.path()}
		}
		switch g.IntN(5) {
		case 4:
			f["plugin"] = g.one("split", "bitfield")
		case 0:
			f["plugin"] = "timedelta"
			f["fields"] = []any{g.one("payload.time", "payload.objs[0].time", "payload.text"), g.one("payload.time2", "payload.time", "payload.int", "payload.none")}
		case 1:
			p := map[string]any{}
			if g.maybe(2) {
				p["separator"] = g.one(".", "-", " ", "an")
			}
			if g.maybe(2) {
				p["segment"] = g.IntN(4) - 1
			}
			if g.maybe(2) {
				p["max_split"] = g.IntN(3)
			}
			f["plugin"] = map[string]any{"name": "split", "parameters": p}
		case 2:
			flag := map[string]any{"path": g.one("payload.int", "payload.text", "payload.list.[0]"), "bit": g.IntN(4)}
			if g.maybe(2) {
				flag["value"] = []any{"banana", 7, 1.5, true, nil}[g.IntN(5)]
			}
			f["plugin"] = map[string]any{"name": "bitfield", "parameters": map[string]any{"initial_bitfield": g.IntN(3), "flags": []any{flag}}}
			f["fields"] = []any{"payload.int", "payload.text", "payload.list[0]"}
		}
		return f
	}
	return g.path()
}

// path returns a path into a notification, mostly one that leads somewhere.
func (g *generator) path() string {
	text := g.term()
	for g.maybe(4) {
		switch g.IntN(6) {
		case 0, 1:
			text += g.one(" + ", " - ", " * ", "+", "-", "*") + g.term()
		case 2:
			text += g.one("|", " | ") + g.term()
		case 3:
			text = "(" + text + ")"
		case 4:
			text += g.one(" where ", "..", ".", " & ") + g.field()
		case 5:
			at := g.IntN(len(text) + 1)
			text = text[:at] + g.one("[", "]", "'", ".", "$", "`", "*", "(", " ", "-", "1") + text[at:]
		}
	}
	return text
}

func (g *generator) field() string {
	return g.one("id", "text", "int", "float", "neg", "bool", "none", "empty", "list", "objs", "obj", "a", "b", "n", "name", "num", "time", "time2", "dotted", "missing", "*", "'x.y'", "meta", "big", "unit", "maybe")
}

func (g *generator) term() string {
	switch g.IntN(10) {
	case 0:
		return g.one("1", "2.5", "'q'", "\"w\"", "-1", "10", "0", "ctxt.user_id", "publisher_id", "event_type", "metadata.message_id", "payload", "$.metadata.timestamp")
	case 1:
		return "payload" + g.one(".", "..", ".") + g.one("(a|b)", "(int|text)", "*", "obj.*", "`this`", "obj.`parent`", "obj.a.`parent`.b")
	}
	text := g.one("payload.", "$.payload.", "$.payload.", "payload..") + g.field()
	for g.maybe(2) {
		switch g.IntN(9) {
		case 0, 1:
			text += g.one(".", "..") + g.field()
		case 2:
			text += g.one("[*]", "[0]", "[1]", "[-1]", "[9]", "[0:2]", "[1:]", "[:1]", "[-2:]", "['a','b']", "[a]", "[a,b]")
		case 3:
			text += g.one(".`len`", ".`sorted`", "[/n]", "[\\n]", "[/name,\\n]", ".`split(., 0, -1)`", ".`split(a, 1, 1)`", ".`split(-, 1, -1)`")
		case 4:
			text += g.one(".`sub(/an/, X)`", ".`sub(/(a)(n)/, \\\\2\\\\1)`", ".`sub(/^$/, e)`", ".`sub(/[a-m]/, )`", ".`sub(/\\\\w+$/, X)`", ".`sub(/(?P<x>.)(n)/, \\\\2-\\\\g<x>)`", ".`sub(/ ?\\\\b[^b]*?a/, \\\\\\\\)`")
		case 5, 6, 7:
			text += "[?" + g.one("(", "") + g.one("@.", "", "@.", "@.", "")
			text += g.one("n", "name", "a", "maybe", "missing", "time") + g.one(" > ", " = ", "=", " == ", "<", " != ", " >= ", "<=", " ~ ", "~") +
				g.one("1", "2", "x", "'x'", "\"y\"", "1.5", "true", "false", "-1", "'[xy]'", "'\\\\w{2}'", "2026", "1.0")
			if strings.Contains(text[strings.LastIndex(text, "[?"):], "(") {
				if g.maybe(3) {
					text += g.one(" & ", "&") + "@.n" + g.one(" < 5", "=2", "")
				}
				text += ")"
			}
			text += "]"
			if g.maybe(2) {
				text += "." + g.one("n", "name", "maybe", "time")
			}
		}
	}
	return text
}

func (g *generator) notification() json.RawMessage {
	scalar := func() any {
		return []any{
			"banana", "7", " 7 ", "1.5", "nan", "", "é", "a.b-c d", "x", "true", 0, 1, 7, -3, 1.5, 1e20, 2.0, -0.5, true, false, nil,
			json.Number("12345678901234567890123"), json.Number("1e3"), "2026-01-02T03:04:05", "2026-01-02 03:04:05.5", "2026-01-02T03:04:05+02:00",
		}[g.IntN(26)]
	}
	when := func() any {
		if g.maybe(6) {
			return scalar()
		}
		return g.one("2026-01-02T03:04:05", "2026-01-02 03:04:05.123456", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05+02:00", "2026-01-02T03:05:05.5-03:30")
	}
	var objs []any
	for range g.IntN(4) {
		o := map[string]any{"name": g.one("x", "y", "z", "n1"), "n": []any{1, 2, 3, "2", 2.5, nil}[g.IntN(6)], "unit": g.one("B", "s"), "time": when()}
		if g.maybe(2) {
			o["maybe"] = scalar()
		}
		objs = append(objs, o)
	}
	list := make([]any, g.IntN(4))
	for i := range list {
		list[i] = scalar()
	}
	payload := map[string]any{
		"id": g.one("r1", "r-2", "r.3"), "text": g.one("banana", "a.b.c", "Aé", "x y", ""), "int": 7, "float": 1.5, "neg": -3, "bool": g.maybe(2),
		"none": nil, "empty": "", "list": list, "objs": objs, "obj": map[string]any{"a": scalar(), "b": scalar(), "n": 2, "x.y": scalar()},
		"a": scalar(), "b": scalar(), "n": scalar(), "num": g.one("7", "7.5", " 8 ", "x"), "time": when(), "time2": when(), "x.y": scalar(),
		"meta": map[string]any{"metering.k": scalar(), "metering.a.b": scalar(), "k1": scalar(), "other": 1}, "big": json.Number("9007199254740993"),
		"unit": g.one("B", "s", ""), "user": "u9", "tenant_id": []any{"p9", nil, 5}[g.IntN(3)], "maybe": scalar(),
	}
	for key := range payload {
		if g.maybe(12) {
			payload[key] = scalar()
		} else if g.maybe(12) {
			delete(payload, key)
		}
	}
	ctxt := map[string]any{}
	if g.maybe(2) {
		ctxt = map[string]any{"user_id": "cu", "project_id": "cp", "request_id": "req-1", "tenant_id": "ct", "user": "cu2"}
	}
	message := map[string]any{
		"ctxt": ctxt, "publisher_id": g.one("svc.host1", "svc", "svc.h.x"), "event_type": g.eventType(), "payload": payload,
		"priority": g.one("info", "info", "info", "error"),
		"metadata": map[string]any{"message_id": "6f0b2d1c-0000-4000-8000-000000000001", "timestamp": g.one("2026-11-21 10:00:00.123456", "2026-11-21T10:00:00", "2026-11-21 10:00:00+02:00")},
	}
	if g.maybe(15) {
		message["payload"] = scalar()
	}
	text, err := json.Marshal(message)
	if err != nil {
		panic(err)
	}
	return text
}
