package bus

import (
	"slices"
	"testing"
	"time"
)

func TestNodesAreTriedInTurn(t *testing.T) {
	a, b, c := &node{addr: "a"}, &node{addr: "b"}, &node{addr: "c"}
	nodes := []*node{a, b, c}
	firsts := map[*node]int{}
	for range 1000 {
		order := inTurn(nodes)
		if len(order) != 3 || !slices.Contains(order, a) || !slices.Contains(order, b) || !slices.Contains(order, c) {
			t.Fatalf("order %v, want each node once", order)
		}
		firsts[order[0]]++
	}
	for _, n := range nodes {
		if firsts[n] == 0 {
			t.Errorf("%s never came first in 1,000 turns", n.addr)
		}
	}
	b.failed.Store(time.Now().Add(-2 * time.Second).UnixNano())
	a.fail()
	for range 100 {
		if order := inTurn(nodes); !slices.Equal(order, []*node{c, b, a}) {
			t.Fatalf("order %s, %s, %s, want those last that have failed, in turn", order[0].addr, order[1].addr, order[2].addr)
		}
	}
	b.failed.Store(time.Now().Add(-2 * shunFor).UnixNano())
	firsts = map[*node]int{}
	for range 1000 {
		firsts[inTurn(nodes)[0]]++
	}
	if firsts[b] == 0 || firsts[c] == 0 || firsts[a] > 0 {
		t.Errorf("first came %d times a, which has just failed, %d times b, %d times c", firsts[a], firsts[b], firsts[c])
	}
}
