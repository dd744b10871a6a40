package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/agent/client"
)

// ErrInUse is returned where another agent already meters the host.
var ErrInUse = errors.New("another agent answers on the socket")

// minWatch bounds how often a snapshot may be asked for.
const minWatch = 100 * time.Millisecond

// server answers on the local socket.
type server struct {
	listener net.Listener
	http     http.Server
	stop     context.CancelFunc
}

// listen opens the local socket.
func (a *Agent) listen() (*server, error) {
	path := a.cfg.Socket
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%w %s: stop it, or give this one another socket", ErrInUse, path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, unusable(err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, unusable(err)
	}
	// From the start nobody else may connect.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, unusable(err)
	}
	if err := share(path, a.cfg.SocketGroup); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("open the local socket to its group: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/domains", a.serveDomains)
	mux.HandleFunc("GET /v1/hooks", a.serveHooks)
	mux.HandleFunc("PUT /v1/hooks/{name}", a.switchHook)
	mux.HandleFunc("GET /v1/crosscheck", a.serveCrosscheck)
	mux.HandleFunc("POST /v1/crosscheck", a.serveCrosscheck)
	return &server{
		listener: l, stop: stop,
		http: http.Server{
			Handler: mux, ReadHeaderTimeout: 5 * time.Second,
			BaseContext: func(net.Listener) context.Context { return ctx },
		},
	}, nil
}

// unusable explains why there can be no local socket, and the way out.
func unusable(err error) error {
	return fmt.Errorf("open the local socket, which kvmeter top reads: %w: make its folder writable for this user, or choose another path of at most 107 bytes with the setting socket (empty: none)", err)
}

// share lets the group, if it exists and we may, use the socket.
func share(path, group string) error {
	if g, err := user.LookupGroup(group); err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil {
			if err := os.Chown(path, -1, gid); err != nil && !errors.Is(err, os.ErrPermission) {
				return err
			}
		}
	}
	return os.Chmod(path, 0o660)
}

func (s *server) serve(log *zap.Logger) {
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		log.Error("the local socket failed", zap.Error(err))
	}
}

// close ends all streams and removes the socket.
func (s *server) close() {
	s.stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
}

// serveDomains answers GET /v1/domains?watch=1s: one JSON document a line.
func (a *Agent) serveDomains(w http.ResponseWriter, r *http.Request) {
	interval := time.Duration(0)
	if text := r.URL.Query().Get("watch"); text != "" {
		var err error
		if interval, err = time.ParseDuration(text); err != nil || interval < minWatch {
			http.Error(w, fmt.Sprintf("watch=%q is not a duration of at least %s", text, minWatch), http.StatusBadRequest)
			return
		}
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	// An error means that the reader is gone.
	_ = a.watchEach(r.Context(), interval, func(s client.Snapshot) error {
		if err := rc.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		if err := enc.Encode(s); err != nil {
			return err
		}
		return rc.Flush()
	})
}

// serveHooks answers GET /v1/hooks: a list of [client.Hook].
func (a *Agent) serveHooks(w http.ResponseWriter, _ *http.Request) {
	a.mu.Lock()
	list := a.hooks.list
	all := make([]client.Hook, 0, len(list))
	for _, h := range list {
		all = append(all, h.tell())
	}
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(all) // an error means that the reader is gone
}

// switchHook answers PUT /v1/hooks/NAME?on=true. It needs no body.
func (a *Agent) switchHook(w http.ResponseWriter, r *http.Request) {
	on, err := strconv.ParseBool(r.URL.Query().Get("on"))
	if err != nil {
		http.Error(w, "say on=true or on=false", http.StatusBadRequest)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.hooks.find(r.PathValue("name"))
	if h == nil {
		http.Error(w, fmt.Sprintf("this agent has no hook %q: see what it noted at start", r.PathValue("name")), http.StatusNotFound)
		return
	}
	if err := a.hooks.turn(h, on); err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
