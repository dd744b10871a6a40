// Package auth says who asks the API: by tokens of OpenStack's identity service
// (Keystone), by JSON Web Tokens of any issuer that publishes its keys, or by
// tokens written in a file.
package auth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/api"
)

// Config is the part of central.yaml about who may ask. Methods that are
// configured are tried in the order static, jwt, keystone; the first that knows
// a token decides. Without any, whoever reaches the API is believed to be who the
// headers X-User-Id, X-Project-Id and X-Roles say.
type Config struct {
	// Static is the path of a file of tokens: see docs/api.md. It is read
	// again when it changes.
	Static string `yaml:"static"`
	// JWT is about JSON Web Tokens, as OpenID Connect providers give them.
	JWT JWTConfig `yaml:"jwt"`
	// Keystone is about tokens of OpenStack's identity service.
	Keystone KeystoneConfig `yaml:"keystone"`
}

// DefaultConfig returns what holds where nothing is said.
func DefaultConfig() Config {
	return Config{JWT: defaultJWT, Keystone: defaultKeystone}
}

// Enabled reports whether requests are authenticated.
func (c *Config) Enabled() bool {
	return c.Static != "" || c.JWT.Issuer != "" || c.Keystone.AuthURL != ""
}

// Check returns what cannot work, without asking anybody.
func (c *Config) Check() error {
	var errs []error
	if c.Static != "" {
		_, err := readStatic(c.Static)
		errs = append(errs, err)
	}
	if c.JWT.Issuer != "" {
		errs = append(errs, c.JWT.check())
	}
	if c.Keystone.AuthURL != "" {
		_, err := c.Keystone.options()
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// method tells whose a token is. Its error is errUnknown where it is none of
// its tokens, so that another method may know it.
type method interface {
	identify(ctx context.Context, token string) (api.Identity, error)
}

var errUnknown = errors.New("unknown token")

// unavailable says that it cannot be told now whose a token is.
type unavailable struct{ error }

func (u unavailable) Unwrap() error { return u.error }

// New returns what says who sent a request. It asks nobody yet: who issues tokens
// may be started later. What it starts ends with ctx.
func New(ctx context.Context, c *Config, log *zap.Logger) (api.Authenticator, error) {
	if !c.Enabled() {
		return api.NoAuth, nil
	}
	if err := c.Check(); err != nil {
		return nil, err
	}
	var methods []method
	challenge := `Bearer realm="kvmeter"`
	if c.Static != "" {
		s, err := newStatic(c.Static, log)
		if err != nil {
			return nil, err
		}
		methods = append(methods, s)
	}
	if c.JWT.Issuer != "" {
		methods = append(methods, newJWT(ctx, &c.JWT))
	}
	if c.Keystone.AuthURL != "" {
		k, err := newKeystone(ctx, &c.Keystone, log)
		if err != nil {
			return nil, err
		}
		methods = append(methods, k)
		challenge = fmt.Sprintf("Keystone uri=%q", c.Keystone.WWWAuthenticateURI)
		if c.Keystone.WWWAuthenticateURI == "" {
			challenge = fmt.Sprintf("Keystone uri=%q", c.Keystone.AuthURL)
		}
	}
	return func(r *http.Request) (api.Identity, error) {
		token := tokenOf(r)
		if token == "" {
			return api.Identity{}, api.Unauthenticated(challenge)
		}
		for _, m := range methods {
			id, err := m.identify(r.Context(), token)
			switch {
			case err == nil:
				return id, nil
			case errors.As(err, new(unavailable)):
				log.Warn("cannot tell whose a token is", zap.Error(err))
				return api.Identity{}, api.Unavailable("It cannot be told now whose the token is; try again later.")
			case !errors.Is(err, errUnknown):
				log.Info("token refused", zap.String("from", r.RemoteAddr), zap.Error(err))
				return api.Identity{}, api.Unauthenticated(challenge)
			}
		}
		return api.Identity{}, api.Unauthenticated(challenge)
	}, nil
}

// maxToken bounds a token: Keystone's are some 250 bytes, JSON Web Tokens with
// many claims a few thousand.
const maxToken = 16 << 10

// tokenOf returns the token of a request: of X-Auth-Token, X-Storage-Token or
// Authorization: Bearer. Identity headers that a client sends are never looked at.
func tokenOf(r *http.Request) string {
	token := r.Header.Get("X-Auth-Token")
	if token == "" {
		token = r.Header.Get("X-Storage-Token")
	}
	if token == "" {
		if scheme, rest, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
			token = strings.TrimSpace(rest)
		}
	}
	if len(token) > maxToken || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return ""
	}
	return token
}

// roles returns names of roles as the policy compares them.
func roles(names []string) []string {
	all := make([]string, 0, len(names))
	for _, name := range names {
		all = append(all, strings.ToLower(name))
	}
	return all
}

// timeout bounds each question to who issues tokens.
const timeout = 10 * time.Second
