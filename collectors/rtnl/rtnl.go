// Package rtnl reads the counters of all network interfaces with one request
// (RTM_GETSTATS with the 64-bit link counters), in the network namespace that
// it was opened in. It needs no privilege.
package rtnl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoLink says that no interface has the name.
	ErrNoLink = errors.New("no such network interface")
	// ErrChanging says that interfaces were added or removed during each
	// attempt to list them, so that some may be missing.
	ErrChanging = errors.New("the list of network interfaces keeps changing")
)

const (
	dumpTries = 5
	timeout   = 2 * time.Second
	// The kernel fills at most 32 KiB a message, whatever room it is given.
	bufferSize = 32 << 10
)

// Link is what an interface has counted since it was created. The direction is
// the host's: what a tap device transmits, its guest receives.
type Link struct {
	// Index names the interface. The same name with another index is another
	// interface, with counters of its own.
	Index int
	// In bytes, Ethernet headers included.
	RxBytes, TxBytes uint64
	// In packets as the kernel handled them: one may be many on the wire (GSO).
	RxPackets, TxPackets uint64
	RxErrors, TxErrors   uint64
	RxDropped, TxDropped uint64
}

// Conn is a socket to the kernel. It is for one goroutine at a time.
type Conn struct {
	fd      int
	removed int    // the socket for what is removed
	network uint64 // inode of the network namespace's /proc/PID/net/dev; 0: not known
	seq     uint32
	dirty   bool // an answer may not have been read to its end
	req     []byte
	buf     []byte
}

// Open returns a connection for the network namespace of the calling thread.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	// The kernel answers at once; a deadline only so that nothing can hang us.
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set deadline of netlink socket: %w", err)
	}
	removed, err := subscribe()
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("subscribe to removed interfaces: %w", err)
	}
	network, _ := networkOf("thread-self")
	return &Conn{fd: fd, removed: removed, network: network, req: request(), buf: make([]byte, bufferSize)}, nil
}

// networkOf tells network namespaces apart, for which the link in /proc/PID/ns
// would need privileges.
func networkOf(process string) (inode uint64, ok bool) {
	var s unix.Stat_t
	err := unix.Stat("/proc/"+process+"/net/dev", &s)
	return s.Ino, err == nil
}

// Elsewhere reports whether the interface that a process knows by the name is in a
// network namespace of its own, as in a container: one of that name here is another.
func (c *Conn) Elsewhere(pid int, name string) bool {
	process := strconv.Itoa(pid)
	network, ok := networkOf(process)
	if !ok || c.network == 0 || network == c.network {
		return false
	}
	text, _ := os.ReadFile("/proc/" + process + "/net/dev")
	for line := range strings.Lines(string(text)) {
		if device, _, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(device) == name {
			return true
		}
	}
	return false
}

// Read appends the counters of all interfaces to links, sorted by index, and
// returns them. It allocates only what links lacks of room.
func (c *Conn) Read(ctx context.Context, links []Link) ([]Link, error) {
	have := len(links)
	for range dumpTries {
		if err := ctx.Err(); err != nil {
			return links[:have], fmt.Errorf("read link counters: %w", err)
		}
		var err error
		var whole bool
		links, whole, err = c.dump(links[:have])
		if err != nil {
			c.dirty = true
			return links[:have], fmt.Errorf("read link counters: %w", err)
		}
		if whole {
			slices.SortFunc(links[have:], func(a, b Link) int { return cmp.Compare(a.Index, b.Index) })
			return links, nil
		}
	}
	return links[:have], fmt.Errorf("read link counters: %w", ErrChanging)
}

// dump asks once. The answer is not whole if the list changed meanwhile.
func (c *Conn) dump(links []Link) (_ []Link, whole bool, err error) {
	if c.dirty {
		if err := c.drain(); err != nil {
			return links, false, err
		}
	}
	c.seq++
	setSeq(c.req, c.seq)
	if _, err := unix.Write(c.fd, c.req); err != nil {
		return links, false, fmt.Errorf("send request: %w", err)
	}
	d := decoder{seq: c.seq, links: links}
	for !d.done {
		n, err := unix.Read(c.fd, c.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return d.links, false, fmt.Errorf("receive answer: %w", err)
		}
		if err := d.decode(c.buf[:n]); err != nil {
			return d.links, false, err
		}
	}
	return d.links, !d.interrupted, nil
}

// drain reads what is left of an answer that was given up.
func (c *Conn) drain() error {
	for {
		_, _, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_DONTWAIT)
		switch err {
		case nil, unix.EINTR:
		case unix.EAGAIN:
			c.dirty = false
			return nil
		default:
			return fmt.Errorf("drain socket: %w", err)
		}
	}
}

// Index returns the index of the interface that has that name now. The error
// is [ErrNoLink] if none has.
func (c *Conn) Index(name string) (int, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("interface %q: %w", name, ErrNoLink) // too long to be one
	}
	err = unix.IoctlIfreq(c.fd, unix.SIOCGIFINDEX, req)
	if errors.Is(err, unix.ENODEV) {
		err = ErrNoLink
	}
	if err != nil {
		return 0, fmt.Errorf("interface %q: %w", name, err)
	}
	return int(req.Uint32()), nil
}

// Find returns the link with that index of links as Read returned them.
func Find(links []Link, index int) (Link, bool) {
	i, found := slices.BinarySearchFunc(links, index, func(l Link, index int) int { return cmp.Compare(l.Index, index) })
	if !found {
		return Link{}, false
	}
	return links[i], true
}

// Close closes the socket.
func (c *Conn) Close() error {
	return errors.Join(unix.Close(c.removed), unix.Close(c.fd))
}
