package api_test

import (
	"net/http"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
)

func TestPolicy(t *testing.T) {
	s := storeOf(t, gauge("a", "vm-1", 0, 1))
	member := map[string]string{"X-Roles": "Member,_member_", "X-Project-Id": "p2", "X-User-Id": "u2"}
	admin := map[string]string{"X-Roles": "Admin", "X-Project-Id": "p2", "X-User-Id": "u2"}
	for name, tc := range map[string]struct {
		policy  string
		headers map[string]string
		status  int
		seen    int // samples
	}{
		"without a file everybody sees their own":  {``, member, 200, 0},
		"without a file admins see all":            {``, admin, 200, 1},
		"an empty rule is open":                    {`{"telemetry:get_samples": ""}`, member, 200, 0},
		"@ is open":                                {`{"telemetry:get_samples": "@"}`, member, 200, 0},
		"! is closed, to admins too":               {`telemetry:get_samples: "!"`, admin, 403, 0},
		"! is closed, to those without a name too": {`telemetry:get_samples: "!"`, nil, 403, 0},
		"the default holds for what is not named":  {`default: "!"`, member, 403, 0},
		"admins outlive a default":                 {"default: '!'\ntelemetry:get_samples: ''", admin, 200, 1},
		"an open default makes everybody an admin": {`default: ""`, member, 200, 1},
		"segregation says who sees all":            {`segregation: "role:member"`, member, 200, 1},
		"segregation closes out admins":            {`segregation: "role:auditor"`, admin, 200, 0},
		"context_is_admin where it is not named":   {`context_is_admin: "role:_member_"`, member, 200, 1},
		"a rule by another rule":                   {"a: 'role:x or rule:b'\nb: 'role:MEMBER'\ntelemetry:get_samples: 'rule:a'", member, 200, 0},
		"an unknown rule denies":                   {`telemetry:get_samples: "rule:none"`, admin, 403, 0},
		"and binds closer than or":                 {`telemetry:get_samples: "role:x and role:y or role:member"`, member, 200, 0},
		"parentheses":                              {`telemetry:get_samples: "role:x and (role:y or role:member)"`, member, 403, 0},
		"not":                                      {`telemetry:get_samples: "not role:member"`, member, 403, 0},
		"not not":                                  {`telemetry:get_samples: "not not (role:member)"`, member, 200, 0},
		"the project":                              {`telemetry:get_samples: "project_id:p2"`, member, 200, 0},
		"another project":                          {`telemetry:get_samples: "project_id:p1"`, member, 403, 0},
		"the user":                                 {`telemetry:get_samples: "user_id:u2"`, member, 200, 0},
		"no target has a project":                  {`telemetry:get_samples: "project_id:%(project_id)s"`, member, 403, 0},
		"a constant":                               {`telemetry:get_samples: "'x':x"`, member, 200, 0},
		"a list of lists: all of one":              {`{"telemetry:get_samples": [["role:x", "role:member"], ["role:member", "user_id:u2"]]}`, member, 200, 0},
		"a list of lists: none":                    {`{"telemetry:get_samples": [["role:x"], ["role:y"]]}`, member, 403, 0},
		"an empty list is open":                    {`{"telemetry:get_samples": []}`, member, 200, 0},
		"a list of checks":                         {`{"telemetry:get_samples": ["role:x", "role:member"]}`, member, 200, 0},
		"null is open":                             {`{"telemetry:get_samples": null}`, member, 200, 0},
		"JSON may be indented by tabs":             {"{\n\t\"telemetry:get_samples\": \"!\"\n}", member, 403, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := api.ParsePolicy([]byte(tc.policy))
			if err != nil {
				t.Fatal(err)
			}
			w := ask(api.New(s, api.Options{Policy: p}), http.MethodGet, "/v2/samples", tc.headers, "")
			if w.Code != tc.status {
				t.Fatalf("got %d %s, want %d", w.Code, w.Body, tc.status)
			}
			if tc.status != http.StatusOK {
				if got, want := fault(t, w), "RBAC Authorization Failed"; got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			} else if got := ids(t, w.Body.String()); len(got) != tc.seen {
				t.Errorf("got samples %q, want %d", got, tc.seen)
			}
		})
	}
}

func TestBadPolicies(t *testing.T) {
	for text, want := range map[string]string{
		`[]`:                     "policy: yaml: unmarshal errors:\n  line 1: cannot unmarshal !!seq into map[string]interface {}",
		`{"a": 1}`:               `policy: rule "a": a rule is text, such as "role:admin or project_id:p1"`,
		`{"a": [[1]]}`:           `policy: rule "a": a list of lists of checks was expected`,
		`{"a": "admin"}`:         `policy: rule "a": "admin" is no check: it is of the form role:admin`,
		`{"a": "role:a role:b"}`: `policy: rule "a": "role:b" was not expected`,
		`{"a": "role:a and"}`:    `policy: rule "a": it ends too early`,
		`{"a": "(role:a"}`:       `policy: rule "a": a parenthesis is not closed`,
		`{"a": "role:a)"}`:       `policy: rule "a": ")" was not expected`,
		`{"a": "rule:b or rule:b", "b": "not rule:a"}`: `policy: rule "a" refers to itself`,
		`{"default": "rule:none"}`:                     `policy: rule "default" refers to itself`,
		`{"context_is_admin": "rule:segregation"}`:     `policy: rule "context_is_admin" refers to itself`,
	} {
		_, err := api.ParsePolicy([]byte(text))
		if err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", text, err, want)
		}
	}
}

func TestBrowsersOfOtherOrigins(t *testing.T) {
	h := api.New(storeOf(t), api.Options{AllowedOrigins: []string{"http://valid.example.com"}})
	for name, tc := range map[string]struct {
		method, path, origin string
		status               int
		allowed              string
	}{
		"a preflight of an origin that is allowed": {"OPTIONS", "/", "http://valid.example.com", 200, "http://valid.example.com"},
		"a preflight of another one":               {"OPTIONS", "/", "http://invalid.example.com", 200, ""},
		"a request of an origin that is allowed":   {"GET", "/", "http://valid.example.com", 200, "http://valid.example.com"},
		"a request of another one":                 {"GET", "/v2/meters", "http://invalid.example.com", 200, ""},
		"an error has the header too":              {"GET", "/v2", "http://valid.example.com", 404, "http://valid.example.com"},
		"no browser":                               {"OPTIONS", "/", "", 405, ""},
	} {
		t.Run(name, func(t *testing.T) {
			headers := map[string]string{"Access-Control-Request-Method": "GET"}
			if tc.origin != "" {
				headers["Origin"] = tc.origin
			}
			w := ask(h, tc.method, tc.path, headers, "")
			if got := w.Header().Get("Access-Control-Allow-Origin"); w.Code != tc.status || got != tc.allowed {
				t.Errorf("got %d and %q, want %d and %q", w.Code, got, tc.status, tc.allowed)
			}
			if methods := w.Header().Get("Access-Control-Allow-Methods"); (methods != "") != (tc.method == "OPTIONS" && tc.allowed != "") {
				t.Errorf("got allowed methods %q", methods)
			}
		})
	}
	w := ask(api.New(storeOf(t), api.Options{AllowedOrigins: []string{"*"}}), http.MethodGet, "/", map[string]string{"Origin": "http://any"}, "")
	if got := w.Header().Get("Access-Control-Allow-Origin"); got != "http://any" {
		t.Errorf("with all origins allowed: got %q", got)
	}
}
