package api

import (
	"maps"
	"net/http"
	"slices"
	"time"
)

// TransferWithin lets a body, and a part of an answer, take so long.
func TransferWithin(h http.Handler, within time.Duration) http.Handler {
	h.(*server).transfer = within
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
