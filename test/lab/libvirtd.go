package lab

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
	"go.uber.org/zap"
)

//go:embed libvirtd.sh
var libvirtdScript string

// libvirtDirs are libvirt's folders and what stands for them; libvirtd.sh mounts
// the same.
var libvirtDirs = []struct{ name, path string }{
	{"etc", "/etc/libvirt"},
	{"lib", "/var/lib/libvirt"},
	{"cache", "/var/cache/libvirt"},
	{"log", "/var/log/libvirt"},
	{"run", "/run/libvirt"},
}

// hostVariable tells libvirtd.sh the name of the host that a lab is apart as.
const hostVariable = "KVMETER_LAB_HOST"

const (
	// qemuConf: as root, without what needs a service, a security module or a
	// control group, and without a mount namespace for each guest.
	qemuConf = `user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
`
	// libvirtdConf: everybody may read, root may write. Each lab is a host of its own.
	libvirtdConf = `auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_ro_perms = "0777"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
host_uuid = "%s-0000-4000-8000-0123456789ab"
`
)

// Socket is the path of libvirtd's read-write socket, for root.
func (l *Lab) Socket() string {
	if l.daemon != "libvirtd" {
		return l.path("run", l.daemon+"-sock")
	}
	return l.path("run", "libvirt-sock")
}

// Contained are edits of a guest's XML by which its files are where only the
// container of libvirtd and QEMU has them.
func (l *Lab) Contained() []string { return []string{l.path("instances"), ContainerInstances} }

// ReadOnlySocket is the path of libvirtd's read-only socket, for everybody.
func (l *Lab) ReadOnlySocket() string { return l.Socket() + "-ro" }

// StartLibvirt starts the lab's libvirtd and returns when it answers; if it
// runs already, nothing happens. Guests that ran under an earlier libvirtd of
// this lab are found again. It needs root and the packages of [Packages].
func (l *Lab) StartLibvirt(ctx context.Context) error {
	if err := checkHost(l.daemon); err != nil {
		return err
	}
	if pid, err := l.LibvirtPID(); err == nil && pid != 0 {
		return l.waitLibvirt(ctx, nil)
	}
	for _, d := range libvirtDirs {
		if err := os.MkdirAll(l.path(d.name), 0o755); err != nil {
			return fmt.Errorf("start libvirtd: %w", err)
		}
	}
	if err := os.MkdirAll(l.path("instances"), 0o755); err != nil {
		return fmt.Errorf("start libvirtd: %w", err)
	}
	if err := l.makeNamespace(); err != nil {
		return fmt.Errorf("start libvirtd: %w", err)
	}
	for name, text := range map[string]string{"etc/qemu.conf": qemuConf, "libvirtd.conf": fmt.Sprintf(libvirtdConf, l.id)} {
		if err := os.WriteFile(l.path(name), []byte(text), 0o644); err != nil {
			return fmt.Errorf("start libvirtd: %w", err)
		}
	}
	ours, kept := l.capabilities()
	if err := copyNew(kept, ours); err != nil {
		return fmt.Errorf("start libvirtd: %w", err)
	}
	stderr, err := os.Create(l.path("libvirtd.stderr"))
	if err != nil {
		return fmt.Errorf("start libvirtd: %w", err)
	}
	defer func() { _ = stderr.Close() }()
	cmd := exec.Command("sh", "-c", libvirtdScript, "libvirtd.sh", l.dir, l.daemon)
	cmd.Stderr = stderr
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), idVariable+"="+l.id, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	// Go makes the namespace's mounts private before it runs the script.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Setsid: true}
	if l.container {
		cmd.Args = append(cmd.Args, ContainerInstances)
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
	}
	if l.netns != "" {
		cmd.Env = append(cmd.Env, hostVariable+"="+l.netns)
		cmd.SysProcAttr.Unshareflags |= syscall.CLONE_NEWUTS
	}
	if err := l.Inside(cmd.Start); err != nil {
		return fmt.Errorf("start libvirtd: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // how it ended is in its log
	}()
	if err := l.waitLibvirt(ctx, ended); err != nil {
		return err
	}
	l.log.Info("libvirtd runs", zap.Int("pid", cmd.Process.Pid), zap.String("socket", l.Socket()))
	return nil
}

// waitLibvirt returns when libvirtd answers, or with what it said when it ended.
func (l *Lab) waitLibvirt(ctx context.Context, ended <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var last error
	err := poll(ctx, func() bool {
		select {
		case <-ended:
			return true
		default:
		}
		var conn *libvirt.Libvirt
		if conn, last = l.Connect(ctx); last != nil {
			return false
		}
		last = conn.Disconnect()
		return true
	})
	if err = errors.Join(err, last); err != nil {
		return fmt.Errorf("start libvirtd: %w\n%s%s", err, tail(l.path("libvirtd.stderr")), tail(l.path("log", "libvirtd.log")))
	}
	return nil
}

// Connect opens a read-write connection to libvirtd; the caller disconnects it.
// It ends with ctx.
func (l *Lab) Connect(ctx context.Context) (*libvirt.Libvirt, error) {
	conn := libvirt.NewWithDialer(dialers.NewLocal(dialers.WithSocket(l.Socket())))
	if err := conn.Connect(); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", l.Socket(), err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Disconnect() })
	go func() {
		<-conn.Disconnected()
		stop()
	}()
	return conn, nil
}

// LibvirtPID is libvirtd's process id, 0 when it does not run or is in a container.
func (l *Lab) LibvirtPID() (int, error) {
	pid, err := readNumber(l.path("libvirtd.pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read libvirtd's process id: %w", err)
	}
	if _, ours := l.process(int(pid)); !ours {
		return 0, nil
	}
	return int(pid), nil
}

// StopLibvirt ends libvirtd as its service would and waits for its end. Guests
// run on.
func (l *Lab) StopLibvirt(ctx context.Context) error {
	return l.end(ctx, "libvirtd", l.isLibvirtd)
}

// KillLibvirt ends libvirtd with SIGKILL. Guests run on.
func (l *Lab) KillLibvirt(ctx context.Context) error {
	return l.kill(ctx, "libvirtd", l.isLibvirtd)
}

// What libvirt finds out about QEMU when the first domain is defined takes it
// seconds. It is kept for the labs to come; libvirt itself sees when it is out of
// date.
func (l *Lab) capabilities() (ours, kept string) {
	return l.path("cache", "qemu", "capabilities"), filepath.Join(l.cache, "qemu-capabilities")
}

// copyNew copies the files of a flat folder that are newer than their copies.
func copyNew(from, to string) error {
	entries, err := os.ReadDir(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for _, e := range entries {
		source, dest := filepath.Join(from, e.Name()), filepath.Join(to, e.Name())
		have, err := os.Stat(dest)
		if fi, e := e.Info(); e == nil && err == nil && !fi.ModTime().After(have.ModTime()) {
			continue
		}
		b, err := os.ReadFile(source)
		if err != nil {
			return err
		}
		tmp, err := os.CreateTemp(to, ".copy-")
		if err != nil {
			return err
		}
		_, err = tmp.Write(b)
		if err = errors.Join(err, tmp.Close(), os.Rename(tmp.Name(), dest)); err != nil {
			return err
		}
	}
	return nil
}

// tail is the end of a file, for error messages; empty if there is none.
func tail(path string) string {
	const most = 2000
	b, err := os.ReadFile(path)
	if err != nil || len(bytes.TrimSpace(b)) == 0 {
		return ""
	}
	if len(b) > most {
		b = b[len(b)-most:]
	}
	return fmt.Sprintf("%s ends:\n%s\n", path, strings.TrimSpace(string(b)))
}
