// Package daemon is what kvmeter's programs have in common when they run as a
// service: the log, signals, the metrics page, the flags about configuration.
package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/cmd/internal/config"
)

// Flags are the flags every daemon takes.
type Flags struct {
	Config    string // path; empty: the default one, if it is there
	Check     bool   // print the configuration and end
	LogLevel  string
	LogFormat string
	origins   config.Origins
}

// Register adds the flags to fs. The file is the daemon's, in the folder of
// configuration.
func (f *Flags) Register(fs *pflag.FlagSet, file string) {
	f.RegisterConfig(fs, file)
	fs.BoolVar(&f.Check, "check-config", false, "load the configuration, print it whole with where each value is from, and end")
	f.RegisterLog(fs)
}

// RegisterConfig adds the flag of the configuration file alone.
func (f *Flags) RegisterConfig(fs *pflag.FlagSet, file string) {
	fs.StringVar(&f.Config, "config", "", "configuration file (default "+file+", if it is there)")
}

// RegisterLog adds the flags about the log alone.
func (f *Flags) RegisterLog(fs *pflag.FlagSet) {
	fs.StringVar(&f.LogLevel, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&f.LogFormat, "log-format", "console", "console or json")
}

// FlagError says where the flags of a command are listed.
func FlagError(c *cobra.Command, err error) error {
	return fmt.Errorf("%w (%s --help lists the flags)", err, c.CommandPath())
}

// Load fills cfg from the file and the environment. The file of the flag must
// be there, the default one need not.
func (f *Flags) Load(file string, cfg any) error {
	path := f.Config
	if path == "" {
		found, err := config.Find(file)
		if err != nil {
			return fmt.Errorf("look for the configuration: %w; name its file with --config, or set HOME to a folder of this user", err)
		}
		path = found
	}
	f.Config = path
	var err error
	f.origins, err = config.Load(path, os.Environ(), cfg)
	return err
}

// Print prints the configuration that was loaded.
func (f *Flags) Print(w io.Writer, cfg any) error { return config.Print(w, cfg, f.origins) }

// Logger returns the log, on standard error. Repeats of a message within a
// second are sampled.
func (f *Flags) Logger() (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(f.LogLevel)
	if err != nil {
		return nil, fmt.Errorf("--log-level %q: it is debug, info, warn or error", f.LogLevel)
	}
	c := zap.NewProductionConfig()
	c.Level = zap.NewAtomicLevelAt(level)
	c.DisableCaller, c.DisableStacktrace = true, true
	c.EncoderConfig.TimeKey = "time"
	c.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	switch f.LogFormat {
	case "json":
	case "console":
		c.Encoding = "console"
		c.EncoderConfig.EncodeLevel = zapcore.CapitalLevelEncoder
	default:
		return nil, fmt.Errorf("--log-format %q: it is console or json", f.LogFormat)
	}
	return c.Build()
}

// Context returns a context that ends with SIGINT or SIGTERM. A second signal
// ends the program at once.
func Context(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := signal.NotifyContext(parent, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, cancel) // gives the signals back their usual effect
	return ctx, cancel
}

// OnHangup calls reload with each SIGHUP, until ctx ends. What it returns is
// logged: everything goes on as it was.
func OnHangup(ctx context.Context, log *zap.Logger, reload func() error) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP)
	defer signal.Stop(signals)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-signals:
			if err := reload(); err != nil && ctx.Err() == nil {
				log.Error("configuration not reloaded; the one before stays in use", zap.Error(err))
			}
		}
	}
}

// Registry returns a metrics registry with the process's own figures.
func Registry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Page is an HTTP page: its port is open, so that nothing needs to start where
// the port is taken, and it answers while it is served. The nil Page is one that
// is off.
type Page struct {
	listener net.Listener
	handler  http.Handler
	web      string // file with TLS and users, in Prometheus' form; empty: neither
}

// CheckMetrics returns an error unless a page /metrics could be opened at addr
// with the settings in the file.
func CheckMetrics(addr, file string) error {
	if addr == "" {
		return nil
	}
	if err := CheckAddress("metrics", addr); err != nil {
		return err
	}
	return CheckWebConfig("metrics_web_config", file)
}

// CheckWebConfig returns an error unless the file has TLS and users in the form of
// Prometheus' exporters, or there is none. setting names it.
func CheckWebConfig(setting, file string) error {
	if err := web.Validate(file); err != nil {
		return fmt.Errorf("%s: %s: %w", setting, file, err)
	}
	return nil
}

// Metrics opens the port of the page /metrics, of the registry's figures. The
// file has TLS and users for it in the form of Prometheus' exporters; empty:
// neither. An empty addr returns nil.
func Metrics(addr, file string, r *prometheus.Registry) (*Page, error) {
	if addr == "" {
		return nil, nil
	}
	if err := CheckMetrics(addr, file); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{}))
	p, err := Open("the metrics page", "metrics", addr, mux)
	if err == nil {
		p.UseWebConfig(file)
	}
	return p, err
}

// Open opens the TCP port of a page. What the page is and the setting that holds
// its address go into the error.
func Open(what, setting, addr string, h http.Handler) (*Page, error) {
	if err := CheckAddress(setting, addr); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s cannot listen on %s: another program does; end it, or set %s to another address", what, addr, setting)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%s cannot listen on %s: this host has no such address; set %s to one that it has", what, addr, setting)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("%s cannot listen on %s: ports below 1024 need root or CAP_NET_BIND_SERVICE; set %s to a higher one", what, addr, setting)
	case err != nil:
		return nil, fmt.Errorf("%s cannot listen on %s: %w (setting: %s)", what, addr, err, setting)
	}
	return &Page{listener: l, handler: h}, nil
}

// UseWebConfig has the page answer with TLS, and to users, as a file in the form
// of Prometheus' exporters says; empty: neither. It is read again when it changes.
func (p *Page) UseWebConfig(file string) { p.web = file }

// UseTLS has the page answer over TLS, with a certificate and its key in files.
func (p *Page) UseTLS(cert, key string) error {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return err
	}
	p.listener = tls.NewListener(p.listener, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12})
	return nil
}

// CheckAddress returns an error unless addr is host:port.
func CheckAddress(setting, addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("%s: %q is not host:port, such as 127.0.0.1:8777", setting, addr)
	}
	return nil
}

// URL returns the page's address.
func (p *Page) URL() string { return "http://" + p.listener.Addr().String() }

// Close closes the port of a page that is not served.
func (p *Page) Close() {
	if p != nil {
		_ = p.listener.Close()
	}
}

// Serve answers until ctx ends, then lets requests finish for a moment.
func (p *Page) Serve(ctx context.Context) error {
	if p == nil {
		return nil
	}
	s := &http.Server{Handler: p.handler, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	var g errgroup.Group
	done := make(chan struct{})
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case <-done:
			return nil
		}
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := s.Shutdown(end); err != nil {
			return s.Close()
		}
		return nil
	})
	// The file is read again for each request, so that certificates and users may
	// change; its log has nothing to say that is not said here.
	err := web.Serve(p.listener, s, &web.FlagConfig{WebConfigFile: &p.web}, slog.New(slog.DiscardHandler))
	close(done)
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", p.URL(), err)
	}
	return g.Wait()
}

// Dirs are the folders of the user that runs the program.
func Dirs() config.Dirs { return config.UserDirs(os.Getuid(), os.Getenv) }

// File returns the path of a daemon's configuration file.
func File(name string) string { return filepath.Join(Dirs().Config, name) }

// Version is that of the module, or of the commit that was built.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}
