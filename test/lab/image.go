package lab

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/test/boot"
)

//go:embed guest
var guestSources embed.FS

// images are the files that a guest boots from.
type images struct {
	Kernel, Initrd string // Linux
	ROM            string // KVM
}

// kernels are Debian's, Ubuntu's, and what both call the kernel for all machines.
var kernels = boot.Kernel{
	Packages: []string{"linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic"},
	Modules:  []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon"},
}

// images builds what a guest of this spec boots from, unless the cache has it.
func (l *Lab) images(ctx context.Context, spec GuestSpec) (images, error) {
	if err := os.MkdirAll(l.cache, 0o755); err != nil {
		return images{}, fmt.Errorf("make cache: %w", err)
	}
	unlock, err := boot.Lock(ctx, filepath.Join(l.cache, "lock"))
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
		if err := boot.Fetch(ctx, l.log, kernels, kernel); err != nil {
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
	path := filepath.Join(l.cache, fmt.Sprintf("rom-%s-%s.bin", mode, boot.Digest(source)))
	return path, boot.Make(path, func(tmp string) error {
		object := tmp + ".o"
		defer func() { _ = os.Remove(object) }()
		as := exec.CommandContext(ctx, "as", "--32", "--defsym", fmt.Sprintf("MODE=%d", slices.Index(Modes, mode)),
			"--defsym", fmt.Sprintf("COUNT=%d", DiskReads), "-o", object, "-")
		as.Stdin = bytes.NewReader(source)
		if err := boot.Run(as); err != nil {
			return err
		}
		return boot.Run(exec.CommandContext(ctx, "ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0", "-o", tmp, object))
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
	path := filepath.Join(l.cache, fmt.Sprintf("initrd-%s.cpio", boot.Digest(source, []byte(strings.Join(files, "\n")))))
	return path, boot.Make(path, func(tmp string) error {
		program := tmp + ".init"
		defer func() { _ = os.Remove(program) }()
		cc := exec.CommandContext(ctx, "gcc", "-O2", "-Wall", "-static", "-s", "-x", "c", "-o", program, "-")
		cc.Stdin = bytes.NewReader(source)
		if err := boot.Run(cc); err != nil {
			return err
		}
		init, err := os.ReadFile(program)
		if err != nil {
			return err
		}
		var a boot.Archive
		a.Dir("dev")
		a.Dir("m")
		a.Console()
		a.File("init", 0o755, init)
		for i, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			a.File(fmt.Sprintf("m/%02d.ko", i), 0o644, b)
		}
		return os.WriteFile(tmp, a.Bytes(), 0o644)
	})
}
