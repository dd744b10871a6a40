package api

import (
	"net/http"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
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

func (id Identity) admin() bool { return id.Trusted || slices.Contains(id.Roles, "admin") }

var errForbidden = &fault{status: http.StatusForbidden, text: "RBAC Authorization Failed"}

// scope is the one place that decides what an identity sees: everything, or
// the samples of one project.
func (id Identity) scope() (project string, limited bool, err error) {
	if id.admin() {
		return "", false, nil
	}
	if id.Project == "" {
		return "", false, errForbidden
	}
	return id.Project, true, nil
}

// restrict limits a query to what the identity sees. A query that names
// another project is refused.
func (id Identity) restrict(q *query) error {
	project, limited, err := id.scope()
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

// sees reports whether the identity sees a sample.
func (id Identity) sees(s *sample.Sample) (bool, error) {
	project, limited, err := id.scope()
	return err == nil && (!limited || s.Project == project), err
}

// veil takes from a resource what its present owner, another project, has made
// of it.
func (id Identity) veil(r *store.Resource) {
	if project, limited, err := id.scope(); err == nil && limited && r.Project != project {
		r.Project, r.User, r.Metadata = project, "", nil
	}
}

func notAuthorized(project string) error {
	return &fault{status: http.StatusUnauthorized, text: "Not Authorized to access project " + project}
}
