package store_test

import (
	"encoding/json"
	"math"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

func rational(v sample.Volume) *big.Rat {
	switch v.Tag {
	case sample.I64:
		return new(big.Rat).SetInt64(int64(v.Bits))
	case sample.F64:
		return new(big.Rat).SetFloat64(v.Float64())
	}
	return new(big.Rat).SetUint64(v.Bits)
}

func TestVolumesCompareAsTheNumbersThatTheyAre(t *testing.T) {
	edges := []sample.Volume{
		sample.Uint(0), sample.Uint(1), sample.Uint(math.MaxUint64), sample.Uint(1 << 63), sample.Uint(1<<53 + 1), sample.Uint(math.MaxInt64),
		sample.Int(0), sample.Int(-1), sample.Int(math.MinInt64), sample.Int(math.MaxInt64), sample.Int(1<<53 + 1), sample.Int(-1<<53 - 1),
		sample.Float(0), sample.Float(math.Copysign(0, -1)), sample.Float(0.5), sample.Float(-0.5), sample.Float(1 << 53), sample.Float(-1 << 53),
		sample.Float(1 << 63), sample.Float(-1 << 63), sample.Float(1 << 64), sample.Float(math.MaxFloat64), sample.Float(-math.MaxFloat64),
		sample.Float(math.Nextafter(1<<64, 0)), sample.Float(math.Nextafter(-1<<63, 0)), sample.Float(math.Nextafter(-1<<63, -math.MaxFloat64)),
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		edges = append(edges, sample.Uint(r.Uint64()), sample.Int(int64(r.Uint64())), sample.Float(r.NormFloat64()*1e19))
	}
	for _, a := range edges {
		for _, b := range edges {
			if got, want := store.Compare(a, b), rational(a).Cmp(rational(b)); got != want {
				t.Errorf("%v (%d) and %v (%d): got %d, want %d", a, a.Tag, b, b.Tag, got, want)
			}
		}
	}
}

func TestMetadataIsFoundByItsPath(t *testing.T) {
	doc := store.NewDocument([]byte(`{"a":{"b":{"c":1}},"a.b":{"d":2},"list":[10,[11,{"x":null}]],"e[0]":"key","":{"":"empty"}}`))
	for path, want := range map[string]string{
		"a.b.c": "1", "a.b.d": "2", "list[0]": "10", "list[1][0]": "11", "list[1][1].x": "null", "e[0]": `"key"`, "a.b": `{"c":1}`,
	} {
		v, ok := doc.Lookup(path)
		got, err := json.Marshal(v)
		if !ok || err != nil || string(got) != want {
			t.Errorf("%s: got %s, %v, want %s", path, got, ok, want)
		}
	}
	for _, path := range []string{"b", "a.b.c.d", "list[2]", "list[-1]", "list[x]", "list[0", "list.0", "a[0]", "list[99999999999999999999]"} {
		if v, ok := doc.Lookup(path); ok {
			t.Errorf("%s: got %v, want nothing", path, v)
		}
	}
	if _, ok := store.NewDocument([]byte(`{"a":`)).Lookup("a"); ok {
		t.Error("broken JSON has a key")
	}
}

func TestTextOfMetadataValues(t *testing.T) {
	doc := store.NewDocument([]byte(`{"s":"x","n":1.50,"b":true,"z":null,"l":["a",{"b":1}]}`))
	for key, want := range map[string]string{"s": "x", "n": "1.50", "b": "true", "l": `["a",{"b":1}]`} {
		v, _ := doc.Lookup(key)
		if got := store.Text(v); got == nil || *got != want {
			t.Errorf("%s: got %v, want %s", key, got, want)
		}
	}
	if got := store.Text(nil); got != nil {
		t.Errorf("null: got %q, want nil", *got)
	}
}

func TestFixDecidesWhatIsKnown(t *testing.T) {
	meter := store.Where(store.FieldMeter, store.Eq, "cpu")
	project := store.Where(store.FieldProject, store.Eq, "p1")
	late := store.Where(store.FieldTime, store.Gt, int64(5))
	isCPU := func(c *store.Cond) (store.Truth, bool) { return c.Text("cpu"), c.Field == store.FieldMeter }
	noProject := func(c *store.Cond) (store.Truth, bool) { return c.Text(""), c.Field == store.FieldProject }
	for name, tc := range map[string]struct {
		filter            store.Filter
		decide            func(*store.Cond) (store.Truth, bool)
		selects, constant bool
	}{
		"a condition that holds leaves nothing":          {meter, isCPU, true, true},
		"its negation never holds":                       {store.Filter{Not: &meter}, isCPU, false, true},
		"and with an open one stays open":                {store.And(meter, late), isCPU, false, false},
		"or with an open one holds":                      {store.Filter{Or: []store.Filter{meter, late}}, isCPU, true, true},
		"the unknown never holds with an open one":       {store.And(store.And(project, meter), late), noProject, false, false},
		"nor does its negation":                          {store.Filter{Not: &project}, noProject, false, true},
		"the empty filter is constant":                   {store.Filter{}, isCPU, true, true},
		"the unknown or an open one depends on the open": {store.Filter{Or: []store.Filter{project, late}}, noProject, false, false},
	} {
		p, err := store.Compile(tc.filter)
		if err != nil {
			t.Fatal(err)
		}
		if may := p.May(tc.decide); tc.constant && may != tc.selects {
			t.Errorf("%s: it may select: got %v, want %v", name, may, tc.selects)
		}
		if selects, constant := p.Fix(tc.decide).Const(); selects != tc.selects || constant != tc.constant {
			t.Errorf("%s: got %v, %v, want %v, %v", name, selects, constant, tc.selects, tc.constant)
		}
	}
}

// What May rules out, no sample matches.
func TestMayRulesOutOnlyWhatCannotMatch(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	fields := []store.Field{store.FieldMeter, store.FieldProject, store.FieldUser}
	var filter func(depth int) store.Filter
	filter = func(depth int) store.Filter {
		switch n := r.IntN(4); {
		case depth == 0 || n == 0:
			return store.Where(fields[r.IntN(3)], store.Eq, string(rune('a'+r.IntN(2))))
		case n == 1:
			sub := filter(depth - 1)
			return store.Filter{Not: &sub}
		case n == 2:
			return store.And(filter(depth-1), filter(depth-1))
		}
		return store.Filter{Or: []store.Filter{filter(depth - 1), filter(depth - 1)}}
	}
	values := []string{"", "a", "b"}
	ruledOut := 0
	for range 500 {
		p, err := store.Compile(filter(3))
		if err != nil {
			t.Fatal(err)
		}
		for _, meter := range values {
			may := p.May(func(c *store.Cond) (store.Truth, bool) { return c.Text(meter), c.Field == store.FieldMeter })
			if !may {
				ruledOut++
			}
			for _, project := range values {
				for _, user := range values {
					s := &store.Sample{Sample: sample.Sample{Name: meter, Project: project, User: user}}
					if !may && p.Match(s, store.NewDocument(nil)) {
						t.Fatalf("%q %q %q matches what May rules out", meter, project, user)
					}
				}
			}
		}
	}
	if ruledOut < 100 {
		t.Errorf("only %d cases were ruled out; the test is blind", ruledOut)
	}
}

func TestListsAndPatterns(t *testing.T) {
	s := &store.Sample{Sample: sample.Sample{
		ID: sample.ParseID("id-1"), Name: "cpu", Volume: sample.Uint(50), Resource: "vm-1", Time: 1_500_000,
	}, Recorded: 2_000_000}
	doc := store.NewDocument([]byte(`{"n": 2, "s": "small", "b": true, "l": ["a"]}`))
	meta := func(key string, op store.Op, value any) store.Filter {
		return store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: key, Op: op, Value: value}}
	}
	for name, tc := range map[string]struct {
		filter store.Filter
		want   store.Truth
	}{
		"a text of a list":                         {store.Where(store.FieldMeter, store.In, []any{"mem", "cpu"}), store.True},
		"a text of no list":                        {store.Where(store.FieldMeter, store.In, []any{"mem"}), store.False},
		"an unknown text":                          {store.Where(store.FieldProject, store.In, []any{"p1"}), store.Unknown},
		"an id of a list":                          {store.Where(store.FieldID, store.In, []any{"id-2", "id-1"}), store.True},
		"a time of a list":                         {store.Where(store.FieldTime, store.In, []any{int64(1), int64(1_500_000)}), store.True},
		"a number of a list, whatever its tag":     {store.Where(store.FieldVolume, store.In, []any{sample.Int(-1), sample.Float(50)}), store.True},
		"a number of no list":                      {store.Where(store.FieldVolume, store.In, []any{sample.Float(50.5)}), store.False},
		"metadata of a list":                       {meta("n", store.In, []any{"2", 2.0}), store.True},
		"metadata of another type":                 {meta("n", store.In, []any{"2"}), store.False},
		"metadata of a list of texts":              {meta("s", store.In, []any{"large", "small"}), store.True},
		"metadata that is missing":                 {meta("x", store.In, []any{"large"}), store.Unknown},
		"a pattern matches anywhere":               {store.Where(store.FieldMeter, store.Match, "p"), store.True},
		"a pattern may be bound":                   {store.Where(store.FieldMeter, store.Match, "^p"), store.False},
		"a pattern does not match an unknown text": {store.Where(store.FieldUser, store.Match, ".*"), store.Unknown},
		"a pattern of an id":                       {store.Where(store.FieldID, store.Match, "^id-[0-9]$"), store.True},
		"a pattern of a number":                    {store.Where(store.FieldVolume, store.Match, `^50\.0$`), store.True},
		"a pattern of a time":                      {store.Where(store.FieldTime, store.Match, `^1970-01-01T00:00:01\.500000$`), store.True},
		"a pattern of the time of storing":         {store.Where(store.FieldRecorded, store.Match, "02$"), store.True},
		"a pattern of metadata":                    {meta("s", store.Match, "(?i)^SM"), store.True},
		"a pattern of metadata that is no text":    {meta("n", store.Match, "2"), store.Unknown},
	} {
		p, err := store.Compile(tc.filter)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		negated, err := store.Compile(store.Filter{Not: &tc.filter})
		if err != nil {
			t.Fatal(err)
		}
		got := store.Unknown
		switch {
		case p.Match(s, doc):
			got = store.True
		case negated.Match(s, doc):
			got = store.False
		}
		if got != tc.want {
			t.Errorf("%s: got %d, want %d", name, got, tc.want)
		}
	}
	for name, f := range map[string]store.Filter{
		"a pattern that is none":       store.Where(store.FieldMeter, store.Match, "("),
		"a pattern that is too long":   store.Where(store.FieldMeter, store.Match, strings.Repeat("a", store.MaxPattern+1)),
		"a pattern that is no text":    store.Where(store.FieldMeter, store.Match, 1),
		"a pattern that would explode": store.Where(store.FieldMeter, store.Match, "((a{100}){100}){100}"),
		"a list that is none":          store.Where(store.FieldMeter, store.In, "cpu"),
		"a list of other types":        store.Where(store.FieldTime, store.In, []any{"cpu"}),
		"a list of nothing known":      store.Where(store.FieldMeter, store.In, []any{nil}),
	} {
		if _, err := store.Compile(f); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestRequiredYieldsWhatEveryMatchSatisfies(t *testing.T) {
	a, b, c := store.Where(store.FieldMeter, store.Eq, "a"), store.Where(store.FieldUnit, store.Eq, "b"), store.Where(store.FieldUser, store.Eq, "c")
	p, err := store.Compile(store.And(a, store.And(b, store.Filter{Or: []store.Filter{c, a}}), store.Filter{Not: &c}))
	if err != nil {
		t.Fatal(err)
	}
	var got []store.Field
	p.Required(func(c *store.Cond) bool {
		got = append(got, c.Field)
		return true
	})
	if len(got) != 2 || got[0] != store.FieldMeter || got[1] != store.FieldUnit {
		t.Errorf("got %v, want the meter and the unit", got)
	}
}

// FuzzLookup gives metadata and paths that nobody checked: nothing panics, and
// what is found is equal to itself.
func FuzzLookup(f *testing.F) {
	f.Add([]byte(`{"a":{"b":[1,{"c":null}]}}`), "a.b[1].c")
	f.Add([]byte(`{"a.b":1e999}`), "a.b")
	f.Add([]byte(`[[[]]]`), "[0][0]")
	f.Fuzz(func(t *testing.T, raw []byte, path string) {
		v, ok := store.NewDocument(raw).Lookup(path)
		if !ok {
			return
		}
		filter := store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: path, Op: store.Eq, Value: v}}
		p, err := store.Compile(filter)
		if err != nil {
			return // a number out of range, for one
		}
		if !p.Match(&store.Sample{}, store.NewDocument(raw)) {
			t.Errorf("%s in %s is not equal to itself", path, raw)
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	b.ReportAllocs()
	p, err := store.Compile(store.And(
		store.Where(store.FieldVolume, store.Gt, sample.Uint(5)),
		store.Filter{Cond: &store.Cond{Field: store.FieldMetadata, Key: "flavor.name", Op: store.Eq, Value: "small"}},
	))
	if err != nil {
		b.Fatal(err)
	}
	doc := store.NewDocument([]byte(`{"flavor":{"name":"small"}}`))
	s := &store.Sample{Sample: sample.Sample{Volume: sample.Uint(6)}}
	for b.Loop() {
		if !p.Match(s, doc) {
			b.Fatal("no match")
		}
	}
}
