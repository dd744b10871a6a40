package sample

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vmihailenco/msgpack/v5"
)

// hostBatch is one tick of a node: domains rows with all their meters.
func hostBatch(domains int) *Batch {
	b := NewBuilder()
	for d := range domains {
		b.Row(Row{
			Resource: fmt.Sprintf("5e1f0000-0000-4000-8000-%012x", d), Offset: int64(d), Incarnation: Incarnation(d + 1),
			Source: "openstack", Project: fmt.Sprintf("p%d", d%5), User: "u", Metadata: []byte(`{"display_name":"vm","flavor":{"vcpus":1}}`),
		})
		for i, m := range Catalogue[:20] {
			b.Add(m.MeterRef, m.Origins[0], Uint(uint64(d*i)<<32+12345))
		}
	}
	out := b.Build()
	out.ID, out.Node, out.Epoch, out.Seq, out.Base = NewBatchID(time.UnixMilli(1_790_000_000_000)), "node-1", 7, 1, 1_790_000_000_000_000
	return out
}

func encode(tb testing.TB, b *Batch) []byte {
	tb.Helper()
	e, err := NewEncoder()
	if err != nil {
		tb.Fatal(err)
	}
	body, err := e.Encode(nil, b)
	if err != nil {
		tb.Fatal(err)
	}
	return body
}

func decoder(tb testing.TB) *Decoder {
	tb.Helper()
	d, err := NewDecoder()
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func TestBatchSurvivesTheWire(t *testing.T) {
	extremes := NewBuilder()
	extremes.Row(Row{Resource: "r", Incarnation: math.MaxUint64})
	m := func(name string) MeterRef { return MeterRef{name, Gauge, "B"} }
	for i, v := range []Volume{
		Uint(0), Uint(127), Uint(128), Uint(math.MaxUint64), Int(-1), Int(math.MinInt64), Int(math.MaxInt64),
		Float(0), Float(math.Copysign(0, -1)), Float(math.SmallestNonzeroFloat64), Float(math.MaxFloat64), Float(0.1),
	} {
		extremes.Add(m(fmt.Sprint(i)), "test", v)
	}
	extremes.Gap(Gap{Meter: "*", Resource: "*", From: -5, To: 10, Reason: "libvirt does not answer", Node: "node-2"})
	explicit := hostBatch(2)
	for i := range explicit.Len() {
		explicit.IDs = append(explicit.IDs, fmt.Sprintf("m-%d", i))
	}
	foreign := hostBatch(4)
	foreign.Rows[0].Foreign = &Foreign{UserName: "un", ProjectName: "pn", Monotonic: 12.5, HasMonotonic: true}
	foreign.Rows[1].Foreign = &Foreign{Timestamp: "2026-11-21T10:00:00+00:00"}
	foreign.Rows[2].Foreign = &Foreign{HasMonotonic: true}
	for name, want := range map[string]*Batch{
		"a node's tick":            hostBatch(9),
		"extreme numbers and gaps": extremes.Build(),
		"explicit ids":             explicit,
		"foreign samples":          foreign,
		"an empty batch":           {Node: "n", Seq: 3},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := decoder(t).Decode(encode(t, want))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got, cmpEmpty); diff != "" {
				t.Errorf("batch changed on the wire (-sent +received):\n%s", diff)
			}
			if g, w := slices.Collect(got.Samples()), slices.Collect(want.Samples()); !cmp.Equal(w, g, cmpEmpty) {
				t.Errorf("samples got %v, want %v", g, w)
			}
		})
	}
}

// cmpEmpty takes nil and empty slices as equal.
var cmpEmpty = cmp.FilterValues(func(a, b any) bool {
	return isEmpty(a) && isEmpty(b)
}, cmp.Comparer(func(any, any) bool { return true }))

func isEmpty(v any) bool {
	switch s := v.(type) {
	case []byte:
		return len(s) == 0
	case []uint64:
		return len(s) == 0
	case []string:
		return len(s) == 0
	case []MeterRef:
		return len(s) == 0
	case []Row:
		return len(s) == 0
	case []Column:
		return len(s) == 0
	case []Gap:
		return len(s) == 0
	}
	return false
}

func TestSamplesAreNumberedByColumnThenRow(t *testing.T) {
	b := NewBuilder()
	a, z := MeterRef{"a", Gauge, ""}, MeterRef{"z", Gauge, ""}
	b.Row(Row{Resource: "r0"})
	b.Add(z, Walk, Uint(1))
	b.Row(Row{Resource: "r1"})
	b.Add(a, Walk, Uint(2))
	b.Add(z, Walk, Uint(3))
	b.Add(z, Libvirt, Uint(4))
	batch := b.Build()
	batch.ID = NewBatchID(time.UnixMilli(1))
	var got []string
	for s := range batch.Samples() {
		_, index, ok := s.ID.Batch()
		got = append(got, fmt.Sprintf("%d %t %s %s %s %s", index, ok, s.Name, s.Resource, s.Origin, s.Volume))
	}
	want := []string{"0 true z r0 walk 1", "1 true z r1 walk 3", "2 true a r1 walk 2", "3 true z r1 libvirt 4"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

// body packs a batch by hand, with one element replaced.
func body(t *testing.T, replace map[int]any, more ...any) []byte {
	t.Helper()
	id := make([]byte, 16)
	elements := []any{
		uint64(1), id, "n", uint64(1), uint64(2), int64(3),
		[]any{[]any{"cpu", "cumulative", "ns"}},
		[]any{[]any{"r", int64(0), uint64(1), "openstack", "p", "u", []byte("{}")}},
		[]any{[]any{uint64(0), "walk", uint64(0), []byte{1}, []any{uint64(5)}}},
		nil,
		[]any{},
	}
	for i, v := range replace {
		elements[i] = v
	}
	raw, err := msgpack.Marshal(append(elements, more...))
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	return e.zstd.EncodeAll(raw, nil)
}

func column(v ...any) map[int]any { return map[int]any{8: []any{v}} }

func TestDecodeRefusesWhatIsNotABatch(t *testing.T) {
	u, bit := uint64(0), []byte{1}
	for name, in := range map[string][]byte{
		"no zstd":                       []byte("hello"),
		"nothing":                       {},
		"version 0":                     body(t, map[int]any{0: uint64(0)}),
		"version 3":                     body(t, map[int]any{0: uint64(3)}),
		"a short id":                    body(t, map[int]any{1: []byte{1}}),
		"a node that is a number":       body(t, map[int]any{2: 5}),
		"nil as a number":               body(t, column(u, "walk", u, bit, []any{nil})),
		"a negative number as unsigned": body(t, column(u, "walk", u, bit, []any{int64(-1)})),
		"a float as unsigned":           body(t, column(u, "walk", u, bit, []any{1.5})),
		"a text as a number":            body(t, column(u, "walk", u, bit, []any{"1"})),
		"an integer as float":           body(t, column(u, "walk", uint64(2), bit, []any{uint64(1)})),
		"NaN":                           body(t, column(u, "walk", uint64(2), bit, []any{math.NaN()})),
		"infinity":                      body(t, column(u, "walk", uint64(2), bit, []any{math.Inf(1)})),
		"2^64-1 as signed":              body(t, column(u, "walk", uint64(1), bit, []any{uint64(math.MaxUint64)})),
		"an unknown number kind":        body(t, column(u, "walk", uint64(3), bit, []any{uint64(1)})),
		"a meter that is not there":     body(t, column(uint64(1), "walk", u, bit, []any{uint64(1)})),
		"a huge meter index":            body(t, column(uint64(math.MaxUint64), "walk", u, bit, []any{uint64(1)})),
		"more values than bits":         body(t, column(u, "walk", u, bit, []any{uint64(1), uint64(2)})),
		"bits after the last row":       body(t, column(u, "walk", u, []byte{3}, []any{uint64(1), uint64(2)})),
		"a bitmap too long":             body(t, column(u, "walk", u, []byte{1, 0}, []any{uint64(1)})),
		"too few ids":                   body(t, map[int]any{9: []any{}}),
		"an empty id":                   body(t, map[int]any{9: []any{""}}),
		"foreign fields that are text":  body(t, map[int]any{7: []any{[]any{"r", int64(0), uint64(1), "s", "p", "u", []byte("{}"), "user"}}}),
		"a clock that says NaN":         body(t, map[int]any{7: []any{[]any{"r", int64(0), uint64(1), "s", "p", "u", []byte("{}"), []any{"", "", "", math.NaN()}}}}),
	} {
		t.Run(name, func(t *testing.T) {
			if b, err := decoder(t).Decode(in); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %+v, %v, want %v", b, err, ErrMalformed)
			}
		})
	}
}

func TestDecodeIgnoresWhatLaterVersionsAppend(t *testing.T) {
	more := map[int]any{
		0: uint64(2),
		6: []any{[]any{"cpu", "cumulative", "ns", "extra"}},
		7: []any{[]any{"r", int64(0), uint64(1), "openstack", "p", "u", []byte("{}"), []any{"un", "pn", "", nil, "extra"}, map[string]any{"a": 1}}},
		8: []any{[]any{uint64(0), "walk", uint64(0), []byte{1}, []any{uint64(5)}, nil}},
		10: []any{
			[]any{"*", "*", int64(1), int64(2), "without a node"},
			[]any{"*", "*", int64(1), int64(2), "why", "node-2", "extra"},
		},
	}
	b, err := decoder(t).Decode(body(t, more, "node-3", int64(7), "thirteen", []any{1, 2}))
	if err != nil {
		t.Fatal(err)
	}
	if b.Len() != 1 || b.Columns[0].Values[0] != 5 || len(b.Gaps) != 2 || b.Gaps[1].Node != "node-2" || b.Of != "node-3" || b.Since != 7 {
		t.Errorf("got %+v", b)
	}
}

func TestDecodeBoundsMemory(t *testing.T) {
	e, err := NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	raw := func(b *Batch) []byte {
		e.buf.Reset()
		if err := e.batch(b); err != nil {
			t.Fatal(err)
		}
		return bytes.Clone(e.buf.Bytes())
	}
	deep := raw(hostBatch(1))
	deep[0]++ // one more element: an array in an array in an array …
	deep = append(deep, bytes.Repeat([]byte{0x91}, 1<<18)...)
	defer debug.SetMaxStack(debug.SetMaxStack(8 << 20)) // else it takes 16 MiB of them to fill
	wide := hostBatch(1)
	for len(wide.Columns) < 250 {
		wide.Columns = append(wide.Columns, Column{Bitmap: []byte{1}, Values: make([]uint64, MaxSamples)})
	}
	for name, in := range map[string][]byte{
		"more than the bound":               make([]byte, MaxDecoded+1),
		"elements that nest without an end": deep,
		"columns of too many values":        raw(wide),
	} {
		t.Run(name, func(t *testing.T) {
			d, body := decoder(t), e.zstd.EncodeAll(in, nil)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if _, err := d.Decode(body); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v, want %v", err, ErrMalformed)
			}
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 3*MaxDecoded {
				t.Errorf("%d bytes took %d bytes of memory", len(body), n)
			}
		})
	}
}

func TestWhatCantBeDecodedIsNotEncoded(t *testing.T) {
	e, err := NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	const n = MaxSamples + 1
	for name, b := range map[string]*Batch{
		"too many gaps":      {Gaps: make([]Gap, n)},
		"too many rows":      {Rows: make([]Row, n)},
		"too many meters":    {Meters: make([]MeterRef, n)},
		"too many columns":   {Meters: make([]MeterRef, 1), Columns: make([]Column, n)},
		"text without limit": {Node: strings.Repeat("n", MaxDecoded)},
	} {
		if _, err := e.Encode(nil, b); err == nil {
			t.Errorf("%s are encoded", name)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode(f, hostBatch(3)))
	f.Add(encode(f, &Batch{Node: "n"}))
	f.Fuzz(func(t *testing.T, in []byte) {
		b, err := decoder(t).Decode(in)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("error %v is not ErrMalformed", err)
			}
			return
		}
		again, err := decoder(t).Decode(encode(t, b))
		if err != nil {
			t.Fatalf("what was decoded cannot be sent on: %v", err)
		}
		if diff := cmp.Diff(b, again, cmpEmpty); diff != "" {
			t.Errorf("a second trip changed it:\n%s", diff)
		}
	})
}

// FuzzDecodeRaw fuzzes below the compression.
func FuzzDecodeRaw(f *testing.F) {
	e, err := NewEncoder()
	if err != nil {
		f.Fatal(err)
	}
	if _, err := e.Encode(nil, hostBatch(2)); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(e.buf.Bytes()))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := decoder(t).Decode(e.zstd.EncodeAll(raw, nil))
		if err == nil {
			err = b.Check()
		} else if errors.Is(err, ErrMalformed) {
			return
		}
		if err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkBuild(b *testing.B) {
	rows := hostBatch(50).Rows
	builder := NewBuilder()
	b.ReportAllocs()
	for b.Loop() {
		builder.Reset()
		for i := range rows {
			builder.Row(rows[i])
			for n, m := range Catalogue[:20] {
				builder.Add(m.MeterRef, Walk, Uint(uint64(n*i)))
			}
		}
		builder.Build()
	}
	perSample(b, 1000)
}

func BenchmarkEncode(b *testing.B) {
	batch := hostBatch(50)
	e, err := NewEncoder()
	if err != nil {
		b.Fatal(err)
	}
	var out []byte
	b.ReportAllocs()
	for b.Loop() {
		if out, err = e.Encode(out[:0], batch); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(out))/float64(batch.Len()), "B/sample")
	perSample(b, batch.Len())
}

func BenchmarkDecode(b *testing.B) {
	batch := hostBatch(50)
	in, d := encode(b, batch), decoder(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Decode(in); err != nil {
			b.Fatal(err)
		}
	}
	perSample(b, batch.Len())
}

func perSample(b *testing.B, samples int) {
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*samples), "ns/sample")
}
