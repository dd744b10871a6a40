package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/central/store/local"
	"github.com/kvmeter/kvmeter/cmd/internal/daemon"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/control"
	"github.com/kvmeter/kvmeter/sample"
)

// storeSocket is where a program listens for what is to be done with the store
// that it has open: HTTP, for the store's owner only.
const storeSocket = "control.sock"

// serveMaintenance answers on the store's socket until ctx ends.
func serveMaintenance(ctx context.Context, dir string, s *local.Store, log *zap.Logger) (done func(), err error) {
	path := filepath.Join(dir, storeSocket)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // the store's lock is ours
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil { // its path may be too long for a socket
		log.Warn("no socket for backups of the running store", zap.Error(err))
		return func() {}, nil
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	server := &http.Server{Handler: maintenance(s), ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Warn("the store's socket ended", zap.Error(err))
		}
	}()
	return func() {
		_ = server.Close()
		<-ended
	}, nil
}

// maintenance does what is asked on the store's socket.
func maintenance(s *local.Store) http.Handler {
	mux := http.NewServeMux()
	answer := func(do func(r *http.Request, w io.Writer) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if err := do(r, w); err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
			}
		}
	}
	mux.HandleFunc("POST /backup", answer(func(r *http.Request, _ io.Writer) error {
		return s.Backup(r.Context(), r.URL.Query().Get("to"))
	}))
	mux.HandleFunc("GET /stats", answer(func(_ *http.Request, w io.Writer) error { return writeStats(w, s) }))
	mux.HandleFunc("POST /verify", answer(func(r *http.Request, w io.Writer) error {
		checked, err := s.Verify(r.Context(), func(p string) { fmt.Fprintln(w, p) })
		if err == nil {
			fmt.Fprintln(w, verdict(checked))
		}
		return err
	}))
	return mux
}

// askStore asks the program that has the store open; fs.ErrNotExist: none has.
func askStore(ctx context.Context, dir, method, path string, out io.Writer) error {
	socket := filepath.Join(dir, storeSocket)
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, method, "http://store"+path, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := client.Do(r)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" && !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%s: %w", socket, fs.ErrNotExist)
		}
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
		return errors.Join(errors.New(strings.TrimSpace(string(text))), err)
	}
	_, err = io.Copy(out, resp.Body)
	return err
}

// storeCommands are those that look after a store.
func storeCommands() []*cobra.Command {
	var dir string
	flag := func(c *cobra.Command) *cobra.Command {
		c.Flags().StringVar(&dir, "store", filepath.Join(daemon.Dirs().State, "store"), "folder of the store (store.path)")
		return c
	}
	// running asks a running program, or opens the store itself.
	running := func(cmd *cobra.Command, method, path string, alone func(s *local.Store) error) error {
		err := askStore(cmd.Context(), dir, method, path, cmd.OutOrStdout())
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := isStore(dir); err != nil {
			return err
		}
		s, err := local.Open(dir, maintenanceOptions())
		if err != nil {
			return err
		}
		return errors.Join(alone(s), s.Close())
	}
	backup := flag(&cobra.Command{
		Use: "backup FOLDER", Short: "Copy the store, as it is now, into a new folder", Args: cobra.ExactArgs(1),
		Long: `Backup copies the store, as it is now, into a folder that is empty or not there yet.
A program that has the store open goes on meanwhile. On the same file system
the copy shares files with the store and takes little space at first: copy it
elsewhere to be safe from the loss of the disk.`,
		Example: "  kvmeter backup /var/backups/kvmeter/monday",
		RunE: func(cmd *cobra.Command, args []string) error {
			to, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			return running(cmd, http.MethodPost, "/backup?"+url.Values{"to": {to}}.Encode(), func(s *local.Store) error {
				return s.Backup(cmd.Context(), to)
			})
		},
	})
	restore := flag(&cobra.Command{
		Use: "restore BACKUP", Short: "Make a store out of a backup", Args: cobra.ExactArgs(1),
		Long:    "Restore copies a backup to the folder of the store, which must be empty or not there yet. The backup stays good.",
		Example: "  kvmeter restore /var/backups/kvmeter/monday --store /srv/kvmeter",
		RunE: func(cmd *cobra.Command, args []string) error {
			return local.Restore(cmd.Context(), args[0], dir)
		},
	})
	store := &cobra.Command{Use: "store", Short: "Look after the store: stats, verify, repair"}
	store.AddCommand(flag(&cobra.Command{
		Use: "stats", Short: "Count what the store holds", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return running(cmd, http.MethodGet, "/stats", func(s *local.Store) error { return writeStats(cmd.OutOrStdout(), s) })
		},
	}), flag(&cobra.Command{
		Use: "verify", Short: "Read every record, and compare the rollups with the samples", Args: cobra.NoArgs,
		Long: "Verify reads every record of the store, prints the problems that it finds, and ends with an error if there are some.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var said strings.Builder
			out := cmd.OutOrStdout()
			cmd.SetOut(io.MultiWriter(out, &said))
			err := running(cmd, http.MethodPost, "/verify", func(s *local.Store) error {
				checked, err := s.Verify(cmd.Context(), func(p string) { fmt.Fprintln(cmd.OutOrStdout(), p) })
				if err == nil {
					fmt.Fprintln(cmd.OutOrStdout(), verdict(checked))
				}
				return err
			})
			if err == nil && !strings.HasSuffix(said.String(), " no problems\n") {
				err = errors.New("the store has problems: restore a backup, or stop what has it open and run `kvmeter store repair`")
			}
			return err
		},
	}), flag(&cobra.Command{
		Use: "repair", Short: "Drop records that cannot be read and work out the rest anew", Args: cobra.NoArgs,
		Long: `Repair deletes the records that cannot be read, works out anew what is known of
the resources, and rolls up all hours again. No other program may have the store
open. Back it up first.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := isStore(dir); err != nil {
				return err
			}
			checked, err := local.Repair(cmd.Context(), dir, maintenanceOptions(), func(p string) { fmt.Fprintln(cmd.OutOrStdout(), p) })
			if err == nil {
				fmt.Fprintf(cmd.OutOrStdout(), "%s; %d records dropped\n", verdict(checked), checked.Dropped)
			}
			return err
		},
	}))
	return []*cobra.Command{backup, restore, store}
}

// maintenanceOptions keep everything: what is past its retention is dropped by
// the program whose configuration says so.
func maintenanceOptions() local.Options {
	return local.Options{Retention: -1, EventRetention: -1, MinFree: 1}
}

func isStore(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, "samples")); err != nil {
		return fmt.Errorf("%s is no store (%w); name its folder with --store", dir, err)
	}
	return nil
}

func verdict(c local.Checked) string {
	problems := "no problems"
	if c.Problems > 0 {
		problems = fmt.Sprint(c.Problems, " problems")
	}
	return fmt.Sprintf("%d records and %d samples read: %s", c.Records, c.Samples, problems)
}

func writeStats(out io.Writer, s *local.Store) error {
	st, err := s.Stats()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "Records of\tNumber\tBytes of keys\tBytes of values\tBytes on disk\t")
	for _, k := range st.Kinds {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t\n", k.Kind, k.Records, k.KeyBytes, k.RawBytes, k.DiskBytes)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	rest, err := json.Marshal(map[string]any{
		"meters": st.Meters, "nodes": st.Nodes, "resources": st.Resources, "owners": st.Holders, "metadata": st.Metadata,
		"hours": st.Hours, "hours to roll up": st.PendingHours, "bytes on disk": st.DiskBytes,
	})
	if err == nil {
		_, err = fmt.Fprintf(out, "%s\n", rest)
	}
	return err
}

// storeOptions are the options of the store that its settings say.
func storeOptions(cfg control.Store) (local.Options, error) {
	ever := func(d time.Duration) time.Duration {
		if d == 0 {
			return -1
		}
		return d
	}
	o := local.Options{
		Retention: ever(cfg.Retention), RollupRetention: ever(cfg.RollupRetention), EventRetention: ever(cfg.EventRetention),
		MinFree: cfg.MinFree, HeadBytes: cfg.Memory,
	}
	for _, rule := range cfg.TimeToLive {
		words := strings.Fields(rule)
		if len(words) < 2 {
			return o, fmt.Errorf("store.time_to_live %q: want a meter and samples=DURATION or rollups=DURATION", rule)
		}
		var ttl local.TTL
		var err error
		if ttl.Meters, err = sample.NewMatcher(words[:1]); err != nil {
			return o, fmt.Errorf("store.time_to_live %q: %w", rule, err)
		}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			if key == "project" && value != "" {
				ttl.Project = value
				continue
			}
			d, err := time.ParseDuration(value)
			if err != nil || d < 0 {
				return o, fmt.Errorf("store.time_to_live %q: %q is not project=ID, samples=DURATION or rollups=DURATION", rule, w)
			}
			switch key {
			case "samples":
				ttl.Samples = ever(d)
			case "rollups":
				ttl.Rollups = ever(d)
			default:
				return o, fmt.Errorf("store.time_to_live %q: %q is not project=ID, samples=DURATION or rollups=DURATION", rule, w)
			}
		}
		o.TimeToLive = append(o.TimeToLive, ttl)
	}
	return o, nil
}
