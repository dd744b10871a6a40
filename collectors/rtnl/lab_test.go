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

	"github.com/kvmeter/kvmeter/test/tap"
)

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
	tap.Namespace(t)
	c := open(t)
	tp := tap.Add(t, "vnet7", tap.Options{})
	other := tap.Add(t, "vnet8", tap.Options{})
	i := index(t, c, "vnet7")

	const fromGuest, fromSize, toGuest, toSize = 2000, 1000, 300, 500
	for range fromGuest {
		if _, err := tp.Queues[0].Write(tap.Frame(fromSize)); err != nil {
			t.Fatal(err)
		}
	}
	sock, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sock)
	for range toGuest {
		if err := unix.Sendto(sock, tap.Frame(toSize), 0, &unix.SockaddrLinklayer{Ifindex: i}); err != nil {
			t.Fatal(err)
		}
		if n, err := tp.Queues[0].Read(make([]byte, 2048)); n != toSize {
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
	if got, want := counters64(t, c, index(t, c, other.Name)), (Link{Index: index(t, c, other.Name)}); got != want {
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
	tap.Namespace(t)
	c := open(t)
	tp := tap.Add(t, "vnet7", tap.Options{})
	first := index(t, c, "vnet7")
	if _, err := tp.Queues[0].Write(tap.Frame(100)); err != nil {
		t.Fatal(err)
	}
	tp.Remove()
	if _, err := c.Index("vnet7"); !errors.Is(err, ErrNoLink) {
		t.Errorf("got %v, want %v", err, ErrNoLink)
	}
	tap.Add(t, "vnet7", tap.Options{})
	second := index(t, c, "vnet7")
	if first == second {
		t.Errorf("both have index %d", first)
	}
	if got := counters64(t, c, second); got != (Link{Index: second}) {
		t.Errorf("got %+v, want all zero", got)
	}
}

func TestARemovedInterfaceTellsWhatItHadCounted(t *testing.T) {
	tap.Namespace(t)
	c := open(t)
	want := map[string]Removed{}
	for n := range 60 {
		name := fmt.Sprint("vnet", n)
		tp, err := tap.New(name, tap.Options{})
		if err != nil {
			t.Fatal(err)
		}
		frames := n % 3
		for range frames {
			if _, err := tp.Queues[0].Write(tap.Frame(1000)); err != nil {
				t.Fatal(err)
			}
		}
		want[name] = Removed{Name: name, Link: Link{Index: tp.Index, RxPackets: uint64(frames), RxBytes: uint64(1000 * frames)}}
		tp.Remove()
	}
	if err := c.Removed(func(r Removed) {
		r.RxDropped = 0 // nobody takes these frames
		if r != want[r.Name] {
			t.Errorf("got %+v, want %+v", r, want[r.Name])
		}
		delete(want, r.Name)
	}); err != nil {
		t.Error(err)
	}
	if len(want) > 0 {
		t.Errorf("%d are missing", len(want))
	}
	if err := unix.SetsockoptInt(c.removed, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		tp, err := tap.New("vnet", tap.Options{})
		if err != nil {
			t.Fatal(err)
		}
		tp.Remove()
	}
	if err := c.Removed(func(Removed) {}); !errors.Is(err, ErrMissed) {
		t.Errorf("got %v, want %v", err, ErrMissed)
	}
	if err := c.Removed(func(r Removed) { t.Errorf("%+v was told twice", r) }); err != nil {
		t.Error(err)
	}
}

func TestOnlyTheOwnNamespaceIsRead(t *testing.T) {
	before := open(t)
	tap.Namespace(t)
	c := open(t)
	tap.Add(t, "kvmeter-ns", tap.Options{})
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
	tap.Namespace(t)
	c := open(t)
	for i := range 100 {
		tap.Add(t, fmt.Sprintf("vnet%d", i), tap.Options{})
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
				tp, err := tap.New("comes-and-goes", tap.Options{})
				if err != nil {
					t.Error(err)
					return
				}
				tp.Remove()
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
	tap.Namespace(b)
	c := open(b)
	for i := range 500 {
		tap.Add(b, fmt.Sprintf("vnet%d", i), tap.Options{})
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
