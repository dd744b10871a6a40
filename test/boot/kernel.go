package boot

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/zap"
)

// Kernel is what to fetch of a distribution.
type Kernel struct {
	// Packages are tried in turn. Each depends on one linux-image of a version.
	Packages []string
	// Modules are what the guest needs beyond what is built in, in this order;
	// what they depend on comes before them.
	Modules []string
}

// Fetch downloads a kernel package and makes the folder dir of it, with vmlinuz
// and the modules as *.ko, which sort in the order of their insertion.
func Fetch(ctx context.Context, log *zap.Logger, k Kernel, dir string) error {
	pkgs, err := k.find(ctx)
	if err != nil {
		log.Info("no kernel in the package lists, updating them")
		if e := Run(exec.CommandContext(ctx, "apt-get", "-qq", "update")); e != nil {
			return e
		}
		if pkgs, err = k.find(ctx); err != nil {
			return err
		}
	}
	log.Info("fetching a kernel for guests, once", zap.Strings("packages", pkgs))
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "kernel-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	get := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "download"}, pkgs...)...)
	get.Dir = tmp
	if err := Run(get); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	root, out := filepath.Join(tmp, "root"), filepath.Join(tmp, "out")
	for _, deb := range debs {
		if err := Run(exec.CommandContext(ctx, "dpkg-deb", "-x", deb, root)); err != nil {
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
	if err := pickModules(ctx, k.Modules, root, out); err != nil {
		return err
	}
	return os.Rename(out, dir)
}

var kernelImage = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-(?:unsigned-)?([0-9]\S*))$`)

// find names the packages of the first kernel that apt knows.
func (k Kernel) find(ctx context.Context) ([]string, error) {
	for _, meta := range k.Packages {
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
	return nil, fmt.Errorf("apt knows none of %s", strings.Join(k.Packages, ", "))
}

// pickModules copies the modules that are no part of the kernel itself.
func pickModules(ctx context.Context, modules []string, root, out string) error {
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
