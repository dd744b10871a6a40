package auth

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	lru "github.com/hashicorp/golang-lru/v2"
	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/sample"
)

// KeystoneConfig is about tokens of OpenStack's identity service, version 3.
type KeystoneConfig struct {
	// AuthURL is the URL of the service, such as http://keystone:5000/v3.
	// Empty: there is none.
	AuthURL string `yaml:"auth_url"`
	// WWWAuthenticateURI is the URL that clients without a token are told;
	// empty: auth_url.
	WWWAuthenticateURI string `yaml:"www_authenticate_uri"`
	// CA is a file of certificates that may have signed the service's; empty:
	// those that the system trusts.
	CA string `yaml:"cafile"`
	// Username is our own user, who asks about tokens: it needs the role
	// service or admin.
	Username string `yaml:"username"`
	// PasswordFile is the file of its password.
	PasswordFile string `yaml:"password_file"`
	// UserDomain is the name of the user's domain.
	UserDomain string `yaml:"user_domain_name"`
	// Project is the name of the project of our own user.
	Project string `yaml:"project_name"`
	// ProjectDomain is the name of that project's domain.
	ProjectDomain string `yaml:"project_domain_name"`
	// ApplicationCredentialID is the id of an application credential, in place
	// of user and project.
	ApplicationCredentialID string `yaml:"application_credential_id"`
	// ApplicationCredentialSecretFile is the file of its secret.
	ApplicationCredentialSecretFile string `yaml:"application_credential_secret_file"`
	// Cache is how long what the service says of a token is believed, at most.
	// Where the service tells of revocations, they end it within seconds.
	Cache time.Duration `yaml:"cache"`
}

var defaultKeystone = KeystoneConfig{
	UserDomain: "Default", Project: "service", ProjectDomain: "Default", Cache: 5 * time.Minute,
}

const (
	cacheSize = 10_000
	// unknownFor is how long a token that the service does not know is refused
	// without asking again.
	unknownFor = 10 * time.Second
	// revocations is how often the service is asked what was revoked.
	revocations = 5 * time.Second
)

// options returns how we introduce ourselves.
func (c *KeystoneConfig) options() (gophercloud.AuthOptions, error) {
	o := gophercloud.AuthOptions{IdentityEndpoint: c.AuthURL, AllowReauth: true}
	u, err := url.Parse(c.AuthURL)
	if err != nil || u.Host == "" {
		return o, fmt.Errorf("keystone.auth_url %q is no URL such as http://keystone:5000/v3", c.AuthURL)
	}
	if !strings.HasSuffix(strings.TrimSuffix(u.Path, "/"), "/v3") {
		o.IdentityEndpoint = strings.TrimSuffix(c.AuthURL, "/") + "/v3"
	}
	if c.ApplicationCredentialID != "" {
		o.ApplicationCredentialID = c.ApplicationCredentialID
		o.ApplicationCredentialSecret, err = secret("application_credential_secret_file", c.ApplicationCredentialSecretFile)
		return o, err
	}
	if c.Username == "" {
		return o, errors.New("keystone.username is empty: name a user with the role service, or give application_credential_id")
	}
	o.Username, o.DomainName = c.Username, c.UserDomain
	o.Scope = &gophercloud.AuthScope{ProjectName: c.Project, DomainName: c.ProjectDomain}
	o.Password, err = secret("password_file", c.PasswordFile)
	return o, err
}

func secret(name, path string) (string, error) {
	if path == "" {
		return "", fmt.Errorf("keystone.%s is empty", name)
	}
	b, err := sample.ReadSecret(path, 1)
	if err != nil {
		return "", fmt.Errorf("keystone.%s: %w", name, err)
	}
	return string(b), nil
}

// keystone asks the identity service about tokens, and remembers what it said.
type keystone struct {
	ctx     context.Context // of what outlives a request
	log     *zap.Logger
	options gophercloud.AuthOptions
	client  *http.Client
	keep    time.Duration
	cache   *lru.Cache[digest, answer]
	asking  singleflight.Group

	mu       sync.Mutex                 // nobody is asked with it held
	service  *gophercloud.ServiceClient // nil: not logged in yet
	asked    time.Time                  // for revocations, the last time
	revoked  map[string]struct{}        // events of revocation that are known
	silent   bool                       // revocations are not told to us
	checking bool
}

// answer is what the service said of a token.
type answer struct {
	api.Identity
	err   error
	until time.Time
}

func newKeystone(ctx context.Context, c *KeystoneConfig, log *zap.Logger) (*keystone, error) {
	o, err := c.options()
	if err != nil {
		return nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, fmt.Errorf("keystone.cafile: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("keystone.cafile: %s has no certificate", c.CA)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	cache, err := lru.New[digest, answer](cacheSize)
	if err != nil {
		return nil, err
	}
	return &keystone{
		ctx: ctx, log: log, options: o, client: &http.Client{Transport: transport, Timeout: timeout},
		keep: c.Cache, cache: cache,
	}, nil
}

func (k *keystone) identify(_ context.Context, token string) (api.Identity, error) {
	key := digest(sha256.Sum256([]byte(token)))
	k.watch()
	if a, ok := k.cache.Get(key); ok && time.Now().Before(a.until) {
		return a.Identity, a.err
	}
	// The question is everybody's who brings that token now, so that it does not
	// end with one of them.
	got, err, _ := k.asking.Do(string(key[:]), func() (any, error) {
		a, err := k.ask(token)
		if err == nil {
			k.cache.Add(key, a)
		}
		return a, err
	})
	if err != nil {
		return api.Identity{}, err
	}
	a := got.(answer)
	return a.Identity, a.err
}

// login returns the service's client, for which it logs in once for all who wait. The
// client itself renews its token.
func (k *keystone) login() (*gophercloud.ServiceClient, error) {
	if service := k.loggedIn(); service != nil {
		return service, nil
	}
	got, err, _ := k.asking.Do("login", func() (any, error) {
		if service := k.loggedIn(); service != nil { // since it was looked at
			return service, nil
		}
		provider, err := openstack.NewClient(k.options.IdentityEndpoint)
		if err != nil {
			return nil, err
		}
		provider.HTTPClient = *k.client
		provider.UseTokenLock()
		if err := openstack.Authenticate(k.ctx, provider, k.options); err != nil {
			return nil, fmt.Errorf("log in to %s: %w", k.options.IdentityEndpoint, err)
		}
		// The catalogue may name an address for others; we use the one that we were given.
		endpoint := strings.TrimSuffix(k.options.IdentityEndpoint, "/") + "/"
		service := &gophercloud.ServiceClient{ProviderClient: provider, Endpoint: endpoint, Type: "identity"}
		asked := time.Now()
		events, err := k.revokedLately(service)
		k.mu.Lock()
		defer k.mu.Unlock()
		k.service, k.asked = service, asked
		k.learn(events, err)
		return service, nil
	})
	if err != nil {
		return nil, err
	}
	return got.(*gophercloud.ServiceClient), nil
}

// loggedIn returns the service's client, or nil.
func (k *keystone) loggedIn() *gophercloud.ServiceClient {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.service
}

func (k *keystone) ask(token string) (answer, error) {
	service, err := k.login()
	if err != nil {
		return answer{}, unavailable{err}
	}
	r := tokens.Get(k.ctx, service, token)
	now := time.Now()
	if gophercloud.ResponseCodeIs(r.Err, http.StatusNotFound) {
		return answer{err: errUnknown, until: now.Add(min(unknownFor, k.keep))}, nil
	}
	var t struct {
		ExpiresAt time.Time      `json:"expires_at"`
		User      tokens.User    `json:"user"`
		Project   tokens.Project `json:"project"` // empty in a token for a domain or the system
		Roles     []tokens.Role  `json:"roles"`
	}
	err = r.ExtractInto(&t)
	if err == nil && t.User.ID == "" {
		err = errors.New("the answer names no user")
	}
	if err != nil {
		return answer{}, unavailable{fmt.Errorf("ask %s about a token: %w", k.options.IdentityEndpoint, err)}
	}
	a := answer{Identity: api.Identity{User: t.User.ID, Project: t.Project.ID}, until: now.Add(k.keep)}
	for _, role := range t.Roles {
		a.Roles = append(a.Roles, strings.ToLower(role.Name))
	}
	if t.ExpiresAt.Before(a.until) {
		a.until = t.ExpiresAt
	}
	return a, nil
}

// watch asks, beside the request and every now and then, what was revoked since
// it was last asked, and forgets all answers if anything was.
func (k *keystone) watch() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.service == nil || k.silent || k.checking || time.Since(k.asked) < revocations {
		return
	}
	k.checking, k.asked = true, time.Now()
	service := k.service
	go func() {
		events, err := k.revokedLately(service)
		k.mu.Lock()
		defer k.mu.Unlock()
		k.checking = false
		k.learn(events, err)
	}()
}

// learn takes over what was revoked lately; mu is held.
func (k *keystone) learn(events map[string]struct{}, err error) {
	switch {
	case gophercloud.ResponseCodeIs(err, http.StatusForbidden), gophercloud.ResponseCodeIs(err, http.StatusNotFound):
		k.silent = true
		k.log.Warn("the identity service does not tell us what is revoked: a token is good for the time it is cached", zap.Duration("cache", k.keep), zap.Error(err))
		return
	case err != nil:
		k.log.Warn("cannot ask what is revoked", zap.Error(err))
		return
	}
	for event := range events {
		if _, old := k.revoked[event]; !old {
			k.cache.Purge()
			k.log.Debug("something was revoked: all tokens are asked about again")
			break
		}
	}
	k.revoked = events
}

// revokedLately returns the events of revocation of the time that answers are kept
// for, as the service writes them. What an event is about takes much to find out
// and comes seldom, so it is not looked at.
func (k *keystone) revokedLately(service *gophercloud.ServiceClient) (map[string]struct{}, error) {
	var list struct {
		Events []json.RawMessage `json:"events"`
	}
	at := time.Now().Add(-k.keep - time.Minute).UTC().Format("2006-01-02T15:04:05Z")
	_, err := service.Get(k.ctx, service.ServiceURL("OS-REVOKE", "events")+"?since="+url.QueryEscape(at), &list, nil)
	if err != nil {
		return nil, err
	}
	events := map[string]struct{}{}
	for _, e := range list.Events {
		events[string(e)] = struct{}{}
	}
	return events, nil
}
