// Package boot gets and makes what guests boot from: kernels of a distribution,
// and archives that a kernel unpacks as its first file system.
package boot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// GuestVariable is the environment variable that tells tests that they run in a
// guest of package vm, and not where they were built. Its value is the release
// of the guest's kernel.
const GuestVariable = "KVMETER_VM"

// NoLab is why a test that needs a lab is skipped in such a guest.
const NoLab = "a lab can't run in a guest"

// Make makes the file at path, unless it is there, in one step.
func Make(path string, build func(tmp string) error) error {
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

// Digest names the content of files, for the names of what is made of them.
func Digest(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

// Run runs a command; its error has what the command said.
func Run(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Lock waits for the only lock on a file, which ends with the process.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return func() { _ = f.Close() }, nil
}
