// Package api serves the Telemetry API v2 over a store: meters, samples,
// resources, statistics and gaps. Requests and answers are those of OpenStack
// Telemetry (Ceilometer); what kvmeter adds is asked for by parameters of its
// own and never appears otherwise.
package api

import (
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
)

// Options are the settings of [New]. The zero Options serve without
// authentication.
type Options struct {
	Log *zap.Logger // nil: no log
	// Authenticate says who asks; nil: [NoAuth].
	Authenticate Authenticator
	// DefaultLimit is how many entries a list has where the request names no
	// limit; 0: 100.
	DefaultLimit int
	// MaxLimit bounds the limit of a request; 0: no bound.
	MaxLimit int
}

// New returns the handler of the API. Its answers end when the client goes
// away: the store sees the request's context.
func New(s store.Store, o Options) http.Handler {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Authenticate == nil {
		o.Authenticate = NoAuth
	}
	if o.DefaultLimit == 0 {
		o.DefaultLimit = 100
	}
	return &server{store: s, opts: o}
}

type server struct {
	store store.Store
	opts  Options
}

// request is a request on its way to an endpoint.
type request struct {
	*http.Request
	identity Identity
	name     string // what the path names: a meter, a sample or a resource
}

// endpoint answers a request, or returns an error and has written nothing.
type endpoint func(s *server, r *request, out *output) error

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Openstack-Request-Id", "req-"+uuid.NewString())
	out := &output{w: w, kind: "application/json; charset=UTF-8"}
	err := s.serve(r, out)
	if err == nil {
		err = out.finish()
	}
	switch {
	case err == nil:
	case r.Context().Err() != nil:
		s.opts.Log.Debug("client went away", zap.String("path", r.URL.Path), zap.Error(err))
	case out.started:
		// The status is sent; a broken connection tells the client that the
		// answer is not whole.
		s.opts.Log.Error("answer cut short", zap.String("path", r.URL.Path), zap.Error(err))
		panic(http.ErrAbortHandler)
	default:
		s.fail(w, r, err)
	}
}

func (s *server) serve(r *http.Request, out *output) error {
	target, name, err := route(r.URL.EscapedPath())
	if err != nil {
		return err
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &fault{status: http.StatusMethodNotAllowed, allow: "GET", text: "The method " + r.Method + " is not allowed for this resource."}
	}
	if !acceptsJSON(r.Header.Values("Accept")) {
		return &fault{status: http.StatusNotAcceptable, text: "The only media type of this API is application/json."}
	}
	req := &request{Request: r, name: name}
	if !target.open {
		if req.identity, err = s.opts.Authenticate(r); err != nil {
			return err
		}
	}
	return target.serve(s, req, out)
}

// target is what a path leads to; open ones need no identity.
type target struct {
	serve endpoint
	open  bool
}

// collections are the endpoints below /v2: of the collection, and of one name
// in it.
var collections = map[string][2]endpoint{
	"meters":       {(*server).meters, (*server).oldSamples},
	"samples":      {(*server).samples, (*server).sample},
	"resources":    {(*server).resources, (*server).resource},
	"gaps":         {(*server).gaps},
	"capabilities": {(*server).capabilities},
}

var errNoRoute = &fault{status: http.StatusNotFound, text: "The resource could not be found."}

// route finds the endpoint of an escaped path and the name in it. It works on
// the escaped path, so that an id may hold slashes: "a%2Fb" and "a%252Fb" are
// both a/b.
func route(path string) (target, string, error) {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(parts) > 2 && parts[len(parts)-1] == "" {
		parts = parts[:len(parts)-1]
	}
	if len(parts) == 1 && parts[0] == "" {
		return target{serve: (*server).version, open: true}, "", nil
	}
	if len(parts) == 1 && parts[0] == "healthcheck" {
		return target{serve: (*server).healthcheck, open: true}, "", nil
	}
	if len(parts) < 2 || len(parts) > 4 || parts[0] != "v2" {
		return target{}, "", errNoRoute
	}
	name := ""
	if len(parts) > 2 {
		var err error
		if name, err = unescapeID(parts[2]); err != nil {
			return target{}, "", err
		}
	}
	if len(parts) == 4 {
		if parts[1] != "meters" {
			return target{}, "", errNoRoute
		}
		if parts[3] != "statistics" {
			return target{}, "", &fault{status: http.StatusMethodNotAllowed, text: "A meter has statistics and nothing else below it."}
		}
		return target{serve: (*server).statistics}, name, nil
	}
	e := collections[parts[1]][len(parts)-2]
	if e == nil {
		return target{}, "", errNoRoute
	}
	return target{serve: e, open: parts[1] == "capabilities"}, name, nil
}

// unescapeID decodes a path element once, and once more where that leaves an
// escaped slash.
func unescapeID(s string) (string, error) {
	id, err := url.PathUnescape(s)
	if err == nil && strings.Contains(strings.ToLower(id), "%2f") {
		id, err = url.PathUnescape(id)
	}
	if err != nil {
		return "", badRequest("The path is not escaped as it must be: %v", err)
	}
	return id, nil
}

// acceptsJSON reports whether the values of the Accept header admit JSON.
func acceptsJSON(accept []string) bool {
	none := true
	for _, part := range strings.Split(strings.Join(accept, ","), ",") {
		kind, params, _ := strings.Cut(part, ";")
		kind = strings.ToLower(strings.TrimSpace(kind))
		if kind == "" {
			continue
		}
		none = false
		if kind != "*/*" && kind != "application/*" && kind != "application/json" {
			continue
		}
		if q := strings.ReplaceAll(strings.ToLower(params), " ", ""); q != "q=0" && q != "q=0.0" {
			return true
		}
	}
	return none
}

// root returns the address that the client reached the API by, without a
// slash at its end.
func root(r *http.Request) string {
	first := func(name string) string {
		v, _, _ := strings.Cut(r.Header.Get(name), ",")
		return strings.TrimSpace(v)
	}
	proto, host := first("X-Forwarded-Proto"), first("X-Forwarded-Host")
	if proto == "" {
		proto = "http"
		if r.TLS != nil {
			proto = "https"
		}
	}
	if host == "" {
		host = r.Host
	}
	prefix := strings.Trim(first("X-Forwarded-Prefix"), "/")
	if prefix != "" {
		prefix = "/" + prefix
	}
	return proto + "://" + host + prefix
}

// fault is an error that the client is told of.
type fault struct {
	status int
	text   string
	allow  string // the Allow header of a 405
}

func (f *fault) Error() string { return f.text }

// fail answers with an error object. What is no fault is the server's own
// trouble: the client learns no more than that, the log has the rest.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	var f *fault
	if !errors.As(err, &f) {
		s.opts.Log.Error("request failed", zap.String("path", r.URL.Path), zap.Error(err))
		f = &fault{status: http.StatusInternalServerError, text: "The store could not answer; central's log has the reason."}
	}
	code := "Client"
	if f.status >= 500 {
		code = "Server"
	}
	b := append([]byte(`{"error_message": {"faultcode": "`), code...)
	b = append(b, `", "faultstring": `...)
	b = appendString(b, f.text)
	b = append(b, `, "debuginfo": null}}`...)
	w.Header().Set("Content-Type", "application/json")
	if f.status == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", f.allow)
	}
	w.WriteHeader(f.status)
	if _, err := w.Write(b); err != nil {
		s.opts.Log.Debug("error not delivered", zap.String("path", r.URL.Path), zap.Error(err))
	}
}

// spillAt is how many bytes of an answer are kept before it is sent on.
const spillAt = 64 << 10

// output collects an answer. Until the first spill the endpoint may still
// return an error.
type output struct {
	w       http.ResponseWriter
	kind    string // content type
	buf     []byte
	started bool
}

// spill sends what is collected once it is large.
func (o *output) spill() error {
	if len(o.buf) < spillAt {
		return nil
	}
	return o.finish()
}

func (o *output) finish() error {
	if !o.started {
		o.w.Header().Set("Content-Type", o.kind)
		o.started = true
	}
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}

// CheckListen refuses an address that others can reach, unless requests are
// authenticated. addr is host:port as net.Listen takes it.
func CheckListen(addr string, authenticated bool) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return errors.New("listen address " + addr + " is not host:port, such as 127.0.0.1:8777")
	}
	if ip := net.ParseIP(host); authenticated || host == "localhost" || ip != nil && ip.IsLoopback() {
		return nil
	}
	return errors.New("refusing to serve the API on " + addr + " without authentication: anybody who reaches it could read every project's samples; listen on 127.0.0.1 or configure authentication")
}
