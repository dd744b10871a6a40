// Command init is the first process of a guest: it mounts the guest's disk and
// hands over to the init that is there.
package main

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/test/boot/inside"
)

func main() {
	fmt.Println("init:", start())
	inside.PowerOff()
}

// start returns only if it fails.
func start() error {
	if err := inside.Mount("dev", "/dev", "devtmpfs"); err != nil {
		return err
	}
	if err := inside.InsertModules(); err != nil {
		return err
	}
	if err := inside.Mount("/dev/vda", "/root", "ext4"); err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return unix.Chdir("/root") },
		func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") },
		func() error { return unix.Chroot(".") },
		func() error { return unix.Exec("/sbin/init", []string{"/sbin/init"}, nil) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("hand over to the disk's init: %w", err)
		}
	}
	return nil
}
