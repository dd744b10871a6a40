package definition

import (
	"slices"
	"strings"
)

// maxCached bounds the memory of which definitions match which event types.
const maxCached = 10_000

// Pattern is one way in which a definition matches event types.
type Pattern struct {
	Prefix string                      // with which each of them begins
	Exact  bool                        // Prefix is the only one
	Match  func(eventType string) bool // not called where Exact
}

// Index finds the definitions that an event type matches. It is filled first;
// then it is safe for concurrent use.
type Index struct {
	byPrefix map[string][]indexed
	lengths  []int // of the prefixes
	exact    map[string][]int
}

type indexed struct {
	definition int
	match      func(string) bool
}

// Add says that a definition matches what a pattern describes.
func (x *Index) Add(definition int, p Pattern) {
	if x.byPrefix == nil {
		x.byPrefix, x.exact = map[string][]indexed{}, map[string][]int{}
	}
	if p.Exact {
		x.exact[p.Prefix] = append(x.exact[p.Prefix], definition)
		return
	}
	if !slices.Contains(x.lengths, len(p.Prefix)) {
		x.lengths = append(x.lengths, len(p.Prefix))
	}
	x.byPrefix[p.Prefix] = append(x.byPrefix[p.Prefix], indexed{definition, p.Match})
}

// Find returns the definitions that match, in ascending order.
func (x *Index) Find(eventType string) []int {
	found := slices.Clone(x.exact[eventType])
	for _, n := range x.lengths {
		if n > len(eventType) {
			continue
		}
		for _, e := range x.byPrefix[eventType[:n]] {
			if e.match(eventType) {
				found = append(found, e.definition)
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// Cache remembers what was prepared for an event type. It is not safe for
// concurrent use.
type Cache[T any] struct {
	m map[string]T
}

// Get returns what prepare returns for an event type.
func (c *Cache[T]) Get(eventType string, prepare func(string) T) T {
	v, ok := c.m[eventType]
	if !ok {
		if c.m == nil || len(c.m) >= maxCached {
			c.m = map[string]T{}
		}
		v = prepare(eventType)
		c.m[strings.Clone(eventType)] = v
	}
	return v
}
