package local

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/kvmeter/kvmeter/sample"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// vectors are lists of every shape that the encoder treats apart.
func vectors() map[string][]uint64 {
	r := rand.New(rand.NewPCG(3, 4))
	many := func(n int, f func(i int) uint64) []uint64 {
		v := make([]uint64, n)
		for i := range v {
			v[i] = f(i)
		}
		return v
	}
	return map[string][]uint64{
		"one":                 {math.MaxUint64},
		"two":                 {7, 3},
		"constant":            many(50, func(int) uint64 { return 1 << 63 }),
		"linear":              many(50, func(i int) uint64 { return uint64(i) * 1e7 }),
		"linear that wraps":   many(50, func(i int) uint64 { return math.MaxUint64 - 5 + uint64(i) }),
		"runs":                many(200, func(i int) uint64 { return uint64(i / 90) }),
		"small":               many(50, func(int) uint64 { return r.Uint64N(4) }),
		"counter":             many(50, func(i int) uint64 { return uint64(i)*1e10 + r.Uint64N(1e9) }),
		"counter of pages":    many(50, func(i int) uint64 { return 4096 * (uint64(i)*1000 + r.Uint64N(1000)) }),
		"jitter":              many(50, func(i int) uint64 { return uint64(i)*10e6 + r.Uint64N(300) }),
		"accelerating":        many(50, func(i int) uint64 { return uint64(i)*uint64(i)*1e6 + r.Uint64N(9) }),
		"random words":        many(50, func(int) uint64 { return r.Uint64() }),
		"mostly idle":         many(50, func(i int) uint64 { return uint64(i/49) << 50 }),
		"alternating extreme": many(50, func(i int) uint64 { return uint64(i%2) * math.MaxUint64 }),
		"sign changes":        many(51, func(i int) uint64 { return uint64(int64(i) - 25) }),
		"one outlier": many(60, func(i int) uint64 {
			if i == 30 {
				return 1 << 62
			}
			return r.Uint64N(100)
		}),
	}
}

func TestVectorsComeBackAsTheyWere(t *testing.T) {
	for name, v := range vectors() {
		src := appendVector(nil, v)
		r := reader{src: src}
		if got := r.vector(nil, len(v)); !slices.Equal(got, v) || r.done("vector") != nil {
			t.Errorf("%s: got %v, %v, want %v", name, got, r.err, v)
		}
		for cut := range src {
			r := reader{src: src[:cut]}
			if got := r.vector(nil, len(v)); r.err == nil && !slices.Equal(got, v) {
				t.Errorf("%s: cut at %d: got %v without an error", name, cut, got)
			}
		}
		t.Logf("%s: %.2f bytes a word", name, float64(len(src))/float64(len(v)))
	}
}

func TestEveryModeIsChosenForSomeVector(t *testing.T) {
	seen := map[byte]bool{}
	for _, v := range vectors() {
		seen[appendVector(nil, v)[0]] = true
	}
	for mode := byte(vecConstant); mode <= vecDeltas2; mode++ {
		if !seen[mode] {
			t.Errorf("no vector is stored in mode %d", mode)
		}
	}
}

func FuzzVector(f *testing.F) {
	for _, v := range vectors() {
		var b []byte
		for _, w := range v {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var v []uint64
		for ; len(b) >= 8; b = b[8:] {
			v = append(v, binary.LittleEndian.Uint64(b))
		}
		if len(v) == 0 {
			return
		}
		r := reader{src: appendVector(nil, v)}
		if got := r.vector(nil, len(v)); !slices.Equal(got, v) || r.done("vector") != nil {
			t.Errorf("got %v, %v, want %v", got, r.err, v)
		}
		r = reader{src: appendFloats(nil, v)}
		if got := r.floats(nil, len(v)); !slices.Equal(got, v) || r.done("floats") != nil {
			t.Errorf("floats: got %v, %v, want %v", got, r.err, v)
		}
	})
}

func TestFloatsKeepEveryBit(t *testing.T) {
	for name, tc := range map[string]struct {
		values []float64
		scale  byte
	}{
		"integers":            {[]float64{1, 2, -3}, 0},
		"two decimals":        {[]float64{12.25, 0.01, 99.99}, 2},
		"four decimals":       {[]float64{0.0001, 5}, 4},
		"a full mantissa":     {[]float64{1.0 / 3, 2}, floatBits},
		"negative zero":       {[]float64{math.Copysign(0, -1), 1}, floatBits},
		"too large to scale":  {[]float64{1 << 53, 1}, floatBits},
		"the smallest":        {[]float64{math.SmallestNonzeroFloat64, 0}, floatBits},
		"the largest":         {[]float64{math.MaxFloat64, -math.MaxFloat64}, floatBits},
		"331.15446339017050":  {[]float64{331.15446339017050}, floatBits},
		"many decimals later": {[]float64{1, 2, 0.123456}, floatBits},
	} {
		var v []uint64
		for _, f := range tc.values {
			v = append(v, math.Float64bits(f))
		}
		src := appendFloats(nil, v)
		r := reader{src: src}
		if got := r.floats(nil, len(v)); !slices.Equal(got, v) || src[0] != tc.scale {
			t.Errorf("%s: got %v at scale %d, want %v at scale %d", name, got, src[0], v, tc.scale)
		}
	}
}

// records are examples of everything that the store writes in Pebble.
func records() map[string][]byte {
	v := vectors()
	ones := func(n int, w uint64) []uint64 { return slices.Repeat([]uint64{w}, n) }
	t := rows{times: v["jitter"], seqs: v["linear"], nodes: ones(50, 3), holders: ones(50, 9), metas: v["runs"][60:110]}
	every := make([]uint64, 50)
	for i := range every {
		every[i] = uint64(i)
	}
	c := chunk{5000, every, ones(50, 17), ones(50, 2), bytes.Repeat([]byte{byte(sample.U64)}, 50), v["counter"], nil}
	some := chunk{
		77,
		[]uint64{1, 1, 40},
		[]uint64{5, 9, 65535},
		[]uint64{0, 1, 0},
		[]byte{0, 1, 2},
		[]uint64{1, math.MaxUint64, math.Float64bits(0.5)},
		[]sample.ID{{}, {UUID: [16]byte{1, 2}}, {Text: "foreign"}},
	}
	floats := chunk{1, []uint64{0, 2}, []uint64{0, 0}, []uint64{1, 1}, []byte{2, 2}, []uint64{math.Float64bits(12.5), math.Float64bits(-0.25)}, nil}
	flushed := t
	flushed.addChunk(490896, 7, 490896*hourLength+1, c.append(nil, 50))
	flushed.addChunk(490896, 9, 490897*hourLength-1, floats.append(nil, 50))
	info := batchInfo{sample.BatchID{9: 1}, 1767225600123456, 1767225600000000, 1767225600000999, []uint32{1, 2, 3, 500, math.MaxUint32}}
	where := place{1 << 40, 7, []day{-1, 0, 20454}}
	m := []*meter{{no: 4}, {no: 2}}
	h := &holder{pos: 1}
	st := state{
		newest{true, 100, 2000, h, 3},
		[]newest{{true, 100, 1900, h, 2}, {true, 500, 2000, h, 3}},
		[]lifetime{{}, {true, 100, 2000}},
	}
	event := sample.Event{
		ID: "e-1", Type: "compute.instance.create.end", Generated: 1767225600123456, Raw: []byte(`{"a": 1}`),
		Traits: []sample.Trait{
			{Name: "instance_id", Type: sample.TextTrait, Text: "vm-1"},
			{Name: "ratio", Type: sample.FloatTrait, Float: 0.5},
			{Name: "vcpus", Type: sample.IntTrait, Int: -2},
			{Name: "launched_at", Type: sample.DatetimeTrait, Int: 1767225600000000},
		},
	}
	return map[string][]byte{
		"event":          appendEvent(nil, &event),
		"rollup":         rollupRecord(10e6, func(i int) sample.Volume { return sample.Uint(uint64(1000 + i*i)) }, sample.Cumulative),
		"rollup-reset":   rollupRecord(10e6, func(i int) sample.Volume { return sample.Int(int64(1000 - i%7)) }, sample.Cumulative),
		"rollup-few":     rollupRecord(50e6, func(i int) sample.Volume { return sample.Float(float64(i) / 4) }, sample.Gauge),
		"rollup-floats":  rollupRecord(10e6, func(i int) sample.Volume { return sample.Float(1 / float64(i+3)) }, sample.Gauge),
		"rollup-mixed":   rollupRecord(10e6, func(i int) sample.Volume { return []sample.Volume{sample.Uint(7), sample.Float(-0.5)}[i%2] }, sample.Gauge),
		"rows":           t.append(nil),
		"rows-flushed":   flushed.append(nil),
		"chunk":          c.append(nil, 50),
		"chunk-mixed":    some.append(nil, 50),
		"chunk-floats":   floats.append(nil, 50),
		"batch":          info.append(nil),
		"place":          where.append(nil),
		"place-empty":    (&place{}).append(nil),
		"seqs":           seqSet{{1, 100}, {102, 102}, {1 << 50, math.MaxUint64}}.append(nil),
		"resource":       st.append(nil, 2000, m, []int64{5, 6}, true),
		"key-chunk":      chunkKey(nil, 490896, 7, 9, 490896*hourLength+1, 1<<16|2),
		"key-chunk-neg":  chunkKey(nil, -1, 7, 9, -1, 1<<16|2),
		"key-rows":       rowsKey(nil, 490896, 9, 1<<16|2),
		"key-pending":    pendingKey(490896, 5),
		"key-rollup":     rollupKey(nil, 490897, 7, 9),
		"key-metered":    meteredKey(3),
		"key-batch":      batchKey(nil, 20454, 3, 1<<40),
		"key-batch-id":   batchIDKey(sample.BatchID{1, 2, 3}),
		"key-foreign":    foreignKey(nil, 20454, 1<<63, 5, 6),
		"key-received":   walKey(77),
		"key-seqs":       seqsKey("node-1", 1<<63),
		"key-resource":   resourceKey(nil, 11),
		"state-of-store": (&Store{generation: 5}).stateValue(1234),
	}
}

// rollupRecord is the record of an hour with samples, of
// two owners.
func rollupRecord(step int64, volume func(i int) sample.Volume, kind sample.Kind) []byte {
	var points []point
	for i := range 70 {
		v := volume(i)
		points = append(points, point{time: 490896*hourLength + int64(i)*step, seq: uint64(i), bits: v.Bits, tag: v.Tag, node: 2, holder: uint32(i / 40), meta: 3, origin: 1})
	}
	var r roller
	r.roll(points, kind, []*holder{{}, {no: 1}})
	return r.append(nil, 490896, kind)
}

// A change here is a change of the format on disk: readers of what older
// versions wrote must stay.
func TestRecordsAreAsTheGoldenFilesSay(t *testing.T) {
	for name, got := range records() {
		path := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(path, []byte(hex.Dump(got)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if hex.Dump(got) != string(want) {
			t.Errorf("%s: got\n%swant\n%s", name, hex.Dump(got), want)
		}
	}
}

// decoders read each kind of record and, where they can, write it again.
var decoders = map[string]func(src []byte) (again []byte, err error){
	"rows": func(src []byte) ([]byte, error) {
		var t rows
		err := t.decode(src)
		if err != nil || len(t.times) == 0 {
			return nil, errors.Join(err, errCorrupt)
		}
		again := t
		again.chunks, again.count = nil, 0
		err = t.eachChunk(490896, func(meter uint32, last int64, value []byte) error {
			again.addChunk(490896, meter, last, value)
			return nil
		})
		return again.append(nil), err
	},
	"chunk": func(src []byte) ([]byte, error) {
		var c chunk
		err := c.decode(src, 50)
		if _, e := chunkLength(src); err == nil && e != nil {
			return nil, errors.New("a chunk without a header")
		}
		if err != nil || len(c.rows) == 0 {
			return nil, errors.Join(err, errCorrupt)
		}
		return c.append(nil, 50), err
	},
	"event": func(src []byte) ([]byte, error) {
		e, err := decodeEvent(src)
		return appendEvent(nil, &e), err
	},
	"rollup":        rollupDecoder(sample.Cumulative),
	"rollup-floats": rollupDecoder(sample.Gauge),
	"batch": func(src []byte) ([]byte, error) {
		var b batchInfo
		err := b.decode(src)
		return b.append(nil), err
	},
	"place": func(src []byte) ([]byte, error) {
		var p place
		err := p.decode(src)
		return p.append(nil), err
	},
	"seqs": func(src []byte) ([]byte, error) {
		s, err := decodeSeqSet(src)
		return s.append(nil), err
	},
	"resource": func(src []byte) ([]byte, error) {
		c := &catalogue{metas: make([][]byte, 9)}
		for i := range 9 {
			c.meters = append(c.meters, &meter{no: uint32(i)})
		}
		r := &resource{holders: []*holder{{pos: 0}, {pos: 1}}}
		if err := c.readResource(r, src); err != nil {
			return nil, err
		}
		return r.flushed.append(nil, r.last, r.meters, r.bornHolders(), r.foreign), nil
	},
}

func rollupDecoder(kind sample.Kind) func(src []byte) ([]byte, error) {
	return func(src []byte) ([]byte, error) {
		var r rollup
		if err := errors.Join(r.decodeCoarse(src, 490896, kind), r.decodeFine(src, 490896, kind)); err != nil {
			return nil, err
		}
		return r.append(nil, 490896, kind), nil
	}
}

func kindOf(record string) string {
	switch record {
	case "rollup-reset":
		return "rollup"
	case "rollup-mixed", "rollup-few":
		return "rollup-floats"
	case "chunk-mixed", "chunk-floats":
		return "chunk"
	case "rows-flushed":
		return "rows"
	case "place-empty":
		return "place"
	}
	return record
}

func TestRecordsAreReadAsTheyWereWritten(t *testing.T) {
	for name, src := range records() {
		decode := decoders[kindOf(name)]
		if decode == nil {
			continue
		}
		again, err := decode(src)
		if err != nil || !bytes.Equal(again, src) {
			t.Errorf("%s: got %x, %v, want %x", name, again, err, src)
		}
		newer := slices.Clone(src)
		newer[0]++
		if _, err := decode(newer); !errors.Is(err, errCorrupt) {
			t.Errorf("%s of a newer format: got %v, want %v", name, err, errCorrupt)
		}
		for cut := range src {
			if _, err := decode(src[:cut]); !errors.Is(err, errCorrupt) {
				t.Errorf("%s cut at %d: got %v, want %v", name, cut, err, errCorrupt)
			}
		}
	}
}

// FuzzDecoders gives each decoder arbitrary bytes: it returns an error, or what
// is the same when it is written and read again.
func FuzzDecoders(f *testing.F) {
	for _, src := range records() {
		f.Add(src)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		for name, decode := range decoders {
			once, err := decode(src)
			if err != nil {
				continue
			}
			twice, err := decode(once)
			if err != nil || !bytes.Equal(once, twice) {
				t.Errorf("%s: %x was read and written as %x, then as %x (%v)", name, src, once, twice, err)
			}
		}
		if d, m, r, last, p, ok := readChunkKey(src); ok && hourOf(last) == d {
			if again := chunkKey(nil, d, m, r, last, p); !bytes.Equal(again, src) {
				t.Errorf("chunk key: got %x, want %x", again, src)
			}
		}
		s := &Store{}
		if flushed, err := s.readState(src); err == nil {
			if again := s.stateValue(flushed); len(again) > len(src) {
				t.Errorf("state: got %x, want %x", again, src)
			}
		}
	})
}

func TestKeysSortByWhatTheyHold(t *testing.T) {
	type key struct {
		hour            hour
		meter, resource uint32
		last            int64
		part            part
	}
	r := rand.New(rand.NewPCG(5, 6))
	pick := func(n int) int { return r.IntN(n) }
	var keys []key
	for range 300 {
		last := []int64{math.MinInt64, -hourLength, -1, 0, 1, hourLength - 1, hourLength, math.MaxInt64, 1767225600e6}[pick(9)]
		keys = append(keys, key{hourOf(last), uint32(pick(3)), uint32(pick(3)) << 30, last, part(pick(3)) << 40})
	}
	encode := func(k key) []byte { return chunkKey(nil, k.hour, k.meter, k.resource, k.last, k.part) }
	slices.SortFunc(keys, func(a, b key) int { return bytes.Compare(encode(a), encode(b)) })
	for i, k := range keys {
		d, m, res, last, p, ok := readChunkKey(encode(k))
		if got := (key{d, m, res, last, p}); !ok || got != k {
			t.Errorf("got %+v, %v, want %+v", got, ok, k)
		}
		if i == 0 {
			continue
		}
		a := keys[i-1]
		for _, c := range [][2]int64{
			{int64(a.hour), int64(k.hour)},
			{int64(a.meter), int64(k.meter)},
			{int64(a.resource), int64(k.resource)},
			{a.last, k.last},
			{int64(a.part), int64(k.part)},
		} {
			if c[0] > c[1] {
				t.Errorf("%+v sorts before %+v", a, k)
			}
			if c[0] != c[1] {
				break
			}
		}
	}
}

func TestDaysHoldEveryTime(t *testing.T) {
	for _, at := range []int64{math.MinInt64, math.MinInt64 + 1, -dayLength - 1, -dayLength, -1, 0, dayLength - 1, dayLength, math.MaxInt64} {
		if d := dayOf(at); d.start() > at || d.end() < at {
			t.Errorf("%d: got day %d from %d to %d", at, d, d.start(), d.end())
		}
		if h := hourOf(at); h.start() > at || h.end() < at {
			t.Errorf("%d: got hour %d from %d to %d", at, h, h.start(), h.end())
		}
	}
}

func TestSeqSetIsTheSetOfWhatWasAdded(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 200 {
		var s seqSet
		want := map[uint64]bool{}
		base := []uint64{0, 1, math.MaxUint64 - 40, 1 << 40}[r.IntN(4)]
		for range r.IntN(60) {
			v := base + r.Uint64N(41)
			s = s.add(v)
			want[v] = true
		}
		n := 0
		for v := base; ; v++ {
			if s.has(v) != want[v] {
				t.Fatalf("%v has %d: got %v, want %v", s, v, s.has(v), want[v])
			}
			if want[v] && (v == base || !want[v-1]) {
				n++
			}
			if v == base+40 {
				break
			}
		}
		if len(s) != n {
			t.Fatalf("%v: got %d intervals, want %d", s, len(s), n)
		}
		if again, err := decodeSeqSet(s.append(nil)); err != nil || !reflect.DeepEqual(again, s) {
			t.Fatalf("got %v, %v, want %v", again, err, s)
		}
	}
}

func BenchmarkEncodeChunk(b *testing.B) {
	b.ReportAllocs()
	v := vectors()["counter"]
	c := chunk{rows: make([]uint64, len(v)), indexes: slices.Repeat([]uint64{17}, len(v)), origins: slices.Repeat([]uint64{1}, len(v)), tags: make([]byte, len(v)), bits: v}
	for i := range c.rows {
		c.rows[i] = uint64(i)
	}
	var dst []byte
	for b.Loop() {
		dst = c.append(dst[:0], len(v))
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(v)), "ns/sample")
}

func BenchmarkDecodeChunk(b *testing.B) {
	b.ReportAllocs()
	src := records()["chunk"]
	var c chunk
	for b.Loop() {
		if err := c.decode(src, 50); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/50, "ns/sample")
}
