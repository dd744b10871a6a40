package api

import (
	"net/http"
	"slices"
	"strings"
)

// What pages of other origins may send and read.
var (
	allowedHeaders = strings.Join([]string{
		"X-Auth-Token", "X-Identity-Status", "X-Roles", "X-Service-Catalog", "X-User-Id", "X-Tenant-Id", "X-Project-Id",
		"X-OpenStack-Request-ID", "Accept", "Content-Type",
	}, ", ")
	exposedHeaders = strings.Join([]string{"X-Auth-Token", "X-Subject-Token", "X-Service-Token", "X-OpenStack-Request-ID"}, ", ")
)

const allowedMethods = "GET, PUT, POST, DELETE, PATCH"

// crossOrigin adds what a browser wants to know about a request from a page of
// another origin, and reports whether that is all of the answer.
func (s *server) crossOrigin(h http.Header, r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	preflight := r.Method == http.MethodOptions
	h.Add("Vary", "Origin")
	if !slices.Contains(s.opts.AllowedOrigins, origin) && !slices.Contains(s.opts.AllowedOrigins, "*") {
		return preflight
	}
	h.Set("Access-Control-Allow-Origin", origin)
	if preflight {
		h.Set("Access-Control-Allow-Methods", allowedMethods)
		h.Set("Access-Control-Allow-Headers", allowedHeaders)
		h.Set("Access-Control-Max-Age", "3600")
		return true
	}
	h.Set("Access-Control-Expose-Headers", exposedHeaders)
	return false
}
