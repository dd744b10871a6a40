// Package api serves the Telemetry API v2 over a store: meters, samples,
// resources, statistics, events and gaps. Requests and answers are those of OpenStack
// Telemetry (Ceilometer); what kvmeter adds is asked for by parameters of its
// own and never appears otherwise.
package api

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// Options are the settings of [New]. The zero Options serve without
// authentication.
type Options struct {
	Log *zap.Logger // nil: no log
	// Authenticate says who asks; nil: [NoAuth].
	Authenticate Authenticator
	// Rate is how many requests a second each user in each project may send, and
	// each address of which nobody knows who asks; 0: no bound.
	Rate float64
	// Patience is how long the store may take for each part of an answer; 0: as
	// long as it takes.
	Patience time.Duration
	// Proxies are those whose X-Forwarded-For says where a request comes from.
	Proxies []netip.Prefix
	// Audit is where each request is noted, and who sent it; nil: nowhere.
	Audit *zap.Logger
	// Policy says what they may; nil: the rules that kvmeter brings.
	Policy *Policy
	// DefaultLimit is how many entries a list has where the request names no
	// limit; 0: 100.
	DefaultLimit int
	// MaxLimit bounds the limit of a request; 0: no bound.
	MaxLimit int
	// AllowedOrigins are the origins whose pages may use the API in a browser;
	// "*": all.
	AllowedOrigins []string
	// Prefix is a path such as /telemetry below which the API is too, for
	// proxies that pass it on; empty: only at /.
	Prefix string
	// SampleSource is the source of samples sent to the API that name none;
	// empty: openstack.
	SampleSource string
	// Publish hands a batch of samples sent to the API to the pipelines. It
	// returns once they are safe. nil: only what is to be stored directly is
	// taken.
	Publish func(context.Context, *sample.Batch) error
	// Clock says when a sample is that does not; nil: time.Now.
	Clock func() time.Time
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
	if o.Policy == nil {
		o.Policy = &Policy{}
	}
	if o.DefaultLimit == 0 {
		o.DefaultLimit = 100
	}
	if o.SampleSource == "" {
		o.SampleSource = "openstack"
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	o.Prefix = strings.TrimSuffix(o.Prefix, "/")
	return &server{store: s, opts: o, rates: newRates(o.Rate), transfer: time.Minute}
}

type server struct {
	store store.Store
	opts  Options
	rates *rates
	// transfer is how long a request's body may take to come, and a part of the
	// answer to be taken.
	transfer time.Duration
}

// request is a request on its way to an endpoint.
type request struct {
	*http.Request
	caller *caller
	names  [2]string // what the path names: a meter, a sample, an event type and a trait of it, …
}

// endpoint answers a request, or returns an error and has written nothing.
type endpoint func(s *server, r *request, out *output) error

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn := http.NewResponseController(w)
	_ = conn.SetWriteDeadline(time.Time{}) // of the request before; as it could be set
	w.Header().Set("X-Openstack-Request-Id", "req-"+uuid.NewString())
	if s.crossOrigin(w.Header(), r) {
		return
	}
	if r.ContentLength != 0 {
		timeBody(conn, r, s.transfer)
	}
	who := &caller{}
	if s.opts.Audit != nil {
		noted, begin := &recorder{ResponseWriter: w}, time.Now()
		w = noted
		defer func() { audit(s.opts.Audit, r, s.address(r), &who.Identity, noted, time.Since(begin)) }()
	}
	out := &output{w: w, conn: conn, within: s.transfer, kind: "application/json; charset=UTF-8", status: http.StatusOK}
	err := s.serve(r, who, out)
	if err == nil {
		err = out.finish()
	}
	switch {
	case err == nil:
	case r.Context().Err() != nil && !errors.As(err, new(*fault)):
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

func (s *server) serve(r *http.Request, who *caller, out *output) error {
	_, path := s.mounted(r)
	target, names, err := route(path)
	if err != nil {
		return err
	}
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	op, ok := target[method]
	if len(target) == 0 {
		return &fault{status: http.StatusMethodNotAllowed, text: "A meter has statistics and nothing else below it.", header: [2]string{"Allow"}}
	}
	if !ok {
		return &fault{
			status: http.StatusMethodNotAllowed, header: [2]string{"Allow", strings.Join(slices.Sorted(maps.Keys(target)), ", ")},
			text: "The method " + r.Method + " is not allowed for this resource.",
		}
	}
	if !acceptsJSON(r.Header.Values("Accept")) {
		return &fault{status: http.StatusNotAcceptable, text: "The only media type of this API is application/json."}
	}
	if op.rule != open {
		if err := s.admit(r, op.rule, who); err != nil {
			return err
		}
	}
	answer := func(r *http.Request) error { return op.serve(s, &request{Request: r, caller: who, names: names}, out) }
	if op.writes {
		return answer(r) // what is being stored is waited for
	}
	return s.patiently(r, out, answer)
}

var errSlow = &fault{status: http.StatusServiceUnavailable, text: "The answer takes too long: ask for less time, or narrow the query."}

// patiently gives up where nothing of an answer came for too long.
func (s *server) patiently(r *http.Request, out *output, answer func(*http.Request) error) error {
	if s.opts.Patience == 0 {
		return answer(r)
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	timer := time.AfterFunc(s.opts.Patience, func() { cancel(errSlow) })
	defer timer.Stop()
	out.sent = func() { timer.Reset(s.opts.Patience) }
	err := answer(r.WithContext(ctx))
	if err != nil && errors.Is(context.Cause(ctx), errSlow) {
		return errSlow
	}
	return err
}

// admit finds out who asks, and whether the policy's rule allows them to.
func (s *server) admit(r *http.Request, rule string, who *caller) error {
	from := s.address(r)
	if err := s.rates.mayFail(from); err != nil {
		return err
	}
	id, err := s.opts.Authenticate(r)
	if err != nil {
		return cmp.Or(s.rates.take(from), err)
	}
	*who = caller{Identity: id, all: s.opts.Policy.seesAll(&id)}
	key := id.Project + " " + id.User
	if key == " " {
		key = from
	}
	if err := s.rates.take(key); err != nil {
		return err
	}
	if rule != anyone && !s.opts.Policy.allows(rule, &id) {
		return errForbidden
	}
	return nil
}

// operation is what one method does on a path, and the policy's rule that
// allows it.
type operation struct {
	rule   string
	serve  endpoint
	writes bool // it stores something
}

// open is the rule of operations that need no identity.
const open = ""

// methods are the operations on a path.
type methods map[string]operation

func getting(rule string, serve endpoint) methods {
	return methods{http.MethodGet: {rule, serve, false}}
}

func storing(rule string, serve endpoint) methods {
	return methods{http.MethodPost: {rule, serve, true}}
}

// paths are the paths of the API; {} stands for any name.
var paths = map[string]methods{
	"":                            getting(open, (*server).version),
	"v2/openapi.json":             getting(open, (*server).describe),
	"healthcheck":                 getting(open, (*server).healthcheck),
	"v2/capabilities":             getting(open, (*server).capabilities),
	"v2/meters":                   getting("get_meters", (*server).meters),
	"v2/meters/{}":                {http.MethodGet: {"get_samples", (*server).oldSamples, false}, http.MethodPost: {"create_samples", (*server).createSamples, true}},
	"v2/meters/{}/statistics":     getting("compute_statistics", (*server).statistics),
	"v2/samples":                  getting("get_samples", (*server).samples),
	"v2/samples/{}":               getting("get_sample", (*server).sample),
	"v2/resources":                getting("get_resources", (*server).resources),
	"v2/resources/{}":             getting("get_resource", (*server).resource),
	"v2/gaps":                     getting("get_gaps", (*server).gaps),
	"v2/usage":                    getting("get_usage", (*server).usage),
	"v2/query/samples":            {http.MethodPost: {"query_sample", (*server).querySamples, false}},
	"v2/events":                   getting("events:index", (*server).events),
	"v2/events/{}":                getting("events:show", (*server).event),
	"v2/event_types":              getting(anyone, (*server).eventTypes),
	"v2/event_types/{}":           getting(anyone, (*server).eventType),
	"v2/event_types/{}/traits":    getting(anyone, (*server).traitDescriptions),
	"v2/event_types/{}/traits/{}": getting(anyone, (*server).traits),
	"v2/ingest/samples":           storing("ingest", (*server).ingestSamples),
	"v2/ingest/events":            storing("ingest", (*server).ingestEvents),
}

var errNoRoute = &fault{status: http.StatusNotFound, text: "The resource could not be found."}

// route finds the operations of an escaped path and the names in it. It works
// on the escaped path, so that an id may hold slashes: "a%2Fb" and "a%252Fb" are
// both a/b.
func route(path string) (methods, [2]string, error) {
	var names [2]string
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(parts) > 2 && parts[len(parts)-1] == "" {
		parts = parts[:len(parts)-1]
	}
	if len(parts) > 5 {
		return nil, names, errNoRoute
	}
	for i := 2; i < len(parts); i += 2 {
		if parts[1] == "query" || parts[1] == "ingest" {
			break
		}
		var err error
		if names[i/2-1], err = unescapeID(parts[i]); err != nil {
			return nil, names, err
		}
		parts[i] = "{}"
	}
	if found, ok := paths[strings.Join(parts, "/")]; ok {
		return found, names, nil
	}
	if len(parts) == 4 && parts[0] == "v2" && parts[1] == "meters" {
		return methods{}, names, nil // as the original has it: nothing is allowed there
	}
	return nil, names, errNoRoute
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

// mounted splits the escaped path of a request into the API's prefix, if it has
// it, and what follows.
func (s *server) mounted(r *http.Request) (prefix, path string) {
	path = r.URL.EscapedPath()
	if below, ok := strings.CutPrefix(path, s.opts.Prefix); ok && (below == "" || below[0] == '/') {
		return s.opts.Prefix, below
	}
	return "", path
}

// root returns the address that the client reached the API by, without a
// slash at its end.
func (s *server) root(r *http.Request) string {
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
	mount, _ := s.mounted(r)
	return proto + "://" + host + prefix + mount
}

// fault is an error that the client is told of.
type fault struct {
	status int
	text   string
	header [2]string // one more header of the answer: name and value
}

// Unauthenticated is the error of an [Authenticator] that does not know who
// asks. The challenge tells the client how to say so.
func Unauthenticated(challenge string) error {
	return &fault{status: http.StatusUnauthorized, text: "The request you have made requires authentication.", header: [2]string{"WWW-Authenticate", challenge}}
}

// Unavailable is the error of an [Authenticator] that cannot know now who asks.
func Unavailable(text string) error {
	return &fault{status: http.StatusServiceUnavailable, text: text}
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
	if f.header[0] != "" {
		w.Header().Set(f.header[0], f.header[1])
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
	conn    *http.ResponseController
	within  time.Duration // how long the client may take for a part
	sent    func()        // is called after each part; nil: nobody wants to know
	kind    string        // content type
	status  int
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
		if o.status != http.StatusNoContent {
			o.w.Header().Set("Content-Type", o.kind)
		}
		o.w.WriteHeader(o.status)
		o.started = true
	}
	if len(o.buf) == 0 {
		return nil
	}
	_ = o.conn.SetWriteDeadline(time.Now().Add(o.within)) // as it could be set
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	if o.sent != nil {
		o.sent()
	}
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
