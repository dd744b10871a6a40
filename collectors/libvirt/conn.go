package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// maxPacket bounds a packet of the RPC: libvirt's own bound, VIR_NET_MESSAGE_MAX.
const maxPacket = 32 << 20

var errNotLibvirt = errors.New("what answers on the socket is not libvirt")

// packetConn hands on the packets of libvirt's RPC and refuses what cannot be
// one: the client library would trust any length. dead is closed once nothing
// more can be read.
type packetConn struct {
	net.Conn
	dead chan struct{}
	once sync.Once
	head [4]byte // length of the packet that is being read
	have int     // bytes of head that were read
	left int     // bytes of the packet that were not
}

func (c *packetConn) Read(p []byte) (int, error) {
	n, err := c.read(p)
	if err != nil {
		c.once.Do(func() { close(c.dead) })
	}
	return n, err
}

// read never reads beyond a packet's head before it has checked it.
func (c *packetConn) read(p []byte) (int, error) {
	if c.left > 0 {
		n, err := c.Conn.Read(p[:min(len(p), c.left)])
		c.left -= n
		return n, err
	}
	n, err := c.Conn.Read(p[:min(len(p), len(c.head)-c.have)])
	c.have += copy(c.head[c.have:], p[:n])
	if c.have == len(c.head) {
		const header = 28 // length, program, version, procedure, type, serial, status
		size := binary.BigEndian.Uint32(c.head[:])
		if size < header || size > maxPacket {
			return 0, errNotLibvirt
		}
		c.have, c.left = 0, int(size)-len(c.head)
	}
	return n, err
}

// link is one connection to a libvirt daemon.
type link struct {
	*golibvirt.Libvirt
	path    string // of the socket
	conn    *packetConn
	timeout time.Duration
	ctx     context.Context // of the subscriptions
	cancel  context.CancelFunc

	mu     sync.Mutex
	closed bool
	calls  sync.WaitGroup
}

var (
	errTimeout = errors.New("libvirt does not answer")
	errClosed  = errors.New("libvirt closed the connection")
)

// Dial implements the library's dialer: the connection exists already.
func (c *packetConn) Dial() (net.Conn, error) { return c, nil }

// dial connects to the first of the sockets on which a libvirt daemon answers.
func dial(ctx context.Context, sockets []string, timeout time.Duration) (*link, error) {
	var errs []error
	for _, path := range sockets {
		k, err := dialOne(ctx, path, timeout)
		if err == nil {
			return k, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return nil, noSocket(sockets)
	}
	return nil, errors.Join(errs...)
}

func noSocket(sockets []string) error {
	return fmt.Errorf("there is no socket %s (is libvirtd or virtqemud there? one in a container may have its socket elsewhere, which the setting libvirt names)", strings.Join(sockets, " or "))
}

// dialOne connects to the daemon on a socket: to the host's QEMUs, or where it is an
// ordinary user's, to his.
func dialOne(ctx context.Context, path string, timeout time.Duration) (*link, error) {
	k, err := dialAs(ctx, path, golibvirt.QEMUSystem, timeout)
	var refused golibvirt.Error
	if errors.As(err, &refused) {
		if own, ownErr := dialAs(ctx, path, golibvirt.QEMUSession, timeout); ownErr == nil {
			return own, nil
		}
	}
	return k, err
}

// dialUnix connects to a socket whose path may be longer than the address of one.
func dialUnix(ctx context.Context, path string, timeout time.Duration) (net.Conn, error) {
	dialer := net.Dialer{Timeout: timeout}
	if len(path) < len(syscall.RawSockaddrUnix{}.Path) {
		return dialer.DialContext(ctx, "unix", path)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	return dialer.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

func dialAs(ctx context.Context, path string, uri golibvirt.ConnectURI, timeout time.Duration) (*link, error) {
	conn, err := dialUnix(ctx, path, timeout)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("connect to libvirt at %s: %w (this user needs to be let in: unix_sock_ro_perms in libvirtd.conf, SocketMode= of the socket's unit, or the folders above it)", path, fs.ErrPermission)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("connect to libvirt at %s: nobody listens there", path)
	case err != nil:
		return nil, fmt.Errorf("connect to libvirt: %w", err)
	}
	pc := &packetConn{Conn: conn, dead: make(chan struct{})}
	k := &link{Libvirt: golibvirt.NewWithDialer(pc), path: path, conn: pc, timeout: timeout}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	if err := k.call(ctx, func() error { return k.ConnectToURI(uri) }); err != nil {
		k.close()
		return nil, fmt.Errorf("connect to libvirt at %s: %w", path, err)
	}
	return k, nil
}

// call runs f, which makes one call over the connection, and waits for it
// until the deadline. A call that was given up goes on until it is answered or
// the connection closed.
func (k *link) call(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	if !k.start(func() { done <- f() }) {
		return errClosed
	}
	timer := time.NewTimer(k.timeout)
	defer timer.Stop()
	select {
	case err := <-done:
		// The library says EINVAL of a connection that it has given up.
		if errors.Is(err, io.EOF) || errors.Is(err, golibvirt.ErrInterrupted) || errors.Is(err, syscall.EINVAL) {
			return errClosed
		}
		return err
	case <-timer.C:
		return fmt.Errorf("%w within %s", errTimeout, k.timeout)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// start runs f, unless the connection is being closed.
func (k *link) start(f func()) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.closed {
		k.calls.Go(f)
	}
	return !k.closed
}

// dead reports whether nothing more can be read from the connection.
func (k *link) dead() bool {
	select {
	case <-k.conn.dead:
		return true
	default:
		return false
	}
}

// close ends the connection, and with it all calls and subscriptions.
func (k *link) close() {
	k.mu.Lock()
	k.closed = true
	k.mu.Unlock()
	_ = k.conn.Close()
	// The library's reader ends at the next read; only then may subscriptions
	// end, since it hands events to them without a way out.
	<-k.conn.dead
	k.cancel()
	k.calls.Wait()
}

// subscribe calls each with every event of the kind and its domain.
func (k *link) subscribe(ctx context.Context, id golibvirt.DomainEventID, each func(d golibvirt.Domain, event any)) error {
	var events <-chan any
	err := k.call(ctx, func() (err error) {
		events, err = k.SubscribeEvents(k.ctx, id, nil)
		return err
	})
	if err != nil {
		return err
	}
	k.start(func() {
		for e := range events {
			switch e := e.(type) {
			case *golibvirt.DomainEventCallbackLifecycleMsg:
				each(e.Msg.Dom, e)
			case *golibvirt.DomainEventCallbackDeviceAddedMsg:
				each(e.Dom, e)
			case *golibvirt.DomainEventCallbackDeviceRemovedMsg:
				each(e.Msg.Dom, e)
			case *golibvirt.DomainEventCallbackMetadataChangeMsg:
				each(e.Dom, e)
			case *golibvirt.DomainEventCallbackBalloonChangeMsg:
				each(e.Msg.Dom, e)
			case *golibvirt.DomainEventBlockJob2Msg:
				each(e.Dom, e)
			case *golibvirt.DomainEventCallbackTrayChangeMsg:
				each(e.Msg.Dom, e)
			}
		}
	})
	return nil
}
