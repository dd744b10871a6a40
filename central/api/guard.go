package api

import (
	"cmp"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// rates bounds how often each caller may ask: a user in a project, or, where it
// is not known who asks, an address. It forgets those that were not seen for
// longest.
type rates struct {
	limit   rate.Limit
	burst   int
	callers *lru.Cache[string, *rate.Limiter]
}

// maxCallers bounds the memory of rates.
const maxCallers = 10_000

// newRates returns a bound of so many requests a second, of which two seconds'
// may come at once; nil: no bound.
func newRates(perSecond float64) *rates {
	if perSecond <= 0 {
		return nil
	}
	callers, err := lru.New[string, *rate.Limiter](maxCallers)
	if err != nil {
		panic(err) // of a constant
	}
	return &rates{limit: rate.Limit(perSecond), burst: max(1, int(2*perSecond)), callers: callers}
}

func (l *rates) of(key string) *rate.Limiter {
	fresh := rate.NewLimiter(l.limit, l.burst)
	if old, ok, _ := l.callers.PeekOrAdd(key, fresh); ok {
		l.callers.Get(key) // it was seen
		return old
	}
	return fresh
}

// take counts a request of a caller, and refuses it where there were too many.
func (l *rates) take(key string) error {
	if l == nil {
		return nil
	}
	r := l.of(key).Reserve()
	wait := r.Delay()
	if wait == 0 {
		return nil
	}
	r.Cancel()
	return tooMany(wait)
}

// mayFail refuses the requests of an address from which too many came of which
// nobody knows who asked.
func (l *rates) mayFail(from string) error {
	if l == nil {
		return nil
	}
	if left := l.of(from).Tokens(); left < 1 {
		return tooMany(time.Duration((1 - left) / float64(l.limit) * float64(time.Second)))
	}
	return nil
}

func tooMany(wait time.Duration) error {
	return &fault{
		status: http.StatusTooManyRequests, text: "Too many requests; try again later.",
		header: [2]string{"Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds())))},
	}
}

// address is where a request comes from: the peer of the connection or, where that
// is a proxy that is trusted to say so, what it forwards.
func (s *server) address(r *http.Request) string {
	from := r.RemoteAddr
	if host, _, err := net.SplitHostPort(from); err == nil {
		from = host
	}
	// Each proxy adds its peer at the end; what stands before that of one that is
	// not trusted anybody may have written.
	forwarded := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(forwarded) - 1; i >= 0 && s.trusts(from); i-- {
		from = cmp.Or(strings.TrimSpace(forwarded[i]), from)
	}
	return from
}

// trusts reports whether an address is of a proxy that is trusted.
func (s *server) trusts(from string) bool {
	addr, err := netip.ParseAddr(from)
	return err == nil && slices.ContainsFunc(s.opts.Proxies, func(p netip.Prefix) bool { return p.Contains(addr.Unmap().WithZone("")) })
}

// timedBody is a request's body that must have come by a time.
type timedBody struct {
	io.ReadCloser
	conn *http.ResponseController
}

// timeBody ends the connection of a client whose body takes longer to come, read
// or not. Where there is no connection there is nothing to bound.
func timeBody(conn *http.ResponseController, r *http.Request, within time.Duration) {
	if conn.SetReadDeadline(time.Now().Add(within)) == nil {
		r.Body = &timedBody{r.Body, conn}
	}
}

// Read implements [io.Reader]. The answer may take as long as it must.
func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		_ = b.conn.SetReadDeadline(time.Time{}) // as it could be set
	}
	return n, err
}

// recorder notes what is answered.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int
}

func (w *recorder) WriteHeader(status int) {
	w.status = cmp.Or(w.status, status)
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(b []byte) (int, error) {
	w.status = cmp.Or(w.status, http.StatusOK)
	n, err := w.ResponseWriter.Write(b)
	w.bytes += n
	return n, err
}

// audit writes who asked what, and what came of it. Tokens are not in it.
func audit(log *zap.Logger, r *http.Request, from string, id *Identity, w *recorder, took time.Duration) {
	log.Info("request",
		zap.String("id", w.Header().Get("X-Openstack-Request-Id")),
		zap.String("from", from),
		zap.String("user", id.User), zap.String("project", id.Project), zap.Strings("roles", id.Roles),
		zap.String("method", r.Method), zap.String("path", r.URL.Path), zap.String("query", r.URL.RawQuery),
		zap.Int("status", w.status), zap.Int("bytes", w.bytes), zap.Duration("took", took),
	)
}
