package store_test

import (
	"math"
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// rat is the naive reference: a volume as a fraction.
func rat(v sample.Volume) *big.Rat {
	switch v.Tag {
	case sample.U64:
		return new(big.Rat).SetInt(new(big.Int).SetUint64(v.Bits))
	case sample.I64:
		return new(big.Rat).SetInt64(int64(v.Bits))
	}
	return new(big.Rat).SetFloat64(v.Float64())
}

func randomVolume(r *rand.Rand) sample.Volume {
	switch r.IntN(8) {
	case 0:
		return sample.Uint(r.Uint64())
	case 1:
		return sample.Int(int64(r.Uint64()))
	case 2:
		return []sample.Volume{
			sample.Uint(math.MaxUint64), sample.Int(math.MinInt64), sample.Float(math.MaxFloat64), sample.Float(-math.MaxFloat64),
			sample.Float(math.SmallestNonzeroFloat64), sample.Float(math.Copysign(0, -1)), sample.Uint(0),
		}[r.IntN(7)]
	case 3:
		return sample.Float(math.Ldexp(r.NormFloat64(), r.IntN(400)-200))
	case 4:
		return sample.Float(float64(r.IntN(10000)) / 100)
	}
	return sample.Int(r.Int64N(2000) - 1000)
}

func TestExactSumIsTheSumOfFractions(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 3000 {
		var e, halves store.Exact
		want := new(big.Rat)
		for range r.IntN(20) {
			v, n := randomVolume(r), r.Int64N(1<<uint(1+r.IntN(62)))-r.Int64N(1<<20)
			p := new(big.Rat).Mul(rat(v), new(big.Rat).SetInt64(n))
			var part store.Exact
			part.AddProduct(v, n)
			if r.IntN(2) == 0 {
				e.AddProduct(v, n)
				want.Add(want, p)
			} else {
				e.Sub(part)
				want.Sub(want, p)
			}
			halves.Add(part)
		}
		if e.Rat().Cmp(want) != 0 || e.Sign() != want.Sign() {
			t.Fatalf("got %v, want %v", e.Rat(), want)
		}
		if f, _ := want.Float64(); e.Float64() != f {
			t.Fatalf("got %v, want %v", e.Float64(), f)
		}
		if s, ok := new(big.Rat).SetString(e.String()); !ok || s.Cmp(want) != 0 {
			t.Fatalf("%s is not %v", e, want)
		}
		again, rest, err := store.ReadExact(append(e.Append(nil), 7))
		if err != nil || len(rest) != 1 || !again.Equal(e) {
			t.Fatalf("%v comes back as %v, %v", e, again, err)
		}
		if i, ok := e.Int64(); ok != (want.IsInt() && want.Num().IsInt64()) || ok && i != want.Num().Int64() {
			t.Fatalf("%v: got %d, %v", want, i, ok)
		}
	}
}

func FuzzReadExact(f *testing.F) {
	f.Add([]byte{0, 2, 7})
	f.Add([]byte{52, 5, 1, 2})
	f.Fuzz(func(t *testing.T, src []byte) {
		e, _, err := store.ReadExact(src)
		if err != nil {
			return
		}
		again, rest, err := store.ReadExact(e.Append(nil))
		if err != nil || len(rest) > 0 || !again.Equal(e) {
			t.Errorf("%v comes back as %v, %v", e.Rat(), again.Rat(), err)
		}
	})
}

func BenchmarkExactAdd(b *testing.B) {
	for name, v := range map[string]sample.Volume{"integer": sample.Uint(9_000_000_000_000), "float": sample.Float(331.15446339017050)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var e store.Exact
			for b.Loop() {
				e.AddProduct(v, 10_000_000)
			}
		})
	}
}
