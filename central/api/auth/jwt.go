package auth

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/sync/singleflight"

	"github.com/kvmeter/kvmeter/central/api"
)

// JWTConfig is about JSON Web Tokens.
type JWTConfig struct {
	// Issuer is the URL of who issues the tokens, as in their claim iss. Empty:
	// there are none.
	Issuer string `yaml:"issuer"`
	// JWKS is the URL of the issuer's keys; empty: the one that the issuer's
	// /.well-known/openid-configuration names.
	JWKS string `yaml:"jwks"`
	// Audience is what the claim aud must name: this service.
	Audience string `yaml:"audience"`
	// User is the claim that has the user's id.
	User string `yaml:"user"`
	// Project is the claim that has the project's id. A dot leads into an
	// object, as in resource_access.kvmeter.
	Project string `yaml:"project"`
	// Roles is the claim that has the roles: a list, or words separated by
	// spaces.
	Roles string `yaml:"roles"`
}

var defaultJWT = JWTConfig{User: "sub", Project: "project_id", Roles: "roles"}

func (c *JWTConfig) check() error {
	for _, u := range []struct{ name, value string }{{"issuer", c.Issuer}, {"jwks", c.JWKS}} {
		parsed, err := url.Parse(u.value)
		if u.value != "" && (err != nil || parsed.Host == "" || parsed.Scheme != "https" && parsed.Scheme != "http") {
			return fmt.Errorf("jwt.%s %q is no URL such as https://login.example/realms/cloud", u.name, u.value)
		}
	}
	if c.Audience == "" {
		return errors.New("jwt.audience is empty: name this service as tokens for it do, or tokens for any other service would be taken")
	}
	return nil
}

// algorithms are what tokens may be signed with. None of them is symmetric.
var algorithms = []string{
	oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512,
	oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA,
}

// jwt knows the tokens of an issuer. Its keys are kept until a token is signed
// with another one.
type jwt struct {
	ctx      context.Context // of the requests for keys
	config   *JWTConfig
	asking   singleflight.Group
	verifier atomic.Pointer[oidc.IDTokenVerifier] // nil: the issuer was not asked yet
}

func newJWT(ctx context.Context, c *JWTConfig) *jwt {
	return &jwt{ctx: oidc.ClientContext(ctx, &http.Client{Timeout: timeout}), config: c}
}

// prepared returns the verifier, and asks the issuer where its keys are if need
// be: once for all who wait.
func (j *jwt) prepared(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	if v := j.verifier.Load(); v != nil {
		return v, nil
	}
	done := j.asking.DoChan("", func() (any, error) {
		if j.verifier.Load() != nil { // since it was looked at
			return nil, nil
		}
		config := &oidc.Config{ClientID: j.config.Audience, SupportedSigningAlgs: algorithms}
		if j.config.JWKS != "" {
			j.verifier.Store(oidc.NewVerifier(j.config.Issuer, oidc.NewRemoteKeySet(j.ctx, j.config.JWKS), config))
			return nil, nil
		}
		p, err := oidc.NewProvider(j.ctx, j.config.Issuer)
		if err == nil {
			j.verifier.Store(p.VerifierContext(j.ctx, config))
		}
		return nil, err
	})
	select {
	case asked := <-done:
		if asked.Err != nil {
			return nil, unavailable{asked.Err}
		}
		return j.verifier.Load(), nil
	case <-ctx.Done():
		return nil, unavailable{ctx.Err()}
	}
}

func (j *jwt) identify(ctx context.Context, token string) (api.Identity, error) {
	if !j.issued(token) {
		return api.Identity{}, errUnknown
	}
	v, err := j.prepared(ctx)
	if err != nil {
		return api.Identity{}, err
	}
	t, err := v.Verify(ctx, token)
	if err != nil {
		if strings.Contains(err.Error(), "fetching keys") { // which the library does not tell otherwise
			err = unavailable{err}
		}
		return api.Identity{}, err
	}
	var claims map[string]any
	if err := t.Claims(&claims); err != nil {
		return api.Identity{}, err
	}
	id := api.Identity{Roles: roles(words(claim(claims, j.config.Roles)))}
	id.User, _ = claim(claims, j.config.User).(string)
	id.Project, _ = claim(claims, j.config.Project).(string)
	if id.User == "" {
		return api.Identity{}, fmt.Errorf("the token of %s has no claim %s", t.Subject, j.config.User)
	}
	return id, nil
}

// issued reports whether a token says that it is the issuer's, which remains to
// be verified.
func (j *jwt) issued(token string) bool {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return false
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	return json.Unmarshal(payload, &claims) == nil && claims.Issuer == j.config.Issuer
}

// claim returns a claim, or one inside a claim that is an object.
func claim(claims map[string]any, path string) any {
	if v, ok := claims[path]; ok { // names may have dots: https://example.com/roles
		return v
	}
	first, rest, deeper := strings.Cut(path, ".")
	if inner, ok := claims[first].(map[string]any); ok && deeper {
		return claim(inner, rest)
	}
	return nil
}

// words returns the texts of a list, or the words of a text.
func words(v any) []string {
	switch v := v.(type) {
	case string:
		return strings.Fields(v)
	case []any:
		var all []string
		for _, e := range v {
			if text, ok := e.(string); ok {
				all = append(all, text)
			}
		}
		return all
	}
	return nil
}
