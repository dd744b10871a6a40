//go:build lab

package packages

import (
	"bytes"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"
)

var guest = flag.Bool("guest", false, "try the packages in a guest that boots Debian, too")

// root makes a root of the machine's own, of which nothing is changed, without what
// is there of kvmeter.
func root(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(dir, "root")
	options := "lowerdir=/,upperdir=" + filepath.Join(dir, "upper") + ",workdir=" + filepath.Join(dir, "work")
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		t.Skipf("no overlay of the machine's root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("proc", filepath.Join(root, "proc"), "proc", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/dev", filepath.Join(root, "dev"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"etc/kvmeter", "var/lib/kvmeter", "run/kvmeter", "run/systemd"} {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func build(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("packages are installed by root")
	}
	dir := t.TempDir()
	err := Build(t.Context(), dir)
	if err != nil && strings.Contains(err.Error(), `: Get "https://`) {
		t.Skipf("nfpm, which makes packages, can't be fetched: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestPackagesInARoot(t *testing.T) {
	root, dir := root(t), build(t)
	if out, err := exec.Command("cp", "-r", dir, filepath.Join(root, "packages")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := exec.Command("chroot", root, "/packages/scenario.sh").CombinedOutput()
	check(t, out, err)
}

func TestPackagesInAGuest(t *testing.T) {
	if !*guest {
		t.Skip("it boots a guest, which takes minutes: go test -args -guest, as `make test-packages` does")
	}
	var out bytes.Buffer
	err := Boot(t.Context(), zaptest.NewLogger(t), build(t), io.MultiWriter(&out, t.Output()))
	check(t, out.Bytes(), err)
}

func check(t *testing.T, out []byte, err error) {
	t.Helper()
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "@@ ") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if err != nil || !bytes.Contains(out, []byte("@@ ok")) {
		t.Errorf("%v\n%s", err, out)
	}
}
