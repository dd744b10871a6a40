package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/api/auth"
	"github.com/kvmeter/kvmeter/central/export"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/sample"
)

func centralCommand() *cobra.Command {
	var flags daemon.Flags
	file := daemon.File("central.yaml")
	c := &cobra.Command{
		Use:   "central",
		Short: "Store samples and answer the API",
		Long: `Central takes batches from RabbitMQ, stores each sample exactly once, acks what is
on disk, and answers the Telemetry API v2.`,
		Example: `  kvmeter central --check-config
  KVMETER_STORE__PATH=/srv/kvmeter kvmeter central`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := control.DefaultCentral(daemon.Dirs())
			if err := flags.Load(file, &cfg); err != nil {
				return err
			}
			if flags.Check {
				return errors.Join(flags.Print(cmd.OutOrStdout(), &cfg), checkCentral(cfg))
			}
			log, err := flags.Logger()
			if err != nil {
				return err
			}
			return runCentral(cmd.Context(), cfg, log, daemon.Registry())
		},
	}
	flags.Register(c.Flags(), file)
	withTestHooks(c)
	return c
}

// checkCentral returns what central would refuse to start for.
func checkCentral(cfg control.Central) error {
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter central", zap.NewNop())
	if err != nil {
		return err
	}
	amqp.Close()
	if err := checkPartitions(cfg.AMQP); err != nil {
		return err
	}
	if _, err := loadKeys(cfg.Keys, cfg.AllowUnsigned, zap.NewNop()); err != nil {
		return err
	}
	return errors.Join(checkServed(cfg.Store, cfg.API, cfg.Metrics, cfg.MetricsWebConfig), cfg.Export.Check(cfg.Store.Retention))
}

// checkServed checks what central and the all-in-one have in common.
func checkServed(s control.Store, a control.API, metrics, webConfig string) error {
	switch {
	case s.Path == "":
		return errors.New("store.path is empty: name the folder of the store")
	case s.Retention < 0:
		return fmt.Errorf("store.retention %s: must not be negative; 0s keeps samples for ever", s.Retention)
	case s.RollupRetention < 0 || s.EventRetention < 0:
		return errors.New("store.rollup_retention and store.event_retention must not be negative; 0s keeps for ever")
	case s.Memory < 0:
		return errors.New("store.memory must not be negative")
	}
	if _, err := storeOptions(s); err != nil {
		return err
	}
	if err := daemon.CheckAddress("api.listen", a.Listen); err != nil {
		return err
	}
	if err := api.CheckListen(a.Listen, a.Auth.Enabled()); err != nil {
		return err
	}
	if err := checkAPI(&a); err != nil {
		return err
	}
	return daemon.CheckMetrics(metrics, webConfig)
}

func runCentral(ctx context.Context, cfg control.Central, log *zap.Logger, registry *prometheus.Registry) error {
	if err := errors.Join(daemon.Harden(), checkCentral(cfg)); err != nil {
		return err
	}
	keys, err := loadKeys(cfg.Keys, cfg.AllowUnsigned, log)
	if err != nil {
		return err
	}
	amqp, err := bus.NewAMQP(cfg.AMQP, "kvmeter central", log)
	if err != nil {
		return err
	}
	defer func() { amqp.Close() }()
	registry.MustRegister(amqp.Metrics())
	metrics, err := daemon.Metrics(cfg.Metrics, cfg.MetricsWebConfig, registry)
	if err != nil {
		return err
	}
	defer metrics.Close()
	cfg.Partitions = cfg.AMQP.Partitions
	publish, err := posting(amqp, &cfg.IngestConfig, keys, log)
	if err != nil {
		return err
	}
	return serveStore(ctx, cfg.Store, cfg.API, publish, log, registry, func(ctx context.Context, s store.Store) error {
		ingest, err := central.NewIngest(cfg.IngestConfig, central.IngestDeps{Log: log, Consumer: amqp, Store: s, Keys: keys, Registry: registry})
		if err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		if cfg.Export.To != "" {
			exporter, err := export.New(cfg.Export, export.Deps{Log: log, Store: s, Clock: time.Now, Registry: registry})
			if err != nil {
				return err
			}
			g.Go(func() error {
				exporter.Run(ctx)
				return nil
			})
		}
		g.Go(func() error { return ingest.Run(ctx) })
		g.Go(func() error { return metrics.Serve(ctx) })
		g.Go(func() error { return daemon.Notify(ctx, log, daemon.NeverStuck) })
		return g.Wait()
	})
}

// posting returns how samples sent to the API get to the pipelines: nil where
// notifiers would refuse them for want of a signature.
func posting(p bus.Publisher, cfg *central.IngestConfig, keys bus.Keys, log *zap.Logger) (func(context.Context, *sample.Batch) error, error) {
	if len(keys.Secret(cfg.Name)) == 0 && !cfg.AllowUnsigned {
		log.Warn("samples can be sent to the API only with direct=true: to pass them through the pipelines central signs them, and there is no key of its name", zap.String("name", cfg.Name))
		return nil, nil
	}
	poster, err := central.NewPoster(p, cfg.Name, cfg.Partitions, keys)
	if err != nil {
		return nil, err
	}
	return poster.Post, nil
}

// serveStore answers the API, opens the store, runs f with it and closes it.
// Until the store is open the API says so.
func serveStore(ctx context.Context, cfg control.Store, listen control.API, publish func(context.Context, *sample.Batch) error, log *zap.Logger, registry prometheus.Registerer, f func(context.Context, store.Store) error) error {
	var answers gate
	page, err := daemon.Open("the API", "api.listen", listen.Listen, &answers)
	if err != nil {
		return err
	}
	page.UseWebConfig(listen.WebConfig)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	options, closeAudit, err := apiOptions(ctx, &listen, log)
	if err != nil {
		page.Close()
		return err
	}
	defer closeAudit()
	options.Publish = publish
	served := make(chan error, 1)
	go func() {
		served <- page.Serve(ctx)
		stop() // without the API there is no central
	}()
	s, err := openStore(ctx, cfg, log, registry)
	if s != nil {
		answers.open(api.New(s, options))
		log.Info("the API answers", zap.String("url", page.URL()))
		var done func()
		if done, err = serveMaintenance(ctx, cfg.Path, s, log); err == nil {
			err = f(ctx, s)
			done()
		}
	}
	stop()
	err = errors.Join(err, <-served) // no request outlives the store
	if s != nil {
		err = errors.Join(err, s.Close())
	}
	return err
}

// checkAPI returns what is wrong with the settings of the API.
func checkAPI(a *control.API) error {
	if a.RateLimit < 0 || a.DefaultLimit < 1 || a.MaxLimit < 0 || a.QueryTimeout < 0 {
		return errors.New("api: rate_limit, query_timeout and max_limit must not be negative, and default_api_return_limit at least 1")
	}
	if a.Prefix != "" && a.Prefix[0] != '/' {
		return fmt.Errorf("api.prefix %q does not begin with a slash", a.Prefix)
	}
	if _, err := proxies(a.TrustedProxies); err != nil {
		return err
	}
	_, err := loadPolicy(a.Policy)
	return errors.Join(a.Auth.Check(), err, daemon.CheckWebConfig("api.web_config", a.WebConfig))
}

// proxies reads addresses and networks.
func proxies(list []string) ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, text := range list {
		network, err := netip.ParsePrefix(text)
		if addr, e := netip.ParseAddr(text); e == nil {
			network, err = addr.Prefix(addr.BitLen())
		}
		if err != nil {
			return nil, fmt.Errorf("api.trusted_proxies: %q is neither an address nor a network such as 192.0.2.0/24", text)
		}
		all = append(all, network)
	}
	return all, nil
}

func loadPolicy(path string) (*api.Policy, error) {
	if path == "" {
		return nil, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("api.policy: %w", err)
	}
	p, err := api.ParsePolicy(text)
	if err != nil {
		return nil, fmt.Errorf("api.policy %s: %w", path, err)
	}
	return p, nil
}

// apiOptions makes of the settings what the API is made with. done closes the
// audit file.
func apiOptions(ctx context.Context, a *control.API, log *zap.Logger) (o api.Options, done func(), err error) {
	o = api.Options{Log: log, DefaultLimit: a.DefaultLimit, MaxLimit: a.MaxLimit, AllowedOrigins: a.AllowedOrigins, Prefix: a.Prefix, Patience: a.QueryTimeout, SampleSource: a.SampleSource}
	if o.Proxies, err = proxies(a.TrustedProxies); err != nil {
		return o, nil, err
	}
	if o.Authenticate, err = auth.New(ctx, &a.Auth, log); err != nil {
		return o, nil, err
	}
	if a.Auth.Enabled() {
		o.Rate = a.RateLimit
	}
	if o.Policy, err = loadPolicy(a.Policy); err != nil {
		return o, nil, err
	}
	if a.Audit == "" {
		return o, func() {}, nil
	}
	f, err := os.OpenFile(a.Audit, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return o, nil, fmt.Errorf("api.audit: %w", err)
	}
	encoding := zap.NewProductionEncoderConfig()
	encoding.EncodeTime, encoding.LevelKey, encoding.MessageKey = zapcore.RFC3339NanoTimeEncoder, "", ""
	o.Audit = zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(encoding), zapcore.Lock(f), zap.InfoLevel))
	return o, func() { _ = f.Close() }, nil
}

// openStore opens the store. It returns neither a store nor an error if ctx ends
// first, which is safe: a store that is being opened has taken nothing yet.
func openStore(ctx context.Context, cfg control.Store, log *zap.Logger, registry prometheus.Registerer) (*local.Store, error) {
	options, err := storeOptions(cfg)
	if err != nil {
		return nil, err
	}
	options.Log, options.Registry = log, registry
	var s *local.Store
	opened := make(chan error, 1)
	go func() {
		var err error
		s, err = local.Open(cfg.Path, options)
		opened <- err
	}()
	select {
	case err := <-opened:
		switch {
		case errors.Is(err, fs.ErrPermission):
			err = fmt.Errorf("%w: let this user write there, or set store.path to a folder of its own", err)
		case err != nil && strings.Contains(err.Error(), syscall.ENOSPC.Error()): // which Pebble does not wrap
			err = fmt.Errorf("open store %s: its disk is full; free some space and start again", cfg.Path)
		}
		return s, err
	case <-ctx.Done():
		return nil, nil
	}
}

// gate answers by a handler once there is one.
type gate struct{ handler atomic.Pointer[http.Handler] }

func (g *gate) open(h http.Handler) { g.handler.Store(&h) }

// ServeHTTP implements [http.Handler].
func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := g.handler.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = io.WriteString(w, `{"error_message": {"faultcode": "Server", "faultstring": "The store is being opened; try again in a moment.", "debuginfo": null}}`)
}
