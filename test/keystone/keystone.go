// Package keystone runs OpenStack's identity service, as Debian packages it, on
// loopback for a test.
package keystone

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/endpoints"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/services"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
)

// AdminPassword is that of the user admin in the project admin.
const AdminPassword = "admin-secret"

// Server is a running service. It has the domain Default, the user admin and the
// roles admin, member and reader.
type Server struct {
	URL   string // with /v3
	admin *gophercloud.ServiceClient
	conf  string
	port  int
	cmd   *exec.Cmd
}

// Start starts the service with an empty database, and ends it with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	dir := t.TempDir()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := lis.Addr().(*net.TCPAddr).Port
	lis.Close()
	s := &Server{URL: fmt.Sprintf("http://127.0.0.1:%d/v3", port), conf: filepath.Join(dir, "keystone.conf"), port: port}
	conf := fmt.Sprintf(`[DEFAULT]
use_stderr = true
[database]
connection = sqlite:///%[1]s/keystone.db
[fernet_tokens]
key_repository = %[1]s/fernet
[credential]
key_repository = %[1]s/credential
[cache]
enabled = false
`, dir)
	if err := os.WriteFile(s.conf, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fernet", "credential"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	id := fmt.Sprint(os.Getuid())
	for _, args := range [][]string{
		{"db_sync"},
		{"fernet_setup", "--keystone-user", id, "--keystone-group", id},
		{"bootstrap", "--bootstrap-password", AdminPassword, "--bootstrap-public-url", s.URL, "--bootstrap-region-id", "RegionOne"},
	} {
		cmd := exec.Command("keystone-manage", append([]string{"--config-file", s.conf}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("keystone-manage %s: %v (apt-get install python3-keystone)\n%s", args[0], err, out)
		}
	}
	s.Run(t)
	provider, err := openstack.AuthenticatedClient(t.Context(), gophercloud.AuthOptions{
		IdentityEndpoint: s.URL, Username: "admin", Password: AdminPassword, DomainName: "Default", AllowReauth: true,
		Scope: &gophercloud.AuthScope{ProjectName: "admin", DomainName: "Default"},
	})
	if err == nil {
		s.admin, err = openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{})
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Run starts the service again after [Server.Stop].
func (s *Server) Run(t testing.TB) {
	t.Helper()
	log, err := os.Create(filepath.Join(filepath.Dir(s.conf), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("keystone-wsgi-public", "--host", "127.0.0.1", "--port", fmt.Sprint(s.port))
	cmd.Env = append(os.Environ(), "OS_KEYSTONE_CONFIG_FILES="+s.conf)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: apt-get install python3-keystone", err)
	}
	s.cmd = cmd
	t.Cleanup(func() { s.stop(cmd) })
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		resp, err := http.Get(s.URL)
		if err == nil {
			resp.Body.Close()
			return
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("the identity service does not answer: %v\n%s", err, text)
		}
	}
}

// Stop ends the service. What it has stored stays.
func (s *Server) Stop() { s.stop(s.cmd) }

func (s *Server) stop(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

// Project makes a project in the domain Default and returns its id.
func (s *Server) Project(t testing.TB, name string) string {
	t.Helper()
	p, err := projects.Create(context.Background(), s.admin, projects.CreateOpts{Name: name, DomainID: "default"}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	return p.ID
}

// User makes a user in the domain Default, with the roles in the project, makes
// roles that there are not, and returns the user's id. Its password is its name with
// -secret behind it.
func (s *Server) User(t testing.TB, name, project string, names ...string) string {
	t.Helper()
	ctx := context.Background()
	u, err := users.Create(ctx, s.admin, users.CreateOpts{Name: name, DomainID: "default", Password: name + "-secret"}).Extract()
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range names {
		pages, err := roles.List(s.admin, roles.ListOpts{Name: role}).AllPages(ctx)
		if err != nil {
			t.Fatal(err)
		}
		found, err := roles.ExtractRoles(pages)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) == 0 {
			r, err := roles.Create(ctx, s.admin, roles.CreateOpts{Name: role}).Extract()
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, *r)
		}
		if err := roles.Assign(ctx, s.admin, found[0].ID, roles.AssignOpts{UserID: u.ID, ProjectID: project}).ExtractErr(); err != nil {
			t.Fatal(err)
		}
	}
	return u.ID
}

// Service enters a service of a type into the catalogue, in the region RegionOne.
func (s *Server) Service(t testing.TB, kind, url string) {
	t.Helper()
	ctx := context.Background()
	service, err := services.Create(ctx, s.admin, services.CreateOpts{Type: kind, Extra: map[string]any{"name": kind}}).Extract()
	if err == nil {
		_, err = endpoints.Create(ctx, s.admin, endpoints.CreateOpts{
			Name: kind, Region: "RegionOne", ServiceID: service.ID, URL: url, Availability: gophercloud.AvailabilityPublic,
		}).Extract()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Token returns a token of a user that [Server.User] made, for a project's id or,
// where that is empty, for none.
func (s *Server) Token(t testing.TB, user, project string) string {
	t.Helper()
	o := tokens.AuthOptions{IdentityEndpoint: s.URL, Username: user, Password: user + "-secret", DomainName: "Default"}
	if project != "" {
		o.Scope = tokens.Scope{ProjectID: project}
	}
	anonymous, err := openstack.NewClient(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	client := &gophercloud.ServiceClient{ProviderClient: anonymous, Endpoint: strings.TrimSuffix(s.URL, "/") + "/"}
	token, err := tokens.Create(context.Background(), client, &o).ExtractToken()
	if err != nil {
		t.Fatal(err)
	}
	return token.ID
}

// Revoke makes a token invalid.
func (s *Server) Revoke(t testing.TB, token string) {
	t.Helper()
	if err := tokens.Revoke(context.Background(), s.admin, token).Err; err != nil {
		t.Fatal(err)
	}
}
