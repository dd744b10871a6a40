package auth_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/api/auth"
	"github.com/kvmeter/kvmeter/central/store/memory"
)

// asking returns a request with headers, given as names and values.
func asking(headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/v2/meters", nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return r
}

// answerTo is how the API answers where authentication ends so.
func answerTo(err error) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	api.New(memory.New(time.Now), api.Options{
		Authenticate: func(*http.Request) (api.Identity, error) { return api.Identity{}, err },
	}).ServeHTTP(w, asking())
	return w
}

func wantStatus(t *testing.T, what string, err error, status int, challenge string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error", what)
		return
	}
	if w := answerTo(err); w.Code != status || w.Header().Get("WWW-Authenticate") != challenge {
		t.Errorf("%s: got %d and %q (%v), want %d and %q", what, w.Code, w.Header().Get("WWW-Authenticate"), err, status, challenge)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestWithoutMethodsHeadersAreBelieved(t *testing.T) {
	c := auth.DefaultConfig()
	authenticate, err := auth.New(t.Context(), &c, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	if id, err := authenticate(asking("X-User-Id", "u1")); err != nil || id.User != "u1" {
		t.Errorf("got %+v, %v", id, err)
	}
}

func TestStatic(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokens.yaml")
	sum := sha256.Sum256([]byte("another-token-of-bob"))
	write(t, file, fmt.Sprintf(`
tokens:
  - {token: a-token-of-alice, user: alice, project: p1, roles: [Member]}
  - {sha256: %s, user: bob, roles: [admin]}
  - {token: an-old-token-of-eve, user: eve, project: p1, expires: 2020-01-01T00:00:00Z}
`, hex.EncodeToString(sum[:])))
	c := auth.DefaultConfig()
	c.Static = file
	authenticate, err := auth.New(t.Context(), &c, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	for token, want := range map[string]api.Identity{
		"a-token-of-alice":     {User: "alice", Project: "p1", Roles: []string{"member"}},
		"another-token-of-bob": {User: "bob", Roles: []string{"admin"}},
	} {
		for name, r := range map[string]*http.Request{
			"X-Auth-Token":  asking("X-Auth-Token", token, "X-Roles", "admin"),
			"Authorization": asking("Authorization", "bearer "+token, "X-Project-Id", "p2"),
		} {
			if got, err := authenticate(r); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s by %s: got %+v, %v", token, name, got, err)
			}
		}
	}
	const challenge = `Bearer realm="kvmeter"`
	for name, r := range map[string]*http.Request{
		"no token":                     asking("X-User-Id", "alice"),
		"a digest is no token":         asking("X-Auth-Token", hex.EncodeToString(sum[:])),
		"a token that has expired":     asking("X-Auth-Token", "an-old-token-of-eve"),
		"Basic is not Bearer":          asking("Authorization", "Basic a-token-of-alice"),
		"the beginning of a token":     asking("X-Auth-Token", "a-token-of"),
		"a token in another character": asking("X-Auth-Token", "A-token-of-alice"),
	} {
		_, err := authenticate(r)
		wantStatus(t, name, err, http.StatusUnauthorized, challenge)
	}

	// A mistake in the file leaves its tokens as they are; a file without mistakes
	// replaces them.
	later := time.Now().Add(time.Hour)
	write(t, file, "tokens: [{user: alice}]")
	if err := os.Chtimes(file, later, later); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // how often the file is looked at
	if _, err := authenticate(asking("X-Auth-Token", "a-token-of-alice")); err != nil {
		t.Errorf("after a mistake in the file: %v", err)
	}
	write(t, file, "tokens: [{token: another-token-of-alice, user: alice}]")
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if _, err := authenticate(asking("X-Auth-Token", "another-token-of-alice")); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a changed file is not read")
		}
	}
	_, err = authenticate(asking("X-Auth-Token", "a-token-of-alice"))
	wantStatus(t, "a token that was taken out of the file", err, http.StatusUnauthorized, challenge)
}

func TestBadFilesOfTokens(t *testing.T) {
	for text, want := range map[string]string{
		"tokens: [{user: a}]": "entry 1: give one of token and sha256",
		"tokens: [{token: a-token-of-alice, sha256: aa, user: a}]":                         "entry 1: give one of token and sha256",
		"tokens: [{token: a-token-of-alice}]":                                              "entry 1: user is missing",
		"tokens: [{token: short, user: a}]":                                                "entry 1: the token is shorter than 16 characters; make one by openssl rand -hex 32",
		"tokens: [{sha256: zz, user: a}]":                                                  "entry 1: sha256 is not 64 hexadecimal digits, as printf %s TOKEN | sha256sum gives",
		"tokens: [{token: a-token-of-alice, user: a}, {token: a-token-of-alice, user: b}]": "entry 2: the token is there twice",
		"tokens: [{token: a-token-of-alice, user: a, role: admin}]":                        "yaml: unmarshal errors:\n  line 1: field role not found in type auth.staticToken",
	} {
		c := auth.DefaultConfig()
		c.Static = filepath.Join(t.TempDir(), "tokens.yaml")
		write(t, c.Static, text)
		if err := c.Check(); err == nil || err.Error() != "static tokens: "+c.Static+": "+want {
			t.Errorf("%s: got %v, want %s", text, err, want)
		}
	}
}

// issuer is an OpenID Connect provider with one key at a time.
type issuer struct {
	*httptest.Server
	key  atomic.Pointer[jose.JSONWebKey]
	away atomic.Bool
}

func newIssuer(t *testing.T) *issuer {
	i := &issuer{}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/keys", "authorization_endpoint": i.URL + "/auth", "token_endpoint": i.URL + "/token"})
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{i.key.Load().Public()}})
	})
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if i.away.Load() {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(i.Close)
	i.rotate(t, "first")
	return i
}

func (i *issuer) rotate(t *testing.T, id string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i.key.Store(&jose.JSONWebKey{Key: key, KeyID: id, Algorithm: "ES256", Use: "sig"})
}

// token returns a token for this service that is good for an hour, with claims
// set or, where nil, taken away.
func (i *issuer) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	return sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: *i.key.Load()}, i.URL, claims)
}

func sign(t *testing.T, key jose.SigningKey, iss string, claims map[string]any) string {
	t.Helper()
	all := map[string]any{
		"iss": iss, "aud": "kvmeter", "sub": "alice", "project_id": "p1", "roles": []string{"Member"},
		"exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
	}
	for name, v := range claims {
		if all[name] = v; v == nil {
			delete(all, name)
		}
	}
	payload, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestJWT(t *testing.T) {
	for _, discovered := range []bool{true, false} {
		t.Run(fmt.Sprintf("discovered=%v", discovered), func(t *testing.T) { testJWT(t, discovered) })
	}
}

func testJWT(t *testing.T, discovered bool) {
	i := newIssuer(t)
	c := auth.DefaultConfig()
	c.JWT.Issuer, c.JWT.Audience = i.URL, "kvmeter"
	if !discovered {
		c.JWT.JWKS = i.URL + "/keys"
	}
	c.JWT.Roles = "realm_access.roles"
	authenticate, err := auth.New(t.Context(), &c, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	bearer := func(token string) *http.Request { return asking("Authorization", "Bearer "+token) }
	const challenge = `Bearer realm="kvmeter"`

	i.away.Store(true)
	_, err = authenticate(bearer(i.token(t, nil)))
	wantStatus(t, "while the issuer is away", err, http.StatusServiceUnavailable, "")
	i.away.Store(false)

	nested := map[string]any{"roles": []string{"Admin", "auditor"}}
	for name, tc := range map[string]struct {
		claims map[string]any
		want   api.Identity
	}{
		"no roles":           {nil, api.Identity{User: "alice", Project: "p1", Roles: []string{}}},
		"roles in an object": {map[string]any{"realm_access": nested}, api.Identity{User: "alice", Project: "p1", Roles: []string{"admin", "auditor"}}},
		"a text of roles":    {map[string]any{"realm_access.roles": "a B"}, api.Identity{User: "alice", Project: "p1", Roles: []string{"a", "b"}}},
		"no project":         {map[string]any{"project_id": nil}, api.Identity{User: "alice", Roles: []string{}}},
		"several audiences":  {map[string]any{"aud": []string{"x", "kvmeter"}}, api.Identity{User: "alice", Project: "p1", Roles: []string{}}},
	} {
		if got, err := authenticate(bearer(i.token(t, tc.claims))); err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: got %+v, %v; want %+v", name, got, err, tc.want)
		}
	}
	good := i.token(t, nil)
	parts := strings.Split(good, ".")
	symmetric := jose.SigningKey{Algorithm: jose.HS256, Key: []byte("0123456789abcdef0123456789abcdef")}
	for name, token := range map[string]string{
		"it has expired":             i.token(t, map[string]any{"exp": time.Now().Add(-time.Minute).Unix()}),
		"it is not good yet":         i.token(t, map[string]any{"nbf": time.Now().Add(time.Hour).Unix()}),
		"it is for another service":  i.token(t, map[string]any{"aud": "nova"}),
		"it is of another issuer":    i.token(t, map[string]any{"iss": "https://other.example"}),
		"it has no user":             i.token(t, map[string]any{"sub": nil}),
		"its signature is cut":       good[:len(good)-4],
		"it has no signature":        parts[0] + "." + parts[1] + ".",
		"its signature is symmetric": sign(t, symmetric, i.URL, nil),
		"its algorithm is none":      "eyJhbGciOiJub25lIn0." + parts[1] + ".",
		"it is no token":             "a.b.c",
	} {
		_, err := authenticate(bearer(token))
		wantStatus(t, name, err, http.StatusUnauthorized, challenge)
	}

	i.rotate(t, "second")
	if _, err := authenticate(bearer(i.token(t, nil))); err != nil {
		t.Errorf("after the issuer has a new key: %v", err)
	}
	_, err = authenticate(bearer(good))
	wantStatus(t, "of a key that was withdrawn", err, http.StatusUnauthorized, challenge)
}

func TestBadConfig(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*auth.Config)
		want   string
	}{
		"an issuer without an audience": {func(c *auth.Config) { c.JWT.Issuer = "https://a.example" }, "jwt.audience is empty: name this service as tokens for it do, or tokens for any other service would be taken"},
		"an issuer that is no URL":      {func(c *auth.Config) { c.JWT.Issuer = "a.example" }, `jwt.issuer "a.example" is no URL such as https://login.example/realms/cloud`},
		"a Keystone that is no URL":     {func(c *auth.Config) { c.Keystone.AuthURL = "keystone" }, `keystone.auth_url "keystone" is no URL such as http://keystone:5000/v3`},
		"a Keystone without a user":     {func(c *auth.Config) { c.Keystone.AuthURL = "http://k" }, "keystone.username is empty: name a user with the role service, or give application_credential_id"},
		"a user without a password":     {func(c *auth.Config) { c.Keystone.AuthURL, c.Keystone.Username = "http://k", "u" }, "keystone.password_file is empty"},
		"a file that is not there":      {func(c *auth.Config) { c.Static = "/nowhere" }, "static tokens: open /nowhere: no such file or directory"},
	} {
		c := auth.DefaultConfig()
		tc.change(&c)
		if err := c.Check(); err == nil || err.Error() != tc.want {
			t.Errorf("%s: got %v, want %s", name, err, tc.want)
		}
		if _, err := auth.New(t.Context(), &c, zaptest.NewLogger(t)); err == nil {
			t.Errorf("%s: it starts", name)
		}
	}
}

// TestAnIssuerThatHangs has one that takes a question and does not answer: who asks
// meanwhile waits with its own patience, and the issuer is asked once.
func TestAnIssuerThatHangs(t *testing.T) {
	asked, answer := make(chan struct{}, 2), make(chan struct{})
	hung := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-answer
		w.WriteHeader(http.StatusBadGateway)
	}))
	defer hung.Close()
	c := auth.DefaultConfig()
	c.JWT.Issuer, c.JWT.Audience = hung.URL, "kvmeter"
	authenticate, err := auth.New(t.Context(), &c, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	token := newIssuer(t).token(t, map[string]any{"iss": hung.URL})
	first := make(chan error, 1)
	go func() {
		_, err := authenticate(asking("Authorization", "Bearer "+token))
		first <- err
	}()
	<-asked
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = authenticate(asking("Authorization", "Bearer "+token).WithContext(ctx))
	wantStatus(t, "who has no patience", err, http.StatusServiceUnavailable, "")
	select {
	case err := <-first:
		t.Errorf("the first has its answer already: %v", err)
	default:
	}
	close(answer)
	wantStatus(t, "the first", <-first, http.StatusServiceUnavailable, "")
	if len(asked) > 0 {
		t.Error("the issuer was asked twice")
	}
}

// TestAnIdentityServiceThatHangs has many bring tokens while the service does not
// answer: it is not asked for each of them in turn.
func TestAnIdentityServiceThatHangs(t *testing.T) {
	const many = 20
	var asked atomic.Int32
	answer := make(chan struct{})
	hung := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		<-answer
		w.WriteHeader(http.StatusBadGateway)
	}))
	defer hung.Close()
	c := auth.DefaultConfig()
	c.Keystone.AuthURL, c.Keystone.Username, c.Keystone.PasswordFile = hung.URL, "kvmeter", filepath.Join(t.TempDir(), "password")
	write(t, c.Keystone.PasswordFile, "hush")
	authenticate, err := auth.New(t.Context(), &c, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	var began sync.WaitGroup
	done := make(chan error, many)
	began.Add(many)
	for i := range many {
		go func() {
			began.Done()
			_, err := authenticate(asking("X-Auth-Token", fmt.Sprintf("token-%d", i)))
			done <- err
		}()
	}
	began.Wait()
	close(answer)
	for range many {
		wantStatus(t, "while the service hangs", <-done, http.StatusServiceUnavailable, "")
	}
	if n := asked.Load(); n >= many {
		t.Errorf("the service was asked %d times by %d", n, many)
	}
}
