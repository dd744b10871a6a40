//go:build lab

package rtnl

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tap is a tap device that the test plays the guest of.
type tap struct {
	name string
	fd   int
}

// namespace puts the calling test's thread into a network namespace of its
// own, for good: the thread ends with the test.
func namespace(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	// So that the kernel sends nothing of its own accord.
	for _, name := range []string{"default", "all"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

func addTap(t testing.TB, name string) *tap {
	t.Helper()
	tp, err := newTap(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tp.remove)
	return tp
}

func newTap(name string) (*tap, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	tp := &tap{name: name, fd: fd}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err == nil {
		err = up(req)
	}
	if err != nil {
		tp.remove()
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return tp, nil
}

func up(req *unix.Ifreq) error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(sock, unix.SIOCSIFFLAGS, req)
}

func (tp *tap) remove() {
	if tp.fd >= 0 {
		unix.Close(tp.fd)
		tp.fd = -1
	}
}

func open(t testing.TB) *Conn {
	t.Helper()
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func index(t testing.TB, c *Conn, name string) int {
	t.Helper()
	i, err := c.Index(name)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// frame is an Ethernet frame of that size, of a type that nobody handles.
func frame(size int) []byte {
	b := make([]byte, size)
	for i := range 6 {
		b[i] = 0xff
	}
	b[6], b[12], b[13] = 0x02, 0x88, 0xb5
	return b
}

func counters64(t testing.TB, c *Conn, index int) Link {
	t.Helper()
	links, err := c.Read(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	l, ok := Find(links, index)
	if !ok {
		t.Fatalf("interface %d is not among %+v", index, links)
	}
	return l
}

func TestFramesAreCountedExactly(t *testing.T) {
	namespace(t)
	c := open(t)
	tp := addTap(t, "vnet7")
	other := addTap(t, "vnet8")
	i := index(t, c, "vnet7")

	const fromGuest, fromSize, toGuest, toSize = 2000, 1000, 300, 500
	for range fromGuest {
		if _, err := unix.Write(tp.fd, frame(fromSize)); err != nil {
			t.Fatal(err)
		}
	}
	sock, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sock)
	for range toGuest {
		if err := unix.Sendto(sock, frame(toSize), 0, &unix.SockaddrLinklayer{Ifindex: i}); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(tp.fd, make([]byte, 2048)); n != toSize {
			t.Fatalf("the guest got %d bytes, %v", n, err)
		}
	}
	want := Link{
		Index: i, RxPackets: fromGuest, RxBytes: fromGuest * fromSize,
		TxPackets: toGuest, TxBytes: toGuest * toSize,
	}
	got := counters64(t, c, i)
	got.RxDropped = 0 // nobody takes these frames
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if got, want := counters64(t, c, index(t, c, other.name)), (Link{Index: index(t, c, other.name)}); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if b := os.Getenv("KVMETER_CAPTURE"); b != "" {
		capture(t, c, b)
	}
}

// capture writes the kernel's answer to a file, for the tests of the decoder.
func capture(t *testing.T, c *Conn, file string) {
	if _, err := unix.Write(c.fd, c.req); err != nil {
		t.Fatal(err)
	}
	var all []byte
	for d := (decoder{seq: c.seq}); !d.done; {
		n, err := unix.Read(c.fd, c.buf)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c.buf[:n]...)
		if err := d.decode(c.buf[:n]); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, all, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestATapMadeAnewIsAnotherInterface(t *testing.T) {
	namespace(t)
	c := open(t)
	tp := addTap(t, "vnet7")
	first := index(t, c, "vnet7")
	if _, err := unix.Write(tp.fd, frame(100)); err != nil {
		t.Fatal(err)
	}
	tp.remove()
	if _, err := c.Index("vnet7"); !errors.Is(err, ErrNoLink) {
		t.Errorf("got %v, want %v", err, ErrNoLink)
	}
	addTap(t, "vnet7")
	second := index(t, c, "vnet7")
	if first == second {
		t.Errorf("both have index %d", first)
	}
	if got := counters64(t, c, second); got != (Link{Index: second}) {
		t.Errorf("got %+v, want all zero", got)
	}
}

func TestOnlyTheOwnNamespaceIsRead(t *testing.T) {
	before := open(t)
	namespace(t)
	c := open(t)
	addTap(t, "kvmeter-ns")
	if _, err := c.Index("kvmeter-ns"); err != nil {
		t.Error(err)
	}
	if _, err := before.Index("kvmeter-ns"); !errors.Is(err, ErrNoLink) {
		t.Errorf("got %v, want %v", err, ErrNoLink)
	}
	links, err := c.Read(t.Context(), nil)
	if err != nil || len(links) != 2 { // lo and the tap
		t.Errorf("got %+v, %v", links, err)
	}
}

func TestInterfacesThatComeAndGoCostNoOther(t *testing.T) {
	namespace(t)
	c := open(t)
	for i := range 100 {
		addTap(t, fmt.Sprintf("vnet%d", i))
	}
	i := index(t, c, "vnet99")
	stop, stopped := make(chan struct{}), make(chan struct{})
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	go func() {
		defer close(stopped)
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		for {
			select {
			case <-stop:
				return
			default:
				tp, err := newTap("comes-and-goes")
				if err != nil {
					t.Error(err)
					return
				}
				tp.remove()
				time.Sleep(time.Millisecond)
			}
		}
	}()
	var links []Link
	changing := 0
	for range 300 {
		links, err = c.Read(t.Context(), links[:0])
		if errors.Is(err, ErrChanging) {
			changing++
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := Find(links, i); !ok {
			t.Fatalf("interface %d is not among %d", i, len(links))
		}
	}
	close(stop)
	<-stopped
	if changing > 150 {
		t.Errorf("the list was changing %d of 300 times", changing)
	}
}

func BenchmarkRead500Taps(b *testing.B) {
	namespace(b)
	c := open(b)
	for i := range 500 {
		addTap(b, fmt.Sprintf("vnet%d", i))
	}
	var links []Link
	var err error
	b.ReportAllocs()
	for b.Loop() {
		if links, err = c.Read(b.Context(), links[:0]); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(links)), "ns/interface")
}
