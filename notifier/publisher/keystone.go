package publisher

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// Keystone gets tokens from OpenStack's identity service with a password, and
// finds another service in its catalogue. It is safe for concurrent use.
type Keystone struct {
	service   string // type in the catalogue
	auth      string // OS_AUTH_URL, with /v3
	user      string
	password  string
	project   string
	userIn    string // domain of the user
	projectIn string // domain of the project
	region    string
	access    string // interface of the endpoint
	client    *http.Client

	mu       sync.Mutex
	token    string
	until    time.Time
	endpoint string
}

// NewKeystone returns what finds the service of a type. The environment says
// where the identity service is, and who we are.
func NewKeystone(service string) (*Keystone, error) {
	env := os.Getenv
	or := func(name, unset string) string {
		if v := env(name); v != "" {
			return v
		}
		return unset
	}
	k := &Keystone{
		service: service, client: &http.Client{Timeout: 30 * time.Second},
		auth: strings.TrimSuffix(env("OS_AUTH_URL"), "/"), user: env("OS_USERNAME"), password: env("OS_PASSWORD"),
		project: or("OS_PROJECT_NAME", "service"), userIn: or("OS_USER_DOMAIN_NAME", "Default"), projectIn: or("OS_PROJECT_DOMAIN_NAME", "Default"),
		region: env("OS_REGION_NAME"), access: strings.TrimSuffix(or("OS_INTERFACE", "public"), "URL"),
	}
	if !strings.HasSuffix(k.auth, "/v3") {
		k.auth += "/v3"
	}
	if env("OS_AUTH_URL") == "" || k.user == "" || k.password == "" {
		return nil, errors.New("it needs OS_AUTH_URL, OS_USERNAME, OS_PASSWORD and so on in the environment")
	}
	return k, nil
}

// Get returns a token that is good for some time, and the service's endpoint.
func (k *Keystone) Get(ctx context.Context) (token, endpoint string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.token != "" && time.Until(k.until) > time.Minute {
		return k.token, k.endpoint, nil
	}
	named := func(name, domain string) map[string]any {
		return map[string]any{"name": name, "domain": map[string]any{"name": domain}}
	}
	user := named(k.user, k.userIn)
	user["password"] = k.password
	body, err := json.Marshal(map[string]any{"auth": map[string]any{
		"identity": map[string]any{"methods": []string{"password"}, "password": map[string]any{"user": user}},
		"scope":    map[string]any{"project": named(k.project, k.projectIn)},
	}})
	if err != nil {
		return "", "", err
	}
	var answer struct {
		Token struct {
			Expires time.Time `json:"expires_at"`
			Catalog []struct {
				Type      string
				Endpoints []struct{ Interface, Region, URL string }
			}
		}
	}
	header, err := k.ask(ctx, http.MethodPost, "/auth/tokens", "", body, &answer)
	if err != nil {
		return "", "", fmt.Errorf("get a token from %s: %w", k.auth, err)
	}
	k.endpoint = ""
	for _, s := range answer.Token.Catalog {
		for _, e := range s.Endpoints {
			if s.Type == k.service && e.Interface == k.access && (k.region == "" || e.Region == k.region) {
				k.endpoint = e.URL
			}
		}
	}
	if k.endpoint == "" {
		return "", "", fmt.Errorf("the catalogue of %s has no %s endpoint of type %s in region %q", k.auth, k.access, k.service, k.region)
	}
	k.token, k.until = header.Get("X-Subject-Token"), answer.Token.Expires
	return k.token, k.endpoint, nil
}

// Forget makes the next Get ask for a new token.
func (k *Keystone) Forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.token = ""
}

// ProjectID returns the id of a project; empty where there is none.
func (k *Keystone) ProjectID(ctx context.Context, name, domain string) (string, error) {
	token, _, err := k.Get(ctx)
	if err != nil {
		return "", err
	}
	var domains struct{ Domains []struct{ ID string } }
	if _, err := k.ask(ctx, http.MethodGet, "/domains?name="+url.QueryEscape(domain), token, nil, &domains); err != nil {
		return "", err
	}
	if len(domains.Domains) == 0 {
		return "", nil
	}
	var projects struct{ Projects []struct{ ID string } }
	path := "/projects?name=" + url.QueryEscape(name) + "&domain_id=" + url.QueryEscape(domains.Domains[0].ID)
	if _, err := k.ask(ctx, http.MethodGet, path, token, nil, &projects); err != nil || len(projects.Projects) == 0 {
		return "", err
	}
	return projects.Projects[0].ID, nil
}

func (k *Keystone) ask(ctx context.Context, method, path, token string, body []byte, answer any) (http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, k.auth+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("X-Auth-Token", token)
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		return nil, fmt.Errorf("%s: %.200s", resp.Status, text)
	}
	return resp.Header, json.Unmarshal(text, answer)
}
