package api

import (
	"net/http"
	"strings"

	"github.com/kvmeter/kvmeter/central/store"
)

// Identity is who asks.
type Identity struct {
	User, Project string
	Roles         []string // lower case
	// Trusted identities see everything although they have no role: a request
	// without identity headers where there is no authentication.
	Trusted bool
}

// Authenticator says who sent a request. Its errors end the request.
type Authenticator func(*http.Request) (Identity, error)

// NoAuth believes the headers X-Roles, X-Project-Id and X-User-Id; without any
// of them everything is visible. It is for listeners that only the host itself
// can reach.
func NoAuth(r *http.Request) (Identity, error) {
	id := Identity{User: r.Header.Get("X-User-Id"), Project: r.Header.Get("X-Project-Id")}
	for role := range strings.SplitSeq(r.Header.Get("X-Roles"), ",") {
		if role = strings.ToLower(strings.TrimSpace(role)); role != "" {
			id.Roles = append(id.Roles, role)
		}
	}
	id.Trusted = id.User == "" && id.Project == "" && id.Roles == nil
	return id, nil
}

// caller is an identity and what the policy makes of it.
type caller struct {
	Identity
	all bool // sees every project
}

var errForbidden = &fault{status: http.StatusForbidden, text: "RBAC Authorization Failed"}

// scope is the one place that decides what a caller sees: everything, or the
// samples of one project.
func (c *caller) scope() (project string, limited bool, err error) {
	if c.all {
		return "", false, nil
	}
	if c.Project == "" {
		return "", false, errForbidden
	}
	return c.Project, true, nil
}

// restrict limits a query to what the caller sees. A query that names another
// project is refused.
func (c *caller) restrict(q *query) error {
	project, limited, err := c.scope()
	if err != nil || !limited {
		return err
	}
	for _, asked := range q.projects {
		if asked != project {
			return notAuthorized(asked)
		}
	}
	q.set(store.FieldProject, project)
	return nil
}

func notAuthorized(project string) error {
	return &fault{status: http.StatusUnauthorized, text: "Not Authorized to access project " + project}
}
