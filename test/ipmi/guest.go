package ipmi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/test/boot"
	"github.com/kvmeter/kvmeter/test/ipmi/proto"
)

const module = "github.com/kvmeter/kvmeter/"

// kernel is one with IPMI drivers, which kernels for clouds lack.
var kernel = boot.Kernel{
	Packages: []string{"linux-image-amd64", "linux-image-generic"},
	Modules:  []string{"ipmi_msghandler", "ipmi_devintf", "ipmi_si"},
}

// Builder makes what guests boot from, in a folder.
type Builder struct {
	dir, kernel, initrd string
}

// NewBuilder builds the programs and fetches the kernel, which stays in the
// user's cache folder; everything else is in dir.
func NewBuilder(ctx context.Context, log *zap.Logger, dir string) (*Builder, error) {
	b := &Builder{dir: dir, initrd: filepath.Join(dir, "initrd")}
	if err := b.fetch(ctx, log); err != nil {
		return nil, fmt.Errorf("fetch a kernel: %w", err)
	}
	for name, from := range map[string]string{"init": ".", "kvmeter-agent": ".", "oracle": "oracle"} {
		pkg := map[string]string{"init": module + "test/ipmi/guest", "kvmeter-agent": module + "cmd/kvmeter-agent", "oracle": "."}[name]
		build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", filepath.Join(dir, name), pkg)
		build.Dir, build.Env = from, append(os.Environ(), "CGO_ENABLED=0")
		if err := boot.Run(build); err != nil {
			return nil, err
		}
	}
	return b, b.pack(ctx)
}

func (b *Builder) fetch(ctx context.Context, log *zap.Logger) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return fmt.Errorf("find a cache folder (set HOME): %w", err)
	}
	cache = filepath.Join(cache, "kvmeter-ipmi")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	unlock, err := boot.Lock(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return fmt.Errorf("lock cache %s: %w", cache, err)
	}
	defer unlock()
	b.kernel = filepath.Join(cache, "kernel")
	if _, err := os.Stat(b.kernel); err == nil {
		return nil
	}
	return boot.Fetch(ctx, log, kernel, b.kernel)
}

var library = regexp.MustCompile(`(/\S+) \(0x`)

// pack makes the guest's file system: init, the agent, the oracle, ipmitool
// with its libraries, and the modules.
func (b *Builder) pack(ctx context.Context) error {
	tool, err := exec.LookPath("ipmitool")
	if err != nil {
		return err
	}
	linked, err := exec.CommandContext(ctx, "ldd", tool).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", tool, err)
	}
	files := map[string]string{"init": filepath.Join(b.dir, "init"), "bin/kvmeter-agent": filepath.Join(b.dir, "kvmeter-agent"), "bin/oracle": filepath.Join(b.dir, "oracle"), "bin/ipmitool": tool}
	for _, m := range library.FindAllSubmatch(linked, -1) {
		files[strings.TrimPrefix(string(m[1]), "/")] = string(m[1])
	}
	modules, err := filepath.Glob(filepath.Join(b.kernel, "*.ko"))
	if err != nil {
		return err
	}
	for _, m := range modules {
		files["m/"+filepath.Base(m)] = m
	}
	var a boot.Archive
	made := map[string]bool{".": true}
	var folder func(name string)
	folder = func(name string) {
		if !made[name] {
			folder(filepath.Dir(name))
			a.Dir(name)
			made[name] = true
		}
	}
	folder("dev")
	a.Console()
	for name, from := range files {
		content, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		folder(filepath.Dir(name))
		a.File(name, 0o755, content)
	}
	return os.WriteFile(b.initrd, a.Bytes(), 0o644)
}

// lifetime bounds a guest.
const lifetime = 3 * time.Minute

// Guest is a guest that runs.
type Guest struct {
	qemu    *exec.Cmd
	cancel  context.CancelFunc
	conn    net.Conn
	in      *bufio.Reader
	console string
	stderr  bytes.Buffer
}

// Boot boots a guest with the devices that QEMU's arguments give it, and
// returns when its IPMI device is there, or with an error if there is none.
func (b *Builder) Boot(ctx context.Context, name string, devices ...string) (*Guest, error) {
	ctx, cancel := context.WithTimeout(ctx, lifetime)
	g := &Guest{cancel: cancel, console: filepath.Join(b.dir, name+".console")}
	socket := filepath.Join(b.dir, name+".sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		cancel()
		return nil, err
	}
	defer func() { _ = l.Close() }()
	g.qemu = exec.CommandContext(ctx, "qemu-system-x86_64", append([]string{
		"-machine", "pc", "-accel", "tcg", "-cpu", "max", "-m", "384", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(b.kernel, "vmlinuz"), "-initrd", b.initrd, "-append", "console=ttyS0 quiet panic=-1 oops=panic mitigations=off",
		"-serial", "file:" + g.console, "-chardev", "socket,id=commands,path=" + socket, "-serial", "chardev:commands",
	}, devices...)...)
	g.qemu.Stderr = &g.stderr
	if err := g.qemu.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	if g.conn, err = l.Accept(); err != nil {
		return nil, errors.Join(err, g.End())
	}
	context.AfterFunc(ctx, func() { _ = g.conn.Close() })
	g.in = bufio.NewReader(g.conn)
	ready, err := g.answer()
	if err == nil && ready.Err != "" {
		err = errors.New(ready.Err)
	}
	if err != nil {
		return nil, errors.Join(err, g.End())
	}
	return g, nil
}

// Run runs a command in the guest.
func (g *Guest) Run(c proto.Command) (proto.Result, error) {
	line, err := json.Marshal(c)
	if err != nil {
		return proto.Result{}, err
	}
	if _, err := g.conn.Write(append(line, '\n')); err != nil {
		return proto.Result{}, err
	}
	return g.answer()
}

func (g *Guest) answer() (r proto.Result, err error) {
	line, err := g.in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		said, _ := os.ReadFile(g.console)
		err = fmt.Errorf("the guest ended: %w\n%s%s", err, g.stderr.Bytes(), said)
	}
	return r, err
}

// End ends the guest.
func (g *Guest) End() error {
	defer g.cancel()
	if g.conn != nil {
		_, _ = g.conn.Write([]byte("{}\n"))
		_, _ = g.in.WriteTo(io.Discard) // until it is off
		_ = g.conn.Close()
	} else {
		g.cancel()
	}
	if err := g.qemu.Wait(); err != nil {
		return fmt.Errorf("QEMU: %w: %s", err, g.stderr.Bytes())
	}
	return nil
}
