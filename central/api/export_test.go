package api

import (
	"maps"
	"net/http"
	"slices"
	"time"
)

// BodyWithin lets a body take so long to come.
func BodyWithin(h http.Handler, within time.Duration) http.Handler {
	h.(*server).bodyWithin = within
	return h
}

// Operations returns the methods of each path; {} stands for a name.
func Operations() map[string][]string {
	all := map[string][]string{}
	for path, ms := range paths {
		all["/"+path] = slices.Sorted(maps.Keys(ms))
	}
	return all
}
