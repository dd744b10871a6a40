// Package vm runs the tests of BPF programs on the kernels that kvmeter
// supports, each in a guest that boots for it under emulation (TCG), so that
// neither the machine's kernel nor what it allows matters. On the emulated CPU
// KVM works too.
//
// What runs there is found, not listed: every test of [Packages] that needs the
// build tag lab and whose program contains our BPF programs. A test knows
// that it runs there by [boot.GuestVariable]. It may skip only for the reasons
// that its kernel's [Kernel.Skips] has.
package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/test/boot"
)

const module = "github.com/kvmeter/kvmeter/"

// Packages are where tests for the guests are looked for.
var Packages = []string{module + "bpf/...", module + "collectors/...", module + "agent/...", module + "test/vm/vmm"}

// Kernel is one that the tests run on.
type Kernel struct {
	Name    string // as in its package's
	Package string // of Debian, depends on the newest build
	Accel   string // Parallel, or Serial
	// Skips are the reasons for which a test may skip on this kernel.
	Skips []string
}

// Kernels are Debian 12's two.
var Kernels = []Kernel{
	{
		Name: "6.1", Package: "linux-image-cloud-amd64", Accel: Serial, // parallel, it often hangs as the run-queue programs are loaded
		Skips: []string{boot.NoLab, "the kernel lacks the open-coded task iterator", "the kernel lacks TCX"},
	},
	{
		Name: "6.12", Package: "linux-image-6.12-cloud-amd64", Accel: Parallel,
		Skips: []string{boot.NoLab},
	},
}

// modules are what the tests need beyond what is built in: a disk, taps, queueing
// disciplines, KVM.
var modules = []string{"virtio_pci", "virtio_blk", "tun", "veth", "bridge", "vhost_net", "sch_ingress", "cls_bpf", "loop", "kvm_amd"}

const (
	// Without what emulation is slow at: five levels of page tables, wide vectors.
	cpu = "max,+svm,-la57,-avx,-avx2"
	// Parallel is QEMU's emulation with a thread for each CPU, Serial with one for all:
	// it is slower, and no CPU runs while another one changes the kernel's code.
	Parallel, Serial = "tcg,thread=multi", "tcg,thread=single"
	// The kernel's fences against a CPU's guesses cost much and change nothing here.
	kernelArgs = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off"
	memory     = "2048"
	diskSize   = 512 << 20
	// lifetime is how long a guest may take for all tests.
	lifetime = 8 * time.Minute
	// quiet is how long it may say nothing. No test takes so long.
	quiet = 2 * time.Minute
)

// Program is a package's tests.
type Program struct {
	Package string
	Dir     string
	Tests   []string
}

var testFunction = regexp.MustCompile(`(?m)^func (Test\w+)\(\w+ \*testing\.T\)`)

// Find lists the programs that guests run.
func Find(ctx context.Context) ([]Program, error) {
	all, err := testFiles(ctx)
	if err != nil {
		return nil, err
	}
	tagged, err := testFiles(ctx, "-tags", "lab")
	if err != nil {
		return nil, err
	}
	var programs []Program
	for pkg, files := range tagged {
		p := Program{Package: pkg, Dir: files.dir}
		for _, name := range files.names {
			if slices.Contains(all[pkg].names, name) {
				continue
			}
			source, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				return nil, err
			}
			for _, m := range testFunction.FindAllSubmatch(source, -1) {
				if name := string(m[1]); name != "TestMain" {
					p.Tests = append(p.Tests, name)
				}
			}
		}
		if p.Tests == nil {
			continue
		}
		deps, err := goTool(ctx, "list", "-tags", "lab", "-test", "-deps", pkg)
		if err != nil {
			return nil, err
		}
		if lines := strings.Fields(string(deps)); slices.Contains(lines, module+"gen") || pkg == module+"test/vm/vmm" {
			programs = append(programs, p)
		}
	}
	slices.SortFunc(programs, func(a, b Program) int { return strings.Compare(a.Package, b.Package) })
	return programs, nil
}

type packageFiles struct {
	dir   string
	names []string
}

// testFiles lists the test files that a build has, by package.
func testFiles(ctx context.Context, flags ...string) (map[string]packageFiles, error) {
	args := append([]string{"list"}, flags...)
	args = append(args, "-f", `{{.ImportPath}} {{.Dir}} {{join .TestGoFiles " "}} {{join .XTestGoFiles " "}}`)
	out, err := goTool(ctx, append(args, Packages...)...)
	if err != nil {
		return nil, err
	}
	all := map[string]packageFiles{}
	for line := range strings.Lines(string(out)) {
		if words := strings.Fields(line); len(words) > 2 {
			all[words[0]] = packageFiles{words[1], words[2:]}
		}
	}
	return all, nil
}

// goTool runs the go command for programs that need no library of the system.
func goTool(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// Builder makes what guests boot from, in a folder.
type Builder struct {
	log        *zap.Logger
	dir, cache string
}

// NewBuilder returns one that leaves kernels in the user's cache folder and
// everything else in dir.
func NewBuilder(log *zap.Logger, dir string) (*Builder, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("find a cache folder (set HOME): %w", err)
	}
	return &Builder{log: log, dir: dir, cache: filepath.Join(cache, "kvmeter-vm")}, nil
}

// Compile builds init and the programs.
func (b *Builder) Compile(ctx context.Context, programs []Program) error {
	if _, err := goTool(ctx, "build", "-ldflags=-s -w", "-o", filepath.Join(b.dir, "init"), module+"test/vm/init"); err != nil {
		return err
	}
	for _, p := range programs {
		if _, err := goTool(ctx, "test", "-c", "-tags", "lab", "-ldflags=-s -w", "-o", b.program(p), p.Package); err != nil {
			return err
		}
	}
	return nil
}

// name is a program's, and that of its folder in the guest.
func (p Program) name() string {
	return strings.ReplaceAll(strings.TrimPrefix(p.Package, module), "/", "-")
}

func (b *Builder) program(p Program) string {
	return filepath.Join(b.dir, p.name()+".test")
}

// kernel fetches k, unless the cache has it, and returns its folder.
func (b *Builder) kernel(ctx context.Context, k Kernel) (string, error) {
	if err := os.MkdirAll(b.cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := boot.Lock(ctx, filepath.Join(b.cache, "lock"))
	if err != nil {
		return "", fmt.Errorf("lock cache %s: %w", b.cache, err)
	}
	defer unlock()
	dir := filepath.Join(b.cache, k.Name+"-"+boot.Digest([]byte(strings.Join(modules, " "))))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := boot.Fetch(ctx, b.log, boot.Kernel{Packages: []string{k.Package}, Modules: modules}, dir); err != nil {
		return "", fmt.Errorf("fetch Linux %s: %w", k.Name, err)
	}
	return dir, nil
}

// initrd packs init, the kernel's modules, and the programs with their data.
func (b *Builder) initrd(kernel string, programs []Program) (string, error) {
	var a boot.Archive
	for _, dir := range []string{"dev", "m", "t", "bin"} {
		a.Dir(dir)
	}
	a.Console()
	add := func(name, path string, perm int) error {
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		a.File(name, perm, content)
		return nil
	}
	if err := add("init", filepath.Join(b.dir, "init"), 0o755); err != nil {
		return "", err
	}
	a.File("deadline", 0o644, []byte(strconv.Itoa(int(lifetime.Seconds()))))
	files, err := filepath.Glob(filepath.Join(kernel, "*.ko"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if err := add("m/"+filepath.Base(f), f, 0o644); err != nil {
			return "", err
		}
	}
	for _, p := range programs {
		dir := "t/" + p.name()
		a.Dir(dir)
		if err := add(dir+"/"+p.name()+".test", b.program(p), 0o755); err != nil {
			return "", err
		}
		a.File(dir+"/"+p.name()+".test.run", 0o644, []byte("^("+strings.Join(p.Tests, "|")+")$"))
		if err := addTree(&a, dir+"/testdata", filepath.Join(p.Dir, "testdata")); err != nil {
			return "", err
		}
	}
	path := filepath.Join(b.dir, filepath.Base(kernel)+".cpio")
	return path, os.WriteFile(path, a.Bytes(), 0o644)
}

// addTree adds a folder with all that is in it, if there is one.
func addTree(a *boot.Archive, name, path string) error {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return filepath.WalkDir(path, func(file string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(path, file)
		if err != nil {
			return err
		}
		inside := filepath.Join(name, rel)
		if entry.IsDir() {
			a.Dir(inside)
			return nil
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		a.File(inside, 0o644, content)
		return nil
	})
}

// disk makes an empty file system for the guest's temporary files: a real disk
// with real requests.
func (b *Builder) disk(ctx context.Context, k Kernel) (string, error) {
	path := filepath.Join(b.dir, k.Name+".disk")
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return "", err
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		mkfs = "/sbin/mkfs.ext4" // an ordinary user's PATH lacks it
	}
	return path, boot.Run(exec.CommandContext(ctx, mkfs, "-q", "-F", path))
}

// watched puts the timer off whenever something is read.
type watched struct {
	io.Reader
	idle *time.Timer
}

func (w watched) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	w.idle.Reset(quiet)
	return n, err
}

// Run boots the kernel, runs the programs in it and copies what they say to
// out. The error says why the guest did not do all of them, with its console.
func (b *Builder) Run(ctx context.Context, k Kernel, programs []Program, out io.Writer) (Report, error) {
	kernel, err := b.kernel(ctx, k)
	if err != nil {
		return Report{}, err
	}
	initrd, err := b.initrd(kernel, programs)
	if err != nil {
		return Report{}, fmt.Errorf("build the initrd: %w", err)
	}
	disk, err := b.disk(ctx, k)
	if err != nil {
		return Report{}, fmt.Errorf("make a disk: %w", err)
	}
	console := filepath.Join(b.dir, k.Name+".console")
	ctx, cancel := context.WithTimeout(ctx, lifetime+30*time.Second)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-machine", "pc", "-accel", k.Accel, "-cpu", cpu, "-smp", "2", "-m", memory,
		"-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", initrd,
		"-append", kernelArgs,
		"-serial", "file:"+console, "-chardev", "stdio,id=tests,signal=off", "-serial", "chardev:tests",
		"-drive", "file="+disk+",if=none,id=disk,format=raw,cache=unsafe", "-device", "virtio-blk-pci,drive=disk")
	var stderr bytes.Buffer
	qemu.Stderr = &stderr
	pipe, err := qemu.StdoutPipe()
	if err != nil {
		return Report{}, err
	}
	if err := qemu.Start(); err != nil {
		return Report{}, fmt.Errorf("start QEMU: %w", err)
	}
	idle := time.AfterFunc(quiet, cancel)
	defer idle.Stop()
	report, err := read(watched{pipe, idle}, out, k.Skips)
	err = errors.Join(err, qemu.Wait())
	if err == nil {
		err = report.complete(programs)
	}
	if err != nil {
		said, _ := os.ReadFile(console)
		err = fmt.Errorf("guest with Linux %s: %w\n%s%s", k.Name, err, stderr.Bytes(), said)
	}
	return report, err
}
