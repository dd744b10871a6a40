package slab

import "testing"

func TestNothingIsHandedOutTwice(t *testing.T) {
	var s Slab[int]
	var taken [][]int
	for i := range 5000 {
		n := i % 40
		if i%1000 == 999 {
			n = 10_000
		}
		v := s.Take(n)
		if len(v) != n || cap(v) != n {
			t.Fatalf("%d values with room for %d, want %d", len(v), cap(v), n)
		}
		for j := range v {
			if v[j] != 0 {
				t.Fatalf("value %d of piece %d is in use", j, i)
			}
			v[j] = i + 1
		}
		taken = append(taken, v)
	}
	for i, v := range taken {
		for _, x := range v {
			if x != i+1 {
				t.Fatalf("piece %d became one of %d", i, x-1)
			}
		}
	}
	var texts Slab[byte]
	b := []byte("abc")
	text := Text(&texts, b)
	b[0] = 'x'
	if text != "abc" || Text(&texts, nil) != "" {
		t.Errorf("got %q, want a copy", text)
	}
}
