package diskqueue

import "testing"

// FuzzSegment reads any bytes as a segment: what is found is what was written
// there, in order, and is found again when only that is written.
func FuzzSegment(f *testing.F) {
	head := append([]byte(magic), 1, 2, 3, 4, 5, 6, 7, 8)
	s := salt{1, 2, 3, 4, 5, 6, 7, 8}
	two := appendRecord(appendRecord(head, s, &Record{Kind: 1, Time: 1, N: 2, Body: []byte("body")}), s, &Record{Kind: 2, Time: 3, N: 4})
	f.Add(two)
	f.Add(appendRecord(append([]byte(nil), two...), s, &Record{N: 2}))
	f.Add(append(append([]byte(nil), two[:30]...), two...))
	f.Add(two[:fileHeader+headerSize+2])
	f.Add(head)
	torn := appendRecord(append([]byte(nil), two...), s, &Record{Kind: more | 1})
	f.Add(torn)
	f.Add(append(append(append([]byte(nil), torn...), 0, 0), torn[fileHeader:]...))
	f.Fuzz(func(t *testing.T, in []byte) {
		found, ok := readSegment(in)
		if !ok {
			return
		}
		for _, h := range found.holes {
			if h[0] >= len(found.entries) || h[1] != h[0]+1 || !found.sealed && h[1] >= len(found.entries) {
				t.Fatalf("a hole %v in %d records", h, len(found.entries))
			}
		}
		again := append([]byte(magic), found.salt[:]...)
		end := 0
		for i, e := range found.entries {
			if int(e.offset) < end || int(e.offset)+int(e.size) > len(in) {
				t.Fatalf("record %d is at %d to %d of %d, after %d", i, e.offset, e.offset+e.size, len(in), end)
			}
			end = int(e.offset) + int(e.size)
			r, ok := readRecord(in[e.offset:end], found.salt)
			if !ok || r.Time != found.times[i] || uint32(r.N) != e.n {
				t.Fatalf("record %d is read as %+v", i, r)
			}
			again = appendRecord(again, found.salt, &r)
		}
		if got, ok := readSegment(again); !ok || len(got.entries) != len(found.entries) || len(got.holes) > 0 || got.lost != 0 {
			t.Errorf("%d records, written anew, are %d with %d holes", len(found.entries), len(got.entries), len(got.holes))
		}
	})
}
