//go:build lab

package auth_test

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/central/api/auth"
	"github.com/kvmeter/kvmeter/test/keystone"
)

func TestKeystone(t *testing.T) {
	k := keystone.Start(t)
	services, p1 := k.Project(t, "service"), k.Project(t, "p1")
	k.User(t, "kvmeter", services, "admin") // who lists revocations must be more than service in this release
	alice := k.User(t, "alice", p1, "member", "reader")
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("kvmeter-secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := auth.DefaultConfig()
	c.Keystone.AuthURL, c.Keystone.Username, c.Keystone.PasswordFile = k.URL, "kvmeter", password
	c.Keystone.WWWAuthenticateURI = "http://keystone.example:5000"
	authenticate, err := auth.New(t.Context(), &c, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	token := k.Token(t, "alice", p1)

	id, err := authenticate(asking("X-Auth-Token", token, "X-Roles", "admin", "X-Project-Id", "p2"))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(id.Roles)
	if id.User != alice || id.Project != p1 || id.Trusted || strings.Join(id.Roles, " ") != "member reader" {
		t.Errorf("got %+v, want what the token says, and not what the headers say", id)
	}
	if id, err := authenticate(asking("X-Storage-Token", token)); err != nil || id.User != alice {
		t.Errorf("by X-Storage-Token: %+v, %v", id, err)
	}
	if id, err := authenticate(asking("X-Auth-Token", k.Token(t, "alice", ""))); err != nil || id.Project != "" || len(id.Roles) != 0 {
		t.Errorf("by a token for no project: %+v, %v", id, err)
	}
	for name, r := range map[string]*http.Request{
		"no token":              asking("X-Roles", "admin"),
		"a token of nobody":     asking("X-Auth-Token", "nobody"),
		"the same again":        asking("X-Auth-Token", "nobody"),
		"a token of odd bytes":  asking("X-Auth-Token", "\x01é\xff"),
		"a token without end":   asking("X-Auth-Token", strings.Repeat("x", 1<<20)),
		"a token with newlines": asking("X-Auth-Token", "a\r\nX-Subject-Token: b"),
	} {
		_, err := authenticate(r)
		wantStatus(t, name, err, http.StatusUnauthorized, `Keystone uri="http://keystone.example:5000"`)
	}

	// What is known is answered while the service is away, and nothing else.
	k.Stop()
	if _, err := authenticate(asking("X-Auth-Token", token)); err != nil {
		t.Errorf("a token that is known, while the service is away: %v", err)
	}
	_, err = authenticate(asking("X-Auth-Token", "another"))
	wantStatus(t, "a token that is not known, while the service is away", err, http.StatusServiceUnavailable, "")
	k.Run(t)

	k.Revoke(t, token)
	for deadline := time.Now().Add(time.Minute); err == nil || isUnavailable(err); time.Sleep(200 * time.Millisecond) {
		if _, err = authenticate(asking("X-Auth-Token", token)); time.Now().After(deadline) {
			t.Fatal("a token that was revoked is good after a minute")
		}
	}
	wantStatus(t, "a token that was revoked", err, http.StatusUnauthorized, `Keystone uri="http://keystone.example:5000"`)
	if id, err := authenticate(asking("X-Auth-Token", k.Token(t, "alice", p1))); err != nil || id.User != alice {
		t.Errorf("by a token made after that: %+v, %v", id, err)
	}

	if err := os.WriteFile(password, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Keystone.AuthURL = strings.TrimSuffix(k.URL, "/v3")
	if authenticate, err = auth.New(t.Context(), &c, zaptest.NewLogger(t)); err != nil {
		t.Fatal(err)
	}
	_, err = authenticate(asking("X-Auth-Token", k.Token(t, "alice", p1)))
	wantStatus(t, "our own password is wrong", err, http.StatusServiceUnavailable, "")
}

func isUnavailable(err error) bool { return answerTo(err).Code == http.StatusServiceUnavailable }
