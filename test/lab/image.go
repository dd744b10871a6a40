package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/zap"
)

//go:embed guest
var guestSources embed.FS

// images are the files that a guest boots from.
type images struct {
	Kernel, Initrd string // Linux
	ROM            string // KVM
}

// kernelPackages are tried in turn: Debian's, Ubuntu's, and what both call the
// kernel for all machines. Each depends on one linux-image of a version.
var kernelPackages = []string{"linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic"}

// modules are what the guest needs beyond what is built in, in this order; what
// they depend on comes before them.
var modules = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon"}

// images builds what a guest of this spec boots from, unless the cache has it.
func (l *Lab) images(ctx context.Context, spec GuestSpec) (images, error) {
	if err := os.MkdirAll(l.cache, 0o755); err != nil {
		return images{}, fmt.Errorf("make cache: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(l.cache, "lock"))
	if err != nil {
		return images{}, fmt.Errorf("lock cache %s: %w", l.cache, err)
	}
	defer unlock()
	if spec.Kind == KVM {
		rom, err := l.rom(ctx, spec.Mode)
		if err != nil {
			return images{}, fmt.Errorf("build the ROM: %w", err)
		}
		return images{ROM: rom}, nil
	}
	kernel := filepath.Join(l.cache, "kernel")
	if _, err := os.Stat(kernel); err != nil {
		if err := l.fetchKernel(ctx, kernel); err != nil {
			return images{}, fmt.Errorf("fetch a kernel for Linux guests: %w", err)
		}
	}
	initrd, err := l.initrd(ctx, kernel)
	if err != nil {
		return images{}, fmt.Errorf("build the initrd: %w", err)
	}
	return images{Kernel: filepath.Join(kernel, "vmlinuz"), Initrd: initrd}, nil
}

// rom assembles the ROM of one mode.
func (l *Lab) rom(ctx context.Context, mode string) (string, error) {
	source, err := guestSources.ReadFile("guest/rom.S")
	if err != nil {
		return "", err
	}
	path := filepath.Join(l.cache, fmt.Sprintf("rom-%s-%s.bin", mode, digest(source)))
	return path, makeFile(path, func(tmp string) error {
		object := tmp + ".o"
		defer func() { _ = os.Remove(object) }()
		as := exec.CommandContext(ctx, "as", "--32", "--defsym", fmt.Sprintf("MODE=%d", slices.Index(Modes, mode)),
			"--defsym", fmt.Sprintf("COUNT=%d", DiskReads), "-o", object, "-")
		as.Stdin = bytes.NewReader(source)
		if err := run(as); err != nil {
			return err
		}
		return run(exec.CommandContext(ctx, "ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0", "-o", tmp, object))
	})
}

// initrd packs the guest's one program and the modules it inserts.
func (l *Lab) initrd(ctx context.Context, kernel string) (string, error) {
	source, err := guestSources.ReadFile("guest/init.c")
	if err != nil {
		return "", err
	}
	files, err := filepath.Glob(filepath.Join(kernel, "*.ko"))
	if err != nil {
		return "", err
	}
	slices.Sort(files)
	path := filepath.Join(l.cache, fmt.Sprintf("initrd-%s.cpio", digest(source, []byte(strings.Join(files, "\n")))))
	return path, makeFile(path, func(tmp string) error {
		program := tmp + ".init"
		defer func() { _ = os.Remove(program) }()
		cc := exec.CommandContext(ctx, "gcc", "-O2", "-Wall", "-static", "-s", "-x", "c", "-o", program, "-")
		cc.Stdin = bytes.NewReader(source)
		if err := run(cc); err != nil {
			return err
		}
		init, err := os.ReadFile(program)
		if err != nil {
			return err
		}
		var a archive
		a.dir("dev")
		a.dir("m")
		// The kernel opens it as standard input, output and error before init runs.
		a.console()
		a.file("init", 0o755, init)
		for i, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			a.file(fmt.Sprintf("m/%02d.ko", i), 0o644, b)
		}
		return os.WriteFile(tmp, a.bytes(), 0o644)
	})
}

// fetchKernel downloads a kernel package and puts vmlinuz and the modules that
// guests need into dir, numbered in the order of their insertion.
func (l *Lab) fetchKernel(ctx context.Context, dir string) error {
	pkgs, err := kernelOf(ctx)
	if err != nil {
		l.log.Info("no kernel in the package lists, updating them")
		if e := run(exec.CommandContext(ctx, "apt-get", "-qq", "update")); e != nil {
			return e
		}
		if pkgs, err = kernelOf(ctx); err != nil {
			return err
		}
	}
	l.log.Info("fetching a kernel for Linux guests, once", zap.Strings("packages", pkgs))
	tmp, err := os.MkdirTemp(l.cache, "kernel-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	get := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "download"}, pkgs...)...)
	get.Dir = tmp
	if err := run(get); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	root, out := filepath.Join(tmp, "root"), filepath.Join(tmp, "out")
	for _, deb := range debs {
		if err := run(exec.CommandContext(ctx, "dpkg-deb", "-x", deb, root)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	vmlinuz, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(vmlinuz) != 1 {
		return fmt.Errorf("packages %v hold %d kernels, want one", pkgs, len(vmlinuz))
	}
	if err := os.Rename(vmlinuz[0], filepath.Join(out, "vmlinuz")); err != nil {
		return err
	}
	if err := pickModules(ctx, root, out); err != nil {
		return err
	}
	return os.Rename(out, dir)
}

var kernelImage = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-(?:unsigned-)?([0-9]\S*))$`)

// kernelOf names the packages of the first kernel that apt knows.
func kernelOf(ctx context.Context) ([]string, error) {
	for _, meta := range kernelPackages {
		out, err := exec.CommandContext(ctx, "apt-cache", "depends", meta).Output()
		if err != nil {
			continue
		}
		m := kernelImage.FindSubmatch(out)
		if m == nil {
			continue
		}
		pkgs := []string{string(m[1])}
		// Ubuntu has the modules in a package of their own.
		extra := "linux-modules-" + string(m[2])
		if out, err := exec.CommandContext(ctx, "apt-cache", "show", extra).Output(); err == nil && len(out) > 0 {
			pkgs = append(pkgs, extra)
		}
		return pkgs, nil
	}
	return nil, fmt.Errorf("apt knows none of %s", strings.Join(kernelPackages, ", "))
}

// pickModules copies the modules that are no part of the kernel itself.
func pickModules(ctx context.Context, root, out string) error {
	available := map[string]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if name, _, isModule := strings.Cut(filepath.Base(path), ".ko"); isModule {
			available[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return err
	}
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		path, isModule := available[name]
		if !isModule || done[name] {
			return nil
		}
		done[name] = true
		b, err := readModule(ctx, path)
		if err != nil {
			return err
		}
		needs, err := dependencies(b)
		if err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		files, err := filepath.Glob(filepath.Join(out, "*.ko"))
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(out, fmt.Sprintf("%02d-%s.ko", len(files), name)), b, 0o644)
	}
	for _, name := range modules {
		if err := add(name); err != nil {
			return err
		}
	}
	return nil
}

// moduleName is the kernel's form of a name; files may have dashes.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

func readModule(ctx context.Context, path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".xz":
		return exec.CommandContext(ctx, "xz", "-dc", path).Output()
	case ".zst":
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		d, err := zstd.NewReader(nil)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.DecodeAll(b, nil)
	}
	return os.ReadFile(path)
}

// dependencies reads what a module says in its .modinfo section.
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("has no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Split(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			names := strings.Split(list, ",")
			for i := range names {
				names[i] = moduleName(names[i])
			}
			return names, nil
		}
	}
	return nil, nil
}

// makeFile makes the file at path, unless it is there, in one step.
func makeFile(path string, build func(tmp string) error) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	tmp := path + ".new"
	defer func() { _ = os.Remove(tmp) }()
	if err := build(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func digest(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

func run(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// lockFile waits for the only lock on a file, which ends with the process.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = poll(ctx, func() bool {
		return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil
	})
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}
