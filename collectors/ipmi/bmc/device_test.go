package bmc

import (
	"io/fs"
	"strings"
	"syscall"
	"testing"
)

func TestDevicesThatCannotBeOpened(t *testing.T) {
	for errno, want := range map[syscall.Errno]string{
		syscall.ENOENT: "there is no /dev/ipmi0: the host has no BMC that speaks IPMI (some speak only Redfish), or the modules ipmi_si and ipmi_devintf are not loaded",
		syscall.EACCES: "open /dev/ipmi0: permission denied: let the agent's group use the device by a udev rule (docs/ipmi.md)",
		syscall.EBUSY:  "open /dev/ipmi0: device or resource busy: another program holds the device",
		syscall.ENODEV: "open /dev/ipmi0: no such device: the driver found no BMC",
		syscall.EIO:    "open /dev/ipmi0: input/output error",
	} {
		got := explain("/dev/ipmi0", &fs.PathError{Op: "open", Path: "/dev/ipmi0", Err: errno})
		if got.Error() != want || strings.Contains(got.Error(), "\n") {
			t.Errorf("got %v, want %s", got, want)
		}
	}
}
