package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kvmeter/kvmeter/agent"
	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/host"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/notifier"
	"github.com/kvmeter/kvmeter/notifier/publisher/all"
	"github.com/kvmeter/kvmeter/sample"
)

func upCommand() *cobra.Command {
	var flags daemon.Flags
	dirs := daemon.Dirs()
	file := daemon.File("up.yaml")
	state, run := control.UpDirs(dirs)
	var libvirt string
	var withoutBPF bool
	c := &cobra.Command{
		Use:   "up",
		Short: "Run everything in one process: meter this host, store the samples, answer the API",
		Long: `Up meters this host every second, stores the samples in a store of its own and
answers the API, all in one process and without a broker. Root lets it use BPF and
see every domain; an ordinary user gets what /proc gives.`,
		Example: `  kvmeter up                                  then, in another terminal: kvmeter top
  kvmeter up --libvirt /run/libvirt/virtqemud-sock-ro
  KVMETER_AGENT__INTERVAL=10s kvmeter up --state /srv/kvmeter`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := control.DefaultUp(state, run)
			if err := flags.Load(file, &cfg); err != nil {
				return err
			}
			if libvirt != "" {
				cfg.Agent.Libvirt = agent.Sockets{libvirt}
			}
			if flags.Check {
				return errors.Join(flags.Print(cmd.OutOrStdout(), &cfg), checkUp(cfg))
			}
			log, err := flags.Logger()
			if err != nil {
				return err
			}
			if daemonAnswers(filepath.Join(dirs.Run, "agent.sock")) {
				log.Warn("kvmeter-agent already meters this host; this is a second one beside it")
			}
			return runUp(cmd.Context(), cfg, withoutBPF, log, func() (control.Up, error) {
				cfg := control.DefaultUp(state, run)
				return cfg, flags.Load(file, &cfg)
			})
		},
	}
	flags.Register(c.Flags(), file)
	c.Flags().StringVar(&state, "state", state, "folder of the store")
	c.Flags().StringVar(&run, "run", run, "folder of the socket that kvmeter top reads, and of the counters that outlive a restart")
	c.Flags().StringVar(&libvirt, "libvirt", "", "libvirt's socket (default: the usual places)")
	c.Flags().BoolVar(&withoutBPF, "without-bpf", false, "read processes from /proc only")
	return c
}

// daemonAnswers reports whether somebody listens on a Unix socket.
func daemonAnswers(path string) bool {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

// checkUp returns what the all-in-one would refuse to start for.
func checkUp(cfg control.Up) error {
	if err := host.CheckAgent(cfg.Agent); err != nil {
		return err
	}
	cfg.Notifier.Spool, cfg.Notifier.State = "", ""
	if _, err := notifier.New(cfg.Notifier, notifier.Deps{Log: zap.NewNop(), Publishers: inert()}); err != nil {
		return err
	}
	return checkServed(cfg.Store, cfg.API, cfg.Metrics, cfg.MetricsWebConfig)
}

// runUp runs everything until ctx ends. reload loads the configuration anew, of
// which the notifier's part is used.
func runUp(ctx context.Context, cfg control.Up, withoutBPF bool, log *zap.Logger, reload func() (control.Up, error)) error {
	if err := errors.Join(daemon.Harden(), checkUp(cfg)); err != nil {
		return err
	}
	if err := makeFolders(&cfg); err != nil {
		return err
	}
	registry := daemon.Registry()
	metrics, err := daemon.Metrics(cfg.Metrics, cfg.MetricsWebConfig, registry)
	if err != nil {
		return err
	}
	defer metrics.Close()
	local := bus.NewLocal(1, log)
	publish, err := posting(local, &cfg.Central, sample.Keys{}, log)
	if err != nil {
		return err
	}
	return serveStore(ctx, cfg.Store, cfg.API, publish, log, registry, func(ctx context.Context, s store.Store) error {
		ingest, err := central.NewIngest(cfg.Central, central.IngestDeps{Log: log, Consumer: local, Store: s, Registry: registry})
		if err != nil {
			return err
		}
		n, err := notifier.New(cfg.Notifier, notifier.Deps{
			Log: log, Consumer: local, Publisher: local, Publishers: all.Publishers, Registry: registry,
		})
		if err != nil {
			return err
		}
		deps, done := host.Open(log, cfg.Agent.Profile, withoutBPF)
		closeLife := func() error { return nil }
		if !withoutBPF {
			closeLife = host.OpenLife(&deps, cfg.Agent)
		}
		deps.Publisher, deps.Registry = local, registry
		a, err := agent.New(cfg.Agent, deps)
		if err == nil && os.Getuid() != 0 { // root's folders may be another user's, which takes a capability
			err = a.DropCapabilities(ctx)
		}
		if err == nil {
			hangUps := func(ctx context.Context) error {
				return daemon.OnHangup(ctx, log, func() error {
					cfg, err := reload()
					if err != nil {
						return err
					}
					return n.Reload(ctx, cfg.Notifier)
				})
			}
			notify := func(ctx context.Context) error { return daemon.Notify(ctx, log, a.Stuck) }
			err = runInOrder(ctx, a.Run, n.Run, ingest.Run, metrics.Serve, hangUps, notify)
		}
		return errors.Join(err, closeLife(), done(), n.Close())
	})
}

// runInOrder runs the source and its sinks until one fails or ctx ends, and
// ends the source first, so that what it still delivers is taken.
func runInOrder(ctx context.Context, source func(context.Context) error, sinks ...func(context.Context) error) error {
	down, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, down := errgroup.WithContext(down)
	for _, sink := range sinks {
		group.Go(func() error { return sink(down) })
	}
	up, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(down, cancel)() // a sink that fails ends the source
	err := source(up)
	stop()
	return errors.Join(err, group.Wait())
}

// makeFolders makes the folders of the socket, which guards itself, and of the
// store.
func makeFolders(cfg *control.Up) error {
	err := os.MkdirAll(filepath.Dir(cfg.Store.Path), 0o750)
	if err == nil && cfg.Agent.Socket != "" {
		err = os.MkdirAll(filepath.Dir(cfg.Agent.Socket), 0o755)
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: run as root, or choose folders of your own with --state and --run", err)
	}
	return err
}
