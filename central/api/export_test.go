package api

import (
	"maps"
	"slices"
)

// Operations returns the methods of each path; {} stands for a name.
func Operations() map[string][]string {
	all := map[string][]string{}
	for path, ms := range paths {
		all["/"+path] = slices.Sorted(maps.Keys(ms))
	}
	return all
}
