// Command init is the first process of a guest that package vm boots. It runs
// the tests that the folder /t holds, one program after the other, and turns
// the guest off. What they say goes out on the second serial port:
//
//	@@ begin NAME
//	(output of the program)
//	@@ end NAME STATUS
//
// A file named like the program with ".run" at its end says which of its tests
// to run, "/deadline" how many seconds the guest may live.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/test/boot"
	"github.com/kvmeter/kvmeter/test/boot/inside"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("init:", err) // on the console, which is shown
	}
	inside.PowerOff()
}

func run() error {
	for _, m := range []struct{ source, dir, kind string }{
		{"proc", "/proc", "proc"},
		{"sys", "/sys", "sysfs"},
		{"dev", "/dev", "devtmpfs"},
		{"bpf", "/sys/fs/bpf", "bpf"},
		{"tracefs", "/sys/kernel/tracing", "tracefs"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2"},
	} {
		if err := inside.Mount(m.source, m.dir, m.kind); err != nil {
			return err
		}
	}
	deadline, err := os.ReadFile("/deadline")
	if err != nil {
		return err
	}
	seconds, err := strconv.Atoi(strings.TrimSpace(string(deadline)))
	if err != nil {
		return fmt.Errorf("read /deadline: %w", err)
	}
	time.AfterFunc(time.Duration(seconds)*time.Second, func() {
		fmt.Printf("init: the tests were not done after %d s\n", seconds)
		inside.PowerOff()
	})
	if err := inside.InsertModules(); err != nil {
		return err
	}
	if err := inside.Mount("/dev/vda", "/tmp", "ext4"); err != nil {
		return err
	}
	if err := os.Chmod("/tmp", 0o777|os.ModeSticky); err != nil {
		return fmt.Errorf("open /tmp to everybody: %w", err)
	}
	out, err := inside.OpenSerial("/dev/ttyS1")
	if err != nil {
		return err
	}
	programs, err := filepath.Glob("/t/*/*.test")
	if err != nil {
		return err
	}
	for _, p := range programs {
		if err := test(p, out); err != nil {
			return err
		}
	}
	return nil
}

// test runs one program in its folder, and collects whatever else ended
// meanwhile: as the first process it inherits all orphans.
func test(program string, out *os.File) error {
	name := filepath.Base(program)
	which, err := os.ReadFile(program + ".run")
	if err != nil {
		return err
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer func() { _ = null.Close() }()
	fmt.Fprintf(out, "@@ begin %s\n", name)
	process, err := os.StartProcess(program, []string{
		program, "-test.v", "-test.count=1", "-test.run=" + strings.TrimSpace(string(which)),
	}, &os.ProcAttr{
		Dir:   filepath.Dir(program),
		Env:   []string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp", boot.GuestVariable + "=" + strings.TrimSpace(string(release))},
		Files: []*os.File{null, out, out},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for %s: %w", name, err)
		}
		if pid == process.Pid {
			fmt.Fprintf(out, "@@ end %s %d\n", name, status)
			return nil
		}
	}
}
