package cli

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kvmeter/kvmeter/central/client"
)

// DefaultEndpoint is where kvmeter's API listens unless it is told otherwise.
const DefaultEndpoint = "http://127.0.0.1:8777"

// EndpointEnv is the environment variable that names another API.
const EndpointEnv = "KVMETER_ENDPOINT"

// setting is a flag of the connection, and the environment variables that set it
// as well.
type setting struct {
	name      string
	value     *string
	usage     string
	variables []string
	shown     bool // in each command's help
}

// connection says where the API is and who asks it.
type connection struct {
	endpoint, token, cloud               string
	authURL                              string
	username, userID, password           string
	userDomain, userDomainID             string
	project, projectID                   string
	projectDomain, projectDomainID       string
	credentialID, credentialName, secret string
	region, access, cacert, cert, key    string
	insecure, debug                      bool
	timeout                              time.Duration
	environment                          map[string]string // what the environment says, by the flag's name
}

func (c *connection) settings() []setting {
	return []setting{
		{"endpoint", &c.endpoint, "`URL` of the API; " + EndpointEnv + " sets it as well", []string{EndpointEnv, "OS_ENDPOINT", "OS_ENDPOINT_OVERRIDE"}, true},
		{"os-token", &c.token, "`TOKEN` to show the API; OS_TOKEN sets it as well", []string{"KVMETER_TOKEN", "OS_TOKEN", "OS_AUTH_TOKEN"}, true},
		{"os-cloud", &c.cloud, "log in to this `CLOUD` of clouds.yaml", []string{"OS_CLOUD"}, true},
		{"os-auth-url", &c.authURL, "`URL` of Keystone", []string{"OS_AUTH_URL"}, false},
		{"os-username", &c.username, "`NAME` of the user", []string{"OS_USERNAME"}, false},
		{"os-user-id", &c.userID, "`ID` of the user", []string{"OS_USER_ID", "OS_USERID"}, false},
		{"os-password", &c.password, "`PASSWORD` of the user", []string{"OS_PASSWORD"}, false},
		{"os-user-domain-name", &c.userDomain, "`NAME` of the user's domain", []string{"OS_USER_DOMAIN_NAME", "OS_DOMAIN_NAME"}, false},
		{"os-user-domain-id", &c.userDomainID, "`ID` of the user's domain", []string{"OS_USER_DOMAIN_ID", "OS_DOMAIN_ID"}, false},
		{"os-project-name", &c.project, "`NAME` of the project", []string{"OS_PROJECT_NAME", "OS_TENANT_NAME"}, false},
		{"os-project-id", &c.projectID, "`ID` of the project", []string{"OS_PROJECT_ID", "OS_TENANT_ID"}, false},
		{"os-project-domain-name", &c.projectDomain, "`NAME` of the project's domain", []string{"OS_PROJECT_DOMAIN_NAME"}, false},
		{"os-project-domain-id", &c.projectDomainID, "`ID` of the project's domain", []string{"OS_PROJECT_DOMAIN_ID"}, false},
		{"os-application-credential-id", &c.credentialID, "`ID` of an application credential, in place of a user", []string{"OS_APPLICATION_CREDENTIAL_ID"}, false},
		{"os-application-credential-name", &c.credentialName, "`NAME` of an application credential of the user", []string{"OS_APPLICATION_CREDENTIAL_NAME"}, false},
		{"os-application-credential-secret", &c.secret, "its `SECRET`", []string{"OS_APPLICATION_CREDENTIAL_SECRET"}, false},
		{"os-region-name", &c.region, "`REGION` of the API in Keystone's catalogue", []string{"OS_REGION_NAME"}, false},
		{"os-endpoint-type", &c.access, "public, internal or admin: which `ADDRESS` of the API in the catalogue", []string{"OS_ENDPOINT_TYPE", "OS_INTERFACE"}, false},
		{"os-cacert", &c.cacert, "`FILE` of certificates that may have signed a server's", []string{"OS_CACERT"}, false},
		{"os-cert", &c.cert, "`FILE` of the certificate to show a server", []string{"OS_CERT"}, false},
		{"os-key", &c.key, "`FILE` of its key", []string{"OS_KEY"}, false},
	}
}

// overrides are how flags override clouds.yaml; the others do in other ways, or
// not.
var overrides = map[string]func(string) clouds.ParseOption{
	"os-auth-url": clouds.WithIdentityEndpoint, "os-username": clouds.WithUsername, "os-user-id": clouds.WithUserID, "os-password": clouds.WithPassword,
	"os-application-credential-id": clouds.WithApplicationCredentialID, "os-application-credential-name": clouds.WithApplicationCredentialName,
	"os-application-credential-secret": clouds.WithApplicationCredentialSecret,
}

// aliases are other names of flags, those of the original client.
var aliases = map[string]string{
	"os-endpoint": "endpoint", "os-auth-token": "os-token", "os-tenant-name": "os-project-name", "os-tenant-id": "os-project-id",
	"os-interface": "os-endpoint-type", "insecure": "os-insecure",
}

// seconds is a time that may be given as a number of seconds, as in the
// original client.
type seconds time.Duration

// String implements [pflag.Value].
func (s *seconds) String() string { return time.Duration(*s).String() }

// Type implements [pflag.Value].
func (s *seconds) Type() string { return "duration" }

// Set implements [pflag.Value].
func (s *seconds) Set(text string) error {
	d, err := time.ParseDuration(text)
	if n, e := strconv.ParseUint(text, 10, 31); e == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d < 0 {
		return errors.New("it is a number of seconds, or a time such as 5m")
	}
	*s = seconds(d)
	return nil
}

// flags defines the flags. Those that are not shown, and all where hide says so,
// are left out of the help.
func (c *connection) flags(f *pflag.FlagSet, hide bool) {
	for _, s := range c.settings() {
		f.StringVar(s.value, s.name, *s.value, s.usage)
		f.Lookup(s.name).Hidden = !s.shown || hide
		f.Lookup(s.name).DefValue = "" // the help must not tell what the environment has
	}
	f.Lookup("endpoint").DefValue = cmp.Or(c.endpoint, DefaultEndpoint)
	f.BoolVar(&c.insecure, "os-insecure", c.insecure, "believe servers whose certificate nobody vouches for")
	f.Var((*seconds)(&c.timeout), "timeout", "how long an answer may take: seconds, or `TIME` such as 5m")
	f.BoolVarP(&c.debug, "debug", "d", c.debug, "print requests and answers, without secrets, to the standard error")
	for _, name := range []string{"os-insecure", "timeout", "debug"} {
		if name == "os-insecure" || hide {
			f.Lookup(name).Hidden = true
		}
	}
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		name = strings.ReplaceAll(name, "_", "-") // as the oldest clients had them
		return pflag.NormalizedName(cmp.Or(aliases[name], name))
	})
}

// newConnection returns what the environment says.
func newConnection() *connection {
	c := &connection{timeout: 10 * time.Minute, environment: map[string]string{}}
	for _, s := range c.settings() {
		for _, v := range s.variables {
			*s.value = cmp.Or(*s.value, os.Getenv(v))
		}
		c.environment[s.name] = *s.value
	}
	c.insecure = strings.EqualFold(os.Getenv("OS_INSECURE"), "true")
	return c
}

// open finds the API and logs in, where that is asked for. Where there is a
// token and an endpoint Keystone is not asked.
func (c *connection) open(ctx context.Context, debug io.Writer) (*client.Client, error) {
	config, err := c.tls()
	if err != nil {
		return nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = config
	h := &http.Client{Transport: transport, Timeout: c.timeout}
	if c.debug {
		h.Transport = tracer{transport, debug}
	}
	api := &client.Client{Endpoint: c.endpoint, Token: c.token, HTTP: h}
	if c.token == "" && (c.authURL != "" || c.cloud != "") || c.endpoint == "" && c.token != "" && c.authURL != "" {
		if err := c.login(ctx, api, transport); err != nil {
			return nil, err
		}
	}
	api.Endpoint = cmp.Or(api.Endpoint, DefaultEndpoint)
	if !strings.Contains(api.Endpoint, "://") {
		api.Endpoint = "http://" + api.Endpoint
	}
	return api, nil
}

// login gets a token from Keystone and, unless there is an endpoint, the API's
// from its catalogue.
func (c *connection) login(ctx context.Context, api *client.Client, transport *http.Transport) error {
	o, where, err := c.credentials(transport)
	if err != nil {
		return err
	}
	provider, err := openstack.NewClient(o.IdentityEndpoint)
	if err != nil {
		return err
	}
	provider.HTTPClient = *api.HTTP
	if err := openstack.Authenticate(ctx, provider, o); err != nil {
		if gophercloud.ResponseCodeIs(err, http.StatusUnauthorized) {
			return fmt.Errorf("log in to Keystone at %s: it refuses; check user, password, project and their domains", o.IdentityEndpoint)
		}
		return fmt.Errorf("log in to Keystone at %s: %w", o.IdentityEndpoint, err)
	}
	api.Token = provider.Token()
	if api.Endpoint != "" {
		return nil
	}
	where.ApplyDefaults("metering")
	where.Region = cmp.Or(c.region, where.Region)
	if c.access != "" {
		where.Availability = gophercloud.Availability(strings.TrimSuffix(c.access, "URL"))
	}
	api.Endpoint, err = provider.EndpointLocator(where)
	if err != nil {
		return fmt.Errorf("the catalogue of Keystone has no %s address of a service of type metering: --endpoint URL or %s names the API", where.Availability, EndpointEnv)
	}
	return nil
}

// credentials are those of clouds.yaml where a cloud is named, with what flags
// say over them.
func (c *connection) credentials(transport *http.Transport) (gophercloud.AuthOptions, gophercloud.EndpointOpts, error) {
	if c.cloud != "" {
		return c.cloudCredentials(transport)
	}
	var where gophercloud.EndpointOpts
	o := gophercloud.AuthOptions{IdentityEndpoint: c.authURL}
	if u, err := url.Parse(c.authURL); err == nil && strings.Trim(u.Path, "/") == "" {
		o.IdentityEndpoint = strings.TrimSuffix(c.authURL, "/") + "/v3"
	}
	switch {
	case c.token != "":
		o.TokenID = c.token
	case c.secret != "":
		o.ApplicationCredentialID, o.ApplicationCredentialName, o.ApplicationCredentialSecret = c.credentialID, c.credentialName, c.secret
		if c.credentialID != "" {
			return o, where, nil
		}
	case c.username == "" && c.userID == "":
		return o, where, errors.New("to log in to Keystone takes a user: --os-username NAME or OS_USERNAME; or log in by --os-cloud or --os-token")
	case c.password == "":
		return o, where, errors.New("to log in to Keystone takes a password: --os-password or, where others cannot see it, OS_PASSWORD")
	default:
		o.Password = c.password
	}
	if c.token == "" {
		if o.UserID = c.userID; o.UserID == "" {
			o.Username, o.DomainID, o.DomainName = c.username, c.userDomainID, c.userDomain
			if o.DomainID == "" {
				o.DomainName = cmp.Or(o.DomainName, "Default")
			}
		}
	}
	if c.secret != "" {
		return o, where, nil
	}
	o.Scope = c.scope()
	return o, where, nil
}

// cloudCredentials reads clouds.yaml. Flags override it, the environment does not:
// it may be that of another cloud.
func (c *connection) cloudCredentials(transport *http.Transport) (gophercloud.AuthOptions, gophercloud.EndpointOpts, error) {
	options := []clouds.ParseOption{clouds.WithCloudName(c.cloud)}
	for _, s := range c.settings() {
		if over := overrides[s.name]; over != nil && *s.value != c.environment[s.name] {
			options = append(options, over(*s.value))
		}
	}
	if c.project != c.environment["os-project-name"] || c.projectID != c.environment["os-project-id"] {
		options = append(options, clouds.WithScope(c.scope()))
	}
	o, where, config, err := clouds.Parse(options...)
	if err != nil {
		return o, where, fmt.Errorf("clouds.yaml: %w", err)
	}
	if config != nil && c.cacert == "" && !c.insecure {
		transport.TLSClientConfig = config
	}
	return o, where, nil
}

// scope is the project to log in to; nil: the user's own. A name that a flag says
// is meant rather than an id that the environment has.
func (c *connection) scope() *gophercloud.AuthScope {
	named := c.project != c.environment["os-project-name"] && c.projectID == c.environment["os-project-id"]
	switch {
	case c.projectID != "" && !named:
		return &gophercloud.AuthScope{ProjectID: c.projectID}
	case c.project != "" && c.projectDomainID != "":
		return &gophercloud.AuthScope{ProjectName: c.project, DomainID: c.projectDomainID}
	case c.project != "":
		return &gophercloud.AuthScope{ProjectName: c.project, DomainName: cmp.Or(c.projectDomain, "Default")}
	}
	return nil
}

func (c *connection) tls() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: c.insecure} //nolint:gosec // asked for
	if c.cacert != "" {
		pem, err := os.ReadFile(c.cacert)
		if err != nil {
			return nil, fmt.Errorf("--os-cacert: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--os-cacert: %s has no certificate", c.cacert)
		}
	}
	if c.cert != "" {
		pair, err := tls.LoadX509KeyPair(c.cert, cmp.Or(c.key, c.cert))
		if err != nil {
			return nil, fmt.Errorf("--os-cert: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// tracer prints requests and answers.
type tracer struct {
	http.RoundTripper
	w io.Writer
}

// secrets are what a trace must not have: the first group stays.
var secrets = regexp.MustCompile(`(?i)((?:X-Auth-Token|X-Subject-Token|Authorization|Set-Cookie): |"(?:password|secret)": ?"|"token": ?\{"id": ?")[^\r\n"]*`)

// RoundTrip implements [http.RoundTripper].
func (t tracer) RoundTrip(r *http.Request) (*http.Response, error) {
	if b, err := httputil.DumpRequestOut(r, true); err == nil {
		t.print("> ", b)
	}
	resp, err := t.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if b, err := httputil.DumpResponse(resp, true); err == nil {
		t.print("< ", b)
	}
	return resp, nil
}

func (t tracer) print(mark string, text []byte) {
	text = secrets.ReplaceAll(text, []byte("${1}***"))
	for line := range strings.Lines(string(text)) {
		fmt.Fprintln(t.w, mark+printable(strings.TrimRight(line, "\r\n")))
	}
}

// explain says what to do where the API could not be reached.
func explain(err error, address string) error {
	var unreachable *url.Error
	if !errors.As(err, &unreachable) {
		if denied := (*client.Error)(nil); errors.As(err, &denied) && denied.Status == http.StatusUnauthorized && strings.Contains(denied.Text, "authentication") {
			return fmt.Errorf("%w: log in by --os-token, --os-cloud or OS_* variables; see `kvmeter help openstack`", err)
		}
		return err
	}
	if errors.Is(err, context.Canceled) {
		return context.Canceled
	}
	return fmt.Errorf("cannot reach kvmeter's API at %s (%s): is `kvmeter up` or `kvmeter central` running? --endpoint or %s names another address", address, reason(unreachable.Err), EndpointEnv)
}

// reason returns the system's own words for an error where there are any.
func reason(err error) string {
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// openStackHelp is the help topic about finding the API and logging in.
func openStackHelp() *cobra.Command {
	var b strings.Builder
	b.WriteString(`Commands that ask the API find it, and say who asks, by flags or environment variables:

  without any             ` + DefaultEndpoint + `, no token
  an endpoint, a token    that API with that token; Keystone is not asked
  a cloud of clouds.yaml  log in to its Keystone, and take the API from its catalogue
  a Keystone, a user      the same (an openrc file sets the variables)

Flags may stand before the command too. Each has environment variables:

`)
	for _, s := range (&connection{}).settings() {
		_, usage := pflag.UnquoteUsage(&pflag.Flag{Name: s.name, Usage: s.usage, Value: nil})
		fmt.Fprintf(&b, "  --%-34s %s\n  %38s%s\n", s.name, strings.Join(s.variables, ", "), "", usage)
	}
	b.WriteString(`  --os-insecure                        OS_INSECURE
                                      believe servers whose certificate nobody vouches for

The API's service type in Keystone's catalogue is metering:

  openstack service create --name kvmeter metering
  openstack endpoint create --region RegionOne metering public http://kvmeter.example:8777
`)
	return &cobra.Command{Use: "openstack", Short: "How commands find the API and log in", Long: b.String()}
}
