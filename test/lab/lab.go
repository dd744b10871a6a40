// Package lab makes a compute node on one machine, for tests and to try things
// by hand: a libvirtd of its own, guests that do exactly what they are told, and
// a RabbitMQ node of its own.
//
//	l := lab.Start(t, lab.Options{})    // its folder and its end are the test's
//	// or: l, err := lab.New("/tmp/lab", lab.Options{}); defer l.Close()
//	err := l.StartLibvirt(ctx)
//	g, err := l.StartGuest(ctx, lab.GuestSpec{})                 // Linux, under TCG
//	out, err := g.Exec(ctx, "write 65536 512")                   // 512 requests of 64 KiB
//	err = g.SendUDP(ctx, 2000, 100)                              // the host sends to the guest
//	k, err := l.StartGuest(ctx, lab.GuestSpec{Kind: lab.KVM, Mode: "burn", VCPUs: 2})
//	r, err := l.RabbitMQ(ctx)                                    // r.URL(), r.Kill9(), r.Start(ctx)
//	conn, err := libvirt(l.ReadOnlySocket())
//
// # What is where
//
// libvirtd runs in a mount namespace of its own, where the lab's folders etc,
// lib, cache, log and run stand for /etc/libvirt, /var/lib/libvirt,
// /var/cache/libvirt, /var/log/libvirt and /run/libvirt. A libvirt that the
// machine runs, its /etc and its control groups are not touched. The sockets
// libvirt-sock and libvirt-sock-ro are in run, where everybody may connect to the
// latter if the folders above let him. Taps and the bridge are in the machine's
// own network namespace, as on a real host, unless [Options.Apart] says otherwise,
// and the guests' processes are in its own pid namespace.
//
// Every name that two labs could share (bridge, taps, UUIDs, node name, ports)
// comes from the lab's id, which is a hash of the folder's path, so any number of
// labs can run side by side. The id is also how [Lab.Close] finds what to end, even
// after a crash: libvirtd, epmd and the broker have it in their environment,
// QEMU in its -uuid argument.
//
// # Exact counters
//
// Linux guests have no address, no IPv6, no ARP and no multicast: their frames
// are made by hand, and so are those that [Guest.SendUDP] sends to them. The
// bridge floods nothing to them. Each frame is counted once on the tap and
// nothing else is. Blocks are written and read with O_DIRECT, one request each.
// What is exact is the difference over a command; booting reads the disk too.
//
// Debian's cloud kernel and the guests' images are fetched and built once, into
// the user's cache folder.
package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
)

// Unix socket addresses hold 107 bytes; the longest below a lab is
// "/run/instance-00000001.serial".
const maxDirLen = 75

// Options of a lab. The zero value is good.
type Options struct {
	// Log tells what is started and ended. Default: nothing is logged.
	Log *zap.Logger
	// Cache holds kernel, guest images and libvirt's knowledge of QEMU, for all
	// labs. Default: kvmeter-lab in the user's cache folder.
	Cache string
	// Daemon is the program that is libvirt: libvirtd (default), or virtqemud where
	// libvirt is modular.
	Daemon string
	// Container has it run with its guests in a PID namespace of its own, where the
	// lab's folder instances is also [ContainerInstances]. The guests end with it.
	Container bool
	// Apart makes the lab another host to the others, as far as one machine can
	// be: with a network namespace and a host name of its own. Guests can migrate
	// between labs of which all but one are apart.
	Apart bool
}

// ContainerInstances is where a daemon in a container sees the guests' files, too; a
// guest's XML names them so with [Lab.Contained]. On the host nothing is there.
const ContainerInstances = "/mnt"

// Lab is one compute node. Its methods may be called from several goroutines.
type Lab struct {
	dir   string
	id    string
	cache string
	netns string // name of its network namespace; empty: the machine's own
	log   *zap.Logger

	daemon    string
	container bool
}

// New opens the lab in dir, and makes the folder where there is none. Nothing
// is started. The same folder is the same lab, whichever process opens it.
func New(dir string, opts Options) (*Lab, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open lab: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the lab's folder: %w", err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, fmt.Errorf("open lab: %w", err)
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	if opts.Cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find a cache folder (set HOME or Options.Cache): %w", err)
		}
		opts.Cache = filepath.Join(base, "kvmeter-lab")
	}
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	if opts.Daemon == "" {
		opts.Daemon = "libvirtd"
	}
	l := &Lab{dir: dir, id: labID(dir), cache: opts.Cache, log: opts.Log, daemon: opts.Daemon, container: opts.Container}
	if opts.Apart {
		l.netns = "km" + l.id
	}
	return l, nil
}

// checkDir refuses folders that a lab cannot work in.
func checkDir(dir string) error {
	if len(dir) > maxDirLen {
		return fmt.Errorf("lab folder %s is too long for the Unix sockets in it: choose one of at most %d bytes", dir, maxDirLen)
	}
	for _, d := range libvirtDirs {
		if strings.HasPrefix(dir+"/", d.path+"/") {
			return fmt.Errorf("lab folder %s is in %s, which the lab's libvirtd does not see: choose another one", dir, d.path)
		}
	}
	return nil
}

func labID(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return hex.EncodeToString(sum[:4])
}

// Dir is the lab's folder, absolute.
func (l *Lab) Dir() string { return l.dir }

// ID is what the names of everything in this lab come from: 8 hex digits.
func (l *Lab) ID() string { return l.id }

func (l *Lab) path(elem ...string) string {
	return filepath.Join(append([]string{l.dir}, elem...)...)
}

// Close ends everything that runs in this lab, by whichever process it was
// started, and removes the lab's files. It does as much as it can and joins the
// errors. Closing a lab twice is no error.
func (l *Lab) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// libvirtd first, so that it does not report guests that end, then all else.
	err := errors.Join(
		l.end(ctx, "libvirtd", l.isLibvirtd),
		l.end(ctx, "guests and broker", func(process) bool { return true }),
		l.removeNetwork(),
		l.restoreAIO(),
	)
	if err != nil {
		return fmt.Errorf("close lab %s: %w", l.dir, err)
	}
	for _, name := range []string{
		"etc", "lib", "cache", "log", "run", "instances", "rabbitmq",
		"libvirtd.conf", "libvirtd.pid", "libvirtd.stderr", "aio-max-nr", "last-guest.json", "guests.lock",
	} {
		if err := os.RemoveAll(l.path(name)); err != nil {
			return fmt.Errorf("close lab: %w", err)
		}
	}
	// The folder goes too unless somebody keeps something in it.
	_ = os.Remove(l.dir)
	l.log.Info("lab closed", zap.String("dir", l.dir))
	return nil
}

// writeJSON replaces the file at path in one step.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(tmp, path)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// poll calls done every few milliseconds until it says so or ctx ends.
func poll(ctx context.Context, done func() bool) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}
