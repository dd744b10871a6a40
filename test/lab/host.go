package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Packages are the Debian and Ubuntu packages that a lab needs.
var Packages = []string{
	"libvirt-daemon", "libvirt-daemon-driver-qemu", "qemu-system-x86", "qemu-utils",
	"gcc", "libc6-dev", "binutils", "xz-utils", "iproute2", "rabbitmq-server",
}

// aioSlots is enough for a thousand disks with io=native, which take about
// 1,000 slots each; the kernel's default is enough for 60.
const aioSlots = 1 << 20

const aioMax = "/proc/sys/fs/aio-max-nr"

// checkHost says in one sentence each what guests need and this machine lacks.
func checkHost(daemon string) error {
	var errs []error
	if runtime.GOARCH != "amd64" {
		errs = append(errs, errors.New("the lab's guests need an x86-64 machine"))
	}
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("the lab needs root for libvirtd, its mounts and taps: run it with sudo"))
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		errs = append(errs, errors.New("no /dev/net/tun, which guests' NICs need: load it with `modprobe tun`"))
	}
	errs = append(errs, checkCommands(daemon, "qemu-system-x86_64", "qemu-img", "gcc", "as", "ld", "ip"))
	return errors.Join(errs...)
}

// checkCommands says which of the commands are missing and how to get all.
func checkCommands(names ...string) error {
	var missing []string
	for _, name := range names {
		if _, err := lookPath(name); err != nil {
			missing = append(missing, name)
		}
	}
	if missing == nil {
		return nil
	}
	return fmt.Errorf("the lab needs %s: apt-get install --no-install-recommends %s",
		strings.Join(missing, ", "), strings.Join(Packages, " "))
}

// lookPath also finds what is in the folders of an administrator's PATH.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if p, e := exec.LookPath(dir + name); e == nil {
			return p, nil
		}
	}
	return "", err
}

// checkKVM says why there can be no KVM guests, if so.
func checkKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("no KVM guests here, Linux guests under TCG work all the same: %w (load kvm_intel or kvm_amd, or enable nested virtualisation)", err)
	}
	return f.Close()
}

func (l *Lab) bridge() string { return "kmbr" + l.id }

// Inside calls f in the lab's network namespace.
func (l *Lab) Inside(f func() error) error {
	if l.netns == "" {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock it: the thread ends here
		ns, err := os.Open(l.namespace())
		if err == nil {
			err = errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), ns.Close())
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// namespace is the path of the lab's network namespace, where it is apart.
func (l *Lab) namespace() string { return "/run/netns/km" + l.id }

// makeNamespace makes the network namespace of a lab that is apart, where the
// kernel sends nothing of its own accord.
func (l *Lab) makeNamespace() error {
	if l.netns == "" {
		return nil
	}
	if _, err := os.Stat(l.namespace()); err == nil {
		return nil
	}
	if err := ip("netns", "add", l.netns); err != nil {
		return err
	}
	return l.Inside(func() error { return errors.Join(noIPv6("all"), noIPv6("default")) })
}

// makeBridge makes the lab's bridge: it has no address, sends nothing of its
// own, and the machine's firewall and routes have nothing to do with it.
func (l *Lab) makeBridge() error { return l.Inside(l.bridgeHere) }

func (l *Lab) bridgeHere() error {
	br := l.bridge()
	if _, err := net.InterfaceByName(br); err == nil {
		return nil
	}
	if err := ip("link", "add", br, "type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0"); err != nil {
		if _, exists := net.InterfaceByName(br); exists == nil {
			return nil // another goroutine's
		}
		return err
	}
	if err := noIPv6(br); err != nil {
		return err
	}
	return ip("link", "set", br, "up")
}

// removeNetwork removes the lab's network namespace, and the bridge, which may be
// in it.
func (l *Lab) removeNetwork() error {
	if _, err := os.Stat(l.namespace()); err == nil {
		return ip("netns", "del", "km"+l.id)
	}
	if _, err := net.InterfaceByName(l.bridge()); err != nil {
		return nil
	}
	return ip("link", "del", l.bridge())
}

// quiet keeps everything from a tap that is not sent to its guest on purpose.
func quiet(tap string) error {
	err := errors.Join(noIPv6(tap), ip("link", "set", tap, "type", "bridge_slave",
		"flood", "off", "mcast_flood", "off", "bcast_flood", "off", "learning", "off", "isolated", "on"))
	if err != nil {
		return fmt.Errorf("quieten %s: %w", tap, err)
	}
	return nil
}

// noIPv6 keeps the kernel from announcing an address on a device.
func noIPv6(dev string) error {
	path := "/proc/sys/net/ipv6/conf/" + dev + "/disable_ipv6"
	if err := os.WriteFile(path, []byte("1"), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func ip(args ...string) error {
	path, err := lookPath("ip")
	if err != nil {
		return err
	}
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func readNumber(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

// raiseAIO makes room for disks with io=native and remembers what there was.
func (l *Lab) raiseAIO() error {
	old, err := readNumber(aioMax)
	if err != nil || old >= aioSlots {
		return err
	}
	if err := os.WriteFile(l.path("aio-max-nr"), []byte(strconv.FormatUint(old, 10)), 0o644); err != nil {
		return err
	}
	return os.WriteFile(aioMax, []byte(strconv.Itoa(aioSlots)), 0o644)
}

// restoreAIO puts fs.aio-max-nr back if this lab raised it, nobody changed it
// since, and what is in use fits in.
func (l *Lab) restoreAIO() error {
	old, err := readNumber(l.path("aio-max-nr"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	now, err := readNumber(aioMax)
	if err != nil {
		return err
	}
	used, err := readNumber("/proc/sys/fs/aio-nr")
	if err != nil {
		return err
	}
	if now != aioSlots || used > old {
		return nil
	}
	return os.WriteFile(aioMax, []byte(strconv.FormatUint(old, 10)), 0o644)
}
