// Package tap makes tap devices whose guest is the test.
package tap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// HeaderSize is the length of struct virtio_net_hdr, which comes before each
// frame of a tap made with [Options.Header].
const HeaderSize = 10

// Options say what a tap is like.
type Options struct {
	Queues int  // more than 1: a multi-queue tap
	Header bool // frames have a virtio header, and may be large ones that the guest or the host leaves to be split
	Down   bool // it is not set up
}

// Tap is a tap device of the calling thread's network namespace. Its queues
// are what QEMU has of it.
type Tap struct {
	Name   string
	Index  int
	Queues []*os.File
}

// Namespace puts the calling test's thread into a network namespace of its
// own, for good: the thread ends with the test. The kernel sends nothing there
// of its own accord.
func Namespace(t testing.TB) {
	t.Helper()
	if err := namespace(); err != nil {
		t.Fatal(err)
	}
}

func namespace() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	for _, name := range []string{"default", "all"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Add makes a tap that ends with the test.
func Add(t testing.TB, name string, opts Options) *Tap {
	t.Helper()
	tp, err := New(name, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tp.Remove)
	return tp
}

// New makes a tap.
func New(name string, opts Options) (*Tap, error) {
	tp := &Tap{Name: name}
	for range max(opts.Queues, 1) {
		if err := tp.addQueue(opts); err != nil {
			tp.Remove()
			return nil, fmt.Errorf("make tap %s: %w", name, err)
		}
	}
	if err := tp.lookUp(opts); err != nil {
		tp.Remove()
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return tp, nil
}

func (tp *Tap) addQueue(opts Options) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if err := tp.setQueue(fd, opts); err != nil {
		unix.Close(fd)
		return err
	}
	// Not before: a queue of no tap can't be waited for.
	tp.Queues = append(tp.Queues, os.NewFile(uintptr(fd), tp.Name))
	return nil
}

func (tp *Tap) setQueue(fd int, opts Options) error {
	req, err := unix.NewIfreq(tp.Name)
	if err != nil {
		return err
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if opts.Queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	if opts.Header {
		flags |= unix.IFF_VNET_HDR
	}
	req.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return err
	}
	if opts.Header {
		return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4)
	}
	return nil
}

func (tp *Tap) lookUp(opts Options) error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	req, err := unix.NewIfreq(tp.Name)
	if err != nil {
		return err
	}
	if !opts.Down {
		if err := Up(tp.Name); err != nil {
			return err
		}
	}
	if err := unix.IoctlIfreq(sock, unix.SIOCGIFINDEX, req); err != nil {
		return err
	}
	tp.Index = int(req.Uint32())
	return nil
}

// Up sets an interface up.
func Up(name string) error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(sock, unix.SIOCSIFFLAGS, req)
}

// Remove removes the tap, if it is still there.
func (tp *Tap) Remove() {
	for _, q := range tp.Queues {
		q.Close()
	}
	tp.Queues = nil
}

// Frame is an Ethernet frame of that size, of a type that nobody handles.
func Frame(size int) []byte {
	b := make([]byte, size)
	for i := range 6 {
		b[i] = 0xff
	}
	b[6], b[12], b[13] = 0x02, 0x88, 0xb5
	return b
}

// Guest is a network stack behind a tap, in a network namespace of its own.
type Guest struct {
	do   chan func() error
	done chan error
}

// AddGuest gives tp, which has one queue with headers, a guest with that
// address (such as 10.0.0.2/24), until the test ends.
func AddGuest(t testing.TB, tp *Tap, address string) *Guest {
	t.Helper()
	g := &Guest{do: make(chan func() error), done: make(chan error)}
	go func() {
		err := namespace()
		for do := range g.do {
			if err == nil {
				err = do()
			}
			g.done <- err
			err = nil
		}
	}()
	t.Cleanup(func() { close(g.do) })
	var inside *Tap
	g.Do(t, func() (err error) {
		if inside, err = New("eth0", Options{Header: true}); err != nil {
			return err
		}
		return Address("eth0", address)
	})
	t.Cleanup(inside.Remove)
	go pump(inside.Queues[0], tp.Queues[0])
	go pump(tp.Queues[0], inside.Queues[0])
	return g
}

// Do runs f in the guest's network namespace.
func (g *Guest) Do(t testing.TB, f func() error) {
	t.Helper()
	g.do <- f
	if err := <-g.done; err != nil {
		t.Fatal(err)
	}
}

// Address gives the interface an address, such as 10.0.0.1/24.
func Address(name, address string) error {
	prefix, err := netip.ParsePrefix(address)
	if err != nil {
		return err
	}
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	for _, set := range []struct {
		request uint
		address []byte
	}{
		{unix.SIOCSIFADDR, prefix.Addr().AsSlice()},
		{unix.SIOCSIFNETMASK, net.CIDRMask(prefix.Bits(), 32)},
	} {
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if err := req.SetInet4Addr(set.address); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(sock, set.request, req); err != nil {
			return fmt.Errorf("give %s the address %s: %w", name, address, err)
		}
	}
	return nil
}

// pump carries frames until one of the taps is removed.
func pump(from, to *os.File) {
	buf := make([]byte, 1<<17)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		// A queue that is not up loses the frame, as a cable would.
		_, _ = to.Write(buf[:n])
	}
}
