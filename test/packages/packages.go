// Package packages installs, upgrades and purges the Debian packages: in a root
// of their own, and in a guest that boots Debian with systemd.
package packages

import (
	"archive/tar"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/test/boot"
)

//go:embed scenario.sh
var scenario []byte

// Build builds the packages of two versions below dir, beside the script that
// tries them and the page that it follows.
func Build(ctx context.Context, dir string) error {
	for _, version := range []string{"1", "2"} {
		cmd := exec.CommandContext(ctx, "../../packaging/build.sh", filepath.Join(dir, version), "amd64")
		cmd.Env = append(os.Environ(), "VERSION="+version, "FORMATS=deb", "COMPRESSION=none")
		if err := boot.Run(cmd); err != nil {
			return err
		}
	}
	page, err := os.ReadFile("../../docs/install.md")
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, "install.md"), page, 0o644), os.WriteFile(filepath.Join(dir, "scenario.sh"), scenario, 0o755))
}

// guestPackages are what the guest has beside the least that Debian is: an init,
// and QEMU for a domain of its own.
const guestPackages = "systemd,systemd-sysv,udev,dbus,qemu-system-x86"

// unit has the guest run what is on its second disk, and end.
const unit = `[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'mkdir /packages && tar -C /packages -xf /dev/vdb && /packages/scenario.sh 2>&1'
ExecStopPost=/bin/systemctl --no-block poweroff
StandardOutput=tty
TTYPath=/dev/ttyS0
`

// image makes the guest's disk with debootstrap, unless the cache has it.
func image(ctx context.Context, cache string) (string, error) {
	path := filepath.Join(cache, "debian-"+boot.Digest([]byte(guestPackages), []byte(unit))+".ext4")
	return path, boot.Make(path, func(tmp string) error {
		root, err := os.MkdirTemp(cache, "root-")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(root) }()
		if err := boot.Run(exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "--include="+guestPackages, "bookworm", root)); err != nil {
			return err
		}
		units := filepath.Join(root, "etc/systemd/system")
		if err := os.WriteFile(filepath.Join(units, "scenario.service"), []byte(unit), 0o644); err != nil {
			return err
		}
		if err := os.Symlink("/etc/systemd/system/scenario.service", filepath.Join(units, "multi-user.target.wants/scenario.service")); err != nil {
			return err
		}
		return boot.Run(exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-d", root, tmp, "2G"))
	})
}

// initrd makes what mounts the guest's disk, with the kernel's modules for it.
func initrd(ctx context.Context, dir, kernel string) (string, error) {
	program := filepath.Join(dir, "init")
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", program, "./init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := boot.Run(build); err != nil {
		return "", err
	}
	var a boot.Archive
	for _, dir := range []string{"dev", "m", "root"} {
		a.Dir(dir)
	}
	a.Console()
	files, err := filepath.Glob(filepath.Join(kernel, "*.ko"))
	if err != nil {
		return "", err
	}
	for _, path := range append(files, program) {
		content, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		name := "init"
		if path != program {
			name = "m/" + filepath.Base(path)
		}
		a.File(name, 0o755, content)
	}
	path := filepath.Join(dir, "initrd")
	return path, os.WriteFile(path, a.Bytes(), 0o600)
}

// Boot runs the script of dir in a guest under emulation, and copies what it says
// to out.
func Boot(ctx context.Context, log *zap.Logger, dir string, out io.Writer) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return fmt.Errorf("find a cache folder (set HOME): %w", err)
	}
	cache = filepath.Join(cache, "kvmeter-packages")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	unlock, err := boot.Lock(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return fmt.Errorf("lock cache %s: %w", cache, err)
	}
	defer unlock()
	disk, err := image(ctx, cache)
	if err != nil {
		return err
	}
	kernel := filepath.Join(cache, "kernel")
	if _, err := os.Stat(kernel); err != nil {
		k := boot.Kernel{Packages: []string{"linux-image-cloud-amd64"}, Modules: []string{"virtio_pci", "virtio_blk", "ext4"}}
		if err := boot.Fetch(ctx, log, k, kernel); err != nil {
			return err
		}
	}
	first, err := initrd(ctx, dir, kernel)
	if err != nil {
		return err
	}
	second := filepath.Join(dir, "packages.tar")
	if err := archive(second, dir); err != nil {
		return err
	}
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-machine", "q35,accel=tcg", "-cpu", "max,-la57,-avx,-avx2", "-m", "1024", "-display", "none", "-nodefaults", "-no-reboot",
		"-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", first,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off systemd.show_status=false systemd.mask=serial-getty@ttyS0.service",
		"-drive", "if=virtio,snapshot=on,format=raw,file="+disk, "-drive", "if=virtio,readonly=on,format=raw,file="+second, "-serial", "stdio")
	qemu.Stdout, qemu.Stderr = out, out
	if err := qemu.Run(); err != nil {
		return err
	}
	log.Info("the guest ended", zap.Duration("cpu", qemu.ProcessState.UserTime()+qemu.ProcessState.SystemTime()))
	return nil
}

// archive writes the packages, the script and the page of dir to a tar file.
func archive(path, dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "?", "*.deb"))
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	w := tar.NewWriter(f)
	for _, file := range append(files, filepath.Join(dir, "scenario.sh"), filepath.Join(dir, "install.md")) {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
	}
	return w.Close()
}
